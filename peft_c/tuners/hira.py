"""HiRA: the delta is the elementwise product of the base weight and a low-rank matrix (https://openreview.net/pdf?id=TwJrTz9cRS)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from .room import AddRoom, RoomModel, SelectiveConfig, dropout, option, pattern_value, register, shared
from .shared_room import wide


@dataclass
class HiraConfig(SelectiveConfig):
    """Options of HiRA."""

    r: int = option(32, "Rank of the matrix that the base weight is multiplied by.")
    hira_dropout: float = option(0.0, "Dropout probability of the adapter's input, but for embeddings.")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    init_weights: bool | Literal["gaussian"] | None = option(
        True,
        "Initialisation of A: True: kaiming uniform, 'gaussian': normal with deviation 1 / r (linear layers); B "
        "starts at zero. False: both start at random, for tests.",
    )
    rank_pattern: dict | None = shared("rank_pattern")


class HiraLayer(AddRoom):
    """HiRA for linear layers, Conv1D and convolutions: W * (B A), A (r, in, *kernel), B (out, r, *1)."""

    converts_to_lora = False
    adapter_layer_names = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")
    other_param_names = ("r", "hira_dropout")
    containers = {"hira_dropout": nn.ModuleDict}

    def create(self, name: str, config: HiraConfig, r: int) -> None:
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        base, scheme = self.get_base_layer(), config.init_weights
        if getattr(base, "groups", 1) > 1:
            raise NotImplementedError(
                f"HiRA does not support {type(base).__name__} layers with groups > 1 (got groups={base.groups})."
            )
        self.r[name] = r
        self.hira_dropout[name] = dropout(config.hira_dropout)
        self.new_factors(name, r, scheme)

    def new_factors(self, name: str, r: int, scheme: Any) -> None:
        """Make A and B."""
        kernel = getattr(self.get_base_layer(), "kernel_size", ())
        A = torch.randn(r, self.in_features, *kernel)
        B = torch.randn(self.out_features, r, *(1 for _ in kernel))
        if scheme:
            nn.init.zeros_(B)
            if scheme is True or kernel:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            elif scheme.lower() == "gaussian":
                nn.init.normal_(A, std=1 / r)
            else:
                raise ValueError(f"Unknown initialization init_weights={scheme!r}")
        self.hira_A[name], self.hira_B[name] = nn.Parameter(A), nn.Parameter(B)

    def product(self, name: str) -> torch.Tensor:
        """B A as a matrix (out, in...)."""
        A, B = self.hira_A[name], self.hira_B[name]
        return (wide(B).flatten(1) @ wide(A).flatten(1)).to(A.dtype)

    def dense(self, name: str) -> bool:
        return not self.training or isinstance(self.hira_dropout[name], nn.Identity)

    def delta(self, name: str) -> torch.Tensor:
        return self.bare_weight() * self.product(name)

    def term(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return super().term(name, self.hira_dropout[name](x))


class Linear(HiraLayer):
    """HiRA for nn.Linear and Conv1D."""


class Conv1d(HiraLayer):
    """HiRA for nn.Conv1d."""


class Conv2d(HiraLayer):
    """HiRA for nn.Conv2d."""


class Conv3d(HiraLayer):
    """HiRA for nn.Conv3d."""


class Embedding(HiraLayer):
    """HiRA for nn.Embedding: A (r, vocabulary), B (dim, r); W * (B A)^T."""

    def new_factors(self, name: str, r: int, scheme: Any) -> None:
        A, B = torch.randn(r, self.in_features), torch.randn(self.out_features, r)
        if scheme is not False:
            nn.init.zeros_(A)
            nn.init.normal_(B)
        self.hira_embedding_A[name], self.hira_embedding_B[name] = nn.Parameter(A), nn.Parameter(B)

    def product(self, name: str) -> torch.Tensor:
        A, B = self.hira_embedding_A[name], self.hira_embedding_B[name]
        return (wide(A).T @ wide(B).T).to(A.dtype)

    def dense(self, name: str) -> bool:
        return False

    def term_beside(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(x, self.hira_embedding_A[name].T, padding_idx=self.get_base_layer().padding_idx)
        return output * F.linear(rows, self.hira_embedding_B[name])


class HiraModel(RoomModel):
    """Injects HiRA."""

    rooms = {
        nn.Linear: Linear,
        "Conv1D": Linear,
        nn.Embedding: Embedding,
        nn.Conv1d: Conv1d,
        nn.Conv2d: Conv2d,
        nn.Conv3d: Conv3d,
    }
    unsupported = ValueError

    def settings(self, config: HiraConfig, key: str, base: nn.Module) -> dict[str, Any]:
        return {"r": pattern_value(config.rank_pattern, key, config.r)}


register("hira", HiraConfig, HiraModel)
