"""C3A, circular convolution adaptation: the delta is a block circulant matrix (https://arxiv.org/abs/2407.19342)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .room import AddRoom, RoomConfig, RoomModel, option, positive, register, rows_of, shared
from .tensor_functions import convolve


@dataclass
class C3AConfig(RoomConfig):
    """Options of C3A."""

    block_size: int = option(256, "Size of the circulant blocks; has to divide the sizes of all adapted layers.")
    target_modules: list[str] | str | None = shared("target_modules")
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform")
    layers_pattern: list[str] | str | None = shared("layers_pattern", alone=True)
    block_size_pattern: dict | None = option({}, "Name or pattern -> block size, where it differs.", after_dot=True)
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] | None = option(
        "xavier_uniform", "Initialisation of the kernel; True: zeros (no change), False: 'xavier_uniform'."
    )


def get_circulant_fast(w: torch.Tensor) -> torch.Tensor:
    """The block circulant matrix (m * b, n * b) of a kernel (m, n, b)."""
    size = w.shape[-1]  # row t of a block is the kernel moved on by t
    rows = torch.cat([w, w], dim=-1).unfold(-1, size, 1)[:, :, 1:].flip(2)
    return rows.transpose(1, 2).reshape(len(w) * size, -1)


class C3ALinear(AddRoom):
    """C3A for nn.Linear: kernel (out / b, in / b, b); W + circulant(kernel) / in."""

    adapter_layer_names = ("c3a_kernel",)
    other_param_names = ("block_size",)

    def create(self, name: str, config: C3AConfig, block_size: int) -> None:
        self.block_size[name] = positive("block_size", block_size)
        for side, size in (("input", self.in_features), ("output", self.out_features)):
            if size % block_size:
                raise ValueError(
                    f"The block size should be a factor of the {side} size. However, the {side} size is {size} and "
                    f"the block size is {block_size}"
                )
        blocks = (self.out_features // block_size, self.in_features // block_size)
        kernel = torch.zeros(*blocks, block_size, device=self.get_base_layer().weight.device)
        self.c3a_kernel[name] = nn.Parameter(kernel)
        bounds = {
            "xavier_uniform": math.sqrt(6 / (self.in_features + self.out_features)),
            "kaiming_uniform": math.sqrt(1 / self.in_features),
        }
        scheme, bounds[False] = config.init_weights, bounds["xavier_uniform"]
        if scheme == "gaussian":
            nn.init.normal_(kernel)
        elif scheme in bounds:
            nn.init.uniform_(kernel, -bounds[scheme], bounds[scheme])
        elif scheme is not True:
            raise ValueError(f"Unknown init_weights: {scheme}")

    def delta(self, name: str) -> torch.Tensor:
        kernel = (self.c3a_kernel[name].float() / self.in_features).to(self.get_base_layer().weight.dtype)
        return get_circulant_fast(kernel)

    def dense(self, name: str, x: torch.Tensor) -> bool:
        return rows_of(x) > 32 and not torch.is_grad_enabled()

    def term(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return convolve(x.float(), self.c3a_kernel[name].float()) / self.in_features


C3ALayer = C3ALinear


class C3AModel(RoomModel):
    """Injects C3A."""

    rooms = {nn.Linear: C3ALinear}
    by_pattern = {"block_size": "block_size_pattern"}


register("c3a", C3AConfig, C3AModel, parts=("utils",))
