"""The config of prefix tuning: learned keys and values before those of each layer (https://arxiv.org/abs/2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import PromptLearningConfig
from ..utils.peft_types import PeftType
from .prompt_learning import MissingEncoder, register
from .room import option


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Options of prefix tuning."""

    init_weights: Literal["zero"] | None = option(None, 'None: start at random; "zero": start without effect.')
    encoder_hidden_size: int = option(None, "Width of the projection.")
    prefix_projection: bool = option(False, "Whether a small network computes the prefix.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING


class PrefixEncoder(MissingEncoder):
    """PEFT's encoder for prefix tuning."""


register("prefix_tuning", PrefixTuningConfig, PrefixEncoder)
