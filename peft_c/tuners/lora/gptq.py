"""LoRA and QALoRA on GPTQ layers of gptqmodel."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_c.import_utils import is_gptqmodel_available
from peft_c.reexports import elsewhere

from ._quantized import QuantizedLinear, base_of
from .config import LoraConfig
from .core import LoraVariant


class GPTQLoraLinear(QuantizedLinear):
    """`use_qalora` makes A act on inputs that are averaged in groups."""

    merge_error = NotImplementedError
    mixed_batches = False
    keeps_alias = True

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        variant = super().resolve_lora_variant(config=config, **kwargs)
        if config.use_qalora and variant is None:
            from .variants import QALoraLinearVariant

            return QALoraLinearVariant()
        return variant


def dispatch_gptq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """A `GPTQLoraLinear` if `target` is a GPTQ layer."""
    if not is_gptqmodel_available():
        return None
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    base = base_of(target)
    if not isinstance(base, BaseQuantLinear):
        return None
    new_module = GPTQLoraLinear(target, adapter_name, config=config, **kwargs)
    target.qweight = base.qweight
    return new_module


__getattr__ = elsewhere(__name__, "tuners.lora.layer")
