"""LoRA on HQQ layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from peft_c.import_utils import is_hqq_available
from peft_c.reexports import elsewhere

from ._quantized import QuantizedLinear, base_of
from .config import LoraConfig


class HqqLoraLinear(QuantizedLinear):
    refused = ("lora_bias", "velora_config")
    variants = {"use_dora": "DoraLinearVariant"}

    def _dequantize(self) -> torch.Tensor:
        return self.get_base_layer().dequantize()

    def _requantize(self, weight: torch.Tensor) -> None:
        from hqq.core.quantize import HQQLinear

        old = self.get_base_layer()
        options = copy.deepcopy(old.quant_config)
        # the constructor takes `offload_meta` among the options, `quantize` does not
        new = HQQLinear(
            None, {**options, "offload_meta": old.offload_meta}, compute_dtype=old.compute_dtype, device=old.device
        )
        options.pop("offload_meta", None)
        new.quantize(weight, **options)
        self.base_layer = new


def dispatch_hqq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """An `HqqLoraLinear` if `target` is an HQQ layer."""
    if not is_hqq_available():
        return None
    from hqq.core.quantize import HQQLinear

    base = base_of(target)
    return HqqLoraLinear(base, adapter_name, config=config, **kwargs) if isinstance(base, HQQLinear) else None


__getattr__ = elsewhere(__name__, "tuners.lora.layer")
