"""TinyLoRA: a small vector mixes random matrices between a weight's singular vectors (https://arxiv.org/abs/2602.04118)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ._buffer_dict import BufferDict
from .law import LowRank
from .room import State, option, positive, register, shared, weight_view
from .shared_room import ProjectionConfig, SharedRoom, SharedRoomModel, check_projections, wide


@dataclass
class TinyLoraConfig(ProjectionConfig):
    """Options of TinyLoRA."""

    random, seed = "projection tensors P", "projection_seed"
    restored = ". They will be restored using the PRNG key stored in"
    r: int = option(2, "Number of singular vectors of each layer's weight.", positive=True)
    u: int = option(64, "Number of trained values of each group of layers.", positive=True)
    weight_tying: float = option(0.0, "From 0.0, each layer has values of its own, to 1.0, all layers share them.")
    projection_seed: int = option(42, "Seed of the random matrices; a layer's number is added to it.")
    save_projection: bool = shared("save_projection")
    init_v_bound: float = option(0.02, "Bound of the uniform distribution of the initial values.")
    target_modules: list[str] | str | None = shared("target_modules")
    tinylora_dropout: float = option(0.0, "Probability of dropping an input feature of the adapter in training.")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")
    init_weights: bool | str = option(True, "True: start with zeros (no change); 'uniform' or False: uniform values.")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform", beside_regex=True)
    layers_pattern: list[str] | str | None = shared("layers_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight_tying <= 1:
            raise ValueError(
                f"`weight_tying` should be a float between 0.0 and 1.0 but the value passed is {self.weight_tying}"
            )


class TinyLoraLayer(SharedRoom):
    """B R A with R = sum_i v[i] P[i]: A (r, in) and B (out, r) are the first singular vectors, each times the root of
    the singular value, P (u, r, r) is random, v (u,) is trained and shared by the layers of a group."""

    factored = math.inf
    adapter_layer_names = shared_param_names = ("tinylora_v",)
    other_param_names = ("tinylora_A", "tinylora_B", "tinylora_P", "tinylora_dropout", "r", "u", "_tinylora_v_key")
    containers = dict.fromkeys(other_param_names[:3], partial(BufferDict, persistent=True))
    own, dropout, _layer_idx = "tinylora_A", "tinylora_dropout", 0

    def create(self, name: str, config: TinyLoraConfig, shared: Any, v_key: str, layer_idx: int | None = None) -> None:
        self.share(shared)
        self._layer_idx = self._layer_idx if layer_idx is None else layer_idx
        self._tinylora_v_key[name], self.u[name] = v_key, config.u
        self.add_dropout(name, config.tinylora_dropout)
        weight = weight_view(self.get_base_layer()).matrix().detach()
        U, S, V = torch.linalg.svd(weight.float(), full_matrices=False)
        r = self.r[name] = min(positive("r", config.r), len(S))
        U, S, V = (part.to(weight.dtype) for part in (U[:, :r], S[:r], V[:r]))
        self.tinylora_A[name] = (S.sqrt()[:, None] * V).contiguous()
        self.tinylora_B[name] = (U * S.sqrt()).contiguous()
        generator = torch.Generator().manual_seed(config.projection_seed + self._layer_idx)
        self.tinylora_P.persistent = config.save_projection
        self.tinylora_P[name] = torch.normal(0.0, 1 / r**0.5, size=(config.u, r, r), generator=generator)

    def parts(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A, B, R."""
        v = wide(self.tinylora_v[name][self._tinylora_v_key[name]])
        A, B, P = (getattr(self, part)[name].to(v.device, v.dtype) for part in self.other_param_names[:3])
        return A, B, (v @ P.flatten(1)).view(P.shape[1:])

    def low_rank(self, name: str) -> LowRank:
        A, B, R = self.parts(name)
        return LowRank(A, B @ R, 1.0)


class Linear(TinyLoraLayer, nn.Linear):
    """TinyLoRA for nn.Linear and Conv1D."""


class Embedding(TinyLoraLayer):
    """TinyLoRA for nn.Embedding."""

    def term(self, name: str, x: torch.Tensor) -> torch.Tensor:
        A, B, R = self.parts(name)
        return self.tinylora_dropout[name](F.embedding(x, B)) @ R @ A


class TinyLoraModel(SharedRoomModel):
    """Injects TinyLoRA."""

    rooms = {nn.Linear: Linear, "Conv1D": Linear, nn.Embedding: Embedding}
    equal = {"save_projection": "TinyLoRA projection tensors must be saved for all adapters or none"}
    unequal = TypeError

    def _pre_injection_hook(self, model: nn.Module, config: TinyLoraConfig, adapter_name: str) -> None:
        self.tinylora_v = nn.ModuleDict()
        self._target_key_to_idx: dict[str, dict[str, int]] = {}

    def settings_of(self, name: str, config: TinyLoraConfig, key: str, base: nn.Module) -> dict[str, Any]:
        if name not in self.tinylora_v or key not in self._target_key_to_idx[name]:
            self._target_key_to_idx[name] = {target: i for i, (target, _) in enumerate(self.targets(config))}
        index, count = self._target_key_to_idx[name][key], len(self._target_key_to_idx[name])
        groups = max(1, round(count * (1 - config.weight_tying)))
        group = str(min(index // max(1, count // groups), groups - 1))
        if name not in self.tinylora_v:
            self.tinylora_v[name] = nn.ParameterDict()
        if group not in self.tinylora_v[name]:
            v = torch.zeros(config.u, dtype=base.weight.dtype)
            if config.init_weights is not True:
                nn.init.uniform_(v, -config.init_v_bound, config.init_v_bound)
            self.tinylora_v[name][group] = nn.Parameter(v)
        return {"shared": {"tinylora_v": self.tinylora_v}, "v_key": group, "layer_idx": index}

    def delete_adapter(self, adapter_name: str) -> None:
        """As for other methods, with the values that the layers shared."""
        super().delete_adapter(adapter_name)
        self.tinylora_v.pop(adapter_name)

    def _init_tinylora_v(self, config: TinyLoraConfig, adapter_name: str) -> None:
        """Give the values of an adapter uniform random ones."""
        for v in self.tinylora_v[adapter_name].values() if adapter_name in self.tinylora_v else ():
            nn.init.uniform_(v, -config.init_v_bound, config.init_v_bound)

    @classmethod
    def saving(cls, model: nn.Module, config: TinyLoraConfig, name: str, state: State, own: State) -> State:
        P, v, own_v = ".tinylora_P.", "base_model.tinylora_v.", f"base_model.tinylora_v.{name}."
        layers = (key for key in state if cls.prefix in key and ".tinylora_v." not in key)
        selected = {key: state[key] for key in layers if P not in key}
        selected |= {key.replace(own_v, v, 1): state[key] for key in state if key.startswith(own_v)}
        if config.save_projection:
            selected |= {key: state[key] for key in state if P in key and name in key}
        return selected | cls._get_learnable_bias_state_dict(model, state, config)

    @classmethod
    def loading(cls, model: nn.Module, config: TinyLoraConfig, name: str, saved: State) -> State:
        present = any(".tinylora_P." in key for key in saved)
        check_projections("tinylora_P", config.save_projection, present, required=False)
        return saved


register("tinylora", TinyLoraConfig, TinyLoraModel)
