"""AdaLoRA: a LoRA in the form of a singular value decomposition, whose ranks are allotted by importance in training
(https://openreview.net/forum?id=lq62uWRJjiY)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..utils.integrations import _skip_init_on_device, gather_params_ctx
from ..utils.peft_types import PeftType
from ..utils.trainable_modules import _freeze_adapter
from .adalora_ranks import RankAllocator
from .law import LowRank
from .lora.config import LoraConfig
from .lora.layer import LoraLayer
from .lora.model import LoraModel
from .room import AddRoom, RoomModel, State, option, register


@dataclass
class AdaLoraConfig(LoraConfig):
    """Options of AdaLoRA, beside those of LoRA.

    Ranks stay at `init_r` for `tinit` steps, then shrink until `tfinal` steps are left of `total_step`, and stay.
    ValueError for a schedule in which they never shrink, and for options of LoRA that AdaLoRA does not have.
    """

    target_r: int = option(8, "Average rank of the layers in the end.")
    init_r: int = option(12, "Rank of all layers in the beginning.")
    tinit: int = option(0, "Number of steps before ranks shrink.")
    tfinal: int = option(0, "Number of steps after ranks have shrunk.")
    deltaT: int = option(1, "Ranks are allotted anew every so many steps.")
    beta1: float = option(0.85, "How slowly the average of the weights' sensitivity follows.")
    beta2: float = option(0.85, "How slowly the average of the sensitivity's uncertainty follows.")
    orth_reg_weight: float = option(0.5, "Weight of the loss that keeps the singular vectors orthogonal.")
    total_step: int | None = option(None, "Number of training steps; needed.")
    rank_pattern: dict | None = option(None, "The ranks allotted in training: which directions of a layer are left.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADALORA
        for name, unsupported in (("DoRA", self.use_dora), ("LOFTQ", self.loftq_config)):
            if unsupported:
                raise ValueError(f"{self.peft_type} does not support {name}.")
        if self.r != 8:
            warnings.warn(
                "Note that `r` is not used in AdaLora and will be ignored."
                "If you intended to set the initial rank, use `init_r` instead."
            )
        if self.total_step is None or self.total_step <= 0:
            raise ValueError("AdaLoRA does not work when `total_step` is None, supply a value > 0.")
        if self.orth_reg_weight < 0:
            raise ValueError(
                "`orth_reg_weight` should be greater than or equal to 0, but the value passed is "
                f"{self.orth_reg_weight}."
            )
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or "
                "increase `total_step`."
            )


class AdaLoraLayer(AddRoom, LoraLayer):
    """W + B diag(E) A * alpha / ranknum with A (r, in), E (r, 1), B (out, r); for convolutions `in` counts the
    kernel's elements, too. `ranknum` is the initial rank, also of adapters whose rank has shrunk."""

    converts_to_lora = False
    factored = math.inf
    returns_input_dtype = False
    adapter_layer_names = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "ranknum")
    containers = dict.fromkeys(("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"), nn.ParameterDict)
    containers["lora_magnitude_vector"] = nn.ModuleDict  # empty, for programs that look for DoRA
    containers |= dict.fromkeys(("lora_E", "ranknum"), nn.ParameterDict)
    dropout = "lora_dropout"

    def prepare(self, base: nn.Module, config: AdaLoraConfig) -> None:
        super().prepare(base, config)
        base.weight.requires_grad = False
        self.lora_variant, self.use_rslora, self.use_dora, self.lora_bias = {}, {}, {}, {}

    def create(self, name: str, config: AdaLoraConfig, r: int, lora_alpha: int) -> None:
        if r < 0:
            raise ValueError(f"`r` should be a positive integer or 0, but the value passed is {r}")
        base = self.get_base_layer()
        size = base.weight[0].numel() if isinstance(base, nn.Conv2d) else self.in_features
        self.r[name], self.lora_alpha[name] = r, lora_alpha
        self.scaling[name] = self._initial_scaling(name)
        self.add_dropout(name, config.lora_dropout)
        A, E, B = torch.randn(r, size), torch.randn(r, 1), torch.randn(self.out_features, r)
        torch.randn(1)  # drawn by PEFT as well
        if config.init_lora_weights:
            nn.init.normal_(A, mean=0.0, std=0.02)
            nn.init.normal_(B, mean=0.0, std=0.02)
            nn.init.zeros_(E)
        self.lora_A[name], self.lora_E[name], self.lora_B[name] = map(nn.Parameter, (A, E, B))
        with _skip_init_on_device():  # not in files, so never on the meta device
            self.ranknum[name] = nn.Parameter(torch.full((1,), float(r)), requires_grad=False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        with _skip_init_on_device():
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def _initial_scaling(self, adapter_name: str) -> float:
        alpha = self.lora_alpha[adapter_name]
        return alpha if alpha > 0 else float(self.r[adapter_name])

    def low_rank(self, name: str) -> LowRank:
        scale = self.scaling[name] / (self.ranknum[name] + 1e-5)
        return LowRank(self.lora_A[name] * self.lora_E[name], self.lora_B[name], scale)


class SVDLinear(AdaLoraLayer):
    """AdaLoRA for nn.Linear and Conv1D, quantised or not."""


SVDQuantLinear = SVDLinear8bitLt = SVDLinear4bit = SVDLinear


class SVDConv2d(AdaLoraLayer):
    """AdaLoRA for nn.Conv2d."""


class AdaLoraModel(RoomModel, LoraModel):
    """Injects AdaLoRA. Call `update_and_allocate(step)` after each optimizer step. One adapter can be trained."""

    prefix = "lora_"
    rooms = {nn.Linear: SVDLinear, "Conv1D": SVDLinear, nn.Conv2d: SVDConv2d}
    unsupported = ValueError

    def __init__(self, model: nn.Module, config: Any, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(model, config, adapter_name, **kwargs)
        self._check_one_trainable()
        if self.peft_config[adapter_name].inference_mode:
            _freeze_adapter(self.model, adapter_name)
        else:
            self.trainable_adapter_name = adapter_name
            self.rankallocator = RankAllocator(self.model, self.peft_config[adapter_name], adapter_name)

    def _check_one_trainable(self) -> None:
        if sum(not config.inference_mode for config in self.peft_config.values()) > 1:
            raise ValueError(
                f"{type(self).__name__} supports only 1 trainable adapter. When using multiple adapters, set "
                "inference_mode to True for all adapters except the one you want to train."
            )

    def _check_new_adapter_config(self, config: AdaLoraConfig) -> None:
        super()._check_new_adapter_config(config)
        self._check_one_trainable()

    def settings(self, config: AdaLoraConfig, key: str, base: nn.Module, **_: Any) -> dict[str, Any]:
        return {"r": config.init_r, "lora_alpha": config.lora_alpha}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; a loss in it gets the mean of |A A^T - 1| and |B^T B - 1| over all layers added."""
        outputs = self.model.forward(*args, **kwargs)
        name = self.__dict__.get("trainable_adapter_name")
        if name is None or not isinstance(getattr(outputs, "loss", None), torch.Tensor):
            return outputs
        terms = []
        for layer in self.model.modules():
            if isinstance(layer, AdaLoraLayer) and name in layer.lora_A:
                with gather_params_ctx([layer.lora_A[name], layer.lora_B[name]], fwd_module=self):
                    for P in (layer.lora_A[name], layer.lora_B[name].T):
                        gram = P @ P.T
                        terms.append(torch.norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
        if terms:
            outputs.loss += self.peft_config[name].orth_reg_weight * (sum(terms) / len(terms))
        return outputs

    def update_and_allocate(self, global_step: int) -> None:
        """To be called in each training step, after `loss.backward()` and before `zero_grad()`: shrinks the ranks."""
        config = self.peft_config[self.trainable_adapter_name]
        last = config.total_step - config.tfinal
        if global_step > last:
            self.rankallocator.mask_using_rank_pattern(self.model, config.rank_pattern)
            return
        final = global_step == last
        _, pattern = self.rankallocator.update_and_allocate(self.model, global_step, force_mask=final)
        if pattern or final:
            config.rank_pattern = pattern
        if final:
            self.rankallocator.reset_ipt()

    # --- adapters whose ranks have shrunk ---

    @staticmethod
    def _layer_name(key: str, adapter_name: str) -> str:
        """The name of the layer that a key of `rank_pattern` belongs to."""
        return key.removesuffix(f".{adapter_name}").rpartition(".")[0]

    def resize_modules_by_rank_pattern(self, rank_pattern: dict[str, Any], adapter_name: str) -> None:
        """Leave only the directions in `rank_pattern`, a list of bools or a bool tensor a layer, in the layers."""
        config = self.peft_config[adapter_name]
        for key, left in rank_pattern.items():
            if not isinstance(left, (list, torch.Tensor)):
                raise TypeError(f"Unexpected type of rank_idx for {key}: {type(left).__name__}; give a list of bools.")
            left = torch.as_tensor(left, dtype=torch.bool).view(-1).nonzero().view(-1)
            layer = self.model.get_submodule(self._layer_name(key, adapter_name))
            old = [container[adapter_name] for container in (layer.lora_E, layer.lora_A, layer.lora_B, layer.ranknum)]
            layer.update_layer(adapter_name, config=config, r=len(left), lora_alpha=config.lora_alpha)
            left = left.to(old[0].device)
            kept = (old[0][left], old[1][left], old[2][:, left], old[3])  # the scale stays as it was
            with torch.no_grad():
                for container, value in zip(
                    (layer.lora_E, layer.lora_A, layer.lora_B, layer.ranknum), kept, strict=True
                ):
                    container[adapter_name].copy_(value)

    def resize_state_dict_by_rank_pattern(self, rank_pattern: Any, state_dict: Any, adapter_name: str) -> Any:
        """Leave only the directions in `rank_pattern` in a state dict, in place."""
        for name, left in rank_pattern.items():
            left = torch.tensor(left, dtype=torch.bool)
            layer = f"base_model.model.{self._layer_name(name, adapter_name)}"
            for part, dim in (("lora_E", 0), ("lora_A", 0), ("lora_B", 1)):
                key = f"{layer}.{part}.{adapter_name}"
                value = state_dict[key]
                if value.shape[dim] != left.sum():
                    state_dict[key] = value.index_select(dim, left.nonzero().view(-1).to(value.device))
        return state_dict

    @classmethod
    def saving(cls, model: nn.Module, config: AdaLoraConfig, name: str, state: State, own: State) -> State:
        own = {key: value for key, value in own.items() if not key.endswith(f".ranknum.{name}")}
        if config.rank_pattern is not None:
            config.rank_pattern = {key.replace(f".{name}", ""): left for key, left in config.rank_pattern.items()}
            own = model.resize_state_dict_by_rank_pattern(config.rank_pattern, own, name)
        return own

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: Any, config: Any, adapter_name: str, state_dict: Any) -> Any:
        state_dict = super(LoraModel, cls)._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if config.rank_pattern is not None:
            model.resize_modules_by_rank_pattern(config.rank_pattern, adapter_name)
        return state_dict

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """TypeError: AdaLoRA's adapters cannot be combined."""
        raise TypeError(f"{type(self).__name__} does not support add_weighted_adapter method.")


register("adalora", AdaLoraConfig, AdaLoraModel, mixed=True, parts=("bnb", "gptq"))
