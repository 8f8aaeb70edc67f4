"""Rooms on quantised layers, for which layers of an imagined library stand in: 8-bit rows with a scale each."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peft_c
from peft_c.utils import quantization_utils
from tests.rooms.cases import config_of

METHODS = "adalora boft hira hra ia3 lokr miss oft pvera randlora road shira vera".split()


class EightBit(nn.Module):
    """A linear layer, not derived from nn.Linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.quantise(linear.weight.data)

    def quantise(self, weight: torch.Tensor) -> None:
        self.scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def dequantise(self) -> torch.Tensor:
        return self.weight * self.scale

    def forward(self, x):
        return F.linear(x, self.dequantise(), self.bias)


class Backend(quantization_utils.QuantizationBackend):
    supports_merge, backend_name, layer_type = True, "eight bit", "linear"

    def get_base_weight(self, base_layer):
        return base_layer.dequantise()

    def set_base_weight(self, peft_layer, weight_data):
        peft_layer.get_base_layer().quantise(weight_data)


@pytest.fixture
def library(monkeypatch):
    """What the library's layers are adapted with."""
    backends = [Backend()]
    monkeypatch.setattr(quantization_utils.import_utils, "is_eight_bit_available", lambda: True, raising=False)
    resolver = ("is_eight_bit_available", lambda layer, **_: backends[0] if isinstance(layer, EightBit) else None)
    monkeypatch.setattr(quantization_utils, "_RESOLVERS", (resolver,))
    return backends


def pair(method):
    """The same adapter on a quantised layer and on what that is dequantised."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 32).requires_grad_(False)
    quantised = EightBit(linear)
    plain = nn.Linear(16, 32).requires_grad_(False)
    plain.load_state_dict({"weight": quantised.dequantise(), "bias": linear.bias})
    layers = []
    for base in (quantised, plain):
        torch.manual_seed(1)
        model = peft_c.get_peft_model(nn.Sequential(base), config_of(method, "Linear", peft_c))
        layers.append(model.base_model.model[0].eval())
    return layers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_forward_merge_and_unmerge(method, library):
    quantised, plain = pair(method)
    assert type(quantised) is type(plain)
    x = torch.randn(5, 16, requires_grad=True)
    torch.testing.assert_close(quantised(x), plain(x), atol=1e-5, rtol=1e-5)
    left, right = (torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in (quantised, plain))
    torch.testing.assert_close(left, right, atol=1e-3, rtol=1e-3)

    before = quantised.weight.clone()
    quantised.merge(safe_merge=True)
    plain.merge()
    assert quantised.merged_adapters == ["default"]
    step = quantised.base_layer.scale
    assert ((quantised.base_layer.dequantise() - plain.weight).abs() <= step).all()
    torch.testing.assert_close(quantised.base_layer.bias, plain.base_layer.bias)
    quantised.unmerge()
    assert not quantised.merged
    assert (quantised.weight.int() - before.int()).abs().max() <= 1
    torch.testing.assert_close(quantised(x), plain.unmerge() or plain(x), atol=0.1, rtol=0.1)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_broken_adapter_is_not_merged(library):
    quantised, _ = pair("vera")
    before = quantised.weight.clone()
    quantised.vera_lambda_b["default"][0] = float("nan")
    with pytest.raises(ValueError, match="NaNs"):
        quantised.merge(safe_merge=True)
    assert torch.equal(quantised.weight, before) and not quantised.merged


@pytest.mark.filterwarnings("ignore")
def test_layers_that_only_run(library):
    library[0] = quantization_utils.ForwardOnlyQuantizationBackend("eight bit")
    quantised, plain = pair("oft")
    x = torch.randn(5, 16)
    torch.testing.assert_close(quantised(x), plain(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="eight bit"):
        quantised.merge()
    assert not quantised.merged


def test_other_layers_are_refused(library):
    library[0] = None
    with pytest.raises(TypeError, match="not supported"), contextlib.suppress(UserWarning):
        peft_c.get_peft_model(nn.Sequential(EightBit(nn.Linear(4, 4))), peft_c.OFTConfig(target_modules=["0"]))
