"""DeLoRA: a low-rank delta of normalised factors, whose size a trained bound limits (https://arxiv.org/abs/2503.18225)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from ._buffer_dict import BufferDict
from .law import LowRank
from .room import AddRoom, RoomConfig, RoomModel, kaiming, option, positive, register, shared


@dataclass
class DeloraConfig(RoomConfig):
    """Options of DeLoRA."""

    r: int = option(8, "Rank of the delta.", positive=True)
    delora_lambda: int = option(15, "Start value of the bound of the delta's Frobenius norm.")
    module_dropout: float = option(0.0, "Dropout probability of the adapter's input.")
    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    bias: Literal["none", "all", "delora_only"] = shared("bias")
    init_weights: bool = shared("init_weights")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform")
    layers_pattern: list[str] | str | None = shared("layers_pattern")
    rank_pattern: dict | None = shared("rank_pattern")
    lambda_pattern: dict | None = option({}, "Module name or regular expression -> lambda, where it differs.")
    modules_to_save: list[str] | None = shared("modules_to_save")


class DeloraLinear(AddRoom):
    """DeLoRA for nn.Linear: B diag(lambda / r / (|A_i| |B_i|)) A diag(w), A (r, in), B (out, r), lambda (1,).

    w (in,) are the norms of the base weight's columns when the adapter was made; norms of A and B are at least 1e-4.
    """

    factored = math.inf
    adapter_layer_names = ("delora_A", "delora_B", "delora_lambda")
    other_param_names = ("r", "delora_dropout", "delora_w_norm")
    containers = dict.fromkeys(adapter_layer_names, nn.ParameterDict)
    containers |= {"delora_w_norm": partial(BufferDict, persistent=True)}
    dropout = "delora_dropout"

    def create(self, name: str, config: DeloraConfig, r: int, delora_lambda: float) -> None:
        self.r[name] = positive("r", r)
        self.add_dropout(name, config.module_dropout)
        A, B = torch.empty(r, self.in_features), torch.zeros(self.out_features, r)
        for factor in (A,) if config.init_weights is True else (A, B):
            kaiming(factor)
        self.delora_A[name], self.delora_B[name] = nn.Parameter(A), nn.Parameter(B)
        self.delora_lambda[name] = nn.Parameter(torch.full((1,), float(delora_lambda)))
        weight = self.get_base_layer().weight.detach()
        self.delora_w_norm[name] = torch.ones_like(weight[0]) if weight.is_meta else weight.norm(dim=0)

    def low_rank(self, name: str) -> LowRank:
        A, B = self.delora_A[name], self.delora_B[name]
        norms = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)
        return LowRank(A * self.delora_w_norm[name], B * (self.delora_lambda[name] / self.r[name] / norms), 1.0)


DeloraLayer = DeloraLinear


class DeloraModel(RoomModel):
    """Injects DeLoRA."""

    rooms = {nn.Linear: DeloraLinear}
    by_pattern = {"r": "rank_pattern", "delora_lambda": "lambda_pattern"}


register("delora", DeloraConfig, DeloraModel)
