"""Riemannian preconditioning of LoRA's gradients. Source: https://huggingface.co/papers/2402.02347."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from ..peft_model import PeftModel


def _collect_lora_pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The pairs A (r, in), B (out, r) of trainable matrices, matched by name; other parameters have no partner."""
    params = dict(model.named_parameters())
    pairs = [(param, params.get(name.replace(".lora_A.", ".lora_B."))) for name, param in params.items()]
    return [
        (A, B)
        for A, B in pairs
        if B is not None and B is not A and all(p.ndim == 2 and p.requires_grad for p in (A, B))
    ]


class _RiemannianPreconditioner:
    """Replaces the gradients of A by (B^T B + reg I)^-1 dA and of B by dB (A A^T + reg I)^-1, in place.

    Both matrices are r x r. `reg` keeps them invertible.
    """

    def __init__(self, lora_pairs: list[tuple[nn.Parameter, nn.Parameter]], reg: float) -> None:
        self.lora_pairs = lora_pairs
        self.reg = reg

    @staticmethod
    def _damped_inverse(mat: torch.Tensor, reg: float) -> torch.Tensor:
        # the pseudo-inverse stands a rank-deficient factor even with a tiny reg
        return torch.linalg.pinv(mat + reg * torch.eye(mat.shape[-1], dtype=mat.dtype, device=mat.device))

    @torch.no_grad()
    def step(self) -> None:
        """Precondition the gradients that are there, computing in float32 at least."""
        for A, B in self.lora_pairs:
            dtype = torch.promote_types(A.dtype, torch.float32)
            a, b = A.detach().to(dtype), B.detach().to(dtype)
            if A.grad is not None:
                A.grad.copy_(self._damped_inverse(b.T @ b, self.reg) @ A.grad.to(dtype))
            if B.grad is not None:
                B.grad.copy_(B.grad.to(dtype) @ self._damped_inverse(a @ a.T, self.reg))


def create_riemannian_optimizer(
    model: PeftModel, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimizer of a subclass of `optimizer_cls` whose `step` preconditions the gradients of lora_A and lora_B.

    All other trainable parameters (embeddings' LoRA among them) are updated as by `optimizer_cls`.

    Args:
        model: The model.
        optimizer_cls: For instance `torch.optim.AdamW` or SGD; not one whose step needs a closure.
        lr: Learning rate.
        reg: Added to the diagonals of the r x r matrices before they are inverted.
        **kwargs: Further arguments of the optimizer.

    Raises:
        TypeError: if `optimizer_cls` is no optimizer class.
        ValueError: if the model has no trainable pair of lora_A and lora_B, or if the step needs a closure.
    """
    if not issubclass(optimizer_cls, Optimizer):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    pairs = _collect_lora_pairs(model)
    if not pairs:
        raise ValueError(
            "create_riemannian_optimizer did not find any trainable lora_A/lora_B parameter pairs on the model. "
            "The Riemannian preconditioner only applies to LoRA-style adapters."
        )
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{optimizer_cls.__name__} requires a closure and re-evaluates the objective inside step(), with another "
            "preconditioner each time, which its line search or curvature estimate does not allow. "
            "Use an optimizer whose step() has an optional closure (SGD, AdamW, etc)."
        )
    preconditioner = _RiemannianPreconditioner(pairs, reg=reg)

    class RiemannianPreconditionedOptimizer(optimizer_cls):
        @torch.no_grad()
        def step(self, closure: Callable | None = None) -> Any:
            if closure is not None:
                raise ValueError(
                    "The Riemannian-preconditioned optimizer does not support closures: they compute the gradients "
                    "anew inside step(), after they have been preconditioned."
                )
            preconditioner.step()
            return super().step()

    return RiemannianPreconditionedOptimizer([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)
