"""Switching merged adapters over a whole model: the bits of unmerge and merge, all layers or none."""

import pytest
import torch
from torch import nn

import peft_c


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = peft_c.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    model = peft_c.get_peft_model(nn.Sequential(nn.Linear(33, 65), nn.ReLU(), nn.Linear(65, 7)), config, "a")
    model.add_adapter("b", config)
    return model


def weights(model):
    return [layer.get_base_layer().weight.clone() for layer in model.base_model.model if hasattr(layer, "base_layer")]


def same(left, right):
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def test_switch_gives_the_bits_of_unmerge_and_merge(model):
    original = weights(model)
    model.merge_adapter(["b"])
    merged_b = weights(model)
    model.unmerge_adapter()
    model.merge_adapter(["a"])
    model.switch_merged_adapter(["b"])
    assert same(weights(model), merged_b)
    assert [layer.merged_adapters for layer in model.base_model.model if hasattr(layer, "base_layer")] == [["b"]] * 2
    model.unmerge_adapter()
    assert same(weights(model), original)


def test_a_thousand_cycles_end_on_the_original_bits(model):
    original = weights(model)
    for i in range(1000):
        model.merge_adapter([["a"], ["b"]][i % 2])
        model.switch_merged_adapter([["b"], ["a"], ["a", "b"]][i % 3])
        model.unmerge_adapter()
    assert same(weights(model), original)


def test_a_failing_layer_changes_none(model):
    model.merge_adapter(["a"])
    before = weights(model)
    model.base_model.model[2].lora_B["b"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.switch_merged_adapter(["b"], safe_merge=True)
    assert same(weights(model), before)
    assert all(layer.merged_adapters == ["a"] for layer in model.base_model.model if hasattr(layer, "base_layer"))


def test_unknown_names_are_refused(model):
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="nope"):
        model.switch_merged_adapter(["nope"])
    assert model.base_model.model[0].merged_adapters == ["a"]
