"""Switching merged adapters in one pass: the bits and records of unmerging and merging."""

import warnings

import pytest
import torch
from layer_cases import CASES, build, layer_of
from test_exact import ALL, PLAIN, assert_restored, snapshot

import peft_c
from peft_c import _C
from peft_c.tuners import law, undo
from peft_c.utils.warning import PeftWarning

NAMES = ("default", "second", "third")


def make(name, **options):
    return layer_of(build(peft_c, ALL[name], adapters=NAMES, **options)[0])


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_same_bits_as_unmerge_and_merge(name, dtype, composed):
    layer, other = make(name, dtype=dtype), make(name, dtype=dtype)
    before = snapshot(layer)
    with peft_c.fast_paths(not composed), warnings.catch_warnings():
        warnings.simplefilter("error")
        for names in (["default"], ["second", "third"], ["third"], ["third", "default"], [], ["default"]):
            layer.switch(names)
            if other.merged:
                other.unmerge()
            other.merge(adapter_names=names)
            assert layer.merged_adapters == other.merged_adapters == names
            assert_restored(layer, snapshot(other))
            assert undo.record_bytes(layer) == undo.record_bytes(other)
        for _ in range(20):
            layer.switch(["second"], safe_merge=True)
            layer.set_scale("second", 2.0)
            layer.switch(["default"])
        layer.unmerge()
    assert_restored(layer, before)


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_a_broken_adapter_leaves_the_merged_one(name, composed):
    layer = make(name)
    before = snapshot(layer)
    factors = [p for key, p in layer.named_parameters() if "_B.third" in key]
    with torch.no_grad():
        factors[-1].flatten()[-1] = float("nan")
    with peft_c.fast_paths(not composed):
        layer.merge(adapter_names=["default", "second"])
        merged = snapshot(layer)
        with pytest.raises(ValueError, match="NaNs detected"):
            layer.switch(["default", "third"], safe_merge=True)
        assert_restored(layer, merged)
        assert layer.merged_adapters == ["default", "second"]
        layer.unmerge()
    assert_restored(layer, before)


def test_one_pass(monkeypatch):
    calls = []
    for entry in ("merge_add", "merge_subtract", "merge_switch"):
        function = getattr(_C, entry)
        monkeypatch.setattr(_C, entry, lambda *args, f=function, e=entry: calls.append(e) or f(*args))
    layer = make("linear")
    layer.switch(["default"])
    layer.switch(["second"])
    assert calls == ["merge_add", "merge_switch"]


def test_a_write_meanwhile():
    layer = make("linear")
    old = layer.weight.detach().clone()
    layer.merge(adapter_names=["default"])
    layer.weight.data[0, 0] += 1
    with pytest.warns(PeftWarning, match="was written to"):
        layer.switch(["second"])
    old[0, 0] += 1
    layer.unmerge()
    torch.testing.assert_close(layer.weight.detach(), old)


def test_while_disabled_and_errors():
    model, x = build(peft_c, CASES["linear"], adapters=NAMES)
    layer = layer_of(model)
    with pytest.raises(TypeError, match="list of strings"):
        layer.switch("second")
    layer.merge(adapter_names=["default"])
    with model.disable_adapter():
        model(x)
    layer.switch(["second"])
    expected = make("linear")
    expected.merge(adapter_names=["second"])
    assert_restored(layer, snapshot(expected))


def test_without_records():
    layer = make("linear")
    old = layer.weight.detach().clone()
    with law.exact_unmerge(False):
        for names in (["default"], ["second"], ["third"]):
            layer.switch(names)
        assert all(saved.undo is None for step in law.records(layer) for saved in step.saved)
        layer.unmerge()
    torch.testing.assert_close(layer.weight.detach(), old)
