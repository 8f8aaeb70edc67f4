"""LoRA on base layers that transformers has sharded by tensor parallelism."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn

from ... import import_utils
from ...utils.integrations import TpInfo

_SUPPORTED_PLANS = ("colwise", "rowwise", "embedding_rowwise")


def _replace_layer_number_by_wildcard(name: str) -> str:
    """`layers.3.mlp` to `layers.*.mlp`, the form of the keys of a tensor-parallel plan."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def get_tp_plan_and_mesh(model: nn.Module, current_key: str) -> tuple[str | None, Any]:
    """(plan of the module named `current_key`, tensor-parallel mesh) of a model sharded with DTensor, or two Nones."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or getattr(getattr(model.config, "distributed_config", None), "tp_size", 1) <= 1:
        return None, None
    if mesh.mesh_dim_names is not None and "tp" not in mesh.mesh_dim_names:
        return None, None  # FSDP only
    if not import_utils.is_transformers_ge_v5_17_0:
        raise RuntimeError("LoRA with DTensor tensor parallelism requires transformers >= 5.17.0. Please upgrade.")
    plan = (getattr(model, "tp_plan", None) or {}).get(_replace_layer_number_by_wildcard(current_key))
    if plan is None:
        return None, None
    return plan, mesh["tp"] if mesh.ndim > 1 else mesh


def annotate_base_layer(model: nn.Module, base_layer: nn.Module, current_key: str) -> None:
    """Note plan and mesh on the base layer, where older transformers kept them, before the adapter is created."""
    if getattr(model, "_device_mesh", None) is None or getattr(base_layer, "_hf_tp_plan", None) is not None:
        return
    if import_utils.is_transformers_dtensor_tp:
        plan, mesh = get_tp_plan_and_mesh(model, current_key)
        if plan is not None:
            base_layer._hf_tp_plan, base_layer._hf_device_mesh = plan, mesh


def add_lora_tp_hooks_dtensor(
    tp_module: nn.Module, tp_plan_name: str, device_mesh: Any, *, base_layer: nn.Module, module_name: str
) -> None:
    """Make the factor `tp_module` a sharded module: its parameters DTensors, its forward that of the plan.

    A parameter created with its global shape is sharded, one with the local shape is taken as this rank's part.
    """
    from torch.distributed.tensor import DTensor, Shard
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    if tp_plan_name not in ("colwise", "rowwise"):
        raise ValueError(f"Unsupported TP plan {tp_plan_name} for LoRA: only colwise and rowwise are supported.")
    style = ALL_PARALLEL_STYLES[tp_plan_name]
    dim = 0 if tp_plan_name == "colwise" else 1
    for name, param in list(tp_module.named_parameters(recurse=False)):
        style.validate_param(tp_module, name, device_mesh, parameter_name=f"{module_name}.{name}")
        shape = list(param.shape)
        shape[dim] = base_layer.weight.shape[dim]
        if list(param.shape) == shape:
            style.shard_param(tp_module, name, device_mesh)
            continue
        whole = torch.empty(shape, device="meta")
        sharded = DTensor.from_local(
            param, device_mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        tp_module._parameters[name] = nn.Parameter(sharded, requires_grad=param.requires_grad)
    style.install_forward(tp_module, device_mesh)


def shard_adapter(
    model: nn.Module, lora_module: nn.Module, base_layer: nn.Module, adapter_name: str, current_key: str
) -> None:
    """Let an adapter on a sharded base layer follow the layer's plan; nothing happens on other layers.

    A column-wise layer shards lora_B, a row-wise one lora_A; embeddings shard in their forward and are only recorded.
    Other plans warn and leave the adapter whole.
    """
    plan = getattr(base_layer, "_hf_tp_plan", None)
    if plan is None:
        return
    mesh = getattr(base_layer, "_hf_device_mesh", None)
    if not import_utils.is_transformers_ge_v5_4_0:
        raise RuntimeError(
            "The base model is tensor-parallel sharded but the installed version of Transformers does not "
            "support LoRA with Tensor Parallelism. Please upgrade to transformers >= 5.4.0."
        )
    if plan not in _SUPPORTED_PLANS:
        warnings.warn(
            f'TP plan "{plan}" on the base layer {current_key} is not supported for LoRA. '
            "LoRA adapters will be created without tensor parallel hooks."
        )
        return

    uses_dtensor = import_utils.is_transformers_dtensor_tp
    generic_key = re.sub(r"\d+", "*", current_key)
    if plan == "embedding_rowwise":
        # A is stored transposed, so at saving it has to be gathered along the other dimension
        plans = {
            f"{generic_key}.base_layer.weight": plan,
            f"{generic_key}.lora_embedding_A.{adapter_name}": "embedding_colwise",
        }
    else:
        factor = "lora_B" if plan == "colwise" else "lora_A"
        plans = {f"{generic_key}.{factor}.{adapter_name}.weight": plan}
        tp_module = getattr(lora_module, factor)[adapter_name]
        name = f"{current_key}.{factor}.{adapter_name}"
        if uses_dtensor:
            add_lora_tp_hooks_dtensor(tp_module, plan, mesh, base_layer=base_layer, module_name=name)
        else:
            from transformers.integrations.tensor_parallel import add_tensor_parallel_hooks_to_module

            add_tensor_parallel_hooks_to_module(model, tp_module, plan, (name,), mesh)
    if not uses_dtensor:
        # DTensors know their sharding; otherwise saving needs to be told
        lora_module._tp_info = TpInfo(tp_plan=plans, device_mesh=mesh, tp_size=model._tp_size)
