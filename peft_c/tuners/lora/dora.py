"""DoRA's magnitude layers (https://arxiv.org/abs/2402.09353): the learned length of every output direction.

With V the base weight as a matrix (out, in), the adapted weight is `m * (V + s B A) / ||V + s B A||`, where the norm
is taken over each row and, as section 4.3 of the paper has it, is a constant to the gradient. For plain factors the
norm is computed, in fp32 or fp64, without building `B A`:
`||V + s B A||^2 = ||V||^2 + 2 s rowsum((V A^T) * B) + s^2 rowsum((B A A^T) * B)`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft_c.utils.integrations import dequantize_module_weight, gather_params_ctx
from peft_c.utils.other import transpose

ENABLE_DORA_CACHING = False
"""Keep weight norms between forward calls in eval mode: more memory, faster inference. See `helpers.DoraCaching`."""


def _versions(args: tuple) -> tuple | None:
    """What tells whether a result for `args` still holds: where tensors are and how often they were written to.

    None if that cannot be known.
    """
    found: list[Any] = []
    for arg in args:
        for tensor in arg.parameters() if isinstance(arg, nn.Module) else (arg,):
            if not isinstance(tensor, torch.Tensor):
                found.append(tensor)
            elif tensor.is_inference():
                return None
            else:
                found += (tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride())
    return tuple(found)


def cache_decorator(cache_key: str) -> Callable:
    """Keep a method's result per `adapter_name` in eval mode if ENABLE_DORA_CACHING is set; else clear the cache.

    It is computed anew when a tensor among the arguments was replaced or written to since. The entry holds these
    tensors, so that no other one can be where they were.
    """

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def wrapper(self, *args: Any, **kwargs: Any) -> Any:
            adapter_name = kwargs.get("adapter_name")
            if not ENABLE_DORA_CACHING or self.training or adapter_name is None:
                self._cache_clear()
                return method(self, *args, **kwargs)
            key, versions = f"{cache_key}-{adapter_name}", _versions((*args, *kwargs.values()))
            entry = self._cache_get(key, None)
            if entry is None or versions is None or entry[0] != versions:
                held = [tuple(arg.parameters()) if isinstance(arg, nn.Module) else arg for arg in args]
                entry = (versions, method(self, *args, **kwargs), held)
                self._cache_store(key, entry)
            return entry[1]

        return wrapper

    return decorate


def _row_norm(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """Row norms of `weight + scaling * B @ A` from the Gram matrix of A; weight (out, in), A (r, in), B (out, r).

    In fp32, or fp64 if one of them is fp64; a weight of less precision is converted some rows at a time.
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
    A, B = A.to(wide), B.to(wide)
    square = ((B @ (A @ A.T)) * B).sum(1)
    step = len(weight) if weight.dtype == wide else max(1, 2**20 // weight.shape[1])
    parts = [
        torch.linalg.vector_norm(rows, dim=1, dtype=wide).square() + 2 * scaling * ((rows.to(wide) @ A.T) * up).sum(1)
        for rows, up in zip(weight.split(step), B.split(step), strict=True)
    ]
    return (torch.cat(parts) + scaling * scaling * square).clamp_min(0).sqrt()


def _plain(*tensors: torch.Tensor) -> bool:
    """Whether the Gram identity may be used: ordinary matrices of floats on one device."""
    first = tensors[0]
    return all(
        type(t) in (torch.Tensor, nn.Parameter) and t.ndim == 2 and t.is_floating_point() and t.device == first.device
        for t in tensors
    )


def _weight_of(base_layer: nn.Module) -> torch.Tensor:
    """The base weight as floats; ordinary ones are returned directly, which torch.compile can follow."""
    weight = getattr(base_layer, "weight", None)
    return weight if type(weight) in (torch.Tensor, nn.Parameter) else dequantize_module_weight(base_layer)


class DoraLinearLayer(nn.Module):
    """The magnitude of a linear layer: `weight` has one entry per output. `fan_in_fan_out` tells how V is stored."""

    def __init__(self, fan_in_fan_out: bool) -> None:
        super().__init__()
        self.fan_in_fan_out = fan_in_fan_out
        self._dora_cache: dict[str, Any] = {}

    def _cache_store(self, key: str, value: Any) -> None:
        self._dora_cache[key] = value

    def _cache_get(self, key: str, default: Any | None) -> Any:
        return self._dora_cache.get(key, default)

    def _cache_clear(self) -> None:
        self._dora_cache.clear()

    def train(self, mode: bool = True):
        if mode:
            self._cache_clear()
        return super().train(mode)

    @cache_decorator("weight-norm")
    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str | None = None
    ) -> torch.Tensor:
        """Norm of each row of `V + scaling * lora_weight`, with `weight` as stored and `lora_weight` (out, in)."""
        merged = transpose(weight, self.fan_in_fan_out) + scaling * lora_weight
        return torch.linalg.norm(merged, dim=1).to(merged.dtype)

    @cache_decorator("lora-weight")
    def get_lora_weight(self, lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> torch.Tensor:
        """`B @ A` (out, in), by calling the two layers: their weights may be sharded outside a call (FSDP)."""
        eye = torch.eye(lora_A.weight.shape[1], device=lora_A.weight.device, dtype=lora_A.weight.dtype)
        return lora_B(lora_A(eye)).T

    @staticmethod
    def _factors(lora_A: Any, lora_B: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A (r, in) and B (out, r) if they can be read straight off the layers."""
        if type(lora_A) is nn.Linear and type(lora_B) is nn.Linear and lora_B.bias is None:
            return lora_A.weight, lora_B.weight
        return None

    def _stored_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return transpose(weight, self.fan_in_fan_out)

    @cache_decorator("weight-norm")
    def _gram_norm(self, weight, A, B, scaling, adapter_name=None) -> torch.Tensor:
        return self._shape_norm(_row_norm(weight, A, B, scaling), weight)

    def _shape_norm(self, norm: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return norm

    @torch.no_grad()
    def _current_norm(self, weight, dtype, lora_A, lora_B, scaling, adapter_name) -> torch.Tensor:
        """The norms for the factors as they are now, detached, as `dtype`."""
        factors = self._factors(lora_A, lora_B)
        if factors is not None:
            matrix = self._stored_matrix(weight.detach())
            if _plain(matrix, *factors):
                return self._gram_norm(matrix, *factors, scaling, adapter_name=adapter_name).to(dtype)
        weight = weight.to(dtype)
        lora_weight = self.get_lora_weight(lora_A, lora_B, adapter_name=adapter_name).to(dtype)
        return self.get_weight_norm(
            weight, self._like(lora_weight, weight), scaling=scaling, adapter_name=adapter_name
        ).detach()

    def _like(self, lora_weight: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return lora_weight

    def update_layer(self, *, base_layer, lora_A, lora_B, scaling, place_on_cpu: bool = False) -> None:
        """Start the magnitude at the norm of the adapted weight. `lora_A` and `lora_B` are the factors' tensors."""
        half = lora_A.dtype == torch.float16
        A, B = (lora_A.float(), lora_B.float()) if half else (lora_A, lora_B)
        with gather_params_ctx(base_layer.parameters()):
            if type(base_layer).__name__ == "Linear4bit":
                # FSDP objects to dequantising the layer itself; 8 bit parameters cannot be copied
                base_layer = deepcopy(base_layer)
            weight = dequantize_module_weight(base_layer)
            r = A.shape[0]
            if weight.data.ndim >= 3:
                lora_weight = (B.view(-1, r) @ A.view(r, -1)).reshape(weight.shape)
            else:
                lora_weight = B @ A
            if half:
                lora_weight = lora_weight.half()
            norm = self.get_weight_norm(weight.to(A.device), lora_weight, scaling=scaling)
        self.weight = nn.Parameter(norm.detach().to("cpu") if place_on_cpu else norm.detach(), requires_grad=True)

    def forward(
        self, x, *, lora_A, lora_B, scaling, base_layer, base_result=None, adapter_name: str = "default"
    ) -> torch.Tensor:
        """What DoRA adds to the base layer's output; `base_result` is that output, if it was computed from this x."""
        weight = _weight_of(base_layer)
        scale = self.weight / self._current_norm(weight, x.dtype, lora_A, lora_B, scaling, adapter_name)
        scale = self._over_features(scale)
        if base_result is None:
            base_result = self._base_forward(x, weight.to(x.dtype), base_layer)
        elif base_layer.bias is not None:
            base_result = base_result - self._over_channels(base_layer.bias, base_result)
        return (scale - 1) * base_result + scale * lora_B(lora_A(x)) * scaling

    def _over_features(self, scale: torch.Tensor) -> torch.Tensor:
        return scale.view(1, -1)

    def _over_channels(self, bias: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        return bias

    def _base_forward(self, x: torch.Tensor, weight: torch.Tensor, base_layer: nn.Module) -> torch.Tensor:
        return F.linear(x, transpose(weight, self.fan_in_fan_out))

    def __repr__(self) -> str:
        return "lora.dora." + super().__repr__()


class DoraEmbeddingLayer(DoraLinearLayer):
    """The magnitude of an embedding: one entry per embedding dimension; V is the transposed table."""

    @cache_decorator("lora-weight")
    def get_lora_weight(self, lora_A, lora_B, adapter_name: str | None = None) -> torch.Tensor:
        return (lora_A @ lora_B).T

    @staticmethod
    def _factors(lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return lora_A.T, lora_B.T

    def forward(
        self, x, *, lora_A, lora_B, scaling, base_layer, embed_fn, adapter_name: str = "default"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The factor on the base layer's output and what to add; `lora_A` (num_embeddings, r), `lora_B` (r, dim)."""
        weight = base_layer.weight
        norm = self._current_norm(weight, weight.dtype, lora_A, lora_B, scaling, adapter_name)
        scale = self.weight / norm
        return scale, scale * (embed_fn(x, lora_A) @ lora_B) * scaling


class _DoraConvNdLayer(DoraLinearLayer):
    """The magnitude of a convolution, (1, out, 1, ...): one entry per output channel; V has a row for each."""

    conv_fn: Callable

    @cache_decorator("weight-norm")
    def get_weight_norm(self, weight, lora_weight, scaling, adapter_name: str | None = None) -> torch.Tensor:
        merged = weight + scaling * lora_weight
        return merged.norm(p=2, dim=tuple(range(1, merged.dim())), keepdim=True).transpose(1, 0)

    @cache_decorator("lora-weight")
    def get_lora_weight(self, lora_A, lora_B, adapter_name: str | None = None) -> torch.Tensor:
        r = lora_A.weight.shape[0]
        return lora_B.weight.view(-1, r) @ lora_A.weight.view(r, -1)

    @staticmethod
    def _factors(lora_A: Any, lora_B: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        if lora_B.groups != 1 or not isinstance(lora_A, nn.modules.conv._ConvNd):
            return None
        return lora_A.weight.flatten(1), lora_B.weight.flatten(1)

    def _stored_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1)

    def _shape_norm(self, norm: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return norm.view((1, -1) + (1,) * self._spatial)

    def _like(self, lora_weight: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return lora_weight.reshape(weight.shape)

    def _over_features(self, scale: torch.Tensor) -> torch.Tensor:
        return scale

    def _over_channels(self, bias: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        return bias.view((1, -1) + (1,) * (result.dim() - 2))

    def _base_forward(self, x: torch.Tensor, weight: torch.Tensor, base_layer: nn.Module) -> torch.Tensor:
        options = {name: getattr(base_layer, name) for name in ("stride", "padding", "dilation", "groups")}
        return self.conv_fn(x, weight, bias=None, **options)


class DoraConv1dLayer(_DoraConvNdLayer):
    conv_fn = staticmethod(F.conv1d)
    _spatial = 1


class DoraConv2dLayer(_DoraConvNdLayer):
    conv_fn = staticmethod(F.conv2d)
    _spatial = 2


class DoraConv3dLayer(_DoraConvNdLayer):
    conv_fn = staticmethod(F.conv3d)
    _spatial = 3
