"""The numbers of `add_weighted_adapter`: LoRA factors of a new adapter from those of several others, layer by layer.

A combination either concatenates the factors (exact), combines A and B each for itself (a rough approximation), or
combines the full deltas and decomposes the result (`*_svd`, exact up to the rank).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from ...utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties

if TYPE_CHECKING:
    from .core import LoraLayer

Factors = tuple[torch.Tensor, torch.Tensor]

# name: (function, does it prune to a density?, does it elect signs?)
_TASK_FUNCTIONS: dict[str, tuple[Callable[..., torch.Tensor], bool, bool]] = {
    "linear": (task_arithmetic, False, False),
    "ties": (ties, True, True),
    "dare_linear": (dare_linear, True, False),
    "dare_ties": (dare_ties, True, True),
    "magnitude_prune": (magnitude_prune, True, False),
}
COMBINATION_TYPES = ("cat", "svd", *_TASK_FUNCTIONS, *(f"{name}_svd" for name in _TASK_FUNCTIONS if name != "linear"))


@dataclass
class Combination:
    """What `add_weighted_adapter` was asked for; ValueError if that is contradictory or incomplete."""

    kind: str
    adapters: list[str]
    weights: list[float]
    rank: int
    density: float | None = None
    majority_sign_method: str = "total"
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None

    def __post_init__(self) -> None:
        if len(self.adapters) != len(self.weights):
            raise ValueError(
                f"Each adapter needs one weight, got {len(self.adapters)} adapters and {len(self.weights)} weights."
            )
        self._task_function = None
        if self.kind != "cat":
            function, prunes, elects = _TASK_FUNCTIONS[
                "linear" if self.kind == "svd" else self.kind.removesuffix("_svd")
            ]
            if prunes and (self.density is None or self.density < 0):
                raise ValueError(
                    f"combination_type {self.kind!r} needs `density`, the fraction of values to keep (0 to 1), "
                    f"got {self.density}."
                )
            if elects and self.majority_sign_method not in ("total", "frequency"):
                raise ValueError(
                    f"majority_sign_method should be 'total' or 'frequency', got {self.majority_sign_method!r}."
                )
            options = {"density": self.density} if prunes else {}
            if elects:
                options["majority_sign_method"] = self.majority_sign_method
            self._task_function = partial(function, **options)

    def __call__(self, layer: LoraLayer) -> Factors:
        """A (rank, ...) and B (..., rank) of the combination on one layer; ValueError if no adapter is on it."""
        present = [
            (name, weight) for name, weight in zip(self.adapters, self.weights, strict=True) if _has(layer, name)
        ]
        if not present:
            raise ValueError(
                f"No matching LoRAs found: none of the adapters {self.adapters} is on this {type(layer).__name__}."
            )
        if self.kind == "cat":
            return self._concatenated(layer, present)
        if self.kind.endswith("svd"):
            return self._decomposed(layer, present)
        return self._factor_by_factor(layer, present)

    def _concatenated(self, layer: LoraLayer, present: list[tuple[str, float]]) -> Factors:
        """[w1 s1 A1; w2 s2 A2; ...] and [B1, B2, ...]: their product is the weighted sum of the deltas."""
        factors = [factors_of(layer, name) for name, _ in present]
        scaled = [
            A.data * weight * layer.scaling[name] for (A, _), (name, weight) in zip(factors, present, strict=True)
        ]
        return torch.cat(scaled, dim=0), torch.cat([B.data for _, B in factors], dim=1)

    def _factor_by_factor(self, layer: LoraLayer, present: list[tuple[str, float]]) -> Factors:
        """A and B combined each for itself, with the square root of an adapter's weight on either side."""
        scales = [weight * layer.scaling[name] for name, weight in present]
        roots = [math.sqrt(abs(scale)) for scale in scales]
        # a sign on both sides would cancel out
        signed = [root if scale >= 0 else -root for root, scale in zip(roots, scales, strict=True)]
        As, Bs = zip(*(factors_of(layer, name) for name, _ in present), strict=True)
        A, B = (
            self._task_function([factor.data for factor in factors], torch.tensor(weights).to(factors[0].device))
            for factors, weights in ((As, signed), (Bs, roots))
        )
        return A.to(As[0].dtype), B.to(As[0].dtype)

    def _decomposed(self, layer: LoraLayer, present: list[tuple[str, float]]) -> Factors:
        """The best factors of this rank for the combined delta, the singular values all in B."""
        deltas = [layer.get_delta_weight(name) for name, _ in present]
        weights = torch.tensor([weight for _, weight in present]).to(deltas[0].device)
        delta = self._task_function(deltas, weights)
        if delta.dim() > 2:  # convolution: (out, in, *kernel)
            delta = delta.flatten(start_dim=1)
        is_embedding = any(name in layer.lora_embedding_A for name, _ in present)
        if is_embedding or getattr(layer, "fan_in_fan_out", False):
            delta = delta.T

        U, S, Vh = torch.linalg.svd(delta, full_matrices=self.svd_full_matrices, driver=self.svd_driver)
        S = S[: self.rank]
        B = U[:, : len(S)] @ torch.diag(S)
        A = Vh[: len(S)]
        if self.svd_clamp is not None:
            high = torch.quantile(torch.cat([B.flatten(), A.flatten()]), self.svd_clamp)
            A, B = A.clamp(-high, high), B.clamp(-high, high)
        return A, B


def _has(layer: LoraLayer, adapter: str) -> bool:
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def factors_of(layer: LoraLayer, adapter: str) -> Factors:
    """The parameters A (r, ...) and B (..., r) of an adapter; KeyError if the layer does not have it."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]


@torch.no_grad()
def write_factors(layer: LoraLayer, adapter: str, factors: Factors, keep_dtype: bool = False) -> None:
    """Write `factors` into the adapter's parameters; rank that is left over becomes zero.

    A convolution's kernel dimensions, which a decomposition has flattened, are restored. The parameters get the
    factors' dtype unless `keep_dtype`.
    """
    for dim, (param, value) in enumerate(zip(factors_of(layer, adapter), factors, strict=True)):
        shape = list(param.shape)
        shape[dim] = value.shape[dim]
        if not keep_dtype:
            param.data = param.data.to(value.dtype)
        param.zero_()
        param[tuple(slice(size) for size in shape)].copy_(value.reshape(shape))
