"""HiRA: the delta is the elementwise product of the base weight and a low-rank matrix (https://openreview.net/pdf?id=TwJrTz9cRS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from .room import AddRoom, RoomConfig, RoomModel, into, kaiming, linear, option, positive, product, register, shared


@dataclass
class HiraConfig(RoomConfig):
    """Options of HiRA."""

    r: int = option(32, "Rank of the matrix that the base weight is multiplied by.")
    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    hira_dropout: float = option(0.0, "Dropout probability of the adapter's input, but for embeddings.")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    modules_to_save: list[str] | None = shared("modules_to_save")
    init_weights: bool | Literal["gaussian"] | None = option(
        True, "Start of A, beside B = 0: True: kaiming uniform, 'gaussian': normal; False: both random.", repr=False
    )
    layers_to_transform: list[int] | int | None = shared("layers_to_transform")
    layers_pattern: list[str] | str | None = shared("layers_pattern", alone=True)
    rank_pattern: dict | None = shared("rank_pattern")


class HiraLayer(AddRoom):
    """W * (B A) with A (r, in, *kernel), B (out, r, *1)."""

    converts_to_lora = False
    returns_input_dtype = False
    adapter_layer_names = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")
    other_param_names = ("r", "hira_dropout")
    title, dropout, own = "HiRA", "hira_dropout", ("hira_A", "hira_B")

    def create(self, name: str, config: HiraConfig, r: int) -> None:
        self.refuse_groups()
        self.r[name] = positive("r", r)
        self.add_dropout(name, config.hira_dropout)
        for container, factor in zip(self.own, self.initial(r, config.init_weights), strict=True):
            getattr(self, container)[name] = nn.Parameter(factor)

    def initial(self, r: int, scheme: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of a new adapter."""
        kernel = getattr(self.get_base_layer(), "kernel_size", ())
        A, B = torch.randn(r, self.in_features, *kernel), torch.randn(self.out_features, r, *(1 for _ in kernel))
        if scheme and (scheme is True or kernel):
            kaiming(A)
        elif scheme and scheme.lower() == "gaussian":
            nn.init.normal_(A, std=1 / r)
        elif scheme:
            raise ValueError(f"Unknown initialization init_weights={scheme!r}")
        return A, nn.init.zeros_(B) if scheme else B

    def factors(self, name: str) -> list[torch.Tensor]:
        """A (r, in...) and B (out, r) of an adapter."""
        return [getattr(self, container)[name].flatten(1) for container in self.own]

    def dense(self, name: str, x: torch.Tensor) -> bool:
        return True

    def delta(self, name: str) -> torch.Tensor:
        A, B = self.factors(name)
        return into(torch.mul, product(B, A), self.bare_weight())


class Linear(HiraLayer):
    """HiRA for nn.Linear and Conv1D."""


class Conv1d(HiraLayer):
    """HiRA for nn.Conv1d."""


class Conv2d(HiraLayer):
    """HiRA for nn.Conv2d."""


class Conv3d(HiraLayer):
    """HiRA for nn.Conv3d."""


class Embedding(HiraLayer):
    """HiRA for nn.Embedding: W * (B A)^T with A (r, vocabulary), B (dim, r)."""

    own = ("hira_embedding_A", "hira_embedding_B")

    def initial(self, r: int, scheme: Any) -> tuple[torch.Tensor, torch.Tensor]:
        A, B = torch.randn(r, self.in_features), torch.randn(self.out_features, r)
        return (A, B) if scheme is False else (nn.init.zeros_(A), nn.init.normal_(B))

    def dense(self, name: str, x: torch.Tensor) -> bool:
        return False

    def delta(self, name: str) -> torch.Tensor:
        A, B = self.factors(name)
        return into(torch.mul, product(A.T, B.T), self.bare_weight())

    def term_beside(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        A, B = self.factors(name)
        return output * linear(F.embedding(x, A.T, padding_idx=self.get_base_layer().padding_idx), B)


class HiraModel(RoomModel):
    """Injects HiRA."""

    rooms = {nn.Linear: Linear, "Conv1D": Linear, nn.Embedding: Embedding}
    rooms |= {nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}
    unsupported = ValueError
    by_pattern = {"r": "rank_pattern"}
    corrects_config = False


register("hira", HiraConfig, HiraModel, parts=("bnb",))
