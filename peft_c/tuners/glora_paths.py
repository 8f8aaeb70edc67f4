"""The forms of GLoRA's supports: modules that give a tensor which broadcasts to the support's shape."""

from __future__ import annotations

import torch
from torch import nn

from .room import kaiming, product


class GloraPath(nn.Module):
    """A support; `reset_parameters` draws its start, which is zero with `init_weights`."""

    form = ""

    def reset_parameters(self, init_weights: bool = True) -> None:
        """Start anew: as zero, or at random."""
        raise NotImplementedError

    def forward(self) -> torch.Tensor:
        """The support."""
        return self.X


class GloraLoraPath(GloraPath):
    """Xd Xu, of low rank."""

    form = "lora"

    def __init__(self, out_features: int, in_features: int, r: int, init_weights: bool = True) -> None:
        super().__init__()
        self.Xd, self.Xu = nn.Parameter(torch.zeros(out_features, r)), nn.Parameter(torch.zeros(r, in_features))
        self.reset_parameters(init_weights)

    def reset_parameters(self, init_weights: bool = True) -> None:
        kaiming(self.Xu)
        nn.init.zeros_(self.Xd) if init_weights else kaiming(self.Xd)

    def forward(self) -> torch.Tensor:
        return product(self.Xd, self.Xu)


class GloraVectorPath(GloraPath):
    """One number an output."""

    form = "vector"

    def __init__(self, features: int, is_column: bool = True, init_weights: bool = True) -> None:
        super().__init__()
        self.X = nn.Parameter(torch.zeros(features, 1) if is_column else torch.zeros(features))
        self.reset_parameters(init_weights)

    def reset_parameters(self, init_weights: bool = True) -> None:
        nn.init.zeros_(self.X) if init_weights else kaiming(self.X if self.X.ndim > 1 else self.X.unsqueeze(0))


class GloraScalarPath(GloraPath):
    """One number."""

    form = "constant"

    def __init__(self, init_weights: bool = True) -> None:
        super().__init__()
        self.X = nn.Parameter(torch.zeros(1))
        self.reset_parameters(init_weights)

    def reset_parameters(self, init_weights: bool = True) -> None:
        nn.init.zeros_(self.X) if init_weights else nn.init.normal_(self.X, mean=0.0, std=0.02)


class GloraEmptyPath(GloraPath):
    """A buffer of zeros, of the support's shape."""

    form = "none"

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(shape))

    def reset_parameters(self, init_weights: bool = True) -> None:
        """Nothing."""

    def forward(self) -> torch.Tensor:
        return self.zeros


def path_of(form: str, shape: tuple[int, ...], r: int, init_weights: bool) -> GloraPath:
    """A new support of this form and shape."""
    if form == "none":
        return GloraEmptyPath(shape)
    if form == "constant":
        return GloraScalarPath(init_weights)
    if form == "lora":
        return GloraLoraPath(*shape, r, init_weights)
    return GloraVectorPath(shape[0], len(shape) > 1, init_weights)
