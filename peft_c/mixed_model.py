"""PeftMixedModel: adapters of different types on one base model."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Any

from torch import nn

from . import offload
from .config import PeftConfig
from .mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from .peft_model import AdapterLoadingMixin, checkpoints_gradients, enable_input_grads, load_config
from .reexports import elsewhere
from .rollback import undo_on_error
from .tuners.mixed import COMPATIBLE_TUNER_TYPES, MixedModel
from .utils.constants import DUMMY_MODEL_CONFIG
from .utils.other import _set_adapter, _set_trainable


def _check_config_compatible(peft_config: PeftConfig) -> None:
    if peft_config.peft_type not in COMPATIBLE_TUNER_TYPES:
        raise ValueError(
            f"The provided `peft_type` '{getattr(peft_config.peft_type, 'value', peft_config.peft_type)}' is not "
            f"compatible with the `PeftMixedModel`. Compatible types are: {COMPATIBLE_TUNER_TYPES}"
        )


class PeftMixedModel(AdapterLoadingMixin, nn.Module):
    """A base model with adapters of different, compatible types, several of which can be active together.

    For inference; saving is not supported. Usually created with `get_peft_model(..., mixed=True)`. In a forward call
    the adapters act in the order in which they were added.

    Args:
        model: the base model; its modules are replaced in place.
        peft_config: configuration of the first adapter; `ValueError` when its type cannot be mixed.
        adapter_name: name of the first adapter.
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default") -> None:
        super().__init__()
        _check_config_compatible(peft_config)
        if checkpoints_gradients(model):
            enable_input_grads(model)
        self.modules_to_save = None
        self.base_model = MixedModel(model, {adapter_name: peft_config}, adapter_name)
        self.set_modules_to_save(peft_config, adapter_name)
        self.config = getattr(model, "config", DUMMY_MODEL_CONFIG)
        # Simulated tensor parallelism sums in another order, so that merged and unmerged outputs would differ.
        if hasattr(getattr(self.base_model, "config", None), "pretraining_tp"):
            self.base_model.config.pretraining_tp = 1

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configuration of each adapter."""
        return self.base_model.peft_config

    @property
    def active_adapter(self) -> str:
        """The tuner's `active_adapter`."""
        return self.base_model.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return self.base_model.active_adapters

    def forward(self, *args: Any, **kwargs: Any):
        """Calls the base model with the active adapters in it."""
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any):
        """Calls the base model's `generate` with the active adapters in it."""
        return self.base_model.generate(*args, **kwargs)

    @contextmanager
    def disable_adapter(self):
        """Inside of this context the model computes what the base model computes."""
        try:
            self.base_model.disable_adapter_layers()
            yield
        finally:
            self.base_model.enable_adapter_layers()

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds a new, untrained adapter without activating it; arguments as in `PeftModel.add_adapter`.

        Raises `ValueError` for a name in use and for a type that cannot be mixed.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        _check_config_compatible(peft_config)
        try:
            self.peft_config[adapter_name] = peft_config
            self.base_model.inject_adapter(self, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise
        self.base_model._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        self.set_modules_to_save(peft_config, adapter_name)

    def set_modules_to_save(self, peft_config: PeftConfig, adapter_name: str) -> None:
        """Wraps the modules that the adapter trains in full, if it has any."""
        names = getattr(peft_config, "modules_to_save", None)
        if names is None:
            return
        self.modules_to_save = (self.modules_to_save or set()) | set(names)
        _set_trainable(self, adapter_name, module_names=names, inference_mode=peft_config.inference_mode)

    def _known(self, adapter_name: str | list[str]) -> list[str]:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        unknown = set(names) - set(self.peft_config)
        if unknown:
            raise ValueError(f"Adapter(s) {sorted(unknown)} not found, available adapters: {sorted(self.peft_config)}")
        return names

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activates the adapter(s), and only those, and makes them trainable unless `inference_mode` is true.

        Raises `ValueError` for unknown names.
        """
        names = self._known(adapter_name)
        self.base_model.set_adapter(names, inference_mode=inference_mode)
        _set_adapter(self, names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Removes the adapter(s). Raises `ValueError` for unknown names."""
        self.base_model.delete_adapter(self._known(adapter_name))

    def merge_and_unload(self, *args: Any, **kwargs: Any):
        """Merges adapters into the base weights and returns the base model: arguments `progressbar`, `safe_merge` and
        `adapter_names` as in `LoraModel.merge_and_unload`."""
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self, *args: Any, **kwargs: Any):
        """Returns the base model without the adapters."""
        return self.base_model.unload(*args, **kwargs)

    def get_layer_status(self):
        """Not supported: `TypeError`."""
        raise TypeError(f"get_layer_status is not supported for {type(self).__name__}.")

    def get_model_status(self):
        """Not supported: `TypeError`."""
        raise TypeError(f"get_model_status is not supported for {type(self).__name__}.")

    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any):
        """Adds a saved adapter; arguments and errors as in `PeftModel.load_adapter`."""
        result = self._load_adapter(model_id, adapter_name, *args, **kwargs)
        self.set_adapter(self.active_adapters)  # loading leaves the layers of one type unaware of the other's
        return result

    def create_or_update_model_card(self, output_dir: str):
        """Not supported: `NotImplementedError`."""
        raise NotImplementedError(f"Model card creation is not supported for {type(self).__name__} (yet).")

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = False,
        selected_adapters: list[str] | None = None,
        **kwargs: Any,
    ):
        """Not supported: `NotImplementedError`."""
        raise NotImplementedError(f"Saving is not supported for {type(self).__name__} (yet).")

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        """Adds a saved adapter to `model`, in place, and returns the PeftMixedModel around it.

        Arguments and errors as in `PeftModel.from_pretrained`; when anything fails, `model` is left as it was.
        """
        config = load_config(model_id, config, kwargs)
        if config.peft_type not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING:
            raise ValueError(f"Adapter of type {config.peft_type} is not supported for mixed models.")
        config.inference_mode = not is_trainable
        offload.detach_hooks(model)
        with undo_on_error(model):
            mixed = cls(model, config, adapter_name)
            mixed.load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        return mixed


__getattr__ = elsewhere(__name__, "peft_model")
