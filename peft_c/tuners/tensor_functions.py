"""PEFT's functions of tensors behind LoHa, LoKr, C3A and BOFT, under its names."""

from __future__ import annotations

from typing import Any

import torch


def convolve(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """x (..., n * b) times the block circulant matrix of `kernel` (m, n, b), transposed: (..., m * b)."""
    n, b = kernel.shape[1:]
    spectrum = torch.fft.ifft(x.unflatten(-1, (n, b))).unsqueeze(-3) * torch.fft.fft(kernel)
    return torch.fft.fft(spectrum.sum(-2)).real.flatten(-2)


def tensor_product(t: torch.Tensor, wa: torch.Tensor, wb: torch.Tensor) -> torch.Tensor:
    """sum_ij t[i, j] wa[i, :] wb[j, :] for t (i, j, *kernel): (columns of wa, columns of wb, *kernel)."""
    return torch.einsum("ijkl,ip,jr->prkl", t, wa, wb)


def make_kron(w1: torch.Tensor, w2: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """kron(w1, w2) * scale; w2 may have a kernel."""
    if w2.ndim == 4:
        w1 = w1[:, :, None, None]
    return torch.kron(w1, w2.contiguous()) * scale


def make_weight(
    w1a: torch.Tensor, w1b: torch.Tensor, w2a: torch.Tensor, w2b: torch.Tensor, scale: torch.Tensor | float = 1
) -> torch.Tensor:
    """(w1a w1b) * (w2a w2b) * scale."""
    return (w1a @ w1b) * (w2a @ w2b) * scale


def make_weight_cp(
    t1: torch.Tensor,
    w1a: torch.Tensor,
    w1b: torch.Tensor,
    t2: torch.Tensor,
    w2a: torch.Tensor,
    w2b: torch.Tensor,
    scale: torch.Tensor | float = 1,
) -> torch.Tensor:
    """The product of two `tensor_product`, times scale."""
    return tensor_product(t1, w1a, w1b) * tensor_product(t2, w2a, w2b) * scale


class HadaWeight:
    """`make_weight`, as PEFT calls it; autograd knows the gradients."""

    apply = staticmethod(make_weight)


class HadaWeightCP:
    """`make_weight_cp`, likewise."""

    apply = staticmethod(make_weight_cp)


class BlockCircularConvolution:
    """`convolve`, likewise."""

    apply = staticmethod(convolve)


def cayley(data: torch.Tensor) -> torch.Tensor:
    """(1 + S)^-1 (1 - S), a rotation, for each matrix X of `data` (..., b, b), with S = (X - X^T) / 2."""
    skew = (data - data.mT) / 2
    eye = torch.eye(data.shape[-1], device=data.device)  # in fp32: half precision is not solved
    return torch.linalg.solve(eye + skew, eye - skew, left=False).to(data.dtype)


def butterfly_order(n: int, b: int, r: int = 3, n_butterfly_factor: int = 1) -> torch.Tensor:
    """The numbers to n in b groups, each with its even pieces of r numbers in front of the odd ones; unchanged where
    there is no factor. ValueError if a group is too small for two pieces."""
    numbers = torch.arange(n)
    if n_butterfly_factor == 0:
        return numbers
    if 2 * b * r > n:
        raise ValueError("Invalid number of blocks!")
    pieces = numbers.view(b, -1, r)
    return torch.cat([pieces[:, ::2], pieces[:, 1::2]], dim=1).flatten()


def permutation(indices: torch.Tensor) -> torch.Tensor:
    """The matrix that brings what is at indices[i] to i."""
    return torch.eye(len(indices))[torch.as_tensor(indices, device="cpu")]


def butterflies(layer: Any) -> torch.Tensor:
    """The permutations P_i (factors, in, in) of the adapter that a layer of BOFT got last."""
    *_, R = layer.boft_R.values()
    factors, blocks, size = R.shape[:3]
    orders = [butterfly_order(blocks * size, blocks >> i, size // 2, factors - 1) for i in range(factors)]
    return torch.stack([permutation(order) for order in orders]).to(R.device)


def block_diagonal(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks (factors, number, b, b) on the diagonals of (factors, number * b, number * b)."""
    return torch.stack([torch.block_diag(*factor) for factor in blocks])


class FastBlockDiag:
    """`block_diagonal`, likewise."""

    apply = staticmethod(block_diagonal)


# method -> the names that its modules have for them
FUNCTIONS = {
    "boft": {"FastBlockDiag": FastBlockDiag},
    "c3a": {"BlockCircularConvolution": BlockCircularConvolution},
    "loha": {
        "HadaWeight": HadaWeight,
        "HadaWeightCP": HadaWeightCP,
        "make_weight": make_weight,
        "make_weight_cp": make_weight_cp,
    },
    "lokr": {"make_kron": make_kron, "make_weight_cp": tensor_product},
}
# method -> what its layers have for forwards that were written for PEFT's
LAYERS = {
    "boft": {
        "block_butterfly_perm": staticmethod(butterfly_order),
        "boft_P": property(butterflies),
        "cayley_batch": staticmethod(cayley),
        "fbd_cuda_available": True,  # FastBlockDiag may be called, on any device
        "perm2mat": staticmethod(permutation),
    },
}
