"""LoRA+: a higher learning rate for B than for A. Source: https://huggingface.co/papers/2402.12354."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from ..import_utils import loaded

if TYPE_CHECKING:
    from ..peft_model import PeftModel

_8BIT_OPTIMIZERS = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def _decayed_names(module: nn.Module, prefix: str = "") -> set[str]:
    """Names of the parameters outside of normalisation layers that are no biases."""
    norms = (nn.LayerNorm, *(loaded("transformers.pytorch_utils", "ALL_LAYERNORM_LAYERS") or ()))
    names = {prefix + name for name in module._parameters if "bias" not in prefix + name}
    for name, child in module.named_children():
        if not isinstance(child, norms):
            names |= _decayed_names(child, f"{prefix}{name}.")
    return names


def create_loraplus_optimizer(
    model: PeftModel, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An `optimizer_cls` over four groups of the trainable parameters: A, embeddings, B, and B without weight decay.

    B includes all one-dimensional parameters; those without decay are biases and parts of normalisation layers.

    Args:
        model: The model.
        optimizer_cls: The optimizer's class; for bitsandbytes' 8-bit ones embeddings are kept in 32 bits.
        lr: Learning rate of A and of anything else.
        loraplus_lr_ratio: Learning rate of B divided by `lr`, at least 1; harder tasks want a larger one.
        **kwargs: Further arguments of the optimizer, and `loraplus_lr_embedding` (1e-6), the learning rate of LoRA on
            embeddings, and `loraplus_weight_decay` (0.0).
    """
    from ..tuners.lora.layer import Embedding

    weight_decay = kwargs.pop("loraplus_weight_decay", 0.0)
    lr_embedding = kwargs.pop("loraplus_lr_embedding", 1e-6)
    decayed = _decayed_names(model)

    groups: dict[str, dict[str, Any]] = {
        "A": {"params": [], "weight_decay": weight_decay, "lr": lr},
        "embedding": {"params": [], "weight_decay": weight_decay, "lr": lr_embedding},
        "B": {"params": [], "weight_decay": weight_decay, "lr": lr * loraplus_lr_ratio},
        "B without decay": {"params": [], "weight_decay": 0.0, "lr": lr * loraplus_lr_ratio},
    }
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        # <layer>.lora_embedding_A.<adapter>
        owner = ".".join(name.split(".")[:-2])
        if owner and isinstance(model.get_submodule(owner), Embedding):
            group = "embedding"
        elif "lora_B" in name or param.ndim == 1:
            group = "B" if name in decayed else "B without decay"
        else:
            group = "A"
        groups[group]["params"].append(param)

    optimizer = optimizer_cls(list(groups.values()), lr=lr, **kwargs)
    if optimizer_cls.__name__ in _8BIT_OPTIMIZERS:
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer
