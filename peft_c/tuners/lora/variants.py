"""The LoRA variants: what each does to a layer at creation, in the forward pass, and when it is merged.

A variant has no state of its own; everything lives on the LoRA layer. The composed forward below is the specification
of each variant. Variants whose update is an additive weight derive from `_AdditiveVariant` and only say what the
update is; the DoRA variants share one merge and differ in how a layer type stores rows.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft_c.tuners._buffer_dict import BufferDict
from peft_c.utils.integrations import dequantize_module_weight, gather_params_ctx
from peft_c.utils.other import transpose

from .arrow import ArrowLoraLinearLayer
from .config import BdLoraConfig, LoraConfig, MontecloraConfig, PeftConfig
from .conv import Conv1d, Conv2d, Conv3d, _ConvNd
from .core import _C, LoraLayer, LoraVariant, is_compiling, law  # noqa: F401 - see _LoraModule.forward
from .dora import DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer, DoraEmbeddingLayer, DoraLinearLayer
from .layer import Embedding, Linear
from .monteclora import MontecloraSampler
from .velora import VeloraFunction, _get_group_dim, _normalize_projection, _reshape_to_grouped_subtokens


def _parts(module: LoraLayer, name: str) -> tuple[Any, Any, Any, float]:
    """lora_A, lora_B, dropout and scaling of an adapter."""
    return module.lora_A[name], module.lora_B[name], module.lora_dropout[name], module.scaling[name]


def _container(module: nn.Module, attribute: str, factory: Any) -> Any:
    """`module.attribute`, made by `factory()` for the first adapter that needs it."""
    if not hasattr(module, attribute):
        setattr(module, attribute, factory())
    return getattr(module, attribute)


def _declare(module: LoraLayer, kind: str, *names: str) -> None:
    """Add names to the layer's own `adapter_layer_names` or `other_param_names`, once."""
    known = getattr(module, kind)
    setattr(module, kind, known + tuple(name for name in names if name not in known))


def _low_rank_delta(module: LoraLayer, name: str, A: torch.Tensor, B: torch.Tensor, diag=None) -> torch.Tensor:
    """`scaling * B @ diag @ A` as the base layer stores its weight, computed in fp32 for half precision on the CPU."""
    dtype = B.dtype
    if B.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        A, B, diag = A.float(), B.float(), None if diag is None else diag.float()
    B = B if diag is None else B * diag
    return (transpose(B @ A, module.fan_in_fan_out) * module.scaling[name]).to(dtype)


class _AdditiveVariant(LoraVariant):
    """A variant whose merged weight is the base weight plus `delta_weight`."""

    @staticmethod
    def delta_weight(module: LoraLayer, active_adapter: str) -> torch.Tensor:
        """What merging adds, in the base weight's layout; here the plain LoRA update."""
        return module.get_delta_weight(active_adapter)

    @classmethod
    def merge_safe(cls, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight + cls.delta_weight(module, active_adapter).to(orig_weight.dtype)

    @classmethod
    def merge_unsafe(cls, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data += cls.delta_weight(module, active_adapter).to(orig_weight.dtype)

    @classmethod
    def unmerge(cls, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight - cls.delta_weight(module, active_adapter).to(orig_weight.dtype)


def _refuse_to_merge(error: type[Exception], message: str) -> type:
    """A mixin whose merging hooks raise `error`; `{}` in the message stands for what was asked."""

    def raiser(action: str) -> staticmethod:
        def hook(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor):
            raise error(f"{message.format(action)} (adapter '{active_adapter}')")

        return staticmethod(hook)

    hooks = {"merge_safe": "safe merging", "merge_unsafe": "merging", "unmerge": "unmerging"}
    return type("_NoMerge", (LoraVariant,), {name: raiser(action) for name, action in hooks.items()})


# ---------------------------------------------------------------- DoRA


class DoraLinearVariant(LoraVariant):
    """DoRA for linear layers, and the merging of DoRA in general."""

    @staticmethod
    def init(module: Linear, adapter_name: str, **kwargs: Any) -> None:
        A, B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        place_on_cpu = False
        if module.ephemeral_gpu_offload:
            place_on_cpu = "cpu" in (A.device.type, B.device.type)
            on_device = [t.device for t in (A, B) if t.device.type in ("cuda", "xpu")]
            device = on_device[0] if on_device else ("xpu" if torch.xpu.is_available() else "cuda")
            A, B = A.to(device), B.to(device)
        layer = DoraLinearLayer(fan_in_fan_out=getattr(module, "fan_in_fan_out", False))
        _start_dora(module, adapter_name, layer, A, B, place_on_cpu=place_on_cpu)

    @staticmethod
    def _weight_norm(module: Linear, layer: DoraLinearLayer, base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return layer.get_weight_norm(base, transpose(delta, module.fan_in_fan_out), scaling=1)

    @staticmethod
    def _per_output(module: Linear, factor: torch.Tensor) -> torch.Tensor:
        """One factor per output, shaped to multiply the stored base weight."""
        return transpose(factor.view(-1, 1), module.fan_in_fan_out)

    @classmethod
    def _prepare_merge(cls, module: LoraLayer, name: str, safe_merge: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The delta and the factor of a merge. The norm belongs to the base weight without any merged adapter and
        cannot be recomputed from the merged one, so it is kept on the layer until `unmerge`."""
        delta = module.get_delta_weight(name)
        layer = module.lora_magnitude_vector[name]
        with module._unmerged_base_weight(safe_merge=safe_merge) as base:
            norm = cls._weight_norm(module, layer, base, delta).detach()
        module._cache_store(f"{name}-weight_norm", norm)
        return delta, cls._per_output(module, layer.weight / norm)

    @classmethod
    @torch.no_grad()
    def merge_safe(cls, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        delta, factor = cls._prepare_merge(module, active_adapter, safe_merge=True)
        # finding the norm may have rebuilt the base weight, and in half precision the rebuilt one is the one to use
        current = dequantize_module_weight(module.get_base_layer())
        return (factor * (current + delta)).to(orig_weight.dtype)

    @classmethod
    @torch.no_grad()
    def merge_unsafe(cls, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        delta, factor = cls._prepare_merge(module, active_adapter, safe_merge=False)
        orig_weight.data.copy_(factor * (orig_weight.data + delta))

    @classmethod
    @torch.no_grad()
    def unmerge(cls, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        norm = module._cache_pop(f"{active_adapter}-weight_norm")
        factor = cls._per_output(module, module.lora_magnitude_vector[active_adapter].weight / norm)
        return (orig_weight.data / factor - module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        A, B, dropout, scaling = _parts(module, active_adapter)
        base_result = result
        if module.training and not isinstance(dropout, nn.Identity):
            x, base_result = dropout(x), None  # the base output was computed without dropout
        return result + module.lora_magnitude_vector[active_adapter](
            x,
            lora_A=A,
            lora_B=B,
            scaling=scaling,
            base_layer=module.get_base_layer(),
            base_result=base_result,
            adapter_name=active_adapter,
        )


def _start_dora(module, adapter_name: str, layer: DoraLinearLayer, A, B, place_on_cpu: bool = False) -> None:
    """Give `module` its magnitude layer, starting at the norm of the adapted weight."""
    _declare(module, "adapter_layer_names", "lora_magnitude_vector")
    layer.update_layer(
        base_layer=module.get_base_layer(),
        lora_A=A,
        lora_B=B,
        scaling=module.scaling[adapter_name],
        place_on_cpu=place_on_cpu,
    )
    module.lora_magnitude_vector[adapter_name] = layer


class DoraEmbeddingVariant(DoraLinearVariant):
    @staticmethod
    def init(module: Embedding, adapter_name: str, **kwargs: Any) -> None:
        A, B = module.lora_embedding_A[adapter_name], module.lora_embedding_B[adapter_name]
        _start_dora(module, adapter_name, DoraEmbeddingLayer(fan_in_fan_out=True), A, B)

    @staticmethod
    def _weight_norm(module, layer, base, delta):
        return layer.get_weight_norm(base, delta.T, scaling=1)

    @staticmethod
    def _per_output(module, factor):
        return factor.view(1, -1)

    @staticmethod
    def forward(module: Embedding, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        factor, added = module.lora_magnitude_vector[active_adapter](
            x,
            lora_A=module.lora_embedding_A[active_adapter].T,
            lora_B=module.lora_embedding_B[active_adapter].T,
            scaling=module.scaling[active_adapter],
            base_layer=module.get_base_layer(),
            embed_fn=module._embed,
            adapter_name=active_adapter,
        )
        return factor * result + _scaled_like_base(module, added)


def _scaled_like_base(module: Embedding, update: torch.Tensor) -> torch.Tensor:
    """Some embeddings multiply their output by a constant, which the update must share."""
    scale = module._get_embed_scale()
    return update if scale is None else update * scale.to(update.dtype)


class _DoraConvNdVariant(DoraLinearVariant):
    @staticmethod
    def init_convd_variant(module: _ConvNd, adapter_name: str, dora_layer: nn.Module) -> None:
        A, B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        _start_dora(module, adapter_name, dora_layer, A, B)

    @staticmethod
    def _weight_norm(module, layer, base, delta):
        return layer.get_weight_norm(base, delta, scaling=1)

    @staticmethod
    def _per_output(module, factor):
        return factor.view(*module._get_dora_factor_view())


class DoraConv1dVariant(_DoraConvNdVariant):
    @staticmethod
    def init(module: Conv1d, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        _DoraConvNdVariant.init_convd_variant(module, adapter_name, DoraConv1dLayer(fan_in_fan_out=False))


class DoraConv2dVariant(_DoraConvNdVariant):
    @staticmethod
    def init(module: Conv2d, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        _DoraConvNdVariant.init_convd_variant(module, adapter_name, DoraConv2dLayer(fan_in_fan_out=False))


class DoraConv3dVariant(_DoraConvNdVariant):
    @staticmethod
    def init(module: Conv3d, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        _DoraConvNdVariant.init_convd_variant(module, adapter_name, DoraConv3dLayer(fan_in_fan_out=False))


# ---------------------------------------------------------------- Arrow, QALoRA


_ARROW_NO_MERGE = "Cannot merge an active Arrow router adapter, as {} has no meaning for it. Remove it first."


class ArrowLinearVariant(_refuse_to_merge(RuntimeError, _ARROW_NO_MERGE)):
    """Routes every token to its best experts among the layer's other adapters; see `arrow.ArrowLoraLinearLayer`."""

    @staticmethod
    def init(module: Linear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if config.arrow_config is None:
            raise ValueError("ArrowLinearVariant.init() did not receive an arrow_config")
        router = ArrowLoraLinearLayer(in_features=module.in_features, arrow_config=config.arrow_config)
        _container(module, "lora_arrow", nn.ModuleDict)[adapter_name] = router.to(module.weight.device)

    @staticmethod
    def forward(module: Linear, *, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        router = module.lora_arrow[active_adapter]
        # both do nothing until an adapter was added or removed
        router.gen_know_sub(module.lora_A, module.lora_B)
        router.build_prototypes(module.lora_A, module.lora_B)
        return result + router(
            x,
            lora_A=module.lora_A,
            lora_B=module.lora_B,
            dropout=module.lora_dropout[active_adapter],
            scaling=module.scaling,
        )


class QALoraLinearVariant(_refuse_to_merge(NotImplementedError, "QALoRA for GPTQ layers does not support {}.")):
    """A acts on inputs that are averaged in groups (https://arxiv.org/abs/2309.14717)."""

    @staticmethod
    def init(module: Linear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        size = config.qalora_group_size
        if module.in_features is not None and module.in_features % size:
            raise ValueError(
                f"`use_qalora=True` requires `module.in_features` ({module.in_features}) to be divisible by "
                f"'qalora_group_size' ({size})"
            )
        _declare(module, "other_param_names", "qalora_group_size")
        _container(module, "qalora_group_size", dict)[adapter_name] = size
        A = module.lora_A[adapter_name]
        module.lora_A[adapter_name] = nn.Linear(
            A.in_features // size, A.out_features, bias=False, device=A.weight.device, dtype=A.weight.dtype
        )

    @staticmethod
    def get_delta_weight(module: Linear, active_adapter: str) -> torch.Tensor:
        raise NotImplementedError("QALoRA for GPTQ layers does not support 'get_delta_weight'.")

    @staticmethod
    def forward(module: Linear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        A, B, dropout, scaling = _parts(module, active_adapter)
        groups = module.in_features // module.qalora_group_size[active_adapter]
        pooled = dropout(x).unflatten(-1, (groups, -1)).mean(-1) * groups
        return result + F.linear(F.linear(pooled, A.weight), B.weight) * scaling


# ---------------------------------------------------------------- activated LoRA


class ALoraLinearVariant(_refuse_to_merge(NotImplementedError, "aLoRA does not support {}.")):
    """The adapter acts on the last `alora_offsets[i]` tokens of row i only; None there switches it off."""

    @staticmethod
    def init(module: Linear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        pass

    @staticmethod
    def forward(module: Linear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        A, B, dropout, scaling = _parts(module, active_adapter)
        batch, tokens = result.shape[0], result.shape[1] if result.dim() == 3 else 1
        offsets = kwargs.get("alora_offsets") or [None] * batch
        counts = torch.tensor([min(int(o or 0), tokens) for o in offsets], device=result.device)
        active = (torch.arange(tokens, device=result.device) >= (tokens - counts)[:, None]).flatten()
        # an empty selection still goes through the adapter, so that its gradients are zero rather than None
        chosen = x.to(A.weight.dtype).reshape(-1, x.shape[-1])[active]
        update = B(A(dropout(chosen))) * scaling
        flat = result.reshape(-1, result.shape[-1])
        return flat.index_put((active,), update.to(flat.dtype), accumulate=True).view_as(result)


def calculate_alora_offsets(
    peft_config: dict[str, PeftConfig],
    active_adapter: str,
    input_ids: torch.Tensor,
    adapter_names: list[str] | None = None,
) -> list[int | None]:
    """For each row of `input_ids` (batch, tokens): how far from the end the last invocation sequence starts.

    Row i uses the tokens of `adapter_names[i]`, or of `active_adapter`. None where the sequence is absent or the
    adapter is the base model, no aLoRA, or unknown (with a warning).
    """
    if input_ids is None:
        return []
    offsets: list[int | None] = []
    for row, sequence in enumerate(input_ids):
        name = adapter_names[row] if adapter_names and row < len(adapter_names) else active_adapter
        offset = None
        if name != "__base__" and name not in peft_config:
            warnings.warn(f"Adapter '{name}' not found in peft_config. Using base model for row {row}.")
        elif name != "__base__":
            tokens = getattr(peft_config[name], "alora_invocation_tokens", None)
            if tokens and len(tokens) <= len(sequence):
                wanted = torch.tensor(tokens, dtype=sequence.dtype, device=sequence.device)
                starts = (sequence.unfold(0, len(tokens), 1) == wanted).all(1).nonzero()
                offset = len(sequence) - int(starts[-1]) if len(starts) else None
        offsets.append(offset)
    return offsets


def is_alora_relevant_in_batch(model: nn.Module, adapter_names: list[str] | None = None) -> bool:
    """Whether the active adapter, or one of `adapter_names`, is an aLoRA."""
    configs = [model.active_peft_config, *(model.peft_config.get(name) for name in adapter_names or ())]
    return any(getattr(config, "alora_invocation_tokens", None) for config in configs)


def _with_alora_offsets(model: nn.Module, input_ids: torch.Tensor | None, kwargs: dict, missing: str | None) -> dict:
    """`kwargs` with "alora_offsets" for this call, if an aLoRA takes part and the caller gave none."""
    names = kwargs.get("adapter_names")
    if not is_alora_relevant_in_batch(model, names) or kwargs.get("alora_offsets") is not None:
        return kwargs
    kwargs["alora_offsets"] = None
    if input_ids is not None:
        kwargs["alora_offsets"] = calculate_alora_offsets(
            model.peft_config, model.active_adapter, input_ids, adapter_names=names
        )
    elif missing:
        warnings.warn(missing)
    return kwargs


def get_alora_offsets_for_forward(
    model: nn.Module, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
) -> dict:
    """The keyword arguments of a model's forward, completed with "alora_offsets"."""
    missing = None
    if inputs_embeds is not None:
        missing = (
            "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for this forward "
            "pass."
        )
    return _with_alora_offsets(model, input_ids, kwargs, missing)


def get_alora_offsets_for_generate(model: nn.Module, *args: Any, **kwargs: Any) -> dict:
    """The keyword arguments of a model's generate, completed with "alora_offsets"."""
    input_ids = kwargs.get("input_ids")
    if input_ids is None and args and isinstance(args[0], torch.Tensor):
        input_ids = args[0]
    if input_ids is not None and input_ids.ndim == 1:
        input_ids = input_ids.unsqueeze(0)
    missing = "Cannot calculate aLoRA offsets during generate as input_ids are not available. Disabling aLoRA."
    return _with_alora_offsets(model, input_ids, kwargs, missing)


# ---------------------------------------------------------------- VeLoRA


class VeloraLinearVariant(_AdditiveVariant):
    """A's gradient comes from compressed inputs; the forward value is plain LoRA's."""

    @staticmethod
    def init(module: Linear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        options = config.velora_config
        weight = module.get_base_layer().weight
        random = options.init_type == "random"
        make = torch.randn if random else torch.zeros
        embed = make(_get_group_dim(module.in_features, options.num_groups), device=weight.device, dtype=weight.dtype)
        if random:
            embed = _normalize_projection(embed).to(weight.dtype)
        values = {
            "lora_velora_embed": embed,
            "lora_velora_initialized": random,
            "lora_velora_num_groups": options.num_groups,
            "lora_velora_init_type": options.init_type,
            "lora_velora_scale": options.scale,
        }
        _declare(module, "other_param_names", *values)
        for name, value in values.items():
            factory = (lambda: BufferDict({}, persistent=True)) if name == "lora_velora_embed" else dict
            _container(module, name, factory)[adapter_name] = value
        module._move_adapter_to_device_of_base_layer(adapter_name)

    @staticmethod
    @torch.no_grad()
    def _maybe_update_embed(module: Linear, adapter_name: str, x: torch.Tensor) -> None:
        """Take the projection from this batch, if the adapter's `init_type` says so."""
        done = module.lora_velora_initialized.get(adapter_name)
        init_type = module.lora_velora_init_type.get(adapter_name)
        if done is None or init_type == "random" or (init_type == "batch_average_once" and done):
            return
        groups = _reshape_to_grouped_subtokens(x.detach(), module.lora_velora_num_groups[adapter_name])
        old = module.lora_velora_embed[adapter_name]
        new = _normalize_projection(groups.flatten(0, 1).mean(0))
        module.lora_velora_embed[adapter_name] = new.to(device=old.device, dtype=old.dtype)
        module.lora_velora_initialized[adapter_name] = True

    @staticmethod
    def forward(module: Linear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        A, B, dropout, scaling = _parts(module, active_adapter)
        x = dropout(x)
        if module.training and torch.is_grad_enabled():
            VeloraLinearVariant._maybe_update_embed(module, active_adapter, x)
            projected = VeloraFunction.apply(
                x,
                A.weight,
                A.bias,
                module.lora_velora_embed[active_adapter],
                module.lora_velora_num_groups[active_adapter],
                module.lora_velora_scale[active_adapter],
            )
        else:
            projected = A(x)
        return result + B(projected) * scaling


# ---------------------------------------------------------------- BD-LoRA


class BlockDiagonalLinear(nn.Module):
    """A linear map without bias whose matrix has `nblocks` blocks on its diagonal and zeros elsewhere.

    `weight` (out_features, in_features / nblocks) holds the blocks one below the other. It starts as zero or by
    Kaiming's rule. ValueError unless `nblocks` divides both sizes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        init_zero: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if in_features % nblocks or out_features % nblocks:
            raise ValueError(
                f"self.in_features={in_features} or self.out_features={out_features} not divisible by {nblocks}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.nblocks = nblocks
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features // nblocks, dtype=dtype, device=device or "cpu")
        )
        if init_zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = self.weight.unflatten(0, (self.nblocks, -1))
        return torch.einsum("...bi,boi->...bo", x.unflatten(-1, (self.nblocks, -1)), blocks).flatten(-2)

    def weight_as_blockdiagonal_matrix(self) -> torch.Tensor:
        """The full matrix (out_features, in_features)."""
        return torch.block_diag(*self.weight.chunk(self.nblocks, dim=0))


class BdLoraLinearVariant(_AdditiveVariant):
    """One factor is block-diagonal; which one depends on the name of the target module."""

    @staticmethod
    def init(module: Linear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        options = config.use_bdlora
        if isinstance(options, dict):
            options = BdLoraConfig(**options)
        target = kwargs.get("target_name", "")
        block_a = any(pattern in target for pattern in options.target_modules_bd_a or ())
        block_b = any(pattern in target for pattern in options.target_modules_bd_b or ())
        if block_a and block_b:
            raise ValueError(f"Target {target} matches both A and B block-diagonal patterns")
        if options.match_strict and not (block_a or block_b):
            raise ValueError(
                f"Target {target} matches neither A nor B block-diagonal patterns. If this is intentional, set "
                "match_strict=False in BdLoraConfig."
            )
        base = module.get_base_layer()
        like = {"nblocks": options.nblocks, "dtype": base.weight.dtype, "device": base.weight.device}
        if block_a:
            r = module.lora_A[adapter_name].out_features
            module.lora_A[adapter_name] = BlockDiagonalLinear(base.in_features, r, **like)
        elif block_b:
            r = module.lora_B[adapter_name].in_features
            module.lora_B[adapter_name] = BlockDiagonalLinear(r, base.out_features, init_zero=True, **like)

    @staticmethod
    def forward(module: Linear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        A, B, dropout, scaling = _parts(module, active_adapter)
        x = module._cast_input_dtype(dropout(x), A.weight.dtype)
        return result + B(A(x)) * scaling

    @staticmethod
    def delta_weight(module: Linear, active_adapter: str) -> torch.Tensor:
        A, B = (
            m.weight_as_blockdiagonal_matrix() if isinstance(m, BlockDiagonalLinear) else m.weight
            for m in (module.lora_A[active_adapter], module.lora_B[active_adapter])
        )
        return _low_rank_delta(module, active_adapter, A, B)


# ---------------------------------------------------------------- MonteCLoRA


class MontecloraLinearVariant(_AdditiveVariant):
    """In training A is replaced by a weighted mean of perturbed copies; otherwise, and merged, this is plain LoRA."""

    @staticmethod
    def init(module: Linear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        _declare(module, "adapter_layer_names", "lora_monteclora_sampler")
        samplers = _container(module, "lora_monteclora_sampler", nn.ModuleDict)
        _container(module, "_lora_monteclora_config", dict)[adapter_name] = config.monteclora_config
        if not module.lora_A[adapter_name].weight.is_meta:  # else `forward` makes it, once there is a device
            samplers[adapter_name] = MontecloraLinearVariant._create_sampler(
                module, adapter_name, config.monteclora_config
            )

    @staticmethod
    def _create_sampler(module: Linear, adapter_name: str, monteclora_config: MontecloraConfig) -> MontecloraSampler:
        A = module.lora_A[adapter_name]
        return MontecloraSampler(
            in_features=module.in_features,
            out_features=A.out_features,
            device=A.weight.device,
            dtype=A.weight.dtype,
            **vars(monteclora_config),
        )

    @staticmethod
    def forward(module: Linear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        A, B, dropout, scaling = _parts(module, active_adapter)
        samplers = module.lora_monteclora_sampler
        if active_adapter not in samplers:
            samplers[active_adapter] = MontecloraLinearVariant._create_sampler(
                module, active_adapter, module._lora_monteclora_config[active_adapter]
            )
        x = dropout(x.to(A.weight.dtype))  # before sampling: both draw random numbers
        weight = A.weight
        if module.training:
            noise, shares = samplers[active_adapter]()
            if torch.isnan(noise).any() or torch.isnan(shares).any():
                warnings.warn("Monteclora sampling produced NaNs, using base weights.")
            else:
                weight = torch.einsum("n,nij->ij", shares, weight.T + noise).T
        return result + B(F.linear(x, weight)) * scaling


# ---------------------------------------------------------------- MiCA


def _register_frozen_peft_weight(module: LoraLayer, adapter_name: str, weight_name: str) -> None:
    """Keep `weight_name` of this adapter from being trained, now and whenever the adapter is activated."""
    frozen = dict(module.frozen_peft_weight_names)
    names = frozen.get(adapter_name, ())
    frozen[adapter_name] = names if weight_name in names else (*names, weight_name)
    module.frozen_peft_weight_names = frozen
    module._freeze_non_trainable_peft_weights(adapter_name)


class MiCALinearVariant(_AdditiveVariant):
    """Plain LoRA with a frozen B, which `init.mica_init` has set (https://arxiv.org/abs/2604.01694)."""

    @staticmethod
    def init(module: Linear, adapter_name: str, **kwargs: Any) -> None:
        _register_frozen_peft_weight(module, adapter_name, "lora_B")

    @staticmethod
    def forward(module: Linear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        A, B, dropout, scaling = _parts(module, active_adapter)
        return result + B(A(dropout(x))) * scaling


class MiCAEmbeddingVariant(_AdditiveVariant):
    """MiCA for embeddings: `lora_embedding_B` is frozen."""

    @staticmethod
    def init(module: Embedding, adapter_name: str, **kwargs: Any) -> None:
        _register_frozen_peft_weight(module, adapter_name, "lora_embedding_B")

    @staticmethod
    def forward(module: Embedding, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        rows = module._embed(
            x,
            module.lora_embedding_A[active_adapter].T,
            input_fn=module.input_fns.get(active_adapter),
            output_fn=module.output_fns.get(active_adapter),
        )
        update = (rows @ module.lora_embedding_B[active_adapter].T) * module.scaling[active_adapter]
        return result + _scaled_like_base(module, update)


# ---------------------------------------------------------------- KaSA


class KasaLinearVariant(_AdditiveVariant):
    """KaSA (https://arxiv.org/abs/2412.06071): `scaling * B @ diag(lora_diag) @ A` on a truncated base weight.

    The base weight loses its r smallest singular components when the adapter is added. Where it is still on the meta
    device then, this happens at the first forward or merge, which would otherwise use a weight the adapter was not
    trained for.
    """

    def supports_lora_conversion(self) -> bool:
        """Never: neither the truncation nor `lora_diag` fits a plain adapter for the original base weight."""
        return False

    @staticmethod
    def init(module: Linear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if getattr(module, "fan_in_fan_out", False):
            raise ValueError(
                "KaSA does not support `fan_in_fan_out=True` layers (e.g. Conv1D). Please target nn.Linear layers."
            )
        diagonals = _container(module, "lora_diag", nn.ParameterDict)
        _declare(module, "adapter_layer_names", "lora_diag")
        deferred = _container(module, "_lora_kasa_truncation_deferred", set)
        A = module.lora_A[adapter_name].weight
        r = module.r[adapter_name]
        if A.is_meta:
            diagonals[adapter_name] = nn.Parameter(torch.empty(r, device=A.device, dtype=A.dtype))
            deferred.add(adapter_name)
            return
        # B starts at zero, so any values will do
        diagonals[adapter_name] = nn.Parameter(torch.randn(r, device=A.device, dtype=A.dtype))
        with gather_params_ctx(module.get_base_layer().weight):
            KasaLinearVariant._truncate_base_weight(module, r)

    @staticmethod
    @torch.no_grad()
    def _truncate_base_weight(module: Linear, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Remove the r smallest singular components of the base weight; they are returned as fp32 factors (out, r)
        and (r, in). ValueError unless r is smaller than both sides."""
        weight = module.get_base_layer().weight
        if r >= min(weight.shape):
            raise ValueError(
                f"KaSA requires `r` ({r}) to be smaller than min(in_features, out_features) ({min(weight.shape)}) so "
                "that something of the base weight is left after the truncation."
            )
        U, S, Vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
        U = U * S
        weight.data = (U[:, :-r] @ Vh[:-r]).to(weight.dtype)
        return U[:, -r:], Vh[-r:]

    @staticmethod
    def _apply_deferred_truncation(module: Linear, active_adapter: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Do the truncation that `init` had to put off; returns what `_truncate_base_weight` does, or None."""
        deferred = getattr(module, "_lora_kasa_truncation_deferred", ())
        if active_adapter not in deferred:
            return None
        weight = module.get_base_layer().weight
        if weight.is_meta:
            raise RuntimeError(
                "KaSA could not apply its SVD base-weight truncation because the base weight is still on the meta "
                f"device. Load the base model's weights before adapter '{active_adapter}' is used or merged."
            )
        r = module.r[active_adapter]
        if module.lora_diag[active_adapter].is_meta:  # no checkpoint has filled it
            module.lora_diag[active_adapter] = nn.Parameter(torch.randn(r, device=weight.device, dtype=weight.dtype))
        with gather_params_ctx(weight):
            dropped = KasaLinearVariant._truncate_base_weight(module, r)
        deferred.discard(active_adapter)
        return dropped

    @staticmethod
    def delta_weight(module: Linear, active_adapter: str) -> torch.Tensor:
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        return _low_rank_delta(module, active_adapter, A, B, diag=module.lora_diag[active_adapter])

    @classmethod
    def merge_safe(cls, module: Linear, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        if cls._apply_deferred_truncation(module, active_adapter) is not None:
            orig_weight = module.get_base_layer().weight.data  # the copy we were given is of the old weight
        return super().merge_safe(module, active_adapter, orig_weight)

    @classmethod
    def merge_unsafe(cls, module: Linear, active_adapter: str, orig_weight: torch.Tensor) -> None:
        cls._apply_deferred_truncation(module, active_adapter)
        super().merge_unsafe(module, active_adapter, orig_weight)

    @staticmethod
    def forward(module: Linear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        dropped = KasaLinearVariant._apply_deferred_truncation(module, active_adapter)
        if dropped is not None:
            # `result` came from the weight before the truncation: take the dropped components out of it, too
            left, right = dropped
            result = result - F.linear(F.linear(x.to(right.dtype), right), left).to(result.dtype)
        A, B, dropout, scaling = _parts(module, active_adapter)
        return result + B(A(dropout(x)) * module.lora_diag[active_adapter]) * scaling


def _kasa_layer_regularization_loss(module: Linear, adapter_name: str, beta: float, gamma: float) -> torch.Tensor:
    """`beta * sum(diag ** 2) + gamma * (||B^T B - I|| + ||A A^T - I||)` in fp32, for `LoraModel._get_kasa_loss`."""
    diag = module.lora_diag[adapter_name].float()
    A, B = module.lora_A[adapter_name].weight.float(), module.lora_B[adapter_name].weight.float()
    eye = torch.eye(len(diag), device=diag.device)
    return beta * diag.square().sum() + gamma * (torch.linalg.norm(B.T @ B - eye) + torch.linalg.norm(A @ A.T - eye))
