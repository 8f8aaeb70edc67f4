"""Starting cartridges and prefixes from a cache or a text, and putting saved cartridges one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig
from ..utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..utils.peft_types import PeftType
from ..utils.save_and_load import load_peft_weights


def _pairs(past_key_values: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, whatever kind of cache it is."""
    if not isinstance(past_key_values, (tuple, list)) and callable(getattr(past_key_values, "to_legacy_cache", None)):
        past_key_values = past_key_values.to_legacy_cache()
    try:
        return [(layer[0], layer[1]) for layer in past_key_values]
    except (TypeError, IndexError) as exc:
        raise TypeError(
            "Unsupported `past_key_values` type. Expected a legacy tuple/list, an object with `to_legacy_cache()`, or "
            f"an iterable of (key, value) tuples, got {type(past_key_values).__name__}."
        ) from exc


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> torch.Tensor:
    """The first tokens of a cache as a prefix, (num_virtual_tokens, num_layers * 2 * heads * head_dim).

    Args:
        past_key_values: keys and values of each layer, (1, heads, tokens, head_dim).
        num_virtual_tokens: how many tokens.

    Raises `ValueError` for an empty cache, a batch, too few tokens, or layers of different shapes; `TypeError` for
    what is not a cache.
    """
    layers = _pairs(past_key_values)
    if not layers:
        raise ValueError("Empty `past_key_values`.")
    first = layers[0][0]
    if first.ndim != 4:
        raise ValueError(f"Expected key/value tensors with rank 4, got key.ndim={first.ndim}.")
    batch, heads, length, head_dim = first.shape
    if batch != 1:
        raise ValueError(
            f"This helper expects `past_key_values` from a single-sequence prefill (batch=1). Got batch={batch}."
        )
    if length < num_virtual_tokens:
        raise ValueError(f"Need at least {num_virtual_tokens} cached tokens, got {length}.")
    states = [state for layer in layers for state in layer]
    for state in states:
        if state.shape[:2] != (1, heads):
            raise ValueError("Inconsistent head shapes across layers in `past_key_values`.")
        if state.shape[2] < num_virtual_tokens:
            raise ValueError("Not enough cached tokens in `past_key_values` for the requested cartridge length.")
        if state.shape[3] != head_dim:
            raise ValueError("Inconsistent head_dim across layers in `past_key_values`.")
    tokens = [state[0, :, :num_virtual_tokens].transpose(0, 1) for state in states]
    return torch.stack(tokens, dim=1).reshape(num_virtual_tokens, -1)


def _prefix_config(model: nn.Module, adapter_name: str) -> PeftConfig:
    config = model.peft_config[adapter_name]
    if config.peft_type not in (PeftType.CARTRIDGE, PeftType.PREFIX_TUNING):
        raise ValueError(
            f"Adapter '{adapter_name}' must be a CARTRIDGE or PREFIX_TUNING adapter (got {config.peft_type})."
        )
    if getattr(config, "prefix_projection", False):
        raise ValueError(
            "Initialization from KV cache is not supported for prefix tuning with `prefix_projection=True`."
        )
    return config


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> torch.Tensor:
    """Starts a cartridge or a prefix from a cache.

    Args:
        model: the PeftModel.
        adapter_name: the adapter, by default the active one.
        past_key_values: the cache, see `prompt_embeddings_from_past_key_values`.
        num_virtual_tokens: how many of its tokens, by default as many as the adapter has.

    Returns the prefix that was loaded. Raises `ValueError` for another kind of adapter and for a cache that does not
    fit.
    """
    adapter_name = model.active_adapter if adapter_name is None else adapter_name
    config = _prefix_config(model, adapter_name)
    length = config.num_virtual_tokens if num_virtual_tokens is None else num_virtual_tokens
    prefix = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=length)
    model.prompt_encoder[adapter_name].load_prompt_embeddings(prefix)
    return prefix


def _token_ids(tokenizer: Any, text: str, use_chat_template: bool, max_length: int | None) -> torch.Tensor:
    if use_chat_template and hasattr(tokenizer, "apply_chat_template"):
        try:
            ids = tokenizer.apply_chat_template(
                [{"role": "system", "content": text}],
                tokenize=True,
                add_generation_prompt=False,
                return_dict=False,
                return_tensors="pt",
            )
            return ids if max_length is None else ids[:, :max_length]
        except (TypeError, ValueError):  # no template, or an older signature
            pass
    return tokenizer(text, return_tensors="pt", truncation=max_length is not None, max_length=max_length)["input_ids"]


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model,
    tokenizer,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> torch.Tensor:
    """Starts a cartridge or a prefix from the cache that the base model makes of a text.

    Args:
        model: the PeftModel.
        tokenizer: the base model's.
        text: the text, which has to have at least as many tokens as the prefix.
        adapter_name: the adapter, by default the active one.
        num_virtual_tokens: how many tokens, by default as many as the adapter has.
        use_chat_template: give the text as a system message, where the tokenizer has a template.
        max_length: how many tokens of the text are used at most.

    Returns and raises as `initialize_kv_prefix_from_past_key_values`.
    """
    adapter_name = model.active_adapter if adapter_name is None else adapter_name
    _prefix_config(model, adapter_name)
    ids = _token_ids(tokenizer, text, use_chat_template, max_length).to(model.device)
    with model.disable_adapter():
        cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Writes one cartridge that is several saved ones, one after the other.

    Args:
        adapter_paths: folders of at least two cartridges for the same base model.
        output_path: folder to write; the options are those of the first cartridge.
        safe_serialization: write safetensors; otherwise with torch.save.

    Raises `ValueError` for fewer than two, for other kinds of adapters, and for cartridges that differ.
    """
    paths = [Path(path) for path in adapter_paths]
    if len(paths) < 2:
        raise ValueError("Need at least 2 adapters to compose.")
    configs = [PeftConfig.from_pretrained(str(path)) for path in paths]
    for path, config in zip(paths, configs, strict=True):
        if config.peft_type != PeftType.CARTRIDGE:
            raise ValueError(f"Adapter at '{path}' is not a CARTRIDGE adapter (got {config.peft_type}).")
        for name in ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
            if getattr(config, name, None) != getattr(configs[0], name, None):
                raise ValueError(f"Incompatible CARTRIDGE configs for attribute '{name}'.")
    whole = torch.cat([load_peft_weights(str(path), device="cpu")["prompt_embeddings"] for path in paths])
    folder = Path(output_path)
    folder.mkdir(parents=True, exist_ok=True)
    replace(configs[0], num_virtual_tokens=len(whole)).save_pretrained(str(folder))
    weights = {"prompt_embeddings": whole}
    if safe_serialization:
        from safetensors.torch import save_file

        save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME)
    else:
        torch.save(weights, folder / WEIGHTS_NAME)
