"""Import, injection, adding, switching, disabling and deleting adapters at 224 layers, and the memory they take."""

from __future__ import annotations

import copy
import functools
import gc
import subprocess
import sys
from collections.abc import Iterator, Sequence

from memory import resident
from models import PACKAGES, TARGETS, package, stack, with_lora
from timing import Case, Step, one

IMPORT = "import time, torch; t = time.perf_counter(); from {} import LoraConfig, get_peft_model; "
IMPORT += "print(time.perf_counter() - t)"


def _import_time(name: str, rounds: int = 3) -> float:
    """Seconds that importing the package takes in a fresh interpreter that has imported torch; the best of three."""
    command = [sys.executable, "-c", IMPORT.format(name)]
    return min(
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(rounds)
    )


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


def _switch(count: int, names: Sequence[str] = PACKAGES) -> dict[str, list[Step]]:
    def cycle(name):
        model = many(name, count)
        other = f"a{count - 1}" if count > 1 else "default"
        return [
            (f"set_adapter, {count} adapters", lambda: model.set_adapter(other)),
            (None, lambda: model.set_adapter("default")),
        ]

    return {name: cycle(name) for name in names}


def _disable(count: int, names: Sequence[str] = PACKAGES) -> dict[str, list[Step]]:
    def cycle(name):
        model = many(name, count)

        def enter_and_leave():
            with model.disable_adapter():
                pass

        return [(f"disable_adapter() and back, {count} adapters", enter_and_leave)]

    return {name: cycle(name) for name in names}


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
        yield Case(f"set_adapter {count}", functools.partial(_switch, count), note=modules, seconds=1)
        yield Case(f"disable_adapter {count}", functools.partial(_disable, count), note=modules, seconds=1)
    if quick:
        return
    yield Case("memory of an adapter", _memories, unit="KiB", note=modules)
    # without peft, which would add them for hours
    for name, act in (
        ("add_adapter delete", _add_and_delete),
        ("set_adapter", _switch),
        ("disable_adapter", _disable),
    ):
        yield Case(f"{name} 1000", functools.partial(act, 1000, PACKAGES[:1]), note=modules, seconds=1)


if __name__ == "__main__":
    print(_memory(sys.argv[1]))
