"""LoRA on EETQ layers, of the eetq package or of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_c.import_utils import is_eetq_available
from peft_c.reexports import elsewhere

from ._quantized import QuantizedLinear, base_of
from .config import LoraConfig


class EetqLoraLinear(QuantizedLinear):
    merge_error = AttributeError
    mixed_batches = False
    keeps_alias = True


def dispatch_eetq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """An `EetqLoraLinear` if `target` is an EETQ layer."""
    if not is_eetq_available():
        return None
    from eetq import EetqLinear

    types: tuple[type, ...] = (EetqLinear,)
    try:
        from transformers.integrations.eetq import EetqLinear as TransformersEetqLinear

        types += (TransformersEetqLinear,)
    except ImportError:
        pass
    base = base_of(target)
    if not isinstance(base, types):
        return None
    new_module = EetqLoraLinear(target, adapter_name, config=config, **kwargs)
    target.weight = base.weight
    if hasattr(target, "bias"):
        target.bias = base.bias
    return new_module


__getattr__ = elsewhere(__name__, "tuners.lora.layer")
