"""LoRA on AQLM layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_c.import_utils import is_aqlm_available
from peft_c.reexports import elsewhere

from ._quantized import QuantizedLinear, base_of
from .config import LoraConfig


class AqlmLoraLinear(QuantizedLinear):
    merge_error = NotImplementedError
    mixed_batches = False


def dispatch_aqlm(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """An `AqlmLoraLinear` if `target` is an AQLM layer."""
    if not is_aqlm_available():
        return None
    from aqlm import QuantizedLinear as Base

    base = base_of(target)
    if not isinstance(base, Base):
        return None
    new_module = AqlmLoraLinear(target, adapter_name, config=config, **kwargs)
    target.qweight = base.codes
    return new_module


__getattr__ = elsewhere(__name__, "tuners.lora.layer")
