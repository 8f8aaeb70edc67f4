"""LoRA on TransformerEngine's Linear, LayerNormLinear and LayerNormMLP."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_c.import_utils import is_te_pytorch_available
from peft_c.reexports import elsewhere

from ._quantized import QuantizedLinear, base_of
from .config import LoraConfig


class TeLinear(QuantizedLinear):
    """LoRA on one of TransformerEngine's linear layers; it cannot be merged."""

    merge_error = NotImplementedError
    mixed_batches = False


def dispatch_transformer_engine(
    target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
) -> nn.Module | None:
    """A `TeLinear` if `target` is one of TransformerEngine's linear layers."""
    if not is_te_pytorch_available():
        return None
    import transformer_engine.pytorch as te

    types = (te.LayerNormLinear, te.LayerNormMLP, te.Linear)
    return TeLinear(target, adapter_name, config=config, **kwargs) if isinstance(base_of(target), types) else None


__getattr__ = elsewhere(__name__, "tuners.lora.layer")
