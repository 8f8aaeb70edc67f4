"""One weight of a base layer seen as a matrix (n, k), so that low-rank factors A (r, k) and B (n, r) act on it.

| base layer                | weight                  | matrix                              |
|---------------------------|-------------------------|-------------------------------------|
| Linear, in_proj of MHA    | (out, in)               | itself                              |
| transformers' Conv1D      | (in, out)               | transposed                          |
| Embedding                 | (vocabulary, dim)       | transposed: (dim, vocabulary)       |
| Conv1d, Conv2d, Conv3d    | (out, in, *kernel)      | (out, in * kernel elements)         |
| parameter of experts      | (experts, out, in)      | a stack of matrices (experts, n, k) |
|                           | or (experts, in, out)   | the same, each transposed           |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn


def held(module: nn.Module, name: str) -> Any:
    """What a module has under a name, None for nothing: getattr, without its long search where that is a parameter."""
    own = module.__dict__.get("_parameters", ())
    return own[name] if name in own else getattr(module, name, None)


class BaseView(NamedTuple):
    """Where a weight lives (`owner.name`) and how it reads as a matrix, or as a stack of matrices.

    transposed: the matrix is the weight's transpose. stacked: a 3-d weight is a stack, not a convolution's kernel.
    """

    owner: nn.Module
    name: str = "weight"
    transposed: bool = False
    stacked: bool = False

    @property
    def tensor(self) -> torch.Tensor:
        """The live weight, as `owner` has it now."""
        own = self.owner.__dict__.get("_parameters", ())  # what getattr would find last
        return own[self.name] if self.name in own else getattr(self.owner, self.name)

    def matrix(self, tensor: torch.Tensor | None = None) -> torch.Tensor:
        """`tensor` (default: the live weight) as (n, k) or, when stacked, (e, n, k), sharing its memory.

        A vector becomes one row. RuntimeError, from torch, if no strides can say it: a kernel in channels_last order.
        """
        tensor = self.tensor if tensor is None else tensor
        if tensor.ndim == 1:
            tensor = tensor.unsqueeze(0)
        elif tensor.ndim > 2 and not self.stacked:
            tensor = tensor.view(tensor.shape[0], -1)
        return tensor.mT if self.transposed else tensor

    def values(self, tensor: torch.Tensor | None = None) -> torch.Tensor:
        """`matrix` for reading: of its own memory where no strides can say it."""
        tensor = self.tensor if tensor is None else tensor
        return self.matrix(tensor.contiguous() if tensor.ndim > 2 and not self.stacked else tensor)

    def restore(self, matrix: torch.Tensor, shape: torch.Size | None = None) -> torch.Tensor:
        """The inverse of `matrix`: a tensor of the weight's shape (default: the live weight's) from a matrix.

        A matrix that is not the weight's keeps its shape.
        """
        shape = self.tensor.shape if shape is None else shape
        turned = matrix.mT if self.transposed else matrix
        return turned if turned.ndim == len(shape) or turned.numel() != shape.numel() else turned.reshape(shape)
