"""Import, injection, adding, switching, disabling and deleting adapters at 224 layers, and the memory they take."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from memory import resident
from models import PACKAGES, TARGETS, package, stack, with_lora
from timing import Case, Step, one

IMPORT = "import time, torch; t = time.perf_counter(); from {} import LoraConfig, get_peft_model; "
IMPORT += "print(time.perf_counter() - t)"


def _import_time(name: str, rounds: int = 3) -> float:
    """Seconds that importing the package takes in a fresh interpreter that has imported torch; the best of three.

    Compiled modules are kept from the first to the next, as those of an installed package are.
    """
    command = [sys.executable, "-c", IMPORT.format(name)]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    runs = (subprocess.run(command, capture_output=True, text=True, check=True, env=env) for _ in range(rounds))
    return min(float(run.stdout) for run in runs)


def _imports() -> dict[str, list[Step]]:
    return {name: [("import, over torch's own (seconds)", lambda n=name: _import_time(n))] for name in PACKAGES}


@functools.cache
def _base():
    return stack(32, 16, 16)


@functools.cache
def _grown(name: str) -> dict:
    """The one model of a package that gets more and more adapters; {"model": .., "count": ..}."""
    return {"model": with_lora(name, _base(), r=8), "count": 1}


def many(name: str, count: int):
    """The 224-layer model with `count` adapters: default, a1, a2, ..."""
    state = _grown(name)
    config = package(name).LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS)
    while state["count"] > count:
        state["count"] -= 1
        state["model"].delete_adapter(f"a{state['count']}")
    while state["count"] < count:
        state["model"].add_adapter(f"a{state['count']}", config)
        state["count"] += 1
    return state["model"]


def _inject() -> dict[str, list[Step]]:
    def cycle(name):
        peft, room = package(name), {}
        config = peft.LoraConfig(r=8, target_modules=TARGETS)
        return [
            (None, lambda: room.update(base=copy.deepcopy(_base()))),
            ("get_peft_model", lambda: peft.get_peft_model(room["base"], config)),
        ]

    return {name: cycle(name) for name in PACKAGES}


def _add_and_delete(count: int, names: Sequence[str] = PACKAGES) -> dict[str, list[Step]]:
    def cycle(name):
        model = many(name, count - 1) if count > 1 else None
        config = package(name).LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS)
        return [
            (f"add_adapter, number {count}", lambda: model.add_adapter("extra", config)),
            (f"delete_adapter, one of {count}", lambda: model.delete_adapter("extra")),
        ]

    return {name: cycle(name) for name in names}


@functools.cache
def _other_work():
    """Something else than the model to read and write, larger than the caches."""
    return torch.zeros(64 * 2**18)


def _rows(row: str, count: int, in_a_row: int, call: Callable[[], object]) -> list[Step]:
    """A cycle for calls in a row, or for one call after other work, when the model is in no cache any more."""
    how = f"{in_a_row} in a row" if in_a_row > 1 else "after other work"
    before = [] if in_a_row > 1 else [(None, lambda: _other_work().add_(1))]
    return [*before, (f"{row}, {count} adapters, {how}", call)]


def _switch(count: int, in_a_row: int, names: Sequence[str] = PACKAGES) -> dict[str, list[Step]]:
    def cycle(name):
        model = many(name, count)
        turns = itertools.cycle([f"a{count - 1}" if count > 1 else "default", "default"])
        return _rows("set_adapter", count, in_a_row, lambda: model.set_adapter(next(turns)))

    return {name: cycle(name) for name in names}


def _disable(count: int, in_a_row: int, names: Sequence[str] = PACKAGES) -> dict[str, list[Step]]:
    def cycle(name):
        model = many(name, count)

        def enter_and_leave():
            with model.disable_adapter():
                pass

        return _rows("disable_adapter() and back", count, in_a_row, enter_and_leave)

    return {name: cycle(name) for name in names}


def _switches(count: int, names: Sequence[str] = PACKAGES) -> Iterator[Case]:
    for name, act in (("set_adapter", _switch), ("disable_adapter", _disable)):
        for in_a_row in (10, 1):
            build = functools.partial(act, count, in_a_row, names)
            yield Case(f"{name} {count}", build, note="224 LoRA layers", seconds=3, in_a_row=in_a_row)


def _memory(name: str, count: int = 10) -> float:
    """KiB that an inactive adapter takes on each layer beyond its weights."""
    model = with_lora(name, _base(), r=1)
    config = package(name).LoraConfig(r=1, target_modules=TARGETS)
    model.add_adapter("first", config)
    gc.collect()
    before = resident()
    for i in range(count):
        model.add_adapter(f"a{i}", config)
    gc.collect()
    weights = sum(p.nbytes for key, p in model.named_parameters() if ".a0." in key)
    return ((resident() - before) / count - weights) / 224 / 1024


def _in_a_fresh_process(name: str) -> float:
    command = [sys.executable, __file__, name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _memories() -> dict[str, list[Step]]:
    row = "an inactive adapter on one layer, over its weights"
    return {name: one(row, functools.partial(_in_a_fresh_process, name)) for name in PACKAGES}


def cases(quick: bool) -> Iterator[Case]:
    """The cases of this theme, in an order that lets the models grow."""
    modules = "224 LoRA layers"
    yield Case("import", _imports, unit="seconds")
    yield Case("inject", _inject, note=modules)
    for count in (2, 10) if quick else (2, 10, 50):
        yield Case(f"add_adapter delete {count}", functools.partial(_add_and_delete, count), note=modules)
    for count in (1, 10) if quick else (1, 10, 50):
        yield from _switches(count)
    if quick:
        return
    yield Case("memory of an adapter", _memories, unit="KiB", note=modules)
    # without peft, which would add them for hours
    added = functools.partial(_add_and_delete, 1000, PACKAGES[:1])
    yield Case("add_adapter delete 1000", added, note=modules, seconds=1)
    yield from _switches(1000, PACKAGES[:1])


if __name__ == "__main__":
    print(_memory(sys.argv[1]))
