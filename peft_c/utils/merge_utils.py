"""Combining task tensors (weights of several adapters): task arithmetic, TIES, DARE and magnitude pruning.

Sources: task arithmetic https://huggingface.co/papers/2212.04089, TIES https://huggingface.co/papers/2306.01708,
DARE https://huggingface.co/papers/2311.03099. Every combination prunes each tensor, scales it by its weight and adds
them up, or, with a sign election (TIES), averages those entries that agree with the elected sign.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch

SignMethod = Literal["total", "frequency"]
PruneMethod = Literal["magnitude", "random"]


def reshape_weight_task_tensors(task_tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`weights` with trailing dimensions of size 1, so that it broadcasts over `task_tensors` from the left."""
    return weights.reshape(*weights.shape, *[1] * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """`tensor` with all but its `int(density * numel)` largest magnitudes set to zero."""
    keep = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return tensor * mask.index_fill_(0, keep, 1).view(tensor.shape)


def random_pruning(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
    """`tensor` with each entry kept with probability `density`; `rescale` divides by it to keep the mean."""
    kept = tensor * torch.full_like(tensor, density).bernoulli()
    return kept / density if rescale else kept


def prune(tensor: torch.Tensor, density: float, method: PruneMethod, rescale: bool = False) -> torch.Tensor:
    """Prune to a fraction `density` of the entries.

    A density of 1 or more prunes nothing and warns; a negative one or an unknown `method` is a ValueError.
    """
    if density >= 1:
        warnings.warn(f"The density {density} is greater than or equal to 1, no pruning will be performed.")
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale=rescale)
    raise ValueError(f"Unknown method {method!r}, expected 'magnitude' or 'random'")


def calculate_majority_sign_mask(tensor: torch.Tensor, method: SignMethod = "total") -> torch.Tensor:
    """True where an entry of `tensor` (tasks stacked along dim 0) has the sign elected over the tasks.

    The vote is the sum of the values ("total") or of their signs ("frequency"); a draw elects plus. Zeros never agree.
    """
    signs = tensor.sign()
    if method == "total":
        votes = tensor.sum(dim=0)
    elif method == "frequency":
        votes = signs.sum(dim=0)
    else:
        raise RuntimeError(f'Unimplemented mask method "{method}", expected "total" or "frequency"')
    return torch.where(votes >= 0, signs == 1, signs == -1)


def disjoint_merge(task_tensors: torch.Tensor, majority_sign_mask: torch.Tensor) -> torch.Tensor:
    """Mean over dim 0 of those entries where the mask is True; zero where there is none."""
    agreeing = majority_sign_mask.sum(dim=0).clamp(min=1.0)
    return (task_tensors * majority_sign_mask).sum(dim=0) / agreeing


def _combine(
    task_tensors: list[torch.Tensor],
    weights: torch.Tensor,
    density: float | None = None,
    prune_method: PruneMethod | None = None,
    sign_method: SignMethod | None = None,
) -> torch.Tensor:
    """Prune (`prune_method`), weigh, and sum the tensors, or merge them disjointly if there is a `sign_method`.

    The signs are elected among the pruned tensors before the weights are applied.
    """
    if prune_method is not None:
        if density is None:
            raise ValueError("This combination prunes: pass `density`, the fraction of entries to keep (0 to 1).")
        # dropping at random is compensated for in those that stay (DARE), dropping the smallest is not
        rescale = prune_method == "random"
        task_tensors = [prune(tensor, density, method=prune_method, rescale=rescale) for tensor in task_tensors]
    stacked = torch.stack(task_tensors)
    weighted = stacked * reshape_weight_task_tensors(stacked, weights)
    if sign_method is None:
        return weighted.sum(dim=0)
    return disjoint_merge(weighted, calculate_majority_sign_mask(stacked, method=sign_method))


def task_arithmetic(task_tensors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of equally shaped tensors; `weights` has one entry per tensor."""
    return _combine(task_tensors, weights)


def magnitude_prune(task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """Weighted sum of what is left of each tensor after keeping its largest magnitudes (fraction `density`)."""
    return _combine(task_tensors, weights, density, "magnitude")


def ties(
    task_tensors: list[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: SignMethod = "total",
) -> torch.Tensor:
    """TIES: keep the largest magnitudes (fraction `density`), elect signs, average the agreeing entries."""
    return _combine(task_tensors, weights, density, "magnitude", majority_sign_method)


def dare_linear(task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """DARE: drop entries at random, rescale the rest by 1 / `density`, weighted sum."""
    return _combine(task_tensors, weights, density, "random")


def dare_ties(
    task_tensors: list[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: SignMethod = "total",
) -> torch.Tensor:
    """DARE's random pruning followed by the sign election and disjoint mean of TIES."""
    return _combine(task_tensors, weights, density, "random", majority_sign_method)
