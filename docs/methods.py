"""Writes docs/methods.md from the methods' own configs and docstrings: `python docs/methods.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path

from peft_c.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft_c.tuners.room import AddRoom, MapRoom, RoomModel

HERE = Path(__file__).resolve().parent
INHERITED = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
INHERITED |= {"inference_mode"}


def rooms_of(model: type) -> dict[str, type]:
    """Base layer -> layer class of a method that is written as rooms."""
    rooms = getattr(model, "rooms", {}) if issubclass(model, RoomModel) else {}
    return {kind if isinstance(kind, str) else kind.__name__: room for kind, room in rooms.items()}


def law_of(rooms: dict[str, type]) -> str:
    names = ((AddRoom, "adds"), (MapRoom, "maps"), (object, "own"))
    laws = {next(name for law, name in names if issubclass(room, law)) for room in rooms.values()}
    return ", ".join(sorted(laws)) or "own"


def first_sentence(text: str | None) -> str:
    return re.split(r"(?<=\.)\s", " ".join((text or "").split()), maxsplit=1)[0]


def section(name: str, config: type, model: type) -> str:
    module = sys.modules[config.__module__ if config.__module__.count(".") == 2 else model.__module__]
    rooms = rooms_of(model)
    lines = [f"## {name}", "", " ".join((inspect.getdoc(module) or inspect.getdoc(config) or "").split()), ""]
    for room in dict.fromkeys(rooms.values()):
        lines += [f"`{room.__name__}`: {' '.join((inspect.getdoc(room) or '').split())}", ""]
    for base in {b for room in rooms.values() for b in room.__mro__[1:3] if b.__module__ == module.__name__}:
        lines += [f"`{base.__name__}`: {' '.join((inspect.getdoc(base) or '').split())}", ""]
    lines += [f"Options of `{config.__name__}`:", "", "| option | default | |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        if field.name in INHERITED or not field.init:
            continue
        default = field.default if field.default is not dataclasses.MISSING else "{}"
        help = " ".join(str(field.metadata.get("help", "")).split()).replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{default!r}` | {help} |".replace("`'{}'`", "`{}`"))
    return "\n".join(lines) + "\n"


def main() -> None:
    table = ["| method | config | changes the weight | base layers |", "|---|---|---|---|"]
    sections = []
    for kind, config in sorted(PEFT_TYPE_TO_CONFIG_MAPPING.items(), key=lambda item: item[0].value):
        model = PEFT_TYPE_TO_TUNER_MAPPING[kind]
        name = kind.value.lower()
        rooms = rooms_of(model)
        layers = ", ".join(rooms) or "see below"
        table.append(f"| [{name}](#{name}) | `{config.__name__}` | {law_of(rooms)} | {layers} |")
        sections.append(section(name, config, model))
    head = """# Methods

Made by `python docs/methods.py` from the configs and docstrings. *adds*: the adapted weight is the base weight
plus a delta; *maps*: it is a function of the base weight; *own*: the method has its own rules.
"""
    (HERE / "methods.md").write_text("\n".join([head, *table, "", *sections]), encoding="utf-8")


if __name__ == "__main__":
    main()
