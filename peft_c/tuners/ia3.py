"""(IA)^3: the input or the output features of a layer are scaled (https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from ..utils.other import ModulesToSaveWrapper, _freeze_adapter
from .room import MapRoom, RoomConfig, RoomModel, option, register, shared
from .undo import is_sharded


@dataclass
class IA3Config(RoomConfig):
    """Options of (IA)^3."""

    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    feedforward_modules: list[str] | str | None = option(None, "Names or pattern of targets whose input is scaled.")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    modules_to_save: list[str] | None = shared("modules_to_save")
    init_ia3_weights: bool = option(True, "Whether new adapters start as no change (ones); False: standard normal.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, list):
            self.feedforward_modules = set(self.feedforward_modules)
        targets, feedforward = self.target_modules, self.feedforward_modules
        if isinstance(targets, set) and isinstance(feedforward, set) and not feedforward <= targets:
            raise ValueError("`feedforward_modules` should be a subset of `target_modules`")


class IA3Layer(MapRoom):
    """diag(l) W and diag(l) b with l (out, 1), or, in feedforward modules, W diag(l) with l (1, in).

    Convolutions have l (1, channels, 1, ...).
    """

    named_in_repr = False
    adapter_layer_names = ("ia3_l",)
    is_feedforward = False

    def create(self, name: str, config: IA3Config, is_feedforward: bool = False) -> None:
        base = self.get_base_layer()
        if not self.ia3_l:
            self.is_feedforward = is_feedforward
        if isinstance(base, (nn.Conv2d, nn.Conv3d)):
            channels = self.in_features if self.is_feedforward else self.out_features
            shape = (1, channels) + (1,) * len(base.kernel_size)
        else:
            shape = (1, self.in_features) if self.is_feedforward else (self.out_features, 1)
        scale = torch.randn(shape)
        self.ia3_l[name] = nn.Parameter(torch.ones_like(scale) if config.init_ia3_weights else scale)

    def scaled(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Features times l."""
        scale = self.ia3_l[name]
        return x * (scale.flatten() if scale.ndim == 2 else scale)

    @property
    def before(self) -> Callable | None:
        """Scaling of the input, in feedforward modules."""
        return self.scaled if self.is_feedforward else None

    @property
    def after(self) -> Callable | None:
        """Scaling of the output, in others."""
        return None if self.is_feedforward else self.scaled

    def scale_vector(self, name: str) -> tuple[torch.Tensor, int] | None:
        scale = self.entry("ia3_l", name)
        grouped = self.is_feedforward and getattr(self.get_base_layer(), "groups", 1) > 1
        return None if grouped or is_sharded(scale) else (scale.flatten(), int(self.is_feedforward))

    def transform(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        scale = self.ia3_l[name]
        if self.is_feedforward and scale.ndim > 2:
            groups = self.get_base_layer().groups
            scale = scale.view(groups, 1, -1, 1)  # (group, out / groups, in / groups, kernel)
            split = weight.reshape(groups, len(weight) // groups, scale.shape[2], -1)
            return (split * scale).reshape(weight.shape), bias
        scale = scale if scale.ndim == 2 else scale.view(-1, 1)  # a DTensor cannot be flattened
        return weight * scale, bias if bias is None or self.is_feedforward else bias * scale.squeeze(1)


class Linear(IA3Layer):
    """(IA)^3 for nn.Linear and Conv1D."""

    returns_input_dtype = False


Linear8bitLt = Linear4bit = Linear


class Conv2d(IA3Layer):
    """(IA)^3 for nn.Conv2d."""


class Conv3d(IA3Layer):
    """(IA)^3 for nn.Conv3d."""


class IA3Model(RoomModel):
    """Injects (IA)^3."""

    rooms = {nn.Conv2d: Conv2d, nn.Conv3d: Conv3d, nn.Linear: Linear, "Conv1D": Linear}
    unsupported = ValueError

    def _prepare_adapter_config(self, peft_config: IA3Config, model_config: dict) -> IA3Config:
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if peft_config.feedforward_modules is None:
            known = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model_config["model_type"])
            if known is None:
                raise ValueError("Please specify `feedforward_modules` in `peft_config`")
            peft_config.feedforward_modules = set(known)
        return peft_config

    def settings(self, config: IA3Config, key: str, base: nn.Module) -> dict[str, Any]:
        return {"is_feedforward": self._check_target_module_feedforward(config, key)}

    @staticmethod
    def _check_target_module_feedforward(config: IA3Config, key: str) -> bool:
        """Whether the module called `key` is one of the config's feedforward modules."""
        modules = config.feedforward_modules
        return bool(re.fullmatch(modules, key)) if isinstance(modules, str) else key.endswith(tuple(modules))

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        for bits in (8, 4):
            if getattr(self.model, f"is_loaded_in_{bits}bit", False):
                raise ValueError(f"Cannot merge ia3 layers when the model is loaded in {bits}-bit mode")
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Adds an adapter whose vectors are the weighted sum of those of `adapters`; it is frozen.

        Nothing happens if there is an adapter of that name. ValueError if one of `adapters` does not exist, if several
        have weights for the same module in `modules_to_save`, or if their targets are of different kinds.
        """
        if adapter_name in self.peft_config:
            return
        missing = [name for name in adapters if name not in self.peft_config]
        if missing:
            raise ValueError(f"Adapter {missing[0]} does not exist")
        wrappers = (module for module in self.modules() if isinstance(module, ModulesToSaveWrapper))
        if any(sum(name in wrapper.modules_to_save for name in adapters) > 1 for wrapper in wrappers):
            raise ValueError("Cannot add weighted adapters targeting the same module with modules_to_save.")
        configs = [self.peft_config[name] for name in adapters]
        united = {field: _union(field, configs) for field in ("target_modules", "feedforward_modules")}
        self.peft_config[adapter_name] = replace(configs[0], **united)
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        _freeze_adapter(self.model, adapter_name)
        with torch.no_grad():
            for layer in self.model.modules():
                if isinstance(layer, IA3Layer) and adapter_name in layer.ia3_l:
                    parts = zip(adapters, weights, strict=False)
                    parts = [layer.ia3_l[name] * weight for name, weight in parts if name in layer.ia3_l]
                    layer.ia3_l[adapter_name].copy_(sum(parts))


def _union(field: str, configs: list[IA3Config]) -> set[str] | str:
    """The targets of all configs: of sets the union, of regular expressions one that matches either."""
    values = [getattr(config, field) for config in configs]
    if len({type(value) for value in values}) > 1:
        raise ValueError("All adapter configs should have the same type for target and feedforward modules.")
    return "|".join(f"({value})" for value in values) if isinstance(values[0], str) else set.union(*values)


register("ia3", IA3Config, IA3Model, mixed=True, parts=("bnb",))
