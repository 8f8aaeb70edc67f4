"""LoRA for Linear, Conv1D and Embedding, and the choice of the layer type for a module.

Convolutions, attention and single parameters have files of their own; what they share is in core.py.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ... import _C
from ...reexports import elsewhere
from .. import law
from ..base_view import BaseView
from ..tuners_utils import BaseTunerLayer
from .attention import MultiheadAttention
from .conv import Conv1d, Conv2d, Conv3d, _ConvNd  # noqa: F401 - PEFT has these names here, used or not
from .core import (  # noqa: F401
    VARIANT_KWARG_KEYS,
    LoraLayer,
    LoraVariant,
    _LoraModule,
    adds_in_place,
    is_compiling,
)
from .parameter import (  # noqa: F401
    ParamWrapper,
    _LoraFactorsProxy,
    _LoraParameterProxy,
    _register_parameter_or_buffer,
)

if TYPE_CHECKING:
    from .config import LoraConfig


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
        self.__dict__.update(fan_in_fan_out=config.fan_in_fan_out, _active_adapter=adapter_name)
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        self.__dict__["is_target_conv_1d_layer"] = is_target_conv_1d_layer

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

    def _is_plain(self) -> bool:
        """Whether `_lora_term`, without autograd, is nothing but a product of the factors."""
        options = self.get_base_layer().max_norm is not None or self._get_embed_scale() is not None  # see _embed
        return not (options or torch.is_grad_enabled())

    def _add_in_c(self, x: torch.Tensor, result: torch.Tensor, names: list[str] | str) -> bool:
        """Let C look the rows of x up, each in the A of its adapter or all in that of one, and add the terms to the
        output in place, where it may. Rows whose adapter this layer does not have stay as they are."""
        if not (adds_in_place(self.base_layer) and self._is_plain()):
            return False
        if isinstance(names, str):
            x, result, names = x[None], result[None], [names]
        own = self.lora_embedding_A.keys() & names
        if not own.isdisjoint(self.lora_variant) or not own.isdisjoint(self.input_fns):
            return False
        A, B = self.lora_embedding_A._parameters, self.lora_embedding_B._parameters
        terms = {name: (A.get(name), B.get(name), self.scaling[name]) for name in own}
        return _C.lookup_add(result, x, [terms.get(name) for name in names])

    def _add_term(self, adapter: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        if self._add_in_c(x, result, adapter):
            return result
        return super()._add_term(adapter, x, result)

    def _add_by_rows(self, x: torch.Tensor, result: torch.Tensor, names: list[str]) -> torch.Tensor | None:
        return result if self._add_in_c(x, result, names) else super()._add_by_rows(x, result, names)

    def _row_factors(self, x: torch.Tensor, names: list[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
        if x.dim() != 2 or not self._is_plain():
            return None
        A, B = self.lora_embedding_A._parameters, self.lora_embedding_B._parameters
        hidden = torch.stack([A[name].index_select(1, row) for row, name in zip(x.unbind(), names, strict=True)])
        return hidden.mT, torch.stack([B[name] for name in names]).mT


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
