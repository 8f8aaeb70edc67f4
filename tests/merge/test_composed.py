"""Merging with torch operations, where C may not act: the same laws, exact undo included."""

import pytest
import torch
from layer_cases import CASES, build, layer_of
from test_exact import ALL, assert_restored, snapshot

import peft_c
from peft_c import _C
from peft_c.tuners import law, undo


@pytest.fixture
def composed(monkeypatch):
    class Off:
        @staticmethod
        def merge_add(*_):
            return None

        @staticmethod
        def merge_subtract(*_):
            return None

        @staticmethod
        def exchange(*_):
            return None

        @staticmethod
        def finite(*_):
            return None

        @staticmethod
        def combine(*_):
            return None

        @staticmethod
        def uncombine(*_):
            return None

        @staticmethod
        def restore(*_):
            return None

        @staticmethod
        def digest(_):
            return None

    for module in (law, undo):
        monkeypatch.setattr(module, "_C", Off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_round_trip(composed, name, dtype):
    model, x = build(peft_c, ALL[name], dtype=dtype, adapters=("default", "second"))
    layer = layer_of(model)
    before, unmerged = snapshot(layer), model(x)
    for safe_merge in (False, True):
        layer.merge(safe_merge=safe_merge)
        torch.testing.assert_close(model(x), unmerged, rtol=0.1, atol=0.1 * unmerged.abs().max().item())
        with pytest.warns(UserWarning, match="additionally"):
            layer.merge(safe_merge=safe_merge, adapter_names=["second"])
        layer.set_scale("default", 9.0)
        layer.unmerge()
        layer.set_scale("default", 1.0)
        assert_restored(layer, before)


@pytest.mark.parametrize("name", [name for name in ALL if "dora" not in name])
def test_agrees_with_c(monkeypatch, name):
    results = []
    for use_c in (True, False):
        with monkeypatch.context() as patch:
            if not use_c:
                patch.setattr(_C, "merge_add", lambda *_: None)
            layer = layer_of(build(peft_c, ALL[name])[0])
            layer.merge()
            results.append({key: value.view(torch.float32) for key, value in snapshot(layer).items()})
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-5, atol=1e-6)


def test_failures_change_nothing(composed):
    for where in ("weight", "factor"):
        layer = layer_of(build(peft_c, CASES["linear"])[0])
        with torch.no_grad():
            (layer.base_layer if where == "weight" else layer.lora_B["default"]).weight[0, 0] = float("nan")
        before = snapshot(layer)
        with pytest.raises(ValueError, match="NaNs detected"):
            layer.merge(safe_merge=True)
        assert_restored(layer, before)
        assert not layer.merged


def test_a_record_of_c_is_undone_without_c(monkeypatch):
    layer = layer_of(build(peft_c, CASES["linear"])[0])
    old = layer.weight.detach().clone()
    layer.merge()
    monkeypatch.setattr(_C, "merge_subtract", lambda *_: None)
    with pytest.warns(UserWarning, match="was moved"):
        layer.unmerge()
    torch.testing.assert_close(layer.weight.detach(), old)


@pytest.mark.parametrize("first", [True, False])
def test_switching_c_off_while_merged(first):
    layer = layer_of(build(peft_c, CASES["linear"])[0])
    before = snapshot(layer)
    with peft_c.fast_paths(first):
        layer.merge()
    assert isinstance(law.records(layer)[0].saved[0].undo, tuple) == first
    with peft_c.fast_paths(not first):
        layer.unmerge()
    assert_restored(layer, before)


def test_eight_bit_weights():
    model, _ = build(peft_c, CASES["parameter_experts"])
    layer = layer_of(model)
    weight = layer.get_base_layer().weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    bits = weight.data.view(torch.uint8).clone()
    wide = weight.data.float() + layer.get_delta_weight("default").detach()
    layer.merge()
    torch.testing.assert_close(weight.data.float(), wide.to(torch.float8_e4m3fn).float())
    layer.unmerge()
    assert torch.equal(weight.data.view(torch.uint8), bits)


def test_records_are_small():
    torch.manual_seed(0)
    weight, delta = torch.randn(200, 300), 0.02 * torch.randn(200, 300)
    merged = weight + delta
    record = undo.Difference.between(weight, merged, merged - delta)
    assert 0 < record.nbytes() < weight.nbytes / 2
    assert torch.equal(record.restore(merged, merged - delta), weight)
    full = undo.Difference.between(weight, merged, None)
    assert full.nbytes() == weight.nbytes and torch.equal(full.restore(merged, None), weight)
