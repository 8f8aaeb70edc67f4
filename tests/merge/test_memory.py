"""Merging writes into the weight; it makes no tensor of the weight's size, and few bytes of record."""

import subprocess
import sys
import textwrap

import pytest
import torch
from layer_cases import CASES, MODULE, One, build, layer_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_c
from peft_c import _C
from peft_c.tuners import law, undo


def test_no_large_tensor_is_made(monkeypatch):
    size = 256
    layer = layer_of(build(peft_c, (lambda: One(nn.Linear(size, size)), lambda: torch.randn(2, size), MODULE))[0])
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.data_ptr() != pointer:
                made.append(out.numel())
            return out

    pointer = layer.weight.data_ptr()
    add, subtract = _C.merge_add, _C.merge_subtract

    def outside(function):  # the kernels refuse to act under a dispatch mode
        def call(*args):
            with torch.utils._python_dispatch._disable_current_modes():
                return function(*args)

        return call

    monkeypatch.setattr(_C, "merge_add", outside(add))
    monkeypatch.setattr(_C, "merge_subtract", outside(subtract))
    for safe_merge in (False, True):
        with Watch():
            layer.merge(safe_merge=safe_merge)
            layer.unmerge()
    assert layer.weight.data_ptr() == pointer
    assert made and max(made) < size * size / 8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory():
    program = """
        import resource, torch
        import peft_c
        torch.set_num_threads(1)
        from torch import nn
        size = 4096
        model = nn.Sequential(nn.Linear(size, size, bias=False))
        model = peft_c.get_peft_model(model, peft_c.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False))
        layer = model.base_model.model[0]
        with torch.no_grad():
            layer.lora_B["default"].weight.mul_(0.01)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        layer.merge(safe_merge=True)
        layer.unmerge()
        print(peak() - before, layer.weight.nbytes // 1024)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    grown, weight = map(int, out.stdout.split())
    assert grown < weight / 4, f"peak memory grew by {grown} KiB, the weight has {weight} KiB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_record_size(dtype):
    size = 512
    case = (lambda: One(nn.Linear(size, size, bias=False)), lambda: torch.randn(2, size), MODULE)
    layer = layer_of(build(peft_c, case, dtype=dtype)[0])
    with torch.no_grad():
        delta = layer.get_delta_weight("default").float()
        layer.lora_B["default"].weight.mul_(0.025 * layer.weight.float().norm() / delta.norm())
    layer.merge()
    (step,) = law.records(layer)
    assert sum(len(part) for part in step.saved[0].undo) <= 0.06 * layer.weight.nbytes


def test_record_bytes_is_zero_when_unmerged():
    layer = layer_of(build(peft_c, CASES["linear"])[0])
    assert undo.record_bytes(layer) == 0
    layer.merge()
    layer.unmerge()
    assert undo.record_bytes(layer) == 0
