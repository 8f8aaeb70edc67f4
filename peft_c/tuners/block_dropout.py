"""Dropout of rotated blocks, as BOFT and OFT have it."""

from __future__ import annotations

import torch
from torch import nn


class MultiplicativeDropoutLayer(nn.Module):
    """In training, puts identities in the place of a share `p` of the blocks; of several factors' blocks
    (factors, number, b, b), in one of them."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *factors, number, rows, size = x.shape
        alone = not factors and (number == 1 or self.p <= 0)  # shared by all inputs
        if not self.training or alone:
            return x
        if rows != size:
            raise ValueError("The last two dimensions of input should be the same!")
        factor = [torch.randint(0, count, (1,)).item() for count in factors]
        mask = torch.zeros(*factors, number, 1, 1, device=x.device)
        mask[(*factor, torch.randperm(number) < int(self.p * number))] = 1
        return (1 - mask) * x + mask * torch.eye(size, device=x.device)
