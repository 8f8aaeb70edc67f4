"""BOFT: orthogonal fine-tuning with butterfly-factorised rotations (https://arxiv.org/abs/2311.06243)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .block_dropout import MultiplicativeDropoutLayer
from .room import MapRoom, RoomConfig, RoomModel, Unscaled, dropout, einsum, option, register, shared
from .tensor_functions import cayley


@dataclass
class BOFTConfig(RoomConfig):
    """Options of BOFT. ValueError unless exactly one of `boft_block_size` and `boft_block_num` is given."""

    boft_block_size: int = option(4, "Size of the rotated blocks; has to divide the input size of all layers.")
    boft_block_num: int = option(0, "Number of blocks in a layer, in place of their size.")
    boft_n_butterfly_factor: int = option(1, "Number of rotations, each of blocks twice as far apart; 1: as in OFT.")
    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    boft_dropout: float = option(0.0, "Probability of leaving a block unrotated in training.")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")
    init_weights: bool = shared("init_weights")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform", beside_regex=True)
    layers_pattern: list[str] | str | None = shared("layers_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            either = "`boft_block_size` or `boft_block_num`"
            how = (
                f"You can only specify either {either}"
                if self.boft_block_size != 0
                else f"Either {either} must be non-zero"
            )
            raise ValueError(
                f"{how}, but not both: their product is the input size. Currently, "
                f"boft_block_size = {self.boft_block_size} and boft_block_num = {self.boft_block_num}."
            )


class BOFTLayer(Unscaled, MapRoom):
    """diag(s) W R^T with R = B_n ... B_1, s (out): B_i = P_i D_i P_i^T, where D_i is block diagonal.

    `boft_R` (n, blocks, b, b) holds matrices X; the blocks of D_i are the Cayley transforms of (X - X^T) / 2. P_i
    brings the even halves of 2^i neighbouring blocks in front of the odd ones. For convolutions `in`, the size of R,
    counts the kernel's elements, too.
    """

    title = "BOFT"
    adapter_layer_names = ("boft_R", "boft_s")
    other_param_names = ("boft_block_size", "boft_block_num", "boft_dropout")
    containers = {"boft_dropout": nn.ModuleDict}

    def create(self, name: str, config: BOFTConfig) -> None:
        base, factors = self.get_base_layer(), config.boft_n_butterfly_factor
        self.refuse_groups()
        if factors < 1:
            raise ValueError(
                f"You can only specify boft_n_butterfly_factor {factors} to be a positive integer number."
            )
        size = base.weight[0].numel() if isinstance(base, nn.Conv2d) else self.in_features
        given = "boft_block_num" if config.boft_block_num != 0 else "boft_block_size"
        value = getattr(config, given)
        if size % value:
            raise ValueError(f"in_features ({size}) must be divisible by {given} ({value})!")
        blocks, block_size = (value, size // value) if given == "boft_block_num" else (size // value, value)
        if factors > 1 and (block_size % 2 or blocks % 2 ** (factors - 1)):
            warnings.warn(
                f"{blocks} blocks of size {block_size} cannot be mixed by {factors} butterfly factors: the size must "
                f"be even and the number a multiple of {2 ** (factors - 1)}. Using boft_n_butterfly_factor=1 here."
            )
            factors = 1
        R = torch.zeros(factors, blocks, block_size, block_size)
        s = torch.ones((1, self.out_features) if isinstance(base, nn.Conv2d) else (self.out_features, 1))
        if config.init_weights is False:
            nn.init.normal_(R, mean=0.0, std=0.1)
            nn.init.normal_(s, mean=1.0, std=0.1)
        elif config.init_weights is not True:
            raise ValueError(f"Unknown initialization init_weights={config.init_weights!r}: give True or False.")
        self.boft_R[name], self.boft_s[name] = nn.Parameter(R), nn.Parameter(s)
        self.boft_block_size[name], self.boft_block_num[name] = block_size, blocks
        self.boft_dropout[name] = dropout(config.boft_dropout, MultiplicativeDropoutLayer)

    def rotations(self, name: str, drop: bool = False) -> torch.Tensor:
        """The blocks of all D_i (n, blocks, b, b); with dropout some of one D_i are left out in training."""
        blocks = cayley(self.boft_R[name])
        return self.boft_dropout[name](blocks) if drop else blocks

    @staticmethod
    def rotate(x: torch.Tensor, blocks: torch.Tensor, transposed: bool) -> torch.Tensor:
        """x R, or x R^T, for x (..., in)."""
        factors, number, size = blocks.shape[:3]
        for i in range(factors) if transposed else reversed(range(factors)):
            block = blocks[i].mT if transposed else blocks[i]
            if i:
                x = x.unflatten(-1, (-1, 2, 2**i, size // 2)).transpose(-2, -3).flatten(-4)
            x = einsum("...ij,ijk->...ik", x.unflatten(-1, (number, size)), block).flatten(-2)
            if i:
                x = x.unflatten(-1, (-1, 2**i, 2, size // 2)).transpose(-2, -3).flatten(-4)
        return x

    def transform(self, name: str, weight: torch.Tensor, bias: Any, drop: bool = False) -> tuple[torch.Tensor, Any]:
        blocks = self.rotations(name, drop)
        weight = self.rotate(self._cast_input_dtype(weight, blocks.dtype), blocks, transposed=True)
        return weight * self.boft_s[name].view(-1, 1), bias

    def get_delta_weight(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """R, a matrix (in, in), and s as a column."""
        blocks = self.rotations(adapter)
        eye = torch.eye(blocks.shape[1:3].numel(), device=blocks.device, dtype=blocks.dtype)
        return self.rotate(eye, blocks, transposed=False), self.boft_s[adapter].view(-1, 1)


class Linear(BOFTLayer):
    """BOFT for nn.Linear: x R goes into the base layer, what comes out is scaled."""

    def before(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.rotate(x, self.rotations(name, drop=True).to(x.dtype), transposed=False)

    def after(self, name: str, y: torch.Tensor) -> torch.Tensor:
        scale, bias = self.boft_s[name].view(-1), self.get_base_layer().bias
        return y * scale if bias is None else (y - bias) * scale + bias


class Conv2d(BOFTLayer):
    """BOFT for nn.Conv2d: the kernel is rotated and scaled."""

    def transform_in_forward(self, name: str, weight: torch.Tensor, bias: Any) -> tuple[torch.Tensor, Any]:
        return self.transform(name, weight, bias, drop=True)


class BOFTModel(RoomModel):
    """Injects BOFT."""

    rooms = {nn.Linear: Linear, nn.Conv2d: Conv2d}


register("boft", BOFTConfig, BOFTModel, parts=("fbd",))
