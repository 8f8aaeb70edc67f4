"""P-tuning: a prompt that a small encoder computes (https://arxiv.org/abs/2103.10385)."""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from ..config import PromptLearningConfig
from ..utils.peft_types import PeftType
from .prompt_learning import register
from .room import option
from .tuners_utils import BasePromptEncoder


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


_UNKNOWN_ENCODER = "Prompt encoder type not recognized. Please use one of MLP (recommended) or LSTM."


class PromptEncoder(BasePromptEncoder):
    """A prompt that an MLP or an LSTM computes from embeddings; for inference only the embeddings are kept.

    Args:
        config: the options; `token_dim`, `num_transformer_submodules` and `encoder_hidden_size` have to be set.

    Attributes:
        embedding (`nn.Embedding`): (num_virtual_tokens * num_transformer_submodules, token_dim).
        mlp_head (`nn.Sequential`), lstm_head (`nn.LSTM`): the encoder.

    Raises `ValueError` for another encoder.
    """

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__()
        self.token_dim = self.input_size = self.output_size = width = config.token_dim
        self.hidden_size = hidden = config.encoder_hidden_size
        self.total_virtual_tokens = config.num_virtual_tokens * config.num_transformer_submodules
        self.encoder_type = config.encoder_reparameterization_type
        self.embedding = nn.Embedding(self.total_virtual_tokens, width)
        if config.inference_mode:
            return
        if self.encoder_type == PromptEncoderReparameterizationType.LSTM:
            self.lstm_head = nn.LSTM(
                width,
                hidden,
                num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        elif self.encoder_type == PromptEncoderReparameterizationType.MLP:
            usual = PromptEncoderConfig.encoder_num_layers
            if config.encoder_num_layers != usual:
                warnings.warn(
                    f"for {PromptEncoderReparameterizationType.MLP.value}, the argument `encoder_num_layers` is "
                    f"ignored. Exactly {usual} MLP layers are used."
                )
            self.mlp_head = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
            )
        else:
            raise ValueError(_UNKNOWN_ENCODER)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """The prompt (batch, tokens, token_dim) of virtual tokens (batch, tokens)."""
        x = self.embedding(indices)
        if self.encoder_type == PromptEncoderReparameterizationType.LSTM:
            x, _ = self.lstm_head(x)
        elif self.encoder_type != PromptEncoderReparameterizationType.MLP:
            raise ValueError(_UNKNOWN_ENCODER)
        return self.mlp_head(x)


register("p_tuning", PromptEncoderConfig, PromptEncoder)
