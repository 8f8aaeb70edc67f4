"""LoRA for nn.Conv1d, nn.Conv2d and nn.Conv3d."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import law
from .core import LoraLayer, LoraVariant, _LoraModule

if TYPE_CHECKING:
    from .config import LoraConfig


class _ConvNd(_LoraModule):
    """LoRA for convolutions: A has the base layer's kernel, stride, padding and dilation, B a kernel of 1.

    With groups > 1, B is grouped and A is not, so such adapters cannot be merged; r has to be divisible by groups.
    """

    _conv: tuple[int, str]  # dimensions of the weight, name of the function in torch.nn.functional

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        if kwargs.get("use_alora", False):
            raise ValueError("aLoRA does not support adapting conv layers.")
        if config.velora_config is not None:
            raise ValueError("VeLoRA does not support adapting conv layers.")
        if self.get_base_layer().groups > 1:
            warnings.warn("LoRA adapter added to ConvNd layer with groups > 1. Merging is not supported.")
        self._active_adapter = adapter_name
        self._kernel_dim = base_layer.weight.dim()
        dims, function = self._conv
        if self._kernel_dim != dims:
            raise ValueError(f"{type(self).__name__} layer kernel must have {dims} dimensions, not {self._kernel_dim}")
        self.conv_fn = getattr(F, function)
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _check_config(self, r: int, config: LoraConfig) -> None:
        base = self.get_base_layer()
        if r % base.groups:
            raise ValueError(
                f"Targeting a {type(base).__name__} with groups={base.groups} and rank {r}. Currently, support is "
                "limited to conv layers where the rank is divisible by groups. Either choose a different rank or do "
                "not target this specific layer."
            )

    def _make_factors(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        base = self.get_base_layer()
        ones = (1,) * (self._kernel_dim - 2)
        options: dict[str, Any] = {}
        if any(step != 1 for step in base.dilation):
            options["dilation"] = base.dilation
        if base.padding_mode != "zeros":
            options["padding_mode"] = base.padding_mode
        conv = type(base)
        self.lora_A[adapter_name] = conv(
            self.in_features, r, base.kernel_size, base.stride, base.padding, bias=False, **options
        )
        self.lora_B[adapter_name] = conv(r, self.out_features, ones, ones, groups=base.groups, bias=config.lora_bias)

    def _get_dora_factor_view(self) -> tuple[int, ...]:
        return (-1,) + (1,) * (self._kernel_dim - 1)

    def _row_factors(self, x: torch.Tensor, names: list[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A of all rows as the groups of one convolution."""
        base = self.get_base_layer()
        A, B = ([container[name] for name in names] for container in (self.lora_A, self.lora_B))
        plain = base.groups == 1 and base.padding_mode == "zeros" and x.dim() == self._kernel_dim
        if self.training or not plain or not all(map(self._is_plain, A + B)):
            return None
        weight = torch.cat([part.weight for part in A])
        groups = x.to(weight.dtype).reshape(1, -1, *x.shape[2:])
        hidden = self.conv_fn(groups, weight, None, base.stride, base.padding, base.dilation, len(x))
        return torch.stack([part.weight.flatten(1) for part in B]), hidden.view(len(x), self.r[names[0]], -1)

    def _is_plain(self, part: nn.Module) -> bool:
        hooks = part._forward_hooks or part._forward_pre_hooks
        return type(part) is type(self.get_base_layer()) and part.bias is None and not hooks

    def _low_rank(self, adapter: str) -> law.LowRank:
        if self.get_base_layer().groups > 1:
            raise NotImplementedError("Merging is not supported for _ConvNd layers with groups > 1!")
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return law.LowRank(A.flatten(1), B.flatten(1), self.scaling[adapter])


class Conv2d(_ConvNd):
    """LoRA for `nn.Conv2d`."""

    _conv = (4, "conv2d")

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        from . import variants

        return {(): None, ("use_dora",): variants.DoraConv2dVariant}


class Conv1d(_ConvNd):
    """LoRA for `nn.Conv1d`."""

    _conv = (3, "conv1d")

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        from . import variants

        return {(): None, ("use_dora",): variants.DoraConv1dVariant}


class Conv3d(_ConvNd):
    """LoRA for `nn.Conv3d`."""

    _conv = (5, "conv3d")

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        from . import variants

        return {(): None, ("use_dora",): variants.DoraConv3dVariant}
