"""LoRA on Megatron's tensor-parallel linear layers."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import nn

from peft_c.reexports import elsewhere
from peft_c.tuners import law

from ._quantized import base_of
from .config import LoraConfig
from .core import _C, LoraLayer, is_compiling  # noqa: F401 - see _LoraModule.forward
from .layer import Linear


def get_default_module_allowlist() -> list[str]:
    """Packages that `LoraConfig.megatron_core` may name: what a config file says is imported, so not just any."""
    return ["megatron"]


class LoraParallelLinear(Linear):
    """LoRA on a RowParallelLinear, whose input is split, or a ColumnParallelLinear, whose output is.

    The factor on the split side (A or B, in that order) is a parallel layer itself, the other an ordinary fp32 one.
    The base layer returns a pair (output, bias) and so does this. `backend` is Megatron's `tensor_parallel` module.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        backend: Any,
        r: int = 0,
        lora_alpha: int = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        for name in ("lora_bias", "use_dora", "velora_config"):
            if getattr(config, name):
                unset = "None" if name == "velora_config" else "False"
                raise ValueError(f"{type(self).__name__} does not support {name} yet, please set it to {unset}")
        if is_target_conv_1d_layer:
            raise ValueError(
                f"{type(self).__name__} does not support target_conv_1d_layer yet, please set it to False"
            )
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer=base_layer, **kwargs)
        self.backend = backend
        self.is_parallel_a = isinstance(base_layer, backend.RowParallelLinear)
        self.fan_in_fan_out = config.fan_in_fan_out
        self.is_target_conv_1d_layer = False
        self._parallel: dict[str, Any] = {}
        self._active_adapter = adapter_name
        self.update_layer(
            adapter_name, r, lora_alpha=lora_alpha, config=config, megatron_config=kwargs["megatron_config"]
        )

    @property
    def lora_variants(self) -> dict:
        return {(): None}

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: int,
        config: LoraConfig,
        init_method: Any = None,
        input_is_parallel: bool | None = None,
        gather_output: bool | None = None,
        inference_mode: bool = False,
        **parallel_linear_kwargs: Any,
    ) -> None:
        """Add an adapter. `megatron_config`, Megatron's TransformerConfig, defaults to that of the first adapter, the
        other options to the base layer's."""
        base = self.get_base_layer()
        megatron_config = parallel_linear_kwargs.get("megatron_config") or self._parallel["config"]
        default_init = getattr(megatron_config, "init_method", nn.init.xavier_normal_)
        self._parallel = {
            "init_method": default_init if init_method is None else init_method,
            "input_is_parallel": getattr(base, "input_is_parallel", True)
            if input_is_parallel is None
            else input_is_parallel,
            "gather_output": getattr(base, "gather_output", False) if gather_output is None else gather_output,
            "config": megatron_config,
        }
        super().update_layer(adapter_name, r, lora_alpha, config)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode or config.inference_mode)

    def _make_factors(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        options = self._parallel
        options["config"].params_dtype = torch.float32  # half precision overflows
        common = {"bias": False, "init_method": options["init_method"], "config": options["config"]}
        if self.is_parallel_a:
            A = self.backend.RowParallelLinear(
                input_size=self.in_features,
                output_size=r,
                input_is_parallel=options["input_is_parallel"],
                skip_bias_add=True,
                **common,
            )
            B = nn.Linear(r, self.out_features, bias=False, dtype=torch.float32)
        else:
            A = nn.Linear(self.in_features, r, bias=False, dtype=torch.float32)
            B = self.backend.ColumnParallelLinear(
                input_size=r, output_size=self.out_features, gather_output=options["gather_output"], **common
            )
        self.lora_A[adapter_name] = A
        self.lora_B[adapter_name] = B

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """The base layer's output with the active adapters added, and its bias."""
        self._check_forward_args(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(f"{type(self).__name__} does not support mixed_batch_forward yet.")
        if self.disable_adapters:
            law.suspend(self)
        elif self.merged:
            law.resume(self)
        result, bias = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result, bias
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            x = self._cast_input_dtype(x, self.lora_A[adapter].weight.dtype)
            hidden = _output(self.lora_A[adapter](self.lora_dropout[adapter](x)))
            result = result + _output(self.lora_B[adapter](hidden)) * self.scaling[adapter]
        return result.to(dtype), bias


def _output(value: Any) -> torch.Tensor:
    """What a layer computes: Megatron's return (output, bias), others the output."""
    return value[0] if isinstance(value, tuple) else value


def dispatch_megatron(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """A `LoraParallelLinear` if `config.megatron_config` is set and `target` is one of Megatron's parallel layers.

    ValueError if `config.megatron_core` names anything but Megatron.
    """
    if not config.megatron_config:
        return None
    allowed = get_default_module_allowlist()
    if not any(config.megatron_core.startswith(f"{prefix}.") for prefix in allowed):
        raise ValueError(
            f"{config.megatron_core=} does not start with a valid prefix ({allowed}); importing anything else that a "
            "configuration names would be a security risk."
        )
    core = importlib.import_module(config.megatron_core)
    parallel = core.tensor_parallel
    if not isinstance(base_of(target), (parallel.ColumnParallelLinear, parallel.RowParallelLinear)):
        return None
    megatron_config = config.megatron_config
    if isinstance(megatron_config, dict):
        megatron_config = core.transformer.transformer_config.TransformerConfig(**megatron_config)
    if config.fan_in_fan_out or kwargs.get("fan_in_fan_out"):
        warnings.warn(
            "fan_in_fan_out is set to True but the target module is `ColumnParallelLinear` or `RowParallelLinear`. "
            "Setting fan_in_fan_out to False."
        )
        config.fan_in_fan_out = False
        kwargs["fan_in_fan_out"] = False
    return LoraParallelLinear(
        base_layer=target,
        adapter_name=adapter_name,
        config=config,
        backend=parallel,
        **{**kwargs, "megatron_config": megatron_config},
    )


__getattr__ = elsewhere(__name__, "tuners.lora.layer")
