"""LayerNorm tuning: a layer, usually a normalisation, is trained in a copy (https://arxiv.org/abs/2312.11420)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import law
from .base_view import BaseView
from .room import Room, RoomConfig, RoomModel, register, shared


@dataclass
class LNTuningConfig(RoomConfig):
    """Options of LayerNorm tuning."""

    as_sets = ()

    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    modules_to_save: list[str] | None = shared("modules_to_save")


def views_of(layer: nn.Module) -> dict[str, BaseView]:
    """The parameters and buffers of a module and of those inside, by name."""
    modules = layer.named_modules() if layer._modules else [("", layer)]
    return {
        f"{path}.{name}" if path else name: BaseView(module, name)
        for path, module in modules
        for name, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None
    }


class LNTuningLayer(Room):
    """Any layer: its parameters and buffers are replaced by those of a trained copy."""

    adapter_layer_names = ("ln_tuning_layers",)
    containers = {"ln_tuning_layers": nn.ModuleDict}
    exclusive = True
    returns_input_dtype = False

    def prepare(self, base: nn.Module, config: LNTuningConfig) -> None:
        self.in_features, self.out_features = (getattr(base, f"{side}_features", None) for side in ("in", "out"))

    def create(self, name: str, config: LNTuningConfig) -> None:
        self.ln_tuning_layers[name] = copy.deepcopy(self.base_layer)

    def adapt(self, names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.entry("ln_tuning_layers", names[0])(x, *args, **kwargs)

    def _merge_targets(self) -> dict[str, BaseView]:
        return views_of(self.get_base_layer())

    def _merge_changes(self, name: str) -> dict[str, law.Change]:
        own = views_of(self.entry("ln_tuning_layers", name))

        def values(targets: dict[str, BaseView]) -> dict[str, torch.Tensor]:
            return {label: own[label].tensor for label in targets}

        return dict.fromkeys(own, law.Replace(values))


class LNTuningModel(RoomModel):
    """Injects LayerNorm tuning."""

    rooms = {nn.Module: LNTuningLayer}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: the copies keep the dtype of their layers."""


register("ln_tuning", LNTuningConfig, LNTuningModel)
