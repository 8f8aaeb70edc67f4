"""The C fast paths seen from Python: the switch, `explain`, and the autograd.Function around the low-rank kernels."""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import _C


@contextmanager
def fast_paths(enabled: bool) -> Iterator[None]:
    """Let C act (or not) where it can, within a `with` block; the default is yes, or no with `PEFT_C_FAST=0`.

    The switch belongs to the process, not to the thread: it is for tests, comparisons and debugging.
    """
    before = _C.set_fast(enabled)
    try:
        yield
    finally:
        _C.set_fast(before)


def is_fast() -> bool:
    """Whether C may act where it can."""
    return _C.is_fast()


def increment_version(*tensors: torch.Tensor) -> None:
    """Tell autograd that C wrote into these tensors, as PyTorch's own in-place operations do.

    Inference tensors have no version, so for them nothing happens.
    """
    torch.autograd.graph.increment_version(tensors)


# ---------------------------------------------------------------------------------------------------------- explain


class LayerPath(NamedTuple):
    """One line of `explain`: a tuner layer, the path its forward takes now, and why."""

    name: str
    type: str
    adapters: tuple[str, ...]
    path: str
    reason: str


class Explanation(list[LayerPath]):
    """What `explain` returns: a list of `LayerPath` that prints as a table."""

    header = ("layer", "type", "active", "path", "reason")

    def _rows(self) -> list[tuple[str, ...]]:
        return [(p.name or "(the model)", p.type, ", ".join(p.adapters), p.path, p.reason) for p in self]

    def counts(self) -> dict[str, int]:
        """Number of layers by path, for instance `{"C": 24, "composed": 2}`."""
        counts: dict[str, int] = {}
        for line in self:
            counts[line.path] = counts.get(line.path, 0) + 1
        return counts

    def _summary(self) -> str:
        if not self:
            return "no tuner layer found"
        return f"{len(self)} tuner layers: " + ", ".join(f"{n} {path}" for path, n in self.counts().items())

    def __str__(self) -> str:
        if not self:
            return self._summary()
        rows = [self.header, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([*lines, self._summary()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(tag, row):
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

        body = "".join(line("td", row) for row in self._rows())
        return f"<p>{html.escape(self._summary())}</p><table>{line('th', self.header)}{body}</table>"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"


def explain(model: torch.nn.Module, x: torch.Tensor | None = None) -> Explanation:
    """Say for every tuner layer of `model` which path its forward takes now, why not the other, and what it holds
    beside its parameters: what unmerging needs, and adapted weights.

    Paths: "C"; "composed" (plain PyTorch, always the same result); "merged", "disabled" and "base" (the base layer
    alone). A reason that depends on the input (its device, dtype, type) is seen only at the call, or with an example
    input `x` for a single layer. Nothing is run or changed.
    """
    from .tuners.kept import kept_bytes
    from .tuners.tuners_utils import BaseTunerLayer
    from .tuners.undo import record_bytes

    lines = Explanation()
    for name, module in model.named_modules():
        if not (isinstance(module, BaseTunerLayer) or hasattr(type(module), "_lowrank_names")):
            continue
        path, _, reason = _C.gate(module) if x is None else _C.gate(module, x)
        if kept := kept_bytes(module):
            reason += f"; {_size(kept)} of adapted weights are kept between forwards"
        if held := record_bytes(module):
            reason += f"; {_size(held)} are held to unmerge to the last bit"
        active = getattr(module, "_active_adapter", ())
        active = (active,) if isinstance(active, str) else tuple(active)
        lines.append(LayerPath(name, type(module).__name__, active, path, reason))
    return lines


# ------------------------------------------------------------------------------------------------ the graph around C

_COMPOSED, _COPY, _IN_PLACE = 0, 1, 2


def _finish(y, x, how, terms):
    """y + sum of scale * B(A(dropout(x))), called by `_C.lowrank_forward` for what it cannot do by itself.

    terms: tuples (A, B, scale, dropout module or None, 1 - p). how: plain torch operations; the kernels into a copy of
    y; or into y itself, which nobody else holds.
    """
    if how == _COMPOSED:
        return _compose(y, x, terms)
    plain = [term for term in terms if term[3] is None]
    if plain:
        y = _apply(y, x, plain, how)
        how = _IN_PLACE
    for down, up, scale, dropout, keep in terms:
        if dropout is None:
            continue
        dropped, scale = _drop(x, down, scale, dropout, keep)
        y = _apply(y, dropped, [(down, up, scale)], how)
        how = _IN_PLACE
    return y


def _apply(y, x, terms, how):
    factors = tuple(tensor for term in terms for tensor in term[:2])
    return _linear(y, x, None, None, tuple(term[2] for term in terms), how == _IN_PLACE, *factors)


def _drop(x, down, scale, dropout, keep):
    """Dropout of x, and the scale to use with it.

    An x narrower than the adapter keeps its dtype: a mask of 0 and 1 is exact in it, 1 / keep goes into the scale.
    """
    if x.dtype.itemsize >= down.dtype.itemsize:
        return dropout(x), scale
    mask = torch.empty_like(x).bernoulli_(keep)
    return x * mask, scale / keep if keep else scale


def _compose(y, x, terms):
    dtype = y.dtype
    for down, up, scale, dropout, _ in terms:
        x = x.to(down.dtype)
        y = y + F.linear(F.linear(x if dropout is None else dropout(x), down), up) * scale
    return y.to(dtype)


class _LowRank(torch.autograd.Function):
    """y (..., n) + sum_i s_i (x A_i^T) B_i^T for x (..., k), forward and backward in C.

    y is the base layer's output, or None: then it is F.linear(x, weight, bias), weight (n, k) and bias without
    gradients, and with torch's bits if not in_place. Keeps x, the factors and t = x A^T (m, sum r_i): nothing of the
    size of y, no wider copy of x. With create_graph the backward is made of torch operations, so that it can be
    differentiated again.
    """

    @staticmethod
    def forward(ctx, y, x, weight, bias, scales, in_place, *factors):
        # With in_place nobody else holds y, and its memory becomes the output's. detach(), because y may be a view in
        # autograd's eyes (F.linear reshapes), and the output must not be one.
        needs, shape, dtype, t = ctx.needs_input_grad, x.shape, x.dtype, None
        if True in needs[7::2]:
            wide = torch.float64 if torch.float64 in (dtype, dtype if y is None else y.dtype) else torch.float32
            ranks = factors[0].shape[0] if len(factors) == 2 else sum(down.shape[0] for down in factors[::2])
            t = torch.empty(shape[:-1].numel(), ranks, dtype=wide)
        if y is None and not in_place:
            y, in_place = F.linear(x, weight, bias), True
        if y is None:
            out = _C.lowrank_linear(x, weight, bias, t, scales, factors).detach()
        else:
            out = y.detach() if in_place else y.detach().clone(memory_format=torch.contiguous_format)
            _C.lowrank_apply(out, x, t, scales, factors)
        ctx.like = (scales, shape, dtype)
        ctx.save_for_backward(x if True in needs[6:] else None, t, weight if needs[1] else None, *factors)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, g):
        needs = ctx.needs_input_grad
        if g is None:
            return (None,) * len(needs)
        x, t, weight, *factors = ctx.saved_tensors
        scales, shape, dtype = ctx.like
        grads, asked = None, (needs[1], needs[6:], shape, dtype)
        if not torch.is_grad_enabled():  # which it is with create_graph
            grads = _backward_in_c(g, x, t, weight, scales, tuple(factors), *asked)
        if grads is None:
            grads = _backward_composed(g, x, weight, scales, factors, *asked)
        return (g if needs[0] else None, grads[0], None, None, None, None, *grads[1:])


# Function.apply without its care for functorch, where the gate lets nothing pass; `_C.lowrank_forward` calls it for a
# frozen nn.Linear and terms without dropout.
_linear = super(torch.autograd.Function, _LowRank).apply


def _backward_in_c(g, x, t, weight, scales, factors, needs_x, needs, shape, dtype):
    """(dx, dA_0, dB_0, ...), None where not needed; None altogether when g is no plain tensor."""
    g = g.contiguous()  # every product below walks its rows; that of sum() repeats one element
    grads, dx = tuple([torch.empty_like(f) if need else None for f, need in zip(factors, needs, strict=True)]), None
    if weight is not None:
        u = torch.empty_like(t) if t is not None else None
        dx = _C.linear_grad(g, weight, u, scales, factors)
    if dx is not None:
        return (dx, *grads) if _C.lowrank_backward(g, x, t, scales, factors, None, grads, False, u) else None
    wide = factors[0].dtype if len(scales) > 1 and factors[0].dtype.itemsize > dtype.itemsize else dtype
    late = weight is not None and len(scales) > 0 and dtype == wide == torch.float32  # as in forward_raw.c
    add = weight is not None and not late
    if add:
        dx = (g @ weight).to(wide)
    elif needs_x:
        dx = torch.empty(shape, dtype=wide)
    if not _C.lowrank_backward(g, x, t, scales, factors, dx, grads, add):
        return None
    if late:
        dx.view(-1, shape[-1]).addmm_(g.reshape(-1, g.shape[-1]), weight)
    return (dx if dx is None or wide == dtype else dx.to(dtype), *grads)


def _backward_composed(g, x, weight, scales, factors, needs_x, needs, shape, dtype):
    """The same in torch operations that autograd and torch.func can see."""
    grads = []
    dx = (g @ weight).reshape(-1, shape[-1]) if weight is not None else None
    for i, scale in enumerate(scales):
        down, up = factors[2 * i : 2 * i + 2]
        wide = g.to(down.dtype).reshape(-1, up.shape[0])
        x2 = x.to(down.dtype).reshape(-1, down.shape[1]) if x is not None else None
        u = (wide @ up) * scale
        if needs_x:
            term = u @ down
            dx = term if dx is None else dx + term
        grads.append(u.t() @ x2 if needs[2 * i] else None)
        grads.append((wide.t() @ (x2 @ down.t())) * scale if needs[2 * i + 1] else None)
    if dx is not None:
        dx = dx.reshape(shape).to(dtype)
    return dx, *grads


# ------------------------------------------------------------------------------- products that torch multiplies slowly


def _times(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a (..., k) @ b (k, n) + bias, by the kernels where these are faster. Autograd does not see it."""
    if b.stride(0) == 1 and b.stride(1) != 1:
        return _C.lowrank_linear(a, b.T, bias, None, (), ())
    result = _C.linear_grad(a, b)
    result = a @ b if result is None else result
    return result if bias is None else result.add_(bias)


class _Product(torch.autograd.Function):
    """x (..., k) @ matrix (k, n) + bias, each with a gradient where it wants one."""

    @staticmethod
    def forward(ctx, x, matrix, bias):
        ctx.save_for_backward(x, matrix)
        return _times(x, matrix, bias).detach()

    @staticmethod
    def backward(ctx, g):
        (x, matrix), needs, dm = ctx.saved_tensors, ctx.needs_input_grad, None
        times = torch.matmul if torch.is_grad_enabled() else _times  # which it is with create_graph
        g = g.contiguous()
        rows, inputs = g.view(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        if needs[1]:  # in the matrix's layout
            dm = times(rows.T, inputs).T if matrix.stride(0) == 1 else times(inputs.T, rows)
        return times(g, matrix.T) if needs[0] else None, dm, rows.sum(0) if needs[2] else None


def product_in_graph(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., k) @ matrix (k, n) + bias under autograd, of one dtype, on the CPU, where `_C.may_act`."""
    return _Product.apply(x, matrix, bias)
