"""The registries from adapter type to classes, and injecting an adapter without wrapping the model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from .utils.peft_types import PeftType

if TYPE_CHECKING:
    from .config import PeftConfig
    from .tuners.tuners_utils import BaseTuner


class _Registry(dict):
    """Adapter type -> class. A method's package `peft_c.tuners.<type in lower case>` is imported when its entry is
    first asked for, and all of them when the registry is listed. Importing it registers the method, or its function
    `_register` does, which leaves the imports that takes to this moment."""

    def _load(self, key: Any) -> bool:
        """Imports the package of `key`; whether the key has an entry now."""
        if not dict.__contains__(self, key) and isinstance(key, str) and key in PeftType.__members__:
            package = f"{__package__}.tuners.{PeftType(key).value.lower()}"
            try:
                register = getattr(importlib.import_module(package), "_register", None)
            except ModuleNotFoundError as exc:
                if exc.name != package:
                    raise
            else:
                if callable(register):
                    register()
        return dict.__contains__(self, key)

    def _load_all(self) -> None:
        for key in PeftType:
            self._load(key)

    def __missing__(self, key: Any) -> Any:
        if self._load(key):
            return dict.__getitem__(self, key)
        self._load_all()
        raise KeyError(f"Unknown adapter type {key!r}. Types available here: {sorted(str(k.value) for k in self)}.")

    def __contains__(self, key: Any) -> bool:
        return dict.__contains__(self, key) or self._load(key)

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default

    def __iter__(self):
        self._load_all()
        return dict.__iter__(self)

    def __len__(self) -> int:
        self._load_all()
        return dict.__len__(self)

    def keys(self):
        self._load_all()
        return dict.keys(self)

    def values(self):
        self._load_all()
        return dict.values(self)

    def items(self):
        self._load_all()
        return dict.items(self)


# Filled by utils.peft_types.register_peft_method.
PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = _Registry()
PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, type[BaseTuner]] = _Registry()
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[PeftType, type[BaseTuner]] = _Registry()
PEFT_TYPE_TO_PREFIX_MAPPING: dict[PeftType, str] = _Registry()


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """Builds the configuration that `config_dict["peft_type"]` names from the entries of the dictionary."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[config_dict["peft_type"]](**config_dict)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: torch.nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> torch.nn.Module:
    """Replaces the targeted modules of `model` in place by adapter layers and returns the same `model`.

    Args:
        peft_config: the adapter's configuration.
        model: the model to change.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter's parameters on the meta device, to be filled by loading.
        state_dict: when given, its keys (not its values) decide which modules get an adapter.

    Raises `ValueError` for methods that keep state outside the layers: prompt learning, adaption prompt, shadow, and
    tuners with `uses_shared_state`.
    """
    if (
        peft_config.is_prompt_learning
        or peft_config.is_adaption_prompt
        or type(peft_config).__name__ == "ShadowConfig"
    ):
        raise ValueError("`create_and_replace` does not support prompt learning, adaption prompt and shadow yet.")
    if peft_config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise ValueError(
            f"`inject_adapter_in_model` does not support {peft_config.peft_type} yet. Please use `get_peft_model`."
        )
    tuner_cls = PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type]
    if tuner_cls.uses_shared_state:
        raise ValueError(
            f"`inject_adapter_in_model` does not support {peft_config.peft_type} because it uses shared state stored "
            "on the tuner. Please use `get_peft_model` instead."
        )
    tuner = tuner_cls(
        model, peft_config, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
    )
    return tuner.model
