"""PVeRA: VeRA whose inner activations are sampled from a normal distribution (https://arxiv.org/abs/2512.07703)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .law import LowRank
from .room import linear, option, positive, register, shared
from .shared_room import ProjectionConfig, SavedProjectionModel, SharedRoom, drawn, wide


@dataclass
class PveraConfig(ProjectionConfig):
    """Options of PVeRA."""

    random = "pvera_A and pvera_B"
    r: int = option(256, "Rank; larger than for LoRA, as only 2 r + out_features numbers a layer are trained.")
    target_modules: list[str] | str | None = shared("target_modules")
    projection_prng_key: int = shared("projection_prng_key")
    save_projection: bool = shared("save_projection")
    pvera_dropout: float = option(0.0, "Probability of dropping an input feature of the adapter in training.")
    d_initial: float = option(0.1, "Initial value of lambda_d; smaller ones such as 1e-7 may train better.")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")
    init_weights: bool = shared("init_weights")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform", beside_regex=True)
    layers_pattern: list[str] | str | None = shared("layers_pattern")
    sample_at_inference: bool = option(False, "Whether to sample in eval mode, too; if not, the mean is used.")
    generator_seed: int | None = option(None, "Seed of the sampling; None: torch's global generator.")


class Linear(SharedRoom, nn.Linear):
    """diag(b) B z with mean and log variance of z given by the halves of diag(d) A x: A (2 r, in), B (out, r) are the
    corners of the shared matrices, b (out,), which starts at zero, and d (2 r,) are trained. Merged: z is its mean."""

    adapter_layer_names = ("pvera_lambda_b", "pvera_lambda_d")
    other_param_names = ("pvera_A", "pvera_B", "pvera_dropout", "r", "sample_at_inference", "pvera_generator")
    own, dropout = "pvera_lambda_d", "pvera_dropout"
    converts_to_lora = False

    def create(self, name: str, config: PveraConfig, shared: dict[str, nn.Module]) -> None:
        self.share(shared)
        self.r[name] = positive("r", config.r)
        self.sample_at_inference[name] = config.sample_at_inference
        seed = config.generator_seed
        self.pvera_generator[name] = None if seed is None else torch.Generator().manual_seed(seed)
        self.add_dropout(name, config.pvera_dropout)
        b, d = torch.ones(self.out_features), torch.randn(2 * config.r)
        if config.init_weights:
            b, d = torch.zeros_like(b), torch.full_like(d, config.d_initial)
        self.pvera_lambda_b[name], self.pvera_lambda_d[name] = nn.Parameter(b), nn.Parameter(d)

    def parts(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A, d, B, b on the device of d."""
        d, b = self.pvera_lambda_d[name], self.pvera_lambda_b[name]
        A, B = self.pvera_A[name][:, : self.in_features], self.pvera_B[name][: self.out_features]
        return A.to(d.device), d, B.to(d.device), b

    def low_rank(self, name: str) -> LowRank:
        A, d, B, b = map(wide, self.parts(name))
        r = self.r[name]
        return LowRank(d[:r, None] * A[:r], b[:, None] * B, 1.0)

    def halves(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        A, d, B, b = self.parts(name)
        if not (self.training or self.sample_at_inference[name]):
            r = self.r[name]
            return linear(d[:r] * linear(x, A[:r]), B), b
        mean, log_variance = (d * linear(x, A)).chunk(2, dim=-1)
        generator = self.pvera_generator[name]
        if generator is None:
            noise = torch.randn_like(mean)
        else:
            noise = torch.randn(mean.shape, dtype=mean.dtype, generator=generator).to(mean.device)
        return linear(torch.addcmul(mean, noise, torch.exp(0.5 * log_variance)), B), b


PveraLayer = Linear


class PveraModel(SavedProjectionModel):
    """Injects PVeRA."""

    prefix = "pvera_lambda_"
    rooms = {nn.Linear: Linear, "Conv1D": Linear}
    unsupported = ValueError
    title, key = "PVeRA", "PVeRA PRNG initialisation key"
    projections = ("pvera_A", "pvera_B")
    ranked = "pvera_B"

    def draw(self, config: PveraConfig, out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        return drawn(config.projection_prng_key, (2 * config.r, in_features), (out_features, config.r))


register("pvera", PveraConfig, PveraModel, parts=("bnb",))
