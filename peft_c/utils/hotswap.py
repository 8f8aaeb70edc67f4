"""Hot-swapping: put the weights of another checkpoint in the place of a loaded LoRA adapter, without recompilation."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import nn

from ..config import PeftConfig
from ..mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from ..tuners.lora.config import LoraConfig
from ..tuners.lora.layer import Conv2d, Linear, LoraLayer
from ..tuners.tuners_utils import BaseTunerLayer
from .matching import get_pattern_key
from .model_prep import infer_device
from .peft_types import PeftType
from .save_and_load import _insert_adapter_name_into_state_dict, load_peft_weights

# method: fields in which the configs of two adapters have to agree to be swapped
CONFIG_KEYS_TO_CHECK = {PeftType.LORA: ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]}


def _update_scaling(lora_module: LoraLayer, adapter_name: str, scaling: float) -> None:
    """Set a layer's scaling; one that is a tensor (`prepare_model_for_compiled_hotswap`) is written in place."""
    old = lora_module.scaling[adapter_name]
    if isinstance(old, torch.Tensor):
        old.fill_(scaling)
    elif isinstance(old, (int, float)):
        lora_module.scaling[adapter_name] = scaling
    else:
        raise TypeError(f"Expected the scaling of adapter {adapter_name} to be a float or a tensor, got {type(old)}.")


def _groups(layer: LoraLayer) -> int:
    """Number of groups that a grouped convolution splits the rank into, else 1."""
    return layer.get_base_layer().groups if isinstance(layer, Conv2d) else 1


def _fill(destination: torch.Tensor, source: torch.Tensor, groups: int = 1) -> None:
    """Copy into a larger tensor and set the rest to zero; rows of A stay in the block of their group."""
    destination.zero_()
    if groups > 1 and destination.shape[0] != source.shape[0]:
        destination, source = (tensor.unflatten(0, (groups, -1)) for tensor in (destination, source))
    destination[tuple(slice(size) for size in source.shape)].copy_(source)


def _convert_scalings_to_tensor(model: nn.Module) -> bool:
    """Make every scaling a tensor, so that a compiled model need not be recompiled for another value.

    Returns whether there is a LoRA layer.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for name, value in layer.scaling.items():
            if not isinstance(value, (int, float, torch.Tensor)):
                raise TypeError(
                    f"Expected the scaling of adapter {name} to be a float or a tensor, got {type(value)}."
                )
    for layer in layers:
        for name, value in layer.scaling.items():
            if not isinstance(value, torch.Tensor):
                layer.scaling[name] = torch.tensor(float(value), device=layer.weight.device)
    return bool(layers)


def _factors_to_pad(model: nn.Module, target_rank: int) -> Iterator[tuple[nn.Module, int, int, int, str]]:
    """(module of the factor, dimension of the rank, size it should have, groups, attribute) of Linear and Conv2d.

    ValueError if the rank is lower than that of an adapter or does not go with a layer's groups.
    """
    for layer in model.modules():
        if not isinstance(layer, (Linear, Conv2d)):
            continue
        groups = _groups(layer)
        if target_rank % groups:
            raise ValueError(
                f"Trying to pad a Conv2d LoRA adapter with groups={groups} to target rank {target_rank}, but the "
                f"target rank is not divisible by {groups}. Please choose a target rank that is divisible by {groups}."
            )
        is_conv = isinstance(layer, Conv2d)
        for factor in layer.lora_A.values():
            yield factor, 0, target_rank, groups, "out_channels" if is_conv else "out_features"
        for factor in layer.lora_B.values():
            # B of a grouped convolution has the rank per group as its second dimension
            yield factor, 1, target_rank // groups, 1, "in_channels" if is_conv else "in_features"


@torch.no_grad()
def _pad_lora_weights(model: nn.Module, target_rank: int) -> bool:
    """Pad all factors of Linear and Conv2d layers with zeros to `target_rank`; returns whether there are any."""
    factors = list(_factors_to_pad(model, target_rank))
    for factor, dim, size, *_ in factors:
        if factor.weight.shape[dim] > size:
            rank = factor.weight.shape[dim] * (target_rank // size)
            raise ValueError(
                f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger "
                f"({rank}). This is not possible."
            )
    for factor, dim, size, groups, attribute in factors:
        weight = factor.weight
        if weight.shape[dim] == size:
            continue
        shape = list(weight.shape)
        shape[dim] = size
        padded = weight.new_empty(shape)
        _fill(padded, weight, groups)
        factor.weight = nn.Parameter(padded, requires_grad=weight.requires_grad)
        setattr(factor, attribute, target_rank)
    return bool(factors)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Prepare a model for swapping adapters of different rank or scaling once it is compiled, in place.

    Call it after the first adapter has been loaded and before `torch.compile`. Scalings become tensors, and with
    `target_rank` the factors are padded with zeros, so that nothing that is compiled changes with an adapter.

    Args:
        model: The model with a LoRA adapter.
        target_rank: Largest rank of the adapters that will be swapped in; None leaves the ranks alone.
        config: Config or configs (by adapter) in which the ranks are set to `target_rank` as well.
        check_compiled: What happens if the model is compiled already: "error", "warn" or "ignore".

    Raises:
        ValueError: if there is no LoRA layer, if the model is compiled, or if an adapter does not fit `target_rank`.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", False):
        if check_compiled == "error":
            raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will "
                "likely result in re-compilation, hurting performance. Call the function before compiling the model."
            )
        elif check_compiled != "ignore":
            raise ValueError(
                f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
            )

    padded = target_rank is not None and _pad_lora_weights(model, target_rank=target_rank)
    converted = _convert_scalings_to_tensor(model)
    if not (padded or converted):
        raise ValueError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading "
            "the first adapter and before loading the second adapter."
        )
    if target_rank is None or not config:
        return
    for lora_config in config.values() if isinstance(config, dict) else (config,):
        lora_config.r = target_rank
        if lora_config.rank_pattern:
            lora_config.rank_pattern.update(dict.fromkeys(lora_config.rank_pattern, target_rank))


def _fits(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether two factors differ at most in the rank, which is in one of the first two dimensions."""
    if old.dim() != new.dim():
        return False
    differing = [dim for dim, sizes in enumerate(zip(old.shape, new.shape, strict=True)) if sizes[0] != sizes[1]]
    return len(differing) <= 1 and all(dim < 2 for dim in differing)


@torch.no_grad()
def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Replace the weights and scalings of an adapter by those of a state dict; nothing is changed in case of an error.

    Layers that the new adapter does not have are set to zero.

    Args:
        model: The model with the loaded adapter, compiled or not.
        state_dict: The new weights under the model's own names (with the adapter's name in them).
        adapter_name: The adapter, which keeps its name.
        config: Config of the new weights, for rank and scaling.
        parameter_prefix: What the names of the method's parameters start with.

    Raises:
        RuntimeError: if the new adapter has a layer that the old one lacks.
        ValueError: if the adapter is merged, or if weights differ in more than the rank.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base weights. "
            "Please unmerge the adapter first by calling `peft_model.unmerge_adapter()` (or, for diffusers "
            "models, `diffusers_model.unfuse_lora()`); unmerging after a swap of merged weights would otherwise "
            "corrupt them."
        )

    pattern = re.compile(rf"(^|\.){re.escape(parameter_prefix)}\w*\.{re.escape(adapter_name)}(\.|$)")
    # `torch.compile(model)` puts a module in front of all names, through which attributes can be reached without it
    old_weights = {
        name.removeprefix("_orig_mod."): param
        for name, param in model.state_dict(keep_vars=True).items()
        if pattern.search(name)
    }
    # DoRA's magnitude is a module whose weight goes by the module's name in checkpoints
    state_dict = {
        name if name in old_weights or f"{name}.weight" not in old_weights else f"{name}.weight": new
        for name, new in state_dict.items()
    }
    unexpected = [name for name in state_dict if name not in old_weights]
    if unexpected:
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}."
        )
    for name, new in state_dict.items():
        if not _fits(old_weights[name], new):
            raise ValueError(
                f"Incompatible shapes found for LoRA weights {name}: {old_weights[name].shape} vs {new.shape}. "
                "Adapters that are swapped may only differ in their rank."
            )

    for name in old_weights.keys() - state_dict.keys():
        old_weights[name].zero_()
    for name, new in state_dict.items():
        layer_name = name[: pattern.search(name).start()]
        layer = attrgetter(layer_name)(model) if layer_name else model
        _swap_settings(layer, adapter_name, config, layer_name.removeprefix("base_model.model."))
        old = old_weights[name]
        if old.shape == new.shape or all(o >= n for o, n in zip(old.shape, new.shape, strict=True)):
            _fill(old, new.to(old.device), _groups(layer) if ".lora_A." in name else 1)
        else:
            # a larger rank needs another storage; a compiled model should have been prepared for it
            old.data = new.to(old)


def _swap_settings(layer: LoraLayer, adapter_name: str, config: LoraConfig, layer_name: str) -> None:
    """Give the adapter the rank, alpha and scaling that `config` has for this layer."""
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer_name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, layer_name), config.lora_alpha)
    layer.r[adapter_name], layer.lora_alpha[adapter_name] = rank, alpha
    _update_scaling(layer, adapter_name, alpha / (math.sqrt(rank) if config.use_rslora else rank))


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """ValueError if adapters with these configs cannot be swapped: other methods than LoRA, or different settings."""
    types = [config.peft_type for config in (config0, config1)]
    if types[0] != types[1]:
        raise ValueError(f"Incompatible PEFT types found: {types[0].value} and {types[1].value}")
    if types[0] not in CONFIG_KEYS_TO_CHECK:
        supported = ", ".join(peft_type.value for peft_type in CONFIG_KEYS_TO_CHECK)
        raise ValueError(f"Hotswapping only supports {supported} but {types[0].value} was passed.")
    values0, values1 = config0.to_dict(), config1.to_dict()
    for key in CONFIG_KEYS_TO_CHECK[types[0]]:
        if values0.get(key) != values1.get(key):
            raise ValueError(f"Configs are incompatible: for {key}, {values0.get(key)} != {values1.get(key)}")


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace a loaded LoRA adapter by one from a checkpoint; its name stays the same.

    Args:
        model: The PEFT model, compiled or not (see `prepare_model_for_compiled_hotswap`).
        model_name_or_path: Folder or hub repository of the new adapter.
        adapter_name: Name of the adapter to replace.
        torch_device: Device to load the new weights on; by default what `infer_device` finds.
        **kwargs: For loading config and weights, such as `subfolder`, `revision` and `token`.

    Raises:
        ValueError: if the configs are not compatible, or the adapter is merged.
        RuntimeError: if the new adapter has layers that the old one lacks.
    """
    names = ("subfolder", "revision", "cache_dir", "token")
    hub_kwargs = {name: kwargs.get(name) for name in names}
    if kwargs.get("use_auth_token"):
        hub_kwargs["use_auth_token"] = kwargs["use_auth_token"]
    config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftConfig._get_peft_type(model_name_or_path, **hub_kwargs)]
    config = config_cls.from_pretrained(model_name_or_path, **kwargs)
    check_hotswap_configs_compatible(model.active_peft_config, config)

    weights = load_peft_weights(model_name_or_path, device=torch_device or infer_device(), **kwargs)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    state_dict = _insert_adapter_name_into_state_dict(weights, adapter_name=adapter_name, parameter_prefix=prefix)
    hotswap_adapter_from_state_dict(
        model=model, state_dict=state_dict, adapter_name=adapter_name, parameter_prefix=prefix, config=config
    )
