"""Writes docs/methods.md and a page for each method below docs/methods, from the methods' own configs and docstrings:
`python docs/methods.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

from peft_c import get_peft_model
from peft_c.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft_c.tuners.lora.layer import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    LoraLayer,
    MultiheadAttention,
    ParamWrapper,
)
from peft_c.tuners.room import AddRoom, MapRoom, RoomModel
from peft_c.tuners.trainable_tokens import TrainableTokensLayer
from peft_c.tuners.tuners_utils import BasePromptEncoder

HERE = Path(__file__).resolve().parent
INHERITED = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
INHERITED |= {"inference_mode"}
SIZES = (256, 512)
OWN_LAYERS: dict[str, dict[str, type]] = {
    "lora": {"Linear": Linear, "Conv1D": Linear, "Embedding": Embedding, "Conv1d": Conv1d, "Conv2d": Conv2d}
    | {"Conv3d": Conv3d, "MultiheadAttention": MultiheadAttention, "Parameter": ParamWrapper},
    "trainable_tokens": {"Embedding": TrainableTokensLayer, "Linear": TrainableTokensLayer},
}
"""Base layer -> layer class of methods that are not written as rooms."""
LAWS = {
    "adds": "adds a delta to the weight.",
    "maps": "replaces the weight by a function of it.",
    "own": "has its own rules.",
    "prompt": "leaves the weights as they are: virtual tokens are learned, or their keys and values.",
}
NEEDED = {"adalora": {"total_step": 10}, "frod": {"progressbar": False}, "ia3": {"feedforward_modules": []}}
"""Options without which a method cannot be used, or writes to the terminal."""


def rooms_of(name: str, model: type) -> dict[str, type]:
    """Base layer -> layer class of a method."""
    rooms = getattr(model, "rooms", {}) if issubclass(model, RoomModel) else OWN_LAYERS.get(name, {})
    return {kind if isinstance(kind, str) else kind.__name__: room for kind, room in rooms.items()}


def law_of(model: type, rooms: dict[str, type]) -> str:
    if issubclass(model, BasePromptEncoder):
        return "prompt"
    names = (((AddRoom, LoraLayer), "adds"), (MapRoom, "maps"), (object, "own"))
    laws = {next(name for law, name in names if issubclass(room, law)) for room in rooms.values()}
    return ", ".join(sorted(laws)) or "own"


def description(documented: object) -> str:
    """Its docstring, without the list of arguments, on one line."""
    return " ".join((inspect.getdoc(documented) or "").partition("\nArgs:")[0].split())


def first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def parameters(name: str, config: type, rooms: dict[str, type]) -> dict[str, tuple[int, ...]]:
    """The trained parameters of one nn.Linear with the method's defaults; nothing if it does not plug into one."""
    if "Linear" not in rooms and name != "ln_tuning":
        return {}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = config(target_modules=["0"], **NEEDED.get(name, {}))
        model = get_peft_model(nn.Sequential(nn.Linear(*SIZES)), options)
    trained = ((key, p) for key, p in model.named_parameters() if p.requires_grad and p.numel())
    return {re.sub(r"base_model\.(model\.0\.)?|\.default", "", key): tuple(p.shape) for key, p in trained}


def told(shapes: dict[str, tuple[int, ...]]) -> str:
    """One line that names the parameters of a layer, those in a list together."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        groups.setdefault(re.sub(r"\.\d+$", "", name), []).append(shape)
    names = (
        f"`{name}` {' x '.join(map(str, parts[0]))}"
        if len(parts) == 1
        else f"`{name}` {sum(torch.Size(part).numel() for part in parts)} in {len(parts)} parts"
        for name, parts in groups.items()
    )
    return f"Trained for nn.Linear{SIZES}, with these defaults: {', '.join(names)}."


def page(name: str, config: type, model: type, shapes: dict[str, tuple[int, ...]]) -> str:
    """The text of a method's page."""
    module = sys.modules[".".join(config.__module__.split(".")[:3])]  # peft_c.tuners.NAME, a file or a folder
    rooms = rooms_of(name, model)
    lines = [f"# {name}", "", description(module) or description(config), ""]
    for room in dict.fromkeys(rooms.values()):
        lines += [f"`{room.__name__}`: {description(room)}", ""]
    for base in {b for room in rooms.values() for b in room.__mro__[1:3] if b.__module__ == module.__name__}:
        lines += [f"`{base.__name__}`: {description(base)}", ""]
    if issubclass(model, BasePromptEncoder):
        lines += [f"`{model.__name__}`: {first_sentence(description(model))}", ""]
    lines += [f"It {LAWS[law_of(model, rooms)]}{' Base layers: ' + ', '.join(rooms) + '.' if rooms else ''}", ""]
    if shapes:
        lines += [told(shapes), ""]
    lines += [f"Options of `{config.__name__}`:", "", "| option | default | |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        if field.name in INHERITED or not field.init:
            continue
        default = field.default if field.default is not dataclasses.MISSING else "{}"
        help = " ".join(str(field.metadata.get("help", "")).split()).replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{default!r}` | {help} |".replace("`'{}'`", "`{}`"))
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Name below docs -> text: methods.md, with the table, and a page for each method."""
    table = ["| method | config | changes the weight | base layers | parameters |", "|---|---|---|---|---:|"]
    written = {}
    for kind, config in sorted(PEFT_TYPE_TO_CONFIG_MAPPING.items(), key=lambda item: item[0].value):
        model = PEFT_TYPE_TO_TUNER_MAPPING[kind]
        name = kind.value.lower()
        rooms = rooms_of(name, model)
        shapes = parameters(name, config, rooms)
        layers = ", ".join(rooms) or ("" if issubclass(model, BasePromptEncoder) else "see its page")
        count = f"{sum(torch.Size(shape).numel() for shape in shapes.values()):,}" if shapes else ""
        table.append(
            f"| [{name}](methods/{name}.md) | `{config.__name__}` | {law_of(model, rooms)} | {layers} | {count} |"
        )
        written[f"methods/{name}.md"] = page(name, config, model, shapes)
    head = f"""# Methods

Made by `python docs/methods.py` from the configs and docstrings. *adds*: the adapted weight is the base weight
plus a delta; *maps*: it is a function of the base weight; *own*: the method has its own rules; *prompt*: the
weights stay, and virtual tokens are learned, or their keys and values. *parameters*: how many are trained for one
nn.Linear{SIZES}, which has {SIZES[0] * SIZES[1] + SIZES[1]:,}, with the method's defaults.
"""
    return {"methods.md": "\n".join([head, *table, ""]), **written}


def main() -> None:
    (HERE / "methods").mkdir(exist_ok=True)
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
