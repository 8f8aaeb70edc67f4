"""LoRA: W + scale * B A with trained factors A (r, in) and B (out, r), scale = alpha / r
(https://arxiv.org/abs/2106.09685)."""

# every name is imported when first used

from __future__ import annotations

import importlib
from typing import Any

from peft_c.reexports import elsewhere

_HOMES = {
    "arrow": ("create_arrow_model",),
    "config": (
        "ArrowConfig",
        "BdLoraConfig",
        "EvaConfig",
        "KasaConfig",
        "LoftQConfig",
        "LoraConfig",
        "LoraGAConfig",
        "LoraRuntimeConfig",
        "MontecloraConfig",
        "VeloraConfig",
    ),
    "conversion": ("convert_to_lora", "save_as_lora"),
    "eva": ("get_eva_state_dict", "initialize_lora_eva_weights"),
    "gptq": ("GPTQLoraLinear",),
    "layer": ("Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer", "ParamWrapper"),
    "loraga": ("preprocess_loraga",),
    "model": ("LoraModel",),
}
_TABLE = {name: home for home, names in _HOMES.items() for name in names}
# only where their backend is installed: module, name of the check in import_utils
_BACKENDS = {
    "Linear8bitLt": ("bnb", "is_bnb_available"),
    "Linear4bit": ("bnb", "is_bnb_4bit_available"),
    "EetqLoraLinear": ("eetq", "is_eetq_available"),
}

__all__ = sorted(_TABLE)


_registered = False


def _register() -> None:
    """Register the method; `mapping` calls this when it is first asked for LoRA, so that a config costs no more."""
    global _registered
    if _registered:
        return
    _registered = True
    from peft_c.utils.peft_types import register_peft_method

    from .config import LoraConfig
    from .model import LoraModel

    register_peft_method(name="lora", config_cls=LoraConfig, model_cls=LoraModel, is_mixed_compatible=True)


def __getattr__(name: str) -> Any:
    home = _TABLE.get(name)
    if home is None and name in _BACKENDS:
        from peft_c import import_utils

        module, check = _BACKENDS[name]
        home = module if getattr(import_utils, check)() else None
    if home is not None:
        value = getattr(importlib.import_module(f".{home}", __name__), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    return elsewhere(__name__)(name)


# reachable as attributes of the package without an import statement of their own, as PEFT's are
_SUBMODULES = frozenset(
    {*_HOMES, "aqlm", "awq", "corda", "dora", "eetq", "hqq", "inc", "init", "intruders"}
    | {"monteclora", "te", "torchao", "tp_layer", "variants", "velora"}
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
