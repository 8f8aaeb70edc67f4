"""Prompt tuning: a learned prompt before the input embeddings (https://arxiv.org/abs/2104.08691)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PromptLearningConfig
from ..utils.peft_types import PeftType
from .prompt_learning import embedded, register
from .room import option
from .tuners_utils import BasePromptEncoder


class PromptTuningInit(str, enum.Enum):
    """What the prompt starts as."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Options of prompt tuning."""

    prompt_tuning_init: PromptTuningInit | str = option(
        PromptTuningInit.RANDOM,
        "What the prompt starts as: TEXT, SAMPLE_VOCAB (embeddings of random tokens) or RANDOM.",
    )
    prompt_tuning_init_text: str | None = option(None, "The text to start with, for TEXT.")
    tokenizer_name_or_path: str | None = option(None, "The tokenizer for that text.")
    tokenizer_kwargs: dict | None = option(None, "Arguments for `AutoTokenizer.from_pretrained`, for TEXT.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        if self.prompt_tuning_init == PromptTuningInit.TEXT:
            if not self.tokenizer_name_or_path:
                self._missing("tokenizer_name_or_path")
            if self.prompt_tuning_init_text is None:
                self._missing("prompt_tuning_init_text")
        elif self.tokenizer_kwargs:
            raise ValueError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")

    def _missing(self, name: str) -> None:
        raise ValueError(f"When prompt_tuning_init='TEXT', {name} can't be {getattr(self, name)}.")


class PromptEmbedding(BasePromptEncoder):
    """A prompt of free embeddings.

    Args:
        config: the options; `num_virtual_tokens`, `token_dim` and `num_transformer_submodules` have to be set.
        word_embeddings: the base model's, for a start from tokens.

    Attributes:
        embedding (`nn.Embedding`): (num_virtual_tokens * num_transformer_submodules, token_dim).
    """

    starts_from_tokens = True

    def __init__(self, config: PromptTuningConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        length = config.num_virtual_tokens * config.num_transformer_submodules
        self.embedding = nn.Embedding(length, config.token_dim)
        if config.inference_mode:  # to be loaded
            return
        if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(0, word_embeddings.num_embeddings, (length,))
            self.embedding.weight = embedded(word_embeddings, ids)
        elif config.prompt_tuning_init == PromptTuningInit.TEXT:
            self.embedding.weight = embedded(word_embeddings, _tokens(config, length))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Embeddings (batch, tokens, token_dim) of virtual tokens (batch, tokens)."""
        return self.embedding(indices)


def _tokens(config: PromptTuningConfig, length: int) -> list[int]:
    """`length` tokens: those of the text, again and again."""
    from transformers import AutoTokenizer

    options: dict[str, Any] = dict(config.tokenizer_kwargs or {})
    options.pop("trust_remote_code", None)  # a checkpoint's config must not run code
    tokens = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)(config.prompt_tuning_init_text)
    ids = tokens["input_ids"]
    return [ids[i % len(ids)] for i in range(length)]


register("prompt_tuning", PromptTuningConfig, PromptEmbedding)
