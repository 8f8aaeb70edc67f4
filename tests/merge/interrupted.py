"""A program that test_all_or_nothing.py runs: merges, unmerges, switches and unloads that are cut off somewhere.

    python interrupted.py memory   the n-th allocation fails, for n = 1, 2, ... (with failing_malloc.c preloaded)
    python interrupted.py signals  Ctrl-C is pressed at the n-th line that is run in law.py and undo.py, n = 5, 10, ...

After each the model has to be what it was, or, once there is nothing left to cut off, what was asked for.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn

import peft_c
from peft_c.tuners import law, undo

SIZE = 96
STEP = 5


def lora() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(SIZE, SIZE), "b": nn.Embedding(SIZE, SIZE), "c": nn.Linear(SIZE, 2 * SIZE)})
    config = peft_c.LoraConfig(r=16, target_modules=["a", "b", "c"], init_lora_weights=False)
    model = peft_c.get_peft_model(model.bfloat16(), config, adapter_name="one", autocast_adapter_dtype=False)
    model.add_adapter("two", config)
    return model


def dora() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(SIZE, SIZE), "b": nn.Conv2d(SIZE, SIZE, 1)})
    config = peft_c.LoraConfig(r=16, target_modules=["a", "b"], use_dora=True, init_lora_weights=False)
    model = peft_c.get_peft_model(model, config, adapter_name="one")
    model.add_adapter("two", config)
    return model


def scaling() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(SIZE, SIZE), "b": nn.Linear(SIZE, 2 * SIZE)})
    config = peft_c.IA3Config(target_modules=["a", "b"], feedforward_modules=["a"], init_ia3_weights=False)
    model = peft_c.get_peft_model(model, config, adapter_name="one")
    model.add_adapter("two", config)
    return model


def dense() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(3 * SIZE, 3 * SIZE), "b": nn.Linear(3 * SIZE, 3 * SIZE)})
    config = peft_c.LoHaConfig(r=4, target_modules=["a", "b"], init_weights=False)
    model = peft_c.get_peft_model(model, config, adapter_name="one")
    model.add_adapter("two", config)
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, peft_c.tuners.tuners_utils.BaseTunerLayer)]


def train(model: nn.Module) -> None:
    """Other values in all adapters: what is merged does not depend on them any more."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.25)


OPERATIONS: dict[str, tuple[Callable, Callable]] = {  # what comes before, what is cut off
    "merge": (lambda model: None, lambda model: model.merge_adapter()),
    "safe_merge": (lambda model: None, lambda model: model.merge_adapter(safe_merge=True)),
    "merge both": (lambda model: model.merge_adapter(["two"]), lambda model: model.merge_adapter(["one"])),
    "unmerge": (lambda model: (model.merge_adapter(), train(model)), lambda model: model.unmerge_adapter()),
    "unmerge both": (
        lambda model: (model.merge_adapter(["one"]), model.merge_adapter(["two"]), train(model)),
        lambda model: model.unmerge_adapter(),
    ),
    "switch": (
        lambda model: (model.merge_adapter(), train(model)),
        lambda model: peft_c.tuners.merging.switch_layers(model.base_model, ["two"], False),
    ),
    "unload": (lambda model: None, lambda model: model.merge_and_unload()),
}


def state(model: nn.Module) -> tuple:
    weights = [p.detach().clone() for p in model.parameters()]
    return [type(m) for m in model.modules()], [list(layer.merged_adapters) for layer in layers(model)], weights


def same(a: tuple, b: tuple) -> bool:
    return a[:2] == b[:2] and len(a[2]) == len(b[2]) and all(map(torch.equal, a[2], b[2]))


@contextmanager
def memory_fails(n: int):
    library = ctypes.CDLL(None)
    library.fail_after(ctypes.c_long(n - 1))
    try:
        yield
    finally:
        library.fail_after(ctypes.c_long(-1))


@contextmanager
def interrupted(n: int):
    """Ctrl-C before the line number n * STEP that is run in law.py and undo.py."""
    left = n * STEP

    def line(frame, event, _):
        nonlocal left
        left -= event == "line"
        if left == 0:
            signal.raise_signal(signal.SIGINT)
        return line

    files = {law.__file__, undo.__file__}
    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename in files else None)
    try:
        yield
    finally:
        sys.settrace(None)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def check(build: Callable, name: str, cut: Callable, errors: tuple) -> int:
    """How often the operation was cut off until it was not any more."""
    before, operation = OPERATIONS[name]
    for n in range(1, 1000):
        torch.manual_seed(0)
        model = build()
        bare = [layer.get_base_layer().weight.clone() for layer in layers(model)]
        before(model)
        start = state(model)
        try:
            with cut(n):
                operation(model)
        except errors:
            assert same(state(model), start), f"{build.__name__}, {name}, {n}: the model is not what it was"
            if any(layer.merged for layer in layers(model)):
                model.unmerge_adapter()
            for layer, weight in zip(layers(model), bare, strict=True):
                assert torch.equal(layer.get_base_layer().weight, weight), f"{build.__name__}, {name}, {n}: unmerged"
            operation_after(model, before, operation)
            continue
        assert not same(state(model), start), f"{build.__name__}, {name}: nothing has happened"
        return n
    raise AssertionError(f"{name}: always cut off")


def operation_after(model: nn.Module, before: Callable, operation: Callable) -> None:
    """A model that was cut off does all that others do."""
    before(model)
    operation(model)


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("error", peft_c.utils.warning.PeftWarning)  # nothing may be restored by subtraction
    torch.set_num_threads(1)
    cut, errors = {
        "memory": (memory_fails, (MemoryError, RuntimeError)),
        "signals": (interrupted, (KeyboardInterrupt,)),
    }[sys.argv[1]]
    for build in (lora, dora, scaling, dense):
        for name in OPERATIONS:
            count = check(build, name, cut, errors)
            assert count >= 2, f"{build.__name__}, {name}: cut off in {count} places only"
            print(build.__name__, name, count)
