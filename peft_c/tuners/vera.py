"""VeRA: LoRA with random frozen matrices that all layers share, and trained scales (https://arxiv.org/abs/2310.11454)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .law import LowRank
from .room import linear, option, positive, register, rows_of, shared
from .shared_room import ProjectionConfig, SavedProjectionModel, SharedRoom, drawn, wide


@dataclass
class VeraConfig(ProjectionConfig):
    """Options of VeRA."""

    random = "vera_A and vera_B"
    r: int = option(256, "Rank; larger than for LoRA, as only r + out_features numbers a layer are trained.")
    target_modules: list[str] | str | None = shared("target_modules")
    projection_prng_key: int = shared("projection_prng_key")
    save_projection: bool = shared("save_projection")
    vera_dropout: float = option(0.0, "Probability of dropping an input feature of the adapter in training.")
    d_initial: float = option(0.1, "Initial value of lambda_d; smaller ones such as 1e-7 may train better.")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")
    init_weights: bool = shared("init_weights")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform", beside_regex=True)
    layers_pattern: list[str] | str | None = shared("layers_pattern")


class Linear(SharedRoom):
    """diag(b) B diag(d) A with A (r, in), B (out, r), which are the corners of the
    shared matrices, and the trained b (out,), which starts at zero, and d (r,)."""

    adapter_layer_names = ("vera_lambda_b", "vera_lambda_d")
    other_param_names = ("vera_A", "vera_B", "vera_dropout", "r")
    own, dropout = "vera_lambda_d", "vera_dropout"

    def create(self, name: str, config: VeraConfig, shared: dict[str, nn.Module]) -> None:
        self.share(shared)
        self.r[name] = positive("r", config.r)
        self.add_dropout(name, config.vera_dropout)
        b, d = torch.ones(self.out_features), torch.randn(config.r)
        if config.init_weights:
            b, d = torch.zeros_like(b), torch.full_like(d, config.d_initial)
        self.vera_lambda_b[name], self.vera_lambda_d[name] = nn.Parameter(b), nn.Parameter(d)

    def parts(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A, d, B, b on the device of d."""
        d, b = self.vera_lambda_d[name], self.vera_lambda_b[name]
        A, B = self.vera_A[name][:, : self.in_features], self.vera_B[name][: self.out_features]
        return A.to(d.device), d, B.to(d.device), b

    def low_rank(self, name: str) -> LowRank:
        A, d, B, b = map(wide, self.parts(name))
        return LowRank(d[:, None] * A, b[:, None] * B, 1.0)

    def dense(self, name: str, x: torch.Tensor) -> bool:
        return x.dtype == torch.float32 and self.is_long(x)

    def halves(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        A, d, B, b = self.parts(name)
        inner, many = d * linear(x, A), rows_of(x) > self.r[name]  # then B is less to scale than the output
        return (inner, (b.unsqueeze(1) * B).T) if many else (linear(inner, B), b)


VeraLayer = Linear


class VeraModel(SavedProjectionModel):
    """Injects VeRA."""

    prefix = "vera_lambda_"
    rooms = {nn.Linear: Linear, "Conv1D": Linear}
    title, key = "VeRA", "Vera PRNG initialisation key"
    projections = ("vera_A", "vera_B")

    def draw(self, config: VeraConfig, out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        return drawn(config.projection_prng_key, (config.r, in_features), (out_features, config.r))


register("vera", VeraConfig, VeraModel)
