"""RoAd: the outputs are rotated and scaled in pairs (https://arxiv.org/abs/2409.00119)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .room import MapRoom, RoomConfig, RoomModel, option, register, shared

RoadVariant = Literal["road_1", "road_2", "road_4"]
# how often parameters differ: by cosine and sine, and by the two members of a pair
VARIANTS = {"road_1": (1, 1), "road_2": (1, 2), "road_4": (2, 2)}


@dataclass
class RoadConfig(RoomConfig):
    """Options of RoAd. ValueError: an unknown `variant`, or a `group_size` that is no positive even number."""

    variant: str | RoadVariant = option(
        "road_1", "Parameters per pair of outputs: road_1: 2, road_2: 4, road_4: 8.", choices=tuple(VARIANTS)
    )
    group_size: int = option(
        64, "Outputs i and i + group_size / 2 of a group form a pair; has to be even and divide the output size."
    )
    init_weights: bool = shared("init_weights")
    target_modules: list[str] | str | None = shared("target_modules")
    modules_to_save: list[str] | None = shared("modules_to_save")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size <= 0 or self.group_size % 2:
            raise ValueError(f"The group_size must be divisible by 2 when using RoadLayer, but got {self.group_size}.")


class Linear(MapRoom):
    """R W and R b for nn.Linear, where R maps each pair (y, z) of outputs to (c y - s z, s' y + c' z).

    c = alpha cos(theta) and s = alpha sin(theta): in road_1 all four entries share alpha and theta, in road_2 those of
    a row do, in road_4 none.
    """

    returns_input_dtype = False
    adapter_layer_names = ("road_theta", "road_alpha")
    other_param_names = ("variant", "group_size")

    def create(self, name: str, config: RoadConfig) -> None:
        if self.out_features % config.group_size:
            raise ValueError(
                f"The out_features of the base layer must be divisible by group_size ({config.group_size}) when using "
                "RoadLayer."
            )
        self.variant[name], self.group_size[name] = config.variant, config.group_size
        parts, rows = VARIANTS[config.variant]
        size = self.out_features // 2 * parts * rows
        theta, alpha = torch.zeros(size), torch.ones(size)
        if config.init_weights is False:
            nn.init.normal_(theta, mean=0.0, std=0.5)
            nn.init.normal_(alpha, mean=1.0, std=0.5)
        self.road_theta[name], self.road_alpha[name] = nn.Parameter(theta), nn.Parameter(alpha)

    def rotate(self, name: str, y: torch.Tensor) -> torch.Tensor:
        """R applied to the last dimension of y."""
        half = self.group_size[name] // 2
        shape = (self.out_features // (2 * half), *VARIANTS[self.variant[name]], half)
        theta, alpha = (values[name].view(shape).expand(-1, 2, 2, -1) for values in (self.road_theta, self.road_alpha))
        cosine, sine = alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()
        sine = sine * sine.new_tensor([[-1.0], [1.0]])
        exchanged = y.unflatten(-1, (-1, 2, half)).roll(1, -2).flatten(-3)
        return torch.addcmul(y * cosine.flatten(), exchanged, sine.flatten())

    def after(self, name: str, y: torch.Tensor) -> torch.Tensor:
        return self.rotate(name, self._cast_input_dtype(y, self.road_theta[name].dtype))

    def transform(self, name: str, weight: torch.Tensor, bias: Any) -> tuple[torch.Tensor, Any]:
        return self.rotate(name, weight.T).T, None if bias is None else self.rotate(name, bias)


RoadLayer = Linear


class RoadModel(RoomModel):
    """Injects RoAd."""

    rooms = {nn.Linear: Linear}
    unsupported = ValueError


register("road", RoadConfig, RoadModel, mixed=True, parts=("bnb",))
