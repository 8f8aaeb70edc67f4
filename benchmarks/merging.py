"""merge, unmerge and safe_merge of one layer over sizes, ranks and dtypes, and of a whole model.

Rows that end in "no record" are peft_c with `exact_unmerge(False)`, which then does what the others do: it subtracts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from models import DTYPES, PACKAGES, stack, with_lora
from timing import Case, Step
from torch import nn

SIZES = ((1024, 1024), (4096, 4096), (11008, 4096))


@functools.lru_cache(1)
def _weight(size: tuple[int, int], dtypes: str) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(size[1], size[0], bias=False, dtype=DTYPES[dtypes][0])
    return nn.Sequential(linear).eval().requires_grad_(False)


def _without_record(call: Callable[[], None]) -> Callable[[], None]:
    from peft_c import exact_unmerge

    def run() -> None:
        with exact_unmerge(False):
            call()

    return run


def _layer(size: tuple[int, int], r: int, dtypes: str) -> dict[str, list[Step]]:
    base = _weight(size, dtypes)
    what = f"{size[0]}x{size[1]}, r={r}, {dtypes}"
    plain = f"{what}, no record"

    def cycle(name):
        layer = with_lora(name, base, dtypes, r=r, targets=["0"]).base_model.model[0]
        return [
            (f"merge {what}", layer.merge),
            (f"unmerge {what}", layer.unmerge),
            (f"merge {plain}", _without_record(layer.merge) if name == "peft_c" else layer.merge),
            (f"unmerge {plain}", layer.unmerge),
            (f"safe_merge {what}", lambda: layer.merge(safe_merge=True)),
            (None, layer.unmerge),
        ]

    weight = base[0].weight.detach().clone()
    a = torch.randn(r, size[1], dtype=DTYPES[dtypes][1]) / r
    b = 0.01 * torch.randn(size[0], r, dtype=DTYPES[dtypes][1])

    def addmm(scale):
        # Adapters wider than the weight have to be rounded first: torch has no mixed product.
        weight.addmm_(b.to(weight.dtype), a.to(weight.dtype), alpha=scale)

    def safe():
        addmm(1.0)
        assert weight.isfinite().all()

    def touch():
        weight.mul_(1.0)

    cycles = {name: cycle(name) for name in PACKAGES}
    cycles["torch"] = [
        (f"merge {what}", lambda: addmm(1.0)),
        (f"unmerge {what}", lambda: addmm(-1.0)),
        (f"merge {plain}", lambda: addmm(1.0)),
        (f"unmerge {plain}", lambda: addmm(-1.0)),
        (f"safe_merge {what}", safe),
        (None, lambda: addmm(-1.0)),
    ]
    rows = [f"{step} {what}" for step in ("merge", "unmerge", "safe_merge")]
    cycles["floor"] = [(row, touch) for row in (*rows, f"merge {plain}", f"unmerge {plain}")]
    return cycles


def _model(dtypes: str) -> dict[str, list[Step]]:
    base = stack(2, 1024, 2816, DTYPES[dtypes][0])
    what = f"all 14 layers of hidden 1024, {dtypes}"
    weights = [m.weight.detach().clone() for m in base.modules() if isinstance(m, nn.Linear)]

    def touch():
        for weight in weights:
            weight.mul_(1.0)

    def cycle(name):
        model = with_lora(name, base, dtypes)
        return [(f"merge {what}", model.merge_adapter), (f"unmerge {what}", model.unmerge_adapter)]

    cycles = {name: cycle(name) for name in PACKAGES}
    return cycles | {"floor": [(f"merge {what}", touch), (f"unmerge {what}", touch)]}


def cases(quick: bool) -> Iterator[Case]:
    """The cases of this theme."""
    for dtypes in ("fp32", "bf16+fp32") if quick else ("fp32", "bf16", "bf16+fp32", "fp16"):
        for size in SIZES[:2] if quick else SIZES:
            for r in (16,) if quick else (8, 16, 64, 128):
                build = functools.partial(_layer, size, r, dtypes)
                name = f"merge unmerge safe_merge {size[0]}x{size[1]} r={r} {dtypes}"
                yield Case(name, build, note="floor: read and write once", seconds=4)
        yield Case(
            f"merge unmerge model {dtypes}", functools.partial(_model, dtypes), note="floor: read and write once"
        )
