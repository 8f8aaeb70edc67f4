"""Finding the plain linear layers that a config targets, for what has to look at a model before it is adapted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def conv1d_types() -> tuple[type, ...]:
    """transformers' Conv1D, whose weight is (in, out), if anything can be one."""
    module = sys.modules.get("transformers.pytorch_utils")
    return () if module is None else (module.Conv1D,)


def linear_types() -> tuple[type, ...]:
    return (nn.Linear, *conv1d_types())


def targeted_linears(model: nn.Module, config: Any) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each nn.Linear and Conv1D that `config.target_modules` covers."""
    from peft_c.tuners.tuners_utils import check_target_module_exists

    types = linear_types()
    for name, module in model.named_modules():
        if isinstance(module, types) and check_target_module_exists(config, name):
            yield name, module


def first_device(model: nn.Module) -> torch.device:
    """Where the first parameter is; looks through wrappers such as DataParallel."""
    return next(getattr(model, "module", model).parameters()).device


def load_cache(path: str | None, model: nn.Module) -> dict | None:
    """The dict saved at `path`, on the model's device; None if there is no such file or it is empty."""
    if path is None or not os.path.exists(path) or not os.path.getsize(path):
        return None
    return torch.load(path, map_location=first_device(model))


def save_cache(path: str | None, values: dict) -> None:
    """Save unless `path` is None, making its folder."""
    if path is not None:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        torch.save(values, path)
