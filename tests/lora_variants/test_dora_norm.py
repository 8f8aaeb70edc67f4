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


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "conv_1", "conv_2", "conv_3"])
def test_both_ways_agree(kind, monkeypatch):
    model, x = adapted(peft_c, kind, random_values=True, use_dora=True, fan_in_fan_out=kind == "conv1d")
    by_gram = model.eval()(x)
    monkeypatch.setattr(dora, "_plain", lambda *tensors: False)
    torch.testing.assert_close(model(x), by_gram, atol=1e-5, rtol=1e-5)


def test_no_update_is_built(monkeypatch):
    model, x = adapted(peft_c, "linear", random_values=True, use_dora=True)

    def refuse(*args, **kwargs):
        raise AssertionError("B @ A was built")

    monkeypatch.setattr(dora.DoraLinearLayer, "get_lora_weight", refuse)
    model(x).sum().backward()


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
