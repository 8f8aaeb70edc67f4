"""ShadowPEFT with transformers: the cache of a model with a shadow, and the shadow as a model of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from .shadow_backbone import pool_last_token, sequence_classification_loss, shifted_loss


class ShadowCache(Cache):
    """The caches of a model (`base`) and its shadow: what changes batch or length changes both, all else is base's."""

    is_compileable = False  # two caches of different layouts

    def __init__(self, base: Any = None, shadow: Any = None) -> None:
        self.base, self.shadow = base, shadow

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("base")
        if base is None:
            raise AttributeError(name)
        return getattr(base, name)

    @property
    def is_initialized(self) -> bool:
        caches = [cache for cache in (self.base, self.shadow) if cache is not None]
        return bool(caches) and all(getattr(cache, "is_initialized", True) for cache in caches)

    def __getitem__(self, layer_idx: int) -> Any:
        return self.base[layer_idx]

    def __iter__(self) -> Any:
        return iter(self.base)

    def __len__(self) -> int:
        return 0 if self.base is None else len(self.base)

    def __repr__(self) -> str:
        return f"ShadowCache(base={self.base!r}, shadow={self.shadow!r})"


# what an empty cache answers; other methods need a base cache
_EMPTY: dict[str, Any] = {
    "get_seq_length": lambda *_: 0,
    "get_mask_sizes": lambda query_length, *_: (query_length, 0),
    "get_max_cache_shape": lambda *_: -1,
    "has_previous_state": lambda *_: False,
    "is_sliding": [],
    "max_batch_size": 0,
    "max_cache_len": 0,
}


def _delegate(name: str) -> Any:
    def of_base(self: ShadowCache, *args: Any, **kwargs: Any) -> Any:
        if self.base is not None:
            return getattr(self.base, name)(*args, **kwargs)
        if name in _EMPTY:
            return _EMPTY[name](*args, **kwargs)
        raise RuntimeError(f"Cannot call {name} of a ShadowCache without a base cache.")

    return of_base


def _both(name: str) -> Any:
    def of_both(self: ShadowCache, *args: Any, **kwargs: Any) -> None:
        for cache in (self.base, self.shadow):
            if hasattr(cache, name):
                getattr(cache, name)(*args, **kwargs)

    return of_both


def _value(name: str) -> property:
    return property(lambda self: _EMPTY[name] if self.base is None else getattr(self.base, name))


for _name in ("update", "update_conv_state", "update_recurrent_state", "update_indexer", *list(_EMPTY)[:4]):
    setattr(ShadowCache, _name, _delegate(_name))
for _name in ("reset", "reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices"):
    setattr(ShadowCache, _name, _both(_name))
for _name in list(_EMPTY)[4:]:
    setattr(ShadowCache, _name, _value(_name))


class DetachedShadowModel(PreTrainedModel, GenerationMixin):
    """head(projection(backbone(inputs))): a causal language model, a classifier of the last token, or without a head.

    `input_embeddings` are another model's, used in place of the backbone's own and not saved with this model.
    """

    main_input_name = "input_ids"
    base_model_prefix = "backbone"
    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = True
    _supports_attention_backend = _supports_cache_class = True

    def __init__(
        self,
        backbone: PreTrainedModel,
        projection: nn.Module | None = None,
        head: nn.Module | None = None,
        is_classification: bool = False,
        input_embeddings: nn.Module | None = None,
    ) -> None:
        super().__init__(backbone.config)
        self.backbone, self.head, self.is_classification = backbone, head, is_classification
        self.shadow_hidden_projection = nn.Identity() if projection is None else projection
        self._shared_input_embeddings = [input_embeddings]  # a list: not a submodule
        generation = getattr(backbone, "generation_config", None)
        self.generation_config = GenerationConfig.from_model_config(self.config) if generation is None else generation

    def can_generate(self) -> bool:
        # asked for before there are attributes, too
        return getattr(self, "head", None) is not None and not getattr(self, "is_classification", False)

    def get_input_embeddings(self) -> nn.Module:
        shared = self._shared_input_embeddings[0]
        return self.backbone.get_input_embeddings() if shared is None else shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        if self._shared_input_embeddings[0] is None:
            self.backbone.set_input_embeddings(value)
        else:
            self._shared_input_embeddings[0] = value

    def get_output_embeddings(self) -> nn.Module | None:
        return None if getattr(self, "is_classification", False) else self.head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        for name in ("logits_to_keep", "num_logits_to_keep"):  # backbones do not take these
            kwargs.pop(name, None)
        if self._shared_input_embeddings[0] is not None and kwargs.get("inputs_embeds") is None:
            if input_ids is None:
                raise ValueError("Either `input_ids` or `inputs_embeds` must be provided.")
            kwargs["inputs_embeds"], input_ids = self.get_input_embeddings()(input_ids), None
        kwargs["return_dict"] = True
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = self.shadow_hidden_projection(output.last_hidden_state)
        if self.head is None:
            return hidden
        logits = self.head(pool_last_token(hidden, attention_mask) if self.is_classification else hidden)
        loss_of = sequence_classification_loss if self.is_classification else shifted_loss
        loss = None if labels is None else loss_of(logits, labels)
        if self.is_classification:
            return SequenceClassifierOutput(loss=loss, logits=logits)
        past = getattr(output, "past_key_values", None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past)
