"""`get_peft_model`: from a model and a configuration to a PeftModel."""

from __future__ import annotations

import warnings

from torch import nn

from . import _C
from .auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from .config import PeftConfig, check_is_config
from .mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from .mixed_model import PeftMixedModel
from .peft_model import PeftModel, warn_if_name_in_prefix
from .reexports import elsewhere
from .tuners.tuners_utils import BaseTunerLayer


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel | PeftMixedModel:
    """Adds an adapter to `model`, in place, and returns the PeftModel around it.

    Args:
        model: any `nn.Module`; a configuration with a `task_type` expects the conventions of transformers' models.
        peft_config: configuration of the adapter; its `base_model_name_or_path` and `revision` are filled in.
        adapter_name: name of the adapter.
        mixed: return a `PeftMixedModel`, which can hold adapters of different types.
        autocast_adapter_dtype: keep float16 and bfloat16 adapter weights in float32.
        revision: revision of the base model, recorded in the configuration.
        low_cpu_mem_usage: create the adapter on the meta device, for weights that are loaded right after.
    """
    check_is_config(peft_config)
    given = peft_config.base_model_name_or_path
    # A transformers model that was built from a config has the name "".
    name = model.__dict__.get("name_or_path") or None
    peft_config.base_model_name_or_path = name

    if _C.find(model, BaseTunerLayer)[0]:
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before."
        )
    if given is not None and given != name:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{given}' to '{name}'. Please ensure that "
            "the correct base model is loaded when loading this checkpoint."
        )
    if revision is not None:
        if peft_config.revision is not None and peft_config.revision != revision:
            warnings.warn(
                f"peft config has already set base model revision to {peft_config.revision}, overwriting with "
                f"revision {revision}"
            )
        peft_config.revision = revision
    if getattr(peft_config, "init_lora_weights", None) == "eva" and not low_cpu_mem_usage:
        warnings.warn(
            "lora with eva initialization used with low_cpu_mem_usage=False. Setting low_cpu_mem_usage=True can "
            "improve the maximum batch size possible for eva initialization."
        )
    warn_if_name_in_prefix(adapter_name, PEFT_TYPE_TO_PREFIX_MAPPING.get(peft_config.peft_type))

    if mixed:
        return PeftMixedModel(model, peft_config, adapter_name=adapter_name)
    if peft_config.is_prompt_learning:
        model_cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[peft_config.task_type]
    else:
        model_cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)
    return model_cls(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


__getattr__ = elsewhere(__name__)
