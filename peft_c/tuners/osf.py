"""OSF, orthogonal subspace fine-tuning: the small singular directions are trained (https://arxiv.org/abs/2504.07097)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from ._buffer_dict import BufferDict
from .law import LowRank
from .room import FEW, AddRoom, RoomConfig, RoomModel, linear, option, positive, product, register, shared


@dataclass
class OSFConfig(RoomConfig):
    """Options of OSF. A rank is a number, or a fraction in (0, 1] of a weight's smaller size."""

    as_sets = ()

    effective_rank: int | float | None = option(
        None, "Number of the largest singular directions that stay as they are; the others are trained. None: half."
    )
    target_modules: list[str] | str | None = shared("target_modules")
    rank_pattern: dict[str, int | float] | None = option(None, "Pattern to find in names -> effective rank.")
    init_weights: bool | None = shared("init_weights")
    modules_to_save: list[str] | None = shared("modules_to_save")
    target_svd_config: dict[str, int] | None = option(None, "Accepted for the sake of old files; has no effect.")


def decompose_weight_matrix(weight: torch.Tensor, top_k: int) -> dict[str, Any]:
    """The singular value decomposition of a weight (n, k), in its dtype: U_high, S_high, V_high of the `top_k` largest
    singular values (their number is rank_high), and U_low, S_low, V_low of the others as parameters."""
    k = min(top_k, *weight.shape)
    U, S, V = (part.to(weight.dtype) for part in torch.linalg.svd(weight.detach().float(), full_matrices=False))
    high = {"U_high": U[:, :k].contiguous(), "S_high": S[:k].contiguous(), "V_high": V[:k].contiguous()}
    low = {"U_low": U[:, k:], "S_low": S[k:], "V_low": V[k:]}
    return {**high, **{name: nn.Parameter(part.clone().contiguous()) for name, part in low.items()}, "rank_high": k}


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of this process's shards, summed over all processes."""
    result = a @ b
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(result)
    return result


@torch.no_grad()
def project_gradient_to_orthogonal_space(svd_dict: dict[str, Any]) -> None:
    """Take the directions of U_high and V_high out of the gradients of U_low and V_low, in place."""
    U, V, dU, dV = (
        getattr(tensor, "_local_tensor", tensor)
        for tensor in (svd_dict["U_high"], svd_dict["V_high"], svd_dict["U_low"].grad, svd_dict["V_low"].grad)
    )
    if dU is not None:
        dU.sub_(U @ _product(U.T, dU))
    if dV is not None:
        dV.sub_(dV @ _product(V.T, V))


class Linear(AddRoom):
    """W + U S V - U0 S0 V0 with U (out, k), S (k), V (k, in); U0, S0, V0 are the small part of W's decomposition.

    Gradients of U and V are kept orthogonal to the large part: (1 - U_high U_high^T) dU, which is U0 U0^T dU if U is
    square, and the same for V. So only the one that is not square is stored.
    """

    converts_to_lora = False
    factored = FEW
    returns_input_dtype = None
    adapter_layer_names = ("osf_svd_params",)
    other_param_names = (
        "_osf_U_low_init",
        "_osf_S_low_init",
        "_osf_V_low_init",
        "_osf_U_high",
        "_osf_V_high",
        "effective_rank",
    )
    containers = {"osf_svd_params": nn.ModuleDict, **dict.fromkeys(other_param_names[:5], BufferDict)}

    def create(self, name: str, config: OSFConfig, effective_rank: int) -> None:
        self.effective_rank[name] = positive("effective_rank", effective_rank)
        parts = decompose_weight_matrix(self.get_base_weight(), effective_rank)
        low = {part: parts[part] for part in ("U_low", "S_low", "V_low")}
        for part, value in low.items():
            getattr(self, f"_osf_{part}_init")[name] = value.detach().clone()
        if self.out_features > self.in_features:
            self._osf_U_high[name] = parts["U_high"]
        if self.out_features < self.in_features:
            self._osf_V_high[name] = parts["V_high"]
        if config.init_weights is False:
            low = {part: nn.Parameter(torch.randn_like(value)) for part, value in low.items()}
        self.osf_svd_params[name] = nn.ParameterDict(low)

    @staticmethod
    def guarded(tensor: torch.Tensor, high: torch.Tensor | None, low: torch.Tensor) -> torch.Tensor:
        """`tensor` (rows, k), with a gradient that has no part in the columns of `high`."""
        if not (torch.is_grad_enabled() and tensor.requires_grad):
            return tensor

        def project(grad: torch.Tensor) -> torch.Tensor:
            return product(low, product(low.T, grad)) if high is None else grad - product(high, product(high.T, grad))

        tensor = tensor.view_as(tensor)
        if tensor.requires_grad:  # not in forward-mode differentiation
            tensor.register_hook(project)
        return tensor

    def parts(self, name: str) -> list[torch.Tensor]:
        """U, S, V and U0, S0, V0."""
        U0, S0, V0 = (getattr(self, container)[name] for container in self.other_param_names[:3])
        U, S, V = (self.osf_svd_params[name][part] for part in ("U_low", "S_low", "V_low"))
        U = self.guarded(U, self._osf_U_high[name] if name in self._osf_U_high else None, U0)
        V = self.guarded(V.T, self._osf_V_high[name].T if name in self._osf_V_high else None, V0.T).T
        return [U, S, V, U0, S0, V0]

    def low_rank(self, name: str) -> LowRank:
        U, S, V, U0, S0, V0 = self.parts(name)
        return LowRank(torch.cat([V, V0]), torch.cat([U * S, -(U0 * S0)], dim=1), 1.0)

    def dense(self, name: str, x: torch.Tensor) -> bool:
        return self.is_long(x)

    def halves(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        A, B, _ = self.low_rank(name)
        return linear(x, A), B.T

    def terms(self, name: str, x: torch.Tensor) -> list[LowRank]:
        U, S, V, U0, S0, V0 = self.parts(name)
        return [LowRank(V, U * S, 1.0), LowRank(V0, U0 * S0, -1.0)]


OSFLayer = Linear


class OSFModel(RoomModel):
    """Injects OSF into linear layers, all of them if no targets are given; other targets are left as they are."""

    rooms = {nn.Linear: Linear}
    unsupported = None

    def _prepare_adapter_config(self, peft_config: OSFConfig, model_config: dict) -> OSFConfig:
        if peft_config.target_modules is None and model_config.get("model_type") not in self.target_module_mapping:
            peft_config.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
        return super()._prepare_adapter_config(peft_config, model_config)

    def settings(self, config: OSFConfig, key: str, base: nn.Module) -> dict[str, Any]:
        patterns = (config.rank_pattern or {}).items()
        rank = next((rank for pattern, rank in patterns if re.search(pattern, key)), config.effective_rank)
        size = min(base.weight.shape)
        if rank is None:
            rank = size // 2
        elif isinstance(rank, float) and 0 < rank <= 1:
            rank = size * rank
        return {"effective_rank": max(min(size, int(rank)), 0)}

    def unmerge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """NotImplementedError, as in PEFT. The layers' own `unmerge` works."""
        raise NotImplementedError("OSF models do not support unmerging")


register("osf", OSFConfig, OSFModel, parts=("utils",))
