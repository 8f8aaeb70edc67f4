"""Merging, unmerging and unloading all layers of a model: every one of them, or, after an error, none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .. import _C
from ..rollback import undivided
from ..utils.matching import _get_submodules
from .offloaded import onload_layer
from .tuner_layer import BaseTunerLayer


def check_adapters_to_merge(module: BaseTunerLayer, adapter_names: list[str] | None = None) -> list[str]:
    """The adapters among `adapter_names` (default: the active ones) that are not merged yet; warns if some are.

    TypeError if `adapter_names` is a string.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    names = module.active_adapters if adapter_names is None else adapter_names
    if not module.merged:
        return names
    merged = list(module.merged_adapters)
    names = [name for name in names if name not in merged]
    if names:
        warnings.warn(
            f"Already following adapters were merged {','.join(merged)}. "
            f"You are now additionally merging {','.join(names)}."
        )
    else:
        warnings.warn("All adapters are already merged, nothing to do.")
    return names


# --- weights that two layers share ---


def _shared_base_weights(layers: Iterable[BaseTunerLayer], names: list[str] | None) -> list[list[nn.Module]]:
    """Groups of distinct base modules whose `weight` is the same memory, of layers that will merge an adapter; without
    layers of trainable tokens that write there what the layer they are tied to writes."""
    groups: dict[int, dict[int, tuple[nn.Module, BaseTunerLayer]]] = {}
    for layer in layers:
        if getattr(layer, "tied_adapter", None) is not None:
            continue
        base = layer.get_base_layer()
        weight = base._parameters.get("weight") if isinstance(base, nn.Module) else None
        if type(weight) is nn.Parameter and weight.device.type != "meta" and weight.data_ptr():
            groups.setdefault(weight.data_ptr(), {})[id(base)] = (base, layer)

    def merges(layer: BaseTunerLayer) -> bool:
        return not set(layer.active_adapters if names is None else names).isdisjoint(
            layer._all_available_adapter_names()
        )

    shared = (group.values() for group in groups.values() if len(group) > 1)
    return [[base for base, layer in group if merges(layer)] for group in shared]


def _untie(layers: Iterable[BaseTunerLayer], names: list[str] | None) -> list[tuple[nn.Module, nn.Parameter]]:
    """Gives all but the first of the base modules that share a weight a copy of it, so that each is merged by itself.
    Returns (base module, its shared weight)."""
    untied = []
    for group in _shared_base_weights(layers, names):
        for base in group[1:]:
            shared = base.weight
            untied.append((base, shared))
            base.weight = nn.Parameter(shared.data.clone(), requires_grad=shared.requires_grad)
    if untied:
        warnings.warn(
            "Several adapted layers share one base weight (tied embeddings, for example). To keep each of them right "
            "when merged, the weights were untied; unmerging ties them again."
        )
    return untied


def _tie(untied: Iterable[tuple[nn.Module, nn.Parameter]]) -> None:
    for base, shared in untied:
        base.weight = shared


def tie_again(layers: Iterable[BaseTunerLayer]) -> None:
    """Ties the base weights of unmerged layers that were untied for merging."""
    for layer in layers:
        base = layer.get_base_layer()
        if "_untied_from" in base.__dict__ and not layer.merged:
            _tie([(base, base.__dict__.pop("_untied_from"))])


# --- merge, unmerge ---


class _Merged:
    """What is merged into a layer that does its merging by itself; for others see `law.transaction`."""

    def __init__(self, layer: BaseTunerLayer) -> None:
        self.layer = layer
        self.names = list(layer.merged_adapters)

    def go_back(self) -> None:
        """Unmerge, and merge again what was merged, by what the adapters are now."""
        if list(self.layer.merged_adapters) == self.names:
            return
        self.layer.unmerge()
        if self.names:
            self.layer.merge(adapter_names=self.names)


def merge_states(layers: Iterable[BaseTunerLayer]) -> list[Any]:
    """For each layer what knows how to `go_back` to what is merged into it now."""
    return [layer._merging() if hasattr(layer, "_merging") else _Merged(layer) for layer in layers]


def roll_back(states: list[Any]) -> None:
    """Brings every layer back; goes on when one of them fails."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for state in reversed(states):
            try:
                with onload_layer(state.layer):
                    state.go_back()
            except Exception:  # the error that led here is the one to raise
                continue


def _apply(layers: list[BaseTunerLayer], act: Callable[[BaseTunerLayer], None], interrupts: undivided) -> None:
    """act(layer) for every layer; if one fails, what the others have merged or unmerged is taken back."""
    before = merge_states(layers)
    try:
        for layer in layers:
            with onload_layer(layer):
                act(layer)
            interrupts.let_through()
    except BaseException:
        roll_back(before)
        raise


def merge_layers(model: nn.Module, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Merges the adapters (default: the active ones) into the base weights of all tuner layers.

    If a layer fails (NaN under `safe_merge`, weights on the meta device, KeyboardInterrupt), those that were merged
    are unmerged before the error is raised.
    """
    (layers,) = _C.find(model, BaseTunerLayer)
    with undivided() as interrupts:
        untied = _untie([layer for layer in layers if not layer.merged], adapter_names)
        try:
            _apply(layers, lambda layer: layer.merge(adapter_names=adapter_names, safe_merge=safe_merge), interrupts)
        except BaseException:
            _tie(untied)
            raise
        for base, shared in untied:
            base.__dict__["_untied_from"] = shared  # not an attribute assignment: that would register a parameter


def unmerge_layers(model: nn.Module) -> None:
    """Takes all merged adapters out of all tuner layers, and ties again what merging has untied.

    The last layer comes first: what two layers did to memory that they share is undone exactly in that order only.
    """
    (layers,) = _C.find(model, BaseTunerLayer)
    with undivided() as interrupts:
        _apply(layers[::-1], lambda layer: layer.unmerge(), interrupts)
        tie_again(layers)


def switch_layers(model: nn.Module, adapter_names: list[str], safe_merge: bool) -> None:
    """Merges `adapter_names` in place of what is merged, in all tuner layers; all of them or, after an error, none.

    Layers of the methods that merge through `law` read and write their weight once.
    """
    (layers,) = _C.find(model, BaseTunerLayer)

    def switch(layer: BaseTunerLayer) -> None:
        if hasattr(layer, "switch"):
            layer.switch(adapter_names, safe_merge)
            return
        if layer.merged:
            layer.unmerge()
        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    with undivided() as interrupts:
        _apply(layers, switch, interrupts)


# --- unload ---


def _progress(names: list[str], enabled: bool, merge: bool) -> Iterable[str]:
    if not enabled:
        return names
    from tqdm import tqdm

    return tqdm(names, desc="Unloading " + ("and merging " if merge else "") + "model")


class Unloading:
    """Replaces every tuner layer by its base layer, after merging if asked; takes everything back on an error."""

    def __init__(self, tuner: nn.Module, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> None:
        self.tuner = tuner
        self.merge = merge
        self.how = {"safe_merge": safe_merge, "adapter_names": adapter_names}
        self.saved: list[tuple[nn.Module, dict, dict]] = []  # modules with their children and parameters
        self.touched: list[Any] = []  # how to go back in the layers inside

    def run(self, progressbar: bool = False) -> None:
        from .targets import outer_modules

        model = self.tuner.model
        names = [
            name
            for name, module in outer_modules(model)
            if name and (hasattr(module, "base_layer") or hasattr(module, "unload_and_optionally_merge_module"))
        ]
        with undivided() as interrupts:
            untied = _untie(_C.find(model, BaseTunerLayer)[0], self.how["adapter_names"]) if self.merge else []
            try:
                for name in _progress(names, progressbar, self.merge):
                    self.unload(name)
                    interrupts.let_through()
            except BaseException:
                for module, children, parameters in reversed(self.saved):
                    module._modules.update(children)
                    module._parameters.clear()
                    module._parameters.update(parameters)
                roll_back(self.touched)
                _tie(untied)
                raise
            # equal after all: the adapters were tied as well
            _tie((base, shared) for base, shared in untied if torch.equal(base.weight, shared))

    def unload(self, name: str) -> None:
        try:
            parent, target, target_name = _get_submodules(self.tuner.model, name)
        except AttributeError:
            return  # it was inside a module that has been replaced
        for module in (*_C.find(target, nn.Module)[0], parent):
            self.saved.append((module, dict(module._modules), dict(module._parameters)))
        self.touched += merge_states(_C.find(target, BaseTunerLayer)[0])
        with onload_layer(target):
            if hasattr(target, "unload_and_optionally_merge_module"):
                new_module = target.unload_and_optionally_merge_module(merge=self.merge, **self.how)
            elif hasattr(target, "base_layer"):
                if self.merge:
                    self.merge_one(target)
                new_module = target.get_base_layer()
            else:
                return
            self.tuner._replace_module(parent, target_name, new_module, target)

    def merge_one(self, target: nn.Module) -> None:
        target.merge(**self.how)


def forget_tie_if_diverged(model: nn.Module, model_config: dict) -> None:
    """Sets `tie_word_embeddings=False` in the config of a transformers model whose embeddings are no longer tied."""
    if not model_config.get("tie_word_embeddings"):
        return
    try:
        ends = (model.get_output_embeddings(), model.get_input_embeddings())
        weights = [getattr(end, "weight", None) for end in ends]
        if any(weight is None for weight in weights) or weights[0].data_ptr() == weights[1].data_ptr():
            return
        model.config.tie_word_embeddings = False
    except (NotImplementedError, AttributeError):
        return
    warnings.warn(
        "Input and output embeddings are no longer tied after merging. "
        "Setting `tie_word_embeddings=False` in the model config."
    )
