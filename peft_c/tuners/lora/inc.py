"""LoRA on the FP8 layers of Intel Neural Compressor, which compute like plain linear layers but cannot be merged."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_c.import_utils import is_inc_available
from peft_c.reexports import elsewhere

from ._quantized import base_of
from .config import LoraConfig
from .core import _C, is_compiling, law  # noqa: F401 - see _LoraModule.forward
from .layer import Linear


class IncLoraLinear(Linear):
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("Merging LoRA with INC layers is not yet implemented")

    def unmerge(self) -> None:
        raise NotImplementedError("Unmerging LoRA from INC layers is not yet implemented")


def dispatch_inc(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """An `IncLoraLinear` if `target` is an FP8 linear layer."""
    if not is_inc_available():
        return None
    from neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules import PatchedLinear

    if not isinstance(base_of(target), PatchedLinear):
        return None
    return IncLoraLinear(target, adapter_name, config=config, **kwargs)


__getattr__ = elsewhere(__name__, "tuners.lora.layer")
