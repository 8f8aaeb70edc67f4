"""LoHa: the delta is the elementwise product of two low-rank matrices (FedPara, https://arxiv.org/abs/2108.06098)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .law import LowRank
from .lycoris_utils import LycorisConfig, LycorisLayer, LycorisTuner
from .room import einsum, into, product, register, shared


@dataclass
class LoHaConfig(LycorisConfig):
    """Options of LoHa. `r` is the rank of each of the two matrices; their product has a rank of up to r * r."""

    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    init_weights: bool = shared("init_weights")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform", beside_regex=True)
    layers_pattern: list[str] | str | None = shared("layers_pattern")
    modules_to_save: list[str] | None = shared("modules_to_save")


class LoHaLayer(LycorisLayer):
    """(A1 B1) * (A2 B2) * scaling with A (out, r), B (r, in); with a kernel factor T (r, r, *kernel) each matrix is
    sum_ij T[i, j] A[i, :] B[j, :]."""

    adapter_layer_names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def create_factors(self, name: str, config: LoHaConfig, r: int) -> None:
        weight = self.get_base_layer().weight
        kernel, effective = self.kernel(config)
        out, in_size = len(weight), weight.shape[1] if effective else weight[0].numel()
        out_shape = (r, out) if effective else (out, r)
        for factor in ("hada_w1", "hada_w2"):
            zero = factor == "hada_w2" and config.init_weights
            self.new_factor(f"{factor}_a", name, *out_shape)
            self.new_factor(f"{factor}_b", name, r, in_size, zero=zero)
        for factor in ("hada_t1", "hada_t2") if effective else ():
            self.new_factor(factor, name, r, r, *(kernel if len(kernel) == 2 else (*kernel, 1)))

    def factors(self, name: str) -> list[torch.Tensor]:
        return [getattr(self, factor)[name] for factor in self.adapter_layer_names[:4]]

    def dense(self, name: str, x: torch.Tensor) -> bool:
        return not self.training

    def low_rank(self, name: str) -> LowRank | None:
        """The product as one low-rank matrix of rank r * r, where that is small."""
        a1, b1, a2, b2 = self.factors(name)
        r = self.r[name]
        if name in self.hada_t1 or 16 * r * r > min(len(a1), b1.shape[1]):
            return None
        A = (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)
        B = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
        return LowRank(A, B, self.scaling[name])

    def delta(self, name: str) -> torch.Tensor:
        a1, b1, a2, b2 = self.factors(name)
        if name not in self.hada_t1:
            return into(torch.mul, product(a1, b1), product(a2 * self.scaling[name], b2))
        both = zip((self.hada_t1[name], self.hada_t2[name]), (a1, a2), (b1, b2), strict=True)
        first, second = (einsum("ijkl,jc,io->ockl", t, b, a) for t, a, b in both)
        return (first * second * self.scaling[name]).flatten(1)


class Linear(LoHaLayer):
    """LoHa for nn.Linear."""


class Conv1d(LoHaLayer):
    """LoHa for nn.Conv1d."""


class Conv2d(LoHaLayer):
    """LoHa for nn.Conv2d."""


class LoHaModel(LycorisTuner):
    """Injects LoHa."""

    prefix = "hada_"
    rooms = layers_mapping = {nn.Conv2d: Conv2d, nn.Conv1d: Conv1d, nn.Linear: Linear}


register("loha", LoHaConfig, LoHaModel, mixed=True)
