"""`undo_on_error`: what fails halfway while adding an adapter leaves the model as it was."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from . import _C

_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set})


def _affected(model: nn.Module) -> list[nn.Module]:
    """The modules that adding an adapter may change: all, except what belongs to one adapter that exists already."""
    from .tuners.tuners_utils import BaseTunerLayer

    modules, layers = _C.find(model, nn.Module, BaseTunerLayer)  # without the layers' containers of adapters
    known = set(map(id, modules))
    children = (child for layer in layers for child in layer._modules.values() if child is not None)
    return modules + [child for child in children if id(child) not in known]


def _refill(container: dict | list | set, content: dict | list | set | tuple) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)


class _Snapshot:
    """The attributes of every module, containers among them copied one level deep, and which storage each parameter
    has. No weight is copied; weights overwritten in place are not undone."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = []
        self.parameters = []
        for module in _affected(model):
            attributes = dict(module.__dict__)
            containers = [(v, v.copy() if v else ()) for v in attributes.values() if type(v) in _CONTAINERS]
            self.modules.append((module, attributes, containers))
            for param in module._parameters.values():
                if param is not None:
                    data = param.data if type(param) is nn.Parameter else None
                    self.parameters.append((param, param.requires_grad, data))

    def restore(self) -> None:
        for module, attributes, containers in self.modules:
            _refill(module.__dict__, attributes)
            for container, content in containers:
                _refill(container, content)
        for param, requires_grad, data in self.parameters:
            if data is not None and data.device.type != "meta" and data.data_ptr() != param.data_ptr():
                param.data = data
            if param.requires_grad != requires_grad:
                param.requires_grad_(requires_grad)


@contextmanager
def undo_on_error(model: nn.Module) -> Iterator[None]:
    """Takes back what the block did to `model` and its submodules when it raises: modules that were replaced or
    added, attributes, hooks, `requires_grad`, and parameters that were given other storage."""
    saved = _Snapshot(model)
    try:
        yield
    except BaseException:
        with torch.no_grad():
            saved.restore()
        raise
