"""The config of adaption prompts: gated prompts in the attention of the top layers (https://arxiv.org/abs/2303.16199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import PeftConfig
from ..utils.peft_types import PeftType
from .prompt_learning import not_available, register
from .room import option


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """Options of adaption prompts."""

    target_modules: str = option(None, "Name of the attention modules that get prompts.")
    adapter_len: int = option(None, "Length of the prompts.")
    adapter_layers: int = option(None, "How many layers get prompts, from the top.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADAPTION_PROMPT

    @property
    def is_adaption_prompt(self) -> bool:
        """Always true here."""
        return True


class AdaptionPromptModel(nn.Module):
    """The name of PEFT's model for adaption prompts; making one raises NotImplementedError."""

    def __init__(self, model: nn.Module, configs: dict[str, PeftConfig], adapter_name: str) -> None:
        not_available(type(self).__name__)


class AdaptedAttention(nn.Module):
    """The name of PEFT's layer for adaption prompts; making one raises NotImplementedError."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        not_available(type(self).__name__)


register("adaption_prompt", AdaptionPromptConfig, AdaptionPromptModel, parts=("layer", "utils"))
