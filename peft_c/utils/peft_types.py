"""The kinds of adapters and of tasks, and how a method is registered under its kind."""

from __future__ import annotations

import enum
from typing import Any


class PeftType(str, enum.Enum):
    """Methods that a `PeftConfig` can name in its `peft_type`; members equal their names as strings."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


class TaskType(str, enum.Enum):
    """Tasks that select the wrapper class of `get_peft_model` (FEATURE_EXTRACTION: hidden states as embeddings)."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def add_peft_type(name: str) -> PeftType:
    """The member of `PeftType` of that name; a new one, for a method outside of this package, if there is none."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        type.__setattr__(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    return PeftType[name]


def register_peft_method(
    *, name: str, config_cls: Any, model_cls: Any, prefix: str | None = None, is_mixed_compatible: bool = False
) -> None:
    """Make a method known, so that its config class can be used with `get_peft_model` and its checkpoints load.

    Args:
        name: Lower-case name of a member of `PeftType`.
        config_cls: The `PeftConfig` class.
        model_cls: The `BaseTuner` class; None for prompt learning, which has none.
        prefix: What the names of the method's parameters start with; by default `name` and an underscore. Must equal
            `model_cls.prefix`.
        is_mixed_compatible: Whether `PeftMixedModel` may combine the method with others.

    Raises:
        ValueError: for a name that is not lower case, ends with an underscore or is no `PeftType`, or if `prefix` and
            `model_cls.prefix` differ.
        KeyError: if the name is taken.
    """
    from ..mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs
    from ..mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING as mixed_models
    from ..mapping import PEFT_TYPE_TO_PREFIX_MAPPING as prefixes
    from ..mapping import PEFT_TYPE_TO_TUNER_MAPPING as tuners

    if name.endswith("_"):
        raise ValueError(f"Please pass the name of the PEFT method without '_' suffix, got {name}.")
    if not name.islower():
        raise ValueError(f"The name of the PEFT method should be in lower case letters, got {name}.")
    if name.upper() not in PeftType.__members__:
        raise ValueError(f"Unknown PEFT type {name.upper()}, please add an entry to {__name__}.PeftType.")
    peft_type = PeftType[name.upper()]
    prefix = f"{name}_" if prefix is None else prefix

    if any(peft_type in classes for classes in (configs, tuners, mixed_models)):
        raise KeyError(f"There is already PEFT method called '{name}', please choose a unique name.")
    model_prefix = getattr(model_cls, "prefix", None)
    if model_prefix is not None and model_prefix != prefix:
        raise ValueError(f"Inconsistent prefixes found: '{prefix}' and '{model_prefix}' (they should be the same).")

    prefixes[peft_type] = prefix
    configs[peft_type] = config_cls
    tuners[peft_type] = model_cls
    if is_mixed_compatible:
        mixed_models[peft_type] = model_cls
