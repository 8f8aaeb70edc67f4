"""Super-Tuning: the elements of a weight with the largest, or least, magnitude are trained, optionally beside a LoRA
(https://arxiv.org/abs/2607.09287)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from ._buffer_dict import BufferDict
from .law import LowRank
from .room import AddRoom, RoomConfig, RoomModel, dropout, kaiming, option, register, shared
from .sparse_room import SparseRoom, _warn_once_about_module_hooks  # noqa: F401


@dataclass
class SupertuningConfig(RoomConfig):
    """Options of Super-Tuning. ValueError for values out of range, and for `lora_alpha` without `r`."""

    target_modules: list[str] | str | None = shared("target_modules")
    modules_to_save: list[str] | None = shared("modules_to_save")
    sparsity: float = option(0.99, "Part of a weight's elements, in [0, 1), that are not trained.")
    select_top: bool = option(True, "Whether the elements of the largest magnitude are trained, or of the least.")
    r: int | None = option(None, "Rank of a LoRA beside the sparse part (Supra); None: no LoRA.")
    lora_alpha: float | None = option(None, "The LoRA is scaled by lora_alpha / r. None: 2 * r.")
    lora_dropout: float = option(0.0, "Dropout of the LoRA's input.")
    init_weights: bool = shared("init_weights")
    save_precomputed_indices: bool = option(True, "Whether files have the indices; if not, they are found again.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("sparsity", self.sparsity), ("lora_dropout", self.lora_dropout)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0.0, 1.0), got {value}")
        if self.r is None and self.lora_alpha is not None:
            raise ValueError("lora_alpha is set but r is None: the LoRA needs a rank.")
        if self.r is not None and (not isinstance(self.r, int) or self.r <= 0):
            raise ValueError(f"r must be a positive integer or None, got {self.r!r}")
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if not self.save_precomputed_indices:
            warnings.warn(
                "save_precomputed_indices=False: the indices will be found again from the magnitudes of the base "
                "weight when the adapter is loaded. They are the same only if the base model is exactly the same."
            )


class Linear(SparseRoom):
    """W + S + B A alpha / r: S has `supertuning_values` (nnz) at the flat `supertuning_indices` (nnz)."""

    title = "Super-Tuning"
    named_in_repr = False
    adapter_layer_names = ("supertuning_values", "supertuning_lora_A", "supertuning_lora_B")
    other_param_names = ("supertuning_indices", "supertuning_rank", "supertuning_lora_alpha")
    other_param_names += ("supertuning_lora_dropout",)
    containers = {"supertuning_values": nn.ParameterDict, "supertuning_indices": BufferDict}
    containers |= dict.fromkeys((*adapter_layer_names[1:], "supertuning_lora_dropout"), nn.ModuleDict)

    get_delta_weight = AddRoom.get_delta_weight  # dense, as PEFT's

    def prepare(self, base: nn.Module, config: SupertuningConfig) -> None:
        super().prepare(base, config)
        self.supertuning_indices = BufferDict(persistent=config.save_precomputed_indices)

    def create(self, name: str, config: SupertuningConfig) -> None:
        weight = self.bare_weight()
        size = int(weight.numel() * (1 - config.sparsity))
        if size < 1:
            raise ValueError(
                f"sparsity={config.sparsity} leaves no trainable entries for a weight with {weight.numel()} elements. "
                "Lower the sparsity so at least one entry is trainable."
            )
        indices = torch.topk(weight.abs().flatten(), k=size, largest=config.select_top).indices
        self.supertuning_indices[name] = indices.to(torch.int32)
        values = (torch.zeros if config.init_weights else torch.randn)(size, device=weight.device)
        self.supertuning_values[name] = nn.Parameter(values)
        self.supertuning_rank[name] = config.r or 0
        self.supertuning_lora_alpha[name] = float(config.lora_alpha or 0)
        if config.r is None:
            return
        A = nn.Linear(self.in_features, config.r, bias=False, dtype=torch.float32, device=weight.device)
        B = nn.Linear(config.r, self.out_features, bias=False, dtype=torch.float32, device=weight.device)
        kaiming(A.weight)
        (nn.init.zeros_ if config.init_weights else kaiming)(B.weight)
        self.supertuning_lora_A[name], self.supertuning_lora_B[name] = A, B
        self.supertuning_lora_dropout[name] = dropout(config.lora_dropout)

    def elements(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.entry("supertuning_indices", name), self.entry("supertuning_values", name)

    def lora(self, name: str) -> LowRank | None:
        r = self.supertuning_rank[name]
        if r == 0:
            return None
        A, B = self.supertuning_lora_A[name].weight, self.supertuning_lora_B[name].weight
        return LowRank(A, B, self.supertuning_lora_alpha[name] / r)

    def rest(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        lora = self.lora(name)
        if lora is None:
            return None
        x = self.supertuning_lora_dropout[name](x).to(lora.A.dtype)
        return self.supertuning_lora_B[name](self.supertuning_lora_A[name](x)) * lora.scale


SupertuningLayer = Linear


class SupertuningModel(RoomModel):
    """Injects Super-Tuning."""

    rooms = {nn.Linear: Linear}
    equal = {"save_precomputed_indices": "Super-Tuning indices must be saved for all adapters or none"}


register("supertuning", SupertuningConfig, SupertuningModel)
