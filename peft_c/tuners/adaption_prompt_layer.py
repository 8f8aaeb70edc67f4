"""The attention modules with adaption prompts, and the queries of the base models' attention, which those keep to
themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def llama_rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(a, b) -> (-b, a) for the halves of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def llama_apply_rotary_pos_emb(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """Queries (batch, heads, length, head_dim) turned by tables (positions, head_dim), or (1, 1, positions, head_dim),
    at `position_ids` (batch, length)."""
    cos, sin = (table.flatten(0, -2)[position_ids].unsqueeze(1) for table in (cos, sin))
    return q * cos + llama_rotate_half(q) * sin


def llama_compute_query_states(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    """The queries (batch, heads, length, head_dim) of a Llama or Mistral attention called with `kwargs`."""
    hidden, head_dim = kwargs["hidden_states"], model.head_dim
    queries = model.q_proj(hidden).unflatten(-1, (-1, head_dim)).transpose(1, 2)
    embeddings = kwargs.get("position_embeddings")
    if embeddings is None:  # transformers before 4.48: the attention has the table
        positions = kwargs.get("position_ids")
        if positions is None:
            cache = kwargs.get("past_key_value")
            start = 0 if cache is None else cache.get_seq_length(model.layer_idx)
            positions = torch.arange(start, start + hidden.shape[1], device=hidden.device).unsqueeze(0)
        embeddings = model.rotary_emb(queries, positions)
    cos, sin = (table.unsqueeze(1) for table in embeddings)
    return queries * cos + llama_rotate_half(queries) * sin


def gpt2_compute_query_states(
    model: nn.Module, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None
) -> torch.Tensor:
    """The queries (batch, heads, length, head_dim) of a GPT-2 attention; `ValueError` for cross attention without
    weights for it."""
    if encoder_hidden_states is None:
        queries = model.c_attn(hidden_states).split(model.split_size, dim=2)[0]
    elif hasattr(model, "q_attn"):
        queries = model.q_attn(hidden_states)
    else:
        name = type(model).__name__
        raise ValueError(
            f"If `{name}` is used as cross attention, the weights `q_attn` must be defined. Please make sure to "
            f"instantiate it with `{name}(..., is_cross_attention=True)`."
        )
    return queries.unflatten(-1, (-1, model.head_dim)).transpose(1, 2)


class AdaptedAttention(nn.Module):
    """An attention module of Llama or Mistral whose queries also look at a prompt, through a gate that starts closed.

    Args:
        model_type: the base model's type.
        adapter_len: length of the prompt.
        model: the attention module.

    Attributes:
        adaption_prompt (`nn.Parameter`): (1, adapter_len, hidden_size).
        adaption_gate (`nn.Parameter`): (1,), zero at first.

    Raises `TypeError` when the module has a prompt already.
    """

    _projection_with_dtype = "q_proj"

    def __init__(self, model_type: str, adapter_len: int, model: nn.Module) -> None:
        if isinstance(model, AdaptedAttention):
            raise TypeError("Unable to stack multiple adaption prompts")
        super().__init__()
        self.model_type, self.model, self.adapter_len = model_type, model, adapter_len
        self.num_heads = model.config.num_attention_heads
        dtype = getattr(model, self._projection_with_dtype).weight.dtype
        options = {
            "device": next(model.parameters()).device,
            "dtype": torch.float32 if dtype in (torch.int8, torch.uint8) else dtype,
        }
        prompt = torch.empty(1, adapter_len, model.config.hidden_size, **options)
        self.adaption_prompt = nn.Parameter(prompt.normal_())
        self.adaption_gate = nn.Parameter(torch.zeros(1, **options))

    def _keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.k_proj(self.adaption_prompt), self.model.v_proj(self.adaption_prompt)

    def _prompt_output(self, queries: torch.Tensor) -> torch.Tensor:
        """What queries (batch, heads, length, head_dim) find in the prompt, (batch, length, heads * head_dim)."""
        head_dim = self.model.head_dim
        keys, values = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in self._keys_and_values())
        groups = self.num_heads // keys.shape[1]
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        scores = queries @ keys.mT.to(queries.dtype) / head_dim**0.5
        scores = self.adaption_gate * scores.softmax(dim=-1, dtype=torch.float32).to(queries.dtype)
        return (scores @ values).transpose(1, 2).flatten(2)

    def forward(self, **kwargs: Any) -> tuple:
        """As the attention module's forward; `NotImplementedError` for `output_attention=True`."""
        if kwargs.get("output_attention", False):
            raise NotImplementedError("output_attention is not currently supported.")
        output, *others = self.model(**kwargs)
        queries = llama_compute_query_states(self.model, **kwargs)
        output = output + self.model.o_proj(self._prompt_output(queries))
        return output.to(queries.dtype), *others


class AdaptedAttentionGPT(AdaptedAttention):
    """The same for the attention module of GPT-2."""

    _projection_with_dtype = "c_proj"

    def _keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.c_attn(self.adaption_prompt).chunk(3, dim=2)[1:]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        """As the attention module's forward."""
        output, *others = self.model(hidden_states, *args, **kwargs)
        queries = gpt2_compute_query_states(self.model, hidden_states, kwargs.get("encoder_hidden_states"))
        return (output + self._prompt_output(queries)).to(queries.dtype), *others


def is_adaption_prompt_trainable(params: str) -> bool:
    """Whether the parameter of this name belongs to an adaption prompt."""
    return params.rsplit(".", 1)[-1].startswith("adaption_")
