"""The same steps with PEFT and with peft_c: pairs of modules, and models with equal adapters."""

import importlib

import torch
from torch import nn

PACKAGES = ("peft", "peft_c")


def pair(name):
    """The modules `peft.<name>` and `peft_c.<name>`."""
    return tuple(importlib.import_module(f"{package}.{name}" if name else package) for package in PACKAGES)


class Convs(nn.Module):
    """A network with every kind of layer that LoRA factors can have: embedding, linear, 1x1 and 3x3 convolution."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(19, 12)
        self.lin = nn.Linear(12, 16)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.pointwise = nn.Conv2d(4, 3, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, ids):
        h = torch.tanh(self.lin(self.embed(ids)))
        h = self.pointwise(self.conv(h[:, None])).mean(1)
        return self.head(h)


def network():
    torch.manual_seed(3)
    return Convs().eval()


def with_adapters(peft, *configs, model=None):
    """A PEFT model with adapters a0, a1, ... of these configs (dicts), random and equal in both packages."""
    torch.manual_seed(11)
    model = network() if model is None else model
    wrapped = None
    for number, config in enumerate(configs):
        config = peft.LoraConfig(**{"init_lora_weights": False, **config})
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, adapter_name=f"a{number}")
        else:
            wrapped.add_adapter(f"a{number}", config)
    return wrapped.eval()


def assert_same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(
            right[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
