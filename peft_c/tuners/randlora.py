"""RandLoRA: a full-rank sum of scaled random matrices that all layers share (https://arxiv.org/abs/2502.00987)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .law import LowRank
from .room import linear, multipliable, option, positive, product, register, rows_of, shared
from .shared_room import ProjectionConfig, ProjectionModel, SharedRoom, wide


@dataclass
class RandLoraConfig(ProjectionConfig):
    """Options of RandLoRA."""

    random = "basis_A and basis_B"
    r: int = option(32, "Rank of each random matrix; a smaller one means more of them and more to train.")
    target_modules: list[str] | str | None = shared("target_modules")
    projection_prng_key: int = shared("projection_prng_key")
    save_projection: bool = shared("save_projection")
    sparse: bool = option(False, "Whether the random matrices are ternary, with a third of the entries not zero.")
    very_sparse: bool = option(False, "The same with 1 / sqrt(smallest dimension) of the entries not zero.")
    randlora_dropout: float = option(0.0, "Probability of dropping an input feature of the adapter in training.")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    randlora_alpha: int = option(640, "The delta is scaled by randlora_alpha / r; 20 times r is usual.")
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")
    init_weights: bool = shared("init_weights")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform", beside_regex=True)
    layers_pattern: list[str] | str | None = shared("layers_pattern", alone=True)


class UniqueBaseGrad(torch.autograd.Function):
    """lambda[k, b] A[k, 0, j] gamma[b, j] as (r, bases, small); keeps only these three for the backward."""

    @staticmethod
    def forward(ctx: Any, A: torch.Tensor, scales: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(A, scales, gamma)
        return scales[:, :, None] * A * gamma[None]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        A, scales, gamma = (tensor.to(grad.dtype) for tensor in ctx.saved_tensors)
        weighted = grad * A
        return None, torch.einsum("kbj,bj->kb", weighted, gamma), torch.einsum("kbj,kb->bj", weighted, scales)


class Linear(SharedRoom, nn.Linear):
    """scaling * Q P, or its transpose if the layer's output is the smaller side, for `small` and `large` sides.

    P (r * bases, small) has the rows lambda[k, b] A[k] gamma[b], and Q (large, bases * r) is the shared B as a matrix;
    A (r, 1, small) and B (large, bases, r) are shared, lambda (r, bases), which starts at zero, and gamma
    (bases, small) are trained; bases = ceil(small / r).
    """

    adapter_layer_names = ("randlora_lambda", "randlora_gamma")
    other_param_names = ("randlora_A", "randlora_B", "randlora_dropout", "r", "scaling")
    own, dropout = "randlora_lambda", "randlora_dropout"

    def create(self, name: str, config: RandLoraConfig, shared: dict[str, nn.Module]) -> None:
        r = positive("r", config.r)
        self.share(shared)
        self.r[name], self.scaling[name] = r, config.randlora_alpha / r
        self.add_dropout(name, config.randlora_dropout)
        small, large = sorted((self.in_features, self.out_features))
        bases = self.num_bases = math.ceil(small / r)
        scales, gamma = torch.randn(r, bases), torch.ones(bases, small) / large
        if config.init_weights:
            scales, gamma = torch.zeros_like(scales), torch.full_like(gamma, 1 / max(gamma.shape))
        self.randlora_lambda[name], self.randlora_gamma[name] = nn.Parameter(scales), nn.Parameter(gamma)

    def parts(self, name: str, cast: Any = multipliable) -> tuple[torch.Tensor, ...]:
        """A (r, 1, small), lambda, gamma and Q, which is cast."""
        scales, gamma = self.randlora_lambda[name], self.randlora_gamma[name]
        bases, small = gamma.shape
        A = self.randlora_A[name][..., :small]
        B = self.randlora_B[name][: max(self.in_features, self.out_features), :bases]
        return wide(A.to(gamma.device)), wide(scales), wide(gamma), cast(B.to(gamma.device)).flatten(1)

    def delta(self, name: str) -> torch.Tensor:
        return self.low_rank(name, wide).delta()

    def low_rank(self, name: str, cast: Any = multipliable) -> LowRank:
        A, scales, gamma, Q = self.parts(name, cast)
        P = UniqueBaseGrad.apply(A, scales * self.scaling[name], gamma).flatten(0, 1).to(Q.dtype)
        return LowRank(P, Q, 1.0) if P.shape[1] == self.in_features else LowRank(Q.T, P.T, 1.0)

    def dense(self, name: str, x: torch.Tensor) -> bool:
        return self.is_long(x)

    def term(self, name: str, x: torch.Tensor) -> torch.Tensor:
        r = self.r[name]
        if rows_of(x) > r:
            return super().term(name, x)
        A, scales, gamma, Q = self.parts(name)  # for few rows: scale the activations, do not build P
        A, x = A[:, 0], x.to(gamma.dtype)
        if gamma.shape[1] == self.in_features:
            x = ((x.unsqueeze(-2) * gamma) @ A.T).transpose(-1, -2) * scales
            return linear(x.flatten(-2).to(Q.dtype), Q) * self.scaling[name]
        x = product(x.to(Q.dtype), Q).unflatten(-1, scales.shape) * scales
        return ((x.transpose(-1, -2) @ A) * gamma).sum(-2) * self.scaling[name]


RandLoraLayer = Linear


class RandLoraModel(ProjectionModel):
    """Injects RandLoRA."""

    uses_shared_state = False
    rooms = {nn.Linear: Linear, "Conv1D": Linear}
    unsupported = ValueError
    title, key = "RandLora", "RandLora PRNG initialisation key"
    projections = ("randlora_A", "randlora_B")

    @staticmethod
    def needed(out_features: int, in_features: int) -> tuple[int, int]:
        return max(out_features, in_features), min(out_features, in_features)

    def draw(self, config: RandLoraConfig, out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B with unit variance: uniform, or -1, 0 and 1 with probability 1 / (2 s), 1 - 1 / s, 1 / (2 s)."""
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        r, (small, large) = config.r, sorted((out_features, in_features))
        bases = math.ceil(small / r)
        if not (config.sparse or config.very_sparse):
            dtype = torch.bfloat16 if _has_bfloat16() else torch.float16
            shapes = [(r, 1, small)] + bases * [(large, 1, r)]
            parts = [torch.empty(shape, dtype=dtype) for shape in shapes]
            A, *B = (nn.init.kaiming_uniform_(part, a=math.sqrt(5), generator=generator) for part in parts)
            B = torch.cat(B, dim=1)
        else:
            bound = 1 / (2 * (math.sqrt(small) if config.very_sparse else 3))
            uniform = (torch.rand(shape, generator=generator) for shape in ((r, 1, small), (large, bases, r)))
            A, B = ((u > 1 - bound).float() - (u < bound).float() for u in uniform)
        return A / A.std(), B / B.std()


def _has_bfloat16() -> bool:
    """Whether the accelerator, if there is one, computes in bfloat16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return not torch.backends.mps.is_available() or torch.backends.mps.is_macos_or_newer(14, 0)


register("randlora", RandLoraConfig, RandLoraModel, parts=("bnb",))
