"""The networks, configurations and comparisons that the tests of variants and initialisation share."""

import copy

import pytest
import torch
from torch import nn


class Nets:
    """One small network per kind of layer, with an input; each call builds the same one."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(16, 24)
            self.down = nn.Linear(24, 16, bias=False)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(19, 16)
            self.out = nn.Linear(16, 5)

        def forward(self, ids):
            return self.out(self.embed(ids))

    class Conv(nn.Module):
        def __init__(self, dims):
            super().__init__()
            conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
            self.conv = conv(4, 6, kernel_size=3, padding=1)
            self.point = conv(6, 4, kernel_size=2, bias=False)

        def forward(self, x):
            return self.point(torch.tanh(self.conv(x)))

    class Conv1D(nn.Module):
        """transformers' Conv1D, whose weight is (in, out)."""

        def __init__(self):
            Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

            super().__init__()
            self.fc = Conv1D(24, 16)

        def forward(self, x):
            return self.fc(x)


def build(kind):
    """The network, an input and the names of the layers to adapt."""
    torch.manual_seed(11)
    if kind == "linear":
        return Nets.Linear(), torch.randn(2, 5, 16), ["up", "down"]
    if kind == "conv1d":
        return Nets.Conv1D(), torch.randn(2, 5, 16), ["fc"]
    if kind == "embedding":
        return Nets.Embedding(), torch.randint(0, 19, (2, 5)), ["embed"]
    dims = int(kind[-1])
    return Nets.Conv(dims), torch.randn(2, 4, *(5,) * dims), ["conv", "point"]


def adapted(package, kind, seed=3, random_values=False, **options):
    """`kind` adapted by `package` under a fixed seed; with random_values the adapter is no longer at its start."""
    net, x, targets = build(kind)
    torch.manual_seed(seed)
    options = {key: value(package) if callable(value) else copy.deepcopy(value) for key, value in options.items()}
    model = package.get_peft_model(net, package.LoraConfig(target_modules=targets, r=4, lora_alpha=6, **options))
    if random_values:
        randomize(model)
    return model, x


def randomize(model, seed=5):
    """Give every trainable parameter new values around its own, in the order of names, the same in both packages."""
    generator = torch.Generator().manual_seed(seed)
    for _, param in sorted(model.named_parameters(), key=lambda item: item[0]):
        if param.requires_grad:
            param.data += 0.3 * torch.randn(param.shape, generator=generator)


def assert_same_state(mine, theirs, tolerance=2e-5):
    """Same names, same values (parameters and buffers)."""
    mine, theirs = mine.state_dict(), theirs.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype, name
        torch.testing.assert_close(
            mine[name], value, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
