"""A model with adapters inside a model of another method, on the same layers."""

import itertools

import pytest
import torch
from torch import nn

import peft_c

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify:UserWarning", "ignore:Already:UserWarning")
METHODS = {
    "add": lambda: peft_c.LoraConfig(r=2, init_lora_weights=False, target_modules=["0"]),
    "depends on the weight": lambda: peft_c.HiraConfig(r=2, init_weights=False, target_modules=["0"]),
    "scale": lambda: peft_c.IA3Config(init_ia3_weights=False, target_modules=["0"], feedforward_modules=[]),
    "rotate": lambda: peft_c.OFTConfig(oft_block_size=4, init_weights=False, target_modules=["0"]),
    "swap": lambda: peft_c.LNTuningConfig(target_modules=["0"]),
}
PAIRS = list(itertools.permutations(METHODS, 2))


def nested(inner, outer):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    model = peft_c.get_peft_model(peft_c.get_peft_model(base, METHODS[inner]()), METHODS[outer]()).eval()
    return model, base[0].get_base_layer().weight, torch.randn(5, 16)


@pytest.mark.parametrize(("inner", "outer"), PAIRS)
def test_unmerging_takes_out_both(inner, outer):
    model, weight, x = nested(inner, outer)
    before, expected = weight.clone(), model(x)
    for _ in range(2):
        model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(weight, before) and torch.allclose(model(x), expected, atol=1e-5)
        assert not any(getattr(module, "merged_adapters", ()) for module in model.modules())


@pytest.mark.parametrize(("inner", "outer"), [pair for pair in PAIRS if pair[1] != "swap"])
def test_a_forward_under_disabled_adapters_while_both_are_merged(inner, outer):
    model, weight, x = nested(inner, outer)
    before = weight.clone()
    with model.disable_adapter():
        plain = model(x)
    model.merge_adapter()
    merged = weight.clone()
    expected = model(x)
    with model.disable_adapter():
        assert torch.allclose(model(x), plain, atol=1e-6)
    assert torch.equal(model(x), expected) and torch.equal(weight, merged)
    model.unmerge_adapter()
    assert torch.equal(weight, before)
