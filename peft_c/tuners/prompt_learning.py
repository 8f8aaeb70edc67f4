"""What the methods that learn a prompt have in common here: their configs are made, saved and loaded as PEFT's, and
whatever would run the methods says that it is not there."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from ..config import PeftConfig
from ..utils.peft_types import register_peft_method
from .room import documented
from .tuners_utils import BasePromptEncoder


def not_available(name: str) -> NoReturn:
    """NotImplementedError that names what was asked for."""
    raise NotImplementedError(
        f"{name} belongs to a prompt-learning method, and peft_c has their configurations only. Methods that adapt "
        "layers, such as LoRA, are available."
    )


class MissingEncoder(BasePromptEncoder):
    """The name of one of PEFT's prompt encoders; making one raises NotImplementedError."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        not_available(type(self).__name__)


def register(name: str, config: type[PeftConfig], encoder: type, parts: tuple[str, ...] = ()) -> None:
    """Register a method's config, and let PEFT's paths (`<method>.config`, `.model`, `parts`) lead to its module."""
    module = sys.modules[config.__module__]
    for part in ("config", "model", *parts):
        sys.modules.setdefault(f"{module.__name__}.{part}", module)
        setattr(module, part, module)
    module.__path__ = []
    config.__doc__ = documented(config)
    register_peft_method(name=name, config_cls=config, model_cls=encoder)
