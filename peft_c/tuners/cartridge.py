"""The config of cartridges: a trained key-value cache before the input (https://arxiv.org/abs/2506.06266)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import PromptLearningConfig
from ..utils.peft_types import PeftType
from .prompt_learning import MissingEncoder, not_available, register
from .room import option


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


class CartridgeEncoder(MissingEncoder):
    """PEFT's encoder for cartridges."""


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> torch.Tensor:
    """Raises NotImplementedError."""
    not_available("prompt_embeddings_from_past_key_values")


def initialize_kv_prefix_from_past_key_values(
    model, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> torch.Tensor:
    """Raises NotImplementedError."""
    not_available("initialize_kv_prefix_from_past_key_values")


def initialize_kv_prefix_from_text(
    model,
    tokenizer,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> torch.Tensor:
    """Raises NotImplementedError."""
    not_available("initialize_kv_prefix_from_text")


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Raises NotImplementedError."""
    not_available("compose_cartridge_adapters")


register("cartridge", CartridgeConfig, CartridgeEncoder, parts=("utils",))
