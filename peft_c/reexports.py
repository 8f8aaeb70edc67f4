"""Names that a module of PEFT has only because it imports them, and that programs take from there all the same."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_HOMES = (
    "tuners.tuners_utils",
    "utils.other",
    "utils.constants",
    "utils.error",
    "utils.integrations",
    "utils.peft_types",
    "utils.quantization_utils",
    "utils.save_and_load",
    "utils.warning",
    "config",
    "import_utils",
    "mapping",
)


def elsewhere(module: str, *more: str, own: Callable[[str], Any] | None = None) -> Callable[[str], Any]:
    """A `__getattr__` for the module of that name: a name that it lacks is looked for in its `own` one, if it has one,
    then in `more` and where PEFT has most of those that its modules share. Raises `AttributeError` where it is in none
    of them."""

    def __getattr__(name: str) -> Any:
        if own is not None:
            with suppress(AttributeError):
                return own(name)
        homes = () if name.startswith("__") else (*more, *_HOMES)
        for home in homes:
            found = importlib.import_module(f"{__package__}.{home}")
            if found.__name__ != module and name in vars(found):
                return vars(found)[name]
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__
