"""Backends through which a tuner layer reads and writes the weight of a quantised base layer."""

from __future__ import annotations

import copy
import operator
from abc import ABC
from typing import Any, Literal

import torch
from torch import nn

from .. import import_utils
from .integrations import dequantize_bnb_weight

# the kind of tuner layer that fits a quantised layer
LayerType = Literal["linear", "embedding", "conv2d"]


class QuantizationBackend(ABC):  # noqa: B024
    """How to get at the weight of one kind of quantised layer.

    A tuner layer that has one as `quantization_backend` merges through it and needs no class of its own per library.
    Backends with `supports_merge` implement `get_base_weight` and `set_base_weight`.
    """

    layer_type: LayerType
    supports_merge: bool = False
    # shown in reprs and error messages
    backend_name: str = ""

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """A dequantised float copy of the layer's weight (clone it if you need the original after changing it)."""
        raise NotImplementedError

    def set_base_weight(self, peft_layer: nn.Module, weight_data: torch.Tensor) -> None:
        """Quantise `weight_data` into the base layer of `peft_layer`; may replace `peft_layer.base_layer`."""
        raise NotImplementedError

    def maybe_clone_base_result(self, x: torch.Tensor) -> torch.Tensor:
        """The base layer's output `x`, cloned if autograd could not handle an in-place change of it."""
        return x


class ForwardOnlyQuantizationBackend(QuantizationBackend):
    """For libraries whose layers run but give no access to a float weight: both accessors raise TypeError."""

    layer_type = "linear"

    def __init__(self, backend_name: str = "") -> None:
        self.backend_name = backend_name

    def _refuse(self, what: str) -> TypeError:
        return TypeError(
            f"{what} is not supported for {self.backend_name} layers. Merging/unmerging is not available."
        )

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        raise self._refuse("Dequantization")

    def set_base_weight(self, peft_layer: nn.Module, weight_data: torch.Tensor) -> None:
        raise self._refuse("Requantization")


class Bnb8bitBackend(QuantizationBackend):
    """`bitsandbytes.nn.Linear8bitLt`."""

    supports_merge = True
    backend_name = "bnb 8bit"
    layer_type = "linear"

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        return dequantize_bnb_weight(base_layer.weight, state=base_layer.state)

    def set_base_weight(self, peft_layer: nn.Module, weight_data: torch.Tensor) -> None:
        from bitsandbytes.nn import Int8Params

        layer = peft_layer.get_base_layer()
        old = layer.weight
        # quantisation happens when the parameter moves from the CPU to the accelerator
        new = Int8Params(weight_data.cpu(), requires_grad=False, has_fp16_weights=old.has_fp16_weights)
        layer.weight = new.to(old.device)
        layer.state.reset_grads()


class Bnb4bitBackend(QuantizationBackend):
    """`bitsandbytes.nn.Linear4bit`."""

    supports_merge = True
    backend_name = "bnb 4bit"
    layer_type = "linear"

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        return dequantize_bnb_weight(base_layer.weight, state=base_layer.weight.quant_state)

    def set_base_weight(self, peft_layer: nn.Module, weight_data: torch.Tensor) -> None:
        from bitsandbytes.nn import Params4bit

        layer = peft_layer.get_base_layer()
        old = layer.weight
        # the parameter's attributes are its quantisation settings; those with an underscore come from torch.compile
        settings = {k: v for k, v in vars(old).items() if k != "data" and not k.startswith("_")}
        settings["requires_grad"] = False
        if "bnb_quantized" in settings:
            settings["bnb_quantized"] = False
        layer.weight = Params4bit(weight_data.cpu(), **settings).to(old.device)

    def maybe_clone_base_result(self, x: torch.Tensor) -> torch.Tensor:
        # the 4bit matmul returns a view that autograd refuses to see changed in place
        return x.clone()


class HqqBackend(QuantizationBackend):
    """`hqq.core.quantize.HQQLinear`; a new weight means a new base layer."""

    supports_merge = True
    backend_name = "hqq"
    layer_type = "linear"

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        return base_layer.dequantize()

    def set_base_weight(self, peft_layer: nn.Module, weight_data: torch.Tensor) -> None:
        from hqq.core.quantize import HQQLinear

        old = peft_layer.get_base_layer()
        settings = copy.deepcopy(old.quant_config)
        construction = {**settings, "offload_meta": old.offload_meta}
        new = HQQLinear(None, construction, compute_dtype=old.compute_dtype, device=old.device)
        settings.pop("offload_meta", None)
        new.quantize(weight_data, **settings)
        peft_layer.base_layer = new


class TorchaoBackend(QuantizationBackend):
    """Linear layers with torchao weights.

    Args:
        get_apply_tensor_subclass: Callable from the model's quantisation config that gives what `quantize_` applies.
    """

    supports_merge = True
    backend_name = "torchao"
    layer_type = "linear"

    def __init__(self, get_apply_tensor_subclass: Any) -> None:
        self.get_apply_tensor_subclass = get_apply_tensor_subclass

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        weight = base_layer.weight
        try:
            return weight.dequantize()
        except NotImplementedError as exc:
            raise NotImplementedError(
                f"Weights of type {type(weight).__name__} do not support dequantization (yet), which is needed to "
                "support merging."
            ) from exc

    def set_base_weight(self, peft_layer: nn.Module, weight_data: torch.Tensor) -> None:
        from torchao import quantize_

        layer = peft_layer.get_base_layer()
        # torchao's tensors cannot be written into, so the float weight takes their place and is quantised as a module
        del layer.weight
        layer.weight = weight_data
        quantize_(layer, self.get_apply_tensor_subclass())


def _torchao_backend(layer: nn.Module, get_apply_tensor_subclass: Any = None, **_: Any) -> QuantizationBackend | None:
    from torchao.utils import TorchAOBaseTensor

    weight = getattr(layer, "weight", None)
    if not isinstance(weight, TorchAOBaseTensor):
        return None
    if get_apply_tensor_subclass is None:
        raise ValueError(
            "torchao quantized layer detected but 'get_apply_tensor_subclass' was not provided. It is required to "
            "quantize the weight again after merging and unmerging."
        )
    backend = TorchaoBackend(get_apply_tensor_subclass)
    if not import_utils.is_torchao_ge_v0_18_0():
        from torchao.quantization import LinearActivationQuantizedTensor

        # has no dequantize before 0.18
        backend.supports_merge = not isinstance(weight, LinearActivationQuantizedTensor)
    return backend


def _gptqmodel_backend(layer: nn.Module, **_: Any) -> QuantizationBackend | None:
    from .model_prep import is_gptqmodel_quant_linear

    # AWQ layers of gptqmodel are of the same base class and go by the same name
    return ForwardOnlyQuantizationBackend("gptq") if is_gptqmodel_quant_linear(layer) else None


def _of_class(module: str, names: str, backend: Any, *args: Any) -> Any:
    """A resolver that returns `backend(*args)` for layers of the classes `names` (blank-separated) in `module`."""

    def resolve(layer: nn.Module, **_: Any) -> QuantizationBackend | None:
        import importlib

        home = importlib.import_module(module)
        classes = tuple(getattr(home, name) for name in names.split())
        return backend(*args) if isinstance(layer, classes) else None

    return resolve


_INC = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules"
# (is the library there?, layer -> backend or None); names of availability checks are looked up at each call
_RESOLVERS: tuple[tuple[str, Any], ...] = (
    ("is_bnb_available", _of_class("bitsandbytes.nn", "Linear8bitLt", Bnb8bitBackend)),
    ("is_bnb_4bit_available", _of_class("bitsandbytes.nn", "Linear4bit", Bnb4bitBackend)),
    ("is_hqq_available", _of_class("hqq.core.quantize", "HQQLinear", HqqBackend)),
    ("is_torchao_available", _torchao_backend),
    ("is_aqlm_available", _of_class("aqlm", "QuantizedLinear", ForwardOnlyQuantizationBackend, "aqlm")),
    ("is_eetq_available", _of_class("eetq", "EetqLinear", ForwardOnlyQuantizationBackend, "eetq")),
    ("is_gptqmodel_available", _gptqmodel_backend),
    ("is_inc_available", _of_class(_INC, "PatchedLinear", ForwardOnlyQuantizationBackend, "inc")),
    (
        "is_te_pytorch_available",
        _of_class(
            "transformer_engine.pytorch", "LayerNormLinear LayerNormMLP Linear", ForwardOnlyQuantizationBackend, "te"
        ),
    ),
)


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """The backend for a base layer, or None if it is not quantised.

    torchao layers need the keyword `get_apply_tensor_subclass` (see `get_quantization_kwargs`), else ValueError.
    """
    for available, resolve in _RESOLVERS:
        if getattr(import_utils, available)():
            backend = resolve(base_layer, **kwargs)
            if backend is not None:
                return backend
    return None


def quantization_extra_repr(module: nn.Module) -> str:
    """`extra_repr` of a tuner layer: the module's own, and the name of its quantisation backend if it has one."""
    backend = getattr(module, "quantization_backend", None)
    own = nn.Module.extra_repr(module)
    return ", ".join(filter(None, (own, backend and f"quantization_backend='{backend.backend_name}'")))


def get_quantization_kwargs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for `resolve_quantization_backend` that only the model knows; empty if there are none."""
    name = "get_apply_tensor_subclass"
    if getattr(model, "hf_quantizer", None) is None:
        return {}
    try:
        return {name: operator.attrgetter(f"hf_quantizer.quantization_config.{name}")(model)}
    except AttributeError:
        return {}
