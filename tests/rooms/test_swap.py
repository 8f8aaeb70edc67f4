"""LN tuning merges by letting the trained copy stand in for the base layer, which is kept aside."""

import copy

import pytest
import torch
from torch import nn

import peft_c

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def make(targets=("norm1", "norm2"), norm=nn.LayerNorm):
    torch.manual_seed(0)
    base = nn.Sequential()
    for number in (1, 2):
        base.add_module(f"norm{number}", norm(6))
        base.add_module(f"lin{number}", nn.Linear(6, 6))
    model = peft_c.get_peft_model(base, peft_c.LNTuningConfig(target_modules=list(targets))).eval()
    for name, parameter in model.named_parameters():
        if "ln_tuning_layers" in name:
            parameter.data += torch.rand_like(parameter)
    return model


def layers(model):
    return [module for module in model.modules() if hasattr(module, "merged_adapters")]


def test_the_base_layer_itself_comes_back():
    model = make()
    before = [layer.base_layer for layer in layers(model)]
    model.merge_adapter()
    for layer, base in zip(layers(model), before, strict=True):
        assert layer.base_layer is layer.ln_tuning_layers["default"] is not base
    model.unmerge_adapter()
    assert all(layer.base_layer is base for layer, base in zip(layers(model), before, strict=True))


def test_what_is_saved_while_merged_is_the_adapter(tmp_path):
    model, x = make(), torch.randn(3, 6)
    expected = peft_c.get_peft_model_state_dict(model)
    model.merge_adapter()
    found = peft_c.get_peft_model_state_dict(model)
    assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in found)
    model.save_pretrained(tmp_path)
    read = peft_c.PeftModel.from_pretrained(make().unload(), tmp_path).eval()
    assert torch.equal(read(x), model(x))


def test_training_while_merged_trains_the_adapter_only():
    model, x = make(), torch.randn(3, 6)
    plain = model.base_model.model.norm1.base_layer.weight.clone()
    model.merge_adapter()
    model(x).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    merged = model(x)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.norm1.base_layer.weight, plain)
    assert torch.equal(model(x), merged)


def test_what_is_done_to_the_model_while_merged_reaches_the_base_layer():
    model = make(norm=nn.BatchNorm1d)
    model.merge_adapter()
    model.to(torch.float64).train()
    model.unmerge_adapter()
    for layer in layers(model):
        assert layer.base_layer.weight.dtype is layer.base_layer.running_var.dtype is torch.float64
        assert layer.base_layer.training
    assert model(torch.randn(5, 6, dtype=torch.float64)).dtype is torch.float64


def test_a_suspended_merge_can_be_copied_and_unmerged():
    model, x = make(), torch.randn(3, 6)
    with model.disable_adapter():
        plain = model(x)
    adapted = model(x)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
        clone = copy.deepcopy(model)
        clone.unmerge_adapter()
        assert torch.equal(clone(x), plain)
    assert torch.equal(model(x), adapted) and layers(model)[0].merged
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("operation", ["merge_adapter", "merge_and_unload", "switch_merged_adapter"])
def test_nothing_changes_when_a_later_layer_fails(operation):
    model, x = make(), torch.randn(3, 6)
    model.add_adapter("other", peft_c.LNTuningConfig(target_modules=["norm1", "norm2"]))
    if operation == "switch_merged_adapter":
        model.merge_adapter()
    layers(model)[1].ln_tuning_layers["other"].bias.data[0] = float("nan")
    expected, before = model(x), [layer.base_layer for layer in layers(model)]
    merged, names = [layer.merged for layer in layers(model)], ["other"]
    with pytest.raises(ValueError, match="NaN"):
        if operation == "switch_merged_adapter":
            model.switch_merged_adapter(names, safe_merge=True)
        else:
            getattr(model, operation)(safe_merge=True, adapter_names=names)
    assert [layer.base_layer for layer in layers(model)] == before
    assert [layer.merged for layer in layers(model)] == merged and torch.equal(model(x), expected)


def test_switching_takes_the_other_copy():
    model, x = make(), torch.randn(3, 6)
    model.add_adapter("other", peft_c.LNTuningConfig(target_modules=["norm1", "norm2"]))
    for layer in layers(model):
        layer.ln_tuning_layers["other"].weight.data += 1
    model.set_adapter("other")
    expected = model(x)
    model.set_adapter("default")
    model.merge_adapter()
    model.switch_merged_adapter(["other"])
    assert torch.equal(model(x), expected) and layers(model)[0].merged_adapters == ["other"]
    model.unmerge_adapter()
    assert not any(layer.merged for layer in layers(model))


def test_unloading_gives_the_copy_or_the_base_layer():
    model, x = make(), torch.randn(3, 6)
    expected, bases = model(x), [layer.base_layer for layer in layers(model)]
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(merged(x), expected) and type(merged.norm1) is nn.LayerNorm
    model.merge_adapter()
    model.unmerge_adapter()
    plain = model.unload()
    assert [plain.norm1, plain.norm2] == bases
