"""Helpers around other libraries: DeepSpeed ZeRO-3, quantised weights, device maps, creation on the meta device."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# bitsandbytes keeps an int8 weight's row maxima in SCB: value = int8 * SCB / 127
_INT8_STEP = 1 / 127


@dataclass
class TpInfo:
    """How an adapter's parameters are sharded: parameter name to plan, the mesh, and the tensor-parallel size."""

    tp_plan: dict[str, str]
    device_mesh: DeviceMesh
    tp_size: int


def dtensor_from_local_like(local_tensor: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """`local_tensor` as this rank's shard of a DTensor with the mesh, placements, shape and strides of `ref`."""
    from torch.distributed.tensor import DTensor

    layout = {"shape": ref.shape, "stride": tuple(ref.stride())}
    return DTensor.from_local(local_tensor.contiguous(), ref.device_mesh, ref.placements, run_check=False, **layout)


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers was set up for DeepSpeed ZeRO-3, which shards every parameter.

    That can only be so if transformers is loaded, so it is never imported for the answer.
    """
    if "transformers" not in sys.modules:
        return False
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def full_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """A parameter's gradient, whole on each rank where DeepSpeed keeps it in parts."""
    integrations = sys.modules.get("transformers.integrations")
    if integrations is not None and integrations.deepspeed_config() is not None:
        import deepspeed

        return deepspeed.utils.safe_get_full_grad(parameter)
    return parameter.grad


@contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter],
    modifier_rank: int | None = 0,
    fwd_module: nn.Module | None = None,
) -> Iterator[None]:
    """Within the context the parameters are whole on each rank if ZeRO-3 shards them; otherwise nothing happens.

    Changes made on `modifier_rank` are sent to all ranks on exit.
    """
    if check_deepspeed_zero3_enabled():
        import deepspeed

        with deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
            yield
    else:
        yield


def get_bnb_param_type(param: nn.Parameter) -> Literal[False, "4bit", "8bit"]:
    """Which kind of bitsandbytes parameter this is, or False."""
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(param).__name__, False)


def dequantize_bnb_weight(weight: nn.Parameter, state: Any | None = None) -> torch.Tensor:
    """The float weight of a bitsandbytes 4-bit or 8-bit parameter; 8 bits need the layer's `state` for the scales."""
    import bitsandbytes as bnb

    if get_bnb_param_type(weight) == "4bit":
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    if state is None:
        raise ValueError(
            "To dequantize an 8bit bitsandbytes weight, pass the `state` of its layer, which holds scales."
        )
    if state.SCB is None:
        state.SCB = weight.SCB
    scales = state.SCB.to(weight.device)
    dequantize = getattr(bnb.functional, "int8_vectorwise_dequant", None)
    if dequantize is not None:
        return dequantize(weight.data, scales)
    return weight.data * scales.view(-1, 1) * _INT8_STEP


def dequantize_module_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a layer as floats: dequantised (HQQ, torchao, bitsandbytes), or itself if it is not quantised."""
    if hasattr(module, "W_q"):
        return module.dequantize()
    weight = module.weight
    if type(weight).__module__.startswith("torchao."):
        return weight.dequantize()
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"Input weight should be of type nn.Parameter, got {type(weight)} instead")
    # FSDP's flat parameters show plain tensors as weights
    if not isinstance(weight, nn.Parameter) or not get_bnb_param_type(weight):
        return weight

    device = weight.device
    dequantized = dequantize_bnb_weight(weight, state=getattr(module, "state", None))
    if device.type == "cpu":
        # bitsandbytes may have moved an 8bit weight to the accelerator on the way
        module.weight = module.weight.to(device)
    return dequantized


def get_layer_device_map(model: Any) -> dict[int, int | str] | None:
    """Device of each decoder layer (`{index: device}`) as derived from `model.hf_device_map`.

    Layers that rest on "cpu" or "disk" are executed on the first accelerator of the map. RuntimeError if a layer is in
    no entry.
    """
    num_layers = model.config.num_hidden_layers
    resting_places = ("cpu", "disk")
    main_device = next(device for device in model.hf_device_map.values() if device not in resting_places)
    executes_on = {
        name: main_device if device in resting_places else device for name, device in model.hf_device_map.items()
    }
    if executes_on.keys() == {""}:
        return dict.fromkeys(range(num_layers), executes_on[""])

    layer_device_map: dict[int, int | str] = {}
    for name, device in executes_on.items():
        # the first number in the name that is a layer's index decides
        index = min((int(p) for p in name.split(".")[1:] if p.isdigit() and int(p) < num_layers), default=None)
        if index is not None:
            layer_device_map[index] = device
    for index in range(num_layers):
        if index not in layer_device_map:
            raise RuntimeError(f"layer {index} has not been mapped to a device.")
    return layer_device_map


def map_cache_to_layer_device_map(model: Any, cache: Any) -> None:
    """Move the keys and values of a transformers cache to the devices of their layers, in place.

    Does nothing for other objects and for models without `hf_device_map`.
    """
    if "transformers" not in sys.modules or not hasattr(model, "hf_device_map"):
        return
    import transformers

    if not isinstance(cache, transformers.Cache):
        return
    if isinstance(cache, transformers.EncoderDecoderCache):
        map_cache_to_layer_device_map(model, cache.self_attention_cache)
        return
    for index, device in get_layer_device_map(model).items():
        if hasattr(cache, "layers"):
            layer = cache.layers[index]
            layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
        else:  # transformers up to 4.55
            cache.key_cache[index] = cache.key_cache[index].to(device)
            cache.value_cache[index] = cache.value_cache[index].to(device)


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Parameters registered on any module within the context go to the meta device and take no memory.

    Same contract as accelerate's function of this name, plus `skip_init_on_device`, which exempts a function.
    With `include_buffers`, buffers and the tensors of torch.empty, zeros, ones and full go there as well.
    """
    with _init_on_device(torch.device("meta"), include_buffers=include_buffers):
        yield


@contextmanager
def _init_on_device(device: torch.device, include_buffers: bool | None = None) -> Iterator[None]:
    register_parameter, register_buffer = nn.Module.register_parameter, nn.Module.register_buffer

    def registering_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register_parameter(module, name, param)
        if param is not None and not _init_on_device._skip:
            # a parameter subclass keeps its attributes, which its constructor takes
            attributes = {**param.__dict__, "requires_grad": param.requires_grad}
            module._parameters[name] = type(param)(param.to(device), **attributes)

    def registering_buffer(module: nn.Module, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        register_buffer(module, name, tensor, persistent=persistent)
        if tensor is not None:
            module._buffers[name] = tensor.to(device)

    def creating(function: Callable) -> Callable:
        return lambda *args, **kwargs: function(*args, **{**kwargs, "device": device})

    patches: list[tuple[Any, str, Any]] = [(nn.Module, "register_parameter", registering_parameter)]
    if include_buffers:
        patches.append((nn.Module, "register_buffer", registering_buffer))
        patches += [(torch, name, creating(getattr(torch, name))) for name in ("empty", "zeros", "ones", "full")]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    try:
        for patch in patches:
            setattr(*patch)
        yield
    finally:
        for original in originals:
            setattr(*original)


_init_on_device._skip = False  # type: ignore[attr-defined]


@contextmanager
def _skip_init_on_device() -> Iterator[None]:
    """Suspends `init_empty_weights` for parameters."""
    before, _init_on_device._skip = _init_on_device._skip, True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _init_on_device._skip = before  # type: ignore[attr-defined]


def skip_init_on_device(func: Callable) -> Callable:
    """Decorator: parameters that `func` registers stay on their device even inside `init_empty_weights`.

    Needed where existing weights are registered anew, as for `nn.MultiheadAttention`.
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _skip_init_on_device():
            return func(*args, **kwargs)

    return wrapper
