"""SHiRA, sparse high-rank adaptation: some elements of the weight are trained (https://arxiv.org/abs/2406.13175)."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .room import RoomConfig, RoomModel, State, option, positive, register, shared
from .sparse_room import SparseRoom, _warn_once_about_module_hooks  # noqa: F401
from .tuner_layer import _get_in_out_features

# safetensors on Windows fails to write integers
_SAVED_INDICES = torch.float32 if sys.platform == "win32" else torch.int


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: Any) -> torch.Tensor:
    """A mask (out, in) with r * (in + out) elements True, drawn by a generator of its own."""
    n, m = _get_in_out_features(base_layer)
    generator = torch.Generator()
    if random_seed is not None:
        generator.manual_seed(random_seed)
    chosen = torch.randperm(m * n, generator=generator)[: r * (m + n)]
    mask = torch.zeros(m * n, dtype=torch.bool).index_fill_(0, chosen, True)
    return mask.view(m, n).to(base_layer.weight.device)


@dataclass
class ShiraConfig(RoomConfig):
    """Options of SHiRA.

    The attribute `mask_fn(base_layer, r)`, which may be set, returns the mask of the trained elements: a
    tensor like the weight, of r * (in + out) ones and else zeros. It is not saved; the elements' indices are.
    """

    r: int = option(32, "A layer gets as many parameters as a LoRA of this rank: r * (in + out).")
    mask_type: Literal["random"] = option("random", "How elements are chosen; any other value: set `mask_fn`.")
    random_seed: int | None = option(None, "Seed of the random mask.")
    target_modules: list[str] | str | None = shared("target_modules")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    init_weights: bool = shared("init_weights")
    modules_to_save: list[str] | None = shared("modules_to_save")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mask_fn = random_mask if self.mask_type == "random" else None
        if self.mask_fn is None and not self.inference_mode:
            warnings.warn(
                f"Argument self.mask_type={self.mask_type!r} is not recognized, please supply your own masking "
                "function by calling `config.mask_fn = my_mask_fn`."
            )


class Linear(SparseRoom):
    """W + S, where S has `shira_weight` (nnz) times the scale at `shira_indices` (2, nnz: rows, columns)."""

    title = "ShiRA"
    adapter_layer_names = ("shira_weight",)
    other_param_names = ("r", "scaling", "shira_indices")

    def create(self, name: str, config: ShiraConfig, mask: torch.Tensor | None = None) -> None:
        base, r = self.get_base_layer(), positive("r", config.r)
        size, most = r * (self.in_features + self.out_features), self.in_features * self.out_features
        if size > most:
            raise ValueError(
                f"The set rank {r} results in more shira params than the {most} of the base layer: not allowed."
            )
        self.r[name], self.scaling[name] = r, 1.0
        seed = {"random_seed": config.random_seed} if config.mask_type == "random" else {}
        mask = config.mask_fn(base, r, **seed) if mask is None and config.mask_fn is not None else mask
        if mask is not None:
            indices = torch.stack(torch.where(mask == 1.0)).to(torch.int)
            if indices.shape[1] != size:
                raise ValueError(
                    f"The SHiRA indices and weights are not the same dimensions for adapter {name} in layer {base}: "
                    f"the mask has {indices.shape[1]} ones, r * (in + out) is {size}."
                )
            self.shira_indices[name] = indices
        self.shira_weight[name] = nn.Parameter(torch.zeros(size) if config.init_weights else torch.randn(size))

    def elements(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        values = self.shira_weight[name] * self.scaling[name]
        rows, columns = self.shira_indices[name].to(values.device)
        return torch.add(columns, rows.long(), alpha=self.in_features), values

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the factor of the adapter's weights; unknown names are ignored."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale


ShiraLayer = Linear


class ShiraModel(RoomModel):
    """Injects SHiRA. Indices are saved with the adapter."""

    rooms = {nn.Linear: Linear}

    @classmethod
    def saving(cls, model: nn.Module, config: ShiraConfig, name: str, state: State, own: State) -> State:
        for key, layer in model.named_modules():
            if isinstance(layer, Linear) and name in layer.shira_indices:
                own[f"{key}.shira_indices.{name}"] = layer.shira_indices[name].to(_SAVED_INDICES)
        return own

    @classmethod
    def loading(cls, model: nn.Module, config: ShiraConfig, name: str, saved: State) -> State:
        for key, layer in model.named_modules():
            indices = saved.pop(f"{key}.shira_indices", None) if isinstance(layer, Linear) else None
            if indices is not None:
                layer.shira_indices[name] = indices.to(torch.int)
        return saved


register("shira", ShiraConfig, ShiraModel, mixed=True, parts=("mask_functions",))
