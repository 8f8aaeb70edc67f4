"""Adapters saved for transformers v4 on models whose layers v5 renamed or fused (Mixtral's experts and others).

Importing this module imports transformers and needs its version 5.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import (
    _MODEL_TO_CONVERSION_PATTERN,
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from ..tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from .constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from .peft_types import PeftType

# model type -> the family whose fused experts it shares
_MODEL_TO_CONVERSION_PATTERN = {**_MODEL_TO_CONVERSION_PATTERN, "mixtral": "mixtral"}
_PREFIX = "base_model.model."

# family -> (module of v4 -> parameter of v5). transformers reads these two tables as well.
_MOE_TARGET_MODULE_MAPPING: dict[str, dict[str, str]] = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}
# family -> (parameter of v5 -> the modules of v4 that are fused in it, in order)
_MOE_FUSED_TARGETS: dict[str, dict[str, list[str]]] = {
    "mixtral": {"gate_up_proj": ["w1", "w3"]},
    "qwen2_moe": {"gate_up_proj": ["gate_proj", "up_proj"]},
}


# ---------------------------------------------------------------------------------------------- operations on tensors


def _block_diag_3d(tensors: list[torch.Tensor]) -> torch.Tensor:
    """n tensors (experts, out, r) to (experts, n * out, n * r): block diagonal for each expert."""
    if len(tensors) < 2:
        raise ValueError(f"_block_diag_3d expects at least 2 tensors, got {len(tensors)}")
    if any(tensor.dim() != 3 for tensor in tensors):
        raise ValueError(
            f"_block_diag_3d expects all tensors to be 3d, got shapes {[tuple(t.shape) for t in tensors]}"
        )
    if len({tensor.shape[0] for tensor in tensors}) > 1:
        raise ValueError("All tensors passed to _block_diag_3d must have the same number of experts.")
    return torch.stack([torch.block_diag(*matrices) for matrices in zip(*tensors, strict=True)])


class PeftConcatenate(Concatenate):
    """Fuses the lora_B of weights that were fused along their outputs.

    W = [W0; W1] has the update [B0 A0; B1 A1] = blockdiag(B0, B1) [A0; A1]: the A are concatenated along the rank, and
    the B put on the diagonal. Matrices (out, r) give (n * out, n * r). With experts, (experts, out, r) give
    (n * out, n * r * experts), the layout of a LoRA on a parameter.
    """

    @torch.no_grad
    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        dims = {tensor.dim() for tensor in input_dict.values()}
        if dims not in ({2}, {3}):
            raise ValueError(
                f"To convert this LoRA adapter, the LoRA weights all need to have either 2 or 3 dims, got {dims}"
            )
        unexpected = input_dict.keys() - set(source_patterns)
        if unexpected:
            raise ValueError(
                "Collected tensors contain keys not present in source_patterns. "
                f"Unexpected keys: {sorted(unexpected)}; source_patterns={source_patterns}"
            )
        tensors = [input_dict[pattern] for pattern in source_patterns if pattern in input_dict]
        if dims == {2}:
            return {full_layer_name: torch.block_diag(*tensors)}
        return {full_layer_name: _block_diag_3d(tensors).permute(2, 0, 1).flatten(0, 1).T}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("Reversing PEFT LoRA MoE conversions is not supported yet.")


class _OnEachTensor(ConversionOps):
    """An operation of torch.Tensor with `dims` as its arguments, on each tensor."""

    operation: str

    def __init__(self, dims: int | tuple[int, ...]):
        self.dims = (dims,) if isinstance(dims, int) else dims

    @torch.no_grad
    def convert(
        self, input_dict: dict[str, torch.Tensor], source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict[str, torch.Tensor]:
        return {key: getattr(tensor, self.operation)(*self.dims) for key, tensor in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError(f"Reversing {type(self).__name__} is not supported.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dims={self.dims})"


class FlattenDims(_OnEachTensor):
    """Flattens each tensor from the first to the second of `dims`."""

    operation = "flatten"


class PermuteDims(_OnEachTensor):
    """Permutes the dimensions of each tensor."""

    operation = "permute"


# --------------------------------------------------------------------------------------------------- keys of weights

# (what the fused parameter is called, its LoRA's place in the module, operations that follow transformers' own for
# lora_A, and for lora_B). gate_up_proj is adapted by the inner of two wrappers around the experts, down_proj by the
# outer one.
_EXPERT_WEIGHTS = (
    (
        "gate_up_proj",
        lambda pattern: pattern.replace("gate_up_proj", "base_layer"),
        {Concatenate: lambda op: [op, FlattenDims((0, 1))], MergeModulelist: lambda op: [op]},
        {Concatenate: lambda op: [PeftConcatenate(dim=op.dim)], MergeModulelist: lambda op: [op]},
    ),
    (
        "down_proj",
        lambda pattern: pattern.replace(".down_proj", ""),
        {MergeModulelist: lambda op: [op, FlattenDims((0, 1))]},
        {
            MergeModulelist: lambda op: [
                op,
                PermuteDims((2, 0, 1)),
                FlattenDims((0, 1)),
                Transpose(dim0=0, dim1=1),
            ]
        },
    ),
)


def _operations(conversion: WeightConverter, table: dict[type, Any]) -> list[ConversionOps]:
    found = []
    for op in conversion.operations:
        make = next((make for kind, make in table.items() if isinstance(op, kind)), None)
        found += make(op) if make else []
    return found


def _expert_conversions(conversion: WeightConverter, adapter_name: str) -> list[WeightConverter]:
    """The conversions of lora_A and lora_B that belong to that of a fused expert weight."""
    if len(conversion.target_patterns) != 1:
        return []
    target = conversion.target_patterns[0]
    found = []
    for name, place, *tables in _EXPERT_WEIGHTS:
        if not target.endswith(name):
            continue
        for lora, table in zip(("lora_A", "lora_B"), tables, strict=True):
            operations = _operations(conversion, table)
            if operations:
                new = type(conversion)(
                    source_patterns=[
                        f"{pat.rpartition('.')[0] or pat}.{lora}.*" for pat in conversion.source_patterns
                    ],
                    target_patterns=[f"{place(target)}.{lora}.{adapter_name}.weight"],
                    operations=operations,
                )
                new.distributed_operation = conversion.distributed_operation
                new.quantization_operation = conversion.quantization_operation
                found.append(new)
        break
    return found


def build_peft_weight_mapping(
    weight_conversions: list[WeightConverter | WeightRenaming] | None, adapter_name: str, peft_config=None
) -> list[WeightConverter | WeightRenaming]:
    """transformers' conversions of a model's checkpoint, turned into those of an adapter's checkpoint.

    The result takes off "base_model.model.", puts the adapter's name into the keys of the method of `peft_config` (of
    all methods when it is None), renames as for the base model, and fuses LoRA weights of experts. transformers calls
    this too. Returns [] when there is nothing to convert.
    """
    if not weight_conversions:
        return []
    result = [WeightRenaming(f"{_PREFIX}model.", "model."), WeightRenaming(_PREFIX, "")]
    peft_type = getattr(peft_config, "peft_type", None)
    if peft_type in PEFT_TYPE_TO_PREFIX_MAPPING:
        prefixes = [PEFT_TYPE_TO_PREFIX_MAPPING[peft_type]]
    else:
        prefixes = sorted(set(PEFT_TYPE_TO_PREFIX_MAPPING.values()))
    result += [WeightRenaming(rf"({re.escape(prefix)}[^\.]*)", rf"\1.{adapter_name}") for prefix in prefixes]
    for conversion in weight_conversions:
        is_renaming = isinstance(conversion, WeightRenaming)
        result += [conversion] if is_renaming else _expert_conversions(conversion, adapter_name)
    return result


# ----------------------------------------------------------------------------------------------------- configuration


def _resolve_string_target_modules(peft_config, model: nn.Module, target_module_mapping: dict[str, str]) -> set[str]:
    """The last parts of the names that a regular expression, or "all-linear", targets, in the terms of v4.

    Modules of v4 that are parameters now match nothing, so the expression is tried on the names that they had: beside
    the parameter that they were fused into.
    """
    if peft_config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        linear = _maybe_include_all_linear_layers(copy.copy(peft_config), model).target_modules
        return {name.rpartition(".")[2] for name in linear} | target_module_mapping.keys()

    modules = [name for name, _ in model.named_modules()]
    params = [name for name, _ in model.named_parameters()]
    found = {name.rpartition(".")[2] for name in (*modules, *params) if check_target_module_exists(peft_config, name)}
    for old, new in target_module_mapping.items():
        candidates = (f"{name.rpartition('.')[0]}.{old}" for name in params if name.rpartition(".")[2] == new)
        if old not in found and any(check_target_module_exists(peft_config, name) for name in candidates):
            found.add(old)
    return found


def _convert_peft_config_moe(peft_config, model: nn.Module) -> None:
    """Rewrites, in place, the targets of a configuration made for v4 for the fused experts of v5.

    n modules fused into one parameter need n times the rank, and n times alpha for the same scaling. Raises
    `ValueError`, before anything is changed, when only some of the modules that are fused are targeted.
    """
    family = _MODEL_TO_CONVERSION_PATTERN.get(getattr(model.config, "model_type", None))
    mapping, fused = _MOE_TARGET_MODULE_MAPPING.get(family), _MOE_FUSED_TARGETS.get(family)
    if not mapping or not fused:
        return
    targets = peft_config.target_modules
    if isinstance(targets, str):
        targets = _resolve_string_target_modules(peft_config, model, mapping)
        if not targets:  # left to the error that says so
            return

    parameters, remaining, present = set(peft_config.target_parameters or ()), set(), {}
    for target in targets or ():
        old = next((old for old in mapping if target == old or target.endswith(f".{old}")), None)
        if old is None:
            remaining.add(target)
        else:
            parameters.add(mapping[old])
            present.setdefault(mapping[old], set()).add(old)
    ranks, alphas = dict(peft_config.rank_pattern or {}), dict(peft_config.alpha_pattern or {})
    for new, olds in fused.items():
        missing = set(olds) - present.get(new, set())
        if new in present and missing:
            raise ValueError(
                f"Cannot convert PEFT target(s) {', '.join(sorted(present[new]))} without also targeting "
                f"{', '.join(sorted(missing))} because they are fused into {new}."
            )
        if new in present and len(olds) > 1:
            pattern = rf".*\.{re.escape(new)}"
            ranks[pattern], alphas[pattern] = peft_config.r * len(olds), peft_config.lora_alpha * len(olds)
    peft_config.rank_pattern, peft_config.alpha_pattern = ranks, alphas
    peft_config.target_parameters, peft_config.target_modules = parameters, remaining


def _has_conversion(peft_config, model: nn.Module) -> bool:
    """Whether it is LoRA on a transformers model that has a conversion."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return (
        peft_config.peft_type == PeftType.LORA
        and model_type is not None
        and get_checkpoint_conversion_mapping(model_type) is not None
    )


def convert_peft_config_for_transformers(peft_config, model: nn.Module, conversions: list[Any] | None) -> None:
    """Rewrites, in place, a LoRA configuration made for transformers v4 so that it fits the model of v5."""
    if _has_conversion(peft_config, model):
        _convert_peft_config_moe(peft_config, model)


# -------------------------------------------------------------------------------------------------------- state dict


def _convert_to_peft_serialized_keys(
    state_dict: dict[str, torch.Tensor], adapter_name: str, base_prefix: str = _PREFIX
) -> dict[str, torch.Tensor]:
    """The entries under the keys of a checkpoint: with the prefix, without the adapter's name (which is the last part
    of the key or the one before it)."""
    own = re.compile(rf"\.{re.escape(adapter_name)}(\.[^.]*)?$")

    def serialized(key: str) -> str:
        return own.sub(r"\1", key if key.startswith("base_model.") else base_prefix + key)

    return {serialized(key): value for key, value in state_dict.items()}


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module,
    peft_config,
    adapter_state_dict: dict[str, torch.Tensor],
    adapter_name: str = "default",
) -> dict[str, torch.Tensor]:
    """An adapter's checkpoint for transformers v4 as one for the model of v5: LoRA keys renamed, experts fused.

    Args:
        model: PeftModel, or transformers model with injected adapters.
        peft_config: configuration of the adapter.
        adapter_state_dict: the checkpoint; it is not changed.
        adapter_name: name of the adapter in the model.

    Returns the checkpoint to load; the same object when there is nothing to convert. Entries that are not LoRA's
    (fully trained modules) stay as they are.
    """
    if not _has_conversion(peft_config, model):
        return adapter_state_dict
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    conversions = build_peft_weight_mapping(
        get_model_conversion_mapping(base_model), adapter_name=adapter_name, peft_config=peft_config
    )
    lora = {key: value for key, value in adapter_state_dict.items() if ".lora_" in key}
    if not conversions or not lora:
        return adapter_state_dict

    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    model_prefix = getattr(model, "base_model_prefix", "")

    # As transformers loads a checkpoint: keys are renamed, and tensors with the same new key go into one conversion.
    planned: dict[str, WeightRenaming | WeightConverter] = {}
    for key in sorted(lora, key=dot_natural_key):
        new_key, pattern = rename_source_key(key, renamings, converters)
        stem, infix, leaf = new_key.rpartition(f".{adapter_name}")
        plain = stem + leaf if infix else new_key
        if new_key not in adapter_state_dict and key.endswith(plain):
            # Only a prefix was taken off: the model may have it under its own prefix.
            new_key, pattern = rename_source_key(key, [], [], model_prefix, adapter_state_dict)
        if pattern is None:
            pattern = key
            entry = planned.setdefault(new_key, WeightRenaming(key, new_key))
        else:
            entry = planned.setdefault(new_key, copy.deepcopy(converter_of[pattern]))
        entry.add_tensor(new_key, key, pattern, lora[key])

    converted: dict[str, torch.Tensor] = {}
    for name, entry in planned.items():
        values = entry.convert(name, model=model, config=model.config, hf_quantizer=None, loading_info=None)
        for sources in entry.layer_targets.values():
            for key in sources:
                lora.pop(key, None)
        converted.update({k: v[0] if isinstance(v, list) else v for k, v in values.items()})
    others = {key: value for key, value in adapter_state_dict.items() if ".lora_" not in key}
    return {**others, **_convert_to_peft_serialized_keys({**lora, **converted}, adapter_name)}
