"""DEFT: a trained subspace of the outputs is removed and refilled (Decompositional Efficient Fine-Tuning, 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from .law import LowRank
from .room import AddRoom, RoomConfig, RoomModel, Unscaled, dropout, option, positive, product, register, shared


@dataclass
class DeftConfig(RoomConfig):
    """Options of DEFT."""

    r: int = option(8, "Dimension of the subspace; more than the layer's outputs counts as their number.")
    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    decomposition_method: Literal["relu", "qr"] = option(
        "relu",
        "Projector onto the subspace: 'relu': P relu(P)^T; 'qr': Q Q^T with P = Q R, which is orthogonal.",
        choices=("qr", "relu"),
    )
    init_scale: float = option(1.0, "With `init_weights=False`: the injected matrix has deviation 0.02 times this.")
    alpha: int | None = option(None, "The injected term is scaled by alpha / r; None: by 1.")
    para: bool = option(False, "Whether to remove only and inject nothing (PaRa); such adapters start as a change.")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    deft_dropout: float = option(0.0, "Dropout probability of the input of the injected term.")
    init_weights: bool = shared("init_weights")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform")
    layers_pattern: list[str] | str | None = shared("layers_pattern")
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")


class DeftLinear(Unscaled, AddRoom):
    """W + L (s R - M^T W) for nn.Linear and Conv1D: P (out, r), R (r, in).

    L = P and M = relu(P), or L = M = Q, the orthogonal factor of P.
    R starts as M^T W / s, so that nothing changes; in PaRa mode there is no R.
    """

    converts_to_lora = False
    title = "DEFT"
    adapter_layer_names = ("deft_P", "deft_R")
    other_param_names = (
        "deft_r",
        "deft_decomposition",
        "deft_init_scale",
        "deft_para",
        "deft_scaling",
        "deft_dropout",
    )
    containers = dict.fromkeys(adapter_layer_names, nn.ParameterDict) | {"deft_dropout": nn.ModuleDict}

    def create(self, name: str, config: DeftConfig) -> None:
        r = min(positive("r", config.r), self.out_features)
        self.deft_r[name], self.deft_para[name] = r, config.para
        self.deft_decomposition[name], self.deft_init_scale[name] = config.decomposition_method, config.init_scale
        self.deft_scaling[name] = config.alpha / r if config.alpha else 1.0
        self.deft_dropout[name] = dropout(config.deft_dropout)
        P = torch.empty(self.out_features, r).normal_(0.0, 0.02)
        self.deft_P[name] = nn.Parameter(P)
        if config.para:
            return
        R, weight = torch.zeros(r, self.in_features), self.bare_weight()
        if not config.init_weights:
            nn.init.normal_(R, 0.0, 0.02 * config.init_scale)
        elif not weight.is_meta:
            R = self.project(name, P.to(weight.device))[1].T @ weight.float() / self.deft_scaling[name]
        self.deft_R[name] = nn.Parameter(R)

    def project(self, name: str, P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """L and M (out, r), in fp32."""
        P = P.float()
        if self.deft_decomposition[name] == "relu":
            return P, P.relu()
        Q = torch.linalg.qr(P)[0]
        return Q, Q

    @property
    def _cached_merge_factor(self) -> dict[str, torch.Tensor]:
        """M^T W (r, in) of the merged adapters."""
        weight = self.bare_weight().float()
        return {name: self.project(name, self.deft_P[name])[1].T @ weight for name in self.merged_adapters}

    def injected(self, name: str) -> torch.Tensor | float:
        """s R."""
        return 0.0 if self.deft_para[name] else self.deft_R[name].float() * self.deft_scaling[name]

    def low_rank(self, name: str) -> LowRank:
        L, M = self.project(name, self.deft_P[name])
        return LowRank(self.injected(name) - product(M.T.contiguous(), self.bare_weight().float()), L, 1.0)

    def term_beside(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        L, M = self.project(name, self.deft_P[name])
        bias = self.get_base_layer().bias
        term = -((output.float() if bias is None else output.float() - bias.float()) @ M)
        if not self.deft_para[name]:
            term = term + F.linear(self.deft_dropout[name](x.float()), self.injected(name))
        return F.linear(term, L)


DeftLayer = DeftLinear


class DeftModel(RoomModel):
    """Injects DEFT."""

    rooms = {nn.Linear: DeftLinear, "Conv1D": DeftLinear}


register("deft", DeftConfig, DeftModel)
