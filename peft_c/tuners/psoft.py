"""PSOFT: an orthogonal map within the weight's principal subspace (https://openreview.net/forum?id=FSHrinMArK)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import nn

from ..utils.integrations import gather_params_ctx
from ._buffer_dict import BufferDict
from .law import LowRank
from .room import AddRoom, RoomConfig, RoomModel, dropout, linear, option, product, register, shared


@dataclass
class PsoftConfig(RoomConfig):
    """Options of PSOFT."""

    r: int = option(32, "Dimension of the principal subspace.", positive=True)
    target_modules: list[str] | str | None = shared("target_modules")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    psoft_alpha: int = option(32, "The adapter's output is scaled by psoft_alpha / r, its subspace by the inverse.")
    psoft_dropout: float = option(0.0, "Dropout probability of the adapter's input.")
    fan_in_fan_out: bool = shared("fan_in_fan_out")
    ab_svd_init: Literal["psoft_init", "pissa_init"] = option(
        "psoft_init",
        "Where the singular values go: 'psoft_init': to B, A has orthonormal rows; 'pissa_init': half to each.",
        choices=("psoft_init", "pissa_init"),
    )
    psoft_svd: Literal["full", "lowrank"] = option(
        "full", "Singular value decomposition: exact, or a randomised one.", choices=("full", "lowrank")
    )
    psoft_svd_lowrank_niter: int = option(10, "Number of power iterations of the randomised decomposition.")
    random_seed: int = option(0, "Seed of the randomised decomposition, which is made anew when an adapter is loaded.")
    psoft_orth: bool = option(True, "Whether R is kept orthogonal; False: any matrix.")
    psoft_mag_b: bool = option(True, "Whether to train a scale of each output of R.")
    psoft_mag_a: bool = option(True, "Whether to train a scale of each input of R.")
    use_cayley_neumann: bool = option(False, "Whether to approximate the inverse in R by a few terms of its series.")
    num_cayley_neumann_terms: int = option(5, "Number of terms of that series.")
    cayley_neumann_eps: float | None = option(None, "Bound in (0, 1) of the Frobenius norm of the series' base.")
    modules_to_save: list[str] | None = shared("modules_to_save")
    init_weights: bool = shared("init_weights")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform")
    layers_pattern: list[str] | str | None = shared("layers_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        eps, terms = self.cayley_neumann_eps, self.num_cayley_neumann_terms
        if self.use_cayley_neumann and terms <= 0:
            raise ValueError(f"`num_cayley_neumann_terms` must be a positive integer; got {terms}.")
        if self.use_cayley_neumann and eps is not None and not 0 < eps < 1:
            raise ValueError(f"`cayley_neumann_eps` must be in (0, 1) when set; got {eps}.")
        defaults = {field.name: field.default for field in fields(self)}
        for name, needs, given in (
            ("psoft_svd_lowrank_niter", "psoft_svd='lowrank'", self.psoft_svd == "lowrank"),
            ("num_cayley_neumann_terms", "use_cayley_neumann=True", self.use_cayley_neumann),
            ("cayley_neumann_eps", "use_cayley_neumann=True", self.use_cayley_neumann),
        ):
            value = getattr(self, name)
            if not given and value != defaults[name]:
                warnings.warn(f"`{name}` is only used when `{needs}`. {name}={value} will be ignored.", UserWarning)


class OrthLayer(nn.Module):
    """R = diag(b) C diag(a), (r, r), where C = (I + Q) (I - Q)^-1 with Q skew-symmetric, or C is the weight itself.

    `weight` holds what is above the diagonal of Q. The series for C is I + 2 Q + 2 Q^2 + ... + Q^n.
    """

    def __init__(self, config: PsoftConfig, r: int) -> None:
        super().__init__()
        self.size, self.orth, self.mag_a, self.mag_b = r, config.psoft_orth, config.psoft_mag_a, config.psoft_mag_b
        for name in ("use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps"):
            setattr(self, name, getattr(config, name))
        for name, places in zip(("rows", "cols"), torch.triu_indices(r, r, 1), strict=True):
            self.register_buffer(name, places, persistent=False)
        self.weight = nn.Parameter(torch.zeros(r * (r - 1) // 2) if self.orth else torch.eye(r))
        self.vector_b = nn.Parameter(torch.ones(r)) if self.mag_b else None
        self.vector_a = nn.Parameter(torch.ones(r)) if self.mag_a else None

    def cayley(self, dtype: torch.dtype) -> torch.Tensor:
        """C."""
        r = self.size
        upper = self.weight.new_zeros(r, r, dtype=dtype).index_put((self.rows, self.cols), self.weight.to(dtype))
        Q, identity = upper - upper.T, torch.eye(r, dtype=dtype, device=upper.device)
        if not self.use_cayley_neumann:
            return torch.sub(torch.linalg.inv(identity - Q), identity, alpha=0.5) * 2  # I + Q = 2 I - (I - Q)
        eps, terms = self.cayley_neumann_eps, self.num_cayley_neumann_terms
        if eps is not None:
            norm = torch.linalg.norm(Q)
            Q = torch.where(norm > eps, Q * (eps / (norm + 1e-12)), Q)
        last = {1: 0, 2: 1}.get(terms, max(terms - 1, 3))  # as PEFT counts them: 3 terms are the same as 4
        C, power = identity, identity
        for i in range(1, last + 1):
            power = power @ Q
            C = C + (power if i == last > 1 else 2 * power)
        return C

    def get_matrix(self) -> torch.Tensor:
        """R."""
        weight = self.weight
        R = self.cayley(torch.promote_types(weight.dtype, torch.float32)) if self.orth else weight
        R = R if self.vector_b is None else self.vector_b[:, None] * R
        return (R if self.vector_a is None else R * self.vector_a).to(weight.dtype)

    def __repr__(self) -> str:
        shown = "size orth use_cayley_neumann num_cayley_neumann_terms cayley_neumann_eps mag_a mag_b".split()
        return f"psoft.OrthLayer({', '.join(f'{name}={getattr(self, name)}' for name in shown)})"


class Linear(AddRoom):
    """W + scaling * B (R - I) A for nn.Linear; B (out, r) A (r, in) * scaling is the best approximation of W."""

    factored = math.inf
    dropout = "psoft_dropout"
    returns_input_dtype = False
    adapter_layer_names = ("psoft_R",)
    other_param_names = (
        "r",
        "psoft_alpha",
        "scaling",
        "psoft_dropout",
        "psoft_svd",
        "psoft_svd_lowrank_niter",
        "random_seed",
        "ab_svd_init",
        "_psoft_A_cache",
        "_psoft_B_cache",
    )
    containers = {
        "psoft_R": nn.ModuleDict,
        "psoft_dropout": nn.ModuleDict,
        "_psoft_A_cache": BufferDict,
        "_psoft_B_cache": BufferDict,
    }

    def create(self, name: str, config: PsoftConfig) -> None:
        r, dtype = int(config.r), self.get_base_layer().weight.dtype
        if r > min(self.in_features, self.out_features):
            raise ValueError(
                f"`r` ({r}) must be less than or equal to min(in_features, out_features) ({self.in_features}, "
                f"{self.out_features})"
            )
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"PSOFT needs base weights in float32, float16 or bfloat16, but they are in {dtype}.")
        self.r[name], self.psoft_alpha[name], self.scaling[name] = r, config.psoft_alpha, config.psoft_alpha / r
        for option_name in ("psoft_svd", "psoft_svd_lowrank_niter", "random_seed", "ab_svd_init"):
            getattr(self, option_name)[name] = getattr(config, option_name)
        self.psoft_dropout[name] = dropout(config.psoft_dropout)
        self.psoft_R[name] = OrthLayer(config, r)

    def complete(self, name: str, config: PsoftConfig) -> None:
        R = self.psoft_R[name].weight.data
        if not config.init_weights and not R.is_meta:  # drawn in the base weight's dtype, as PEFT does
            R.add_(torch.empty_like(R).normal_(0.0, 0.1))
        with gather_params_ctx(self.get_base_layer().weight), torch.no_grad():
            left, values, right = self.principal(name, self.bare_weight().float())
        values = values / self.scaling[name]
        share = 1.0 if config.ab_svd_init == "psoft_init" else 0.5
        self._psoft_B_cache[name] = left * values**share
        self._psoft_A_cache[name] = right * (values ** (1 - share)).unsqueeze(1)

    def principal(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U (out, r), S (r,) and V^T (r, in): the r largest singular values of the weight, and their vectors."""
        r = self.r[name]
        if self.psoft_svd[name] == "full":
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
            return U[:, :r], S[:r], Vh[:r]
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(self.random_seed[name])
            U, S, V = torch.svd_lowrank(weight, q=r, niter=self.psoft_svd_lowrank_niter[name])
        return U, S, V.T

    def low_rank(self, name: str) -> LowRank:
        A, B = self._psoft_A_cache[name], self._psoft_B_cache[name]
        return LowRank(product(self.psoft_R[name].get_matrix().to(A.dtype), A) - A, B, self.scaling[name])

    def term(self, name: str, x: torch.Tensor) -> torch.Tensor:
        A, B = self._psoft_A_cache[name], self._psoft_B_cache[name]
        inner = linear(x.to(A.dtype), A)
        change = linear(inner, self.psoft_R[name].get_matrix().to(A.dtype)) - inner
        return linear(change, B) * self.scaling[name]


PsoftLayer = Linear


class PsoftModel(RoomModel):
    """Injects PSOFT."""

    rooms = {nn.Linear: Linear}
    unsupported = ValueError


register("psoft", PsoftConfig, PsoftModel)
