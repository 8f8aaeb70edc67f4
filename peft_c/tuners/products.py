"""Products of matrices as rooms write them: in C where that is faster, else in torch, in fp32 where the CPU multiplies
half precision slowly."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .. import _C
from ..fast import product_in_graph
from .changes import multiplies_slowly
from .tuner_layer import is_transformers_conv1d

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LARGE = 2**15  # elements of a matrix from which on the kernels take products (SMALL_WEIGHT of linear.c)
FEW = 64  # rows for which multiplying by large factors in C is faster than in torch


def rows_of(x: torch.Tensor) -> float:
    """How many rows x has, to choose by; infinitely many while a program is exported, which is to take any number."""
    return math.inf if torch.compiler.is_exporting() else x.shape[:-1].numel()


def c_is_worth_asking(x: torch.Tensor) -> bool:
    """Whether x is where C may act: on the CPU, outside of autograd and compilation."""
    return x.is_cpu and not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def are_plain(*tensors: torch.Tensor) -> bool:
    """Whether C may read these tensors here and now."""
    plain = all(type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided for tensor in tensors)
    return plain and _C.may_act()


def c_takes(*tensors: torch.Tensor) -> bool:
    """Whether C may multiply these tensors here and now."""
    return c_is_worth_asking(tensors[0]) and are_plain(*tensors)


def c_takes_in_graph(x: torch.Tensor, matrix: torch.Tensor) -> bool:
    """Whether C may multiply x by the matrix here and now under autograd, and torch would take much longer."""
    large = torch.is_grad_enabled() and matrix.dim() == 2 and matrix.numel() >= LARGE and x.dim() > 1
    return large and not torch.compiler.is_compiling() and multiplies_slowly(x) and are_plain(x, matrix)


def multiply(function: Callable[..., torch.Tensor], *tensors: torch.Tensor | None) -> torch.Tensor:
    """function(*tensors), products of matrices, in the dtype of the first; half precision that the CPU multiplies
    slowly is multiplied in fp32 and rounded once.

    Microseconds on 2 threads of Zen 3, which has no bf16 instructions, bf16 / by fp32, for weights of 1024 x 1024:
    F.linear of 1 row 105 / 255, 8 rows 881 / 661, 64 rows 6716 / 1999, 512 rows 57357 / 8138;
    x @ W   of 1 row 2127 / 189, 8 rows 18113 / 1160, 64 rows 145606 / 2000.
    """
    if not multiplies_slowly(tensors[0]):
        return function(*tensors)
    return function(*[tensor if tensor is None else tensor.float() for tensor in tensors]).to(tensors[0].dtype)


def multipliable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype in which `multiply` multiplies it."""
    return tensor.float() if multiplies_slowly(tensor) else tensor


def accumulate(y: torch.Tensor, values: torch.Tensor, multiply: bool = False) -> torch.Tensor:
    """y += values or y *= values, in C where that is faster: half precision, other dtypes."""
    if y.dtype is values.dtype is torch.float32 or not c_is_worth_asking(y) or not _C.accumulate(y, values, multiply):
        return y.mul_(values) if multiply else y.add_(values)
    return y


def add_product(y: torch.Tensor, inner: torch.Tensor, matrix: torch.Tensor, in_place: bool) -> torch.Tensor:
    """y + inner @ matrix, or y + inner * matrix if that is a vector, all of one dtype."""
    if matrix.dim() == 1:
        return y.addcmul_(inner, matrix) if in_place else torch.addcmul(y, inner, matrix)
    if not in_place or multiplies_slowly(y) or not y.is_contiguous():
        return accumulate(y, product(inner, matrix)) if in_place else y + product(inner, matrix)
    if y.dim() == 2:
        return y.addmm_(inner, matrix)
    y.view(-1, y.shape[-1]).addmm_(inner.reshape(-1, len(matrix)), matrix)
    return y


def into(operation: Callable[..., torch.Tensor], y: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """operation(y, other), in the memory of y, which nobody else holds, where that can be."""
    free = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    return operation(y, other, out=y if free and torch.result_type(y, other) is y.dtype else None)


def einsum(equation: str, *tensors: torch.Tensor) -> torch.Tensor:
    """torch.einsum, in fp32 where that is faster."""
    return multiply(partial(torch.einsum, equation), *tensors)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear(x, weight, bias); in C where that is faster: for few rows of x, and half precision on some CPUs."""
    if weight.dtype == x.dtype and weight.numel() >= LARGE:
        if c_takes(x, weight):
            return _C.lowrank_linear(x, weight, bias, None, (), ())
        if c_takes_in_graph(x, weight) and (bias is None or bias.dtype == x.dtype):
            return product_in_graph(x, weight.T, bias)
    return multiply(F.linear, x, weight, bias)


def product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x @ matrix (k, n), for x (..., k); in C where that is faster, as in `linear`."""
    if x.dtype == matrix.dtype:
        if c_takes_in_graph(x, matrix):
            return product_in_graph(x, matrix)
        result = _C.linear_grad(x, matrix) if c_takes(x, matrix) else None
        if result is not None:
            return result
    return multiply(torch.matmul, x, matrix)


def apply_weight(base: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What `base` computes from x, with other weights: `weight` has the shape of its own."""
    if isinstance(base, CONVOLUTIONS):
        return multiply(base._conv_forward, x, weight, bias)
    if isinstance(base, nn.Embedding):
        options = (base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse)
        return F.embedding(x, weight, *options)
    return linear(x, weight.T if is_transformers_conv1d(base) else weight, bias)
