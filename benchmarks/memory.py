"""Peak memory of merging and of a training step, each in a process of its own."""

from __future__ import annotations

import functools
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from timing import Case, Step, one

MIB = 2**20


def resident() -> int:
    """Bytes that this process holds in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_over(call: Callable[[], object]) -> float:
    """MiB that the call needs at its peak over what was held before it (sampled every 0.2 ms)."""
    before, peak, stop = resident(), [0], threading.Event()

    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], resident())
            stop.wait(2e-4)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    stop.set()
    watcher.join()
    return (max(peak[0], resident()) - before) / MIB


def _merge(name: str, dtypes: str) -> float:
    """Merging four layers of 4096x4096."""
    import torch
    from models import DTYPES, with_lora
    from torch import nn

    base = nn.Sequential(*(nn.Linear(4096, 4096, bias=False, dtype=DTYPES[dtypes][0]) for _ in range(4)))
    for p in base.parameters():
        p.requires_grad_(False)
    if name in ("torch", "floor"):
        weights = [layer.weight for layer in base]
        a, b = torch.randn(16, 4096, dtype=weights[0].dtype), torch.randn(4096, 16, dtype=weights[0].dtype)
        return peak_over(lambda: [w.addmm_(b, a) if name == "torch" else w.mul_(1.0) for w in weights])
    model = with_lora(name, base, dtypes, targets=["0", "1", "2", "3"])
    del base
    return peak_over(model.merge_adapter)


def _train(name: str, dtypes: str) -> float:
    """A training step of two blocks of hidden 1024 on 2048 rows."""
    import torch
    from models import DTYPES, composed, stack, with_lora
    from training import _step

    base = stack(2, 1024, 2816, DTYPES[dtypes][0])
    model = {"torch": lambda: composed(base, dtypes), "floor": lambda: base}.get(
        name, lambda: with_lora(name, base, dtypes).base_model.model
    )()
    step = _step(model.train(), torch.randn(2048, 1024, dtype=DTYPES[dtypes][0]))
    _step(model, torch.randn(2, 1024, dtype=DTYPES[dtypes][0]))()
    return peak_over(step)


WORK = {"merge": _merge, "train": _train}


def _fresh(work: str, name: str, dtypes: str) -> float:
    """The figure, measured in a fresh process."""
    command = [sys.executable, str(Path(__file__)), work, name, dtypes]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _case(work: str, row: str, dtypes: str) -> dict[str, list[Step]]:
    from models import PACKAGES

    return {
        name: one(f"{row}, {dtypes}", functools.partial(_fresh, work, name, dtypes))
        for name in (*PACKAGES, "torch", "floor")
    }


def cases(quick: bool) -> Iterator[Case]:
    """The cases of this theme."""
    if not Path("/proc/self/statm").exists():
        return
    rows = {
        "merge": "peak over before, merging 4 layers 4096x4096",
        "train": "peak over before, training step, M=2048",
    }
    for dtypes in ("bf16+fp32",) if quick else ("fp32", "bf16", "bf16+fp32"):
        for work, row in rows.items():
            yield Case(f"memory {work} {dtypes}", functools.partial(_case, work, row, dtypes), unit="MiB")


if __name__ == "__main__":
    work, *rest = sys.argv[1:]
    print(WORK[work](*rest))
