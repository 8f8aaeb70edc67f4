"""Intruder dimensions: singular directions that an adapter brings in and that the base weight does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .core import LoraLayer


def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Add a copy of a LoRA adapter with weakened intruder dimensions, and activate it.

    This recovers what fine-tuning made the model forget, at some cost in the trained task; `mitigation_lambda` trades
    one for the other. Source: https://arxiv.org/abs/2410.21228, where figure 8 shows that trade-off.

    Args:
        peft_model: A `PeftModel` with LoRA.
        old_adapter_name: The adapter to copy.
        new_adapter_name: The name of the copy.
        top_k: How many leading singular directions of the merged weight are looked at.
        threshold_epsilon: A direction is an intruder if its cosine similarity with every direction of the base weight
            is below this.
        mitigation_lambda: The fraction of an intruder that is kept.
        logging_sink: Called with one line per layer; None for silence.

    Raises:
        ValueError: if the model is not a LoRA one, or has no adapter `old_adapter_name`.
    """
    log = logging_sink or (lambda message: None)
    if peft_model.peft_type != "LORA":
        raise ValueError("The provided model is not using LoRA and is therefore not supported.")
    if old_adapter_name not in peft_model.peft_config:
        raise ValueError(f"There is no adapter '{old_adapter_name}', only {sorted(peft_model.peft_config)}.")
    peft_model.add_adapter(new_adapter_name, peft_model.peft_config[old_adapter_name])

    for name, layer in peft_model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        A, B = _factors(layer, old_adapter_name)
        count, reduced = _reduce(layer, old_adapter_name, top_k, threshold_epsilon, mitigation_lambda)
        log(f"{name}: Intruders: {count}" if count else f"{name}: No intruders")
        unchanged = (A.data.clone(), B.data.clone())
        for target, value in zip(_factors(layer, new_adapter_name), reduced or unchanged, strict=True):
            target.data = value
    log(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


def _factors(layer: LoraLayer, adapter: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    if adapter in layer.lora_B:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]


@torch.no_grad()
def _reduce(
    layer: LoraLayer, adapter: str, top_k: int, epsilon: float, keep: float
) -> tuple[int, tuple[torch.Tensor, torch.Tensor] | None]:
    """The number of intruders among the leading directions, and the factors without them (None if there are none)."""
    weight = layer.get_base_layer().weight.data
    merged = weight + layer.get_delta_weight(adapter)
    dtype = weight.dtype
    if dtype in (torch.float16, torch.bfloat16):  # no SVD in half precision
        weight, merged = weight.float(), merged.float()

    U_base = torch.linalg.svd(weight, full_matrices=False).U
    U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    similarity = (U[:, :top_k].T @ U_base).abs().amax(1)
    intruders = (similarity < epsilon).nonzero().flatten()
    if not len(intruders):
        return 0, None

    # as in the paper the intruders of W + dW are weakened, not those of dW alone; the rest is made low rank again
    weakened = merged + (keep - 1) * (U[:, intruders] * S[intruders]) @ Vh[intruders]
    U, S, Vh = torch.linalg.svd((weakened - weight) / layer.scaling[adapter], full_matrices=False)
    r = layer.r[adapter]
    root = S[:r].sqrt()
    A, B = root[:, None] * Vh[:r], U[:, :r] * root
    if _stored_transposed(layer, adapter):
        A, B = B.T.contiguous(), A.T.contiguous()
    return len(intruders), (A.to(dtype), B.to(dtype))


def _stored_transposed(layer: LoraLayer, adapter: str) -> bool:
    """Whether the base layer stores the transpose of `B @ A`: embeddings, and `fan_in_fan_out` layers."""
    return adapter not in layer.lora_B or getattr(layer, "fan_in_fan_out", False)
