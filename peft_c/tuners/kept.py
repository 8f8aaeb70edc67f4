"""Weights with adapters in them, kept between forwards in evaluation: `adapted`.

Rooms for which it is best to build the adapted weight and to multiply once build it in each forward. Where nothing it
is made of has changed since the last forward, it is kept, and used as long as that is so. What it is made of is
compared by its values (a digest of the base weight, the adapter's tensors and numbers), so nothing goes stale, however
it was written to. The bits of the output are the same with and without it.

Kept weights are no part of the layers: copies, pickles and state dicts do not have them. They go on `train()`, moving,
merging and deleting an adapter, with their layer, and, when something has changed, at the next forward.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .. import _C

Adapted = tuple[torch.Tensor, torch.Tensor | None]
_SIMPLE = (int, float, str, bool, type(None))


class _Kept:
    """A weight and bias that count as long as they are there."""

    lock = RLock()
    total = 0  # bytes

    def __init__(self, adapted: Adapted) -> None:
        self.adapted, self.nbytes = adapted, adapted[0].nbytes
        with _Kept.lock:
            _Kept.total += self.nbytes

    def __del__(self) -> None:
        kind = type(self)  # the module's names may be gone when the interpreter ends
        with kind.lock:
            kind.total -= self.nbytes


# layer -> names of adapters -> (what it was made of at the last forward, what was made of it or None)
_kept: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], tuple[tuple | None, _Kept | None]]] = WeakKeyDictionary()


class kept_weights:
    """How many MiB of adapted weights may be kept in all, 0 for none: a switch, or a context if used with `with`.

    Layers beyond it build theirs in each forward. The default is 256, or what PEFT_C_KEPT says.
    """

    limit: float = float(os.environ.get("PEFT_C_KEPT", "256"))

    def __init__(self, mebibytes: float) -> None:
        self._before = kept_weights.limit
        kept_weights.limit = mebibytes
        if not mebibytes:
            _kept.clear()

    def __enter__(self) -> kept_weights:
        return self

    def __exit__(self, *_: Any) -> None:
        kept_weights.limit = self._before


def kept_bytes(layer: nn.Module | None = None) -> int:
    """Bytes of the weights that are kept for a layer, or for all."""
    if layer is None:
        return _Kept.total
    return sum(kept.nbytes for _, kept in list(_kept.get(layer, {}).values()) if kept is not None)


def forget(layer: nn.Module) -> None:
    """Keep nothing for the layer any longer."""
    if _kept.data:
        _kept.pop(layer, None)


def _made_of(layer: Any, names: tuple[str, ...]) -> tuple | None:
    """The values on which the adapted weight depends; None where they cannot be told."""
    tensors, values = list(layer.get_base_layer()._parameters.values()), []
    for container in (*layer.adapter_layer_names, *layer.other_param_names):
        content = getattr(layer, container)
        for name in names:
            item = content[name] if name in content else None
            if isinstance(item, torch.Tensor):
                tensors.append(item)
            elif isinstance(item, nn.Module):
                tensors += [*item.parameters(), *item.buffers()]
                values.append([value for value in item.__dict__.values() if isinstance(value, _SIMPLE)])
            else:
                values.append(item)
                parts = item if isinstance(item, (list, tuple)) else (item,)
                if not all(isinstance(part, _SIMPLE) for part in parts):
                    return None
    digest = _C.fingerprint([tensor for tensor in tensors if tensor is not None])
    return None if digest is None else (digest, repr(values))


def adapted(layer: Any, names: list[str], build: Callable[[], Adapted]) -> Adapted:
    """What `build()` returns, which depends on the base layer and these adapters alone and is new memory; from an
    earlier forward where that can be and it is worthwhile. Nobody may write to it."""
    if layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or not _C.may_act():
        return build()
    weight = layer.get_base_layer()._parameters.get("weight")
    if weight is None or not kept_weights.limit:
        return build()
    which, found = tuple(names), _kept.setdefault(layer, {})
    before, kept = found.get(which, (None, None))
    if kept is None and _Kept.total + weight.nbytes > kept_weights.limit * 2**20:
        return build()
    now = _made_of(layer, which)
    if kept is not None and now == before:
        return kept.adapted
    result = build()
    found[which] = (now, _Kept(result) if now is not None and now == before else None)
    return result
