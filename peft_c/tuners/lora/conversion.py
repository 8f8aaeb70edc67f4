"""Turning the adapter of another method into a LoRA checkpoint, by a low-rank fit of every layer's delta weight."""

from __future__ import annotations

import copy
import os
import pathlib
import warnings
from typing import Any

import torch
from torch import nn

from peft_c.tuners.tuners_utils import BaseTunerLayer

from ._targets import conv1d_types
from .config import LoraConfig

_PREFIX = "base_model.model."


def _find_cutoff_index(S: torch.Tensor, threshold: float) -> int:
    """How many of the sorted singular values S (k,) it takes to have `threshold` of the sum of their squares."""
    if S.dim() != 1:
        raise ValueError("Input vector must be 1d.")
    energy = torch.cumsum(S**2, dim=0)
    return torch.searchsorted(energy, threshold * energy[-1]).item() + 1


def _fit(delta: torch.Tensor, rank: int | float) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The best A (r, in) and B (out, r) for delta (out, in), in its type; a float rank is a share of the energy."""
    U, S, Vh = torch.linalg.svd(delta.float(), full_matrices=False)
    r = rank if isinstance(rank, int) else _find_cutoff_index(S, threshold=rank)
    if r > len(S):
        raise ValueError(
            f"The chosen rank {r} is larger than the weight shape ({len(S)}), please choose a lower rank."
        )
    return Vh[:r].to(delta.dtype).contiguous(), (U[:, :r] * S[:r]).to(delta.dtype).contiguous(), r


@torch.no_grad()
def _convert_miss_module_to_lora(
    module: Any, rank: int | float, adapter_name: str = "default"
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A, B and rank of a MiSS layer. Its "bat" mode is fitted; the others sum the inputs over residues modulo r, which
    is an exact factor: `A[j, i] = 1 if i % r == j`."""
    block, form = module.miss_block[adapter_name], module.miss_fn[adapter_name]
    if form == "bat":
        A, B, r = _fit(module.get_delta_weight(adapter_name), rank)
        return A.to(block.dtype), B.to(block.dtype), r
    B = block
    if form == "mini":
        B = B.repeat(1, module.out_features // module.miss_mini_r[adapter_name])
    r = len(block)
    index = torch.arange(module.in_features, device=block.device)
    A = torch.zeros(r, module.in_features, device=block.device, dtype=block.dtype)
    A[index % r, index] = 1
    return A, B.T.contiguous(), r


@torch.no_grad()
def _convert_module_to_lora(
    module: BaseTunerLayer, rank: int | float, adapter_name: str = "default"
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A, B and rank that stand for the delta weight of one layer."""
    if hasattr(module, "miss_fn"):
        return _convert_miss_module_to_lora(module, rank, adapter_name)
    delta = module.get_delta_weight(adapter_name)
    turned = isinstance(module.get_base_layer(), conv1d_types())
    return _fit(delta.T if turned else delta, rank)


def _check_convertible(model: nn.Module, adapter_name: str) -> list[tuple[str, BaseTunerLayer]]:
    """The layers to convert; TypeError if there are none or one does not support it."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    unsupported = sorted(
        {
            repr(type(module))
            for _, module in layers
            if not module.supports_lora_conversion(adapter_name) or not hasattr(module, "get_delta_weight")
        }
    )
    if unsupported:
        raise TypeError(f"Some module types on this model do not support LoRA conversion: {', '.join(unsupported)}.")
    if not layers:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    return layers


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """A LoRA adapter that approximates the given adapter, whose method must add a delta weight to linear layers.

    The scaling is part of the factors: alpha equals rank everywhere. The adapter is larger than the original for the
    same quality; what it buys is everything that only works with LoRA.

    Args:
        model: A model with adapter layers; not sharded.
        rank: An int is the rank of every layer. A float in (0, 1] gives each layer the smallest rank that keeps this
            share of its delta's energy (squared singular values); ranks can then differ widely.
        adapter_name: The adapter to convert.
        progressbar: Show one.
        compile_kwargs: If given, the conversion of a layer is run through `torch.compile` with these.

    Returns:
        The config and the state dict, whose keys have no adapter name.

    Raises:
        TypeError: if some adapter layer, or every layer, cannot be converted.
        ValueError: for a rank that is 0, too large, or a float outside (0, 1], and for adapters that train biases.
    """
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
        )
    if rank <= 0:
        raise ValueError(f"Passing a rank of {rank} doesn't make sense, please pass a valid value.")
    layers = _check_convertible(model, adapter_name)
    peft_config = getattr(model, "peft_config", {}).get(adapter_name)
    if peft_config is not None and peft_config.peft_type == "LORA":
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that."
        )
    bias = getattr(peft_config, "bias", getattr(peft_config, "lora_bias", "none"))
    if bias != "none":
        raise ValueError(f"The adapter's config sets bias={bias}, this is not supported right now.")

    config = _start_config(peft_config, rank)
    convert = _convert_module_to_lora
    if compile_kwargs is not None:
        convert = torch.compile(convert, **compile_kwargs)
    if progressbar:
        from tqdm import tqdm

        layers = tqdm(layers, desc="Converting to LoRA")
    state_dict: dict[str, torch.Tensor] = {}
    for name, module in layers:
        A, B, layer_rank = convert(module, rank=rank, adapter_name=adapter_name)
        short = name.removeprefix(_PREFIX)
        if layer_rank != rank or isinstance(config.target_modules, str):
            config.rank_pattern[short] = config.alpha_pattern[short] = layer_rank
        else:
            config.target_modules.add(short)
        state_dict[f"{name}.lora_A.weight"] = A
        state_dict[f"{name}.lora_B.weight"] = B
    if getattr(peft_config, "modules_to_save", None):
        config.modules_to_save = copy.copy(peft_config.modules_to_save)
        state_dict.update(_saved_modules(model, adapter_name))
    return config, state_dict


def _start_config(peft_config: Any, rank: int | float) -> LoraConfig:
    """A LoRA config with the targets of `peft_config`, or without targets if that is None."""
    r = rank if isinstance(rank, int) else 1  # a float rank ends up in rank_pattern
    options: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "exclude_modules": set()}
    if peft_config is None:
        return LoraConfig(r=r, target_modules=[], **options)
    options["target_modules"] = copy.copy(peft_config.target_modules)
    options["base_model_name_or_path"] = peft_config.base_model_name_or_path
    if hasattr(peft_config, "layers_pattern"):
        options["layers_pattern"] = peft_config.layers_pattern
        options["layers_to_transform"] = peft_config.layers_to_transform
    return LoraConfig(r=r, lora_alpha=r, **options)


def _saved_modules(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The parameters of the adapter's modules_to_save, under the names of the modules they replace."""
    from peft_c.utils.other import ModulesToSaveWrapper

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for key, param in module.modules_to_save[adapter_name].named_parameters():
                found[f"{name}.{key}"] = param.data
    return found


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """`convert_to_lora`, then save what `PeftModel.from_pretrained(base_model, path)` loads into the folder `path`."""
    from safetensors.torch import save_file

    from peft_c.utils.constants import SAFETENSORS_WEIGHTS_NAME

    lora_config, state_dict = convert_to_lora(
        model, rank=rank, adapter_name=adapter_name, progressbar=progressbar, compile_kwargs=compile_kwargs
    )
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(state_dict, path / SAFETENSORS_WEIGHTS_NAME)
    lora_config.save_pretrained(str(path))
