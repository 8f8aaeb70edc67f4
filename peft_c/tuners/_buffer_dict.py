"""BufferDict: what nn.ParameterDict is for parameters, for buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


class BufferDict(nn.Module):
    """A dictionary str -> tensor whose values are registered buffers: they move with the module.

    Args:
        buffers: a mapping, or an iterable of (name, tensor) pairs.
        persistent: whether the buffers become part of the state dict.
    """

    def __init__(self, buffers: Mapping | Iterable | None = None, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        if buffers is not None:
            self.update(buffers)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._buffers[key]

    def __setitem__(self, key: str, buffer: torch.Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers.keys())

    def __contains__(self, key: str) -> bool:
        return key in self._buffers

    def clear(self) -> None:
        """Removes all buffers."""
        self._buffers.clear()

    def pop(self, key: str) -> torch.Tensor:
        """Removes a buffer and returns it; KeyError if there is none."""
        buffer = self[key]
        del self[key]
        return buffer

    def keys(self):
        return self._buffers.keys()

    def items(self):
        return self._buffers.items()

    def values(self):
        return self._buffers.values()

    def update(self, buffers: Mapping | Iterable) -> None:
        """Adds or overwrites buffers from a mapping or (name, tensor) pairs. The order of insertion is kept; plain
        dicts and other mappings are sorted by name."""
        if not isinstance(buffers, Iterable):
            raise TypeError(f"BufferDict.update needs a mapping or (name, tensor) pairs, got {type(buffers).__name__}")
        if hasattr(buffers, "items"):
            ordered = isinstance(buffers, BufferDict) or type(buffers).__name__ == "OrderedDict"
            buffers = buffers.items() if ordered else sorted(buffers.items())
        for i, pair in enumerate(buffers):
            if not isinstance(pair, Iterable):
                raise TypeError(
                    f"BufferDict.update: element {i} is a {type(pair).__name__}, not a (name, tensor) pair"
                )
            if len(pair) != 2:
                raise ValueError(f"BufferDict.update: element {i} has length {len(pair)}, a pair has 2")
            self[pair[0]] = pair[1]

    def extra_repr(self) -> str:
        def describe(buffer: torch.Tensor) -> str:
            device = "" if buffer.device.type == "cpu" else f" ({buffer.device.type.upper()} {buffer.get_device()})"
            return f"[{torch.typename(buffer)} of size {'x'.join(map(str, buffer.size()))}{device}]"

        return "\n".join(f"  ({name}): Buffer containing: {describe(b)}" for name, b in self._buffers.items())

    def __call__(self, input: Any) -> None:
        raise RuntimeError("BufferDict should not be called.")
