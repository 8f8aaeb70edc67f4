"""10,000 rounds of each C entry point, good and bad, in a process of its own: no object and no memory is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = """
import ctypes, gc, os, sys
sys.path.insert(0, {folder!r})
import numpy, torch
from torch import nn
from toy_layer import ToyLayer, make
from peft_c import _C
torch.set_num_threads(1)
layer, deep = make(), make(adapters=("a", "b"))
x, leaf = torch.randn(3, 24), torch.randn(3, 24).requires_grad_()
big = torch.randn(64, 24)
array, meta, neg = numpy.zeros((3, 4), numpy.float32), torch.zeros(2, device="meta"), torch._neg_view(torch.ones(2))
A, B, y = torch.randn(4, 24), torch.randn(40, 4), torch.zeros(3, 40)
g, t, dx, dA, dB = torch.randn(3, 40), torch.randn(3, 4), torch.empty(3, 24), torch.empty(4, 24), torch.empty(40, 4)

class Producer:
    def __dlpack__(self, **kwargs):
        return x.__dlpack__(**kwargs)

class Broken(nn.Linear):
    def forward(self, x):
        raise ZeroDivisionError

broken, odd = ToyLayer(Broken(24, 40)), ToyLayer(nn.Linear(24, 40))
odd._active_adapter = 7
frozen = make().requires_grad_(False)
square, wide = torch.randn(512, 512), torch.randn(2, 512)

def fails(function, *args):
    try:
        function(*args)
    except Exception:
        return
    raise AssertionError("should have failed")

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def settle():
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass

WATCHED = (layer, deep, x, leaf, A, B, y, g, t, dx, dA, dB, array, meta, layer.lora_A["default"].weight, layer.scaling,
           layer.base_layer, torch.Tensor, _C, None, NotImplemented)

def growth(once, rounds):
    settle()
    blocks, memory, counts = sys.getallocatedblocks(), resident(), [sys.getrefcount(o) for o in WATCHED]
    for _ in range(rounds):
        once()
    settle()
    grown = [b - a for a, b in zip(counts, [sys.getrefcount(o) for o in WATCHED])]
    return max(map(abs, grown)), sys.getallocatedblocks() - blocks, resident() - memory

# Caches and free lists grow at first and settle at some time; a leak is in every window, so the least growth counts.
def measure(name, code, rounds):
    space = dict(globals())
    exec("def once():\\n    " + code, space)
    print(name, *map(min, zip(*(growth(space["once"], rounds) for _ in range({windows})))))

for name, (code, rounds) in {bodies}.items():
    measure(name, code, rounds)
"""

BODIES = {
    "describe": "_C.describe(x); _C.describe(array, True); _C.describe(Producer())",
    "describe-refused": "fails(_C.describe, neg); fails(_C.describe, 3); fails(_C.describe)",
    "gate": "_C.gate(layer); _C.gate(deep, x); _C.gate(odd); _C.gate(3)",
    "switch": "_C.set_fast(True); _C.is_fast(); _C.info()",
    "forward": "with torch.no_grad(): _C.lowrank_forward(layer, x); _C.lowrank_forward(deep, big, (), {})",
    "forward-copy": "with torch.no_grad(): _C.lowrank_forward(layer, big[:, :24].expand(2, 64, 24).transpose(0, 1))",
    "forward-refused": "_C.lowrank_forward(odd, x); fails(_C.lowrank_forward, broken, x); fails(_C.lowrank_forward)",
    "forward-graph": "_C.lowrank_forward(layer, leaf).sum().backward(); leaf.grad = None; layer.zero_grad()",
    "apply": "_C.lowrank_apply(y, x, t, (1.0,), (A, B)); fails(_C.lowrank_apply, y, x, t, (1.0,), (B, A))",
    "linear": "_C.lowrank_linear(x, layer.base_layer.weight, None, t, (1.0,), (A, B)); fails(_C.lowrank_linear, meta)",
    "linear-grad": "_C.linear_grad(wide, square); _C.linear_grad(g, A); fails(_C.linear_grad)",
    "backward": "_C.lowrank_backward(g, x, t, (1.0,), (A, B), dx, (dA, dB))",
    "backward-refused": "_C.lowrank_backward(neg, x, t, (1.0,), (A, B), dx, (dA, dB)); fails(_C.lowrank_backward, 1)",
    "terms": "with torch.no_grad(): _C.lowrank_terms(layer, x, [(A, B, 1.0)], (), {})",
    "terms-refused": "_C.lowrank_terms(layer, leaf, [(A, B, 1)], (), {}); fails(_C.lowrank_terms, layer, x, [3])",
    "exchange": "_C.exchange(y, g.clone(), True, True, y); _C.digest(A); _C.digest(array); fails(_C.exchange, A)",
    "combine": "_C.uncombine(y, g, A, 1, _C.combine(y, g, A, 1, True, None, True, y)[1], y); fails(_C.combine, A)",
    "accumulate": "_C.accumulate(y, g, True); _C.accumulate(y, A, False); fails(_C.accumulate, A)",
    "combine-refused": "_C.combine(*range(3), 1, *range(4)); _C.uncombine(*range(6)); fails(_C.uncombine, A)",
    "fingerprint": "_C.fingerprint([A, B, x]); _C.fingerprint([A, 3]); fails(_C.fingerprint, A)",
    "exchange-refused": "_C.exchange(A, A, False, True, A); _C.exchange(A, B, False, True, A); _C.exchange(*range(5))",
    "refused-by-torch": "fails(_C.describe, meta); _C.gate(layer, meta)",
}
WINDOWS = 5
ROUNDS = {"refused-by-torch": 300}  # a C++ exception with its backtrace takes torch milliseconds
PLAN = {name: (body, ROUNDS.get(name, 2000)) for name, body in BODIES.items()}


@pytest.fixture(scope="module")
def growth():
    """One process for all entry points: name -> references, blocks and bytes that remained."""
    code = SETUP.replace("{folder!r}", repr(str(Path(__file__).parent))).replace("{bodies}", repr(PLAN))
    code = code.replace("{windows}", str(WINDOWS))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return {name: tuple(map(int, rest)) for name, *rest in map(str.split, done.stdout.splitlines())}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", BODIES)
def test_nothing_is_lost(name, growth):
    rounds, (references, blocks, memory) = PLAN[name][1], growth[name]
    assert references < rounds // 20, f"{references} references in {rounds} rounds"
    if "PEFT_C_SANITIZED" not in os.environ:  # its allocator keeps what is freed
        assert blocks < rounds // 10, f"{blocks} blocks in {rounds} rounds"
        assert memory < 8 * rounds + (1 << 18), f"{memory} bytes in {rounds} rounds"
