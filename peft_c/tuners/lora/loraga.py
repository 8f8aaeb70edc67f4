"""LoRA-GA's preprocessing (https://arxiv.org/abs/2407.05000): the gradients its initialisation starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ._targets import first_device, load_cache, save_cache, targeted_linears
from .config import LoraConfig

_GRAD = "_peft_loraga_grad"


def get_target_modules(model: nn.Module, config: LoraConfig) -> Iterable[tuple[str, nn.Module]]:
    """Name and module of each nn.Linear and Conv1D that the config targets."""
    return targeted_linears(model, config)


def get_model_device(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return first_device(model)


@torch.no_grad()
def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], None], cache_file: str | None = None
) -> None:
    """Leave the mean gradient of its weight on every target layer, for `init_lora_weights="lora_ga"`.

    Args:
        model: The model that will be adapted; not quantised.
        lora_config: With `lora_ga_config` set. Missing target modules are filled in by architecture.
        train_step: Runs forward and backward, as often as it likes; gradients add up.
        cache_file: Where the gradients are read from, if it exists, or saved to.

    Raises:
        ValueError: without `lora_ga_config`, for unknown targets, quantised layers, or when nothing is targeted.
    """
    if lora_config.lora_ga_config is None:
        raise ValueError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...)."
        )
    if lora_config.target_modules is None:
        from .model import LoraModel

        known = LoraModel.target_module_mapping.get(LoraModel.get_model_config(model)["model_type"])
        if known is None:
            raise ValueError("Please specify `target_modules` in `peft_config`")
        lora_config.target_modules = set(known)
    for name, module in get_target_modules(model, lora_config):
        if hasattr(module, "quant_state"):
            raise ValueError(
                f"LoRA-GA does not support quantized models. Found quantized module: '{name}'. Its gradients need "
                "full precision."
            )

    cache = load_cache(cache_file, model)
    if cache is not None:
        for name, module in get_target_modules(model, lora_config):
            setattr(module, _GRAD, cache[f"{name}.{_GRAD}"])
        return
    estimate_gradients(model, lora_config, train_step)
    save_cache(
        cache_file,
        {
            f"{name}.{_GRAD}": getattr(module, _GRAD)
            for name, module in get_target_modules(model, lora_config)
            if hasattr(module, _GRAD)
        },
    )


def estimate_gradients(model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], None]) -> None:
    """Run `train_step` in training mode with only the target weights requiring grad, and leave each its mean gradient
    per backward pass. Modes, `requires_grad` and gradients are put back, whatever happens."""
    targets = [module for _, module in get_target_modules(model, lora_config)]
    if not targets:
        raise ValueError(
            "No supported layers found for LoRA-GA initialization. `target_modules` must cover at least one nn.Linear "
            "or Conv1D."
        )
    calls = dict.fromkeys(targets, 0)

    def count(module: nn.Module, grad_input: object, grad_output: object) -> None:
        calls[module] += 1

    modes = {module: module.training for module in model.modules()}
    trained = {param: param.requires_grad for param in model.parameters()}
    grads = {module: module.weight.grad for module in targets}
    handles = []
    try:
        model.train()
        for param in trained:
            param.requires_grad = False
        for module in targets:
            module.weight.requires_grad = True
            module.weight.grad = None
            handles.append(module.register_full_backward_hook(count))
        with torch.enable_grad():
            train_step()
        for module in targets:
            if calls[module]:
                setattr(module, _GRAD, module.weight.grad.detach() / calls[module])
    finally:
        for handle in handles:
            handle.remove()
        for module, grad in grads.items():
            module.weight.grad = grad
        for param, flag in trained.items():
            param.requires_grad = flag
        for module, mode in modes.items():
            module.training = mode
