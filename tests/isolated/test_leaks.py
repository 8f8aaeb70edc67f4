"""A user's calls, thousands of times in a process of their own: no growth of memory or of the number of objects."""

import subprocess
import sys

import pytest

SETUP = """
import ctypes, gc, os, torch
from peft_c import LoraConfig, get_peft_model
torch.set_num_threads(1)
model = get_peft_model(
    torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32)),
    LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False),
)
model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
x = torch.randn(3, 32)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def trim():
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass

def once():
{body}

# Caches and free lists grow at first and settle at some time; a leak is in every window, so the least growth counts.
growth = []
for _ in range(5):
    trim()
    objects, memory = len(gc.get_objects()), resident()
    for _ in range({rounds}):
        once()
    trim()
    growth.append((len(gc.get_objects()) - objects, resident() - memory))
print(*map(min, zip(*growth)))
"""

BODIES = {
    "forward": "with torch.no_grad(): model(x)",
    "training": "model.train(); model(x).sum().backward(); model.zero_grad()",
    "switch": "model.set_adapter('other'); model.set_adapter('default')",
    "disable": "with model.disable_adapter(): model(x)",
    "merge": "model.merge_adapter(); model.unmerge_adapter()",
    "safe_merge": "model.merge_adapter(safe_merge=True); model.unmerge_adapter()",
    "mixed": "model.eval(); model(x, adapter_names=['default', 'other', '__base__'])",
    "add": "model.add_adapter('more', LoraConfig(r=2, target_modules=['0'])); model.delete_adapter('more')",
    "error": "\n    try: model.set_adapter('nope')\n    except ValueError: pass",
}
SLOW = {"add": 200, "mixed": 500, "training": 1000, "disable": 2000, "merge": 2000, "safe_merge": 2000}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", BODIES)
def test_nothing_is_lost(name):
    rounds = SLOW.get(name, 10_000)
    code = SETUP.replace("{body}", "    " + BODIES[name]).replace("{rounds}", str(rounds // 5))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    objects, memory = map(int, done.stdout.split())
    assert objects < rounds // 50, f"{objects} more objects in {rounds // 5} rounds"
    assert memory < 8 * rounds + 2**18, f"{memory} more bytes in {rounds // 5} rounds"
