"""What every room is: one base layer with the adapters of one method, and the small functions rooms use."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from contextlib import suppress
from copy import copy
from functools import partial
from inspect import Parameter, signature
from typing import Any, ClassVar

import torch
from torch import nn

from .. import _C
from . import kept, law
from .base_view import BaseView
from .changes import multiplies_slowly
from .layer_calls import argument_orders, by_name, settled
from .products import CONVOLUTIONS, apply_weight, c_is_worth_asking
from .tuner_layer import BaseTunerLayer, _get_in_out_features, is_bare, is_transformers_conv1d, tensors_of
from .tuners_utils import check_adapters_to_merge


def dropout(p: float, kind: type[nn.Module] = nn.Dropout) -> nn.Module:
    """Dropout with probability p; nothing if that is 0."""
    return kind(p) if p > 0 else nn.Identity()


def is_idle(dropout: nn.Module) -> bool:
    """Whether a call of an adapter's dropout gives back what it gets and does nothing else: it has no hooks."""
    return is_bare(dropout) and (not dropout.training or isinstance(dropout, nn.Identity))


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
    takes_any_dtype: ClassVar[bool] = False  # whether adapters act on an input of another dtype than the base weight's
    resets: ClassVar[tuple[str, ...]] = ()  # PEFT's names for `reset`, if it has one
    named_in_repr: ClassVar[bool] = True  # whether the layer's repr begins with the method's name
    argument_orders: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = argument_orders("")
    created_with: ClassVar[tuple[str, ...] | None] = None  # what `create` takes beside name and config; None: all
    ephemeral_gpu_offload = False  # an option of LoRA, which programs ask LoRA-like layers for
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
        self.is_target_conv_1d_layer, self.kwargs = is_transformers_conv1d(self.get_base_layer()), {}
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
        x = kwargs.pop(self.input_name, None) if x is None else x
        if x is None:
            raise TypeError(f"{law.describe(self)} got no input, or None")
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
            result = self.adapt(names, self.fitting(x) if self.takes_any_dtype else x, *args, **kwargs, **own_kwargs)
        else:
            result = self.base_layer(x, *args, **kwargs)
        casts = self.returns_input_dtype or self.returns_input_dtype is None and names
        if casts and result.dtype is not x.dtype and x.is_floating_point():
            result = result.to(x.dtype)
        return result

    def fitting(self, x: torch.Tensor) -> torch.Tensor:
        """x in the dtype of the base weight, unless this is quantised."""
        weight = getattr(self.get_base_layer(), "weight", x)
        return x if weight.dtype is x.dtype or not weight.is_floating_point() else x.to(weight.dtype)

    def base_output(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output for x; in C where that is faster, under autograd only where torch would take much
        longer: in fp32 an adapter that changes nothing yet leaves the layer's bits as they are."""
        ask = c_is_worth_asking(x) or multiplies_slowly(x) and not torch.compiler.is_compiling()
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
