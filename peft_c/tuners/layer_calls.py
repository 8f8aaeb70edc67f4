"""How PEFT's layers are called, which differs from method to method: the order of arguments, the dtype of deltas."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import nn

# method -> arguments of `update_layer`; those of the constructor behind the base layer. A room that is not here takes
# the adapter's name and the config.
_ORDERS = {
    "adalora": ("adapter_name r lora_alpha config", "adapter_name config r lora_alpha"),
    "adamss": ("adapter_name r config", "adapter_name r config"),
    "boft": ("adapter_name config", "adapter_name config is_target_conv_1d_layer"),
    "c3a": ("adapter_name block_size config", "adapter_name config block_size"),
    "deft": ("adapter_name r config", "adapter_name config r"),
    "delora": ("adapter_name r delora_lambda config", "adapter_name config r delora_lambda"),
    "fourierft": ("adapter_name n_frequency config", "adapter_name config n_frequency"),
    "frod": (
        "adapter_name frod_V frod_s_indices frod_s_size config",
        "frod_V frod_s_indices frod_s_size adapter_name config is_target_conv_1d_layer",
    ),
    "glora": ("adapter_name r config", "adapter_name config"),
    "gralora": ("adapter_name module_name r config", "adapter_name module_name config r"),
    "hira": ("adapter_name r config", "adapter_name config r fan_in_fan_out is_target_conv_1d_layer"),
    "hra": ("adapter_name r config", "adapter_name config r"),
    "ia3": ("adapter_name config", "adapter_name config is_feedforward is_target_conv_1d_layer"),
    "lily": ("adapter_name r config", "adapter_name r config"),
    "ln_tuning": ("layer adapter_name config", "adapter_name config"),
    "loha": ("adapter_name r alpha config", "adapter_name config r alpha"),
    "lokr": ("adapter_name r alpha config", "adapter_name config device dtype r alpha"),
    "miss": ("adapter_name r config inference_mode", "adapter_name config r"),
    "oft": ("adapter_name r config inference_mode", "adapter_name config r fan_in_fan_out is_target_conv_1d_layer"),
    "osf": ("adapter_name effective_rank config", "adapter_name config effective_rank"),
    "peanut": ("adapter_name r config", "adapter_name r config"),
    "poly": ("adapter_name config inference_mode", "adapter_name poly_config"),
    "pvera": ("adapter_name pvera_A pvera_B r config", "pvera_A pvera_B adapter_name r config"),
    "randlora": (
        "adapter_name randlora_A randlora_B r config inference_mode",
        "randlora_A randlora_B adapter_name config r",
    ),
    "road": ("adapter_name config inference_mode", "adapter_name config"),
    "shira": ("adapter_name mask r config inference_mode", "mask adapter_name config r"),
    "tinylora": ("adapter_name tinylora_v v_key r config", "tinylora_v v_key adapter_name config"),
    "unilora": ("adapter_name unilora_theta_d config", "unilora_theta_d adapter_name config"),
    "vblora": (
        "adapter_name vblora_vector_bank r config inference_mode",
        "vblora_vector_bank adapter_name config r",
    ),
    "vera": ("adapter_name vera_A vera_B r config inference_mode", "vera_A vera_B adapter_name config r"),
    "waveft": ("adapter_name n_frequency config", "adapter_name config n_frequency"),
}
# method -> what has the dtype of `get_delta_weight`: the base "weight", or the adapter's "parameters"
DELTA_LIKE = dict.fromkeys(("adamss", "deft", "psoft", "supertuning"), "weight")
DELTA_LIKE |= dict.fromkeys(("pvera", "tinylora", "unilora", "vera"), "parameters")

_USUAL = ("adapter_name config", "adapter_name config")


def argument_orders(method: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the arguments of `update_layer` and of the constructor behind the base layer."""
    update, constructor = _ORDERS.get(method, _USUAL)
    return tuple(update.split()), tuple(constructor.split())


def by_name(call: str, order: tuple[str, ...], values: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, all by name; TypeError where they do not fit."""
    if len(values) > len(order):
        raise TypeError(f"{call} takes {len(order)} arguments by position ({', '.join(order)}), not {len(values)}")
    given = dict(zip(order, values, strict=False))
    for name in given.keys() & named.keys():
        raise TypeError(f"{call} got multiple values for argument '{name}'")
    given |= named
    if "poly_config" in given:  # what PEFT calls it in one constructor
        given["config"] = given.pop("poly_config")
    for name in ("adapter_name", "config"):
        if name not in given:
            raise TypeError(f"{call} missing 1 required argument: '{name}'")
    return given


def settled(
    call: str, wanted: tuple[str, ...] | None, config: Any, named: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The config, with the options that are given by name, and the settings that `create` wants (None: all): those
    that are not given are the config's. What the model's layers share is one setting, `shared`. Other plain values
    mean nothing.
    """
    if wanted is None or named.keys() == set(wanted):
        return config, named
    settings = {name: named.pop(name) for name in wanted if name in named}
    if "shared" in wanted and "shared" not in settings:
        settings["shared"] = {name: named.pop(name) for name in list(named) if isinstance(named[name], nn.Module)}
    for name, value in named.items():
        if isinstance(value, (nn.Module, torch.Tensor)):
            raise TypeError(f"{call} does not take '{name}'")
    changed = {name: value for name, value in named.items() if getattr(config, name, value) != value}
    for name in wanted:
        if name not in settings and hasattr(config, name):
            settings[name] = getattr(config, name)
    if changed:
        config = copy(config)
        vars(config).update(changed)
    return config, settings
