"""All tuners: the public names of their packages, each imported when first used."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

# package: its public names. A new tuner adds one row.
_NAMES: dict[str, str] = {
    "adalora": "AdaLoraConfig AdaLoraModel",
    "adamss": "AdamssConfig AdamssModel",
    "adaption_prompt": "AdaptionPromptConfig AdaptionPromptModel",
    "beft": "BeftConfig BeftModel",
    "boft": "BOFTConfig BOFTModel",
    "c3a": "C3AConfig C3AModel",
    "cartridge": """
        CartridgeConfig CartridgeEncoder compose_cartridge_adapters initialize_kv_prefix_from_past_key_values
        initialize_kv_prefix_from_text prompt_embeddings_from_past_key_values
        """,
    "cpt": "CPTConfig CPTEmbedding",
    "deft": "DeftConfig DeftModel",
    "delora": "DeloraConfig DeloraModel",
    "fourierft": "FourierFTConfig FourierFTModel",
    "frod": "FrodConfig FrodModel",
    "glora": "GloraConfig GloraModel",
    "gralora": "GraloraConfig GraloraModel",
    "hira": "HiraConfig HiraModel",
    "hra": "HRAConfig HRAModel",
    "ia3": "IA3Config IA3Model",
    "lily": "LilyConfig LilyModel",
    "ln_tuning": "LNTuningConfig LNTuningModel",
    "loha": "LoHaConfig LoHaModel",
    "lokr": "LoKrConfig LoKrModel",
    "lora": """
        ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig LoraModel LoraRuntimeConfig
        MontecloraConfig VeloraConfig convert_to_lora create_arrow_model get_eva_state_dict
        initialize_lora_eva_weights preprocess_loraga save_as_lora
        """,
    "miss": "MissConfig MissModel",
    "mixed": "MixedModel",
    "multitask_prompt_tuning": "MultitaskPromptEmbedding MultitaskPromptTuningConfig MultitaskPromptTuningInit",
    "oft": "OFTConfig OFTModel",
    "p_tuning": "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType",
    "peanut": "PeanutConfig PeanutModel",
    "prefix_tuning": "PrefixEncoder PrefixTuningConfig",
    "prompt_tuning": "PromptEmbedding PromptTuningConfig PromptTuningInit",
    "psoft": "PsoftConfig PsoftModel",
    "pvera": "PveraConfig PveraModel",
    "randlora": "RandLoraConfig RandLoraModel",
    "road": "RoadConfig RoadModel",
    "tinylora": "TinyLoraConfig TinyLoraModel",
    "osf": "OSFConfig OSFModel",
    "poly": "PolyConfig PolyModel",
    "shadow": "ShadowConfig ShadowModel",
    "shira": "ShiraConfig ShiraModel",
    "supertuning": "SupertuningConfig SupertuningModel",
    "trainable_tokens": "TrainableTokensConfig TrainableTokensModel",
    "waveft": "WaveFTConfig WaveFTModel",
    "unilora": "UniLoraConfig UniLoraModel",
    "vblora": "VBLoRAConfig VBLoRAModel",
    "vera": "VeraConfig VeraModel",
    "xlora": "XLoraConfig XLoraModel",
}
_HOME = {name: package for package, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    elif not name.startswith("__") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
