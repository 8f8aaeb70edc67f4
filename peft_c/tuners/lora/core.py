"""What all LoRA layers share: `LoraLayer` (adapters, scales, mixed batches; also the base of the quantised layers),
`_LoraModule` (forward, merge, delta), and `LoraVariant`.

A layer type declares the rest: how its weight reads as a matrix (`_base_view`), what its factors are (`_make_factors`,
`_low_rank`) and what an adapter adds (`_lora_term`). LoRA: https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.compiler import is_compiling

from ... import _C
from ...utils.integrations import dequantize_module_weight
from ...utils.warning import PeftWarning
from .. import law
from ..base_view import BaseView, held
from ..tuner_layer import INNERMOST, add_modules, is_bare
from ..tuners_utils import BaseTunerLayer, _get_in_out_features
from . import init as _init

if TYPE_CHECKING:
    from .config import LoraConfig

VARIANT_KWARG_KEYS = ["alora_offsets"]


class LoraVariant:
    """What one LoRA variant (DoRA, aLoRA, ...) does differently, as static methods: derive, and list the class in the
    `lora_variants` of the layer types it works for. `result` is the output of the base layer so far."""

    def supports_lora_conversion(self) -> bool:
        """Can `convert_to_lora` turn an adapter of this variant into a plain one?"""
        return True

    @staticmethod
    def init(module: LoraLayer, adapter_name: str) -> None:
        """Called by `update_layer` (with `config` and more as keywords) once the adapter's factors exist."""
        raise NotImplementedError

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The merged weight as a new tensor."""
        raise NotImplementedError

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Merges into `orig_weight` in place."""

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight without the adapter."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """`result` with the adapter's contribution for input `x`; `kwargs` has every key of VARIANT_KWARG_KEYS."""
        raise NotImplementedError


@functools.lru_cache(maxsize=64)
def _variant_options(
    config_cls: type[LoraConfig], supported: tuple[tuple[str, ...], ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What asks for a variant in a config: values of `init_lora_weights`, and fields.

    ValueError if `supported`, a layer type's keys of `lora_variants`, are not sorted or name others.
    """
    if any(tuple(sorted(key)) != key for key in supported):
        raise ValueError("Keys in lora_variants must be sorted tuples (e.g ('a', 'b'), not ('b', 'a')).")
    fields = {field.name: field.metadata for field in dataclasses.fields(config_cls)}
    initial = tuple(fields["init_lora_weights"]["lora_variants"])
    asking = tuple(name for name, metadata in fields.items() if metadata.get("is_lora_variant"))
    unknown = {name for key in supported for name in key} - {*initial, *asking}
    if unknown:
        raise ValueError(
            f"variant(s) {sorted(unknown)} found in lora_variants but neither tagged with 'is_lora_variant' in "
            "LoraConfig, nor declared as a LoRA variant in init_lora_weights."
        )
    return initial, asking


class LoraLayer(BaseTunerLayer):
    """A base layer and its LoRA adapters: per adapter the factors A and B, their rank, alpha, scale and dropout.

    Every attribute is a dict (or ModuleDict) from adapter name to value, read anew at each call. `update_layer` builds
    `nn.Linear` factors; types with other factors override `_make_factors`.
    """

    adapter_layer_names: tuple[str, ...] = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    other_param_names: tuple[str, ...] = (
        "r",
        "lora_alpha",
        "scaling",
        "lora_dropout",
        "use_dora",
        "use_rslora",
        "lora_bias",
    )

    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_dora: dict[str, bool]
    use_rslora: dict[str, bool]
    lora_bias: dict[str, bool]
    lora_variant: dict[str, LoraVariant]
    _caches: dict[str, Any]  # what a variant keeps between merge and unmerge

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        self.__dict__.update(  # no modules or weights, which torch would look for in each
            r={},
            lora_alpha={},
            scaling={},
            _disable_adapters=False,
            merged_adapters=[],
            use_dora={},
            use_rslora={},
            lora_bias={},
            _caches={},
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            cast_input_dtype_enabled=True,
            lora_variant={},
            kwargs=kwargs,
        )
        add_modules(
            self,
            base_layer=base_layer,
            lora_dropout=nn.ModuleDict(),
            lora_A=nn.ModuleDict(),
            lora_B=nn.ModuleDict(),
            lora_embedding_A=nn.ParameterDict(),
            lora_embedding_B=nn.ParameterDict(),
            lora_magnitude_vector=nn.ModuleDict(),
        )
        sizes = self._get_in_out_features(self.get_base_layer())
        self.__dict__["in_features"], self.__dict__["out_features"] = sizes

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int] | tuple[None, None]:
        return _get_in_out_features(module)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter with everything kept for it; see `BaseTunerLayer.delete_adapter`."""
        super().delete_adapter(adapter_name)
        self.lora_variant.pop(adapter_name, None)

    # ------------------------------------------------------------------------------------------------- variants

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        """The variants this layer type supports: sorted tuple of the config fields (or values of `init_lora_weights`)
        that ask for it -> class. () is plain LoRA."""
        return {(): None}

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """An instance of the variant that `config` asks for, None for plain LoRA.

        ValueError if this layer type has no such (combination of) variants, or lists one the config does not know.
        """
        supported = self.lora_variants
        initial, asking = _variant_options(type(config), tuple(supported))
        wanted = [name for name in asking if getattr(config, name)]
        if config.init_lora_weights in initial:
            wanted.append(config.init_lora_weights)
        wanted = tuple(sorted(wanted))
        if wanted not in supported:
            raise ValueError(f"Invalid or unsupported variant combination: {wanted}")
        variant = supported[wanted]
        return None if variant is None else variant()

    # ------------------------------------------------------------------------------------------- adding adapters

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add the adapter (or make it anew) with rank `r` and the options of `config`; ValueError if r <= 0.

        Keywords: `target_name`, for variants; `tied_adapter`, {"lora_A": ..., "lora_B": ...} tensors to share instead
        of own factors.
        """
        kwargs.setdefault("target_name", "")
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        self._check_config(r, config)
        if config.lora_bias and getattr(self.get_base_layer(), "bias", None) is None:
            warnings.warn(
                "`lora_bias=True` was passed but the targeted layer of type "
                f"{type(self.get_base_layer()).__name__} has no bias. This means that merging LoRA weights won't be "
                "possible.",
                PeftWarning,
            )
        variant = self.resolve_lora_variant(config=config)
        is_new = adapter_name not in self.r
        try:
            self._add_adapter(adapter_name, r, lora_alpha, config, variant, kwargs)
        except BaseException:
            if is_new:
                self._forget(adapter_name)
            raise
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

        routers = getattr(self, "lora_arrow", {})
        for name in self.lora_variant:
            if name in routers:  # an Arrow router looks at the experts again when one has been added
                routers[name].on_adapter_change(self.lora_A, self.lora_B)

    def _add_adapter(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, variant: LoraVariant | None, kwargs: dict
    ) -> None:
        if variant is not None:
            self.lora_variant[adapter_name] = variant
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self._make_factors(adapter_name, r, config)
        tied = kwargs.get("tied_adapter")
        if tied:
            self.lora_A[adapter_name].weight = nn.Parameter(tied["lora_A"])
            self.lora_B[adapter_name].weight = nn.Parameter(tied["lora_B"])
        self.lora_bias[adapter_name] = config.lora_bias
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = config.use_dora
        self.scaling[adapter_name] = self._initial_scaling(adapter_name)

        _init.initialize(self, adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)  # variants build on the moved factors
        if variant is not None:
            variant.init(self, adapter_name=adapter_name, config=config, **kwargs)

    def _forget(self, adapter_name: str) -> None:
        """Drop what `_add_adapter` has made before it failed."""
        for name in (*self.adapter_layer_names, *self.other_param_names, "lora_variant"):
            items = getattr(self, name)
            if adapter_name in items:
                del items[adapter_name]

    def _check_config(self, r: int, config: LoraConfig) -> None:
        """ValueError for options this layer type does not support; nothing has changed yet."""

    def _make_factors(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        """Create the parameters of A and B."""
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=config.lora_bias)

    # the initialisation schemes, by PEFT's names: see init.py
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        _init.reset_lora_parameters(self, adapter_name, init_lora_weights)

    def olora_init(self, adapter_name: str) -> None:
        _init.olora_init(self, adapter_name)

    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        _init.pissa_init(self, adapter_name, init_lora_weights)

    def mica_init(self, adapter_name: str) -> None:
        _init.mica_init(self, adapter_name)

    def corda_init(self, adapter_name: str, init_lora_weights: str) -> None:
        _init.corda_init(self, adapter_name, init_lora_weights)

    def loftq_init(self, adapter_name: str, config: LoraConfig) -> None:
        _init.loftq_init(self, adapter_name, config)

    def orthogonal_init(self, adapter_name: str) -> None:
        _init.orthogonal_init(self, adapter_name)

    def lora_ga_init(self, adapter_name: str, lora_ga_config: Any) -> None:
        _init.lora_ga_init(self, adapter_name, lora_ga_config)

    # ---------------------------------------------------------------------------------------------------- scales

    def _initial_scaling(self, adapter_name: str) -> float:
        r = self.r[adapter_name]
        return self.lora_alpha[adapter_name] / (math.sqrt(r) if self.use_rslora.get(adapter_name, False) else r)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's scale to `scale` times the one given by its alpha and rank; unknown names are ignored."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._initial_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters by `scale`."""
        for adapter in self._own_active_adapters() if scale != 1 else ():
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | int | None = None) -> None:
        """Divide the scales of the active adapters by `scale`; None: back to those given by alpha and rank."""
        for adapter in self._own_active_adapters():
            if scale is None:
                self.scaling[adapter] = self._initial_scaling(adapter)
            else:
                self.scaling[adapter] = self.scaling[adapter] / scale

    def _merge_adapters(self) -> Any:
        """The adapters this layer has factors for (a container of names)."""
        return self._modules["lora_A"]._modules

    def _own_active_adapters(self) -> list[str]:
        own = self._merge_adapters()
        return [name for name in self.active_adapters if name in own]

    # ------------------------------------------------------------------------------------------- the bare weight

    @contextmanager
    def _unmerged_base_weight(self, safe_merge: bool = False) -> Iterator[torch.Tensor]:
        """A copy of the base weight as it is without the merged adapters, for variants whose delta depends on it.

        Layers that merge through `law` take the adapters out of the copy. Others (the quantised ones) unmerge and, on
        leaving, merge again; the copy is then shared with the calls that this merging makes.
        """
        weight = law.bare_weight(self)
        if weight is not None:
            yield weight
            return
        key = "unmerged_base_weight"
        if key in self._caches:
            yield self._caches[key]
            return
        merged = list(self.merged_adapters)
        try:
            if merged:
                self.unmerge()
            self._caches[key] = dequantize_module_weight(self.get_base_layer()).detach().clone()
            yield self._caches[key]
        finally:
            try:
                missing = [name for name in merged if name not in self.merged_adapters]
                if missing:
                    self.merge(safe_merge=safe_merge, adapter_names=missing)
            finally:
                self._caches.pop(key, None)

    def _cache_store(self, key: str, value: Any) -> None:
        self._caches[key] = value

    def _cache_pop(self, key: str) -> Any:
        return self._caches.pop(key)

    # ------------------------------------------------------------------------------------------------ mixed batch

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """ValueError for `adapter_names` that do not fit the batch or the state of the layer."""
        names = kwargs.get("adapter_names")
        if names is None:
            return
        if len(x) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if any(self.use_dora.get(name, False) for name in set(names)):
            raise ValueError("Cannot pass `adapter_names` when DoRA is enabled.")

    def _input_dtype(self, adapter: str) -> torch.dtype | None:
        """The dtype an adapter wants its input in; None: as it is."""
        return self.lora_A[adapter].weight.dtype

    def _lora_term(self, adapter: str, x: torch.Tensor, mixed: bool = False) -> torch.Tensor:
        """What a plain adapter adds to the output for input `x`, which has the adapter's dtype."""
        hidden = self.lora_A[adapter](self.lora_dropout[adapter](x))
        return self.lora_B[adapter](hidden) * self.scaling[adapter]

    def _add_term(self, adapter: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """The base layer's output plus `_lora_term`."""
        return result + self._lora_term(adapter, x)

    def _row_factors(self, x: torch.Tensor, names: list[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(rows, m, r) and (rows, r, n), whose product, scaled, is what the adapters add to the output for the rows of
        x; None where that is not so."""
        return None

    def _add_by_rows(self, x: torch.Tensor, result: torch.Tensor, names: list[str]) -> torch.Tensor | None:
        """The output with an adapter for each row as one product; None where that is not to be had."""
        own = self._merge_adapters()
        if not (2 * len(set(names)) >= len(names) > 2 and all(name in own for name in names)):  # few rows for each
            return None
        alike = {(self.r[name], self.scaling[name], name in self.lora_variant) for name in names}
        if len(alike) > 1 or next(iter(alike))[2]:
            return None
        factors = self._row_factors(x, names)
        if factors is None or factors[0].dtype != factors[1].dtype:
            return None
        if result.dim() == 3 and result.dtype == factors[0].dtype:
            add = result.baddbmm_ if adds_in_place(self.base_layer) else result.baddbmm
            return add(*factors, alpha=self.scaling[names[0]])
        terms = torch.bmm(*factors).view(result.shape)
        return torch.add(result, terms, alpha=self.scaling[names[0]]).to(result.dtype)

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """The forward of a batch whose row i uses adapter `adapter_names[i]`; "__base__": none."""
        variant_kwargs = {key: kwargs.pop(key, None) for key in VARIANT_KWARG_KEYS}
        in_c = getattr(self, "_lowrank_names", None) and not is_compiling()
        if in_c and not args and not kwargs:
            result = _C.lowrank_mixed(self, x, None, list(adapter_names))
            if result is not None:
                return result
        result = self.base_layer(x, *args, **kwargs)
        offsets = variant_kwargs.get("alora_offsets")
        own = self._merge_adapters()
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            if name in own:  # "__base__", and adapters that other layers have
                rows_of.setdefault(name, []).append(row)
        together = self._add_by_rows(x, result, adapter_names) if rows_of else None
        if together is not None:
            return together
        if rows_of and not owns_output(self.base_layer):
            result = result.clone()
        if in_c and _C.lowrank_mixed(self, x, result, list(adapter_names)) is not None:
            return result
        for name, rows in rows_of.items():
            part, add = _rows(x, result, rows)
            if (dtype := self._input_dtype(name)) is not None:
                part = part.to(dtype)
            if name not in self.lora_variant:
                add(self._lora_term(name, part, mixed=True).to(result.dtype))
                continue
            if offsets is not None:
                variant_kwargs["alora_offsets"] = [offsets[row] for row in rows]
            result[rows] = (
                self.lora_variant[name]
                .forward(self, active_adapter=name, x=part, result=result[rows], **variant_kwargs, **kwargs)
                .to(result.dtype)
            )
        return result


def owns_output(base_layer: nn.Module) -> bool:
    """Whether nobody else can hold what the layer returns, and autograd takes it being written to."""
    plain = type(base_layer) in INNERMOST or type(base_layer).forward is nn.Linear.forward
    return plain and is_bare(base_layer)


def adds_in_place(base_layer: nn.Module) -> bool:
    """Whether here and now a product may be added to the layer's output in place, whatever its factors are."""
    free = not (torch.is_grad_enabled() or is_compiling()) and _C.may_act()
    return free and owns_output(base_layer)


def _rows(
    x: torch.Tensor, result: torch.Tensor, rows: list[int]
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """These ascending rows of x, and what adds a term to them in `result`; autograd copies nothing for it."""
    if rows[-1] - rows[0] == len(rows) - 1 and not torch.is_grad_enabled():
        run = slice(rows[0], rows[-1] + 1)
        return x[run], result[run].add_
    index = torch.tensor(rows, device=x.device)
    return x.index_select(0, index), lambda term: result.index_add_(0, index.to(result.device), term)


_READ_BY_C = ("active_adapter", "active_adapters", "disable_adapters", "merged", "_cast_input_dtype")


class _LoraModule(law.Merging, nn.Module, LoraLayer):
    """The layers below: forward, merge and delta of any layer type that declares `_base_view` and `_low_rank`."""

    _lowrank_names: tuple[str, ...] | None = None  # set: `_C.lowrank_forward` may compute this type's forward
    _merge_suspended = False  # see law.suspend
    _merge_factor = 1  # how often merging adds the delta

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """C looks behind the names of _READ_BY_C, so it leaves types alone that have versions of their own."""
        super().__init_subclass__(**kwargs)
        if any(getattr(cls, name) is not getattr(LoraLayer, name) for name in _READ_BY_C):
            cls._lowrank_names = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output plus what the active adapters add.

        `adapter_names`: one adapter a row of the batch instead; `alora_offsets`: for aLoRA. Other arguments go to the
        base layer. With disabled adapters the output is the base layer's, merged or not.
        """
        # unsloth makes this function anew from its source, with the names of each module that has a class `...Linear`
        if self._lowrank_names and not is_compiling() and not self._merge_suspended:
            result = _C.lowrank_forward(self, x, args, kwargs)
            if result is not NotImplemented:
                return result
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        variant_kwargs = {key: kwargs.pop(key, None) for key in VARIANT_KWARG_KEYS}
        if self.disable_adapters:
            law.suspend(self)
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **variant_kwargs, **kwargs)
        if self.merged:
            law.resume(self)
            return self.base_layer(x, *args, **kwargs)
        return self._active_forward(x, *args, variant_kwargs=variant_kwargs, **kwargs)

    def _active_forward(self, x: torch.Tensor, *args: Any, variant_kwargs: dict, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter in self._own_active_adapters():
            wanted = self._input_dtype(adapter)
            if wanted is not None:
                x = self._cast_input_dtype(x, wanted)
            variant = self.lora_variant.get(adapter)
            if variant is None:
                result = self._add_term(adapter, x, result)
            else:
                result = variant.forward(self, active_adapter=adapter, x=x, result=result, **variant_kwargs, **kwargs)
        return result.to(dtype)

    # ----------------------------------------------------------------------------------------- merging (law.py)

    def _base_view(self) -> BaseView:
        """How the base weight reads as the matrix that B @ A is added to."""
        return BaseView(self.get_base_layer(), transposed=getattr(self, "fan_in_fan_out", False))

    def _low_rank(self, adapter: str) -> law.LowRank:
        """A (r, k), B (n, r) and the scale of an adapter, for that matrix."""
        A, B = (held(self._modules[name][adapter], "weight") for name in ("lora_A", "lora_B"))
        return law.LowRank(A, B, self.scaling[adapter])

    def _merge_changes(self, adapter: str) -> dict[str, law.Change]:
        own_delta = getattr(self.get_delta_weight, "__func__", None) is not _LoraModule.get_delta_weight
        factors = None if own_delta else self._low_rank(adapter)
        if factors is not None and self._merge_factor != 1:
            factors = factors._replace(scale=factors.scale * self._merge_factor)
        changes: dict[str, law.Change] = {
            "weight": factors or (lambda: self.get_delta_weight(adapter) * self._merge_factor)
        }
        if self.lora_bias[adapter]:
            if getattr(self.get_base_layer(), "bias", None) is None:
                raise RuntimeError(
                    "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias "
                    f"(adapter '{adapter}', {type(self.get_base_layer()).__name__})."
                )
            changes["bias"] = lambda: self.lora_B[adapter].bias * self.scaling[adapter]
        return changes

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What merging `adapter` adds to the base weight: a tensor of its shape, in the adapter's dtype."""
        return self._base_view().restore(self._low_rank(adapter).delta())

    def __repr__(self) -> str:
        return "lora." + super().__repr__()
