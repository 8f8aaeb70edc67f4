"""LoRA on bitsandbytes' 8 bit and 4 bit linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_c.import_utils import is_bnb_4bit_available, is_bnb_available
from peft_c.reexports import elsewhere
from peft_c.utils.integrations import dequantize_bnb_weight

from ._quantized import QuantizedLinear, base_of
from .config import LoraConfig


class _BnbLinear(QuantizedLinear):
    refused = ("velora_config",)
    variants = {
        "use_dora": "DoraLinearVariant",
        "alora_invocation_tokens": "ALoraLinearVariant",
        "arrow_config": "ArrowLinearVariant",
    }


class Linear8bitLt(_BnbLinear):
    merge_notice = "{} lora module to 8-bit linear may get different generations due to rounding errors."

    def _dequantize(self) -> torch.Tensor:
        base = self.get_base_layer()
        if base.state.SCB is None:
            base.state.SCB = base.weight.SCB
        return dequantize_bnb_weight(base.weight, state=base.state)

    def _requantize(self, weight: torch.Tensor) -> None:
        from bitsandbytes.nn import Int8Params

        base = self.get_base_layer()
        old = base.weight
        new = Int8Params(weight.to("cpu"), requires_grad=False, has_fp16_weights=old.has_fp16_weights)
        base.weight = new.to(old.device)
        base.state.reset_grads()


class Linear4bit(_BnbLinear):
    merge_notice = "{} lora module to 4-bit linear may get different generations due to rounding errors."

    def _dequantize(self) -> torch.Tensor:
        weight = self.get_base_layer().weight
        return dequantize_bnb_weight(weight, state=weight.quant_state)

    def _requantize(self, weight: torch.Tensor) -> None:
        from bitsandbytes.nn import Params4bit

        base = self.get_base_layer()
        old = base.weight
        # torch.compile may have left private attributes
        options = {key: value for key, value in vars(old).items() if not key.startswith("_") and key != "data"}
        if "bnb_quantized" in options:
            options["bnb_quantized"] = False
        options["requires_grad"] = False
        base.weight = Params4bit(weight.to("cpu"), **options).to(old.device)

    def _own(self, result: torch.Tensor) -> torch.Tensor:
        # backpropagation through a changed view of the 4 bit output can fail
        return result.clone()


def dispatch_bnb_8bit(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """A `Linear8bitLt` if `target` is one and the model was loaded in 8 bit."""
    if not (kwargs.get("loaded_in_8bit", False) and is_bnb_available()):
        return None
    from bitsandbytes.nn import Linear8bitLt as Base

    return Linear8bitLt(target, adapter_name, config=config, **kwargs) if isinstance(base_of(target), Base) else None


def dispatch_bnb_4bit(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """A `Linear4bit` if `target` is one and the model was loaded in 4 bit."""
    if not (kwargs.get("loaded_in_4bit", False) and is_bnb_4bit_available()):
        return None
    from bitsandbytes.nn import Linear4bit as Base

    return Linear4bit(target, adapter_name, config=config, **kwargs) if isinstance(base_of(target), Base) else None


__getattr__ = elsewhere(__name__, "tuners.lora.layer")
