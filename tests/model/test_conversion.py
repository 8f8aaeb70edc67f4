"""Adapters saved for transformers v4 on models of v5, against the installed peft."""

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import peft_c  # noqa: E402
from peft_c.import_utils import is_transformers_ge_v5  # noqa: E402

pytestmark = pytest.mark.skipif(not is_transformers_ge_v5, reason="needs transformers v5")


def mixtral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=3, **sizes)
    return transformers.MixtralForCausalLM(config).eval()


def checkpoint_of_v4(r):
    """LoRA on the attention and on each expert's w1 (gate), w2 (down) and w3 (up)."""
    torch.manual_seed(1)
    shapes = {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}
    state = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}"
        state[f"{name}.self_attn.q_proj.lora_A.weight"] = torch.randn(r, 16) / 10
        state[f"{name}.self_attn.q_proj.lora_B.weight"] = torch.randn(16, r) / 10
        for expert in range(3):
            for weight, (out, inner) in shapes.items():
                expert_name = f"{name}.block_sparse_moe.experts.{expert}.{weight}"
                state[f"{expert_name}.lora_A.weight"] = torch.randn(r, inner) / 10
                state[f"{expert_name}.lora_B.weight"] = torch.randn(out, r) / 10
    return state


@pytest.mark.parametrize("targets", [["q_proj", "w1", "w2", "w3"], r".*\.(q_proj|w1|w2|w3)"], ids=["list", "regex"])
def test_experts_are_fused_alike(targets):
    ids = torch.arange(10).view(2, 5)
    results = []
    for lib in (peft, peft_c):
        config = lib.LoraConfig(r=2, lora_alpha=4, target_modules=targets)
        model = lib.get_peft_model(mixtral(), config).eval()
        loaded = lib.set_peft_model_state_dict(model, checkpoint_of_v4(2))
        assert not loaded.unexpected_keys
        config = model.peft_config["default"]
        targeted = [config.target_modules, config.target_parameters, config.rank_pattern, config.alpha_pattern]
        with torch.no_grad():
            results.append((targeted, lib.get_peft_model_state_dict(model), model(input_ids=ids).logits))
    (targeted, state, logits), ours = results
    assert ours[0] == targeted
    assert set(ours[1]) == set(state)
    for key, value in state.items():
        torch.testing.assert_close(ours[1][key], value, rtol=0, atol=0, msg=key)
    torch.testing.assert_close(ours[2], logits, rtol=1e-5, atol=1e-6)


def test_half_of_a_fused_weight_is_refused():
    config = peft_c.LoraConfig(r=2, target_modules=["q_proj", "w1"])
    model = mixtral()
    with pytest.raises(ValueError, match="w1 without also targeting w3"):
        peft_c.get_peft_model(model, config)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert config.target_modules == {"q_proj", "w1"}


def test_fused_update_is_the_sum_of_its_parts():
    from peft_c.utils.transformers_weight_conversion import PeftConcatenate

    a, b = torch.randn(2, 3, 5), torch.randn(2, 4, 3)  # two weights (4, 5) of rank 3
    tensors = {"w.1": b[0], "w.3": b[1]}
    fused = PeftConcatenate(dim=0).convert(tensors, ["w.1", "w.3"], ["w"], full_layer_name="w")["w"]
    torch.testing.assert_close(fused @ torch.cat(list(a)), torch.cat(list(b @ a)))
    with pytest.raises(ValueError, match="2 or 3 dims"):
        PeftConcatenate(dim=0).convert({"w.1": b[0], "w.3": b}, ["w.1", "w.3"], ["w"], full_layer_name="w")
