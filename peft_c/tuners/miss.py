"""MiSS, matrix shard sharing: the delta repeats one small block along the input (https://arxiv.org/abs/2409.15371)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from .room import AddRoom, RoomConfig, RoomModel, Unscaled, kaiming, option, positive, register, shared
from .shared_room import wide


@dataclass
class MissConfig(RoomConfig):
    """Options of MiSS."""

    r: int = option(64, "Rank: the number of input features that a block covers.")
    miss_dropout: float = option(0.0, "Dropout probability of the adapter's input; not used by 'bat'.")
    mini_r: int = option(1, "With 'mini': number of output features that a block covers; has to divide them.")
    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    init_weights: bool | Literal["bat", "mini"] = option(
        True, "Form of the delta, starting at zero: True, 'bat' or 'mini'; False: that of True, starting at random."
    )
    layers_to_transform: list[int] | int | None = shared("layers_to_transform")
    layers_pattern: list[str] | str | None = shared("layers_pattern", alone=True)
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")


class MissLinear(Unscaled, AddRoom):
    """MiSS for nn.Linear: block D (r, out), which 'mini' stores as (r, mini_r) and repeats along the output.

    delta[o, i] = D[i mod r, o]. 'bat' has D (out / r, r, r) instead: with the base weight cut into r x r blocks W_oi,
    those of the delta are W_oi D_o + D_o. Several active 'bat' adapters all refer to the base weight.
    """

    adapter_layer_names = ("miss_block",)
    other_param_names = ("miss_r", "miss_dropout", "miss_mini_r", "miss_fn")
    title, dropout = "MiSS", "miss_dropout"

    def create(self, name: str, config: MissConfig) -> None:
        r, mini_r, form = positive("r", config.r), config.mini_r, config.init_weights
        if r > self.in_features:
            raise ValueError(f"`r` ({r}) must be less than or equal to in_features ({self.in_features})")
        if form == "bat" and (self.in_features % r or self.out_features % r):
            raise ValueError("The weight matrix must be fully divisible into [r, r] blocks.")
        if form == "mini" and self.out_features % mini_r:
            raise ValueError(f"mini_r ({mini_r}) has to divide out_features ({self.out_features}).")
        self.miss_r[name], self.miss_mini_r[name], self.miss_fn[name] = r, mini_r, form
        self.add_dropout(name, config.miss_dropout)
        shapes = {"bat": (self.out_features // r, r, r), "mini": (r, mini_r)}
        block = torch.zeros(shapes.get(form, (r, self.out_features)))
        if not form:
            kaiming(block)
        self.miss_block[name] = nn.Parameter(block)

    def dense(self, name: str, x: torch.Tensor) -> bool:
        return self.miss_fn[name] == "bat"

    def drops(self, name: str) -> bool:
        return self.miss_fn[name] != "bat" and super().drops(name)

    def block(self, name: str) -> torch.Tensor:
        """D (r, out)."""
        block = self.miss_block[name]
        return block.repeat(1, self.out_features // block.shape[1]) if self.miss_fn[name] == "mini" else block

    def delta(self, name: str) -> torch.Tensor:
        if self.miss_fn[name] != "bat":
            rows = self.block(name).T.contiguous()
            return rows.repeat(1, -(-self.in_features // rows.shape[1]))[:, : self.in_features]
        block, r = wide(self.miss_block[name]), self.miss_r[name]
        weight = self.bare_weight().to(block.dtype).view(-1, r, self.in_features // r, r)
        delta = torch.einsum("oaib,obc->oaic", weight, block) + block.unsqueeze(2)
        return delta.reshape(self.out_features, self.in_features).to(self.miss_block[name].dtype)

    def adapter_input(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x, short = super().adapter_input(name, x), -self.in_features % self.miss_r[name]
        return F.pad(x, (0, short)) if short else x  # before the dropout, whose mask is that of whole blocks

    def halves(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.miss_fn[name] == "bat":
            return None
        return x.unflatten(-1, (-1, self.miss_r[name])).sum(-2), self.block(name)


MissLayer = MissLinear


class MissModel(RoomModel):
    """Injects MiSS."""

    rooms = {nn.Linear: MissLinear}


register("miss", MissConfig, MissModel)
