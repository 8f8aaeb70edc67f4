"""LoRA for nn.MultiheadAttention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import law
from ..base_view import BaseView
from .core import LoraLayer, _LoraModule

if TYPE_CHECKING:
    from .config import LoraConfig


@contextmanager
def _shadowed(module: nn.Module, name: str, value: torch.Tensor) -> Iterator[None]:
    """`module.name` reads as `value` inside; the parameter of that name stays registered, untouched."""
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]


class MultiheadAttention(_LoraModule):
    """LoRA for `nn.MultiheadAttention` whose query, key and value have one dimension.

    It adapts both the input projection (a parameter) and the output projection (wrapped in a `Linear` of its own,
    whose forward torch never calls). So the forward runs the base layer with adapted weights in place of its own;
    these are never written to. PEFT counts the adapter of the output projection twice, once as a constant for
    autograd: what has been trained with it expects this, so it is done here too.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        kind = type(self).__name__
        if not getattr(base_layer, "_qkv_same_embed_dim", True):
            raise ValueError(f"Only same embed for query/key/value is supported as of now for {kind}.")
        if config.use_dora:
            raise ValueError(f"{kind} does not support DoRA (yet), please set use_dora to False")
        if config.velora_config is not None:
            raise ValueError(f"{kind} does not support VeLoRA, please set `velora_config=None`.")
        if config.kasa_config is not None:
            raise ValueError(f"{kind} does not support KaSA, please set `kasa_config=None`.")
        if kwargs.get("use_alora", False):
            raise ValueError(f"{kind} does not support aLoRA (yet), please set use_alora to False")
        if not isinstance(base_layer.out_proj, nn.Linear):
            raise TypeError(f"out_proj must be an instance of nn.Linear for {kind}.")
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        from .layer import Linear

        plain = base_layer.out_proj
        self.base_layer.out_proj = Linear(plain, adapter_name, r=r, lora_alpha=lora_alpha, config=config, **kwargs)
        self.base_layer.out_proj._merge_factor = 2
        self._active_adapter = adapter_name
        try:
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)
        except BaseException:
            self.base_layer.out_proj = plain
            raise

    # what torch's transformer layers read from their attention
    embed_dim = property(lambda self: self.get_base_layer().embed_dim)
    kdim = property(lambda self: self.get_base_layer().kdim)
    vdim = property(lambda self: self.get_base_layer().vdim)
    _qkv_same_embed_dim = property(lambda self: self.get_base_layer()._qkv_same_embed_dim)
    num_heads = property(lambda self: self.get_base_layer().num_heads)
    dropout = property(lambda self: self.get_base_layer().dropout)
    batch_first = property(lambda self: self.get_base_layer().batch_first)
    head_dim = property(lambda self: self.get_base_layer().head_dim)
    in_proj_weight = property(lambda self: self.get_base_layer().in_proj_weight)
    in_proj_bias = property(lambda self: self.get_base_layer().in_proj_bias)
    out_proj = property(lambda self: self.get_base_layer().out_proj.get_base_layer())
    bias_k = property(lambda self: self.get_base_layer().bias_k)
    bias_v = property(lambda self: self.get_base_layer().bias_v)
    add_zero_attn = property(lambda self: self.get_base_layer().add_zero_attn)

    def merge_masks(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, int | None]:
        return self.get_base_layer().merge_masks(*args, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """See `LoraLayer.update_layer`; adds the adapter to the output projection as well."""
        super().update_layer(*args, **kwargs)
        self.base_layer.out_proj.update_layer(*args, **kwargs)

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if "adapter_names" in kwargs:
            raise TypeError(f"lora.{type(self).__name__} does not support mixed adapter batches.")

    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base layer's (output, attention weights or None) with the active adapters, in the dtype of `query`."""
        self._check_forward_args(query, *args, **kwargs)
        with ExitStack() as shadows:
            if self.disable_adapters:
                law.suspend(self)
            elif self.merged:
                law.resume(self)
            else:
                self._shadow_weights(shadows)
            output, attention = self.base_layer(query, *args, **kwargs)
        return output.to(query.dtype), None if attention is None else attention.to(query.dtype)

    def _shadow_weights(self, shadows: ExitStack) -> None:
        """Put the sums of base weights and deltas in place of the base weights."""
        base = self.get_base_layer()
        out_proj = base.out_proj
        if out_proj.active_adapters != self.active_adapters or out_proj.merged:
            kind = type(base).__name__
            raise ValueError(
                f"The out_proj layer of {kind} has merged layers but {kind} itself doesn't, or other active adapters; "
                "please ensure that either both or none have merged layers"
            )
        adapters = self._own_active_adapters()
        if not adapters:
            return
        out_base = out_proj.get_base_layer()
        in_weight, out_weight, out_bias = base.in_proj_weight, out_base.weight, out_base.bias
        for adapter in adapters:
            in_weight = in_weight + self.get_delta_weight(adapter).to(in_weight.dtype)
            delta = out_proj.get_delta_weight(adapter).to(out_weight.dtype)
            out_weight = out_weight + delta + delta.detach()
            if out_proj.lora_bias[adapter]:
                change = out_proj._merge_changes(adapter)["bias"]
                out_bias = out_bias + change().to(out_bias.dtype)
        shadows.enter_context(_shadowed(base, "in_proj_weight", in_weight))
        shadows.enter_context(_shadowed(out_base, "weight", out_weight))
        if out_bias is not out_base.bias:
            shadows.enter_context(_shadowed(out_base, "bias", out_bias))

    def _base_view(self) -> BaseView:
        return BaseView(self.get_base_layer(), "in_proj_weight")

    def _merge_targets(self) -> dict[str, BaseView]:
        return {"in_proj_weight": self._base_view()}

    def _merge_changes(self, adapter: str) -> dict[str, law.Change]:
        return {"in_proj_weight": self._low_rank(adapter)}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """See `Linear.merge`; merges the same adapters of the output projection."""
        law.resume(self)
        before = list(self.merged_adapters)
        with law.transaction(self):
            law.merge(self, safe_merge, adapter_names)
            names = [name for name in self.merged_adapters if name not in before]
            if names:
                self.get_base_layer().out_proj.merge(safe_merge, names)

    def unmerge(self) -> None:
        """See `Linear.unmerge`; unmerges the output projection, too."""
        out_proj = self.get_base_layer().out_proj
        with law.transaction(out_proj):
            if out_proj.merged:
                out_proj.unmerge()
            law.unmerge(self)

    def switch(self, adapter_names: list[str], safe_merge: bool = False) -> None:
        """See `Linear.switch`; switches the output projection, too."""
        law.resume(self)
        out_proj = self.get_base_layer().out_proj
        with law.transaction(self), law.transaction(out_proj):
            law.switch(self, adapter_names, safe_merge)
            out_proj.switch(adapter_names, safe_merge)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.MultiheadAttention:
        """The base layer with its own output projection again, merged if `merge`."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = self.get_base_layer()
        base.out_proj = base.out_proj.get_base_layer()
        return base

    def _restore_weights(self) -> None:
        """Make sure that the base layer's weights are registered parameters, as they always are here."""
        base = self.get_base_layer()
        for owner, name in ((base, "in_proj_weight"), (base.out_proj.get_base_layer(), "weight")):
            if not isinstance(owner._parameters.get(name), nn.Parameter):
                weight = owner.__dict__.pop(name)
                owner._parameters[name] = nn.Parameter(weight.data, requires_grad=weight.requires_grad)
