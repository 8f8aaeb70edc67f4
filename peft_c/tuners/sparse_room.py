"""Rooms whose adapters add to some elements of a linear layer's weight: SHiRA and Super-Tuning."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F

from .room import AddRoom


@functools.cache
def _warn_once_about_module_hooks(method: str) -> None:
    warnings.warn(
        f"One of the base layers adapted with {method} has forward or backward hooks. They are called, for which the "
        "output is computed in a slower way; if possible set them on the adapted layer instead."
    )


class SparseRoom(AddRoom):
    """W + S, where the sparse matrix S has `elements(name)`, and what `rest(name, x)` adds beside it.

    For few inputs S x is computed by its elements; for many, S is added to a copy of the weight.
    """

    converts_to_lora = False

    def elements(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, columns and values of S, each (nnz)."""
        raise NotImplementedError(f"{type(self).__name__} does not say which elements it adds to")

    def rest(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """What the adapter adds to the output beside S x, None for nothing."""
        return None

    def add_to(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        rows, columns, values = self.elements(name)
        return weight.index_put((rows, columns), values.to(weight.dtype), accumulate=True)

    def delta(self, name: str) -> torch.Tensor:
        values = self.elements(name)[2]
        return self.add_to(values.new_zeros(self.out_features, self.in_features), name)

    def term(self, name: str, x: torch.Tensor) -> torch.Tensor:
        rows, columns, values = self.elements(name)
        if self.is_cheap(name, x):
            result = values.new_zeros(*x.shape[:-1], self.out_features)
            result = result.index_add(-1, rows, x[..., columns] * values)
        else:
            result = F.linear(x, self.add_to(values.new_zeros(self.out_features, self.in_features), name))
        rest = self.rest(name, x)
        return result if rest is None else result + rest

    def is_cheap(self, name: str, x: torch.Tensor) -> bool:
        """Whether S x by elements takes less than a weight with S in it."""
        count = getattr(self, self.adapter_layer_names[0])[name].numel()
        return x.numel() // x.shape[-1] * count <= self.in_features * self.out_features // 32

    def adapt(self, names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self.base_layer
        hooked = any((base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks))
        if hooked:
            _warn_once_about_module_hooks(self.title)
        backend = self.quantization_backend
        readable = base is self.get_base_layer() and (backend is None or backend.supports_merge)
        if hooked or not readable or all(self.is_cheap(name, x) for name in names):
            return super().adapt(names, x, *args, **kwargs)
        weight = functools.reduce(self.add_to, names, self.get_base_weight())
        result = F.linear(x, weight, base.bias)
        for name in names:
            rest = self.rest(name, self._cast_input_dtype(x, self.adapter_dtype(name)))
            result = result if rest is None else result + rest.to(result.dtype)
        return result
