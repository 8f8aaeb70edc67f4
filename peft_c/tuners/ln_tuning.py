"""LayerNorm tuning: a layer, usually a normalisation, is trained in a copy (https://arxiv.org/abs/2312.11420)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from .room import RoomConfig, RoomModel, SwapRoom, register, shared


@dataclass
class LNTuningConfig(RoomConfig):
    """Options of LayerNorm tuning."""

    as_sets = ()

    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    modules_to_save: list[str] | None = shared("modules_to_save")


class LNTuningLayer(SwapRoom):
    """Any layer: a trained copy stands in for it."""

    adapter_layer_names = ("ln_tuning_layers",)
    containers = {"ln_tuning_layers": nn.ModuleDict}

    def prepare(self, base: nn.Module, config: LNTuningConfig) -> None:
        self.in_features, self.out_features = (getattr(base, f"{side}_features", None) for side in ("in", "out"))

    def create(self, name: str, config: LNTuningConfig, layer: nn.Module | None = None) -> None:
        self.ln_tuning_layers[name] = copy.deepcopy(self.base_layer if layer is None else layer)


class LNTuningModel(RoomModel):
    """Injects LayerNorm tuning."""

    rooms = {nn.Module: LNTuningLayer}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: the copies keep the dtype of their layers."""


register("ln_tuning", LNTuningConfig, LNTuningModel)
