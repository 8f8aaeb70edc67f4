"""The forward pass of a single layer and of a model of hidden size 1024, and mixed batches."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import torch
from models import DTYPES, PACKAGES, TARGETS, composed, fill, package, stack, with_lora
from timing import Case, Step, one
from torch import nn


def _quiet(model, x, **kwargs):
    """A call of `model(x)` without gradients."""

    def call():
        with torch.no_grad():
            return model(x, **kwargs)

    return call


def _layer(rows: int, dtypes: str) -> dict[str, list[Step]]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(256, 256)).to(DTYPES[dtypes][0]).eval().requires_grad_(False)
    x = torch.randn(rows, 256, dtype=DTYPES[dtypes][0])
    row = f"one layer 256x256, M={rows}, {dtypes}"
    contenders = {name: with_lora(name, base, dtypes, targets=["0"]).eval().base_model.model[0] for name in PACKAGES}
    contenders |= {"torch": composed(base, dtypes, targets=["0"])[0], "floor": base[0]}
    return {name: one(row, _quiet(layer, x)) for name, layer in contenders.items()}


@functools.lru_cache(1)
def _models(dtypes: str) -> dict[str, nn.Module]:
    base = stack(2, 1024, 2816, DTYPES[dtypes][0])
    models = {name: with_lora(name, base, dtypes).eval().base_model.model for name in PACKAGES}
    return models | {"torch": composed(base, dtypes), "floor": base}


def _model(rows: int, dtypes: str) -> dict[str, list[Step]]:
    x = torch.randn(rows, 1024, dtype=DTYPES[dtypes][0])
    row = f"14 layers of hidden 1024, M={rows}, {dtypes}"
    return {name: one(row, _quiet(model, x)) for name, model in _models(dtypes).items()}


def _mixed(adapters: int) -> dict[str, list[Step]]:
    """8 rows over `adapters` adapters; the floor is the same batch through one adapter."""
    base, cycles = stack(1, 1024, 2816), {}
    x = torch.randn(8, 1, 1024)
    names = ["default", *(f"a{i}" for i in range(1, adapters))]
    for name in PACKAGES:
        model = with_lora(name, base)
        config = package(name).LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS)
        for extra in names[1:]:
            model.add_adapter(extra, config)
        fill(model)
        chosen = [names[i * adapters // 8] for i in range(8)]
        row = f"mixed batch, 8 rows over {min(8, adapters)} of {adapters} adapters"
        cycles[name] = one(row, _quiet(model.eval(), x, adapter_names=chosen))
        if name == "peft_c":
            single = with_lora(name, base).eval()
            cycles["floor"] = one(row, _quiet(single, x))
    return cycles


def _mixed_embedding(tokens: int) -> dict[str, list[Step]]:
    """The same for a single layer, an embedding, with 8 adapters."""
    base, cycles = nn.Sequential(nn.Embedding(1000, 512)), {}
    ids, names = torch.randint(0, 1000, (8, tokens)), [f"a{i}" for i in range(8)]
    for name in PACKAGES:
        config = package(name).LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
        model = package(name).get_peft_model(copy.deepcopy(base), config, "a0").eval()
        for extra in names[1:]:
            model.add_adapter(extra, config)
        layer, row = model.base_model.model[0], f"mixed batch, 8 rows of {tokens} tokens, embedding 1000x512"
        cycles[name] = one(row, _quiet(layer, ids, adapter_names=names))
        if name == "peft_c":
            cycles["floor"] = one(row, _quiet(layer, ids))
    return cycles


def cases(quick: bool) -> Iterator[Case]:
    """The cases of this theme."""
    settings = ("fp32", "bf16+fp32") if quick else ("fp32", "bf16", "bf16+fp32")
    for dtypes in settings:
        for rows in (1, 64) if quick else (1, 8, 64, 512):
            build = functools.partial(_layer, rows, dtypes)
            yield Case(f"forward layer M={rows} {dtypes}", build, unit="us", note="floor: base layer", seconds=1)
    for dtypes in settings:
        for rows in (1, 64) if quick else (1, 8, 64, 512):
            build = functools.partial(_model, rows, dtypes)
            yield Case(f"forward model M={rows} {dtypes}", build, note="floor: base model")
    for adapters in (8,) if quick else (8, 64):
        build = functools.partial(_mixed, adapters)
        yield Case(f"mixed batch {adapters}", build, note="floor: one adapter for all rows")
    for tokens in (1,) if quick else (1, 16, 128):
        build = functools.partial(_mixed_embedding, tokens)
        note = "floor: one adapter for all rows"
        yield Case(f"mixed batch embedding {tokens}", build, unit="us", note=note, seconds=1)
