"""LoRA on AWQ layers of gptqmodel."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_c.import_utils import is_gptqmodel_available
from peft_c.reexports import elsewhere

from ._quantized import QuantizedLinear, base_of
from .config import LoraConfig


class AwqLoraLinear(QuantizedLinear):
    merge_error = NotImplementedError
    mixed_batches = False
    keeps_alias = True


def dispatch_awq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """An `AwqLoraLinear` if `target` is an AWQ layer."""
    if not is_gptqmodel_available():
        return None
    from peft_c.utils.other import is_gptqmodel_awq_layer

    base = base_of(target)
    if not is_gptqmodel_awq_layer(base):
        return None
    new_module = AwqLoraLinear(target, adapter_name, config=config, **kwargs)
    target.qweight = base.qweight
    return new_module


__getattr__ = elsewhere(__name__, "tuners.lora.layer")
