"""Where peft_c does on purpose something else than PEFT 0.21.2: each entry of docs/numerics.md, shown."""

import copy

import pytest
import torch
from torch import nn

import peft_c
from peft_c import LoraConfig, get_peft_model


def net(dtype=torch.float32, r=4, **options):
    """Two Linear layers with an adapter that does something."""
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).to(dtype)
    options = {"target_modules": ["0", "2"], "init_lora_weights": False, **options}
    return get_peft_model(base, LoraConfig(r=r, **options)).eval()


def base_weights(model):
    return {k: v.detach().clone() for k, v in model.named_parameters() if "lora_" not in k}


def same_bits(model, weights):
    return all(torch.equal(p, weights[k]) for k, p in model.named_parameters() if k in weights)


def inputs(dtype=torch.float32):
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_the_bits(dtype):
    model = net(dtype)
    model.add_adapter("more", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    before = base_weights(model)
    for cycle in range(50):
        model.base_model.set_adapter(["default", "more"] if cycle % 2 else "default")
        model.merge_adapter()
        assert not same_bits(model, before)
        model.unmerge_adapter()
        assert same_bits(model, before)


def test_unmerge_after_training_and_set_scale_while_merged():
    model = net()
    before = base_weights(model)
    model.merge_adapter()
    layer = model.base_model.model[0]
    layer.set_scale("default", 5.0)
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(1.0)
    model.unmerge_adapter()
    assert same_bits(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safe_merge_gives_the_bits_of_merge_in_place(dtype):
    plain, safe = net(dtype), net(dtype)
    addresses = [p.data_ptr() for p in safe.parameters()]
    plain.merge_adapter()
    safe.merge_adapter(safe_merge=True)
    assert same_bits(safe, base_weights(plain))
    assert [p.data_ptr() for p in safe.parameters()] == addresses


def test_a_nan_in_one_layer_merges_none():
    model = net()
    before = base_weights(model)
    with torch.no_grad():
        model.base_model.model[2].lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs"):
        model.merge_adapter(safe_merge=True)
    assert same_bits(model, before)
    assert not any(layer.merged for layer in (model.base_model.model[0], model.base_model.model[2]))


def test_disabled_while_merged_leaves_it_merged():
    model, x = net(), inputs()
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        model.merge_adapter()
        merged = model(x)
        weights = base_weights(model)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        assert model.base_model.model[0].merged
        assert same_bits(model, weights)
        assert torch.equal(model(x), merged)


def test_disable_adapter_keeps_frozen_adapters_frozen():
    model = net(inference_mode=True)
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    assert not any(flags.values())
    with model.disable_adapter():
        pass
    assert {k: p.requires_grad for k, p in model.named_parameters()} == flags


def test_an_exception_in_a_mixed_batch_leaves_no_hooks():
    class Fails(nn.Module):
        fail = True

        def forward(self, x):
            if self.fail:
                raise RuntimeError("in the middle")
            return x

    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(64, 48), Fails(), nn.Linear(48, 32))
    config = LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    model, x = get_peft_model(base, config).eval(), inputs()
    with pytest.raises(RuntimeError, match="in the middle"):
        model(x, adapter_names=["default", "__base__", "default", "__base__", "default"])
    assert not any(module._forward_pre_hooks for module in model.modules())
    base[1].fail = False
    model(x[:2])  # a batch of another size


def test_unknown_adapter_is_refused_and_nothing_changes():
    model = net()
    for call in (model.set_adapter, model.base_model.set_adapter):
        with pytest.raises((ValueError, KeyError), match="nope"):
            call("nope")
        assert model.active_adapters == ["default"]
        assert model.base_model.model[0].active_adapters == ["default"]


def test_forward_after_deleting_adapters():
    model, x = net(), inputs()
    model.add_adapter("more", LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "more"])
    model.delete_adapter("default")
    model(x)
    model.delete_adapter("more")
    with torch.no_grad():
        expected = model.get_base_model()(x)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_of_kernel_one_merge(kind):
    torch.manual_seed(1)
    model = get_peft_model(
        nn.Sequential(kind(6, 8, 1)), LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    )
    x = torch.randn(2, 6, *[4] * (model.base_model.model[0].base_layer.weight.ndim - 2))
    expected = model.eval()(x)
    before = base_weights(model)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert same_bits(model, before)


def test_target_parameters_keep_the_order_of_parameters():
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"])
    model = get_peft_model(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)), config)
    order = [name for name, _ in model.named_parameters()]
    model(inputs())
    assert [name for name, _ in model.named_parameters()] == order


def test_a_merged_weight_written_by_others_is_reported():
    model = net()
    model.merge_adapter()
    with torch.no_grad():
        model.base_model.model[0].base_layer.weight[0, 0] += 1
    with pytest.warns(UserWarning, match="weight"):
        model.unmerge_adapter()


def test_exactness_survives_a_deepcopy():
    model = net(torch.bfloat16)
    before = base_weights(model)
    model.merge_adapter()
    model = copy.deepcopy(model)
    model.unmerge_adapter()
    assert same_bits(model, before)


def test_exact_unmerge_can_be_switched_off():
    model = net()
    before = base_weights(model)
    with peft_c.exact_unmerge(False):
        model.merge_adapter()
    model.unmerge_adapter()
    for key, p in model.named_parameters():
        if key in before:
            torch.testing.assert_close(p, before[key], rtol=1e-5, atol=1e-5)


def test_tied_weights_are_merged_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(32, 16)
            self.head = nn.Linear(16, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    torch.manual_seed(1)
    model = get_peft_model(Tied(), LoraConfig(r=4, target_modules=["head"], init_lora_weights=False)).eval()
    before = base_weights(model)
    model.merge_adapter()
    assert model.base_model.model.head.base_layer.weight is model.base_model.model.embed.weight
    model.unmerge_adapter()
    assert same_bits(model, before)


def test_a_new_adapter_after_the_only_one_was_deleted():
    model = net(modules_to_save=["2"], target_modules=["0"])
    config = copy.deepcopy(model.peft_config["default"])
    model.delete_adapter("default")
    model.add_adapter("other", config)
    model.set_adapter("other")
    kept = model.base_model.model[2]
    assert kept.active_adapters == ["other"]
    assert all(p.requires_grad for p in kept.modules_to_save["other"].parameters())
    assert model.base_model.model[0].lora_A["other"].weight.requires_grad
    model.base_model.set_adapter([])
    assert not any(p.requires_grad for p in model.parameters())
