"""Lily: low-rank factors that layers share, mixed by a router of each layer (https://arxiv.org/abs/2407.09946)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from .law import LowRank
from .room import AddRoom, RoomConfig, RoomModel, kaiming, linear, option, positive, register, shared


@dataclass
class LilyConfig(RoomConfig):
    """Options of Lily. ValueError: `stride_A` is less than 1 or `num_B` less than 2."""

    r: int = option(32, "Rank; as factors are shared, 2 to 4 times what LoRA would have.")
    stride_A: int = option(1, "Number of neighbouring layers that share one A.")
    num_B: int = option(2, "Number of factors B, which all layers share and each router mixes.")
    scaling: float = option(1.0, "Factor of the adapter's output.")
    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    modules_to_save: list[str] | None = shared("modules_to_save")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform", beside_regex=True)
    layers_pattern: list[str] | str | None = shared("layers_pattern")
    init_weights: bool = shared("init_weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride_A < 1:
            raise ValueError("`stride_A` must be at least 1.")
        if self.num_B < 2:
            raise ValueError("`num_B` must be at least 2 for the router to be trained.")


class Linear(AddRoom):
    """x -> scaling * h (sum_e p_e B_e) for nn.Linear, with h = A x, A (r, in), B_e (r, out).

    p is the mean of softmax(router h) over all tokens: it depends on the input, so there is no weight to merge into.
    """

    converts_to_lora = False
    returns_input_dtype = False
    adapter_layer_names = ("lily_A", "lily_B", "lily_router")
    other_param_names = ("r", "scaling", "stride_A", "num_B")
    containers = dict.fromkeys(adapter_layer_names, nn.ModuleDict)
    never_merged = "This method is not supported for Lily."

    def create(self, name: str, config: LilyConfig) -> None:
        r, num_B = positive("r", config.r), config.num_B
        self.r[name], self.scaling[name] = r, config.scaling
        self.stride_A[name], self.num_B[name] = config.stride_A, num_B
        A = nn.Linear(self.in_features, r, bias=False)
        B = nn.Linear(self.out_features, num_B * r, bias=False)
        router = nn.Linear(r, num_B, bias=False)
        if config.init_weights:
            nn.init.zeros_(B.weight)
        for layer in (A, router) if config.init_weights else (A, router, B):
            kaiming(layer.weight)
        self.lily_A[name], self.lily_B[name], self.lily_router[name] = A, B, router

    def low_rank(self, name: str) -> LowRank:
        raise NotImplementedError(self.never_merged)

    def halves(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = linear(x, self.lily_A[name].weight)
        B = self.lily_B[name].weight.view(self.num_B[name], -1, self.out_features)
        shares = self.lily_router[name](hidden).softmax(-1).reshape(-1, len(B)).mean(0)
        return hidden, (shares @ B.flatten(1)).view_as(B[0]) * self.scaling[name]


LilyLayer = Linear


class LilyModel(RoomModel):
    """Injects Lily."""

    rooms = {nn.Linear: Linear}
    unsupported = NotImplementedError

    def _post_injection_hook(self, model: nn.Module, config: LilyConfig, adapter_name: str) -> None:
        """Let the layers of one target and shape share all B, and groups of `stride_A` of them A."""
        targets, groups = config.target_modules, defaultdict(list)
        for key, layer in model.named_modules():
            if not isinstance(layer, Linear) or adapter_name not in layer.lily_A:
                continue
            fitting = [targets] if isinstance(targets, str) else [name for name in targets if key.endswith(name)]
            if fitting:
                groups[max(fitting, key=len), layer.get_base_layer().weight.shape].append(layer)
        for layers in groups.values():
            for i, layer in enumerate(layers):
                layer.lily_A[adapter_name] = layers[i - i % config.stride_A].lily_A[adapter_name]
                layer.lily_B[adapter_name] = layers[0].lily_B[adapter_name]


register("lily", LilyConfig, LilyModel)
