"""X-LoRA on a tiny model, against the installed peft."""

import copy

import pytest
import torch

import peft_c

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([[1, 5, 9, 3], [2, 2, 7, 4]])


@pytest.fixture
def both(llama, tmp_path):
    """X-LoRA over the same two experts in peft_c and in PEFT."""

    def build(**options):
        for i in range(2):
            torch.manual_seed(i)
            config = peft.LoraConfig(task_type="CAUSAL_LM", r=2 + i, init_lora_weights=False)
            peft.get_peft_model(llama(), config).save_pretrained(tmp_path / str(i))
        models = []
        for package in (peft_c, peft):
            base = llama()
            base.config.use_cache = False
            torch.manual_seed(5)
            adapters = {str(i): str(tmp_path / str(i)) for i in range(2)}
            config = package.XLoraConfig(
                task_type="CAUSAL_LM", hidden_size=32, xlora_size=8, adapters=adapters, **options
            )
            models.append(package.get_peft_model(base, config).eval())
        return models

    return build


def outcome(model):
    logits = model(input_ids=IDS).logits.detach()
    return logits, model.base_model.get_latest_scalings().detach()


def assert_same(ours, theirs):
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layerwise_scalings": True, "xlora_depth": 2},
        {"top_k_lora": 1, "enable_softmax": False, "enable_softmax_topk": True},
        {"softmax_temperature": 0.3, "global_scaling_weight": 2.0, "scaling_pass_value": 0.5},
    ],
)
def test_outputs_and_scalings(both, options):
    assert_same(*map(outcome, both(**options)))


@pytest.mark.parametrize("trained", [True, False])
def test_setting_x_loras_own_name_leaves_its_experts_active(both, trained):
    ours, theirs = both(use_trainable_adapters=trained)
    expected = outcome(theirs)
    before = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (ours, theirs)]
    assert before[0] == before[1]
    ours.set_adapter("default")
    assert_same(outcome(ours), expected)
    assert {name: p.requires_grad for name, p in ours.named_parameters()} == before[0]


@pytest.mark.parametrize("experts", ["1", ["1"], ["1", "0"]])
def test_setting_some_experts(both, experts):
    models = both()
    for model in models:
        model.base_model.set_adapter(copy.copy(experts))
    assert_same(*map(outcome, models))
    with pytest.raises(ValueError, match="nope"):
        models[0].base_model.set_adapter("nope")
