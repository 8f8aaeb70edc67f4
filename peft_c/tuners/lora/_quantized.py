"""LoRA on linear layers whose weight is quantised: one layer class, and what a backend has to say about itself.

A backend module derives from `QuantizedLinear`, sets the class attributes that differ, gives `_dequantize` and
`_requantize` if it can merge, and has a dispatcher. The backend's package is imported by the dispatcher only.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from peft_c.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

from .config import LoraConfig
from .core import VARIANT_KWARG_KEYS, LoraLayer, LoraVariant


def base_of(target: nn.Module) -> nn.Module:
    """The layer that is adapted: `target`, or what it wraps if it has an adapter already."""
    return target.get_base_layer() if isinstance(target, BaseTunerLayer) else target


class RequantizedMerge:
    """Merging for weights that cannot be added to: dequantise, add, quantise again. It loses precision each time."""

    merge_notice: str | None = None  # what a merge warns of; "{}" is "Merge" or "Unmerge"

    def _dequantize(self) -> torch.Tensor:
        """The base weight as a float matrix (out, in)."""
        raise NotImplementedError

    def _requantize(self, weight: torch.Tensor) -> None:
        """Make `weight` the base weight."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """`scaling * B @ A` (out, in) in the adapter's dtype."""
        return self.lora_B[adapter].weight @ self.lora_A[adapter].weight * self.scaling[adapter]

    def _bias_delta(self, adapter: str) -> torch.Tensor | None:
        if not self.lora_bias.get(adapter):
            return None
        if getattr(self.get_base_layer(), "bias", None) is None:
            raise RuntimeError(
                "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias "
                f"(adapter '{adapter}', {type(self.get_base_layer()).__name__})."
            )
        return self.lora_B[adapter].bias.data * self.scaling[adapter]

    @torch.no_grad()
    def _change(self, adapter: str, action: str, safe: bool) -> None:
        """Add ("Merge") or remove ("Unmerge") an adapter."""
        if self.merge_notice is not None:
            warnings.warn(self.merge_notice.format(action))
        sign = 1 if action == "Merge" else -1
        weight, bias_delta = self._dequantize(), self._bias_delta(adapter)
        variant: LoraVariant | None = self.lora_variant.get(adapter)
        if variant is None:
            delta = self.get_delta_weight(adapter)
            weight = weight.to(device=delta.device, dtype=torch.promote_types(weight.dtype, delta.dtype))
            weight = weight + sign * delta
        elif sign > 0:
            weight = variant.merge_safe(self, adapter, weight)
        else:
            weight = variant.unmerge(self, adapter, weight)
        parts = (weight,) if bias_delta is None else (weight, bias_delta)
        if safe and not all(torch.isfinite(part).all() for part in parts):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        self._requantize(weight)
        if bias_delta is not None:
            self.get_base_layer().bias.data += sign * bias_delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (default: the active ones); `safe_merge`: ValueError for weights that are not finite."""
        for adapter in check_adapters_to_merge(self, adapter_names) or ():
            if adapter in self.lora_A:
                self._change(adapter, "Merge", safe_merge)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.lora_A:
                self._change(adapter, "Unmerge", safe=False)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output plus what the active adapters add; arguments as for `lora.Linear`.

        The adapters' share is computed in their own dtype, or in autocast's, and added in that of the base output.
        """
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        variant_kwargs = {key: kwargs.pop(key, None) for key in VARIANT_KWARG_KEYS}
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **variant_kwargs, **kwargs)

        result = self._own(self.base_layer(x, *args, **kwargs))
        dtype = result.dtype
        cast = not torch.is_autocast_enabled(x.device.type)
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            if cast:
                x = self._cast_input_dtype(x, self.lora_A[adapter].weight.dtype)
            variant = self.lora_variant.get(adapter)
            if variant is None:
                update = self.lora_B[adapter](self.lora_A[adapter](self.lora_dropout[adapter](x)))
                update = update * self.scaling[adapter]
                result = result + (update.to(dtype) if cast else update)
            else:
                result = variant.forward(self, active_adapter=adapter, x=x, result=result, **variant_kwargs, **kwargs)
                result = result.to(dtype) if cast else result
        return result

    def _own(self, result: torch.Tensor) -> torch.Tensor:
        """Hook for backends whose output must not be worked with directly."""
        return result


class QuantizedLinear(RequantizedMerge, nn.Module, LoraLayer):
    """LoRA on a quantised linear layer. Class attributes say what a backend cannot do:

    `refused`: config fields that must be unset; `variants`: the config fields of its variants and the names of their
    classes; `mixed_batches`; `merge_error`: the type of exception that merging raises, if the weight cannot be
    rewritten; `keeps_alias`: also refer to the base layer as `quant_linear_module`.
    """

    refused: tuple[str, ...] = ("use_dora", "velora_config")
    variants: dict[str, str] = {}
    mixed_batches = True
    merge_error: type[Exception] | None = None
    keeps_alias = False

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        for name in self.refused:
            if getattr(config, name):
                unset = "None" if name == "velora_config" else "False"
                raise ValueError(f"{type(self).__name__} does not support {name} yet, please set it to {unset}")
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        if self.keeps_alias:
            self.quant_linear_module = base_layer
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        from . import variants

        return {(): None, **{(field,): getattr(variants, cls) for field, cls in self.variants.items()}}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        self._check_mergeable("Merging")
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        self._check_mergeable("Unmerging")
        super().unmerge()

    def _check_mergeable(self, action: str) -> None:
        if self.merge_error is not None:
            raise self.merge_error(f"{action} LoRA layers is not supported for {type(self).__name__} layers.")

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        super()._check_forward_args(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None and not self.mixed_batches:
            raise ValueError(f"{type(self).__name__} does not support mixed_batch_forward yet.")

    def __repr__(self) -> str:
        return "lora." + super().__repr__()
