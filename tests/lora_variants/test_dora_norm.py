"""DoRA's norm from the Gram matrix equals the norm of the composed weight, and no weight-sized B @ A is made."""

import pytest
import torch
from variant_cases import adapted

import peft_c
from peft_c.tuners.lora import dora


@pytest.mark.parametrize(("out", "inner", "r"), [(1, 1, 1), (7, 5, 3), (64, 96, 16), (5, 40, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_norm(out, inner, r, dtype):
    weight, A, B = (torch.randn(*shape, dtype=dtype) for shape in ((out, inner), (r, inner), (out, r)))
    for scaling in (0.0, 0.5, -2.0):
        expected = torch.linalg.norm(weight + scaling * B @ A, dim=1)
        torch.testing.assert_close(dora._row_norm(weight, A, B, scaling), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_row_norm_of_low_precision(factors):
    weight, A, B = torch.randn(3000, 700).bfloat16(), torch.randn(8, 700).to(factors), torch.randn(3000, 8).to(factors)
    expected = torch.linalg.norm(weight.double() + 0.5 * B.double() @ A.double(), dim=1).float()
    torch.testing.assert_close(dora._row_norm(weight, A, B, 0.5), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "conv_1", "conv_2", "conv_3"])
def test_both_ways_agree(kind, monkeypatch):
    model, x = adapted(peft_c, kind, random_values=True, use_dora=True, fan_in_fan_out=kind == "conv1d")
    by_gram = model.eval()(x)
    monkeypatch.setattr(dora, "_plain", lambda *tensors: False)
    torch.testing.assert_close(model(x), by_gram, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "own"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_no_update_is_built(monkeypatch, dtype, own):
    model, x = adapted(peft_c, "linear", random_values=True, use_dora=True)
    model, x = model.to(getattr(torch, dtype)), x.to(getattr(torch, dtype))
    for name, p in model.named_parameters():
        p.data = p.data.to(getattr(torch, own)) if "lora_" in name else p.data

    def refuse(*args, **kwargs):
        raise AssertionError("B @ A was built")

    monkeypatch.setattr(dora.DoraLinearLayer, "get_lora_weight", refuse)
    model(x).sum().backward()


@pytest.mark.parametrize("plain", [True, False])
def test_the_cache_notices_what_was_changed(monkeypatch, plain):
    model, x = adapted(peft_c, "linear", random_values=True, use_dora=True)
    layer = next(module for module in model.modules() if getattr(module, "lora_magnitude_vector", None))
    magnitude = layer.lora_magnitude_vector["default"]
    if not plain:
        monkeypatch.setattr(dora, "_plain", lambda *tensors: False)

    def forward(caching):
        with peft_c.helpers.DoraCaching(caching):
            return model.eval()(x)

    with torch.no_grad():
        for change in (
            lambda: layer.lora_B["default"].weight.mul_(2),
            lambda: layer.lora_A["default"].weight.add_(0.1),
            lambda: layer.get_base_layer().weight.mul_(1.5),
            lambda: setattr(layer.lora_A["default"], "weight", torch.nn.Parameter(layer.lora_A["default"].weight * 3)),
            lambda: layer.set_scale("default", 0.25),
        ):
            first = forward(True)
            held = dict(magnitude._dora_cache)
            assert held and torch.equal(first, forward(True))
            assert all(magnitude._dora_cache[key] is held[key] for key in held), "computed again without need"
            change()
            torch.testing.assert_close(forward(True), forward(False))


def test_wrapped_factors_are_called(monkeypatch):
    """A factor that is not an ordinary nn.Linear, as under FSDP, is only ever called."""
    model, x = adapted(peft_c, "linear", random_values=True, use_dora=True)
    expected = model.eval()(x)

    class Sharded(torch.nn.Linear):
        pass

    for module in model.modules():
        if hasattr(module, "lora_A") and module.lora_A:
            module.lora_A["default"].__class__ = Sharded
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_autocast_leaves_the_norm_alone():
    model, x = adapted(peft_c, "linear", random_values=True, use_dora=True)
    expected = model.eval()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, atol=0.1, rtol=0.1)
