"""What tuners are written in: a room declares parameters and mathematics, the shared base acts.

A method is one file with three classes and one call of `register`:

- a `RoomConfig`: the options, in PEFT's order, each with its help text, of which the docstring is made;
- a `Room`: the parameters of an adapter (`create`) and what they do to a layer (the law, below);
- a `RoomModel`: which base layers the method adapts with which room;

Everything else stands here, once: construction, adding adapters (all or nothing), the forward of active, disabled,
merged and mixed adapters, merging and exact unmerging (through `law`), injection, and PEFT's module paths.

The law of a room is the class it derives from:

| law      | a room writes                    | merged weight           | forward                                     |
|----------|----------------------------------|-------------------------|---------------------------------------------|
| AddRoom  | `delta(name)`                    | W + delta               | base(x) + term(name, x)                     |
|          | or `low_rank(name)`              | W + scale * B A         | the same, without building B A              |
|          | and, where it changes biases,    |                         |                                             |
|          | `bias_delta(name)`               | b + bias_delta          | part of term(name, x)                       |
| MapRoom  | `transform(name, weight, bias)`  | what that returns       | the base operation with these weights       |
|          | and, where it is cheaper,        |                         |                                             |
|          | `before(name, x)`,               |                         | base(before(x))                             |
|          | `after(name, y)`                 |                         | after(base(x))                              |
| SwapRoom | a module for each adapter        | that module's           | that module                                 |
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import copy
from functools import partial
from inspect import Parameter, signature
from typing import Any, ClassVar

import torch
from torch import nn

from .. import _C
from ..config import PeftConfig
from ..reexports import elsewhere
from ..utils import constants
from ..utils.peft_types import add_peft_type, register_peft_method
from ..utils.quantization_utils import QuantizationBackend, get_quantization_kwargs, resolve_quantization_backend
from . import kept, law
from .base_view import BaseView, held
from .changes import multiplies_slowly
from .layer_calls import DELTA_LIKE, argument_orders, by_name, settled
from .products import (
    CONVOLUTIONS,
    FEW,
    accumulate,
    add_product,
    apply_weight,
    c_is_worth_asking,
    einsum,
    into,
    linear,
    multipliable,
    multiply,
    product,
    rows_of,
)
from .resets import RESETS, reset_method
from .room_options import RoomConfig, documented, option, pattern_value, positive, shared
from .tuner_layer import BaseTunerLayer, _get_in_out_features, is_bare, is_transformers_conv1d, tensors_of
from .tuners_utils import BaseTuner, check_adapters_to_merge

# the words in which rooms are written
__all__ = [
    "CONVOLUTIONS",
    "FEW",
    "AddRoom",
    "MapRoom",
    "Room",
    "RoomConfig",
    "RoomModel",
    "State",
    "SwapRoom",
    "Unscaled",
    "apply_weight",
    "dropout",
    "einsum",
    "into",
    "kaiming",
    "linear",
    "multipliable",
    "multiply",
    "option",
    "pattern_value",
    "positive",
    "product",
    "register",
    "rows_of",
    "shared",
    "weight_view",
]

State = dict[str, torch.Tensor]
QUANTISED = {"linear": nn.Linear, "embedding": nn.Embedding, "conv2d": nn.Conv2d}  # a backend's layer type -> class


def dropout(p: float, kind: type[nn.Module] = nn.Dropout) -> nn.Module:
    """Dropout with probability p; nothing if that is 0."""
    return kind(p) if p > 0 else nn.Identity()


def kaiming(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, filled as nn.Linear fills its weight."""
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


def weight_view(base: nn.Module, name: str = "weight") -> BaseView:
    """The weight of a base layer as a matrix (out, in...): transposed for Conv1D."""
    transposed = name == "weight" and type(base) is not nn.Linear and is_transformers_conv1d(base)
    return BaseView(base, name, transposed)


class Room(law.Merging, nn.Module, BaseTunerLayer):
    """One base layer with the adapters of one method.

    `adapter_layer_names` are ParameterDicts and `other_param_names` dicts, unless `containers` says otherwise, which
    come first: their order is that of the layer's submodules.
    What `RoomModel.settings` made for this layer is given at construction and to `update_layer`.
    """

    containers: ClassVar[dict[str, type]] = {}
    title: ClassVar[str] = ""  # the method's name in messages
    exclusive: ClassVar[bool] = False  # whether only one adapter at a time can act or be merged
    adapter_kwargs: ClassVar[tuple[str, ...]] = ()  # keyword arguments of forward for `adapt`, not for the base layer
    input_name: ClassVar[str] = "input"  # the base layer's name for its first argument
    # False: the layer returns the dtype it gets from the base layer, another one under autocast; None: where no
    # adapter acts
    returns_input_dtype: ClassVar[bool | None] = True
    resets: ClassVar[tuple[str, ...]] = ()  # PEFT's names for `reset`, if it has one
    named_in_repr: ClassVar[bool] = True  # whether the layer's repr begins with the method's name
    argument_orders: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = argument_orders("")
    created_with: ClassVar[tuple[str, ...] | None] = None  # what `create` takes beside name and config; None: all
    never_merged: ClassVar[str] = ""  # why adapters of the method cannot be merged, if they cannot
    _merge_suspended = False  # see law.suspend

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "create" in cls.__dict__:
            settings = list(signature(cls.create).parameters.values())[3:]
            takes_all = any(setting.kind is Parameter.VAR_KEYWORD for setting in settings)
            cls.created_with = None if takes_all else tuple(setting.name for setting in settings)

    def create(self, name: str, config: Any, **settings: Any) -> None:
        """Make and initialise the parameters of a new adapter; raise before or after, what was made is dropped."""
        raise NotImplementedError(f"{type(self).__name__} does not say how an adapter is created")

    def complete(self, name: str, config: Any) -> None:
        """Make what is to keep its dtype, when the parameters have got the base layer's device and dtype."""

    def adapt(self, names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output with the adapters `names`, at least one, in this order."""
        raise NotImplementedError(f"{type(self).__name__} derives from no law")

    def _merge_changes(self, name: str) -> dict[str, law.Change]:
        raise NotImplementedError(self.never_merged)

    # --- construction ---

    def __init__(self, base_layer: nn.Module, *values: Any, **named: Any) -> None:
        named = by_name(type(self).__name__, self.argument_orders[1], values, named)
        adapter_name, config = named["adapter_name"], named["config"]
        nn.Module.__init__(self)  # of some methods, as in PEFT, the layer is an nn.Linear in name
        self.base_layer = base_layer
        self.quantization_backend = named.pop("quantization_backend", None)
        usual = dict.fromkeys(self.other_param_names, dict) | dict.fromkeys(self.adapter_layer_names, nn.ParameterDict)
        for name, container in (self.containers | usual | self.containers).items():
            setattr(self, name, container())
        self.merged_adapters = []
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True
        self.fan_in_fan_out = getattr(config, "fan_in_fan_out", False)
        self.prepare(self.get_base_layer(), config)
        self._active_adapter = adapter_name
        self.update_layer(**named)

    def prepare(self, base: nn.Module, config: Any) -> None:
        """Look at the base layer, before the first adapter is created."""
        self.in_features, self.out_features = _get_in_out_features(base)

    def update_layer(self, *values: Any, **named: Any) -> None:
        """Add the adapter `adapter_name`, or make it anew, from `config` and other values instead of what that says.

        `argument_orders` has what may be passed by position. When `create` raises, the layer has no trace of it.
        """
        named = by_name("update_layer", self.argument_orders[0], values, named)
        adapter_name, config = named.pop("adapter_name"), named.pop("config")
        config, settings = settled("update_layer", self.created_with, config, named)
        existed = adapter_name in self._all_available_adapter_names()
        try:
            self.create(adapter_name, config, **settings)
            self._move_adapter_to_device_of_base_layer(adapter_name)
            self.complete(adapter_name, config)
        except BaseException:
            for container in (getattr(self, name) for name in self.adapter_layer_names + self.other_param_names):
                if not existed and adapter_name in container:
                    with suppress(AttributeError):  # ParameterDicts note a name before they refuse it
                        del container[adapter_name]
            raise
        if self.resets:
            self.__dict__.setdefault("_made", {})[adapter_name] = config, settings
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset(self, adapter_name: str, **options: Any) -> None:
        """Give the parameters of an adapter new initial values, in place, as if it had been made with these options.
        Nothing happens where the layer has no such adapter. `resets` lists the names that PEFT has for it."""
        if not self.has_adapter(adapter_name):
            return
        config, settings = self._made[adapter_name]
        config = copy(config)
        vars(config).update(options)
        settings = {name: options.get(name, value) for name, value in settings.items()}
        kept.forget(self)
        trained, others = (
            [container for container in map(partial(getattr, self), names) if adapter_name in container]
            for names in (self.adapter_layer_names, self.other_param_names)
        )
        before = [(container, container[adapter_name]) for container in trained + others]
        new: list[Any] = []
        try:
            self.create(adapter_name, config, **settings)
            self._move_adapter_to_device_of_base_layer(adapter_name)
            self.complete(adapter_name, config)
            new = [container[adapter_name] for container in trained]
        finally:
            for container, entry in before:
                container[adapter_name] = entry
        with torch.no_grad():
            for (_, entry), made in zip(before, new, strict=False):
                for tensor, value in zip(tensors_of(entry), tensors_of(made), strict=True):
                    tensor.copy_(value)

    def refuse_groups(self) -> None:
        """NotImplementedError for a convolution with groups."""
        base = self.get_base_layer()
        if getattr(base, "groups", 1) > 1:
            raise NotImplementedError(
                f"{self.title} does not support {type(base).__name__} layers with groups > 1 "
                f"(got groups={base.groups})."
            )

    # --- forward ---

    def forward(self, x: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output with the active adapters; `adapter_names`: one adapter a row of the batch instead.

        With disabled adapters the output is the base layer's, merged or not. Other arguments go to the base layer.
        """
        x = kwargs.pop(self.input_name) if x is None else x
        rows = kwargs.pop("adapter_names", None) if kwargs else None
        own_kwargs = {key: kwargs.pop(key) for key in self.adapter_kwargs if key in kwargs} if kwargs else kwargs
        names: list[str] = []
        if self._disable_adapters:
            law.suspend(self)
            rows = None
        elif rows is None and self.merged_adapters:
            law.resume(self)
        elif rows is None:
            names = [name for name in self.active_adapters if self.has_adapter(name)]
        if self.exclusive and len(names) > 1:
            raise ValueError(
                f"Trying to run forward with {len(names)} active adapters ({', '.join(names)}), but "
                f"{law.describe(self)} does not allow inference with more than one adapter at a time"
            )
        if rows is not None:
            result = self._mixed_forward(x, rows, *args, **kwargs)
        elif names:
            result = self.adapt(names, x, *args, **kwargs, **own_kwargs)
        else:
            result = self.base_layer(x, *args, **kwargs)
        casts = self.returns_input_dtype or self.returns_input_dtype is None and names
        if casts and result.dtype is not x.dtype and x.is_floating_point():
            result = result.to(x.dtype)
        return result

    def base_output(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output for x; in C where that is faster, under autograd only where torch would take much
        longer: in fp32 an adapter that changes nothing yet leaves the layer's bits as they are."""
        ask = c_is_worth_asking(x) or not torch.compiler.is_compiling() and multiplies_slowly(x)
        if ask and not (args or kwargs) and self.convolves_slowly(x):
            return apply_weight(self.base_layer, x, self.base_layer.weight, self.base_layer.bias)
        result = _C.lowrank_terms(self, x, [], args, kwargs) if ask else NotImplemented
        return self.base_layer(x, *args, **kwargs) if result is NotImplemented else result

    def convolves_slowly(self, x: torch.Tensor) -> bool:
        """Whether the base layer is nothing but a convolution that takes x and that is better computed in fp32."""
        base = self.base_layer
        slow = type(base) in CONVOLUTIONS and base.weight.dtype == x.dtype and multiplies_slowly(x)
        return slow and self.is_bare() and _C.may_act()

    def run_with(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What the base layer computes from x with another weight and bias, in the dtype of x or autocast's."""
        bias = self._cast_input_dtype(bias, weight.dtype)
        result = apply_weight(self.get_base_layer(), self._cast_input_dtype(x, weight.dtype), weight, bias)
        keeps = result.dtype is x.dtype or torch.is_autocast_enabled(x.device.type)
        return result if keeps else result.to(x.dtype)

    def is_bare(self) -> bool:
        """`is_bare` of the base layer."""
        return is_bare(self._modules["base_layer"])

    def owns_output(self, x: torch.Tensor, in_graph: bool = False) -> bool:
        """Whether `base_output` gives for x what nobody else can hold and has its features last, so that it may be
        written to: without autograd, or `in_graph`, where it is no view that a write would make a graph of its own
        for."""
        if type(self._modules["base_layer"]) is not nn.Linear or not x.is_cpu or torch.compiler.is_compiling():
            return False
        free = in_graph and x.dim() == 2 and _C.may_act() if torch.is_grad_enabled() else True
        return free and self.is_bare()

    def _mixed_forward(self, x: torch.Tensor, rows: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(x) != len(rows):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(rows)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result = self.base_layer(x, *args, **kwargs).clone()
        for name in dict.fromkeys(rows):
            if self.has_adapter(name):  # not "__base__", nor adapters that only other layers have
                part = [i for i, row in enumerate(rows) if row == name]
                result[part] = self.adapt([name], x[part], *args, **kwargs).to(result.dtype)
        return result

    # --- weights that are kept: see kept ---

    def train(self, mode: bool = True) -> Room:
        """As nn.Module's; nothing is kept in training."""
        kept.forget(self)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Room:
        kept.forget(self)
        return super()._apply(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes the adapter; the first of those that are left becomes active if it was the only active one."""
        kept.forget(self)
        self.__dict__.get("_made", {}).pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    # --- merging: see law ---

    def bare_weight(self) -> torch.Tensor:
        """The base weight without the adapters merged into it, as the matrix (out, in...) that `weight_view` shows."""
        before = self.__dict__.get("_before_requantising")
        weight = before[0] if before is not None else law.bare_weight(self) if self.merged else None
        return weight_view(self.get_base_layer()).values(self.get_base_weight() if weight is None else weight)

    def bare_bias(self) -> torch.Tensor | None:
        """The base bias without the adapters merged into it."""
        base = getattr(self.get_base_layer(), "bias", None)
        bias = law.bare_weight(self, "bias") if self.merged and base is not None else None
        return base if bias is None else bias

    def entry(self, container: str, name: str) -> Any:
        """What a container has for an adapter: getattr(self, container)[name], without the long searches."""
        content = self._modules[container]
        for own in (content._parameters, content._modules):
            if name in own:
                return own[name]
        return content[name]

    def _merge_adapters(self) -> Iterable[str]:
        """The adapters this layer has parameters for."""
        if len(self.adapter_layer_names) == 1:
            return self._modules[self.adapter_layer_names[0]].keys()
        return set().union(*[self._modules[name].keys() for name in self.adapter_layer_names])

    def has_adapter(self, name: str) -> bool:
        """Whether `_merge_adapters` has the name."""
        for container in self.adapter_layer_names:
            if name in self._modules[container]:
                return True
        return False

    def _base_view(self) -> BaseView:
        return weight_view(self.get_base_layer())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """See `law.Merging.merge`; an `exclusive` room merges one adapter, in place of the one that is merged."""
        if self.never_merged:
            raise NotImplementedError(self.never_merged)
        kept.forget(self)
        if self.exclusive:
            adapter_names = self._one_to_merge(adapter_names)
            if not adapter_names:
                return
        if self.quantization_backend is None:
            law.merge(self, safe_merge, adapter_names)
        else:
            self._merge_requantised(safe_merge, check_adapters_to_merge(self, adapter_names))

    def _one_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """The one adapter to merge, or none, when the one that is merged has been taken out."""
        names = check_adapters_to_merge(self, adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"Trying to merge {len(names)} adapters, but {law.describe(self)} does not allow merging "
                "more than one adapter at a time"
            )
        if names and self.merged:
            warnings.warn(f"Already merged with {set(self.merged_adapters)}. Unmerging first.")
            self.unmerge()
        return names

    @torch.no_grad()
    def _merge_requantised(self, safe_merge: bool, names: list[str]) -> None:
        """Merge into the dequantised weight and quantise it. The one before is kept, to be quantised for unmerging."""
        names = [name for name in dict.fromkeys(names) if self.has_adapter(name)]
        if not names:
            return
        bias = getattr(self.get_base_layer(), "bias", None)
        before = (self.get_base_weight(), None if bias is None else bias.detach().clone())
        merged = [part.detach() for part in self.transformed(names) if part is not None]
        if safe_merge and not all(torch.isfinite(part).all() for part in merged):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        self._requantise(*merged)
        self.__dict__.setdefault("_before_requantising", before)
        self.merged_adapters.extend(names)

    def _requantise(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.set_base_weight(weight)
        if bias is not None:
            self.get_base_layer().bias.data.copy_(bias)

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """See `law.Merging.unmerge`; a quantised layer gets what quantising its old weight gives. With
        `adapter_names` only these are taken out, and nothing happens where none of them is merged."""
        if self.never_merged:
            raise NotImplementedError(self.never_merged)
        if adapter_names is not None:
            rest = [name for name in self.merged_adapters if name not in adapter_names]
            if rest == self.merged_adapters:
                return
            with law.transaction(self):
                self.unmerge()
                if rest:
                    self.merge(adapter_names=rest)
            return
        before = self.__dict__.pop("_before_requantising", None)
        if before is None:
            law.unmerge(self)
            return
        self._requantise(*before)
        self.merged_adapters.clear()

    def transformed(self, names: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight and bias that the base layer would have if `names` were merged."""
        raise NotImplementedError(f"{type(self).__name__} derives from no law")

    def __repr__(self) -> str:
        method = f"{type(self).__module__.rpartition('.')[2]}." if self.named_in_repr else ""
        return method + super().__repr__()


class Unscaled:
    """Mixin of rooms without a scale: setting one warns."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """The method has no scale: warns."""
        warnings.warn(f"Scaling operation for {self.title} not supported! Automatically set scale to 1.")

    def scale_layer(self, scale: float) -> None:
        """The method has no scale: warns for each adapter that acts."""
        for name in self.active_adapters if scale != 1 else ():
            if self.has_adapter(name):
                self.set_scale(name, scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """The method has no scale: warns for each adapter that acts."""
        for _ in filter(self.has_adapter, self.active_adapters):
            warnings.warn(f"Unscaling operation for {self.title} not supported! Keeping scale to 1.")


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
        """Whether the adapter's dropout is active."""
        module = self._modules[self.dropout][name] if self.dropout else None
        return module is not None and module.training and not isinstance(module, nn.Identity)

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
        base = self.get_base_layer()
        if (
            all(self.dense(name, x) and not self.drops(name) for name in names)
            and not (args or kwargs)
            and self.base_layer is base
            and self.is_bare()
            and self.quantization_backend is None
        ):
            build = partial(self.transformed, names)
            return self.run_with(x, *(kept.adapted(self, names, build) if "weight" in self.adds else build()))
        if self.may_act_in_c(base, x) and not any(self.drops(name) for name in names):
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

    def may_act_in_c(self, base: nn.Module, x: torch.Tensor) -> bool:
        """Whether it is worthwhile to ask C for the forward with `terms`."""
        few = 0 < rows_of(x) <= self.factored
        worthwhile = self.factored == math.inf if torch.is_grad_enabled() else few  # a graph needs small factors
        at_hand = x.is_cpu and not torch.compiler.is_compiling()
        return worthwhile and at_hand and not isinstance(base, (*CONVOLUTIONS, nn.Embedding))

    def transformed(self, names: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = self.get_base_weight(), getattr(self.get_base_layer(), "bias", None)
        for name in names:
            if "weight" in self.adds:
                weight = into(torch.add, self.added(name), weight)
            if bias is not None and "bias" in self.adds:
                bias = bias + self.bias_delta(name)
        return weight, bias

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What merging the adapter adds to the base weight, in the dtype in which PEFT gives it."""
        delta = self.whole_delta(adapter)
        if self.delta_like == "weight" and self.quantization_backend is None:
            return delta.to(self.get_base_layer().weight.dtype)
        return delta.to(self.parameter_dtype(adapter)) if self.delta_like == "parameters" else delta

    def whole_delta(self, name: str) -> torch.Tensor:
        """What merging the adapter adds to the base weight: a tensor of its shape, as exact as it is computed."""
        delta = self.delta(name)
        return delta if self.quantization_backend is not None else weight_view(self.get_base_layer()).restore(delta)

    def has_own_delta(self) -> bool:
        """Whether `get_delta_weight` is the room's, not one of a subclass or instance elsewhere."""
        return getattr(self.get_delta_weight, "__module__", "").startswith(__package__)

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


# ------------------------------------------------------------------------------------------------------------- models


class RoomModel(BaseTuner):
    """Injects the rooms of one method.

    `rooms`: base layer class, or "Conv1D" for transformers' -> Room, the first that fits.
    `unsupported`: what is raised for any other target; None: it is left as it is.
    """

    rooms: ClassVar[dict[type | str, type[Room]]]
    unsupported: ClassVar[type[Exception] | None] = TypeError
    title: ClassVar[str] = ""  # the method's name in messages
    corrects_config: ClassVar[bool] = True  # whether files say, too, that `fan_in_fan_out` was wrong
    by_pattern: ClassVar[dict[str, str]] = {}  # option that depends on a target's name -> the one that says how
    equal: ClassVar[dict[str, str]] = {}  # option that all adapters have to agree in -> what is said if they do not
    unequal: ClassVar[type[Exception]] = ValueError  # what is raised then

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        for name, message in self.equal.items():
            values = {getattr(known, name) for known in self.peft_config.values()}
            if len(values) > 1:
                message = message.format(title=self.title)
                raise self.unequal(f"{message}, but got multiple different values: {sorted(values)}")

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Context of one forward (or generate) call with an adapter for each sample, `adapter_names`."""
        if kwargs.get("adapter_names") is None:
            return nullcontext()
        from .lora.batch_hooks import per_call_arguments

        beams = kwargs.get("num_beams")
        return per_call_arguments(self, adapter_names=kwargs["adapter_names"], alora_offsets=None, num_beams=beams)

    def settings(self, config: Any, key: str, base: nn.Module) -> dict[str, Any]:
        """What `Room.create` is given for the target called `key` beside the config: `by_pattern`."""
        return {
            name: pattern_value(getattr(config, pattern), key, getattr(config, name))
            for name, pattern in self.by_pattern.items()
        }

    def settings_of(self, name: str, config: Any, key: str, base: nn.Module) -> dict[str, Any]:
        """`settings`, for methods in which they depend on the adapter's name."""
        return self.settings(config, key, base)

    def finish(self, name: str) -> None:
        """Called when all layers of the adapter `name` have been created."""

    @classmethod
    def saving(cls, model: nn.Module, config: Any, name: str, state: State, own: State) -> State:
        """What files have of an adapter: usually `own`, the layers' entries of the model's state dict."""
        return own

    @classmethod
    def loading(cls, model: nn.Module, config: Any, name: str, saved: State) -> State:
        """What is loaded: usually `saved`, the entries of a file, in which those of layers have the model's keys."""
        return saved

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: State, unwanted_adapter_names: list[str]
    ) -> State:
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return cls.saving(model, config, adapter_name, state_dict, own)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: State
    ) -> State:
        saved = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return cls.loading(model, config, adapter_name, saved)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds the adapter to the model, see `BaseTuner.inject_adapter`."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.finish(adapter_name)

    def _create_and_replace(
        self,
        config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if self.unsupported is None and self.room_for(base) is None:
            return
        settings = self.settings_of(adapter_name, config, current_key, base)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name=adapter_name, config=config, **settings)
            return
        layer = self._create_new_module(config, adapter_name, target, **settings)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def backend_of(self, base: nn.Module) -> QuantizationBackend | None:
        """How to get at the weight of a quantised base layer; None for others."""
        if type(base).__module__.startswith("torch.nn.") and type(getattr(base, "weight", None)) is nn.Parameter:
            return None
        return resolve_quantization_backend(base, **get_quantization_kwargs(self.model))

    def room_for(self, base: nn.Module) -> type[Room] | None:
        """The room for a base layer, None if the method has none."""
        for kind, room in self.rooms.items():
            if is_transformers_conv1d(base) if kind == "Conv1D" else isinstance(base, kind):
                return room
        backend = self.backend_of(base)
        return None if backend is None else self.rooms.get(QUANTISED[backend.layer_type])

    def _create_new_module(self, config: Any, adapter_name: str, target: nn.Module, **settings: Any) -> Room:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        room = self.room_for(base)
        if room is None:
            known = ", ".join(
                f"`{'transformers.pytorch_utils.Conv1D' if kind == 'Conv1D' else f'torch.nn.{kind.__name__}'}`"
                for kind in self.rooms
            )
            raise self.unsupported(
                f"Target module {target} is not supported. "
                f"Currently, only the following modules are supported: {known}."
            )
        has_choice = hasattr(config, "fan_in_fan_out") and not isinstance(base, (*CONVOLUTIONS, nn.Embedding))
        if has_choice and config.fan_in_fan_out != is_transformers_conv1d(base):
            warnings.warn(
                f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is "
                f"`{'torch.nn.Linear' if config.fan_in_fan_out else 'Conv1D'}`. "
                f"Setting fan_in_fan_out to {not config.fan_in_fan_out}."
            )
            config = config if self.corrects_config else copy(config)
            config.fan_in_fan_out = not config.fan_in_fan_out
        backend = self.backend_of(base)
        return room(target, adapter_name=adapter_name, config=config, quantization_backend=backend, **settings)


def register(
    name: str,
    config: type[PeftConfig],
    model: type[BaseTuner],
    mixed: bool = False,
    parts: tuple[str, ...] = (),
) -> None:
    """Register a room's method, under a lower-case name; one that `PeftType` does not have is added to it.

    What the classes do not say themselves follows: the model's `prefix` from the name, its `tuner_layer_cls` from its
    rooms, its `target_module_mapping` from `utils.constants`; the config's docstring from the help of its options.
    PEFT's paths (`<method>.config`, `.layer`, `.model`, those named by `parts`) lead to a room in this package.
    """
    table = f"TRANSFORMERS_MODELS_TO_{name.replace('_', '').upper()}_TARGET_MODULES_MAPPING"
    defaults = {"prefix": f"{name}_", "target_module_mapping": getattr(constants, table, {})}
    module = sys.modules[config.__module__]
    if module.__package__ == __package__:
        setattr(module, table, defaults["target_module_mapping"])
        for part in ("config", "layer", "model", *parts):
            sys.modules.setdefault(f"{module.__name__}.{part}", module)
            if not hasattr(module, part):
                setattr(module, part, module)
        module.__path__ = []
        module.__getattr__ = elsewhere(module.__name__, own=vars(module).get("__getattr__"))
    add_peft_type(name.upper())
    config.method, config.__doc__ = name, documented(config)
    if issubclass(model, RoomModel):
        first, *others = dict.fromkeys(model.rooms.values())
        common = next(c for c in first.__mro__ if all(issubclass(room, c) for room in others))
        defaults["tuner_layer_cls"] = common
        common.argument_orders, common.delta_like = argument_orders(name), DELTA_LIKE.get(name, "")
        if name in RESETS:
            common.resets = tuple(RESETS[name])
            for reset, options in RESETS[name].items():
                setattr(common, reset, reset_method(reset, options))
    for attribute in defaults.keys() - vars(model).keys():
        setattr(model, attribute, defaults[attribute])
    register_peft_method(name=name, config_cls=config, model_cls=model, prefix=model.prefix, is_mixed_compatible=mixed)
