"""BEFT: a vector is trained that is added to the bias (https://arxiv.org/abs/2509.15974)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from .room import AddRoom, RoomConfig, RoomModel, option, register, shared


@dataclass
class BeftConfig(RoomConfig):
    """Options of BEFT."""

    target_modules: list[str] | str | None = shared("target_modules")
    modules_to_save: list[str] | None = shared("modules_to_save")
    init_weights: bool = option(True, "True: start with zeros (no change); False: standard normal, for tests.")


class Linear(AddRoom):
    """b + `beft_bias` (1, out) for nn.Linear."""

    converts_to_lora = False
    returns_input_dtype = False
    named_in_repr = False
    adapter_layer_names = ("beft_bias",)
    adds = ("bias",)

    def create(self, name: str, config: BeftConfig) -> None:
        if self.get_base_layer().bias is None:
            warnings.warn(
                "Detected that the base layer has no bias term. Note you cannot merge the BEFT adapter into the base "
                "layer."
            )
        vector = torch.randn(1, self.out_features)
        self.beft_bias[name] = nn.Parameter(torch.zeros_like(vector) if config.init_weights else vector)

    def dense(self, name: str, x: torch.Tensor) -> bool:
        return not torch.is_grad_enabled() and self.get_base_layer().bias is not None

    def adapter_dtype(self, name: str) -> None:
        return None

    def bias_delta(self, name: str) -> torch.Tensor:
        return self.entry("beft_bias", name).flatten()

    def term(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.bias_delta(name)


BeftLayer = Linear


class BeftModel(RoomModel):
    """Injects BEFT."""

    rooms = {nn.Linear: Linear}


register("beft", BeftConfig, BeftModel, mixed=True)
