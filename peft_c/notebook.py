"""What notebooks show for a PeftModel: its adapters at a glance, and the full `repr` folded away."""

from __future__ import annotations

import html
from typing import Any

from torch import nn

from .status import adapter_layers, adapter_parameters, count_parameters

# Settings worth a column's space, in this order, when a configuration has them.
_SETTINGS = ("r", "lora_alpha", "alpha", "lora_dropout", "use_dora", "use_rslora", "target_modules", "modules_to_save")


def describe(model: nn.Module) -> dict[str, Any]:
    """The facts: classes, parameters, whether adapters are enabled, and per adapter its type, settings, number of
    layers and parameters, and whether it is active, trainable and merged ("partly" when some layers differ)."""
    adapters = {
        name: {
            "type": getattr(config.peft_type, "value", config.peft_type),
            "settings": {key: getattr(config, key) for key in _SETTINGS if getattr(config, key, None)},
            "active": name in model.active_adapters,
            "layers": 0,
            "parameters": 0,
            "grads": set(),
            "merged": set(),
        }
        for name, config in model.peft_config.items()
    }
    enabled, seen = set(), set()
    for _, layer in adapter_layers(model.base_model):
        enabled.add(not layer.disable_adapters)
        for name in adapters.keys() & set(layer._get_available_adapters()):
            adapters[name]["layers"] += 1
            adapters[name]["merged"].add(name in layer.merged_adapters)
        for name, param in adapter_parameters(layer, layer.adapter_layer_names):
            if name in adapters and isinstance(param, nn.Parameter) and (name, id(param)) not in seen:
                seen.add((name, id(param)))
                adapters[name]["parameters"] += param.numel()
                adapters[name]["grads"].add(param.requires_grad)
    for facts in adapters.values():
        for source, target in (("grads", "trainable"), ("merged", "merged")):
            states = facts.pop(source)
            facts[target] = "partly" if len(states) == 2 else True in states
    trainable, total = count_parameters(model)
    return {
        "class": type(model).__name__,
        "base": type(model.get_base_model()).__name__,
        "trainable": trainable,
        "total": total,
        "enabled": "partly" if len(enabled) == 2 else False not in enabled,
        "adapters": adapters,
    }


def _mark(state: bool | str) -> str:
    return state if isinstance(state, str) else "✓" if state else "–"


def _value(value: Any) -> str:
    names = sorted(map(str, value)) if isinstance(value, (set, list, tuple)) else [str(value)]
    text = ", ".join(names)
    return text if len(text) <= 60 else f"{text[:57]}…"


def summary_html(model: nn.Module) -> str:
    """The summary as a table, with the full `repr` below it in a fold."""
    facts = describe(model)
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td style='text-align:left'>{html.escape(cell)}</td>"
            for cell in (
                name,
                str(adapter["type"]),
                _mark(adapter["active"]),
                _mark(adapter["trainable"]),
                _mark(adapter["merged"]),
                str(adapter["layers"]),
                f"{adapter['parameters']:,d}",
                "; ".join(f"{key}={_value(value)}" for key, value in adapter["settings"].items()),
            )
        )
        + "</tr>"
        for name, adapter in facts["adapters"].items()
    )
    heads = ("adapter", "type", "active", "trainable", "merged", "layers", "parameters", "settings")
    header = "".join(f"<th style='text-align:left'>{head}</th>" for head in heads)
    share = 100 * facts["trainable"] / max(facts["total"], 1)
    state = {True: "", False: ", adapters disabled", "partly": ", adapters partly disabled"}[facts["enabled"]]
    return (
        f"<div><b>{html.escape(facts['class'])}</b> around <b>{html.escape(facts['base'])}</b>: "
        f"{facts['total']:,d} parameters, {facts['trainable']:,d} trainable ({share:.4f} %){state}"
        f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"
        f"<details><summary>Modules</summary><pre>{html.escape(repr(model))}</pre></details></div>"
    )
