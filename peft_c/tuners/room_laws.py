"""The laws of rooms (see `room`): what an adapter does to its base layer, in forwards and merges."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from .. import _C
from . import kept, law
from .base_view import BaseView, held
from .products import CONVOLUTIONS, accumulate, add_product, apply_weight, into, linear, product, rows_of
from .room_layer import Room, dropout, is_idle, weight_view


class AddRoom(Room):
    """The law ADD: the adapted weight is the base weight plus a delta, which may depend on `bare_weight`."""

    adds: ClassVar[tuple[str, ...]] = ("weight",)  # what the adapters add to: "weight", "bias" or both
    dropout: ClassVar[str] = ""  # the ModuleDict with the dropout in front of each adapter, if there is one
    delta_like: ClassVar[str] = ""  # what has the dtype of `get_delta_weight`, if not the delta
    converts_to_lora: ClassVar[bool] = True  # whether PEFT converts the method's adapters to LoRA
    factored: ClassVar[float] = 0  # up to how many rows of x a forward multiplies by `terms`, the cheapest way then

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "dropout" in cls.__dict__:
            cls.containers = {cls.dropout: nn.ModuleDict, **cls.containers}

    def add_dropout(self, name: str, p: float) -> None:
        """Make the dropout of an adapter."""
        getattr(self, self.dropout)[name] = dropout(p)

    def drops(self, name: str) -> bool:
        """Whether the adapter's dropout is active, or calls hooks or a forward of its own."""
        return bool(self.dropout) and not is_idle(self._modules[self.dropout][name])

    def delta(self, name: str) -> torch.Tensor:
        """The delta of an adapter as the matrix (out, in...) that `weight_view` shows."""
        return self.low_rank(name).delta()

    def low_rank(self, name: str) -> law.LowRank | None:
        """The delta as factors, where it has such; None otherwise."""
        return None

    def terms(self, name: str, x: torch.Tensor) -> list[law.LowRank | None]:
        """What `term` adds for x, as factors, for `factored` rooms; None where that is not so."""
        return [self.low_rank(name)]

    def bias_delta(self, name: str) -> torch.Tensor:
        """The delta of the bias, if `adds` names it."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it adds to the bias")

    def dense(self, name: str, x: torch.Tensor) -> bool:
        """Whether for x it is best to build the delta, in new memory, and add it to the weight: one product in all."""
        return False

    def is_long(self, x: torch.Tensor) -> bool:
        """Whether factors take less to multiply by each other than by x, without a gradient."""
        size = self.in_features + self.out_features
        return not torch.is_grad_enabled() and rows_of(x) * size >= self.in_features * self.out_features

    def term_beside(self, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """`term`, for rooms that can make use of the base layer's output for x."""
        return self.term(name, x)

    def halves(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`term` as the product of (..., r) and (r, out), or of (..., out) and (out,), in rooms where it is one."""
        return None

    def term(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the output for x, which has its parameters' dtype, behind the dropout."""
        halves = self.halves(name, x)
        if halves is not None:
            return product(*halves) if halves[1].dim() == 2 else halves[0] * halves[1]
        base = self.get_base_layer()
        factors = self.low_rank(name)
        if factors is not None and isinstance(base, CONVOLUTIONS) and base.groups == 1:
            channels = -len(base.kernel_size) - 1
            inner = apply_weight(base, x, factors.A.view(-1, *base.weight.shape[1:]), None)
            return linear(inner.movedim(channels, -1), factors.B).movedim(-1, channels) * factors.scale
        if factors is not None and not isinstance(base, (*CONVOLUTIONS, nn.Embedding)):
            result = linear(linear(x.to(factors.A.dtype), factors.A), factors.B)
            return result if isinstance(factors.scale, float) and factors.scale == 1.0 else result * factors.scale
        return apply_weight(base, x, self.added(name), None)

    def adapter_dtype(self, name: str) -> torch.dtype | None:
        """The dtype an adapter wants its input in: that of its first parameter; None for token ids."""
        return None if isinstance(self.get_base_layer(), nn.Embedding) else self.parameter_dtype(name)

    def adapter_input(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What the adapter's dropout gets."""
        wanted = self.adapter_dtype(name)
        return x if wanted is None else self._cast_input_dtype(x, wanted)

    def parameter_dtype(self, name: str) -> torch.dtype:
        """The dtype of an adapter's first parameter."""
        container = next(layer for layer in self.adapter_layer_names if name in self._modules[layer])
        entry = self.entry(container, name)
        return (entry if isinstance(entry, torch.Tensor) else next(entry.parameters())).dtype

    def adapt(self, names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if (
            all(self.dense(name, x) and not self.drops(name) for name in names)
            and not (args or kwargs)
            and self.base_layer is self.get_base_layer()
            and self.is_bare()
            and self.quantization_backend is None
        ):
            build = partial(self.transformed, names)
            return self.run_with(x, *(kept.adapted(self, names, build) if "weight" in self.adds else build()))
        if self.factored and self.may_act_in_c(x) and not any(self.drops(name) for name in names):
            terms = [term for name in names for term in self.terms(name, x)]
            result = NotImplemented if None in terms else _C.lowrank_terms(self, x, terms, args, kwargs)
            if result is not NotImplemented:
                return result
        output = result = self.base_output(x, *args, **kwargs)
        in_place = len(names) == 1 and self.owns_output(x, type(self).term_beside is AddRoom.term_beside)
        for name in names:
            part = self.adapter_input(name, x)
            part = getattr(self, self.dropout)[name](part) if self.drops(name) and part.is_floating_point() else part
            halves = self.halves(name, part) if part.dtype == result.dtype else None
            if halves is not None:
                result = add_product(result, *halves, in_place)
                continue
            term = self.term_beside(name, part, output)
            result = accumulate(result, term) if in_place else result + term
        return result if result.dtype is output.dtype else result.to(output.dtype)

    def may_act_in_c(self, x: torch.Tensor) -> bool:
        """Whether it is worthwhile to ask C for the forward with `terms`."""
        few = 0 < rows_of(x) <= self.factored
        worthwhile = self.factored == math.inf if torch.is_grad_enabled() else few  # a graph needs small factors
        at_hand = x.is_cpu and not torch.compiler.is_compiling()
        return worthwhile and at_hand and not isinstance(self.get_base_layer(), (*CONVOLUTIONS, nn.Embedding))

    def transformed(self, names: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = self.get_base_weight(), getattr(self.get_base_layer(), "bias", None)
        for name in names:
            if "weight" in self.adds:
                weight = into(torch.add, self.added(name), weight)
            if bias is not None and "bias" in self.adds:
                bias = bias + self.bias_delta(name)
        return weight, bias

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What merging the adapter adds to the base weight, in the dtype in which PEFT gives it; ValueError if there
        is no adapter of that name."""
        if not self.has_adapter(adapter):
            raise ValueError(f"Adapter {adapter} not found.")
        delta = self.whole_delta(adapter)
        if self.delta_like == "weight" and self.quantization_backend is None:
            return delta.to(self.get_base_layer().weight.dtype)
        return delta.to(self.parameter_dtype(adapter)) if self.delta_like == "parameters" else delta

    def get_delta_bias(self, adapter_name: str) -> torch.Tensor:
        """What merging the adapter adds to the base bias, of methods that change it."""
        return self.bias_delta(adapter_name)

    def whole_delta(self, name: str) -> torch.Tensor:
        """What merging the adapter adds to the base weight: a tensor of its shape, as exact as it is computed."""
        delta = self.delta(name)
        return delta if self.quantization_backend is not None else weight_view(self.get_base_layer()).restore(delta)

    def has_own_delta(self) -> bool:
        """Whether `get_delta_weight` is the room's, not one of a subclass or instance elsewhere. Its `__module__` does
        not tell: `functools.wraps` copies it."""
        return getattr(self.get_delta_weight, "__globals__", {}).get("__name__", "").startswith(__package__)

    def added(self, name: str) -> torch.Tensor:
        """What merging the adapter adds: `whole_delta`, or what another `get_delta_weight` says."""
        return self.whole_delta(name) if self.has_own_delta() else self.get_delta_weight(name)

    def weight_change(self, name: str) -> law.Change:
        """What merging does to the weight, in the form that costs least."""
        factors = self.low_rank(name) if self.has_own_delta() else None
        return (lambda: self.added(name)) if factors is None or factors.is_wide() else factors

    def _merge_changes(self, name: str) -> dict[str, law.Change]:
        changes = {"weight": self.weight_change(name)} if "weight" in self.adds else {}
        if "bias" in self.adds and held(self.get_base_layer(), "bias") is not None:
            delta = self.bias_delta(name)  # known before the weight is changed, on which it may depend
            changes["bias"] = lambda: delta
        if not changes:
            raise ValueError(f"Base layer has no bias, cannot merge bias adapter {name}")
        return changes

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.converts_to_lora


class MapRoom(Room):
    """The laws ROTATE, SCALE, BLEND and SWAP: the adapted weight is a function of the base weight."""

    def transform(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight, as the matrix (out, in...) that `weight_view` shows, and the bias with the adapter in them."""
        raise NotImplementedError(f"{type(self).__name__} does not say how the weight is transformed")

    def scale_vector(self, name: str) -> tuple[torch.Tensor, int] | None:
        """Where the map is nothing else: the vector by which the outputs (0; biases, too) or inputs (1) are scaled."""
        return None

    before: ClassVar[Any] = None  # before(name, x): the input with which the base layer gives the adapted output
    after: ClassVar[Any] = None  # after(name, y): the adapted output, from the base layer's

    def transform_in_forward(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """`transform` as the forward needs it, where that differs: with dropout."""
        return self.transform(name, weight, bias)

    def transformed(self, names: Iterable[str], forward: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight and bias that the base layer would have if `names` were merged, or has in a forward."""
        transform = self.transform_in_forward if forward else self.transform
        base = self.get_base_layer()
        view, weight, bias = weight_view(base), self.get_base_weight(), getattr(base, "bias", None)
        matrix = view.values(weight)
        for name in names:
            matrix, bias = transform(name, matrix, bias)
        return view.restore(matrix, weight.shape), bias

    def adapt(self, names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.before is not None or self.after is not None:
            dtype = x.dtype
            for name in reversed(names) if self.before is not None else ():
                x = self.before(name, x)
            result = self.base_output(x.to(dtype), *args, **kwargs)
            dtype, in_place = result.dtype, self.owns_output(x)
            for name in names if self.after is not None else ():
                scaling = self.scale_vector(name) if in_place else None
                result = self.after(name, result) if scaling is None else accumulate(result, scaling[0], True)
            return result if result.dtype is dtype else result.to(dtype)
        return self.run_with(x, *kept.adapted(self, names, partial(self.transformed, names, forward=True)))

    def _merge_changes(self, name: str) -> dict[str, law.Change]:
        def merged(targets: dict[str, BaseView]) -> dict[str, torch.Tensor | law.Times]:
            scaling = self.scale_vector(name)
            if scaling is not None:
                vector, dim = scaling[0].clone(), scaling[1]
                times = {"weight": law.Times(vector, 1 - dim if targets["weight"].transposed else dim)}
                return times | {"bias": law.Times(vector, 0)} if dim == 0 and "bias" in targets else times
            weight, bias = self.transformed([name])
            return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

        labels = ("weight",) if held(self.get_base_layer(), "bias") is None else ("weight", "bias")
        return dict.fromkeys(labels, law.Replace(merged))


class SwapRoom(Room):
    """The law SWAP of whole modules: an adapter is a module in the first container and stands in for the base layer.

    Merged, it is the layer's `base_layer`, too, and the base layer is kept aside, as it is: no value is copied, and
    whatever is written or trained meanwhile is the adapter's.
    """

    exclusive = True
    returns_input_dtype = False
    _aside: ClassVar[nn.Module | None] = None  # the base layer of a merged one; not among the submodules

    def adapt(self, names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._modules[self.adapter_layer_names[0]]._modules[names[0]](x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Let an adapter (default: the active one) stand in for the base layer.

        safe_merge: ValueError if one of its values is not finite. Nothing has changed when an error is raised.
        """
        with _Standing(self):
            for name in self._one_to_merge(adapter_names):
                if self.has_adapter(name):
                    module = self.entry(self.adapter_layer_names[0], name)
                    self._check_values(name, module, safe_merge)
                    self.__dict__["_aside"], self._modules["base_layer"] = self._modules["base_layer"], module
                    self.merged_adapters.append(name)

    def _check_values(self, name: str, module: nn.Module, safe_merge: bool) -> None:
        for part in module.modules() if module._modules else (module,):
            for value in (*part._parameters.values(), *part._buffers.values()):
                if value is not None and value.is_meta:
                    raise ValueError(
                        f"Cannot merge '{name}' of {law.describe(self)}: it is on the meta device and has no values. "
                        "Load the weights first."
                    )
                if safe_merge and value is not None and not law.is_finite(value):
                    raise law.nan_error([name])

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Put the base layer back; with `adapter_names`, if one of these is merged."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
        elif adapter_names is None or not set(adapter_names).isdisjoint(self.merged_adapters):
            with _Standing(self):
                base, self._merge_suspended = self.__dict__.pop("_aside", None), False
                if base is not None:  # it was not suspended
                    if base.training is not self.training:
                        base.train(self.training)
                    self._modules["base_layer"] = base
                    if getattr(base, "merged_adapters", None):  # of another model; it was merged while it stood aside
                        base.unmerge()
                self.merged_adapters.clear()

    def switch(self, adapter_names: list[str], safe_merge: bool = False) -> None:
        """Merge the adapter in place of the one that is merged."""
        with _Standing(self):
            if self.merged:
                self.unmerge()
            self.merge(safe_merge, adapter_names)

    def _merging(self) -> Any:
        return _Standing(self)

    def _apply(self, fn: Any, recurse: bool = True) -> SwapRoom:
        if self._aside is not None and recurse:
            self._aside._apply(fn)
        return super()._apply(fn, recurse)


class _Standing:
    """Which module stands for the base layer of a `SwapRoom`; as a block, goes back there on an error."""

    def __init__(self, layer: SwapRoom) -> None:
        self.layer, self.base, self.aside = layer, layer._modules["base_layer"], layer._aside
        self.names, self.suspended = list(layer.merged_adapters), layer._merge_suspended

    def go_back(self) -> None:
        layer = self.layer
        layer._modules["base_layer"], layer.__dict__["_aside"] = self.base, self.aside
        layer.merged_adapters[:], layer._merge_suspended = self.names, self.suspended

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self.go_back()
