"""Switching the adapters of a whole model: set, enable, delete, requires_grad, dtype."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from .. import _C
from ..utils.constants import UPCAST_DTYPES
from ..utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from . import law
from .merging import tie_again
from .tuner_layer import ADAPTER_CONTAINERS, BaseTunerLayer, tensors_of

_SWITCHED = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def tree_of(model: nn.Module) -> _C.Tree:
    """What is kept from call to call about where the model's tuner layers are."""
    tree = model.__dict__.get("_adapter_tree")
    if tree is None:
        tree = model.__dict__["_adapter_tree"] = _C.Tree()
    return tree


def enable_adapters(model: nn.Module, enabled: bool, irregular: bool = True) -> bool | str | None:
    """Switches the adapters of all tuner layers and fully trained modules on or off.

    Adapters that were merged before a forward under disabled adapters took them out are merged again. Returns whether
    the adapters were enabled: True, False, None if there are none, or "irregular" when layers differed, in which case
    nothing changes unless `irregular` is true.
    """
    # a wrapper switches its layer of trained tokens itself
    before, merged = tree_of(model).enable_adapters(model, _SWITCHED, TrainableTokensWrapper, enabled, irregular)
    for module in merged if enabled else ():
        law.resume(module)
    return before


def set_adapter(
    model: nn.Module,
    adapter_name: str | list[str],
    inference_mode: bool = False,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> None:
    """Makes one or several adapters of the model the active ones, trainable unless `inference_mode`.

    Only layers of `layer_cls` and fully trained modules are switched. Merged layers are unmerged first, with a
    warning. Raises ValueError before anything changes if a fully trained module had to follow several adapters.
    """
    tree = tree_of(model)
    first = tree.set_adapter(model, layer_cls, AuxiliaryTrainingWrapper, adapter_name, inference_mode)
    if first is None:
        return
    merged, wrappers = first
    # an empty list switches everything off
    chosen = [(wrapper, wrapper.check_set_adapter(adapter_name) if adapter_name else None) for wrapper in wrappers]
    for layer in merged:
        warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.")
        layer.unmerge()
    tie_again(merged)
    for wrapper, name in chosen:
        # a module that the adapter does not train as a whole is switched off
        wrapper.set_adapter(name if name in wrapper._adapters else [], inference_mode=inference_mode)
    tree.set_adapter(model, layer_cls, None, adapter_name, inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Makes the weights of one or several adapters trainable or frozen, active or not."""
    names = adapter_names if isinstance(adapter_names, str) else list(adapter_names)
    tree_of(model).set_requires_grad(model, _SWITCHED, names, requires_grad)


# --- deleting ---


def _check_adapters_not_merged(model: nn.Module, adapter_names: str | Sequence[str]) -> None:
    """ValueError if one of the adapters is merged into any layer."""
    names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
    (layers,) = _C.find(model, BaseTunerLayer)
    merged = sorted(names & {name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ValueError(f"Cannot delete adapter(s) {merged} while they are merged. Please unmerge them first.")


def _delete_auxiliary_adapter(model: nn.Module, adapter_name: str, new_active_adapters: list[str] | None) -> None:
    """Deletes an adapter from the fully trained modules; of `new_active_adapters`, they activate what they have."""
    (wrappers,) = _C.find(model, AuxiliaryTrainingWrapper)
    for wrapper in wrappers:
        active = new_active_adapters
        if active and len(active) > 1:  # these modules follow one adapter at most
            active = [name for name in active if name in wrapper._adapters and name != adapter_name]
        wrapper.delete_adapter(adapter_name, new_active_adapters=active)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str, layer_cls: type[BaseTunerLayer] = BaseTunerLayer
) -> list[str] | None:
    """Deletes an adapter from all layers of `layer_cls` and returns the adapters that are active afterwards.

    If it was active, the other active ones stay so on every layer; if there are none, the first remaining adapter in
    alphabetical order becomes active on all layers. Returns [] if none is left and None if there are no layers.
    `prefix` is the method's prefix ("lora_"); the layers are found without it. The adapter's config is not touched.
    """
    (layers,) = _C.find(model, layer_cls)
    if not layers:
        _delete_auxiliary_adapter(model, adapter_name, None)
        return None
    was_active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    active = [name for name in was_active if name != adapter_name]
    for layer in layers:
        layer.delete_adapter(adapter_name)
    if adapter_name in was_active and not active:
        active = sorted({name for layer in layers for name in layer._all_available_adapter_names()})[:1]
        # each layer has chosen among its own adapters: make them agree
        _C.set_adapter([layer for layer in layers if layer.active_adapters != active], active, False)
    _delete_auxiliary_adapter(model, adapter_name, active)
    return active


# --- dtypes ---

_LOW_PRECISION = {torch.float16, torch.bfloat16} | {
    getattr(torch, name) for name in UPCAST_DTYPES if hasattr(torch, name)
}


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Turns the weights of one adapter that are in a lower precision (float16, bfloat16, float8) into float32.

    The parameters are replaced by new ones (`requires_grad` is kept); references to the old ones go stale. Does
    nothing if `autocast_adapter_dtype` is False.
    """
    if not autocast_adapter_dtype:
        return
    (layers,) = _C.find(model, BaseTunerLayer)
    for layer in layers:
        for name, child in layer._modules.items():
            if name == "base_layer" or child is None:
                continue
            containers = [child] if isinstance(child, ADAPTER_CONTAINERS) else child.modules()
            for container in containers:
                if isinstance(container, ADAPTER_CONTAINERS) and adapter_name in container:
                    _cast_entry(container, adapter_name)


def _cast_entry(container: nn.Module, adapter_name: str) -> None:
    entry = container[adapter_name]
    if isinstance(entry, torch.Tensor):
        if entry.dtype in _LOW_PRECISION:
            container[adapter_name] = _to_float32(entry)
        return
    if not isinstance(entry, nn.Module) or _LOW_PRECISION.isdisjoint([t.dtype for t in tensors_of(entry)]):
        return
    for owner in entry.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.dtype in _LOW_PRECISION:
                setattr(owner, name, _to_float32(parameter))


def _to_float32(tensor: torch.Tensor) -> torch.Tensor:
    # a new parameter, not a new `.data`: for a DTensor that would leave the local shard as it is
    if not isinstance(tensor, nn.Parameter):
        return tensor.to(torch.float32)
    return nn.Parameter(tensor.data.to(torch.float32), requires_grad=tensor.requires_grad)
