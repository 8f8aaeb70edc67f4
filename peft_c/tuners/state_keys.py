"""State-dict keys of adapters: which keys of a model belong to them, and the keys without the adapter's name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from .targets import outer_modules
from .tuner_layer import ADAPTER_CONTAINERS, BaseTunerLayer

T = TypeVar("T")
_FSDP = "_fsdp_wrapped_module."  # in module names, but not in the keys of an FSDP model's state dict


def _remove_adapter_name_from_state_dict_key(key: str, adapter_name: str) -> str:
    """The checkpoint's key: without the adapter name if that is the last part (of a parameter in a container) or the
    last but one (of a module's parameter). Elsewhere in the key it may be a module's name and stays."""
    head, dot, last = key.rpartition(".")
    if not dot:
        return key
    suffix = f".{adapter_name}"
    if key.endswith(suffix):
        return key.removesuffix(suffix)
    return f"{head.removesuffix(suffix)}.{last}"


def state_dict_of(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """`model.state_dict()` without what tuner layers and fully trained modules hold for other adapters.

    The cost does not depend on how many those are. Modules with state-dict hooks or a state_dict of their own are
    asked for it, and give the other adapters, too.
    """
    from ..utils.other import AuxiliaryTrainingWrapper

    if not _gives_plain_state(model):
        return model.state_dict()
    result: OrderedDict[str, torch.Tensor] = OrderedDict()
    result._metadata = OrderedDict()  # type: ignore[attr-defined]

    def visit(module: nn.Module, prefix: str) -> None:
        if not _gives_plain_state(module):
            module.state_dict(destination=result, prefix=prefix)
            return
        module._save_to_state_dict(result, prefix, False)
        tuned = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        names = (*module.adapter_layer_names, *module.other_param_names) if tuned else ()
        for name, child in module._modules.items():
            if child is None:
                continue
            if name in names and type(child) in ADAPTER_CONTAINERS and _gives_plain_state(child):
                visit_container(child, f"{prefix}{name}.{adapter_name}")
            else:
                visit(child, f"{prefix}{name}.")

    def visit_container(container: nn.Module, key: str) -> None:
        for tensors in (container._parameters, container._buffers):
            tensor = tensors.get(adapter_name)
            if tensor is not None and adapter_name not in container._non_persistent_buffers_set:
                result[key] = tensor.detach()
        entry = container._modules.get(adapter_name)
        if entry is not None:
            visit(entry, f"{key}.")

    visit(model, "")
    return result


def _gives_plain_state(module: nn.Module) -> bool:
    hooks = module._state_dict_hooks or module._state_dict_pre_hooks
    return not hooks and not overrides(module, "state_dict")


def overrides(module: nn.Module, method: str) -> bool:
    """Whether the module or its class has another `method` than nn.Module has."""
    return method in module.__dict__ or getattr(type(module), method) is not getattr(nn.Module, method)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _own_prefixes(name: str, module: nn.Module, adapter_name: str | None) -> set[str]:
    """Prefixes of everything a module holds but what it wraps."""
    prefixes = set()
    for part, held in {**module._modules, **module._parameters, **module._buffers}.items():
        if held is None or part in ("base_layer", "model"):
            continue
        prefix = _join(name, part)
        if adapter_name is None or not isinstance(held, ADAPTER_CONTAINERS):
            prefixes.add(prefix)
        elif adapter_name in held:
            prefixes.add(_join(prefix, adapter_name))
    return prefixes


def _get_tuner_state_dict_key_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """Prefixes of the state-dict keys that belong to adapters: what tuner layers hold besides their base layer, and
    what a BaseTuner holds besides its model. With `adapter_name`, only that adapter's entries of containers.

    Found by visiting the modules, so that a base module whose name looks like an adapter's is not taken for one.
    Fully trained modules, and tuner layers within them, are not included: they are saved in their own way.
    """
    from ..utils.other import AuxiliaryTrainingWrapper
    from .tuners_utils import BaseTuner

    prefixes: set[str] = set()
    wrappers: set[str] = set()
    for name, module in outer_modules(model, into_base_layers=True):
        name = name.removeprefix(_FSDP)
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrappers.add(name)
        elif isinstance(module, BaseTuner) or (
            isinstance(module, BaseTunerLayer) and not _is_key_under_prefixes(name, wrappers)
        ):
            prefixes |= _own_prefixes(name, module, adapter_name)
    return prefixes


def _is_key_under_prefixes(key: str, prefixes: set[str]) -> bool:
    """Whether the dotted key is one of the prefixes or lies below one: "a.b.c" is under "a.b", "a.bc" is not."""
    if not prefixes:
        return False
    while key not in prefixes:
        key, dot, _ = key.rpartition(".")
        if not dot:
            return False
    return True


def _filter_state_dict_by_key_prefixes(state_dict: dict[str, T], prefixes: set[str]) -> dict[str, T]:
    """The items whose key is under one of the prefixes."""
    return {key: value for key, value in state_dict.items() if _is_key_under_prefixes(key, prefixes)}


def adapter_entries(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The entries of `model.state_dict()` that one adapter has on tuner layers and on the tuner."""
    prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name)
    return _filter_state_dict_by_key_prefixes(state_dict_of(model, adapter_name), prefixes)


def bias_keys(model: nn.Module, bias: str, keys: Iterable[str]) -> list[str]:
    """The keys of base-model biases that are trained: with "all" every bias, with "<method>_only" those of the layers
    that have an adapter, with "none" nothing."""
    if bias == "all":
        return [key for key in keys if key == "bias" or key.endswith(".bias")]
    if not bias.endswith("_only"):
        return []
    layers = outer_modules(model, into_base_layers=True)
    names = (name for name, module in layers if isinstance(module, BaseTunerLayer))
    wanted = [_join(name.removeprefix(_FSDP), "base_layer.bias") for name in names]
    present = set(keys)
    return [key for key in wanted if key in present]
