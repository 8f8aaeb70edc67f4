"""State dicts of adapters and of the base model under them, and the files that adapters are saved to."""

from __future__ import annotations

import copy
import os
import pickle
import re
import sys
import warnings
from collections import namedtuple
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys as LoadedKeys

from .. import _C, hub, import_utils
from ..mapping import PEFT_TYPE_TO_TUNER_MAPPING
from ..tuners.offloaded import onload, onload_adapters
from .constants import (
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from .integrations import TpInfo, dtensor_from_local_like
from .other import (
    AuxiliaryTrainingWrapper,
    check_file_exists_on_hf_hub,
    infer_device,
    match_target_against_key,
)
from .peft_types import PeftType
from .warning import PeftWarning

_PREFIX = "base_model.model."
_FSDP_PREFIX = "_fsdp_wrapped_module."
_IncompatibleKeys = namedtuple("IncompatibleKeys", ["missing_keys", "unexpected_keys"])


def _config_and_tuner(model: nn.Module, adapter_name: str):
    if adapter_name not in model.peft_config:
        raise KeyError(f"There is no adapter '{adapter_name}'. The adapters are {list(model.peft_config)}.")
    config = model.peft_config[adapter_name]
    if config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise ValueError(f"Unknown PEFT type passed: {config.peft_type}")
    return config, PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]


def _wrappers(model: nn.Module):
    """(name in the state dict, module) of the modules that are trained in full or in part beside the adapters."""
    from ..tuners.targets import outer_modules

    for name, module in outer_modules(model) if _C.find(model, AuxiliaryTrainingWrapper)[0] else ():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield name.removeprefix(_FSDP_PREFIX), module


# ------------------------------------------------------------------------------------------------------- state dict


def _filter_state_dict_for_adapter_name(
    state_dict: dict[str, torch.Tensor], unwanted_adapter_names: list[str]
) -> dict[str, torch.Tensor]:
    """The entries whose keys do not name one of the other adapters; keys without any adapter's name stay."""
    if not unwanted_adapter_names:
        return dict(state_dict)
    plain = {name for name in unwanted_adapter_names if "." not in name}
    dotted = [f".{name}." for name in unwanted_adapter_names if "." in name]

    def names_another(key: str) -> bool:
        return not plain.isdisjoint(key.split(".")[1:]) or any(name in f"{key}." for name in dotted)

    return {key: value for key, value in state_dict.items() if not names_another(key)}


def _validate_lora_adapter_state_dict(state_dict: dict[str, torch.Tensor], adapter_name: str = "default") -> None:
    """Warns about LoRA matrices that are no matrices or are empty: shards that were not gathered before saving."""
    bad = [
        f"{key}:{tuple(value.shape)}"
        for key, value in state_dict.items()
        if isinstance(value, torch.Tensor)
        and (".lora_A" in key or ".lora_B" in key)
        and not key.endswith(".bias")
        and (value.dim() < 2 or 0 in value.shape)
    ]
    if bad:
        more = f" (+{len(bad) - 3} more)" if len(bad) > 3 else ""
        warnings.warn(
            f"Adapter {adapter_name!r}: {len(bad)} LoRA tensor(s) have invalid shape: {', '.join(bad[:3])}{more}. "
            "Such tensors are shards of parameters that DeepSpeed ZeRO-3 or FSDP has partitioned, and cannot be "
            "loaded again. Save inside of deepspeed.zero.GatheredParameters([...], modifier_rank=None) or "
            "torch.distributed.fsdp.FullyShardedDataParallel.summon_full_params(model).",
            PeftWarning,
        )


def _get_tp_info(model: nn.Module) -> TpInfo | None:
    """How layers of the tensor parallelism without DTensor are sharded, or None."""
    if getattr(model, "_tp_plan", None) is None:
        return None
    infos = [module._tp_info for module in model.modules() if hasattr(module, "_tp_info")]
    plan = {key: value for info in infos for key, value in info.tp_plan.items()}
    return TpInfo(tp_plan=plan, device_mesh=infos[-1].device_mesh, tp_size=infos[-1].tp_size) if plan else None


def _gather_shards(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict with whole tensors in place of those that tensor parallelism has split."""
    info = _get_tp_info(model)
    if info is None and not (getattr(model, "_tp_size", None) and import_utils.is_transformers_dtensor_tp):
        return state_dict
    from transformers.integrations.tensor_parallel import gather_state_dict_for_save

    if info is None:  # DTensors know how they are split
        return gather_state_dict_for_save(state_dict, {}, None, None)
    prefix = "base_model." if getattr(model, "_is_prompt_learning", False) else _PREFIX
    plan = info.tp_plan
    if all(key.startswith(prefix) for key in state_dict):
        plan = {f"{prefix}{key}": value for key, value in plan.items()}
    return gather_state_dict_for_save(state_dict, plan, info.device_mesh, info.tp_size)


def has_valid_embedding_base_layer(layer: nn.Module) -> bool:
    """Whether `layer` is an adapter layer around a Linear or an Embedding."""
    return isinstance(getattr(layer, "base_layer", None), (nn.Linear, nn.Embedding))


def get_embedding_layer_name(model: nn.Module, layer: nn.Module, is_embedding_in_target_modules: bool) -> str | None:
    """The name in `model` of the base layer in `layer`, or of `layer` itself if embeddings are not targeted."""
    base_layer = getattr(layer, "base_layer", None)
    for name, module in model.named_modules():
        if module is base_layer or (module is layer and not is_embedding_in_target_modules):
            return name
    return None


def _targets_embeddings(model: nn.Module, config) -> bool:
    targets = getattr(config, "target_modules", None)
    if not targets or targets == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return False
    if not isinstance(targets, str):
        return any(name in targets for name in EMBEDDING_LAYER_NAMES)
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return any(
        name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES and match_target_against_key(targets, name)
        for name, _ in base_model.named_modules()
    )


def _was_resized(model: nn.Module, config) -> bool:
    """Whether the vocabulary is another than that of the model which the base model was loaded from."""
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    model_id = getattr(config, "base_model_name_or_path", None)
    if not model_id:
        return False
    found = os.path.exists(os.path.join(model_id, "config.json")) or check_file_exists_on_hf_hub(
        model_id, "config.json"
    )
    if found is None:
        warnings.warn(
            f"Could not find a config file in {model_id} - will assume that the vocabulary was not modified."
        )
    return bool(found and vocab_size) and vocab_size != type(model.config).from_pretrained(model_id).vocab_size


def _embedding_entries(
    model: nn.Module, config, state_dict: dict[str, torch.Tensor], save_embedding_layers: bool | Literal["auto"]
) -> dict[str, torch.Tensor]:
    """The entries of the input and output embeddings, if they are to be saved."""
    targeted = _targets_embeddings(model, config)
    if save_embedding_layers == "auto":
        trains_tokens = (
            config.peft_type == PeftType.TRAINABLE_TOKENS
            or getattr(config, "trainable_token_indices", None) is not None
        )
        if targeted and not trains_tokens:
            reason = "embedding layers found in `target_modules`."
        elif _was_resized(model, config):
            reason = "the embedding layer has been resized during finetuning."
        else:
            return {}
        warnings.warn(f"Setting `save_embedding_layers` to `True` as {reason}")
    elif not save_embedding_layers:
        return {}
    if not hasattr(model, "get_input_embeddings"):
        warnings.warn("Could not identify embedding layer(s) because the model is not a 🤗 transformers model.")
        return {}
    entries = {}
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if not targeted or has_valid_embedding_base_layer(layer):
            name = get_embedding_layer_name(model, layer, targeted)
            if name:
                module = model.get_submodule(name)
                with onload(module.modules()):
                    held = {f"{name}.{key}": value for key, value in module.state_dict().items()}
                given = {key: value for key, value in state_dict.items() if key.startswith(f"{name}.")}
                entries.update({key: held.get(key, value) if value.is_meta else value for key, value in given.items()})
    return entries


def get_peft_model_state_dict(
    model,
    state_dict=None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
):
    """The state dict of one adapter, as it is saved: without the base model, and without the adapter's name in keys.

    Args:
        model: a PeftModel, or any module with injected adapters and a `peft_config`; unwrapped from DDP or FSDP.
        state_dict: state dict to take the tensors from instead of the model's.
        adapter_name: name of the adapter.
        unwrap_compiled: look into a model that `torch.compile` has wrapped.
        save_embedding_layers: add the embeddings; "auto": when they are targeted or were resized.

    Raises `KeyError` for an unknown adapter.
    """
    from ..tuners.state_keys import state_dict_of

    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    config, tuner_cls = _config_and_tuner(model, adapter_name)
    others = [name for name in model.peft_config if name != adapter_name]
    with onload_adapters(model, adapter_name):
        whole = state_dict_of(model, adapter_name) if state_dict is None else state_dict
    if not config.is_prompt_learning:
        # Nothing is left for methods whose keys do not name the adapter.
        whole = _filter_state_dict_for_adapter_name(whole, others) or whole
    whole = _gather_shards(model, whole)
    result = tuner_cls._get_adapter_state_dict(
        model=model, config=config, adapter_name=adapter_name, state_dict=whole, unwanted_adapter_names=others
    )
    for name, wrapper in _wrappers(model):
        if adapter_name not in wrapper._adapters:
            continue
        own = {key.removeprefix(f"{name}."): value for key, value in whole.items() if key.startswith(f"{name}.")}
        result.update({f"{name}.{k}": v for k, v in wrapper.adapter_state_dict(adapter_name, own).items()})
    result.update(_embedding_entries(model, config, whole, save_embedding_layers))
    result = {tuner_cls._remove_adapter_name_from_key(key, adapter_name): value for key, value in result.items()}
    if state_dict is None and config.peft_type in (PeftType.LORA, PeftType.ADALORA):
        _validate_lora_adapter_state_dict(result, adapter_name=adapter_name)
    return result


def _insert_adapter_name_into_state_dict(
    state_dict: dict[str, torch.Tensor], adapter_name: str, parameter_prefix: str
) -> dict[str, torch.Tensor]:
    """Puts the adapter's name behind the parameter's name in keys that contain `parameter_prefix`:
    `lora_A.weight` becomes `lora_A.<adapter>.weight`, `lora_E` becomes `lora_E.<adapter>`."""

    def renamed(key: str) -> str:
        head, prefix, tail = key.rpartition(parameter_prefix)
        name, dot, leaf = tail.partition(".")
        return f"{head}{prefix}{name}.{adapter_name}{dot}{leaf}" if prefix else key

    return {renamed(key): value for key, value in state_dict.items()}


def _tensor_at(module: nn.Module, key: str) -> torch.Tensor | None:
    """The parameter or buffer that the state dict has under `key`, if there is one."""
    *path, leaf = key.split(".")
    for part in path:
        module = module._modules.get(part)
        if module is None:
            return None
    return module._parameters.get(leaf, module._buffers.get(leaf))


def _mismatches(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> list[tuple[str, torch.Size, torch.Size]]:
    """(key, shape in the checkpoint, shape in the model) of entries that do not fit."""
    found = []
    for key, value in state_dict.items():
        target = _tensor_at(model, key)
        if not (isinstance(target, torch.Tensor) and isinstance(value, torch.Tensor)) or target.shape == value.shape:
            continue
        # Two 4-bit values share a byte; torch takes one element for a scalar.
        packed = target.dim() > 0 and target.shape[-1] == 1 and 2 * target.numel() == value.numel()
        scalar = target.dim() == 0 and value.dim() == 1 and value.numel() == 1
        if not packed and not scalar:
            found.append((key, value.shape, target.shape))
    return found


def _find_mismatched_keys(
    model: nn.Module, peft_model_state_dict: dict[str, torch.Tensor], ignore_mismatched_sizes: bool = False
) -> tuple[dict[str, torch.Tensor], list[tuple[str, torch.Size, torch.Size]]]:
    """Takes the entries that do not fit out of the state dict, if they are to be ignored, and returns both."""
    found = _mismatches(model, peft_model_state_dict) if ignore_mismatched_sizes else []
    for key, _, _ in found:
        del peft_model_state_dict[key]
    return peft_model_state_dict, found


def _reshard_dtensor_values_for_load(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Splits tensors for parameters that are DTensors. Whole tensors and this rank's part of one are accepted."""
    from transformers.distributed.sharding_utils import DtensorShardOperation
    from transformers.distributed.utils import is_dtensor

    for key, value in state_dict.items():
        like = _tensor_at(model, key)
        if like is None or not is_dtensor(like) or is_dtensor(value):
            continue
        if value.shape == like.shape:
            value = DtensorShardOperation(like).shard_tensor(value)
        elif value.shape != like._local_tensor.shape:
            continue
        state_dict[key] = dtensor_from_local_like(value, like)
    return state_dict


def _maybe_shard_state_dict_for_tp(model: nn.Module, state_dict: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Splits, in place, the LoRA weights that belong to layers split by the tensor parallelism without DTensor."""
    from ..tuners.lora.layer import LoraLayer

    split = [
        (name, module, module.get_base_layer())
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and getattr(module.get_base_layer(), "_hf_tp_plan", None) is not None
        and getattr(module.get_base_layer(), "_hf_device_mesh", None) is not None
    ]
    if not split or not state_dict:
        return
    from transformers.integrations.tensor_parallel import (
        ALL_PARALLEL_STYLES,
        ColwiseParallel,
        EmbeddingParallel,
        RowwiseParallel,
    )

    def prefix_of(key: str) -> str:
        return next((prefix for prefix in (_PREFIX, "base_model.") if key.startswith(prefix)), "")

    key_prefix = prefix_of(next(iter(state_dict)))
    infix = f".{adapter_name}" if any(adapter_name in key for key in state_dict) else ""
    for name, module, base_layer in split:
        style = copy.deepcopy(ALL_PARALLEL_STYLES[base_layer._hf_tp_plan])
        style.device_mesh = base_layer._hf_device_mesh
        style.rank = style.device_mesh.get_local_rank()

        def shard(weight: torch.Tensor, style=style, device=base_layer.weight.device) -> torch.Tensor:
            style.empty_param = weight  # the shape that is split
            return style.shard_tensor(weight, device=device)

        name = key_prefix + name.removeprefix(prefix_of(name))
        if isinstance(style, ColwiseParallel):
            key = f"{name}.lora_B{infix}.weight"
        elif isinstance(style, RowwiseParallel):
            key = f"{name}.lora_A{infix}.weight"
        elif isinstance(style, EmbeddingParallel):
            base_key, key = f"{name}.base_layer.weight", f"{name}.lora_embedding_A{infix}"
            if base_key in state_dict:
                state_dict[base_key] = shard(state_dict[base_key])
            state_dict[key] = shard(state_dict[key].T).T  # (rank, tokens): tokens are split
            continue
        else:
            raise TypeError(
                f"Unknown tensor parallel plan {base_layer._hf_tp_plan} for {type(module).__name__} '{name}'."
            )
        state_dict[key] = shard(state_dict[key])


def _keys_for_model(
    model: nn.Module, state_dict: dict[str, torch.Tensor], adapter_name: str
) -> dict[str, torch.Tensor]:
    """A checkpoint's entries under the keys that they have in the model."""
    config, tuner_cls = _config_and_tuner(model, adapter_name)
    state_dict = dict(state_dict)
    given = dict(state_dict)
    is_transformers = "transformers" in sys.modules and hasattr(getattr(model, "config", None), "model_type")
    if is_transformers and import_utils.is_transformers_ge_v5:
        from .transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

        state_dict = convert_peft_adapter_state_dict_for_transformers(
            model=model, peft_config=config, adapter_state_dict=state_dict, adapter_name=adapter_name
        )
    for name, wrapper in _wrappers(model):
        if adapter_name not in wrapper._adapters:
            continue
        for saved, stored in wrapper.adapter_state_dict_load_map(adapter_name).items():
            if f"{name}.{saved}" not in given:
                raise KeyError(
                    f"{name}.{saved} is missing in the checkpoint of adapter '{adapter_name}': its configuration "
                    f"({type(wrapper).__name__}) says that '{name}' was trained and saved."
                )
            state_dict.pop(f"{name}.{saved}", None)
            state_dict[f"{name}.{stored}"] = given[f"{name}.{saved}"]
    state_dict = tuner_cls._remap_adapter_state_dict_for_load(
        model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
    )
    if not any(name.startswith(_PREFIX) for name, _ in model.named_parameters()):
        state_dict = {key.removeprefix(_PREFIX): value for key, value in state_dict.items()}
    return state_dict


def set_peft_model_state_dict(
    model,
    peft_model_state_dict,
    adapter_name="default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
):
    """Loads the state dict of an adapter, as `get_peft_model_state_dict` returns it, into an adapter of the model.

    Args:
        model: a PeftModel, or any module with injected adapters and a `peft_config`.
        peft_model_state_dict: the state dict; it is not changed.
        adapter_name: name of the adapter in the model.
        ignore_mismatched_sizes: leave out entries of other shapes, with a warning.
        low_cpu_mem_usage: must be true when the adapter's parameters are on the meta device.

    Returns torch's named tuple with `missing_keys` and `unexpected_keys`. Raises, before anything is loaded,
    `KeyError` for an unknown adapter or a missing entry of a fully trained module, `RuntimeError` for other shapes.
    """
    return load_adapter_state(model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes, low_cpu_mem_usage)


def _load_directly(model: nn.Module, state_dict: dict[str, torch.Tensor], assign: bool) -> bool:
    """Does what `model.load_state_dict` does to the modules that hold these entries, without visiting the others.

    Returns False, with nothing done, if an entry has no place in the model or a module above it has hooks.
    """
    from ..tuners.state_keys import overrides

    if overrides(model, "load_state_dict"):
        return False
    found: dict[str, nn.Module | None] = {"": model}

    def module_at(path: str) -> nn.Module | None:
        if path not in found:
            parent, _, name = path.rpartition(".")
            above = module_at(parent)
            found[path] = above and above._modules.get(name)
        module = found[path]
        if module is not None and (module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks):
            found[path] = None
        return found[path]

    entries: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state_dict.items():
        path, _, leaf = key.rpartition(".")
        module = module_at(path)
        if module is None or (leaf not in module._parameters and leaf not in module._buffers):
            return False
        entries.setdefault(path, {})[key] = value
    errors: list[str] = []
    for path, own in entries.items():
        metadata = {"assign_to_params_buffers": True} if assign else {}
        found[path]._load_from_state_dict(own, f"{path}." if path else "", metadata, False, [], [], errors)
    if errors:
        raise RuntimeError("\n\t".join([f"Error(s) in loading state_dict for {type(model).__name__}:", *errors]))
    return True


def load_adapter_state(
    model: nn.Module,
    adapter_state: dict[str, torch.Tensor],
    adapter_name: str,
    ignore_mismatched_sizes: bool,
    low_cpu_mem_usage: bool,
    missing_of_model: bool = True,
):
    """`set_peft_model_state_dict`, which reports all missing keys of the model. Without `missing_of_model` it reports
    those of the adapter, so that the cost does not depend on how many adapters there are."""
    from ..tuners.state_keys import adapter_entries
    from ..tuners.targets import outer_modules

    config, _ = _config_and_tuner(model, adapter_name)
    state_dict = _keys_for_model(model, adapter_state, adapter_name)
    if "transformers.distributed" in sys.modules and import_utils.is_transformers_dtensor_tp:
        state_dict = _reshard_dtensor_values_for_load(model, state_dict)
    mismatches = _mismatches(model, state_dict)
    if mismatches and not ignore_mismatched_sizes:
        errors = "".join(
            f"\n\tsize mismatch for {key}: copying a param with shape {given} from checkpoint, the shape in current "
            f"model is {wanted}."
            for key, given, wanted in mismatches
        )
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(model).__name__}, adapter '{adapter_name}' (was it made for "
            f"this base model, and with this configuration?):{errors}"
        )
    for key, _, _ in mismatches:
        del state_dict[key]

    with onload_adapters(model, adapter_name):
        if not missing_of_model and _load_directly(model, state_dict, low_cpu_mem_usage):
            missing = [key for key in adapter_entries(model, adapter_name) if key not in state_dict]
            result = LoadedKeys(missing, [])
        else:
            result = model.load_state_dict(state_dict, strict=False, **({"assign": True} if low_cpu_mem_usage else {}))
    if low_cpu_mem_usage:
        for _, module in outer_modules(model, into_base_layers=True):
            if hasattr(module, "_move_adapter_to_device_of_base_layer"):
                module._move_adapter_to_device_of_base_layer(adapter_name)
    if config.is_prompt_learning:
        model.prompt_encoder[adapter_name]._load_adapter_state_dict(state_dict)
    if mismatches:
        skipped = "\n".join(
            f"- {key}: found shape {given} in the checkpoint and {wanted} in the model instantiated"
            for key, given, wanted in mismatches
        )
        warnings.warn(
            f"Some weights of {type(model).__name__} were not initialized from the model checkpoint and are being "
            f"ignored because you passed `ignore_mismatched_sizes=True`: {skipped}."
        )
    return result


# ------------------------------------------------------------------------------------------------------------ files


def torch_load(*args, weights_only=True, **kwargs):
    """`torch.load`, which does not run code from the file unless asked to."""
    return torch.load(*args, weights_only=weights_only, **kwargs)


def _find_weights(model_id: str, subfolder: str | None, download: dict[str, Any]) -> str:
    """The path of the adapter's weights: safetensors before pickle, the folder `model_id` before the Hub."""
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    for name in names:
        path = hub.local_file(model_id, name, subfolder)
        if path is not None:
            return path
    where = os.path.join(model_id, subfolder) if subfolder else model_id
    message = (
        f"Can't find weights for {model_id} in {where} or in the Hugging Face Hub. Please check that the file "
        f"{WEIGHTS_NAME} or {SAFETENSORS_WEIGHTS_NAME} is present at {where}."
    )
    if os.path.isdir(model_id):
        raise ValueError(message)
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE:  # a miss is then reported as what it is, not as a broken connection
        download["local_files_only"] = True
    for name in names:
        try:
            return hub.download_file(model_id, name, subfolder=subfolder, **download)
        except (EntryNotFoundError, LocalEntryNotFoundError) as exc:
            reason = exc
    if isinstance(reason, LocalEntryNotFoundError):  # the Hub was not asked, or did not answer
        raise reason
    raise ValueError(message) from reason


def _is_device(device: Any) -> bool:
    try:
        return bool(torch.device(device))
    except RuntimeError:
        return False


def _read_weights(path: str, device: str | torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a file. One that cannot be read raises a `ValueError` that has the reader's own type as well."""
    import safetensors
    from safetensors.torch import load_file

    kind, errors = "torch.save", (pickle.UnpicklingError, EOFError, RuntimeError)
    if path.endswith(".safetensors"):
        kind, errors = "safetensors", (safetensors.SafetensorError,)
    try:
        if kind == "safetensors":
            return load_file(path, device="cpu" if str(device).startswith("mps") else device)
        return torch_load(path, map_location=torch.device(device))
    except errors as exc:
        if not _is_device(device):
            raise
        unreadable = type("UnreadableWeights", (ValueError, type(exc)), {"__module__": __name__})
        raise unreadable(
            f"The adapter weights '{path}' ({os.path.getsize(path)} bytes) cannot be read as a {kind} file; it is "
            f"truncated, corrupt, or something else: {type(exc).__name__}: {exc}"
        ) from exc


def load_peft_weights(
    model_id: str, device: str | None = None, key_mapping: dict[str, str] | None = None, **hf_hub_download_kwargs
) -> dict:
    """Reads the weights of a saved adapter from a folder or a Hub repository.

    Args:
        model_id: folder or repository.
        device: where the tensors go; the first accelerator, or the CPU, by default.
        key_mapping: regular expression -> replacement; the first that matches is applied to each key, without the
            "base_model.model." in front of it.
        hf_hub_download_kwargs: arguments of `hf_hub_download`, `subfolder` among them.

    Raises `ValueError` when the file is missing or cannot be read.
    """
    download = dict(hf_hub_download_kwargs)
    path = _find_weights(model_id, download.pop("subfolder", None), download)
    weights = _read_weights(path, infer_device() if device is None else device)
    if not key_mapping:
        return weights
    renamed = {}
    for key, value in weights.items():
        prefix = next((prefix for prefix in (_PREFIX, "base_model.") if key.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(
                "An error occurred while trying to load a PEFT state_dict with key_mapping: the key "
                f"'{key}' in '{path}' does not start with base_model."
            )
        name = key.removeprefix(prefix)
        for pattern, replacement in key_mapping.items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        renamed[prefix + name] = value
    return renamed


# ------------------------------------------------------------------------------------------------------- base model


def _original_key(root: nn.Module, key: str) -> str | None:
    """The key that `key` of the state dict of `root` had before adapters were injected; None if it is an adapter's."""
    from ..tuners.tuners_utils import BaseTunerLayer

    module, original, parts = root, [], key.split(".")
    for i, part in enumerate(parts):
        child = module._modules.get(part)
        if isinstance(module, BaseTunerLayer):
            if part != "base_layer":
                return None
        elif isinstance(module, AuxiliaryTrainingWrapper):
            if part != "original_module" and not isinstance(child, BaseTunerLayer):
                return None
        elif child is None:
            return ".".join(original + parts[i:])
        else:
            original.append(part)
        module = child
    return ".".join(original)


def get_base_model_state_dict(model) -> dict[str, torch.Tensor]:
    """The state dict of a PeftModel's base model, with the keys and entries that it had without adapters."""
    if model._is_prompt_learning:
        return dict(model.base_model.state_dict())
    root = model.base_model.model
    pairs = ((_original_key(root, key), value) for key, value in root.state_dict().items())
    return {key: value for key, value in pairs if key is not None}


def set_base_model_state_dict(model, state_dict: dict[str, torch.Tensor], strict: bool = True):
    """Loads a state dict with the keys of the model without adapters into a PeftModel's base model.

    Returns a named tuple with `missing_keys` and `unexpected_keys`; with `strict`, `RuntimeError` when there are any.
    """
    if model._is_prompt_learning:
        return model.base_model.load_state_dict(state_dict, strict=strict)
    root = model.base_model.model
    current: dict[str, str] = {}
    for key in root.state_dict():
        original = _original_key(root, key)
        if original is not None:
            current[original] = key
    missing = [key for key in current if key not in state_dict]
    unexpected = [key for key in state_dict if key not in current]
    if strict and (missing or unexpected):
        errors = [f"Missing key(s) in state_dict: {missing}"] if missing else []
        errors += [f"Unexpected key(s) in state_dict: {unexpected}"] if unexpected else []
        raise RuntimeError("Error(s) in loading state_dict:\n\t" + "\n\t".join(errors))
    root.load_state_dict({current[key]: value for key, value in state_dict.items() if key in current}, strict=False)
    return _IncompatibleKeys(missing_keys=missing, unexpected_keys=unexpected)
