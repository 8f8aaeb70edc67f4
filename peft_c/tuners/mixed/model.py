"""MixedModel: a tuner that hands each adapter to the tuner of its method, so that several methods share one model."""

from __future__ import annotations

from typing import Any, Union

from torch import nn

from ... import _C
from ...config import PeftConfig
from ...mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from ...reexports import elsewhere
from ...utils.aux_wrappers import AuxiliaryTrainingWrapper
from ...utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from ...utils.peft_types import PeftType
from ..merging import Unloading
from ..switching import _check_adapters_not_merged, _delete_auxiliary_adapter, set_adapter
from ..tuner_layer import move_parts
from ..tuners_utils import BaseTuner, BaseTunerLayer, _freeze_base, _hand_over, any_weight

# methods whose layers may wrap each other
COMPATIBLE_TUNER_TYPES = (PeftType.LORA, PeftType.LOHA, PeftType.LOKR, PeftType.ADALORA, PeftType.OFT, PeftType.SHIRA)


def _collected(name: str) -> Any:
    """PEFT's collections of what these methods have, made when they are asked for: that imports all of them."""
    if name == "Configs":
        return Union[tuple(PEFT_TYPE_TO_CONFIG_MAPPING[kind] for kind in COMPATIBLE_TUNER_TYPES)]  # noqa: UP007
    if name not in ("Layers", "PREFIXES"):
        raise AttributeError(name)
    tuners = [PEFT_TYPE_TO_TUNER_MAPPING[kind] for kind in COMPATIBLE_TUNER_TYPES]
    return tuple(t.tuner_layer_cls for t in tuners) if name == "Layers" else sorted({t.prefix for t in tuners})


__getattr__ = elsewhere(__name__, own=_collected)


def _tuner_of(config: PeftConfig) -> type[BaseTuner]:
    """The tuner class of a config's method; TypeError if that cannot be mixed or is not available."""
    kind = getattr(config, "peft_type", None)
    if kind not in COMPATIBLE_TUNER_TYPES or kind not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise TypeError(f"MixedModel only supports {COMPATIBLE_TUNER_TYPES} configs, but got {type(config)}.")
    return PEFT_TYPE_TO_TUNER_MAPPING[kind]


class MixedModel(BaseTuner):
    """A model with adapters of several methods (LoRA, LoHa, LoKr, AdaLoRA, OFT, SHiRA); see `PeftMixedModel`.

    A module that two methods target is wrapped twice: the outer layer's base layer is the inner layer.
    """

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The parameter prefixes of the methods in use."""
        return tuple(sorted({_tuner_of(config).prefix for config in self.peft_config.values()}))

    @property
    def layer_classes(self) -> tuple[type[BaseTunerLayer], ...]:
        """The layer classes of the methods in use."""
        return tuple({_tuner_of(config).tuner_layer_cls for config in self.peft_config.values()})

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        _tuner_of(config)
        super()._check_new_adapter_config(config)

    def _create_and_replace(self, config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        tuner = _tuner_of(config)
        acting = tuner.__new__(tuner)  # this model with the methods of that tuner: they share all attributes
        acting.__dict__ = self.__dict__
        acting._create_and_replace(config, *args, **kwargs)

    @staticmethod
    def _prepare_adapter_config(peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        if peft_config.target_modules is None:
            targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_config["model_type"])
            if targets is None:
                raise ValueError("Please specify `target_modules` in `peft_config`")
            peft_config.target_modules = set(targets)
        return peft_config

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)
        if isinstance(child, AuxiliaryTrainingWrapper):
            return  # what takes its place has its own weights
        base = getattr(child, "quant_linear_module", child)
        child = child.get_base_layer() if hasattr(child, "base_layer") else base
        _hand_over(child, new_module)
        move_parts(new_module, self.prefixes, lambda: any_weight(child))

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        _freeze_base(model)
        for adapter in self.active_adapters:
            bias = getattr(self.peft_config[adapter], "bias", "none")
            if bias == "all":
                for name, parameter in model.named_parameters():
                    if "bias" in name:
                        parameter.requires_grad = True
                for layer in _C.find(model, BaseTunerLayer)[0]:
                    layer.__dict__.pop("_adapter_ledger", None)
            elif bias.endswith("_only"):
                for layer in _C.find(model, self.layer_classes)[0]:
                    if getattr(layer, "bias", None) is not None:
                        layer.bias.requires_grad = True
            elif bias != "none":
                raise ValueError(f"Requested bias: {bias}, is not implemented.")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one or several adapters active; each layer knows only some of them.

        ValueError, before anything changes, if there is no adapter of that name.
        """
        names = adapter_name if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        self._check_adapters_exist([names] if isinstance(names, str) else names)
        set_adapter(self.model, names, inference_mode=inference_mode, layer_cls=self.layer_classes)
        self.active_adapter = names

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Deletes one or several adapters; ValueError, before anything changes, if one is unknown or merged."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        missing = sorted(set(names) - set(self.peft_config))
        if missing:
            raise ValueError(f"Adapter(s) {missing} not found, available adapters: {sorted(self.peft_config)}")
        _check_adapters_not_merged(self.model, names)
        (layers,) = _C.find(self.model, BaseTunerLayer)
        active: set[str] = set()
        for name in names:
            del self.peft_config[name]
            for layer in layers:
                layer.delete_adapter(name)
            # a layer knows only the adapters that it hosts
            active = {adapter for layer in layers for adapter in layer.active_adapters if adapter in self.peft_config}
            _delete_auxiliary_adapter(self.model, name, sorted(active))
        self.active_adapter = sorted(active)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge and getattr(self.model, "quantization_method", None) == "gptq":
            raise ValueError("Cannot merge layers when the model is gptq quantized")
        _NestedUnloading(self, merge, safe_merge, adapter_names).run(progressbar)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"Weighted adapters are not supported for {type(self).__name__} (yet).")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **kwargs)


class _NestedUnloading(Unloading):
    """Unloads layers that wrap other layers: the innermost is merged first, then each one around it."""

    def merge_one(self, target: nn.Module) -> None:
        path = [target]
        while hasattr(path[-1].base_layer, "base_layer"):
            path.append(path[-1].base_layer)
        for outer, inner in zip(path, path[1:], strict=False):
            inner.merge(**self.how)
            outer.base_layer = inner.base_layer
        target.merge(**self.how)
