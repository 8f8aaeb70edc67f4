"""The config of prompt tuning: a learned prompt before the input embeddings (https://arxiv.org/abs/2104.08691)."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..config import PromptLearningConfig
from ..utils.peft_types import PeftType
from .prompt_learning import MissingEncoder, register
from .room import option


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


class PromptEmbedding(MissingEncoder):
    """PEFT's prompt for prompt tuning."""


register("prompt_tuning", PromptTuningConfig, PromptEmbedding)
