"""A training step, and what it keeps for backward."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from models import DTYPES, PACKAGES, composed, stack, with_lora
from timing import Case, Step, one


@functools.lru_cache(1)
def _models(dtypes: str):
    base = stack(2, 1024, 2816, DTYPES[dtypes][0])
    models = {name: with_lora(name, base, dtypes).train().base_model.model for name in PACKAGES}
    return models | {"torch": composed(base, dtypes).train(), "floor": base}


def _step(model, x):
    """Forward, backward and an AdamW step over what is trainable; the base model's backward reaches its input only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6) if parameters else None

    def step():
        inputs = x.detach().requires_grad_()
        model(inputs).float().square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _training(rows: int, dtypes: str) -> dict[str, list[Step]]:
    x = torch.randn(rows, 1024, dtype=DTYPES[dtypes][0])
    row = f"training step, 14 layers of hidden 1024, M={rows}, {dtypes}"
    return {name: one(row, _step(model, x)) for name, model in _models(dtypes).items()}


def kept_bytes(model, x) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held = []  # keeps the storages alive, so that no address is used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x.detach().requires_grad_()).float().square().mean()
    return sum(kept.values())


def _kept(rows: int, dtypes: str) -> dict[str, list[Step]]:
    x = torch.randn(rows, 1024, dtype=DTYPES[dtypes][0])
    row = f"kept for backward, M={rows}, {dtypes}"
    return {
        name: one(row, functools.partial(lambda m: kept_bytes(m, x) / 2**20, model))
        for name, model in _models(dtypes).items()
    }


def cases(quick: bool) -> Iterator[Case]:
    """The cases of this theme."""
    for dtypes in ("bf16+fp32",) if quick else ("fp32", "bf16", "bf16+fp32"):
        for rows in (8, 128) if quick else (8, 128, 512):
            build = functools.partial(_training, rows, dtypes)
            yield Case(f"training step M={rows} {dtypes}", build, note="floor: base model, to its input", seconds=3)
        yield Case(f"saved tensors {dtypes}", functools.partial(_kept, 512, dtypes), unit="MiB")
    if not quick:
        yield Case(
            "training step M=8 fp16", functools.partial(_training, 8, "fp16"), note="floor: base model, to its input"
        )
