"""The options of methods that are written as rooms: config fields with their help, of which docstrings are made."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from ..config import PeftConfig
from ..utils.matching import get_end_pattern_key, get_pattern_key
from ..utils.peft_types import PeftType


def option(default: Any, help: str, repr: bool = True, **metadata: Any) -> Any:
    """A config field, shown in the config's repr or not. Mutable defaults are copied for every config.

    metadata: `positive=True` refuses numbers that are not, `choices=(...)` all other values; with `after_dot=True`
    the patterns of an option fit no whole names, as in PEFT.
    """
    metadata = {"help": help, **metadata}
    if isinstance(default, (dict, list, set)):
        return field(default_factory=partial(type(default), default), repr=repr, metadata=metadata)
    return field(default=default, repr=repr, metadata=metadata)


# name -> (default, help) of the options that most methods have
SHARED_OPTIONS: dict[str, tuple[Any, str]] = {
    "target_modules": (
        None,
        "Modules to adapt: a list of names (a module's full name, or its ending), a regular expression for the full "
        "name, or 'all-linear' for every linear layer but the output layer. None: the method's default for the "
        "model's architecture.",
    ),
    "exclude_modules": (None, "Modules not to adapt: names or a regular expression, as in `target_modules`."),
    "modules_to_save": (None, "Further modules to train in full and to save, such as a classification head."),
    "layers_to_transform": (None, "Index or indices of the layers to adapt; None: all. Needs a list of targets."),
    "layers_pattern": (None, "Name of the ModuleList that `layers_to_transform` counts in, if it is an unusual one."),
    "fan_in_fan_out": (False, "Whether the adapted layers store their weight as (in, out), as Conv1D does."),
    "init_weights": (True, "Whether new adapters start as no change; False: at random, for tests."),
    "bias": ("none", "Biases to train: 'none', 'all' of the model's, or '<method>_only', those of adapted layers."),
    "rank_pattern": ({}, "Module name or regular expression -> rank, where it differs from `r`."),
    "projection_prng_key": (0, "Seed of the projections."),
    "save_projection": (
        True,
        "Whether to save the projections; if not, they are drawn again from the seed when loading.",
    ),
    "alpha_pattern": ({}, "Module name or regular expression -> alpha, where it differs from `alpha`."),
}


def shared(name: str, default: Any = None, **metadata: Any) -> Any:
    """The config field of that name in `SHARED_OPTIONS`, with another default if one is given.

    metadata: as `option`, and for methods that, as in PEFT, ignore what others refuse: `layers_to_transform` with
    `beside_regex=True`, `layers_pattern` with `alone=True`.
    """
    usual, help = SHARED_OPTIONS[name]
    return option(usual if default is None else default, help, **metadata)


def pattern_value(pattern: dict[str, Any] | None, key: str, default: Any, after_dot: bool = False) -> Any:
    """The value for the module called `key` in an option such as `rank_pattern`."""
    pattern, find = pattern or {}, get_end_pattern_key if after_dot else get_pattern_key
    return pattern.get(find(pattern.keys(), key), default)


def positive(name: str, value: int) -> int:
    """The value of an option; ValueError unless it is positive."""
    if value <= 0:
        raise ValueError(f"`{name}` should be a positive integer value but the value passed is {value}")
    return value


@dataclass
class RoomConfig(PeftConfig):
    """Base of the methods' configs: what every one of them normalises and checks.

    Raises:
        ValueError: a value that an option's metadata refuses; but for the methods that ignore them,
            `layers_to_transform` or `layers_pattern` beside a regular expression in `target_modules`, or
            `layers_pattern` without `layers_to_transform`.
    """

    method = ""  # the name under which it is registered
    as_sets = ("target_modules", "exclude_modules")  # options whose lists become sets; no option itself

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.method.upper()]
        for name in self.as_sets:
            value = getattr(self, name, None)
            if isinstance(value, list):
                setattr(self, name, set(value))
        layers, pattern = getattr(self, "layers_to_transform", None), getattr(self, "layers_pattern", None)
        metadata: set[str] = set()
        for known in fields(self):
            value, choices = getattr(self, known.name), known.metadata.get("choices")
            metadata.update(known.metadata)
            if known.metadata.get("positive"):
                positive(known.name, value)
            if choices is not None and value not in choices:
                raise ValueError(f"`{known.name}` must be one of {list(choices)}; got {value!r}.")
        if isinstance(getattr(self, "target_modules", None), str) and "beside_regex" not in metadata:
            for name, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
                if value is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if pattern and layers is None and "alone" not in metadata:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")


def documented(config: type) -> str:
    """The docstring of a config class: what it says itself, and the help of its options."""
    options = [field for field in fields(config) if field.init and "help" in field.metadata]
    rows = [
        f"    {field.name} ({getattr(field.type, '__name__', field.type)}): {' '.join(field.metadata['help'].split())}"
        for field in options
    ]
    return "\n".join([inspect.cleandoc(config.__doc__ or ""), "", "Args:", *rows, ""])
