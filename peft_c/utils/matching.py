"""Finding modules in a model by name: targets, patterns, the input embedding and what is tied to it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, last part of the name) of the module named `key`; AttributeError if there is none."""
    parent_name, _, name = key.rpartition(".")
    parent = model.get_submodule(parent_name)
    return parent, parent.get_submodule(name), name


def _get_submodules_with_grandparent(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module | None, nn.Module, str]:
    """(parent, grandparent, module, last part of the name); the root is the grandparent of its own children."""
    parent, target, name = _get_submodules(model, key)
    grandparent = model.get_submodule(".".join(key.split(".")[:-2]))
    return parent, grandparent, target, name


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether the module name `key` is `target_key` or ends with it at a dot."""
    return key == target_key or key.endswith(f".{target_key}")


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """Match a regular expression given as `target_modules` against the whole of a module name."""
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """The first of the patterns (keys of rank_pattern or alpha_pattern) that fits the module name.

    A pattern is a regular expression for the name or, at a dot, for its end. If none fits, the name itself is
    returned, under which a pattern dict has no entry.
    """
    return _first_match(pattern_keys, r"(.*\.)?({})$", key_to_match)


def get_end_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """As `get_pattern_key`, of methods whose patterns only fit what comes after a dot, and are put there as they are:
    of `a|b`, the first is the beginning of an end."""
    return _first_match(pattern_keys, r".*\.{}$", key_to_match)


def _first_match(patterns: Iterable[str], form: str, name: str) -> str:
    return next((pattern for pattern in patterns if re.match(form.format(pattern), name)), name)


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """Name of the module that `model.get_input_embeddings()` returns, or `default` if that cannot be found."""
    if not hasattr(model, "get_input_embeddings"):
        return default
    embedding = model.get_input_embeddings()
    return next((name for name, module in model.named_modules() if module is embedding), default)


def _get_module_names_tied_with_embedding(model: nn.Module) -> list[str]:
    """Sorted names of the modules whose weight is tied to the input embedding, the embedding itself not included.

    The names are those in the base model, with the wrappers an adapter has put around the weight. What is tied is read
    from `_tied_weights_keys`: a list of parameter names, or a dict from tied name to source name (transformers 5),
    which needs `get_input_embeddings` (else ValueError). Empty if there is no such attribute, or if the model's config
    has `tie_word_embeddings=False`.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if hasattr(model, "tuner_layer_cls"):
        model = model.model

    # the attribute says what the architecture can tie, the config whether this model does
    if getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False:
        return []
    keys = getattr(model, "_tied_weights_keys", None)
    if keys is None:
        return []
    if isinstance(keys, dict):
        keys = _names_tied_by_mapping(model)
    return sorted({key.rpartition(".")[0] for key in keys})


def _names_tied_by_mapping(model: nn.Module) -> list[str]:
    """Present names of the parameters that `{tied: source}` mappings of the model's modules tie to the embedding."""
    if not hasattr(model, "get_input_embeddings"):
        raise ValueError(
            "The supplied model implements `_tied_weights_keys` as a dict but doesn't implement "
            "'get_input_embeddings' so we can't determine which weights are tied to embeddings."
        )
    tied_to: dict[str, str] = {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        mapping = getattr(module, "_tied_weights_keys", None) or {}
        tied_to.update((prefix + name, prefix + source) for name, source in mapping.items())

    embedding_params = set(model.get_input_embeddings().parameters())
    names = {name for name, param in model.named_parameters(remove_duplicate=False) if param in embedding_params}
    # an adapter moves `x.weight` to `x.base_layer.weight` (a tuner layer) or `x.<wrapper>.base_layer.weight`
    present = {re.sub(r"[^.]+\.base_layer\.", "", name): name for name in names}
    present.update((name.replace("base_layer.", ""), name) for name in names)
    return [present.get(name, name) for name, source in tied_to.items() if present.get(source, source) in names]
