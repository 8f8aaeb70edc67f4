"""Cartridges: a trained key-value cache before the input (https://arxiv.org/abs/2506.06266)."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from ..config import PromptLearningConfig
from ..utils.peft_types import PeftType
from .cartridge_utils import (  # noqa: F401
    compose_cartridge_adapters,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)
from .prompt_learning import register
from .room import option
from .tuners_utils import BasePromptEncoder


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """Options of cartridges."""

    num_frozen_tokens: int = option(1, "How many tokens at the start of the cartridge stay as they are.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CARTRIDGE
        if self.num_frozen_tokens < 0:
            raise ValueError(f"`num_frozen_tokens` must be >= 0, got {self.num_frozen_tokens}.")
        if self.num_virtual_tokens is not None and self.num_frozen_tokens > self.num_virtual_tokens:
            raise ValueError(
                "`num_frozen_tokens` must be <= `num_virtual_tokens`, got "
                f"num_frozen_tokens={self.num_frozen_tokens} and num_virtual_tokens={self.num_virtual_tokens}."
            )


class CartridgeEncoder(BasePromptEncoder):
    """Keys and values of all layers for each virtual token, of which the first ones may be frozen.

    Args:
        config: the options; `num_layers` and `token_dim` have to be set.

    Attributes:
        frozen_embedding (`nn.Parameter` or None): (num_frozen_tokens, num_layers * 2 * token_dim).
        trainable_embedding (`nn.Parameter`): the rest, (num_trainable_tokens, num_layers * 2 * token_dim).

    Raises `ValueError` when more tokens are frozen than there are.
    """

    fills_cache = True

    def __init__(self, config: CartridgeConfig) -> None:
        super().__init__()
        self.config = config
        frozen, total = int(config.num_frozen_tokens), config.num_virtual_tokens
        if not 0 <= frozen <= total:
            raise ValueError(
                f"`num_frozen_tokens` must be in [0, num_virtual_tokens], got {frozen} for num_virtual_tokens={total}."
            )
        self.num_frozen_tokens, self.num_trainable_tokens = frozen, total - frozen
        width = config.num_layers * 2 * config.token_dim
        self.frozen_embedding = nn.Parameter(torch.empty(frozen, width), requires_grad=False) if frozen else None
        self.trainable_embedding = nn.Parameter(
            torch.empty(self.num_trainable_tokens, width), requires_grad=not config.inference_mode
        )
        self.reset_parameters()

    @property
    def embedding(self) -> SimpleNamespace:
        """An object whose `weight` is that of this encoder, as other encoders' embedding has it."""
        return SimpleNamespace(weight=self.weight)

    @property
    def weight(self) -> torch.Tensor:
        """The whole cartridge, (num_virtual_tokens, num_layers * 2 * token_dim)."""
        if self.frozen_embedding is None:
            return self.trainable_embedding
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    def reset_parameters(self) -> None:
        """Draws all numbers anew, from the standard normal distribution."""
        for parameter in (self.frozen_embedding, self.trainable_embedding):
            if parameter is not None:
                nn.init.normal_(parameter)

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """Takes over a cartridge (num_virtual_tokens, num_layers * 2 * token_dim); `ValueError` for another length."""
        frozen, total = self.num_frozen_tokens, self.num_frozen_tokens + self.num_trainable_tokens
        if prompt_embeddings.ndim != 2 or len(prompt_embeddings) != total:
            raise ValueError(
                f"Invalid `prompt_embeddings` shape. Expected ({total}, hidden), got {tuple(prompt_embeddings.shape)}."
            )
        if self.frozen_embedding is not None:
            self.frozen_embedding.copy_(prompt_embeddings[:frozen])
        self.trainable_embedding.copy_(prompt_embeddings[frozen:])

    def forward(self, prefix_tokens: torch.Tensor) -> torch.Tensor:
        """The cartridge (batch, num_virtual_tokens, num_layers * 2 * token_dim) for virtual tokens (batch, tokens)."""
        return self.weight.expand(len(prefix_tokens), -1, -1)

    def _load_adapter_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        self.load_prompt_embeddings(state_dict["prompt_embeddings"])


register("cartridge", CartridgeConfig, CartridgeEncoder, parts=("utils",))
