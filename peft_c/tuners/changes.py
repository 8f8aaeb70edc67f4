"""What merging an adapter does to one weight: the forms in which layers declare it (`_merge_changes`).

| change     | the merged weight                                                              |
|------------|--------------------------------------------------------------------------------|
| `LowRank`  | W + scale * B A                                                                |
| a function | W + what it returns, a tensor of the weight's own shape                        |
| `Elements` | W with values added to a few of its elements                                   |
| `Replace`  | new values, computed from all the layer's weights; or, as `Times`, W * vector  |

Nothing here acts: `law` merges by them, `undo` keeps what takes them out again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .base_view import BaseView

FAST_BF16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
WIDE = 128  # rank


def multiplies_slowly(tensor: torch.Tensor) -> bool:
    """Whether matrices like it are better multiplied in fp32: half precision on CPUs without instructions for it."""
    dtype = tensor.dtype
    return (dtype is torch.float16 or (dtype is torch.bfloat16 and not FAST_BF16)) and tensor.is_cpu


class LowRank(NamedTuple):
    """The change scale * B @ A of a weight's matrix: A (r, k), B (n, r), or stacks (e, r, k), (e, n, r)."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float

    def snapshot(self) -> LowRank:
        """The values as they are now. To be called without grad."""
        scale = self.scale.full_tensor() if hasattr(self.scale, "full_tensor") else self.scale  # of a DTensor
        return LowRank(self.A.clone(), self.B.clone(), float(scale))

    def is_wide(self) -> bool:
        """Whether a copy of the weight and one product take less time than the kernels' two and a small record."""
        return self.A.shape[-2] > WIDE

    def delta(self) -> torch.Tensor:
        """scale * B @ A in the factors' dtype; half precision on the CPU that has to be scaled, or that it multiplies
        slowly, is multiplied in fp32."""
        A, B = self.A, self.B
        if isinstance(self.scale, float) and self.scale == 1.0 and not multiplies_slowly(B):
            return B @ A
        if B.device.type == "cpu" and B.dtype in (torch.float16, torch.bfloat16):
            return ((B.float() @ A.float()) * self.scale).to(B.dtype)
        return (B @ A) * self.scale


class Elements(NamedTuple):
    """The change of a few elements: `values` (nnz) are added at `places` (nnz), int32 or int64 and all different, of
    the flat weight. Called, it gives the full delta."""

    places: torch.Tensor
    values: torch.Tensor
    shape: torch.Size

    def __call__(self) -> torch.Tensor:
        delta = self.values.new_zeros(self.shape.numel())
        return delta.index_copy_(0, self.places.long(), self.values).view(self.shape)


class Times(NamedTuple):
    """The weight times `vector`, whose values belong to the indices of dimension `dim`; nobody else writes to it."""

    vector: torch.Tensor
    dim: int


class Replace(NamedTuple):
    """The change to other values, which depend on the ones there: `merged(targets)` -> {label: new values or `Times`},
    called once an adapter when its turn has come (the laws ROTATE, SCALE, BLEND, SWAP)."""

    merged: Callable[[dict[str, BaseView]], dict[str, torch.Tensor | Times]]


Change = LowRank | Callable[[], torch.Tensor] | Replace  # Elements is a function that returns the delta
