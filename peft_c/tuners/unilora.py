"""Uni-LoRA: all LoRA factors of a model are entries of one small trained vector (https://arxiv.org/abs/2506.00799)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ._buffer_dict import BufferDict
from .law import LowRank
from .room import RoomConfig, State, option, register, shared
from .shared_room import SharedRoom, SharedRoomModel, wide


@dataclass
class UniLoraConfig(RoomConfig):
    """Options of Uni-LoRA."""

    r: int = option(4, "Rank.", positive=True)
    proj_seed: int = option(42, "Seed of the assignment of the vector's entries.")
    theta_d_length: int = option(256, "Length of the trained vector.", positive=True)
    target_modules: list[str] | str | None = shared("target_modules")
    unilora_dropout: float = option(0.0, "Probability of dropping an input feature of the adapter in training.")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")
    init_theta_d_bound: float = option(0.02, "The vector starts uniform in plus and minus this.")
    init_weights: bool = option(True, "Whether the vector starts uniform; False: standard normal.")
    save_indices: bool = option(False, "Whether to save the assignment, too; if not, it is made from the seed again.")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform")
    layers_pattern: list[str] | str | None = shared("layers_pattern", alone=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, good, what in (
            ("unilora_dropout", 0 <= self.unilora_dropout <= 1, "between 0.0 and 1.0"),
            ("init_theta_d_bound", self.init_theta_d_bound > 0, "a positive float"),
            ("bias", self.bias in ("none", "all", "unilora_only"), "'none', 'all', or 'unilora_only'"),
        ):
            if not good:
                raise ValueError(f"`{name}` should be {what}, got {getattr(self, name)}.")


class Linear(SharedRoom, nn.Linear):
    """B A with A (r, in) and B (out, r): theta[indices] * scales, where an entry of theta that is used n times has the
    scale 1 / sqrt(n)."""

    factored = math.inf
    named_in_repr = False
    adapter_layer_names = ("unilora_theta_d",)
    other_param_names = ("r", "unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B") + (
        "unilora_dropout",
    )
    containers = dict.fromkeys(other_param_names[1:5], BufferDict)
    own, dropout = "unilora_indices_A", "unilora_dropout"

    def create(self, name: str, config: UniLoraConfig, shared: dict[str, nn.Module]) -> None:
        self.share(shared)
        self.r[name] = config.r
        self.add_dropout(name, config.unilora_dropout)
        shapes = {"A": (config.r, self.in_features), "B": (self.out_features, config.r)}
        for container in self.other_param_names[1:5]:
            getattr(self, container).persistent = config.save_indices
        for side, shape in shapes.items():  # random as in PEFT until the model assigns them
            self.set_buffer("indices", side, name, torch.randint(0, config.theta_d_length, shape))

    def set_buffer(self, kind: str, side: str, name: str, value: torch.Tensor) -> None:
        """Set the indices or scales of A or B."""
        getattr(self, f"unilora_{kind}_{side}")[name] = value.to(self.get_base_layer().weight.device)

    def low_rank(self, name: str) -> LowRank:
        device = self.unilora_indices_A[name].device
        theta = wide(self.unilora_theta_d[name].to(device))
        A = theta[self.unilora_indices_A[name]] * wide(self.unilora_scales_A[name].to(device))
        B = theta[self.unilora_indices_B[name]] * wide(self.unilora_scales_B[name].to(device))
        return LowRank(A, B, 1.0)


UniLoraLayer = Linear


class UniLoraModel(SharedRoomModel):
    """Injects Uni-LoRA."""

    rooms = {nn.Linear: Linear, "Conv1D": Linear}

    def _pre_injection_hook(self, model: nn.Module, config: UniLoraConfig, adapter_name: str) -> None:
        self.unilora_theta_d = nn.ParameterDict()
        self.shared(adapter_name, config)

    def shared(self, name: str, config: UniLoraConfig) -> dict[str, nn.Module]:
        if name not in self.unilora_theta_d:
            theta, bound = torch.empty(config.theta_d_length), config.init_theta_d_bound
            init = (nn.init.uniform_, -bound, bound) if config.init_weights else (nn.init.normal_, 0, 1)
            self.unilora_theta_d[name] = nn.Parameter(init[0](theta, *init[1:]))
        return {"unilora_theta_d": self.unilora_theta_d}

    def finish(self, name: str) -> None:
        """Assign the entries of the vector to the factors: every one as often as any other, in random order."""
        config = self.peft_config[name]
        layers = [m for m in self.model.modules() if isinstance(m, Linear) and name in m.unilora_indices_A]
        places = [
            (layer, side, getattr(layer, f"unilora_indices_{side}")[name]) for layer in layers for side in ("A", "B")
        ]
        if not places:
            return
        sizes = [old.numel() for _, _, old in places]
        indices = self.generate_index(sum(sizes), config.theta_d_length, config.proj_seed)
        scale = torch.bincount(indices, minlength=config.theta_d_length).clamp(min=1).float().rsqrt()
        for (layer, side, old), part in zip(places, indices.split(sizes), strict=True):
            layer.set_buffer("indices", side, name, part.view_as(old).clone())
            scales = scale[part].view_as(old).to(layer.get_base_layer().weight.dtype)
            layer.set_buffer("scales", side, name, scales)

    @staticmethod
    def generate_index(lora_param_count: int, theta_d_length: int, proj_seed: int) -> torch.Tensor:
        """That many indices below `theta_d_length`, each equally often but for a random remainder, shuffled."""
        import numpy as np  # PEFT's generator: the assignment has to be the same

        if lora_param_count < 0:
            raise ValueError(f"`lora_param_count` must be non-negative, got {lora_param_count}.")
        if theta_d_length <= 0:
            raise ValueError(f"`theta_d_length` must be positive, got {theta_d_length}.")
        times, rest = divmod(lora_param_count, theta_d_length)
        random = np.random.default_rng(proj_seed)
        indices = np.repeat(np.arange(theta_d_length), times)
        if rest:
            indices = np.concatenate([indices, random.choice(theta_d_length, size=rest, replace=False)])
        random.shuffle(indices)
        return torch.as_tensor(indices, dtype=torch.long)

    @classmethod
    def saving(cls, model: nn.Module, config: UniLoraConfig, name: str, state: State, own: State) -> State:
        theta = f"base_model.unilora_theta_d.{name}"
        if theta not in state:
            raise KeyError(f"Expected UniLora parameter '{theta}' in the model state dict.")
        selected = {theta: state[theta]}
        if config.save_indices:
            parts = ("unilora_indices", "unilora_scales")
            keys = (key for key in state if any(part in key for part in parts) and f".{name}" in key)
            selected.update({key: state[key] for key in keys})
        return selected | cls._get_learnable_bias_state_dict(model, state, config)


register("unilora", UniLoraConfig, UniLoraModel)
