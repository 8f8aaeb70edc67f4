"""The one timing helper: cycles of steps, interleaved between contenders, minima."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

Step = tuple[str | None, Callable[[], object]]
"""(row, call): a call and the row its time goes to; None for what has to be done but is not measured."""

NAMES = ("peft_c", "peft", "torch", "floor")


@dataclass
class Case:
    """One thing to measure: `build` returns, for each contender, its cycle of steps."""

    name: str
    build: Callable[[], dict[str, list[Step]]]
    unit: str = "ms"
    note: str = ""
    seconds: float = 2.0  # for all contenders together, after one unmeasured cycle each
    in_a_row: int | None = None  # calls of each step in one measurement; None: see `_loops`


@dataclass
class Row:
    """The best time of each contender for one row, in its unit."""

    theme: str
    name: str
    unit: str
    best: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def ratio(self, other: str) -> float | None:
        """How many times what `other` takes peft_c takes less; None where one of them is missing."""
        mine, theirs = self.best.get("peft_c"), self.best.get(other)
        return theirs / mine if mine and theirs else None


def one(row: str, call: Callable[[], object]) -> list[Step]:
    """A cycle of a single measured step."""
    return [(row, call)]


def _loops(steps: list[Step]) -> int:
    """How often a lone short step is repeated inside one measurement, so that it lasts about 2 ms and runs warm."""
    if len(steps) > 1:
        return 1
    start = time.perf_counter()
    steps[0][1]()
    return max(1, min(1000, int(2e-3 / max(1e-7, time.perf_counter() - start))))


def interleaved(
    cycles: dict[str, list[Step]], seconds: float, rounds: int = 3, in_a_row: int | None = None
) -> dict[str, dict[str, float]]:
    """{row: {contender: seconds}}: minima over rounds in which every contender runs once, in turning order."""
    for steps in cycles.values():
        for _, call in steps:
            call()
    loops = {name: in_a_row or _loops(steps) for name, steps in cycles.items()}
    best: dict[str, dict[str, float]] = {}
    order, done, end = list(cycles), 0, time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        while done < rounds or (time.perf_counter() < end and done < 2000):
            for name in order:
                for row, call in cycles[name]:
                    start = time.perf_counter()
                    for _ in range(loops[name]):
                        call()
                    taken = (time.perf_counter() - start) / loops[name]
                    if row is not None:
                        times = best.setdefault(row, {})
                        times[name] = min(taken, times.get(name, taken))
            order = order[1:] + order[:1]
            done += 1
    finally:
        gc.enable()
    return best


SCALE = {"s": 1.0, "ms": 1e3, "us": 1e6}


def measure(theme: str, case: Case, quick: bool) -> list[Row]:
    """The rows of one case. A contender whose step yields no time but a number (unit MB) reports that number."""
    cycles = case.build()
    if case.unit not in SCALE:
        values: dict[str, dict[str, float]] = {}
        for name, steps in cycles.items():
            for row, call in steps:
                values.setdefault(row, {})[name] = float(call())
        scale = 1.0
    else:
        budget = case.seconds / (8 if quick else 1)
        values = interleaved(cycles, budget, rounds=2 if quick else 3, in_a_row=case.in_a_row)
        scale = SCALE[case.unit]
    return [
        Row(theme, row, case.unit, {n: t * scale for n, t in best.items()}, case.note) for row, best in values.items()
    ]


def environment() -> dict[str, object]:
    """What the figures depend on: processor, threads, versions."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": installed("peft"),
        "transformers": installed("transformers"),
    }


def matching(cases: Iterable[Case], theme: str, pattern: str) -> list[Case]:
    """The cases for which the regular expression finds something in "theme case"."""
    return [case for case in cases if re.search(pattern, f"{theme} {case.name}")]
