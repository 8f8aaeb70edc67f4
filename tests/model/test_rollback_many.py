"""An adapter that cannot be added leaves no trace, also beside many others."""

import pytest
import torch
from torch import nn

import peft_c


def state(model):
    def dicts(module):
        return {key: sorted(value) for key, value in vars(module).items() if type(value) is dict}

    return {name: (sorted(vars(module)), dicts(module)) for name, module in model.named_modules()}


def test_failed_injection_beside_many_adapters(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    config = {"r": 2, "target_modules": ["0", "2"], "init_lora_weights": False}
    model = peft_c.get_peft_model(model, peft_c.LoraConfig(**config), "n0")
    for i in range(1, 40):
        model.add_adapter(f"n{i}", peft_c.LoraConfig(**config))
    model.set_adapter("n7")
    x = torch.randn(3, 8)
    expected, before, flags = model(x), state(model), [p.requires_grad for p in model.parameters()]

    last = model.base_model.model[2]
    update = type(last).update_layer

    def fails_on_the_second_layer(layer, name, *args, **kwargs):
        update(layer, name, *args, **kwargs)
        if layer is last:
            raise RuntimeError("no memory")

    monkeypatch.setattr(type(last), "update_layer", fails_on_the_second_layer)
    with pytest.raises(RuntimeError, match="no memory"):
        model.add_adapter("new", peft_c.LoraConfig(**config))
    monkeypatch.undo()
    assert state(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model(x), expected)
    model.add_adapter("new", peft_c.LoraConfig(**config))
    assert "new" in last.lora_A
