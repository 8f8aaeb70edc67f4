"""PEANuT: a small network computes the delta from the base weight (https://arxiv.org/abs/2410.01870)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .law import LowRank
from .room import AddRoom, RoomConfig, RoomModel, kaiming, option, product, register, shared

ACTIVATIONS = {name: getattr(F, name) for name in ("relu", "relu6", "gelu", "silu", "mish", "tanh", "sigmoid")}


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation function of that name: one of `ACTIVATIONS`, or of transformers' where it is installed.

    Raises:
        ValueError: no such function.
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    try:
        from transformers.activations import ACT2FN as known
    except ImportError:
        known = ACTIVATIONS
    if name not in known:
        raise ValueError(f"Unsupported `act_fn`: {name}. Must be one of {sorted(known)}.")
    return known[name]


@dataclass
class PeanutConfig(RoomConfig):
    """Options of PEANuT. ValueError: `r` is not positive, `depth` is negative, or `act_fn` is unknown."""

    r: int = option(32, "Width of the network, which is the rank of the delta.", positive=True)
    depth: int = option(0, "Number of hidden layers in the encoder, and in the decoder.")
    act_fn: str = option("relu", "Activation function of the network, by transformers' name for it.")
    scaling: float = option(1.0, "Factor of the delta.")
    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    modules_to_save: list[str] | None = shared("modules_to_save")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform", beside_regex=True)
    layers_pattern: list[str] | str | None = shared("layers_pattern")
    init_weights: bool = shared("init_weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 0:
            raise ValueError("`depth` can only be a non-negative integer.")
        activation(self.act_fn)


class Linear(AddRoom):
    """scaling * B H^T for nn.Linear, B (out, r), where H (in, r) is computed from the base weight W.

    H_0 = f(W^T A^T) with A (r, out); encoders H_i+1 = f(E_i H_i); decoders H = f(D_i H) + what the encoder of the same
    depth was given, the innermost first.
    """

    converts_to_lora = False
    factored = math.inf
    returns_input_dtype = False
    adapter_layer_names = ("peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders")
    other_param_names = ("r", "depth", "scaling", "act_fn", "res_num")
    containers = dict.fromkeys(adapter_layer_names, nn.ModuleDict)

    def create(self, name: str, config: PeanutConfig) -> None:
        r, depth = config.r, config.depth
        self.r[name], self.depth[name], self.res_num[name] = r, depth, depth
        self.scaling[name], self.act_fn[name] = config.scaling, config.act_fn
        A = nn.Linear(self.out_features, r, bias=False)
        encoders, decoders = (
            nn.ModuleList(nn.Linear(r, r, bias=False) for _ in range(depth)) for _ in ("encoders", "decoders")
        )
        B = nn.Linear(r, self.out_features, bias=False)
        if config.init_weights:
            nn.init.zeros_(B.weight)
        for layer in (A, *encoders, *decoders) if config.init_weights else (A, *encoders, *decoders, B):
            kaiming(layer.weight)
        self.peanut_A[name], self.peanut_B[name] = A, B
        self.peanut_encoders[name], self.peanut_decoders[name] = encoders, decoders

    def low_rank(self, name: str) -> LowRank:
        A, f = self.peanut_A[name].weight, activation(self.act_fn[name])
        hidden = f(product(A, self.bare_weight().to(A.dtype)).T)
        given = []
        for encoder in self.peanut_encoders[name]:
            given.append(hidden)
            hidden = f(encoder(hidden))
        for decoder in self.peanut_decoders[name]:
            hidden = f(decoder(hidden)) + given.pop()
        return LowRank(hidden.T, self.peanut_B[name].weight, self.scaling[name])


PeanutLayer = Linear


class PeanutModel(RoomModel):
    """Injects PEANuT."""

    rooms = {nn.Linear: Linear}
    unsupported = NotImplementedError

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for container in ("peanut_encoders", "peanut_decoders"):
            if f".{container}.{adapter_name}." in key:
                return key.replace(f".{container}.{adapter_name}.", f".{container}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)


register("peanut", PeanutConfig, PeanutModel)
