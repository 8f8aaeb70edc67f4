"""Rooms whose adapters add to some elements of a linear layer's weight: SHiRA and Super-Tuning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from . import kept, law
from .base_view import held
from .room import AddRoom, apply_weight, rows_of


@functools.cache
def _warn_once_about_module_hooks(method: str) -> None:
    warnings.warn(
        f"One of the base layers adapted with {method} has forward or backward hooks. They are called, for which the "
        "output is computed in a slower way; if possible set them on the adapted layer instead."
    )


class SparseRoom(AddRoom):
    """W + S, where the sparse matrix S has `elements(name)`, and a LoRA beside it where there is one.

    For few inputs S x is computed by its elements; for many, S is added to a copy of the weight.
    """

    returns_input_dtype = False
    converts_to_lora = False

    def _merge_adapters(self) -> Iterable[str]:
        return self._modules[self.adapter_layer_names[0]].keys()  # all have values

    def elements(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Places (nnz), int32 or int64, in the flat weight, all different, and values (nnz) of S."""
        raise NotImplementedError(f"{type(self).__name__} does not say which elements it adds to")

    def lora(self, name: str) -> law.LowRank | None:
        """The LoRA beside S, if there is one."""
        return None

    def rest(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """What the LoRA adds to the output, None for nothing."""
        return None

    def add_to(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        places, values = self.elements(name)
        return weight.reshape(-1).index_add(0, places, values.to(weight.dtype)).view(weight.shape)

    def delta(self, name: str) -> torch.Tensor:
        values, lora = self.elements(name)[1], self.lora(name)
        sparse = self.add_to(values.new_zeros(self.out_features, self.in_features), name)
        return sparse if lora is None else sparse + lora.delta()

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """S, as a sparse tensor."""
        places, values = self.elements(adapter)
        indices = torch.stack([places // self.in_features, places % self.in_features])
        return torch.sparse_coo_tensor(indices, values, (self.out_features, self.in_features))

    def weight_change(self, name: str) -> law.Change:
        if self.lora(name) is not None:
            return super().weight_change(name)
        return law.Elements(*self.elements(name), held(self.get_base_layer(), "weight").shape)

    def term(self, name: str, x: torch.Tensor) -> torch.Tensor:
        places, values = self.elements(name)
        if self.is_cheap(name, x):
            parts = x[..., places % self.in_features] * values
            result = values.new_zeros(*x.shape[:-1], self.out_features)
            result = result.index_add(-1, places // self.in_features, parts)
        else:
            result = F.linear(x, self.add_to(values.new_zeros(self.out_features, self.in_features), name))
        rest = self.rest(name, x)
        return result if rest is None else result + rest

    def is_cheap(self, name: str, x: torch.Tensor) -> bool:
        """Whether S x by elements takes less than a weight with S in it."""
        count = getattr(self, self.adapter_layer_names[0])[name].numel()
        return rows_of(x) * count <= self.in_features * self.out_features // 32

    def adapt(self, names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, hooked = self.base_layer, not self.is_bare()
        if hooked:
            _warn_once_about_module_hooks(self.title)
        backend = self.quantization_backend
        readable = base is self.get_base_layer() and (backend is None or backend.supports_merge)
        if hooked or not readable or all(self.is_cheap(name, x) for name in names):
            return super().adapt(names, x, *args, **kwargs)
        weight, bias = kept.adapted(
            self, names, lambda: (functools.reduce(self.add_to, names, self.get_base_weight()), base.bias)
        )
        result = apply_weight(base, x, weight, bias)
        for name in names:
            rest = self.rest(name, self._cast_input_dtype(x, self.adapter_dtype(name)))
            result = result if rest is None else result + rest.to(result.dtype)
        return result
