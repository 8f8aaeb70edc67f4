"""LoRA for Linear, Conv1D, Embedding, Conv1d/2d/3d, MultiheadAttention and single parameters (experts included).

Everything the layer types share stands once, in `LoraLayer` (adapters, scales, mixed batches; also the base of the
quantised layers) and `_LoraModule` (forward, merge, delta). A layer type declares the rest: how its weight reads as a
matrix (`_base_view`), what its factors are (`_make_factors`, `_low_rank`) and what an adapter adds (`_lora_term`).
LoRA: https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_compiling

from ... import _C
from ...reexports import elsewhere
from ...utils.constants import ALLOWED_COMPUTE_DTYPES, UPCAST_DTYPES
from ...utils.integrations import dequantize_module_weight
from ...utils.warning import PeftWarning
from .. import law
from .._buffer_dict import BufferDict
from ..base_view import BaseView
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
        self.base_layer = base_layer
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
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.in_features, self.out_features = self._get_in_out_features(self.get_base_layer())

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
        return self.lora_A

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
        if rows_of and (type(self.base_layer).forward is not nn.Linear.forward or self.base_layer._forward_hooks):
            result = result.clone()  # somebody else may hold what this layer returned
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


def _rows(
    x: torch.Tensor, result: torch.Tensor, rows: list[int]
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """These ascending rows of x, and what adds a term to them in `result`; autograd copies nothing for it."""
    if rows[-1] - rows[0] == len(rows) - 1 and not torch.is_grad_enabled():
        run = slice(rows[0], rows[-1] + 1)
        return x[run], result[run].add_
    index = torch.tensor(rows, device=x.device)
    return x.index_select(0, index), lambda term: result.index_add_(0, index.to(result.device), term)


class _LoraModule(law.Merging, nn.Module, LoraLayer):
    """The layers below: forward, merge and delta of any layer type that declares `_base_view` and `_low_rank`."""

    _lowrank_names: tuple[str, ...] | None = None  # set: `_C.lowrank_forward` may compute this type's forward
    _merge_suspended = False  # see law.suspend
    _merge_factor = 1  # how often merging adds the delta

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output plus what the active adapters add.

        `adapter_names`: one adapter a row of the batch instead; `alora_offsets`: for aLoRA. Other arguments go to the
        base layer. With disabled adapters the output is the base layer's, merged or not.
        """
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
                result = result + self._lora_term(adapter, x)
            else:
                result = variant.forward(self, active_adapter=adapter, x=x, result=result, **variant_kwargs, **kwargs)
        return result.to(dtype)

    # ----------------------------------------------------------------------------------------- merging (law.py)

    def _base_view(self) -> BaseView:
        """How the base weight reads as the matrix that B @ A is added to."""
        return BaseView(self.get_base_layer(), transposed=getattr(self, "fan_in_fan_out", False))

    def _low_rank(self, adapter: str) -> law.LowRank:
        """A (r, k), B (n, r) and the scale of an adapter, for that matrix."""
        return law.LowRank(self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter])

    def _merge_changes(self, adapter: str) -> dict[str, law.Change]:
        own_delta = getattr(type(self), "get_delta_weight", None) is not _LoraModule.get_delta_weight
        factors = None if own_delta else self._low_rank(adapter)
        changes: dict[str, law.Change] = {
            "weight": (lambda: self.get_delta_weight(adapter) * self._merge_factor)
            if factors is None
            else factors._replace(scale=factors.scale * self._merge_factor)
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


class Linear(_LoraModule):
    """LoRA for `nn.Linear` and, with `fan_in_fan_out`, transformers' Conv1D:
    y = base(x) + scaling * B(A(dropout(x))), by the C kernels where they may act."""

    _lowrank_names = ("lora_A", "lora_B", "scaling", "lora_dropout", "lora_variant")  # opts in: see peft_c.fast

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = config.fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        self.is_target_conv_1d_layer = is_target_conv_1d_layer

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        from . import variants

        return {
            (): None,
            ("use_dora",): variants.DoraLinearVariant,
            ("arrow_config",): variants.ArrowLinearVariant,
            ("use_bdlora",): variants.BdLoraLinearVariant,
            ("alora_invocation_tokens",): variants.ALoraLinearVariant,
            ("velora_config",): variants.VeloraLinearVariant,
            ("monteclora_config",): variants.MontecloraLinearVariant,
            ("mica",): variants.MiCALinearVariant,
            ("kasa_config",): variants.KasaLinearVariant,
        }

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        variant = self.lora_variant.get(adapter_name)
        return variant is None or variant.supports_lora_conversion()


class LoraEmbeddingATPHolder(nn.Embedding):
    """The A factor (r, vocabulary) of an embedding as the weight (vocabulary, r) of an `nn.Embedding` without options:
    transformers' tensor parallel styles take modules, not parameters."""

    def __init__(self, lora_embedding_A_weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        table = lora_embedding_A_weight.T.contiguous()
        self.num_embeddings, self.embedding_dim = table.shape
        self.padding_idx = self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._parameters["weight"] = nn.Parameter(table, requires_grad=lora_embedding_A_weight.requires_grad)


class Embedding(_LoraModule):
    """LoRA for `nn.Embedding`: A (r, vocabulary) is looked up as the base table is, B (dim, r) projects; both are
    parameters in `lora_embedding_A` and `lora_embedding_B`."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        init_lora_weights: bool | str = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = config.fan_in_fan_out
        self.device_mesh = getattr(base_layer, "_hf_device_mesh", None)
        self.tp_layer = self._tensor_parallel_style(getattr(base_layer, "_hf_tp_plan", None))
        self.other_param_names += ("input_fns", "output_fns")
        self.input_fns: dict[str, Callable] = {}
        self.output_fns: dict[str, Callable] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    @staticmethod
    def _tensor_parallel_style(plan: str | None) -> Any:
        if plan is None:
            return None
        from peft_c.import_utils import is_transformers_ge_v5_4_0

        if not is_transformers_ge_v5_4_0:
            raise RuntimeError("Tensor Parallel with LoRA is only supported for transformers v5.4.0 and above. ")
        if plan != "embedding_rowwise":
            raise ValueError(
                f'Unsupported tensor parallel plan {plan} for embedding layers. Only "embedding_rowwise" is supported.'
            )
        from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

        return copy.deepcopy(ALL_PARALLEL_STYLES[plan])

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        from . import variants

        return {
            (): None,
            ("use_dora",): variants.DoraEmbeddingVariant,
            ("mica",): variants.MiCAEmbeddingVariant,
        }

    def _check_config(self, r: int, config: LoraConfig) -> None:
        if config.lora_bias:
            raise ValueError(f"lora_bias={config.lora_bias} is not supported for {type(self).__name__}.")

    def _make_factors(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        self.lora_embedding_A[adapter_name] = nn.Parameter(torch.randn((r, self.in_features)))
        self.lora_embedding_B[adapter_name] = nn.Parameter(torch.randn((self.out_features, r)))

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """See `LoraLayer.update_layer`; under tensor parallelism A is sharded as the base table is."""
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        if self.tp_layer is None:
            return
        from peft_c.import_utils import is_transformers_dtensor_tp

        style, mesh = self.tp_layer, self.device_mesh
        holder = LoraEmbeddingATPHolder(self.lora_embedding_A[adapter_name])
        if is_transformers_dtensor_tp:
            style.shard_param(holder, "weight", mesh)
            shard = nn.Parameter(holder.weight.T, requires_grad=holder.weight.requires_grad)
            self.lora_embedding_A[adapter_name] = shard
            self.input_fns[adapter_name] = lambda xs: style.transform_inputs_pre_forward(holder, xs, {}, mesh)[0][0]
            self.output_fns[adapter_name] = lambda y: style.transform_output_post_forward(holder, y, mesh)
        else:
            self.input_fns[adapter_name] = lambda xs: style._prepare_input_fn(holder, xs, mesh)
            self.output_fns[adapter_name] = lambda y: style._prepare_output_fn(holder, y, mesh)

    def _merge_adapters(self) -> Any:
        return self.lora_embedding_A

    def _base_view(self) -> BaseView:
        return BaseView(self.get_base_layer(), transposed=True)

    def _low_rank(self, adapter: str) -> law.LowRank:
        return law.LowRank(self.lora_embedding_A[adapter], self.lora_embedding_B[adapter], self.scaling[adapter])

    def _embed(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        input_fn: Callable[[tuple[torch.Tensor]], torch.Tensor] | None = None,
        output_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Look `input` up in `weight` (vocabulary, r) with the options of the base layer."""
        base = self.get_base_layer()
        output = F.embedding(
            input if input_fn is None else input_fn((input,)),
            weight,
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )
        return output if output_fn is None else output_fn(output)

    def _input_dtype(self, adapter: str) -> torch.dtype | None:
        return None  # token ids

    def _lora_term(self, adapter: str, x: torch.Tensor, mixed: bool = False) -> torch.Tensor:
        """As in `LoraLayer`; some models scale what their embedding returns (`embed_scale`), so also this."""
        shards = {} if mixed else {"input_fn": self.input_fns.get(adapter), "output_fn": self.output_fns.get(adapter)}
        hidden = self._embed(x, self.lora_embedding_A[adapter].T, **shards)
        output = (hidden @ self.lora_embedding_B[adapter].T) * self.scaling[adapter]
        scale = self._get_embed_scale()
        return output if scale is None else output * scale.to(output.dtype)


class _ConvNd(_LoraModule):
    """LoRA for convolutions: A has the base layer's kernel, stride, padding and dilation, B a kernel of 1.

    With groups > 1, B is grouped and A is not, so such adapters cannot be merged; r has to be divisible by groups.
    """

    _conv: tuple[int, str]  # dimensions of the weight, name of the function in torch.nn.functional

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        if kwargs.get("use_alora", False):
            raise ValueError("aLoRA does not support adapting conv layers.")
        if config.velora_config is not None:
            raise ValueError("VeLoRA does not support adapting conv layers.")
        if self.get_base_layer().groups > 1:
            warnings.warn("LoRA adapter added to ConvNd layer with groups > 1. Merging is not supported.")
        self._active_adapter = adapter_name
        self._kernel_dim = base_layer.weight.dim()
        dims, function = self._conv
        if self._kernel_dim != dims:
            raise ValueError(f"{type(self).__name__} layer kernel must have {dims} dimensions, not {self._kernel_dim}")
        self.conv_fn = getattr(F, function)
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _check_config(self, r: int, config: LoraConfig) -> None:
        base = self.get_base_layer()
        if r % base.groups:
            raise ValueError(
                f"Targeting a {type(base).__name__} with groups={base.groups} and rank {r}. Currently, support is "
                "limited to conv layers where the rank is divisible by groups. Either choose a different rank or do "
                "not target this specific layer."
            )

    def _make_factors(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        base = self.get_base_layer()
        ones = (1,) * (self._kernel_dim - 2)
        options: dict[str, Any] = {}
        if any(step != 1 for step in base.dilation):
            options["dilation"] = base.dilation
        if base.padding_mode != "zeros":
            options["padding_mode"] = base.padding_mode
        conv = type(base)
        self.lora_A[adapter_name] = conv(
            self.in_features, r, base.kernel_size, base.stride, base.padding, bias=False, **options
        )
        self.lora_B[adapter_name] = conv(r, self.out_features, ones, ones, groups=base.groups, bias=config.lora_bias)

    def _get_dora_factor_view(self) -> tuple[int, ...]:
        return (-1,) + (1,) * (self._kernel_dim - 1)

    def _low_rank(self, adapter: str) -> law.LowRank:
        if self.get_base_layer().groups > 1:
            raise NotImplementedError("Merging is not supported for _ConvNd layers with groups > 1!")
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return law.LowRank(A.flatten(1), B.flatten(1), self.scaling[adapter])


class Conv2d(_ConvNd):
    """LoRA for `nn.Conv2d`."""

    _conv = (4, "conv2d")

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        from . import variants

        return {(): None, ("use_dora",): variants.DoraConv2dVariant}


class Conv1d(_ConvNd):
    """LoRA for `nn.Conv1d`."""

    _conv = (3, "conv1d")

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        from . import variants

        return {(): None, ("use_dora",): variants.DoraConv1dVariant}


class Conv3d(_ConvNd):
    """LoRA for `nn.Conv3d`."""

    _conv = (5, "conv3d")

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        from . import variants

        return {(): None, ("use_dora",): variants.DoraConv3dVariant}


@contextmanager
def _shadowed(module: nn.Module, name: str, value: torch.Tensor) -> Iterator[None]:
    """`module.name` reads as `value` inside; the parameter of that name stays registered, untouched."""
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]


class MultiheadAttention(_LoraModule):
    """LoRA for `nn.MultiheadAttention` whose query, key and value have one dimension.

    It adapts both the input projection (a parameter) and the output projection (wrapped in a `Linear` of its own,
    whose forward torch never calls). So the forward runs the base layer with adapted weights in place of its own;
    these are never written to. PEFT counts the adapter of the output projection twice, once as a constant for
    autograd: what has been trained with it expects this, so it is done here too.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        kind = type(self).__name__
        if not getattr(base_layer, "_qkv_same_embed_dim", True):
            raise ValueError(f"Only same embed for query/key/value is supported as of now for {kind}.")
        if config.use_dora:
            raise ValueError(f"{kind} does not support DoRA (yet), please set use_dora to False")
        if config.velora_config is not None:
            raise ValueError(f"{kind} does not support VeLoRA, please set `velora_config=None`.")
        if config.kasa_config is not None:
            raise ValueError(f"{kind} does not support KaSA, please set `kasa_config=None`.")
        if kwargs.get("use_alora", False):
            raise ValueError(f"{kind} does not support aLoRA (yet), please set use_alora to False")
        if not isinstance(base_layer.out_proj, nn.Linear):
            raise TypeError(f"out_proj must be an instance of nn.Linear for {kind}.")
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        plain = base_layer.out_proj
        self.base_layer.out_proj = Linear(plain, adapter_name, r=r, lora_alpha=lora_alpha, config=config, **kwargs)
        self.base_layer.out_proj._merge_factor = 2
        self._active_adapter = adapter_name
        try:
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)
        except BaseException:
            self.base_layer.out_proj = plain
            raise

    # what torch's transformer layers read from their attention
    embed_dim = property(lambda self: self.get_base_layer().embed_dim)
    kdim = property(lambda self: self.get_base_layer().kdim)
    vdim = property(lambda self: self.get_base_layer().vdim)
    _qkv_same_embed_dim = property(lambda self: self.get_base_layer()._qkv_same_embed_dim)
    num_heads = property(lambda self: self.get_base_layer().num_heads)
    dropout = property(lambda self: self.get_base_layer().dropout)
    batch_first = property(lambda self: self.get_base_layer().batch_first)
    head_dim = property(lambda self: self.get_base_layer().head_dim)
    in_proj_weight = property(lambda self: self.get_base_layer().in_proj_weight)
    in_proj_bias = property(lambda self: self.get_base_layer().in_proj_bias)
    out_proj = property(lambda self: self.get_base_layer().out_proj.get_base_layer())
    bias_k = property(lambda self: self.get_base_layer().bias_k)
    bias_v = property(lambda self: self.get_base_layer().bias_v)
    add_zero_attn = property(lambda self: self.get_base_layer().add_zero_attn)

    def merge_masks(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, int | None]:
        return self.get_base_layer().merge_masks(*args, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """See `LoraLayer.update_layer`; adds the adapter to the output projection as well."""
        super().update_layer(*args, **kwargs)
        self.base_layer.out_proj.update_layer(*args, **kwargs)

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if "adapter_names" in kwargs:
            raise TypeError(f"lora.{type(self).__name__} does not support mixed adapter batches.")

    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base layer's (output, attention weights or None) with the active adapters, in the dtype of `query`."""
        self._check_forward_args(query, *args, **kwargs)
        with ExitStack() as shadows:
            if self.disable_adapters:
                law.suspend(self)
            elif self.merged:
                law.resume(self)
            else:
                self._shadow_weights(shadows)
            output, attention = self.base_layer(query, *args, **kwargs)
        return output.to(query.dtype), None if attention is None else attention.to(query.dtype)

    def _shadow_weights(self, shadows: ExitStack) -> None:
        """Put the sums of base weights and deltas in place of the base weights."""
        base = self.get_base_layer()
        out_proj = base.out_proj
        if out_proj.active_adapters != self.active_adapters or out_proj.merged:
            kind = type(base).__name__
            raise ValueError(
                f"The out_proj layer of {kind} has merged layers but {kind} itself doesn't, or other active adapters; "
                "please ensure that either both or none have merged layers"
            )
        adapters = self._own_active_adapters()
        if not adapters:
            return
        out_base = out_proj.get_base_layer()
        in_weight, out_weight, out_bias = base.in_proj_weight, out_base.weight, out_base.bias
        for adapter in adapters:
            in_weight = in_weight + self.get_delta_weight(adapter).to(in_weight.dtype)
            delta = out_proj.get_delta_weight(adapter).to(out_weight.dtype)
            out_weight = out_weight + delta + delta.detach()
            if out_proj.lora_bias[adapter]:
                change = out_proj._merge_changes(adapter)["bias"]
                out_bias = out_bias + change().to(out_bias.dtype)
        shadows.enter_context(_shadowed(base, "in_proj_weight", in_weight))
        shadows.enter_context(_shadowed(out_base, "weight", out_weight))
        if out_bias is not out_base.bias:
            shadows.enter_context(_shadowed(out_base, "bias", out_bias))

    def _base_view(self) -> BaseView:
        return BaseView(self.get_base_layer(), "in_proj_weight")

    def _merge_targets(self) -> dict[str, BaseView]:
        return {"in_proj_weight": self._base_view()}

    def _merge_changes(self, adapter: str) -> dict[str, law.Change]:
        return {"in_proj_weight": self._low_rank(adapter)}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """See `Linear.merge`; merges the same adapters of the output projection."""
        law.resume(self)
        before = list(self.merged_adapters)
        with law.transaction(self):
            law.merge(self, safe_merge, adapter_names)
            names = [name for name in self.merged_adapters if name not in before]
            if names:
                self.get_base_layer().out_proj.merge(safe_merge, names)

    def unmerge(self) -> None:
        """See `Linear.unmerge`; unmerges the output projection, too."""
        out_proj = self.get_base_layer().out_proj
        with law.transaction(out_proj):
            if out_proj.merged:
                out_proj.unmerge()
            law.unmerge(self)

    def switch(self, adapter_names: list[str], safe_merge: bool = False) -> None:
        """See `Linear.switch`; switches the output projection, too."""
        law.resume(self)
        out_proj = self.get_base_layer().out_proj
        with law.transaction(self), law.transaction(out_proj):
            law.switch(self, adapter_names, safe_merge)
            out_proj.switch(adapter_names, safe_merge)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.MultiheadAttention:
        """The base layer with its own output projection again, merged if `merge`."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = self.get_base_layer()
        base.out_proj = base.out_proj.get_base_layer()
        return base

    def _restore_weights(self) -> None:
        """Make sure that the base layer's weights are registered parameters, as they always are here."""
        base = self.get_base_layer()
        for owner, name in ((base, "in_proj_weight"), (base.out_proj.get_base_layer(), "weight")):
            if not isinstance(owner._parameters.get(name), nn.Parameter):
                weight = owner.__dict__.pop(name)
                owner._parameters[name] = nn.Parameter(weight.data, requires_grad=weight.requires_grad)


class _LoraParameterProxy(nn.Module):
    """A parametrization that adds `delta_weight` to a parameter; see `ParamWrapper`."""

    def __init__(self, delta_weight: torch.Tensor) -> None:
        super().__init__()
        self.delta_weight = delta_weight

    @staticmethod
    def _low_prec_add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x + y for an 8-bit float x: added in the dtype of y, clamped to the range of x, in the dtype of x."""
        if y.dtype not in ALLOWED_COMPUTE_DTYPES:
            raise RuntimeError(
                f"There is an attempt to upcast the targeted parameter to {y.dtype} but the only supported are: "
                f"{ALLOWED_COMPUTE_DTYPES}."
            )
        limits = torch.finfo(x.dtype)
        return (x.to(y.dtype) + y).clamp(limits.min, limits.max).to(x.dtype)

    def forward(self, W: torch.Tensor) -> torch.Tensor:
        return self._low_prec_add(W, self.delta_weight) if _is_low_precision(W) else W + self.delta_weight


class _LoraFactorsProxy(nn.Module):
    """A parametrization that adds `scaling * lhs @ rhs`, stacks of matrices, without building the product."""

    def __init__(self, lhs: torch.Tensor, rhs: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.lhs = lhs
        self.rhs = rhs
        self.scaling = scaling

    def forward(self, W: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=W.device.type, enabled=False):  # a parametrization keeps the dtype
            return torch.baddbmm(W, self.lhs, self.rhs, alpha=self.scaling)


def _is_low_precision(tensor: torch.Tensor) -> bool:
    return str(tensor.dtype).removeprefix("torch.") in UPCAST_DTYPES


def _register_parameter_or_buffer(module: nn.Module, name: str, X: torch.Tensor) -> None:
    if isinstance(X, nn.Parameter):
        module.register_parameter(name, X)
    else:
        module.register_buffer(name, X)


class ParamWrapper(_LoraModule):
    """LoRA for one parameter of a module, named in `LoraConfig.target_parameters`: 2-d (out, in), or the 3-d stack of
    an MoE layer, (experts, out, in) or, if the module says `is_transposed`, (experts, in, out).

    A (r * experts, in) and B (out, r * experts) stay `nn.Linear`. The forward parametrizes the parameter while the
    base layer runs; outside of it, reading the parameter gives the bare weight. Wrappers of parameters of the same
    module are nested.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        self.parameter_name = parameter_name
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        refused = {
            "lora_dropout != 0": config.lora_dropout,  # x cannot be factored out of B(A(dropout(x)))
            "fan_in_fan_out": config.fan_in_fan_out,
            "lora_bias=True": config.lora_bias,
            "use_dora=True": config.use_dora,
            "is_target_conv_1d_layer=True": is_target_conv_1d_layer,
        }
        for option, is_set in refused.items():
            if is_set:
                raise ValueError(f"lora.{type(self).__name__} does not work with {option}.")
        for option in ("velora_config", "kasa_config"):
            if getattr(config, option) is not None:
                raise ValueError(f"lora.{type(self).__name__} does not work when `{option}` is set.")
        self.fan_in_fan_out = config.fan_in_fan_out
        self._did_swap_in_out_features = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """From the parameter; also sets `num_experts`. `ds_shape`: its shape before DeepSpeed partitioned it."""
        param = self.get_param()
        shape = getattr(param, "ds_shape", param.shape)
        self._param_ndim = len(shape)
        if len(shape) == 3:
            self.num_experts, in_features, out_features = shape
        elif len(shape) == 2:
            self.num_experts, (out_features, in_features) = 1, shape
        else:
            raise ValueError(
                f"lora.{type(self).__name__} was initialized with {len(shape)} dimensional Parameter "
                f"'{self.parameter_name}', but only 2d and 3d are supported."
            )
        return in_features, out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """See `LoraLayer.update_layer`; r is the rank of each expert."""
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def _check_config(self, r: int, config: LoraConfig) -> None:
        if config.lora_dropout > 0.0:
            raise ValueError(f"lora.{type(self).__name__} does not work with lora_dropout != 0.")

    def _make_factors(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        is_transposed = getattr(self.get_base_layer(), "is_transposed", False)
        if self._param_ndim == 3 and not is_transposed and not self._did_swap_in_out_features:
            self.in_features, self.out_features = self.out_features, self.in_features
            self._did_swap_in_out_features = True
        rank = r * self.num_experts
        self.lora_A[adapter_name] = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B[adapter_name] = nn.Linear(rank, self.out_features, bias=config.lora_bias)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter to the device (or the one given) and, if it is a float, the dtype of the parameter."""
        param = self.get_param()
        dtype = param.dtype if param.dtype.is_floating_point or param.dtype.is_complex else None
        for name in self.adapter_layer_names + self.other_param_names:
            items = getattr(self, name, None)
            if not isinstance(items, (nn.ModuleDict, nn.ParameterDict, BufferDict)) or adapter_name not in items:
                continue
            if not any(p.is_meta for p in items.parameters()):
                items[adapter_name] = items[adapter_name].to(device=device or param.device, dtype=dtype)

    def get_param(self) -> torch.Tensor:
        """The adapted parameter, without the adapters."""
        return getattr(self.get_base_layer(), self.parameter_name)

    # -------------------------------------------------------------------------------------------------- merging

    def _base_view(self) -> BaseView:
        is_stack = self._param_ndim == 3
        return BaseView(
            self.get_base_layer(), self.parameter_name, is_stack and not self._did_swap_in_out_features, is_stack
        )

    def _low_rank(self, adapter: str) -> law.LowRank:
        """One pair of factors an expert: A (experts, r, in), B (experts, out, r); plain ones for a 2-d parameter."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        if self._param_ndim == 3:
            A = A.reshape(self.num_experts, -1, A.shape[-1])
            B = B.reshape(B.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return law.LowRank(A, B, self.scaling[adapter])

    def _merge_targets(self) -> dict[str, BaseView]:
        return {"weight": self._base_view()}

    def _merge_changes(self, adapter: str) -> dict[str, law.Change]:
        return {"weight": self._low_rank(adapter)}

    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(lhs, rhs, scaling): the delta of the parameter is scaling * lhs @ rhs, in the parameter's own layout."""
        A, B, scaling = self._low_rank(adapter_name)
        lhs, rhs = (A.mT, B.mT) if self._base_view().transposed else (B, A)
        dtype = self.get_param().dtype
        return lhs.to(dtype), rhs.to(dtype), scaling

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the adapter adds to the parameter, in its dtype; for an 8-bit parameter in the adapter's dtype."""
        param = self.get_param()
        delta = self._base_view().restore(self._low_rank(adapter_name).delta(), param.shape).to(param.device)
        return delta.to(param.dtype) if param.dtype in ALLOWED_COMPUTE_DTYPES else delta

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that owns the parameter; with `merge`, this and all wrappers inside are merged first."""
        wrapper: nn.Module = self
        while merge and isinstance(wrapper, ParamWrapper):
            wrapper.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            wrapper = wrapper.base_layer
        return self.get_base_layer()

    # -------------------------------------------------------------------------------------------------- forward

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("adapter_names"):
            raise ValueError(f"lora.{type(self).__name__} does not support mixed adapter batches yet.")
        super()._check_forward_args(x, *args, **kwargs)

    def _active_forward(self, x: torch.Tensor, *args: Any, variant_kwargs: dict, **kwargs: Any) -> torch.Tensor:
        with self._activate_lora(self.active_adapters):
            return self.base_layer(x, *args, **kwargs)

    def _proxy(self, adapters: list[str]) -> nn.Module:
        if len(adapters) == 1 and self.num_experts > 1 and not _is_low_precision(self.get_param()):
            return _LoraFactorsProxy(*self.get_delta_factors(adapters[0]))
        first, *rest = (self.get_delta_weight(adapter) for adapter in adapters)
        return _LoraParameterProxy(sum(rest, first))

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Inside, the parameter reads with the given adapters added; its place among the parameters is kept."""
        adapters = [name for name in active_adapters or () if name in self.lora_A]
        if not adapters:
            yield
            return
        base, name = self.get_base_layer(), self.parameter_name
        requires_grad = self.get_param().requires_grad
        order = list(base._parameters)
        nn.utils.parametrize.register_parametrization(base, name, self._proxy(adapters))
        base.parametrizations[name].original.requires_grad_(requires_grad)
        try:
            with nn.utils.parametrize.cached():
                yield
        finally:
            self._remove_parametrizations()
            for key in order:
                if key in base._parameters:
                    base._parameters[key] = base._parameters.pop(key)

    def _remove_parametrizations(self) -> None:
        """Remove the latest parametrization that is LoRA's from the parameter, and only that."""
        base, name = self.get_base_layer(), self.parameter_name
        if name not in getattr(base, "parametrizations", {}):
            raise ValueError(f"The parametrization of '{name}' that LoRA made for its forward is gone: {self}")
        chain = base.parametrizations[name]
        if len(chain) == 1:
            nn.utils.parametrize.remove_parametrizations(base, name, leave_parametrized=False)
            return
        for i in reversed(range(len(chain))):
            if isinstance(chain[i], (_LoraParameterProxy, _LoraFactorsProxy)):
                del chain[i]
                return
        warnings.warn(f"Could not find any LoRA parametrization of '{name}' on {self}.")

    def __repr__(self) -> str:
        kind, bracket, rest = super().__repr__().partition("(")
        return f"{kind}{bracket}\n  parameter_name='{self.parameter_name}',{rest}"


def _is_conv1d(module: nn.Module) -> bool:
    """Is it transformers' Conv1D? If transformers has not been imported, nothing is."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


_LAYERS = (
    (nn.Embedding, Embedding),
    (nn.Conv2d, Conv2d),
    (nn.Conv3d, Conv3d),
    (nn.Conv1d, Conv1d),
    (nn.MultiheadAttention, MultiheadAttention),
)


def dispatch_default(
    target: nn.Module, adapter_name: str, config: LoraConfig, parameter_name: str | None = None, **kwargs: Any
) -> nn.Module | None:
    """The LoRA layer for an unquantised `target` (or its parameter `parameter_name`); None if no type fits.

    Corrects `config.fan_in_fan_out`, with a warning, if it does not fit the target.
    """
    if parameter_name is not None:
        return ParamWrapper(target, adapter_name, parameter_name=parameter_name, config=config, **kwargs)
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for kind, layer in _LAYERS:
        if isinstance(base, kind):
            return layer(target, adapter_name, config=config, **kwargs)
    if isinstance(base, nn.Linear):
        if config.fan_in_fan_out:
            warnings.warn(
                "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. "
                "Setting fan_in_fan_out to False."
            )
            config.fan_in_fan_out = False
        return Linear(target, adapter_name, config=config, **kwargs)
    if _is_conv1d(base):
        if not config.fan_in_fan_out:
            warnings.warn(
                "fan_in_fan_out is set to False but the target module is `Conv1D`. Setting fan_in_fan_out to True."
            )
            config.fan_in_fan_out = True
        return Linear(target, adapter_name, is_target_conv_1d_layer=True, config=config, **kwargs)
    return None


__getattr__ = elsewhere(__name__, "tuners.lora.config", "utils.loftq_utils")
