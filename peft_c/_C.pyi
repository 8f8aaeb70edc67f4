"""Types of the C core. A tensor is a torch tensor; autograd sees nothing of this but `lowrank_forward`."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor, nn

class Layer:
    """The bookkeeping of a tuner layer: the C base of BaseTunerLayer."""

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None: ...
    def enable_adapters(self, enabled: bool) -> None: ...
    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None: ...
    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Iterable[str] | None = None) -> None: ...

class Tree:
    """Where the tuner layers of a model are, kept from call to call and checked in each."""

    def find(self, model: nn.Module, /, *classes: Any) -> tuple[list[Any], ...]: ...
    def set_adapter(
        self, model: nn.Module, classes: Any, others: Any, names: Any, inference_mode: bool, /
    ) -> tuple[list[Any], list[Any]] | None: ...
    def set_requires_grad(self, model: nn.Module, classes: Any, names: Any, requires_grad: bool, /) -> None: ...
    def enable_adapters(
        self, model: nn.Module, classes: Any, wrappers: Any, enabled: bool, irregular: bool, /
    ) -> tuple[bool | str | None, list[Any]]: ...

class _View(TypedDict):
    data: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    numel: int
    read_only: bool
    writable: bool

class _Info(TypedDict):
    isa: str
    isas: list[str]
    threads: int

# view: what C sees of a tensor, numpy array or __dlpack__ producer; TypeError or ValueError says why it has no view
def describe(object: Any, write: bool = False) -> _View: ...

# gate: (path, name of the reason, reason); path is "C", "composed", "merged", "disabled" or "base"
def gate(layer: nn.Module, x: Tensor | None = None) -> tuple[str, str, str]: ...
def is_fast() -> bool: ...
def may_act() -> bool: ...
def set_fast(enabled: bool) -> bool: ...
def info() -> _Info: ...

# forward: Tensor, or NotImplemented with nothing called or changed
def lowrank_forward(
    layer: nn.Module, x: Tensor, args: tuple[Any, ...] | None = (), kwargs: dict[str, Any] | None = None
) -> Any: ...
def lowrank_terms(
    layer: nn.Module, x: Tensor, terms: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
) -> Any: ...
def lowrank_apply(
    y: Tensor, x: Tensor, t: Tensor | None, scales: tuple[float, ...], factors: tuple[Tensor, ...]
) -> None: ...
def lowrank_mixed(layer: Any, x: Tensor, y: Tensor | None, names: list[str]) -> Tensor | None: ...
def lookup_add(y: Tensor, x: Tensor, terms: list[tuple[Tensor, Tensor, float] | None], /) -> bool: ...
def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    t: Tensor | None,
    scales: tuple[float, ...],
    factors: tuple[Tensor, ...],
) -> Tensor: ...
def linear_grad(
    g: Tensor,
    weight: Tensor,
    u: Tensor | None = None,
    scales: tuple[float, ...] = (),
    factors: tuple[Tensor, ...] = (),
) -> Tensor | None: ...
def lowrank_backward(
    g: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    scales: tuple[float, ...],
    factors: tuple[Tensor, ...],
    dx: Tensor | None,
    grads: tuple[Tensor | None, ...],
    add: bool = False,
    u: Tensor | None = None,
) -> bool: ...

# merge: operands is [(A, B, scale), ...] for B @ A * scale, or one tensor like the weight; None where C may not act
def merge_add(
    weight: Tensor,
    operands: Sequence[tuple[Tensor, Tensor, float]] | Tensor,
    check: bool,
    record: bool,
    owner: Tensor,
    /,
) -> tuple[bool, tuple[bytearray, ...] | None] | None: ...
def merge_subtract(
    weight: Tensor,
    operands: Sequence[tuple[Tensor, Tensor, float]] | Tensor,
    record: tuple[bytearray, ...] | None,
    owner: Tensor,
    /,
) -> bool | None: ...
def merge_switch(
    weight: Tensor,
    old: Sequence[tuple[Tensor, Tensor, float]] | Tensor,
    old_record: tuple[bytearray, ...] | None,
    new: Sequence[tuple[Tensor, Tensor, float]] | Tensor,
    check: bool,
    record: bool,
    owner: Tensor,
    /,
) -> tuple[bool, tuple[bytearray, ...] | None, bool] | None: ...
def exchange(weight: Tensor, other: Tensor, add: bool, check: bool, owner: Tensor, /) -> tuple[bool, int] | None: ...
def restore(
    weight: Tensor, other: Tensor, digest: int, owner: Tensor, places: Tensor | None = None, /
) -> bool | None: ...
def combine(
    weight: Tensor,
    old: Tensor,
    values: Tensor,
    run: int,
    multiply: bool,
    places: Tensor | None,
    check: bool,
    owner: Tensor,
    /,
) -> tuple[bool, int | bytes] | None: ...
def accumulate(y: Tensor, values: Tensor, multiply: bool, /) -> bool: ...
def uncombine(
    weight: Tensor, old: Tensor, values: Tensor, run: int, hashes: bytes, owner: Tensor, /
) -> bool | None: ...
def digest(tensor: Tensor, /) -> int | None: ...
def finite(tensor: Tensor, /) -> bool | None: ...
def fingerprint(tensors: list[Tensor], /) -> int | None: ...

# walk: over the live module tree; what acts on a list of layers acts on all or none
def find(model: nn.Module, /, *classes: type | tuple[type, ...]) -> tuple[list[Any], ...]: ...
def set_adapter(layers: Iterable[Any], names: str | Iterable[str], inference_mode: bool, /) -> None: ...
def enable_adapters(layers: Iterable[Any], enabled: bool, /) -> None: ...
def set_requires_grad(layers: Iterable[Any], names: str | Iterable[str], requires_grad: bool, /) -> None: ...
def flags(layer: Any, skip: Collection[str] | Mapping[str, Any], /) -> list[tuple[Tensor, bool]]: ...
