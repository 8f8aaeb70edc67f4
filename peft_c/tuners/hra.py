"""HRA, Householder reflection adaptation: the weight is multiplied by r reflections (https://arxiv.org/abs/2405.17484)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .room import MapRoom, RoomConfig, RoomModel, Unscaled, kaiming, multiply, option, positive, register, shared


@dataclass
class HRAConfig(RoomConfig):
    """Options of HRA."""

    r: int = option(8, "Number of reflections; an even number, or new adapters do change the layer.")
    apply_GS: bool = option(False, "Whether to orthogonalise the reflections' vectors (Gram-Schmidt).")
    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    init_weights: bool = shared("init_weights")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform")
    layers_pattern: list[str] | str | None = shared("layers_pattern")
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")


def reflect(x: torch.Tensor, u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x (I - U T U^T)."""
    return x - (x @ u) @ t @ u.T


class HRALayer(Unscaled, MapRoom):
    """W R with R = H_1 ... H_r = I - U T U^T, where H_i = I - 2 u_i u_i^T and u_i is the normalised column i of
    `hra_u` (in, r). For convolutions `in` counts the kernel's elements, too."""

    title = "HRA"
    takes_any_dtype = True
    adapter_layer_names, other_param_names = ("hra_u",), ("hra_r", "hra_apply_GS")

    def create(self, name: str, config: HRAConfig) -> None:
        self.refuse_groups()
        r, size = positive("r", config.r), self.get_base_layer().weight[0].numel()
        self.hra_r[name], self.hra_apply_GS[name] = r, config.apply_GS
        pairs = config.init_weights and r % 2 == 0  # equal neighbours: their reflections cancel
        if config.init_weights and not pairs:
            warnings.warn("The symmetric initialization can NOT be performed when r is odd!")
        u = kaiming(torch.empty(size, r // 2 if pairs else r))
        self.hra_u[name] = nn.Parameter(u.repeat_interleave(2, dim=1) if pairs else u)

    def reflections(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """U (in, r) and T (r, r)."""
        dtype = self.hra_u[name].dtype
        u = self.hra_u[name].to(torch.promote_types(dtype, torch.float32))
        eye = torch.eye(u.shape[1], device=u.device, dtype=u.dtype)
        if self.hra_apply_GS[name]:
            return torch.linalg.qr(u)[0].to(dtype), (2 * eye[: len(u), : len(u)]).to(dtype)
        u = u / u.norm(dim=0)
        t = torch.linalg.solve_triangular((u.T @ u).triu(1) + eye / 2, eye, upper=True)
        return u.to(dtype), t.to(dtype)

    def get_delta_weight(self, adapter_name: str, reverse: bool = False) -> torch.Tensor:
        """R (in, in), or its inverse."""
        u, t = self.reflections(adapter_name)
        r = torch.eye(len(u), device=u.device, dtype=u.dtype) - u @ t @ u.T
        return r.T if reverse else r

    def transform(self, name: str, weight: torch.Tensor, bias: Any) -> tuple[torch.Tensor, Any]:
        u, t = self.reflections(name)
        return multiply(reflect, self._cast_input_dtype(weight, u.dtype), u, t), bias


class HRALinear(HRALayer):
    """HRA for nn.Linear: x R^T goes into the base layer."""

    def before(self, name: str, x: torch.Tensor) -> torch.Tensor:
        u, t = self.reflections(name)
        return multiply(reflect, self._cast_input_dtype(x, u.dtype), u, t.T)


class HRAConv2d(HRALayer):
    """HRA for nn.Conv2d."""


class HRAModel(RoomModel):
    """Injects HRA."""

    rooms = {nn.Linear: HRALinear, nn.Conv2d: HRAConv2d}


register("hra", HRAConfig, HRAModel)
