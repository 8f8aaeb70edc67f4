"""Weights that accelerate keeps elsewhere (on the CPU or on disk) and brings in for each forward of a module."""

from __future__ import annotations

import sys
from collections import ChainMap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .. import _C

_NOTHING = nullcontext()  # it has no state


def offload_hook(module: Any) -> Any | None:
    """accelerate's hook that brings the module's weights in for a forward pass, or None."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return None
    hooks = sys.modules.get("accelerate.hooks")
    if hooks is not None and isinstance(hook, hooks.SequentialHook):  # several on one module
        hook = next((h for h in hook.hooks if isinstance(h, hooks.AlignDevicesHook) and h.offload), None)
    return hook if hooks is not None and isinstance(hook, hooks.AlignDevicesHook) and hook.offload else None


def execution_device(module: nn.Module) -> torch.device | None:
    """Where an offloaded module computes; None for one that is not offloaded."""
    hook = offload_hook(module)
    return None if hook is None else torch.device("cpu" if hook.execution_device is None else hook.execution_device)


@contextmanager
def onload(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While the block runs, the offloaded weights of these modules are where the modules compute.

    Afterwards they are offloaded again, with the values that the block gave them. Does nothing for weights that are
    not offloaded, or are in already.
    """
    if "accelerate.hooks" not in sys.modules:
        yield
        return
    from accelerate.utils import named_module_tensors, set_module_tensor_to_device

    loaded: list[tuple[nn.Module, str, torch.Tensor]] = []  # module, name, the value that is kept elsewhere
    try:
        for module in modules:
            hook = offload_hook(module)
            for name, tensor in () if hook is None else [*named_module_tensors(module, recurse=hook.place_submodules)]:
                kept = hook.weights_map.get(name) if tensor.is_meta else None
                if kept is not None:
                    loaded.append((module, name, kept))
                    # a copy, because modules may share what is kept
                    value = kept.to(execution_device(module), copy=True)
                    set_module_tensor_to_device(module, name, value.device, value=value)
        yield
    finally:
        for module, name, kept in loaded:
            tensor = dict(named_module_tensors(module, recurse=True)).get(name)
            if tensor is not None and not tensor.is_meta:
                _keep(offload_hook(module), name, kept, tensor.detach().to(kept.device))
                set_module_tensor_to_device(module, name, "meta")


def _keep(hook: Any, name: str, before: torch.Tensor, value: torch.Tensor) -> None:
    """Lets the hook bring in `value` from now on; files and what other modules share stay as they are."""
    if value.dtype == before.dtype and torch.equal(value, before):
        return
    if not isinstance(hook.weights_map, ChainMap):
        hook.weights_map = ChainMap({}, hook.weights_map)
    hook.weights_map[name] = value


def onload_layer(layer: nn.Module) -> Any:
    """`onload` for a tuner layer with all that is in it."""
    if "accelerate.hooks" not in sys.modules:
        return _NOTHING
    modules = [layer]
    for module in modules:  # the list grows; less than modules() costs
        modules.extend(child for child in module._modules.values() if child is not None)
    hooked = [module for module in modules if "_hf_hook" in module.__dict__]
    return onload(hooked) if hooked else _NOTHING


def onload_base(layer: nn.Module) -> Any:
    """`onload` for a module, if it is a tuner layer without the adapters that it has."""
    if "accelerate.hooks" not in sys.modules:
        return _NOTHING
    from .targets import outer_modules

    inside = outer_modules(layer, into_base_layers=True)
    hooked = [module for _, module in inside if "_hf_hook" in module.__dict__]
    return onload(hooked) if hooked else _NOTHING


def onload_adapters(model: nn.Module, adapter_name: str) -> Any:
    """`onload` for everything in the model's tuner layers and trained modules but the base layers and what their
    containers hold for other adapters."""
    if "accelerate.hooks" not in sys.modules:
        return onload(())
    from ..utils.aux_wrappers import AuxiliaryTrainingWrapper
    from .tuner_layer import ADAPTER_CONTAINERS, BaseTunerLayer

    layers, wrappers = _C.find(model, BaseTunerLayer, AuxiliaryTrainingWrapper)
    own: dict[int, nn.Module] = {}
    for holder in (*layers, *wrappers):
        for name, child in holder.named_children():
            if name in ("base_layer", "original_module"):
                continue
            parts = [child]
            if isinstance(child, ADAPTER_CONTAINERS) and len(child._modules) > 1:
                own[id(child)] = child
                parts = [child._modules[adapter_name]] if adapter_name in child._modules else []
            for part in parts:
                own.update((id(module), module) for module in part.modules())
        own[id(holder)] = holder
    return onload(own.values())
