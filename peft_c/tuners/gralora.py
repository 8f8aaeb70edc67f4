"""GraLoRA: k x k low-rank blocks that share their factors by rows and columns (https://arxiv.org/abs/2505.20355)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from .law import LowRank
from .room import FEW, AddRoom, RoomConfig, RoomModel, dropout, einsum, kaiming, option, positive, register, shared
from .room_layer import is_idle


@dataclass
class GraloraConfig(RoomConfig):
    """Options of GraLoRA. ValueError: `gralora_k` is not positive or does not divide `r`."""

    r: int = option(32, "Rank of each of the k rows of factors; has to be a multiple of `gralora_k`.")
    hybrid_r: int = option(0, "Rank of a plain low-rank term beside the blocks; 0: none.")
    target_modules: list[str] | str | None = shared("target_modules")
    alpha: int = option(64, "The delta is scaled by alpha / (r + hybrid_r).")
    gralora_dropout: float = option(0.0, "Dropout probability of the adapter's input.")
    gralora_k: int = option(2, "Number of blocks along each side; 2 up to rank 32, 4 from rank 64.", positive=True)
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")
    init_weights: bool = shared("init_weights")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform", beside_regex=True)
    layers_pattern: list[str] | str | None = shared("layers_pattern", alone=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.gralora_k:
            raise ValueError(f"r should be divisible by gralora_k, but got {self.r} and {self.gralora_k}")


class Linear(AddRoom, nn.Linear):
    """GraLoRA for nn.Linear and Conv1D: A (k, in / k, r), B (k, r, out / k).

    With s = r / k, the block from input part n to output part j is A[n][:, js:(j+1)s] B[j][ns:(n+1)s]; the plain term
    is B_general (out, hybrid_r) A_general (hybrid_r, in).
    """

    adapter_layer_names = ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general")
    other_param_names = ("r", "hybrid_r", "alpha", "scaling", "gralora_dropout", "gralora_k")
    factored = math.inf
    containers = {"gralora_dropout": nn.ModuleDict, **dict.fromkeys(("gralora_A", "gralora_B"), nn.ParameterDict)}
    containers |= dict.fromkeys(("gralora_A_general", "gralora_B_general"), nn.ModuleDict)

    def create(self, name: str, config: GraloraConfig) -> None:
        r, k, hybrid_r = positive("r", config.r), config.gralora_k, config.hybrid_r
        if hybrid_r < 0:
            raise ValueError(f"`hybrid_r` should be a non-negative integer value but the value passed is {hybrid_r}")
        for side in ("in_features", "out_features"):
            if getattr(self, side) % k:
                raise ValueError(f"{side} should be divisible by gralora_k, but got {getattr(self, side)} and {k}")
        self.r[name], self.hybrid_r[name], self.gralora_k[name] = r, hybrid_r, k
        self.alpha[name], self.scaling[name] = config.alpha, config.alpha / (r + hybrid_r)
        self.gralora_dropout[name] = dropout(config.gralora_dropout)
        A, B = torch.empty(k, r, self.in_features // k), torch.zeros(k, self.out_features // k, r)
        for part in range(k):
            for factor in (A,) if config.init_weights else (A, B):
                kaiming(factor[part])
        self.gralora_A[name] = nn.Parameter(A.mT.contiguous())
        self.gralora_B[name] = nn.Parameter(B.mT.contiguous())
        general = (nn.Identity(), nn.Identity())
        if hybrid_r:
            general = (
                nn.Linear(self.in_features, hybrid_r, bias=False),
                nn.Linear(hybrid_r, self.out_features, bias=False),
            )
            kaiming(general[0].weight)
            (nn.init.zeros_ if config.init_weights else kaiming)(general[1].weight)
        self.gralora_A_general[name], self.gralora_B_general[name] = general

    def low_rank(self, name: str) -> LowRank | None:
        """A (k r, in) and B (out, k r) with zeros in other blocks, where that is not too much more work."""
        A, B, k = self.gralora_A[name], self.gralora_B[name], self.gralora_k[name]
        if k * self.r[name] > FEW or self.hybrid_r[name]:
            return None
        A = torch.diag_embed(A.permute(2, 1, 0), dim1=0, dim2=2)  # (n, r, n, in / k)
        B = torch.diag_embed(B.unflatten(1, (k, -1)).permute(3, 1, 2, 0), dim1=0, dim2=3)  # (j, out / k, n, j, s)
        return LowRank(A.flatten(0, 1).flatten(1), B.flatten(0, 1).flatten(1), self.scaling[name])

    def terms(self, name: str, x: torch.Tensor) -> list[LowRank | None]:
        return super().terms(name, x) if is_idle(self.gralora_dropout[name]) else [None]

    def delta(self, name: str) -> torch.Tensor:
        A, B, k = self.gralora_A[name], self.gralora_B[name], self.gralora_k[name]
        blocks = einsum("jnso,nijs->joni", B.unflatten(1, (k, -1)), A.unflatten(2, (k, -1)))
        delta = blocks.reshape(self.out_features, self.in_features)
        if self.hybrid_r[name]:
            delta += einsum("or,ri->oi", *(getattr(self, f"gralora_{part}_general")[name].weight for part in "BA"))
        return delta * self.scaling[name]

    def term(self, name: str, x: torch.Tensor) -> torch.Tensor:
        A, B, k = self.gralora_A[name], self.gralora_B[name], self.gralora_k[name]
        drop = self.gralora_dropout[name]
        hidden = einsum("...ni,nir->...nr", drop(x).unflatten(-1, (k, -1)), A) * self.scaling[name]
        hidden = hidden.unflatten(-1, (k, -1)).transpose(-3, -2).flatten(-2)  # (..., j, n * s)
        term = einsum("...jr,jro->...jo", hidden, B).flatten(-2)
        if self.hybrid_r[name]:
            term = term + self.gralora_B_general[name](self.gralora_A_general[name](drop(x))) * self.scaling[name]
        return term


GraloraLayer = Linear


class GraloraModel(RoomModel):
    """Injects GraLoRA."""

    rooms = {nn.Linear: Linear, "Conv1D": Linear}


register("gralora", GraloraConfig, GraloraModel)
