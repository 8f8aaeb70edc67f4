"""PEFT's adapters for PyTorch models, with the hot paths in C. Public names are loaded when first used."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from .tuners import _NAMES as _TUNERS

# The PEFT version whose API and file formats these are; programs that `import peft` compare it.
__version__ = "0.21.2"

try:
    import torch  # noqa: F401
except ModuleNotFoundError as exc:
    if exc.name != "torch":
        raise
    raise ImportError("peft_c needs PyTorch: install torch >= 2.10 (https://pytorch.org/get-started)") from exc

from . import _C  # noqa: E402, F401  (raises an ImportError that names what an unsuitable torch lacks)

# module: the public names that are found there
_NAMES: dict[str, str] = {
    "alias": "install_as_peft",
    "auto": """
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction
        AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification
        AutoPeftModelForTokenClassification
        """,
    "config": "PeftConfig PromptLearningConfig",
    "fast": "explain fast_paths",
    "helpers": "find_kappa_target_modules",
    "mapping": """
        PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING get_peft_config
        inject_adapter_in_model
        """,
    "mapping_func": "get_peft_model",
    "mixed_model": "PeftMixedModel",
    "peft_model": """
        PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering
        PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification
        """,
    "status": "get_layer_status get_model_status",
    "tuners.kept": "kept_weights",
    "tuners.law": "exact_unmerge",
    **{f"tuners.{package}": names for package, names in _TUNERS.items()},
    "utils": """
        TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING NoMatchingPeftModuleError PeftError PeftType
        PeftWarning TaskType bloom_model_postprocess_past_key_value cast_mixed_precision_params
        get_base_model_state_dict get_peft_model_state_dict load_peft_weights prepare_model_for_kbit_training
        replace_lora_weights_loftq set_base_model_state_dict set_peft_model_state_dict shift_tokens_right
        """,
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    elif not name.startswith("__") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
