"""PEFT's functions of tensors behind LoHa, LoKr and C3A, under its names."""

from __future__ import annotations

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


# method -> the names that its modules have for them
FUNCTIONS = {
    "c3a": {"BlockCircularConvolution": BlockCircularConvolution},
    "loha": {
        "HadaWeight": HadaWeight,
        "HadaWeightCP": HadaWeightCP,
        "make_weight": make_weight,
        "make_weight_cp": make_weight_cp,
    },
    "lokr": {"make_kron": make_kron, "make_weight_cp": tensor_product},
}
