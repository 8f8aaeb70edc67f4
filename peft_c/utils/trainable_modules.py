"""Putting the auxiliary wrappers of a config (modules_to_save, trainable_token_indices) around a model's modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from .aux_wrappers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from .matching import (
    _get_input_embeddings_name,
    _get_module_names_tied_with_embedding,
    _get_submodules_with_grandparent,
)


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freeze every parameter whose name contains the adapter's."""
    for name, param in model.named_parameters():
        if adapter_name in name:
            param.requires_grad = False


def _is_container_of_adapters(model: nn.Module, name: str) -> bool:
    """Whether the module of that name is where a tuner layer keeps its adapters' values, as `delora_w_norm`."""
    from ..tuners.tuners_utils import BaseTunerLayer

    parent, _, last = name.rpartition(".")
    layer = model.get_submodule(parent)
    return isinstance(layer, BaseTunerLayer) and last in (*layer.adapter_layer_names, *layer.other_param_names)


def _set_trainable(
    model: nn.Module,
    adapter_name: str,
    module_names: Iterable[str] | None,
    inference_mode: bool,
    strict_module_check: bool = False,
    wrapper_cls: type[AuxiliaryTrainingWrapper] | None = None,
    activate_adapter: bool = True,
    **wrapper_kwargs: Any,
) -> list[nn.Module] | None:
    """Wrap the modules whose names end with one of `module_names`; wrappers that are there get the adapter added.

    Args:
        model: The model to change.
        adapter_name: The adapter to add.
        module_names: Ends of module names. None or empty: nothing happens.
        inference_mode: Whether the adapter is frozen.
        strict_module_check: Whether it is a ValueError if no module is found.
        wrapper_cls: `ModulesToSaveWrapper` by default.
        activate_adapter: Whether new wrappers have the adapter active.
        **wrapper_kwargs: For the wrapper.

    Returns:
        The new wrappers.

    Raises:
        ValueError: if a found module lies within a tuner layer, which happens if the adapter is named like a target.
    """
    from ..tuners.tuners_utils import BaseTunerLayer

    if not module_names:
        return None
    wrapper_cls = wrapper_cls or ModulesToSaveWrapper
    endings = tuple(module_names)

    # names are collected first, as wrapping adds some; tied modules are found under each of their names
    found = [name for name, _ in model.named_modules(remove_duplicate=False) if name.endswith(endings)]
    found = [name for name in found if not _is_container_of_adapters(model, name)]
    if strict_module_check and not found:
        raise ValueError(
            f"Target modules {set(endings)} not found in the base model. "
            "Please check the target modules and try again."
        )
    new_wrappers: list[nn.Module] = []
    for key in found:
        parent, grandparent, target, target_name = _get_submodules_with_grandparent(model, key)
        if isinstance(grandparent, BaseTunerLayer):
            raise ValueError(
                f"You are trying to target a module with {wrapper_cls} that is a child of {type(grandparent)}. "
                "This is almost certainly not the intended behavior. Please ensure that the adapter name, "
                f"'{adapter_name}', does not conflict with any of the targeted modules."
            )
        # a tied weight that was wrapped before may be found as the base layer within its wrapper
        wrapper = next((module for module in (grandparent, target) if isinstance(module, wrapper_cls)), None)
        if wrapper is not None:
            wrapper.update(adapter_name, **wrapper_kwargs)
            wrapper.set_adapter(wrapper.active_adapter, inference_mode=inference_mode)
            continue
        wrapper = wrapper_cls(target, adapter_name, **wrapper_kwargs)
        wrapper.set_adapter(adapter_name if activate_adapter else [], inference_mode=inference_mode)
        setattr(parent, target_name, wrapper)
        new_wrappers.append(wrapper)
    return new_wrappers


def set_additional_trainable_modules(
    model: nn.Module, peft_config: Any, model_config: dict, adapter_name: str, activate_adapter: bool = True
) -> None:
    """Wrap what the config wants trained beside the adapter: `modules_to_save`, then `trainable_token_indices`.

    `activate_adapter=False` leaves the adapter inactive, as when another one is added. ValueError if an embedding is
    in both, or if tied layers are given different tokens although the config wants to ensure weight tying.
    """
    common = {"inference_mode": peft_config.inference_mode, "activate_adapter": activate_adapter}
    modules_to_save = getattr(peft_config, "modules_to_save", None)
    if modules_to_save is not None:
        _set_trainable(model, adapter_name, module_names=modules_to_save, **common)

    modules_to_tie = getattr(peft_config, "modules_to_tie", None)
    if modules_to_tie is not None:
        # the embedding has just been wrapped, see `_add_modules_to_save_to_tie` of the tuner
        tied_module = model.get_input_embeddings().modules_to_save[adapter_name]
        _set_trainable(model, adapter_name, module_names=modules_to_tie, tied_module=tied_module, **common)

    if getattr(peft_config, "trainable_token_indices", None) is not None:
        _set_trainable_tokens(model, peft_config, model_config, adapter_name, common)


def _set_trainable_tokens(
    model: nn.Module, peft_config: Any, model_config: dict, adapter_name: str, common: dict[str, bool]
) -> None:
    """Wrap the embeddings in `trainable_token_indices`, and what is tied to the input embedding along with it."""
    targets = peft_config.trainable_token_indices
    if not isinstance(targets, dict):
        targets = {_get_input_embeddings_name(model, "embed_tokens"): targets}
    for name in targets:
        if name in (getattr(peft_config, "modules_to_save", None) or ()):
            raise ValueError(
                "The embedding layer is already marked to be trained fully, either specify "
                f'`modules_to_save=[..., "{name}", ...]` or '
                f"`trainable_tokens={{'{name}': x}}` but not both."
            )

    weights_tied = model_config.get("tie_word_embeddings", False)
    ensure_tying = getattr(peft_config, "ensure_weight_tying", False)
    tied_names = set(_get_module_names_tied_with_embedding(model)) if weights_tied and len(targets) > 1 else set()
    tied_targets = _tied_targets(model, targets, tied_names) if tied_names else []
    same_indices = all(targets[name] == targets[tied_targets[0]] for name in tied_targets)
    if ensure_tying and not same_indices:
        conflicts = ", ".join(f"{name}: {targets[name]}" for name in tied_targets)
        raise ValueError(
            "Cannot ensure weight tying when different token indices are specified for tied layers. "
            f"Conflicting layers: {conflicts}. "
            "Please use the same indices for all tied layers or set ensure_weight_tying=False."
        )
    # tied layers with the same tokens are wrapped below, together with those that are not among the targets
    follows_embedding = tied_names.intersection(tied_targets) if same_indices and len(tied_targets) > 1 else set()
    for name, token_indices in targets.items():
        if name not in follows_embedding:
            _set_trainable(
                model,
                adapter_name,
                module_names=[name],
                strict_module_check=True,
                wrapper_cls=TrainableTokensWrapper,
                token_indices=token_indices,
                **common,
            )

    if not weights_tied:
        if ensure_tying:
            warnings.warn(
                "ensure_weight_tying=True but the model does not have tied weights "
                "(tie_word_embeddings=False). Weight tying will not be applied for trainable_token_indices."
            )
        return
    embedding = model.get_input_embeddings()
    if isinstance(embedding, TrainableTokensWrapper) and same_indices:
        token_adapter = embedding.token_adapter
        _set_trainable(
            model,
            adapter_name,
            module_names=_get_module_names_tied_with_embedding(model),
            strict_module_check=True,
            wrapper_cls=TrainableTokensWrapper,
            token_indices=token_adapter.token_indices[adapter_name],
            tied_adapter=token_adapter,
            **common,
        )


def _tied_targets(model: nn.Module, targets: Iterable[str], tied_names: set[str]) -> list[str]:
    """Those of the target names that mean the input embedding or one of the modules tied to it."""
    embedding_name = _get_input_embeddings_name(model) or ""

    def is_tied(target: str) -> bool:
        return embedding_name.endswith(target) or any(
            name.endswith(target) or target in name.split(".") for name in tied_names
        )

    return [target for target in targets if is_tied(target)]
