"""Helpers around models, adapters and checkpoints; names are loaded when first used."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

# module: the public names that are found there
_NAMES: dict[str, str] = {
    "constants": """
        ALLOWED_COMPUTE_DTYPES CONFIG_NAME INCLUDE_LINEAR_LAYERS_SHORTHAND SAFETENSORS_WEIGHTS_NAME UPCAST_DTYPES
        WEIGHTS_NAME bloom_model_postprocess_past_key_value
        TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
        """
    + " ".join(
        f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING"
        for method in """ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HRA IA3 LILY LNTUNING
        LOHA LOKR LORA MISS OFT PEANUT POLY PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA UNILORA VBLORA VERA
        WAVEFT""".split()
    ),
    "error": "NoMatchingPeftModuleError PeftError",
    "warning": "PeftWarning",
    "integrations": "map_cache_to_layer_device_map",
    "loftq_utils": "replace_lora_weights_loftq",
    "aux_wrappers": "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper _set_adapter",
    "matching": "_get_input_embeddings_name _get_submodules _is_valid_match",
    "model_prep": """
        _prepare_prompt_learning_config cast_mixed_precision_params get_gptqmodel_quant_linear get_quantization_config
        infer_device prepare_model_for_kbit_training
        """,
    "trainable_modules": "_freeze_adapter _set_trainable set_additional_trainable_modules",
    "other": "_get_batch_size id_tensor_storage shift_tokens_right transpose",
    "peft_types": "PeftType TaskType register_peft_method",
    "quantization_utils": "get_quantization_kwargs quantization_extra_repr resolve_quantization_backend",
    "save_and_load": """
        get_base_model_state_dict get_peft_model_state_dict load_peft_weights set_base_model_state_dict
        set_peft_model_state_dict
        """,
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
