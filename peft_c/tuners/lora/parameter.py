"""LoRA for single parameters of a module, those of experts included."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...utils.constants import ALLOWED_COMPUTE_DTYPES, UPCAST_DTYPES
from .. import law
from .._buffer_dict import BufferDict
from ..base_view import BaseView
from .core import LoraLayer, _LoraModule

if TYPE_CHECKING:
    from .config import LoraConfig


class _LoraParameterProxy(nn.Module):
    """A parametrization that adds `delta_weight` to a parameter; see `ParamWrapper`."""

    def __init__(self, delta_weight: torch.Tensor) -> None:
        super().__init__()
        self.delta_weight = delta_weight

    @staticmethod
    def _low_prec_add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x + y for an 8-bit float x: added in the dtype of y, clamped to the range of x, in the dtype of x."""
        if y.dtype not in ALLOWED_COMPUTE_DTYPES:
            raise RuntimeError(
                f"There is an attempt to upcast the targeted parameter to {y.dtype} but the only supported are: "
                f"{ALLOWED_COMPUTE_DTYPES}."
            )
        limits = torch.finfo(x.dtype)
        return (x.to(y.dtype) + y).clamp(limits.min, limits.max).to(x.dtype)

    def forward(self, W: torch.Tensor) -> torch.Tensor:
        return self._low_prec_add(W, self.delta_weight) if _is_low_precision(W) else W + self.delta_weight


class _LoraFactorsProxy(nn.Module):
    """A parametrization that adds `scaling * lhs @ rhs`, stacks of matrices, without building the product."""

    def __init__(self, lhs: torch.Tensor, rhs: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.lhs = lhs
        self.rhs = rhs
        self.scaling = scaling

    def forward(self, W: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=W.device.type, enabled=False):  # a parametrization keeps the dtype
            return torch.baddbmm(W, self.lhs, self.rhs, alpha=self.scaling)


def _is_low_precision(tensor: torch.Tensor) -> bool:
    return str(tensor.dtype).removeprefix("torch.") in UPCAST_DTYPES


def _register_parameter_or_buffer(module: nn.Module, name: str, X: torch.Tensor) -> None:
    if isinstance(X, nn.Parameter):
        module.register_parameter(name, X)
    else:
        module.register_buffer(name, X)


class ParamWrapper(_LoraModule):
    """LoRA for one parameter of a module, named in `LoraConfig.target_parameters`: 2-d (out, in), or the 3-d stack of
    an MoE layer, (experts, out, in) or, if the module says `is_transposed`, (experts, in, out).

    A (r * experts, in) and B (out, r * experts) stay `nn.Linear`. The forward parametrizes the parameter while the
    base layer runs; outside of it, reading the parameter gives the bare weight. Wrappers of parameters of the same
    module are nested.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        self.parameter_name = parameter_name
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        refused = {
            "lora_dropout != 0": config.lora_dropout,  # x cannot be factored out of B(A(dropout(x)))
            "fan_in_fan_out": config.fan_in_fan_out,
            "lora_bias=True": config.lora_bias,
            "use_dora=True": config.use_dora,
            "is_target_conv_1d_layer=True": is_target_conv_1d_layer,
        }
        for option, is_set in refused.items():
            if is_set:
                raise ValueError(f"lora.{type(self).__name__} does not work with {option}.")
        for option in ("velora_config", "kasa_config"):
            if getattr(config, option) is not None:
                raise ValueError(f"lora.{type(self).__name__} does not work when `{option}` is set.")
        self.fan_in_fan_out = config.fan_in_fan_out
        self._did_swap_in_out_features = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """From the parameter; also sets `num_experts`. `ds_shape`: its shape before DeepSpeed partitioned it."""
        param = self.get_param()
        shape = getattr(param, "ds_shape", param.shape)
        self._param_ndim = len(shape)
        if len(shape) == 3:
            self.num_experts, in_features, out_features = shape
        elif len(shape) == 2:
            self.num_experts, (out_features, in_features) = 1, shape
        else:
            raise ValueError(
                f"lora.{type(self).__name__} was initialized with {len(shape)} dimensional Parameter "
                f"'{self.parameter_name}', but only 2d and 3d are supported."
            )
        return in_features, out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """See `LoraLayer.update_layer`; r is the rank of each expert."""
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def _check_config(self, r: int, config: LoraConfig) -> None:
        if config.lora_dropout > 0.0:
            raise ValueError(f"lora.{type(self).__name__} does not work with lora_dropout != 0.")

    def _make_factors(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        is_transposed = getattr(self.get_base_layer(), "is_transposed", False)
        if self._param_ndim == 3 and not is_transposed and not self._did_swap_in_out_features:
            self.in_features, self.out_features = self.out_features, self.in_features
            self._did_swap_in_out_features = True
        rank = r * self.num_experts
        self.lora_A[adapter_name] = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B[adapter_name] = nn.Linear(rank, self.out_features, bias=config.lora_bias)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter to the device (or the one given) and, if it is a float, the dtype of the parameter."""
        param = self.get_param()
        dtype = param.dtype if param.dtype.is_floating_point or param.dtype.is_complex else None
        for name in self.adapter_layer_names + self.other_param_names:
            items = getattr(self, name, None)
            if not isinstance(items, (nn.ModuleDict, nn.ParameterDict, BufferDict)) or adapter_name not in items:
                continue
            if not any(p.is_meta for p in items.parameters()):
                items[adapter_name] = items[adapter_name].to(device=device or param.device, dtype=dtype)

    def get_param(self) -> torch.Tensor:
        """The adapted parameter, without the adapters."""
        return getattr(self.get_base_layer(), self.parameter_name)

    # -------------------------------------------------------------------------------------------------- merging

    def _base_view(self) -> BaseView:
        is_stack = self._param_ndim == 3
        return BaseView(
            self.get_base_layer(), self.parameter_name, is_stack and not self._did_swap_in_out_features, is_stack
        )

    def _low_rank(self, adapter: str) -> law.LowRank:
        """One pair of factors an expert: A (experts, r, in), B (experts, out, r); plain ones for a 2-d parameter."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        if self._param_ndim == 3:
            A = A.reshape(self.num_experts, -1, A.shape[-1])
            B = B.reshape(B.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return law.LowRank(A, B, self.scaling[adapter])

    def _merge_targets(self) -> dict[str, BaseView]:
        return {"weight": self._base_view()}

    def _merge_changes(self, adapter: str) -> dict[str, law.Change]:
        return {"weight": self._low_rank(adapter)}

    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(lhs, rhs, scaling): the delta of the parameter is scaling * lhs @ rhs, in the parameter's own layout."""
        A, B, scaling = self._low_rank(adapter_name)
        lhs, rhs = (A.mT, B.mT) if self._base_view().transposed else (B, A)
        dtype = self.get_param().dtype
        return lhs.to(dtype), rhs.to(dtype), scaling

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the adapter adds to the parameter, in its dtype; for an 8-bit parameter in the adapter's dtype."""
        param = self.get_param()
        delta = self._base_view().restore(self._low_rank(adapter_name).delta(), param.shape).to(param.device)
        return delta.to(param.dtype) if param.dtype in ALLOWED_COMPUTE_DTYPES else delta

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that owns the parameter; with `merge`, this and all wrappers inside are merged first."""
        wrapper: nn.Module = self
        while merge and isinstance(wrapper, ParamWrapper):
            wrapper.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            wrapper = wrapper.base_layer
        return self.get_base_layer()

    # -------------------------------------------------------------------------------------------------- forward

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("adapter_names"):
            raise ValueError(f"lora.{type(self).__name__} does not support mixed adapter batches yet.")
        super()._check_forward_args(x, *args, **kwargs)

    def _active_forward(self, x: torch.Tensor, *args: Any, variant_kwargs: dict, **kwargs: Any) -> torch.Tensor:
        with self._activate_lora(self.active_adapters):
            return self.base_layer(x, *args, **kwargs)

    def _proxy(self, adapters: list[str]) -> nn.Module:
        if len(adapters) == 1 and self.num_experts > 1 and not _is_low_precision(self.get_param()):
            return _LoraFactorsProxy(*self.get_delta_factors(adapters[0]))
        first, *rest = (self.get_delta_weight(adapter) for adapter in adapters)
        return _LoraParameterProxy(sum(rest, first))

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Inside, the parameter reads with the given adapters added; its place among the parameters is kept."""
        adapters = [name for name in active_adapters or () if name in self.lora_A]
        if not adapters:
            yield
            return
        base, name = self.get_base_layer(), self.parameter_name
        requires_grad = self.get_param().requires_grad
        order = list(base._parameters)
        nn.utils.parametrize.register_parametrization(base, name, self._proxy(adapters))
        base.parametrizations[name].original.requires_grad_(requires_grad)
        try:
            with nn.utils.parametrize.cached():
                yield
        finally:
            self._remove_parametrizations()
            for key in order:
                if key in base._parameters:
                    base._parameters[key] = base._parameters.pop(key)

    def _remove_parametrizations(self) -> None:
        """Remove the latest parametrization that is LoRA's from the parameter, and only that."""
        base, name = self.get_base_layer(), self.parameter_name
        if name not in getattr(base, "parametrizations", {}):
            raise ValueError(f"The parametrization of '{name}' that LoRA made for its forward is gone: {self}")
        chain = base.parametrizations[name]
        if len(chain) == 1:
            nn.utils.parametrize.remove_parametrizations(base, name, leave_parametrized=False)
            return
        for i in reversed(range(len(chain))):
            if isinstance(chain[i], (_LoraParameterProxy, _LoraFactorsProxy)):
                del chain[i]
                return
        warnings.warn(f"Could not find any LoRA parametrization of '{name}' on {self}.")

    def __repr__(self) -> str:
        kind, bracket, rest = super().__repr__().partition("(")
        return f"{kind}{bracket}\n  parameter_name='{self.parameter_name}',{rest}"
