"""All or nothing: `undo_on_error` takes back what fails halfway while an adapter is added; `undivided` keeps Ctrl-C
from coming halfway."""

from __future__ import annotations

from _signal import SIGINT, getsignal, signal  # without making an enum of every number and function
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from . import _C

_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set})
_LARGE = 16


def _affected(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """The modules that adding an adapter may change: all, except what belongs to one adapter that exists already.
    With each: whether its dicts have one entry an adapter, so that adding one only appends to them."""
    from .tuners.tuners_utils import BaseTunerLayer

    modules, layers = _C.find(model, nn.Module, BaseTunerLayer)  # without the layers' containers of adapters
    known, tuned = set(map(id, modules)), set(map(id, layers))
    for module in modules:
        yield module, id(module) in tuned
    for layer in layers:
        for child in layer._modules.values():
            if child is not None and id(child) not in known:
                yield child, True


def _refill(container: dict | list | set, content: dict | list | set | tuple | int) -> None:
    if isinstance(content, int):
        while len(container) > content:
            container.popitem()
        return
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)


class _Snapshot:
    """The attributes of every module, containers among them copied one level deep, which storage each parameter has,
    and what is merged. No weight is copied; of weights overwritten in place, unmerging is undone, nothing else. Many
    adapters cost no more than a few."""

    def __init__(self, model: nn.Module) -> None:
        from .tuners.merging import merge_states
        from .tuners.tuners_utils import BaseTunerLayer

        self.merged = merge_states([layer for layer in _C.find(model, BaseTunerLayer)[0] if layer.merged_adapters])
        self.modules = []
        self.parameters = []
        for module, per_adapter in _affected(model):
            attributes = module.__dict__.copy()
            full = []
            for value in attributes.values():
                if type(value) in _CONTAINERS and value:
                    by_length = per_adapter and len(value) > _LARGE and isinstance(value, dict)  # only appended to
                    full.append((value, len(value) if by_length else value.copy()))
            self.modules.append((module, attributes, full))
            parameters = module._parameters
            if not parameters or (per_adapter and len(parameters) > _LARGE):
                continue
            for param in parameters.values():
                if param is not None:
                    data = param.data if type(param) is nn.Parameter else None
                    self.parameters.append((param, param.requires_grad, data))

    def restore(self) -> None:
        from .tuners.merging import roll_back

        for _, attributes, full in self.modules if self.merged else ():  # weights that unmerging has tied again
            for container, content in full:
                if container is attributes["_parameters"]:
                    _refill(container, content)
        roll_back(self.merged)
        for module, attributes, full in self.modules:
            _refill(module.__dict__, attributes)
            contents = {id(container): content for container, content in full}
            for value in attributes.values():
                if type(value) in _CONTAINERS:
                    _refill(value, contents.get(id(value), ()))
        for param, requires_grad, data in self.parameters:
            if data is not None and data.device.type != "meta" and data.data_ptr() != param.data_ptr():
                param.data = data
            if param.requires_grad != requires_grad:
                param.requires_grad_(requires_grad)


class _Running:
    """The snapshots of the blocks that this thread or task is in. In a class: what pickles a module of a checkout with
    all its values, as dill does, cannot pickle a ContextVar, but takes classes by name."""

    snapshots: ContextVar[tuple[_Snapshot, ...]] = ContextVar("snapshots", default=())


@contextmanager
def where(place: str) -> Iterator[None]:
    """Adds to an error in the block where it happened; Python shows this below the message (from 3.11 on)."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(f"({place})")
        raise


@contextmanager
def undo_on_error(model: nn.Module) -> Iterator[None]:
    """Takes back what the block did to `model` and its submodules when it raises: modules that were replaced or
    added, attributes, hooks, `requires_grad`, and parameters that were given other storage.

    Inside of such a block for a model that `model` is a part of, that one does it."""
    outer = _Running.snapshots.get()
    if any(model is module for saved in outer for module, *_ in saved.modules):
        yield
        return
    saved = _Snapshot(model)
    token = _Running.snapshots.set((*outer, saved))
    try:
        yield
    except BaseException:
        with torch.no_grad():
            saved.restore()
        raise
    finally:
        _Running.snapshots.reset(token)


class undivided:
    """Holds Ctrl-C back while a block runs, so that it comes where `let_through` is called and nowhere between.

    One inside another is the same as one: `let_through` is then for both. Only the main thread gets signals; in others
    there is nothing to hold back.
    """

    outer: undivided | None = None
    held: tuple[int, Any] | None = None
    handler: Any = None

    def __enter__(self) -> undivided:
        handler = getsignal(SIGINT)
        outer = getattr(handler, "__self__", None)
        if isinstance(outer, undivided):
            self.outer = outer
        elif callable(handler):
            try:
                signal(SIGINT, self._hold)
                self.handler = handler
            except ValueError:  # not the main thread
                pass
        return self

    def _hold(self, number: int, frame: Any) -> None:
        self.held = number, frame

    def let_through(self) -> None:
        """Handle now what was held back: a KeyboardInterrupt, as a rule."""
        holder = self if self.outer is None else self.outer
        if holder.held is not None:
            held, holder.held = holder.held, None
            holder.handler(*held)

    def __exit__(self, *_: Any) -> None:
        if self.handler is not None:
            signal(SIGINT, self.handler)
            self.let_through()
