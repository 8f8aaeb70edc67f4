"""AdaMSS, adaptive multi-subspaces: a small LoRA for each cluster of the weight's rows (PEFT's AdamssModel)."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ._buffer_dict import BufferDict
from .adamss_subspaces import clustering_Z, get_trainable_subspaces, seg_locations, slice_pca
from .law import LowRank
from .room import AddRoom, RoomConfig, RoomModel, State, linear, option, product, register, shared


@dataclass
class AdamssConfig(RoomConfig):
    """Options of AdaMSS; those of adaptive subspace allocation (ASA) have an effect with `use_asa` only."""

    r: int = option(100, "Number of singular vectors of the weight that subspaces are made of.")
    num_subspaces: int = option(5, "Number of subspaces, that is of groups of the weight's rows.")
    subspace_rank: int = option(1, "Rank of each subspace.")
    target_modules: list[str] | str | None = shared("target_modules")
    init_weights: Literal["orthogonal"] | None = option(
        "orthogonal",
        "'orthogonal': new adapters start as no change; None: at random, for tests.",
        choices=("orthogonal", None),
    )
    modules_to_save: list[str] | None = shared("modules_to_save")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform", beside_regex=True)
    layers_pattern: list[str] | str | None = shared("layers_pattern", alone=True)
    use_asa: bool = option(False, "Whether the least important subspaces are frozen in training (ASA).")
    asa_target_subspaces: int = option(50, "Number of subspaces, of all layers, that are trained in the end.")
    init_warmup: int = option(50, "The step from which on subspaces are frozen.")
    final_warmup: int = option(1000, "The step at which only `asa_target_subspaces` are left.")
    mask_interval: int = option(100, "Number of steps between two allocations.")
    asa_importance_beta: float = option(0.85, "How slowly the average of the importance follows.")
    asa_uncertainty_beta: float = option(0.85, "How slowly the average of its uncertainty follows.")
    asa_schedule_exponent: float = option(3.0, "Above 1, more subspaces are frozen early than late.")
    use_dynamic_rank: bool = option(False, "Whether subspaces with few large singular values get a smaller rank.")
    svd_threshold: float = option(0.1, "Part of the largest singular value from which on others count as large.")
    random_seed: int = option(0, "Seed of the singular value decomposition.")

    def __post_init__(self) -> None:
        if self.init_weights is False:
            self.init_weights = None
        super().__post_init__()
        for name in ("mask_interval", "asa_target_subspaces", "asa_schedule_exponent") if self.use_asa else ():
            if getattr(self, name) <= 0:
                kind = "number" if name == "asa_schedule_exponent" else "integer"
                raise ValueError(f"`{name}` must be a positive {kind} when `use_asa=True`, got {getattr(self, name)}.")
        if self.use_asa and self.init_warmup >= self.final_warmup:
            raise ValueError(
                "`init_warmup` must be smaller than `final_warmup` when `use_asa=True` so that ASA has a non-empty "
                f"pruning ramp, got init_warmup={self.init_warmup} and final_warmup={self.final_warmup}."
            )
        if importlib.util.find_spec("sklearn") is None:
            raise ImportError("scikit-learn is required for AdaMSS. Please install it with: pip install scikit-learn")


class Linear(AddRoom):
    """[W b] + P^T diag(B_1 A_1, B_2 A_2, ...) V: V (r, in + 1), `adamss_newB`, are right singular vectors of [W b] and
    P sorts rows by subspace; A_i (r_i, r), B_i (rows, r_i)."""

    adapter_layer_names = ("adamss_A", "adamss_B")
    statistics = ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B")
    subspaces = ("num_subspaces", "train_subspace_index", "seg_result", "scatter_index")
    other_param_names = (*subspaces, *statistics, "adamss_newB")
    containers = {
        "adamss_A": nn.ModuleDict,
        "adamss_B": nn.ModuleDict,
        "adamss_newB": partial(BufferDict, persistent=True),
    }
    adds, takes_any_dtype, converts_to_lora = ("weight", "bias"), True, False

    def prepare(self, base: nn.Module, config: AdamssConfig) -> None:
        super().prepare(base, config)
        if base.bias is None:
            self.adds = ("weight",)

    def create(self, name: str, config: AdamssConfig) -> None:
        weight, bias = self.bare_weight(), self.bare_bias()
        whole = (weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], dim=1)).detach().float()
        V, U = slice_pca(whole[None, None], config.r, whole.device, random_seed=config.random_seed)
        V, U = V[0, 0], U[0, 0]
        rows = seg_locations(clustering_Z(U, config.num_subspaces, 10)[0])
        count = len(rows)
        pairs = [self.initial(U[indices.to(U.device)], config, weight.dtype) for indices in rows.values()]
        for container, factors in zip((self.adamss_A, self.adamss_B), zip(*pairs, strict=True), strict=True):
            container[name] = nn.ParameterList([nn.Parameter(factor.to(weight.dtype)) for factor in factors])
        self.adamss_newB[name] = V.to(weight.dtype).contiguous()
        self.num_subspaces[name], self.train_subspace_index[name] = count, get_trainable_subspaces(count)
        self.seg_result[name], self.scatter_index[name] = rows, torch.cat(list(rows.values()))
        if config.use_asa:
            self.reset_importance(name)

    @staticmethod
    def initial(U: torch.Tensor, config: AdamssConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A, and B in `dtype`, of the subspace whose rows of the left singular vectors are U (rows, r)."""
        gram, rank = U @ U.T, min(len(U), config.subspace_rank) or 1
        if config.use_dynamic_rank:
            values = torch.svd_lowrank(gram, q=len(gram), niter=2)[1]
            rank = max(min(int((values > config.svd_threshold * values[0]).sum()), rank), 1)
        directions = torch.svd_lowrank(gram, q=min(len(gram), rank), niter=2)[0][:, :rank]
        A = torch.linalg.qr(U.T @ directions).Q.T.contiguous()
        start = torch.zeros if config.init_weights == "orthogonal" else torch.randn
        return A, start(len(U), rank, dtype=dtype, device=U.device) * 0.01

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (sum of r_i, in + 1) and B (out, sum of r_i) of all subspaces together."""
        A, B = torch.cat(list(self.adamss_A[name])), torch.block_diag(*self.adamss_B[name])
        order = self.scatter_index[name].to(B.device)
        return product(A, self.adamss_newB[name].to(A.dtype)), torch.zeros_like(B).index_copy(0, order, B)

    def low_rank(self, name: str) -> LowRank:
        A, B = self.factors(name)
        return LowRank(A[:, : self.in_features], B, 1.0)

    def bias_delta(self, name: str) -> torch.Tensor:
        A, B = self.factors(name)
        return B @ A[:, self.in_features]

    def term(self, name: str, x: torch.Tensor) -> torch.Tensor:
        A, B = self.factors(name)
        bias = A[:, self.in_features] if A.shape[1] > self.in_features else None
        return linear(linear(x, A[:, : self.in_features], bias), B)

    # --- adaptive subspace allocation ---

    def _statistics(self, name: str) -> list[tuple[nn.ParameterList, list[Any], list[Any]]]:
        """Factors, averaged importance and averaged uncertainty of all subspaces, for A and B."""
        names = (("adamss_A", "exp_avg_ipt_A", "exp_avg_unc_A"), ("adamss_B", "exp_avg_ipt_B", "exp_avg_unc_B"))
        return [tuple(getattr(self, container)[name] for container in group) for group in names]

    def reset_importance(self, adapter_name: str) -> None:
        """Forget the importance of all subspaces."""
        for container in self.statistics:
            getattr(self, container)[adapter_name] = [None] * self.num_subspaces[adapter_name]

    @torch.no_grad()
    def update_importance(
        self, adapter_name: str, importance_beta: float = 0.85, uncertainty_beta: float = 0.85
    ) -> None:
        """Take |weight * gradient| of this step into the averages; nothing happens without ASA."""
        known = adapter_name in self.exp_avg_ipt_A
        for factors, importance, uncertainty in self._statistics(adapter_name) if known else ():
            for i, factor in enumerate(factors):
                if factor.grad is None:
                    continue
                now = (factor * factor.grad).abs()
                if importance[i] is None:
                    importance[i], uncertainty[i] = torch.zeros_like(now), torch.zeros_like(now)
                uncertainty[i].lerp_((now - importance[i]).abs(), 1 - uncertainty_beta)
                importance[i].lerp_(now, 1 - importance_beta)

    def subspace_scores(self, name: str) -> list[tuple[torch.Tensor, list[nn.Parameter]]]:
        """Score and factors of each subspace that has had gradients."""
        scored = []
        for parts in zip(*(zip(*statistics, strict=True) for statistics in self._statistics(name)), strict=True):
            if all(importance is not None for _, importance, _ in parts):
                score = sum((importance * uncertainty).mean() for _, importance, uncertainty in parts)
                scored.append((score, [factor for factor, _, _ in parts]))
        return scored


AdamssLayer = Linear


class AdamssModel(RoomModel):
    """Injects AdaMSS. With `use_asa`, call `update_and_allocate(step)` in each training step."""

    rooms = {nn.Linear: Linear}

    def update_and_allocate(self, global_step: int) -> None:
        """To be called after `loss.backward()` and before `zero_grad()`: freezes the least important subspaces."""
        for name in self.active_adapters:
            config = self.peft_config[name]
            if not (config.use_asa and config.init_warmup <= global_step <= config.final_warmup):
                continue
            layers = [m for m in self.model.modules() if isinstance(m, Linear) and name in m.exp_avg_ipt_A]
            for layer in layers:
                layer.update_importance(name, config.asa_importance_beta, config.asa_uncertainty_beta)
            if global_step % config.mask_interval == 0:
                left = 1 - (global_step - config.init_warmup) / (config.final_warmup - config.init_warmup)
                surplus = sum(layer.num_subspaces[name] for layer in layers) - config.asa_target_subspaces
                target = int(config.asa_target_subspaces + surplus * left**config.asa_schedule_exponent)
                self._keep_best([scored for layer in layers for scored in layer.subspace_scores(name)], target)
                for layer in layers:
                    layer.reset_importance(name)

    @classmethod
    def loading(cls, model: nn.Module, config: AdamssConfig, name: str, saved: State) -> State:
        factors = [(key, p) for key, p in model.named_parameters() if ".adamss_" in key and key in saved]
        others = [(key, p) for key, p in factors if p.shape != saved[key].shape]
        for key, parameter in others:
            parameter.data = parameter.data.new_empty(saved[key].shape)
        if others:
            warnings.warn(f"The base weight has other subspaces than the one that {others[0][0]} was trained for.")
        return saved

    @staticmethod
    def _keep_best(scored: list[tuple[torch.Tensor, list[nn.Parameter]]], count: int) -> None:
        """Train the `count` subspaces of the highest scores, freeze the others."""
        threshold = float("-inf")
        if count < len(scored):
            threshold = -torch.stack([-score for score, _ in scored]).kthvalue(count)[0].item()
        for score, factors in scored:
            for factor in factors:
                factor.requires_grad = float(score) > threshold
                if not factor.requires_grad:
                    factor.grad = None


def __getattr__(name: str) -> Any:
    if name == "AdamssAsaCallback":  # needs transformers
        from .adamss_callback import AdamssAsaCallback

        return AdamssAsaCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register("adamss", AdamssConfig, AdamssModel, parts=("asa_callback", "utils"))
