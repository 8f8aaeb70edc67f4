"""VB-LoRA: LoRA whose factors are put together from a bank of vectors for all layers (https://arxiv.org/abs/2405.15179)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from .law import LowRank
from .room import RoomConfig, State, option, positive, register, shared
from .shared_room import SharedRoom, SharedRoomModel, wide


@dataclass
class VBLoRAConfig(RoomConfig):
    """Options of VB-LoRA."""

    r: int = option(4, "Rank.")
    num_vectors: int = option(256, "Number of vectors in the bank; more for larger models.")
    vector_length: int = option(256, "Length of the vectors; has to divide the sizes of all adapted layers.")
    topk: int = option(2, "Number of vectors that are mixed for each piece of a factor.")
    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    save_only_topk_weights: bool = option(False, "Whether to save mixtures without the logits that training needs.")
    vblora_dropout: float = option(0.0, "Probability of dropping an input feature of the adapter in training.")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    bias: str = shared("bias")
    modules_to_save: list[str] | None = shared("modules_to_save")
    init_vector_bank_bound: float = option(0.02, "The bank starts uniform in plus and minus this; not at zero.")
    init_logits_std: float = option(0.1, "Standard deviation of the initial logits.")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform", beside_regex=True)
    layers_pattern: list[str] | str | None = shared("layers_pattern")


class Linear(SharedRoom, nn.Linear):
    """B A for nn.Linear and Conv1D, in pieces of length v: each is the mixture of the topk vectors of the bank
    (vectors, v) with the largest logits, weighted by their softmax.

    The logits are (r, in / v, vectors) for A and (out / v, r, vectors) for B.
    """

    factored = math.inf
    adapter_layer_names = ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank")
    other_param_names = ("r", "topk", "vblora_dropout")
    own, dropout = "vblora_logits_A", "vblora_dropout"

    def create(self, name: str, config: VBLoRAConfig, shared: dict[str, nn.Module]) -> None:
        v = config.vector_length
        for side in ("in_features", "out_features"):
            if getattr(self, side) % v:
                raise ValueError(f"`{side}` {getattr(self, side)} must be divisible by `vector_length` {v}")
        self.share(shared)
        self.r[name], self.topk[name] = positive("r", config.r), positive("topk", config.topk)
        self.add_dropout(name, config.vblora_dropout)
        for container, shape in (
            (self.vblora_logits_A, (config.r, self.in_features // v)),
            (self.vblora_logits_B, (self.out_features // v, config.r)),
        ):
            logits = torch.empty(*shape, config.num_vectors)
            container[name] = nn.Parameter(nn.init.normal_(logits, 0, config.init_logits_std))

    def low_rank(self, name: str) -> LowRank:
        logits = self.vblora_logits_A[name]
        if self.training and logits[0, 0].isinf().any():
            raise RuntimeError(
                "Found infinity values in VB-LoRA logits. Ensure training was not resumed from a "
                "`save_only_topk_weights` model."
            )
        bank = wide(self.vblora_vector_bank[name].to(logits.device))

        parts = (logits, self.vblora_logits_B[name])
        best, indices = torch.cat([wide(part).flatten(0, 1) for part in parts]).topk(self.topk[name], dim=-1)
        pieces = (best.softmax(-1).unsqueeze(-2) @ bank[indices]).squeeze(-2)
        A, B = pieces.split([part.shape[:2].numel() for part in parts])
        r = len(logits)
        return LowRank(A.reshape(r, -1), B.view(-1, r, B.shape[-1]).transpose(-1, -2).flatten(0, 1), 1.0)


VBLoRALayer = Linear


class VBLoRAModel(SharedRoomModel):
    """Injects VB-LoRA."""

    rooms = {nn.Linear: Linear, "Conv1D": Linear}

    def _pre_injection_hook(self, model: nn.Module, config: VBLoRAConfig, adapter_name: str) -> None:
        self.vblora_vector_bank = nn.ParameterDict()

    def _init_vblora_vector_bank(self, config: VBLoRAConfig, adapter_name: str) -> None:
        bank, bound = torch.empty(config.num_vectors, config.vector_length), config.init_vector_bank_bound
        self.vblora_vector_bank[adapter_name] = nn.init.uniform_(bank, -bound, bound)

    def shared(self, name: str, config: VBLoRAConfig) -> dict[str, nn.Module]:
        """The bank, drawn anew for each layer: PEFT does so, and the numbers are to be the same."""
        self._init_vblora_vector_bank(config, name)
        return {"vblora_vector_bank": self.vblora_vector_bank}

    # --- what is saved ---

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """Number of parameters that are saved: (VB-LoRA's, counted in units of 4 bytes, others)."""
        logits = bank = other = 0
        for name, parameter in self.named_parameters():
            if "vblora_logits" in name:
                logits += parameter.numel()
            elif "vblora_vector_bank" in name:
                bank += parameter.numel()
            elif parameter.requires_grad:
                other += parameter.numel()
        config = self.peft_config[adapter]
        if config.save_only_topk_weights:
            factor = torch.empty((), dtype=_index_dtype(config.num_vectors)).element_size() / 4
            logits = logits / config.num_vectors * (config.topk - 1 + config.topk * factor)
        return int(bank + logits), other

    def print_savable_parameters(self) -> None:
        """Print how many parameters are saved."""
        own, other = self.get_nb_savable_parameters()
        print(
            f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} "
            f"|| total params to-be-saved: {(own + other):,d}"
        )

    @classmethod
    def saving(cls, model: nn.Module, config: VBLoRAConfig, name: str, state: State, own: State) -> State:
        bank = f"base_model.vblora_vector_bank.{name}"
        selected = {key: value for key, value in state.items() if "vblora_logits" in key}
        if config.save_only_topk_weights:  # the last weight is what is missing to 1
            dtype = _index_dtype(config.num_vectors)
            best = {key: value.topk(config.topk) for key, value in selected.items()}
            selected = {}
            for key, (logits, indices) in best.items():
                selected[f"{key}_topk_indices"] = indices.to(dtype)
                selected[f"{key}_topk_weights"] = logits.softmax(-1)[..., :-1].contiguous()
        return {**selected, bank: state[bank], **cls._get_learnable_bias_state_dict(model, state, config)}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        head, dot, last = key.rpartition(".")
        if dot and last.startswith(f"{adapter_name}_"):
            return head + last.removeprefix(adapter_name)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: VBLoRAConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if config.save_only_topk_weights:
            vectors = len(model.vblora_vector_bank[adapter_name])
            for key in [key for key in state_dict if key.endswith("_topk_indices")]:
                key = key.removesuffix("_topk_indices")
                indices = state_dict.pop(f"{key}_topk_indices").long()
                weights = state_dict.pop(f"{key}_topk_weights")
                weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
                logits = weights.new_full((*weights.shape[:-1], vectors), -torch.inf)
                state_dict[key] = logits.scatter(-1, indices, weights.log())
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _index_dtype(vectors: int) -> torch.dtype:
    """The smallest dtype for indices of vectors (PEFT's bounds)."""
    small = ((1 << 8, torch.uint8), (1 << 15, torch.int16), (1 << 31, torch.int32))
    return next((dtype for bound, dtype in small if vectors < bound), torch.int64)


register("vblora", VBLoRAConfig, VBLoRAModel)
