"""Loading adapters into a model that accelerate keeps on several devices, partly on the CPU or on disk."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from .tuners.tuners_utils import BaseTunerLayer

_PREFIX = "base_model.model."


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps some of the model on the CPU or on disk."""
    device_map = getattr(model, "hf_device_map", None)
    return device_map is not None and not {"cpu", "disk"}.isdisjoint(device_map.values())


def detach_hooks(model: nn.Module) -> None:
    """Removes accelerate's hooks when the model is offloaded, so that its modules can be replaced."""
    if is_offloaded(model):
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(model)


def disk_index(model: nn.Module, use_safetensors: bool) -> dict[str, dict[str, str]] | None:
    """Where each weight that is on disk lies in which file, read from the hooks before they are removed; None when
    nothing is on disk. Raises `ValueError` when the files are not to be safetensors."""
    if not hasattr(model, "hf_device_map"):
        return None
    from accelerate.utils import named_module_tensors

    on_disk, files = set(), None
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if hasattr(hook, "original_devices"):
            dataset = getattr(hook.weights_map, "dataset", None)
            files = files if dataset is None else dataset.index
            on_disk |= {f"{name}.{key}" for key, device in hook.original_devices.items() if device.type == "meta"}
    if on_disk and not use_safetensors:
        raise ValueError("Disk offloading currently only supported for safetensors")
    if not files:
        return None
    return {
        name: {
            "safetensors_file": files[name]["safetensors_file"],
            "weight_name": name,
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
        for name, tensor in named_module_tensors(model, recurse=True)
        if name in on_disk
    }


def _inner(modules: dict[str, nn.Module], module_name: str) -> str:
    """The name of a base module once adapters are injected: that of the base layer when it has become a layer."""
    return module_name + ".base_layer" if isinstance(modules[module_name], BaseTunerLayer) else module_name


def _beside(path: str) -> str:
    """The path of the copy: `-peft` is appended to the first folder of the path that names a model repository."""
    parts = path.split(os.sep)
    for i, part in enumerate(parts):
        if "--" in part:
            parts[i] += "-peft"
            break
    return os.path.join(*parts)


def update_offload_index(
    model: nn.Module, index: dict[str, dict[str, str]] | None, adapter_weights: dict[str, torch.Tensor]
) -> None:
    """Renames the entries of `index`, in place, to the keys that the weights have now, and writes copies of the files
    with the adapter's weights in them."""
    if not index:
        return
    from safetensors import safe_open
    from safetensors.torch import save_file

    modules = dict(model.named_modules())
    for adapter_name in list(model.peft_config):
        block = next(iter(index)).split(".")[0] + "."
        for key in list(index):
            owner, _, leaf = key.rpartition(".")
            entry = index.pop(key)
            entry["weight_name"] = f"{_inner(modules, _PREFIX + owner)}.{leaf}"
            index[entry["weight_name"]] = entry
        done: set[str] = set()
        for path in [entry["safetensors_file"] for entry in index.values()]:
            target = _beside(path)
            if path in done or target in done:
                continue
            done.add(target)
            tensors: dict[str, torch.Tensor] = {}
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                for key in file.keys():
                    owner, _, leaf = key.rpartition(".")
                    # Files of some models leave out the name of the outermost container.
                    name = _PREFIX + block + owner if _PREFIX + block + owner in modules else _PREFIX + owner
                    tensors[f"{_inner(modules, name)}.{leaf}"] = file.get_tensor(key)
                    if isinstance(modules[name], BaseTunerLayer):
                        for adapter_key, value in adapter_weights.items():
                            if name in adapter_key:
                                stem, _, suffix = adapter_key.rpartition(".")
                                tensors[f"{stem}.{adapter_name}.{suffix}"] = value
            for key in tensors:
                index[key] = {"safetensors_file": target, "weight_name": key}
            os.makedirs(os.path.dirname(target), exist_ok=True)
            save_file(tensors, target, metadata=metadata)


def redispatch(
    model: nn.Module, adapter_name: str, adapter_weights: dict[str, torch.Tensor], options: dict[str, Any]
) -> None:
    """Distributes the model with its first adapter over the devices again.

    `options`: device_map, max_memory, offload_dir or offload_folder (not both, `ValueError`), offload_index.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
    from accelerate.utils import get_balanced_memory

    device_map, max_memory = options.get("device_map", "auto"), options.get("max_memory")
    folder, index = options.get("offload_dir"), options.get("offload_index")
    if folder is not None and options.get("offload_folder") is not None:
        raise ValueError("Cannot use `offload_folder` when `offload_dir` is specified.")
    whole = model._no_split_modules
    whole = list(whole) if isinstance(whole, set) else whole
    if device_map != "sequential":
        max_memory = get_balanced_memory(
            model,
            max_memory=max_memory,
            no_split_module_classes=whole,
            low_zero=device_map == "balanced_low_0",
        )
    if isinstance(device_map, str):
        device_map = infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=whole)
    update_offload_index(model, index, adapter_weights)
    dispatch_model(
        model,
        device_map=device_map,
        offload_dir=options.get("offload_folder") if folder is None else folder,
        offload_index=index,
    )
    if model.peft_config[adapter_name].is_prompt_learning:
        remove_hook_from_submodules(model.prompt_encoder)
    add_hook_to_module(model.get_base_model(), AlignDevicesHook(io_same_device=True))
