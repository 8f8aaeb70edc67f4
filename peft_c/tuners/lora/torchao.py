"""LoRA on linear layers whose weight is one of torchao's tensor subclasses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peft_c.import_utils import is_torchao_available
from peft_c.reexports import elsewhere

from ._quantized import RequantizedMerge, base_of
from .config import LoraConfig
from .core import _C, is_compiling, law  # noqa: F401 - see _LoraModule.forward
from .layer import Linear


class TorchaoLoraLinear(RequantizedMerge, Linear):
    """`get_apply_tensor_subclass()` returns the torchao config that merging quantises with; without it the layer can
    be trained but not merged. int4 weights are refused."""

    _merge_targets = None  # RequantizedMerge merges it, not law.py

    def __init__(self, *args: Any, get_apply_tensor_subclass: Callable | None = None, **kwargs: Any) -> None:
        if kwargs["config"].lora_bias:
            raise ValueError(f"{type(self).__name__} does not support lora_bias yet, set it to False")
        super().__init__(*args, **kwargs)
        self.get_apply_tensor_subclass = get_apply_tensor_subclass
        if get_apply_tensor_subclass is None:
            warnings.warn(
                f"{type(self).__name__} was instantiated without `get_apply_tensor_subclass`. Forward and training "
                "will work, but `merge()` / `unmerge()` will raise an error. Load the base model through transformers "
                "with a `TorchAoConfig` to have it found automatically."
            )
        self._check_dtype_supported()

    def _check_dtype_supported(self) -> None:
        from torchao.quantization import Int4Tensor

        if isinstance(self.get_base_layer().weight, Int4Tensor):
            raise TypeError(f"{type(self).__name__} only supports int8 weights for now.")

    def _dequantize(self) -> torch.Tensor:
        if self.get_apply_tensor_subclass is None:
            raise ValueError(
                f"{type(self).__name__} was instantiated without `get_apply_tensor_subclass`, which is required to "
                "re-quantize the base layer after merging or unmerging."
            )
        self._check_dtype_supported()
        weight = self.get_base_layer().weight
        try:
            return weight.dequantize()
        except NotImplementedError as exc:
            raise NotImplementedError(
                f"Weights of type {type(weight).__name__} do not support dequantization (yet), which is needed to "
                "support merging and unmerging."
            ) from exc

    def _requantize(self, weight: torch.Tensor) -> None:
        from torchao import quantize_

        base = self.get_base_layer()
        dtype = base.weight.dtype
        del base.weight  # assigning to its data would keep the quantised values
        base.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        quantize_(base, self.get_apply_tensor_subclass())


def dispatch_torchao(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """A `TorchaoLoraLinear` if the weight of `target` is a torchao tensor."""
    weight = getattr(base_of(target), "weight", None)
    if weight is None or not is_torchao_available():
        return None
    from torchao.utils import TorchAOBaseTensor

    if not isinstance(weight, TorchAOBaseTensor):
        return None
    return TorchaoLoraLinear(target, adapter_name, config=config, **kwargs)


__getattr__ = elsewhere(__name__, "tuners.lora.layer")
