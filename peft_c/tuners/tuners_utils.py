"""BaseTuner, the base of every tuner model, and the one place that has all names tuners are written with."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import _C
from ..config import PeftConfig
from ..reexports import elsewhere
from ..rollback import undivided
from ..utils.constants import (  # noqa: F401
    DUMMY_MODEL_CONFIG,
    DUMMY_TARGET_MODULES,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
    SEQ_CLS_HEAD_NAMES,
)
from ..utils.matching import _get_submodules  # noqa: F401
from ..utils.other import (
    AuxiliaryTrainingWrapper,
    _get_module_names_tied_with_embedding,
    match_target_against_key,
)
from ..utils.peft_types import PeftType
from ._buffer_dict import BufferDict  # noqa: F401
from .inject import Injection
from .merging import (  # noqa: F401
    Unloading,
    check_adapters_to_merge,
    forget_tie_if_diverged,
    merge_layers,
    onload_layer,
    switch_layers,
    unmerge_layers,
)
from .state_keys import (
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
    _is_key_under_prefixes,  # noqa: F401
    _remove_adapter_name_from_state_dict_key,
    adapter_entries,
    bias_keys,
)
from .switching import (
    _check_adapters_not_merged,
    _delete_auxiliary_adapter,  # noqa: F401
    cast_adapter_dtype,
    delete_adapter,
    enable_adapters,
    set_adapter,
    set_requires_grad,
)
from .targets import (  # noqa: F401
    _ExcludedModule,
    _find_minimal_target_modules,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from .tuner_layer import INNERMOST, BaseTunerLayer, _get_in_out_features, move_parts  # noqa: F401

_TYING = (
    "This can lead to complications, for example when merging the adapter or converting your model to formats other "
    "than safetensors. Check the discussion here: https://github.com/huggingface/peft/issues/2777"
)
_TIED_TARGET = "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but "
warn_msg_weight_tying = f"{_TIED_TARGET}no implementation exists to tie the adapters. {_TYING}"

# architectures in which adapting these modules would leave the fused kernels reading the base weights
_MAMBA_MODELS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_MAMBA_UNFIT_MODULES = {"out_proj", "conv1d"}
_MAMBA_UNFIT_METHODS = {"LORA", "ADALORA", "XLORA", "RANDLORA"}


def _check_lora_target_modules_mamba(peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
    """ValueError if a LoRA-like method targets a module of a Mamba-like model that its kernels bypass."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if (
        model_type in _MAMBA_MODELS
        and target_name in _MAMBA_UNFIT_MODULES
        and peft_config.peft_type in _MAMBA_UNFIT_METHODS
    ):
        raise ValueError(
            f"[PEFT:{peft_config.peft_type}] Module '{target_name}' is incompatible with Mamba-based models "
            f"(model_type='{model_type}'). Remove {sorted(_MAMBA_UNFIT_MODULES)} from `target_modules`."
        )


# programs look for the end of it in the warning
UNTYING_EXAMPLE = """
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(model_id, tie_word_embeddings=False)
model.get_output_embeddings().weight.data = model.get_input_embeddings().weight.data.clone()
untied_model_dir = "path/to/untied/model"
model.save_pretrained(untied_model_dir)

# Now use the original model but in untied format
model = AutoModelForCausalLM.from_pretrained(untied_model_dir)
```
"""


class BaseTuner(nn.Module, ABC):
    """A model with adapters: it puts tuner layers in place of the modules that a config targets, and runs the model.

    A new method overrides `_create_and_replace` and, where the defaults do not fit, `_prepare_adapter_config` and
    `_check_target_module_exists`. Attributes that are not found are looked up in the wrapped model.

    Args:
        model: the model to adapt, changed in place.
        peft_config: the adapter's config, or a dict adapter name -> config.
        adapter_name: name of the adapter to create.
        low_cpu_mem_usage: create the adapter's weights on the meta device, to be loaded later.
        state_dict: if given, modules are targeted that it has weights for (only its keys matter).

    Attributes:
        model: the wrapped model.
        peft_config: adapter name -> config.
        active_adapter: the active adapter or adapters.
        targeted_module_names, targeted_parameter_names: what was adapted, in the order of the model.

    Class attributes of a subclass: `prefix` (of the method's parameters, such as "lora_"), `tuner_layer_cls`,
    `target_module_mapping` (model type -> default targets), and `uses_shared_state`: whether layers share weights
    that live on the tuner, which `inject_adapter_in_model` would lose.
    """

    uses_shared_state: bool = False
    prefix: str
    tuner_layer_cls: type[BaseTunerLayer]
    target_module_mapping: dict[str, list[str]]

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        new = {adapter_name: peft_config} if isinstance(peft_config, PeftConfig) else peft_config
        earlier: dict[str, PeftConfig] = {}
        if hasattr(self, "peft_config"):
            warnings.warn(
                "Already found a `peft_config` attribute in the model. This will lead to having multiple adapters in "
                "the model. Make sure to know what you are doing!"
            )
            earlier = dict(self.peft_config)
            self.peft_config.update(new)
        else:
            self.peft_config = new

        self.active_adapter: str | list[str] = adapter_name
        try:
            self._pre_injection_hook(self.model, self.peft_config[adapter_name], adapter_name)
            if peft_config != PeftType.XLORA:
                self.inject_adapter(
                    self.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
                )
            self._post_injection_hook(self.model, self.peft_config[adapter_name], adapter_name)
        except BaseException:
            if earlier:
                self.peft_config.clear()
                self.peft_config.update(earlier)
            raise
        # for programs that look for adapters on the bare model
        self.model.peft_config = self.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters as a list."""
        return [self.active_adapter] if isinstance(self.active_adapter, str) else self.active_adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not set yet: looking it up in itself would never end
                raise
            return getattr(self.model, name)

    # --- what a method may override ---

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Called before the first adapter is injected."""

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Called after the first adapter was injected."""

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        """Completes the config; by default with the method's usual `target_modules` for the model's type.

        ValueError if there are none for it.
        """
        if peft_config.target_modules is None:
            targets = self.target_module_mapping.get(model_config["model_type"])
            if targets is None:
                raise ValueError("Please specify `target_modules` in `peft_config`")
            peft_config.target_modules = targets if isinstance(targets, str) else set(targets)
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Called before modules are targeted, to change the model's structure."""

    @staticmethod
    def _check_tied_module_exists(peft_config: PeftConfig, key: str) -> bool:
        """Whether the module is to share its adapter with the one that its weight is tied to."""
        tied = getattr(peft_config, "target_modules_to_tie", None) or ()
        return any(key == name or key.endswith(f".{name}") for name in tied)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        """Whether the config targets the module of this name."""
        return check_target_module_exists(peft_config, key)

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        """Called for each target before any is replaced; raises if it must not be."""
        _check_lora_target_modules_mamba(peft_config, model, target_name)

    @abstractmethod
    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Adds the adapter to `target`: updates it if it is a tuner layer, else replaces it, which is the attribute
        `target_name` of `parent`, by a new one.

        Args:
            current_key: the full name of the target.
            parameter_name: given if the target is a parameter of that name, held by `target`.
        """

    def _create_and_replace_parameter(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        raise NotImplementedError(f"{type(self).__name__} does not support targeting nn.Parameter.")

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        """Called with the config of a new adapter, which is in `peft_config` already; ValueError if it conflicts."""
        if len(self.peft_config) <= 1:
            return
        if not any(known is config for known in self.peft_config.values()):
            raise ValueError("_check_new_adapter_config needs a config that is in peft_config already.")
        if sum(getattr(known, "bias", "none") != "none" for known in self.peft_config.values()) > 1:
            raise ValueError(
                f"{type(self).__name__} supports only 1 adapter with bias. When using multiple adapters, set bias to "
                "'none' for all adapters."
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer's adapter can be converted to LoRA."""
        (layers,) = _C.find(self, BaseTunerLayer)
        return all(layer.supports_lora_conversion() for layer in layers)

    # --- injecting ---

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Adds the adapter whose config is `self.peft_config[adapter_name]` to the model; all or nothing.

        Args:
            autocast_adapter_dtype: not used here; see `_cast_adapter_dtype`.
            low_cpu_mem_usage, state_dict: as in the constructor.

        Raises `NoMatchingPeftModuleError` (a ValueError) if nothing is targeted, and what the checks of the config
        raise; the model is then as it was.
        """
        Injection(self, model, adapter_name, low_cpu_mem_usage, state_dict).run()

    def _inject_parameters(
        self, peft_config: PeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adds the adapter to the nn.Parameters in `target_parameters`; returns their names."""
        injection = Injection(self, model, adapter_name, low_cpu_mem_usage)
        injection.config = peft_config
        return injection.create_for_parameters()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Puts `new_module` in place of the child, with the child's weights, and its adapters on their device."""
        setattr(parent, child_name, new_module)
        child = getattr(child, "base_layer", child)
        _hand_over(child, new_module)
        move_parts(new_module, (self.prefix,), lambda: any_weight(child))

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freezes every parameter that belongs to no adapter, but for the biases that a config makes trainable.

        Modules that are trained as a whole look after themselves.
        """
        _freeze_base(model)
        (layers,) = _C.find(model, self.tuner_layer_cls)
        for adapter in self.active_adapters:
            bias = getattr(self.peft_config[adapter], "bias", "none")
            if bias == "all":
                for name, parameter in model.named_parameters():
                    if name == "bias" or name.endswith(".bias"):
                        parameter.requires_grad = True
                for layer in _C.find(model, BaseTunerLayer)[0]:
                    layer.__dict__.pop("_adapter_ledger", None)  # biases of inactive adapters are trainable now
            elif bias.endswith("_only"):
                for layer in layers:
                    if getattr(layer, "bias", None) is not None:
                        layer.bias.requires_grad = True
            elif bias != "none":
                raise NotImplementedError(f"Requested bias: {bias}, is not implemented.")
        for layer in layers:
            layer._freeze_non_trainable_peft_weights()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Turns an adapter's weights of lower precision into float32."""
        cast_adapter_dtype(self.model, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)

    # --- switching ---

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one or several adapters active, each once, and trainable unless `inference_mode`.

        ValueError, before anything changes, if there is no adapter of that name.
        """
        names = adapter_name if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        self._check_adapters_exist([names] if isinstance(names, str) else names)
        model = self._modules["model"]
        set_adapter(model, adapter_name=names, inference_mode=inference_mode, layer_cls=self.tuner_layer_cls)
        object.__setattr__(self, "active_adapter", names)  # no module or weight, which torch would look for

    def _check_adapters_exist(self, names: list[str]) -> None:
        if self.peft_config.keys() >= set(names):
            return
        layers, wrappers = _C.find(self.model, BaseTunerLayer, AuxiliaryTrainingWrapper)
        known = {
            *self.peft_config,
            *(name for layer in layers for name in layer._all_available_adapter_names()),
            *(name for wrapper in wrappers for name in wrapper._adapters),
        }
        missing = [name for name in names if name not in known]
        if missing:
            which = ", ".join(map(repr, missing))
            raise ValueError(f"Adapter {which} not found. Adapters of this model: {sorted(known)}.")

    def _enable_adapter_layers(self, enabled: bool = True, irregular: bool = True) -> bool | str | None:
        return enable_adapters(self._modules["model"], enabled, irregular)

    def disable_adapter_layers(self) -> None:
        """Switches all adapters off and freezes them: the model computes what the base model does.

        Warns if an active adapter has trained biases of the base model, which stay as they are.
        """
        self._warn_about_bias()
        self._enable_adapter_layers(enabled=False)

    def _warn_about_bias(self) -> None:
        for adapter in self.active_adapters:
            bias = getattr(self.peft_config[adapter], "bias", "none")
            if bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the same "
                    "output as the base model would without adaption."
                )

    def enable_adapter_layers(self) -> None:
        """Switches the adapters on again; what was trainable before they were switched off becomes trainable."""
        self._enable_adapter_layers(enabled=True)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter with its config.

        ValueError, before anything changes, if there is none of that name or it is merged. What becomes active if it
        was active, see `peft_c.tuners.tuners_utils.delete_adapter`.
        """
        if adapter_name not in list(self.peft_config):
            raise ValueError(
                f"Adapter {adapter_name} does not exist. Adapters of this model: {sorted(self.peft_config)}."
            )
        _check_adapters_not_merged(self.model, adapter_name)
        with undivided():
            del self.peft_config[adapter_name]
            active = delete_adapter(
                model=self.model, adapter_name=adapter_name, prefix=self.prefix, layer_cls=self.tuner_layer_cls
            )
            self.active_adapter = active or []

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Makes the weights of one or several adapters trainable or frozen, active or not."""
        set_requires_grad(self.model, adapter_names=adapter_names, requires_grad=requires_grad)

    # --- merging ---

    def _check_merge_allowed(self) -> None:
        """Raises ValueError if the adapters cannot be merged; warns about adapted layers with tied weights."""
        tied_target_modules = self._get_tied_target_modules(self.model)
        if tied_target_modules:
            warnings.warn(
                f"Model with `tie_word_embeddings=True` and the {tied_target_modules=} are part of the adapter. "
                "This can lead to complications. You can opt to merge the adapter after cloning the weights (to untie "
                "the embeddings). You can untie the embeddings by loading the model with "
                "`tie_word_embeddings=False`. For example:" + UNTYING_EXAMPLE
            )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges adapters (default: the active ones) into the base weights; `unmerge_adapter` takes them out again.

        With `safe_merge`, ValueError if a merged weight is not finite. If any layer fails, none is merged.
        """
        self._check_merge_allowed()
        merge_layers(self.model, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Takes all merged adapters out of the base weights."""
        unmerge_layers(self.model)

    def switch_merged_adapter(self, adapter_names: list[str], safe_merge: bool = False) -> None:
        """Merges `adapter_names` in place of the adapters that are merged, in one pass over the weights.

        The weights get the bits that `unmerge_adapter` and `merge_adapter` would give them. ValueError for an unknown
        name, and with `safe_merge` for a weight that would not be finite; then nothing has changed.
        """
        unknown = [name for name in adapter_names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"Unknown adapters {unknown}; the model has {sorted(self.peft_config)}.")
        switch_layers(self.model, adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        Unloading(self, merge, safe_merge, adapter_names).run(progressbar)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        self.model.__dict__.pop("_adapter_tree", None)
        if merge:
            forget_tie_if_diverged(self.model, self.get_model_config(self.model))
        return self.model

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merges adapters (default: the active ones), removes all tuner layers and returns the plain model.

        `safe_merge` as in `merge_adapter`. If any layer fails, the model keeps its adapters, unmerged.
        """
        return self._unload_and_optionally_merge(
            progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def unload(self) -> nn.Module:
        """Removes all tuner layers without merging and returns the plain model."""
        return self._unload_and_optionally_merge(merge=False)

    # --- tied weights ---

    @staticmethod
    def get_model_config(model: nn.Module) -> dict:
        """The model's config as a dict, {"model_type": "custom"} if it has none."""
        config = getattr(model, "config", None)
        if config is None:
            return DUMMY_MODEL_CONFIG
        if hasattr(config, "to_dict"):
            return config.to_dict()
        return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        """Adapted modules that, by their name, are embeddings, if the model's config ties those."""
        if not self.get_model_config(model).get("tie_word_embeddings"):
            return []
        return [name for name in self.targeted_module_names if _is_embedding(name)]

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        return _get_module_names_tied_with_embedding(self)

    def _add_modules_to_save_to_tie(self, peft_config: PeftConfig, tied_weight_keys: list[str]) -> None:
        """Arranges that the modules tied to a fully trained embedding follow it; methods that can do it override."""
        warnings.warn(warn_msg_weight_tying)

    def _add_targets_to_tie(self, peft_config: PeftConfig, tied_weight_keys: list[str]) -> None:
        """Arranges that the modules tied to an adapted embedding share its adapter; methods that can override it."""
        warnings.warn(warn_msg_weight_tying)

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """Looks whether the config trains or targets an embedding that another module is tied to, and has the adapters
        tied if `ensure_weight_tying` asks for it; warns otherwise."""
        saved = any(map(_is_embedding, getattr(peft_config, "modules_to_save", None) or ()))
        targets = getattr(peft_config, "target_modules", None)
        if isinstance(targets, str):
            targeted = any(match_target_against_key(targets, name) for name in EMBEDDING_LAYER_NAMES)
        else:
            targeted = any(map(_is_embedding, targets or ()))
        tied = self._get_module_names_tied_with_embedding()

        if not getattr(peft_config, "ensure_weight_tying", False):
            if tied and (saved or targeted):
                can_tie = hasattr(peft_config, "ensure_weight_tying")
                ask = f"{_TIED_TARGET}`ensure_weight_tying` is not set to True. {_TYING}"
                warnings.warn(ask if can_tie else warn_msg_weight_tying)
        elif not tied:
            warnings.warn("You have requested `ensure_weight_tying`, but no tied modules were found in the model")
        elif saved:
            self._add_modules_to_save_to_tie(peft_config, tied)
        elif targeted:
            self._add_targets_to_tie(peft_config, tied)
        else:
            warnings.warn(
                "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` "
                "or `target_modules`"
            )

    # --- state dicts ---
    # Class methods, because they also serve models that an adapter was injected into without a tuner around them. The
    # key of a checkpoint is made from the model's key by _remove_adapter_name_from_key alone, for saving and loading.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """The entries of a model's state dict (without the unwanted adapters) to save for an adapter, under their own
        keys. An override that renames them must undo that in `_remap_adapter_state_dict_for_load`."""
        selected = _filter_state_dict_by_key_prefixes(state_dict, _get_tuner_state_dict_key_prefixes(model))
        return selected | cls._get_learnable_bias_state_dict(model, state_dict, config)

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, torch.Tensor], config: PeftConfig
    ) -> dict[str, torch.Tensor]:
        """The biases of the base model that the config trains."""
        keys = bias_keys(model, getattr(config, "bias", "none"), state_dict)
        return {key: state_dict[key] for key in keys}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The checkpoint's key for a key of the model: x.lora_A.default.weight becomes x.lora_A.weight."""
        return _remove_adapter_name_from_state_dict_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """A checkpoint's entries under the keys of the model; those that fit no adapter weight keep their key.

        Works for a wrapped model and for one that was injected into, whose keys lack the wrapper's prefix.
        """
        wrapper = "base_model.model."
        to_model: dict[str, str] = {}
        for key in adapter_entries(model, adapter_name):
            saved = cls._remove_adapter_name_from_key(key, adapter_name)
            to_model[saved] = key
            if not key.startswith(wrapper):
                to_model[wrapper + saved] = key
        return {to_model.get(key, key): value for key, value in state_dict.items()}

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: nn.Module,
        peft_config: PeftConfig,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: dict[str, torch.Tensor],
        kwargs: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        """For methods that change the base weights (PiSSA): an equivalent LoRA for the unchanged base model."""
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported for "
            f"{cls.__name__}."
        )


def _is_embedding(name: str) -> bool:
    return name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES


def _hand_over(child: nn.Module, new_module: nn.Module) -> None:
    """Gives a module that takes the child's place, and does not wrap it, the child's weights."""
    wraps = hasattr(new_module, "base_layer")
    if not wraps and hasattr(child, "weight"):  # a module saved in full may have none of its own
        new_module.weight = child.weight
        if hasattr(child, "bias"):
            new_module.bias = child.bias
    if getattr(child, "state", None) is not None:  # of bitsandbytes
        (new_module.base_layer if wraps else new_module).state = child.state
        new_module.to(child.weight.device)


def any_weight(module: nn.Module) -> torch.Tensor:
    """A weight that tells where a module is; quantized layers keep theirs under other names, multi-head attention in
    one of three."""
    if type(module) in INNERMOST:
        return module.weight
    candidates = (getattr(module, name, None) for name in ("qweight", "W_q", "weight", "in_proj_weight"))
    weight = next((tensor for tensor in candidates if tensor is not None), None)
    return next(module.parameters()) if weight is None else weight


def _freeze_base(model: nn.Module) -> None:
    """Freezes the parameters outside of adapters and of fully trained modules. As in `named_parameters()`, a parameter
    that is shared counts where it comes first."""
    seen: set[int] = set()
    visited: set[int] = set()

    def visit(module: nn.Module) -> None:
        if id(module) in visited:
            return
        visited.add(id(module))
        if isinstance(module, AuxiliaryTrainingWrapper):
            seen.update(map(id, module.parameters()))
            return
        wrapped = "base_layer" if isinstance(module, BaseTunerLayer) else "model"
        only_wrapped = isinstance(module, (BaseTunerLayer, BaseTuner))
        for parameter in () if only_wrapped else module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                parameter.requires_grad = False
        for name, child in module._modules.items():
            if child is not None and (not only_wrapped or name == wrapped):
                visit(child)

    visit(model)


# as they are here; other packages put theirs in their place
TARGET_RULE = BaseTuner._check_target_module_exists
SWITCHES = BaseTuner.disable_adapter_layers, BaseTuner._enable_adapter_layers


class UnnamedKeys:
    """State-dict hooks of methods that are no BaseTuner: the keys of their checkpoints have no adapter name."""

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return _remove_adapter_name_from_state_dict_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The checkpoint as it is: its keys have no adapter name."""
        return state_dict


class BasePromptEncoder(UnnamedKeys, nn.Module):
    """Base of the encoders of prompt learning methods, with the state-dict hooks that BaseTuner has for the others.

    Their weights live here and not on layers of the model, which is why they are loaded by `_load_adapter_state_dict`.

    Class attributes:
        fills_cache: the encoder gives keys and values for each layer, not embeddings before the input.
        starts_from_tokens: it is made with the base model's word embeddings.
        by_task: its prompt depends on the samples' tasks.
    """

    fills_cache = False
    starts_from_tokens = False
    by_task = False

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """The prompt embeddings, read from the encoder itself."""
        if config.inference_mode:
            return {"prompt_embeddings": model.prompt_encoder[adapter_name].embedding.weight}
        return {"prompt_embeddings": model.get_prompt_embedding_to_save(adapter_name)}

    def _load_adapter_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Loads what `_get_adapter_state_dict` gave."""
        self.embedding.load_state_dict({"weight": state_dict["prompt_embeddings"]}, strict=True)


# --- small tools on models ---


def inspect_matched_modules(tuner: BaseTuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """{"matched": names of the modules that the adapter's config targets, "unmatched": all other names}."""
    config = tuner.peft_config[adapter_name]
    result: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for name, _ in tuner.model.named_modules():
        result["matched" if tuner._check_target_module_exists(config, name) else "unmatched"].append(name)
    return result


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A deep copy of a module; with `share_weights` its parameters are those of the original."""
    clone = copy.deepcopy(module)
    if share_weights:
        for name, original in module.named_modules():
            clone.get_submodule(name)._parameters.update(original._parameters)
    return clone


def _layer_list(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds a transformer's list of layers, and the attribute it is in."""
    while hasattr(model, "model"):
        model = model.model
    model = getattr(model, "bert", model)
    for path in ("layers", "encoder.layer", "h"):  # like Llama, BERT, Falcon
        head, _, name = path.rpartition(".")
        holder = getattr(model, head, None) if head else model
        if holder is not None and hasattr(holder, name):
            if isinstance(getattr(holder, name), nn.ModuleList):
                return holder, name
            break
    raise ValueError(
        "Could not locate the layers attribute in the model. Expected Llama, Bert or Falcon compatible architectures."
    )


def replicate_layers(model: nn.Module, layer_map: list[tuple[int, int]]) -> None:
    """Replaces a transformer's layers by copies, with shared weights, of the ranges [start, end) in `layer_map`.

    [[0, 4], [2, 5]] gives the layers 0 1 2 3 2 3 4. ValueError if the list of layers is not found.
    """
    holder, name = _layer_list(model)
    layers = getattr(holder, name)
    copies = []
    for index in (i for start, end in layer_map for i in range(start, end)):
        copies.append(clone_module(layers[index], share_weights=True))
        for module in copies[-1].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = len(copies) - 1
    setattr(holder, name, nn.ModuleList(copies))
    while hasattr(model, "model"):
        model = model.model
    config = getattr(getattr(model, "bert", model), "config", None)
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = len(copies)


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The name of a module in the model, "" if it is not there."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def get_device_map(model: nn.Module) -> dict:
    """Where the parts of the model are: `hf_device_map`, or the one device of its first parameter."""
    if hasattr(model, "hf_device_map"):
        return model.hf_device_map
    parameter = _first_parameter(model)
    return {"": (next(model.parameters()) if parameter is None else parameter).device}


def _first_parameter(module: nn.Module) -> nn.Parameter | None:
    """The first of `module.parameters()`."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        parameter = None if child is None else _first_parameter(child)
        if parameter is not None:
            return parameter
    return None


__getattr__ = elsewhere(__name__)
