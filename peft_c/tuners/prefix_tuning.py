"""Prefix tuning: learned keys and values before those of each layer (https://arxiv.org/abs/2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..config import PromptLearningConfig
from ..utils.peft_types import PeftType
from .prompt_learning import register
from .room import option
from .tuners_utils import BasePromptEncoder


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Options of prefix tuning."""

    init_weights: Literal["zero"] | None = option(None, 'None: start at random; "zero": start without effect.')
    encoder_hidden_size: int = option(None, "Width of the projection.")
    prefix_projection: bool = option(False, "Whether a small network computes the prefix.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING


class PrefixEncoder(BasePromptEncoder):
    """Keys and values of all layers for each virtual token, free or computed by a small network.

    Args:
        config: the options; `num_layers`, `token_dim` and with a projection `encoder_hidden_size` have to be set.

    Attributes:
        embedding (`nn.Embedding`): the prefix itself, (num_virtual_tokens, num_layers * 2 * token_dim); with a
            projection its input, (num_virtual_tokens, token_dim).
        transform (`nn.Sequential`): the projection.
    """

    fills_cache = True

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        self.prefix_projection = config.prefix_projection
        width = config.num_layers * 2 * config.token_dim
        if self.prefix_projection and not config.inference_mode:
            self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)
            self.transform = nn.Sequential(
                nn.Linear(config.token_dim, config.encoder_hidden_size),
                nn.Tanh(),
                nn.Linear(config.encoder_hidden_size, width),
            )
            last = self.transform[-1]
        else:
            self.embedding = last = nn.Embedding(config.num_virtual_tokens, width)
        if config.init_weights == "zero":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, prefix: torch.Tensor) -> torch.Tensor:
        """The prefix (batch, tokens, num_layers * 2 * token_dim) of virtual tokens (batch, tokens)."""
        embeddings = self.embedding(prefix)
        return self.transform(embeddings) if self.prefix_projection else embeddings

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """Takes over a prefix (num_virtual_tokens, num_layers * 2 * token_dim).

        Raises `ValueError` for another shape, and with a projection, which cannot be inverted.
        """
        if self.prefix_projection:
            raise ValueError("Cannot load flattened prompt embeddings when `prefix_projection=True`.")
        weight = self.embedding.weight
        if prompt_embeddings.shape != weight.shape:
            raise ValueError(
                f"Invalid `prompt_embeddings` shape. Expected {tuple(weight.shape)}, got "
                f"{tuple(prompt_embeddings.shape)}."
            )
        with torch.no_grad():
            weight.copy_(prompt_embeddings)


register("prefix_tuning", PrefixTuningConfig, PrefixEncoder)
