"""LoKr: the delta is the Kronecker product of two small matrices (LyCORIS, https://arxiv.org/abs/2309.14859)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .lycoris_utils import LycorisConfig, LycorisLayer, LycorisTuner
from .room import einsum, linear, option, product, register, rows_of, shared


@dataclass
class LoKrConfig(LycorisConfig):
    """Options of LoKr. The second matrix (with `decompose_both` both) is of rank `r`, where that saves anything."""

    decompose_both: bool = option(False, "Whether the first matrix is factored as well.")
    decompose_factor: int = option(-1, "Size of the first matrix, if it divides the layer's; -1: as square as can be.")
    rank_dropout_scale: bool = option(False, "Whether rank dropout keeps the mean of the delta.")
    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    init_weights: bool | Literal["lycoris"] = option(
        True, "True: the first matrix starts at zero; 'lycoris': the second does; False: none, which is for tests."
    )
    layers_to_transform: list[int] | int | None = shared("layers_to_transform", beside_regex=True)
    layers_pattern: list[str] | str | None = shared("layers_pattern")
    modules_to_save: list[str] | None = shared("modules_to_save")


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m * n = dimension and m <= n, as close to each other as can be with m <= factor (-1: any m).

    A factor that divides the dimension is m itself, also if it is the larger one.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    m = max((m for m in range(1, int(dimension**0.5) + 1) if dimension % m == 0 and m <= limit), default=1)
    return m, dimension // m


class LoKrLayer(LycorisLayer):
    """kron(W1 (l, m), W2 (k, n)) * scaling, where l * k = out and m * n = in; W2 may have a kernel, too.

    W1 = A B with factors (l, r), (r, m), or itself; W2 likewise, or sum_ij T[i, j] A[i, :] B[j, :].
    """

    adapter_layer_names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    def create_factors(self, name: str, config: LoKrConfig, r: int) -> None:
        weight = self.get_base_layer().weight
        kernel, effective = self.kernel(config)
        (l, k), (m, n) = (factorization(size, config.decompose_factor) for size in weight.shape[:2])
        first_zero = config.init_weights and config.init_weights != "lycoris"
        second_zero = config.init_weights == "lycoris"
        if config.decompose_both and r < max(l, m) / 2:
            self.new_factor("lokr_w1_a", name, l, r, zero=first_zero)
            self.new_factor("lokr_w1_b", name, r, m)
        else:
            self.new_factor("lokr_w1", name, l, m, zero=first_zero)
        if r >= max(k, n) / 2:
            self.new_factor("lokr_w2", name, k, n, *kernel, zero=second_zero)
            return
        self.new_factor("lokr_w2_a", name, *((r, k) if effective else (k, r)))
        columns = n if effective else n * weight[0, 0].numel()
        self.new_factor("lokr_w2_b", name, r, columns, zero=second_zero)
        if effective:
            self.new_factor("lokr_t2", name, r, r, *(kernel if len(kernel) == 2 else (*kernel, 1)))

    def matrices(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """W1 (l, m) and W2 (k, n, *kernel), or (k, n * kernel) as one matrix."""
        w1 = self.lokr_w1[name] if name in self.lokr_w1 else product(self.lokr_w1_a[name], self.lokr_w1_b[name])
        if name in self.lokr_w2:
            return w1, self.lokr_w2[name]
        a, b = self.lokr_w2_a[name], self.lokr_w2_b[name]
        if name not in self.lokr_t2:
            return w1, product(a, b)
        return w1, einsum("ijkl,ip,jr->prkl", self.lokr_t2[name], a, b)

    def delta(self, name: str) -> torch.Tensor:
        w1, w2 = self.matrices(name)
        if w2.ndim != 3:  # PEFT's Kronecker product with a one-dimensional kernel aligns W1 with (in, kernel): keep it
            w2 = w2.flatten(1)
        return torch.kron(w1 * self.scaling[name], w2.contiguous()).reshape(self.out_features, -1)

    def dense(self, name: str, x: torch.Tensor) -> bool:
        rows, linear = rows_of(x), isinstance(self.get_base_layer(), nn.Linear)
        return not (torch.is_grad_enabled() or self.training) and (rows > 128 or not linear)

    def activations(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.get_base_layer(), nn.Linear):
            return super().activations(name, x)
        w1, w2 = self.matrices(name)  # kron(W1, W2) x = vec(W1 X W2^T), X (m, n)
        x = x.unflatten(-1, (w1.shape[1], w2.shape[1]))
        return product(w1, linear(x, w2)).flatten(-2) * self.scaling[name]


class Linear(LoKrLayer):
    """LoKr for nn.Linear."""


class Conv1d(LoKrLayer):
    """LoKr for nn.Conv1d."""


class Conv2d(LoKrLayer):
    """LoKr for nn.Conv2d."""


class LoKrModel(LycorisTuner):
    """Injects LoKr."""

    rooms = layers_mapping = {nn.Conv2d: Conv2d, nn.Conv1d: Conv1d, nn.Linear: Linear}


register("lokr", LoKrConfig, LoKrModel, mixed=True)
