"""Poly, polytropon: each task mixes a LoRA from a set of skills (https://arxiv.org/abs/2202.13914, 2211.03831)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from .room import Room, RoomConfig, RoomModel, kaiming, option, positive, register, shared

EPS = 1e-12


@dataclass
class PolyConfig(RoomConfig):
    """Options of Poly."""

    r: int = option(8, "Rank of each skill.")
    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    modules_to_save: list[str] | None = shared("modules_to_save")
    init_weights: bool = shared("init_weights")
    poly_type: Literal["poly"] = option("poly", "Kind of router; there is one.")
    n_tasks: int = option(1, "Number of tasks.")
    n_skills: int = option(4, "Number of skills in a layer.")
    n_splits: int = option(1, "Number of parts of the features, each with a mixture of its own (multi-head routing).")


class Router(nn.Module):
    """What mixes skills."""


class PolyRouter(Router):
    """The mixture of skills of each task: `module_logits` (tasks, splits * skills), relaxed Bernoulli in training."""

    def __init__(self, poly_config: PolyConfig) -> None:
        super().__init__()
        self.n_tasks, self.n_skills, self.n_splits = poly_config.n_tasks, poly_config.n_skills, poly_config.n_splits
        self.module_logits = nn.Parameter(torch.empty(self.n_tasks, self.n_splits * self.n_skills))

    def reset(self) -> None:
        """Initialise the logits: nearly equal."""
        nn.init.uniform_(self.module_logits, -1e-3, 1e-3)

    def forward(self, task_ids: torch.Tensor | None, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The weights (batch, splits, skills) for tasks (batch); over the skills they sum to 1."""
        if task_ids is None:
            raise ValueError("task_ids should not be None.")
        highest = task_ids.max().item()
        if highest >= self.n_tasks:
            raise ValueError(f"Only {self.n_tasks} tasks available. Found task id = {highest}")
        logits = self.module_logits[task_ids.to(self.module_logits.device)].view(-1, self.n_splits, self.n_skills)
        if self.training:
            gates = torch.distributions.RelaxedBernoulli(temperature=1.0, logits=logits).rsample()
        else:
            gates = torch.sigmoid(logits)
        return gates / (gates.sum(dim=-1, keepdim=True) + EPS)


def get_router(poly_config: PolyConfig) -> nn.Module:
    """The router for `poly_type`; ValueError if there is none."""
    if poly_config.poly_type != "poly":
        supported = "Currently, only the following types are supported: `poly`."
        raise ValueError(f"Unsupported poly_type: {poly_config.poly_type}. {supported}")
    return PolyRouter(poly_config)


class Linear(Room):
    """base(x) + x A B / r, where A and B are mixed for each input from A (splits, skills, in / splits, r) and
    B (splits, skills, r, out / splits)."""

    adapter_layer_names = ("poly_lora_A", "poly_lora_B", "poly_router")
    other_param_names = ("r", "n_tasks", "n_skills", "n_splits", "poly_type")
    containers = {"poly_router": nn.ModuleDict}
    adapter_kwargs = ("task_ids",)
    never_merged = "Poly cannot be merged: what it adds depends on the task of each input."

    def create(self, name: str, config: PolyConfig) -> None:
        positive("r", config.r)
        for option_name in self.other_param_names:
            getattr(self, option_name)[name] = getattr(config, option_name)
        router = get_router(config)
        splits, r = config.n_splits, config.r
        A = torch.zeros(splits, config.n_skills, self.in_features // splits, r)
        B = torch.zeros(splits, config.n_skills, r, self.out_features // splits)
        for factor in (A,) if config.init_weights else (A, B):
            for matrix in (part for skill in factor.unbind(1) for part in skill):
                matrix.copy_(kaiming(torch.empty(matrix.T.shape)).T)
        self.poly_lora_A[name], self.poly_lora_B[name] = nn.Parameter(A), nn.Parameter(B)
        self.poly_router[name] = router
        router.reset()

    def adapt(
        self, names: list[str], x: torch.Tensor, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """`task_ids` (batch): the task of each input."""
        dtype = x.dtype
        result = self.base_layer(x, *args, **kwargs)
        for name in names:
            weights = self.poly_router[name](task_ids=task_ids, input_ids=x)
            A = torch.einsum("bqs,qsdr->bqdr", weights, self.poly_lora_A[name]).flatten(1, 2)
            B = torch.einsum("bqs,qsrd->brqd", weights, self.poly_lora_B[name]).flatten(2)
            result = result + x.to(A.dtype).bmm(A).bmm(B) / self.r[name]
        return result.to(dtype)


PolyLayer = Linear


def _set_task_ids(layer: nn.Module, args: Any, kwargs: Any, task_ids: torch.Tensor) -> tuple[Any, Any]:
    return args, {**kwargs, "task_ids": task_ids}


class PolyModel(RoomModel):
    """Injects Poly. `forward` and `generate` take `task_ids` (batch), the task of each input."""

    rooms = {nn.Linear: Linear}

    @contextmanager
    def _tasks(self, task_ids: torch.Tensor | None) -> Iterator[None]:
        """Within it, all layers are given `task_ids`."""
        layers = [] if task_ids is None else [layer for layer in self.model.modules() if isinstance(layer, Linear)]
        hook = partial(_set_task_ids, task_ids=task_ids)
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        with self._tasks(task_ids):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        with self._tasks(task_ids):
            return self.model.generate(*args, **kwargs)


register("poly", PolyConfig, PolyModel, parts=("router",))
