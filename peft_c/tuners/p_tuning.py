"""The config of P-tuning: a prompt that a small encoder computes (https://arxiv.org/abs/2103.10385)."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..config import PromptLearningConfig
from ..utils.peft_types import PeftType
from .prompt_learning import MissingEncoder, register
from .room import option


class PromptEncoderReparameterizationType(str, enum.Enum):
    """What the encoder is."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Options of P-tuning."""

    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = option(
        PromptEncoderReparameterizationType.MLP, "What the encoder is: MLP or LSTM."
    )
    encoder_hidden_size: int = option(None, "Width of the encoder.")
    encoder_num_layers: int = option(2, "Layers of an LSTM encoder.")
    encoder_dropout: float = option(0.0, "Dropout of the encoder.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING


class PromptEncoder(MissingEncoder):
    """PEFT's encoder for P-tuning."""


register("p_tuning", PromptEncoderConfig, PromptEncoder)
