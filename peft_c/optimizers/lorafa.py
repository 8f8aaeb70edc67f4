"""LoRA-FA: A stays frozen and B follows the projected full gradient. Source: https://huggingface.co/papers/2308.03303."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..utils.model_prep import infer_device

if TYPE_CHECKING:
    from ..peft_model import PeftModel

# added to the diagonal of A A^T before it is inverted
_DELTA = 1e-8


def is_bf16_available() -> bool:
    """Whether the device that `infer_device` prefers has bfloat16; CPUs count as having it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    if torch.backends.mps.is_available():
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return True


class LoraFAOptimizer(Optimizer):
    """AdamW (with decoupled decay after the update) that gives lora_B the LoRA-FA gradient and leaves lora_A alone.

    The gradient of B is dB (A A^T)^-1 / scaling^2, which brings B A closest to a step along the full gradient.
    Parameters without "lora" in their name get plain AdamW.

    Args:
        params: Groups with `names` and `scaling_factors`, one per parameter, as `create_lorafa_optimizer` makes them.
        lr: Learning rate.
        betas: Decay rates of the running means of the gradient and its square.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        correct_bias: Whether the running means are corrected for their start at zero.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ):
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr} - should be >= 0.0")
        for beta in betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter: {beta} - should be in [0.0, 1.0)")
        if eps < 0.0:
            raise ValueError(f"Invalid epsilon value: {eps} - should be >= 0.0")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)
        self._legacy_scaling_factor_warned = False

    def _scaling_factors(self, group: dict[str, Any]) -> list[float | None]:
        if "scaling_factors" in group:
            return group["scaling_factors"]
        if "scaling_factor" not in group:
            raise KeyError("Expected optimizer param group to define `scaling_factors`.")
        if not self._legacy_scaling_factor_warned:
            warnings.warn(
                "`scaling_factor` is deprecated and will be removed after 2026-11-01. "
                "Please use `scaling_factors` instead.",
                FutureWarning,
            )
            self._legacy_scaling_factor_warned = True
        return [group["scaling_factor"]] * len(group["params"])

    @staticmethod
    def _projected_gradient(A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
        """dB (A A^T)^-1 / scaling^2 for A (r, in), B (out, r); the product in bfloat16 where there is such a unit."""
        gram = A @ A.T
        inverse = torch.linalg.pinv(gram + _DELTA * torch.eye(A.shape[0]).to(A.device))
        with torch.autocast(device_type=infer_device(), dtype=torch.bfloat16, enabled=is_bf16_available()):
            gradient = (1 / scaling**2) * (B.grad @ inverse)
        return gradient.to(B.grad.dtype)

    def _updates(self, group: dict[str, Any]) -> Iterator[tuple[str, str, nn.Parameter, torch.Tensor]]:
        """(key of the state, suffix of its entries, parameter, gradient) of everything in the group that moves."""
        params = dict(zip(group["names"], group["params"], strict=True))
        scalings = dict(zip(group["names"], self._scaling_factors(group), strict=True))
        keys: set[str] = set()
        for name, param in params.items():
            if re.search(r"lora_(embedding_)?A\b", name) and param.ndim == 2:
                continue
            if param.grad is None:
                continue
            A = params.get(re.sub(r"lora_(embedding_)?B\b", r"lora_\1A", name))
            if A is None or A is param or param.ndim != 2:
                yield name, "", param, param.grad
                continue
            layer, _, rest = name.partition("lora")
            key = f"{layer}lora"
            # the first adapter of a layer is known by the layer's name, others by their own
            key = key if key not in keys else f"{key}{rest}"
            keys.add(key)
            yield key, "_B", param, self._projected_gradient(A, param, scalings[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the loss of the `closure`, which computes the gradients anew, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for key, suffix, param, gradient in self._updates(group):
                state = self.state[key]
                if not state:
                    state["step"] = 0
                    state[f"exp_avg{suffix}"] = torch.zeros_like(param)
                    state[f"exp_avg_sq{suffix}"] = torch.zeros_like(param)
                state["step"] += 1
                self._adamw(
                    group, state["step"], state[f"exp_avg{suffix}"], state[f"exp_avg_sq{suffix}"], param, gradient
                )
        return loss

    @staticmethod
    def _adamw(
        group: dict[str, Any],
        step: int,
        mean: torch.Tensor,
        mean_square: torch.Tensor,
        param: torch.Tensor,
        gradient: torch.Tensor,
    ) -> None:
        beta1, beta2 = group["betas"]
        mean.mul_(beta1).add_(gradient, alpha=1.0 - beta1)
        mean_square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        step_size = group["lr"]
        if group["correct_bias"]:
            step_size *= math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)
        param.addcdiv_(mean, mean_square.sqrt().add_(group["eps"]), value=-step_size)
        if group["weight_decay"] > 0.0:
            param.add_(param, alpha=-group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(
    model: PeftModel,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """A `LoraFAOptimizer` over all parameters of a LoRA model; freezes lora_A.

    Args:
        model: The model. Each layer's own scaling is used.
        r: Rank, for parameter groups of older checkpoints.
        lora_alpha: Numerator of the scaling, likewise.
        lr: Learning rate.
        weight_decay: Weight decay.
        use_rslora: Deprecated; must agree with the configs of all active adapters (else ValueError) if given.
    """
    uses = {
        name: bool(getattr(model.peft_config[name], "use_rslora", False))
        for name in model.active_adapters
        if name in model.peft_config
    }
    if use_rslora is not None:
        mismatched = [name for name, value in uses.items() if value != use_rslora]
        if mismatched:
            raise ValueError(
                f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but the following active adapters "
                f"have `use_rslora` set differently in the model config: {mismatched}. Please configure rsLoRA via "
                "LoraConfig and remove the `use_rslora` argument from create_lorafa_optimizer as the parameter is "
                "deprecated."
            )
        warnings.warn(
            "`use_rslora` in create_lorafa_optimizer is deprecated and will be removed after 2026-11-01. "
            "Please configure rsLoRA via LoraConfig instead.",
            FutureWarning,
        )
    else:
        use_rslora = bool(uses) and all(uses.values())

    def scaling_of(name: str) -> float | None:
        # <layer>.lora_<factor>.<adapter>...
        layer, _, rest = name.rpartition(".lora_")
        parts = rest.split(".")
        if not layer or len(parts) < 2:
            return None
        return getattr(model.get_submodule(layer), "scaling", {}).get(parts[1])

    for name, param in model.named_parameters():
        if "lora_A" in name:
            param.requires_grad_(False)
    names, params = zip(*model.named_parameters(), strict=True)
    group = {
        "params": list(params),
        "lr": lr,
        "names": list(names),
        "scaling_factors": [scaling_of(name) for name in names],
        "scaling_factor": lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r,
        "betas": (0.9, 0.999),
        "weight_decay": weight_decay,
    }
    return LoraFAOptimizer([group])
