"""What the methods that learn a prompt have in common: their registration and their start from tokens' embeddings.
How a PeftModel runs them is in `peft_c/prompt_learning.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn

from ..config import PeftConfig
from ..utils.integrations import gather_params_ctx
from ..utils.peft_types import register_peft_method
from .room import documented


def register(name: str, config: type[PeftConfig], encoder: type, parts: tuple[str, ...] = ()) -> None:
    """Register a method's config, and let PEFT's paths (`<method>.config`, `.model`, `parts`) lead to its module."""
    module = sys.modules[config.__module__]
    for part in ("config", "model", *parts):
        sys.modules.setdefault(f"{module.__name__}.{part}", module)
        setattr(module, part, module)
    module.__path__ = []
    config.__doc__ = documented(config)
    register_peft_method(name=name, config_cls=config, model_cls=encoder)


def embedded(word_embeddings: nn.Embedding, token_ids: Sequence[int] | torch.Tensor) -> nn.Parameter:
    """The embeddings of these tokens as a new float32 parameter, (tokens, width)."""
    ids = torch.as_tensor(token_ids, dtype=torch.long).to(word_embeddings.weight.device)
    with gather_params_ctx(word_embeddings.parameters()), torch.no_grad():
        return nn.Parameter(word_embeddings(ids).clone().float())
