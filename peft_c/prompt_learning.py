"""How a PeftModel runs the methods that learn a prompt: virtual tokens go before the input's embeddings, or keys and
values before those of each layer. What the prompts are is in `tuners/prompt_tuning.py` and its neighbours."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .mapping import PEFT_TYPE_TO_TUNER_MAPPING
from .tuners.tuners_utils import BaseTuner
from .utils.integrations import map_cache_to_layer_device_map
from .utils.other import (
    _get_batch_size,
    _prepare_prompt_learning_config,
    _set_adapter,
    set_additional_trainable_modules,
    shift_tokens_right,
)
from .utils.peft_types import PeftType, TaskType

if TYPE_CHECKING:
    from .config import PeftConfig
    from .peft_model import PeftModel

_NO_LABEL = -100  # what transformers' losses leave out


# ------------------------------------------------------------------------------------------------------- adapters


def add_adapter(model: PeftModel, adapter_name: str, config: PeftConfig) -> None:
    """Gives the model a prompt encoder of this name, and freezes the base model."""
    model.peft_config[adapter_name] = _prepare_prompt_learning_config(config, model.config)
    model._setup_prompt_encoder(adapter_name)
    try:
        set_additional_trainable_modules(
            model=model.base_model,
            peft_config=config,
            model_config=BaseTuner.get_model_config(model),
            adapter_name=adapter_name,
        )
    except Exception:
        for by_adapter in (model.prompt_encoder, model.prompt_tokens):
            by_adapter.pop(adapter_name)
        raise


def set_up_encoder(model: PeftModel, adapter_name: str) -> None:
    """Freezes the base model and makes the prompt encoder of an adapter whose config the model has."""
    config, base = model.peft_config[adapter_name], model.base_model
    if not hasattr(model, "prompt_encoder"):
        model.prompt_encoder = nn.ModuleDict()
        model.prompt_tokens = {}
    backbone = _freeze(model)
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    model.word_embeddings = _word_embeddings(base, backbone)
    encoder_cls = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    if encoder_cls.fills_cache and any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        raise ValueError(f"{config.peft_type.value} does not work with gradient checkpointing.")
    encoder = encoder_cls(config, model.word_embeddings) if encoder_cls.starts_from_tokens else encoder_cls(config)
    model.prompt_encoder[adapter_name] = encoder.to(model.device)
    model.prompt_tokens[adapter_name] = torch.arange(config.num_virtual_tokens * config.num_transformer_submodules)


def _freeze(model: PeftModel) -> nn.Module:
    """Freezes the base model; returns its transformer without the head, and notes that one's name."""
    from transformers import PreTrainedModel

    backbone = None
    for name, module in model.base_model.named_children():
        module.requires_grad_(False)
        if backbone is None and isinstance(module, PreTrainedModel):
            backbone, model.transformer_backbone_name = module, name
    return model.base_model if backbone is None else backbone


def _word_embeddings(base: nn.Module, backbone: nn.Module) -> nn.Module | None:
    """The word embeddings: where BERT has them, else the first module whose weight has a row for each token."""
    try:
        return base.get_submodule("embeddings.word_embeddings")
    except AttributeError:
        pass
    config = base.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    elif "text_config" in config:  # transformers before it had that method
        config = config.text_config
    for name, parameter in backbone.named_parameters():
        # DeepSpeed keeps the shape of parameters that it has split
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) and shape[0] == config.vocab_size:
            return backbone.get_submodule(name.removesuffix(".weight"))
    return None


def set_adapter(model: PeftModel, adapter_name: str, inference_mode: bool) -> None:
    """Makes the modules that are trained in full follow the adapter; the prompt itself is looked up by name."""
    _set_adapter(model, adapter_name, inference_mode=inference_mode)


def delete_adapter(model: PeftModel, adapter_name: str) -> None:
    """Removes an adapter's prompt. If it was active, the first of the others becomes so, with a warning."""
    from .tuners.switching import _delete_auxiliary_adapter

    for by_adapter in (model.peft_config, model.prompt_encoder, model.prompt_tokens):
        del by_adapter[adapter_name]
    others = list(model.peft_config)
    _delete_auxiliary_adapter(model.base_model, adapter_name, others or None)
    if adapter_name in model.active_adapters:
        model.active_adapter = others[0] if others else []
        if others:
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {others[0]}."
            )


@contextmanager
def disabled(model: PeftModel) -> Iterator[None]:
    """Inside, the model's `forward` and `prepare_inputs_for_generation` are those of the base model."""
    from .peft_model import _replaced

    base, was_disabled = model.base_model, model._adapters_disabled
    generates = hasattr(base, "prepare_inputs_for_generation")
    with (
        _replaced(model, "forward", base.forward),
        _replaced(model, "prepare_inputs_for_generation", base.prepare_inputs_for_generation)
        if generates
        else nullcontext(),
    ):
        model._adapters_disabled = True
        try:
            yield
        finally:
            model._adapters_disabled = was_disabled


# -------------------------------------------------------------------------------------------------------- prompts


def _active(model: PeftModel) -> tuple[PeftConfig, nn.Module]:
    """The active adapter's config and encoder."""
    return model.active_peft_config, model.prompt_encoder[model.active_adapter]


def _tokens(model: PeftModel, adapter_name: str, batch_size: int) -> torch.Tensor:
    """The virtual tokens (batch, tokens) that the adapter's encoder is asked for."""
    config, encoder = model.peft_config[adapter_name], model.prompt_encoder[adapter_name]
    tokens = model.prompt_tokens[adapter_name]
    if encoder.fills_cache:
        tokens = tokens[: config.num_virtual_tokens]
    return tokens.to(encoder.embedding.weight.device).expand(batch_size, -1)


def prompt_to_save(model: PeftModel, adapter_name: str) -> torch.Tensor:
    """The prompt as it is saved: what the encoder computes, or what all tasks share of it."""
    encoder = model.prompt_encoder[adapter_name]
    tokens = _tokens(model, adapter_name, 1)
    prompt = encoder.embedding(tokens) if encoder.by_task else encoder(tokens)
    return prompt[0].detach().cpu()


def prompt(model: PeftModel, batch_size: int, task_ids: torch.Tensor | None) -> Any:
    """The active prompt: embeddings (batch, tokens, token_dim), or a cache with keys and values for each layer."""
    config, encoder = _active(model)
    if encoder.by_task:
        return encoder(_tokens(model, model.active_adapter, batch_size), task_ids)
    if encoder.fills_cache:
        if config.inference_mode:
            prefix = encoder.embedding.weight.repeat(batch_size, 1, 1)
        else:
            prefix = encoder(_tokens(model, model.active_adapter, batch_size))
        return _cache(model, config, prefix)
    # All samples have the same prompt, so that it is computed once.
    one = encoder.embedding.weight if config.inference_mode else encoder(_tokens(model, model.active_adapter, 1))
    return one.repeat(batch_size, 1, 1)


def _cache(model: PeftModel, config: PeftConfig, prefix: torch.Tensor) -> Any:
    """The cache of the base model's type that holds a prefix (batch, tokens, layers * 2 * token_dim)."""
    from transformers import DynamicCache, EncoderDecoderCache

    from .utils import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as postprocess

    base, submodules = model.get_base_model(), config.num_transformer_submodules
    if model.base_model_torch_dtype is not None:
        prefix = prefix.to(model.base_model_torch_dtype)
    heads = config.num_attention_heads
    states = prefix.unflatten(-1, (config.num_layers * 2, heads, config.token_dim // heads))
    # (2 * layers, batch, heads, tokens, head_dim), then for each layer keys and values; those of an encoder-decoder
    # model are for its self and cross attention
    states = states.permute(2, 0, 3, 1, 4)
    layers: Any = torch.cat([states] * submodules).split(2 * submodules)
    model_type = getattr(base.config, "model_type", "")
    if model.config.model_type in postprocess:
        layers = postprocess[model.config.model_type](layers)
    elif any(name in model_type for name in ("gemma2", "gemma3_text", "gemma4")):
        layers = _cache_by_layer(base.config, config, layers)
    elif submodules == 1:
        layers = DynamicCache(layers)
    elif submodules == 2 and getattr(model.base_model, "_supports_cache_class", True):
        layers = EncoderDecoderCache(layers)
        # the encoder has virtual tokens of its own, so that its keys and values have to be computed
        layers.cross_attention_cache = DynamicCache()
        layers.is_updated = dict.fromkeys(layers.is_updated, False)
    map_cache_to_layer_device_map(base, layers)
    return layers


def _cache_by_layer(base_config: Any, config: PeftConfig, layers: Any) -> Any:
    """A cache for models whose layers differ in heads or head size, or share their keys and values."""
    from transformers import DynamicCache

    if hasattr(base_config, "get_text_config"):
        base_config = base_config.get_text_config()
    cache = DynamicCache(config=base_config)
    number = getattr(base_config, "num_hidden_layers", config.num_layers)
    with_own_states = number - getattr(base_config, "num_kv_shared_layers", 0)
    positions = torch.arange(config.num_virtual_tokens, device=layers[0].device)
    skipped = []
    for index, (keys, values) in enumerate(layers):
        heads, head_dim = _states_shape(base_config, index) or (keys.shape[1], keys.shape[3])
        if index >= with_own_states or heads > keys.shape[1] or head_dim > keys.shape[3]:
            skipped.append(index)
            continue
        keys, values = (states[:, :heads, :, :head_dim] for states in (keys, values))
        cache.update(keys, values, index, cache_kwargs={"cache_position": positions})
    if len(skipped) == len(layers):
        heads = config.num_attention_heads
        raise ValueError(
            "Prefix tuning skipped every layer because no layer's KV shape matched the provisioned prefix "
            f"(num_attention_heads={heads}, head_dim={config.token_dim // heads}). Override `token_dim` and "
            "`num_attention_heads` in `PrefixTuningConfig` to match a layer that should receive the prefix."
        )
    if skipped:
        used = [index for index in range(len(layers)) if index not in skipped]
        warnings.warn(
            f"Prefix tuning injected into layers {used}; skipped {skipped} due to KV shape mismatch or shared-KV "
            "layers."
        )
    return cache


def _states_shape(config: Any, index: int) -> tuple[int, int] | None:
    """(heads, head size) of a layer's keys and values, None where all layers have the same."""
    types = getattr(config, "layer_types", None)
    if not types:
        return None
    by_layer = getattr(config, "per_layer_config", None)
    if by_layer is not None:
        return by_layer[index].num_key_value_heads, by_layer[index].head_dim
    global_head_dim = getattr(config, "global_head_dim", None)  # before transformers 5.15
    if global_head_dim is None:
        return None
    if types[index] == "sliding_attention":
        return config.num_key_value_heads, config.head_dim
    return getattr(config, "num_global_key_value_heads", None) or config.num_key_value_heads, global_head_dim


# --------------------------------------------------------------------------------------------------------- inputs


def _constant(value: float, batch_size: int, length: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((batch_size, length), value, device=like.device)


def _lengthened(mask: torch.Tensor | None, batch_size: int, length: int) -> torch.Tensor | None:
    """An attention mask (batch, tokens) with ones for the virtual tokens before it."""
    return None if mask is None else torch.cat((_constant(1.0, batch_size, length, mask), mask), dim=1)


def _adjust(config: PeftConfig, fills_cache: bool, kwargs: dict[str, Any], token_types: bool) -> None:
    """Position ids count from behind a prefix; with a prompt they are dropped, and so are token types unless the
    model has them (`token_types`). What is dropped is warned about."""
    if kwargs.get("position_ids") is not None:
        if fills_cache:
            kwargs["position_ids"] = kwargs["position_ids"] + config.num_virtual_tokens
        else:
            warnings.warn("Position ids are not supported for parameter efficient tuning. Ignoring position ids.")
            kwargs["position_ids"] = None
    if not token_types and kwargs.get("token_type_ids") is not None:
        warnings.warn("Token type ids are not supported for parameter efficient tuning. Ignoring token type ids")
        kwargs["token_type_ids"] = None


def _embedded(
    model: PeftModel, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, task_ids: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt, embeddings of the input), both (batch, tokens, token_dim) and of one dtype."""
    if inputs_embeds is None:
        inputs_embeds = model.word_embeddings(input_ids)
    prompts = model.get_prompt(batch_size=len(inputs_embeds), task_ids=task_ids)
    return prompts.to(inputs_embeds.dtype), inputs_embeds


# -------------------------------------------------------------------------------------------------------- forward


def forward(model: PeftModel, inputs: dict[str, Any], task_ids: Any, kwargs: dict[str, Any]) -> Any:
    """The forward of the task classes: `inputs` are their named arguments, `kwargs` the others."""
    from .peft_model import PeftModelForCausalLM, PeftModelForSeq2SeqLM, _PeftModelWithHead

    if isinstance(model, PeftModelForSeq2SeqLM):
        return _forward_seq2seq(model, inputs, task_ids, kwargs)
    config, encoder = _active(model)
    length = config.num_virtual_tokens
    with_head, causal = isinstance(model, _PeftModelWithHead), isinstance(model, PeftModelForCausalLM)
    kwargs.update(inputs)
    input_ids, inputs_embeds = kwargs.pop("input_ids"), kwargs.pop("inputs_embeds")
    batch_size = _get_batch_size(input_ids, inputs_embeds)
    kwargs["attention_mask"] = _lengthened(kwargs["attention_mask"], batch_size, length)
    _adjust(config, encoder.fills_cache, kwargs, token_types=with_head)

    if encoder.fills_cache:
        kwargs.update(input_ids=input_ids, inputs_embeds=inputs_embeds, past_key_values=model.get_prompt(batch_size))
        return _forward_with_head(model, kwargs) if with_head else model.base_model(**kwargs)

    prompts, inputs_embeds = _embedded(model, input_ids, inputs_embeds, task_ids)
    embeddings = torch.cat((prompts, inputs_embeds), dim=1)
    if config.peft_type == PeftType.CPT:
        return _forward_cpt(model, config, embeddings, kwargs)
    if causal and kwargs["labels"] is not None:
        labels = kwargs["labels"]
        kwargs["labels"] = torch.cat((_constant(_NO_LABEL, batch_size, length, labels), labels), dim=1)
    if kwargs.get("token_type_ids") is not None:
        types = kwargs["token_type_ids"]
        kwargs["token_type_ids"] = torch.cat((_constant(0, batch_size, length, types), types), dim=1).long()
    return model.base_model(inputs_embeds=embeddings, **kwargs)


def _forward_cpt(model: PeftModel, config: PeftConfig, embeddings: torch.Tensor, kwargs: dict[str, Any]) -> Any:
    """A causal language model behind example tokens, whose labels count too, with the loss of their method."""
    labels, types = kwargs.pop("labels"), kwargs.pop("input_type_mask", None)
    if labels is None:
        return model.base_model(inputs_embeds=embeddings, labels=None, **kwargs)
    batch_size, device = len(labels), labels.device
    examples = torch.tensor(config.cpt_tokens_type_mask, device=device)
    # The input's tokens are one more example, and all of them labels unless their types are given.
    types = torch.full_like(labels, 4) if types is None else types.to(device)
    types = torch.where(types > 0, types + examples.max(), types)
    types = torch.cat((examples.expand(batch_size, -1), types), dim=1)
    labels = torch.cat((torch.tensor(config.cpt_token_ids, device=device).expand(batch_size, -1), labels), dim=1)
    labels = labels.masked_fill(~((types > 0) & (types % 4 == 0)), _NO_LABEL)
    output = model.base_model(inputs_embeds=embeddings, labels=labels, **kwargs)
    return PEFT_TYPE_TO_TUNER_MAPPING[PeftType.CPT].calculate_loss(output, labels, types, config)


def _forward_seq2seq(model: PeftModel, inputs: dict[str, Any], task_ids: Any, kwargs: dict[str, Any]) -> Any:
    """Encoder-decoder models: a prefix goes into the decoder's cache; prompt tuning and P-tuning go before the
    encoder's input; other prompts have a part for each of encoder and decoder."""
    config, encoder = _active(model)
    length, base = config.num_virtual_tokens, model.base_model
    kwargs.update(inputs)
    input_ids, inputs_embeds = kwargs.pop("input_ids"), kwargs.pop("inputs_embeds")
    batch_size = _get_batch_size(input_ids, inputs_embeds)
    encoder_only = config.peft_type in (PeftType.PROMPT_TUNING, PeftType.P_TUNING)
    if not encoder_only:
        kwargs["decoder_attention_mask"] = _lengthened(kwargs["decoder_attention_mask"], batch_size, length)
    _adjust(config, encoder.fills_cache, kwargs, token_types=False)
    if encoder.fills_cache:
        kwargs["past_key_values"] = model.get_prompt(batch_size)
        return base(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

    prompts, inputs_embeds = _embedded(model, input_ids, inputs_embeds, task_ids)
    kwargs["inputs_embeds"] = torch.cat((prompts[:, :length], inputs_embeds), dim=1)
    kwargs["attention_mask"] = _lengthened(kwargs["attention_mask"], batch_size, length)
    if encoder_only:
        return base(**kwargs)
    labels, decoder_input_ids = kwargs["labels"], kwargs.pop("decoder_input_ids")
    decoder_embeds = kwargs.pop("decoder_inputs_embeds")
    if config.num_transformer_submodules == 1:
        return base(**kwargs)
    if decoder_embeds is None:
        if decoder_input_ids is None:
            settings = model.config
            decoder_input_ids = shift_tokens_right(labels, settings.pad_token_id, settings.decoder_start_token_id)
        decoder_embeds = model.word_embeddings(decoder_input_ids)
    kwargs["decoder_inputs_embeds"] = torch.cat((prompts[:, length:], decoder_embeds), dim=1)
    if labels is not None:
        kwargs["labels"] = torch.cat((_constant(_NO_LABEL, batch_size, length, labels), labels), dim=1)
    return base(**kwargs)


def _accepts_cache(module: nn.Module) -> bool:
    return "past_key_values" in inspect.signature(module.forward).parameters


def _forward_with_head(model: PeftModel, kwargs: dict[str, Any]) -> Any:
    """A base model with a head for a task, with a cache. Where it takes none itself, its transformer and its head are
    called one after the other."""
    from transformers import modeling_outputs
    from transformers.loss import loss_utils

    from .peft_model import PeftModelForQuestionAnswering, PeftModelForSequenceClassification

    base = model.base_model
    if _accepts_cache(base):
        return base(**kwargs)
    backbone = base.get_submodule(model.transformer_backbone_name)
    if not _accepts_cache(backbone):
        raise ValueError("Model does not support past key values which are required for prefix tuning.")
    labels, start, end = (kwargs.pop(name, None) for name in ("labels", "start_positions", "end_positions"))
    outputs = backbone(**kwargs)
    is_sequence, loss = isinstance(model, PeftModelForSequenceClassification), None
    hidden = outputs[1] if is_sequence and len(outputs) > 1 else outputs[0]
    if "dropout" in dict(base.named_children()):
        hidden = base.dropout(hidden)
    logits = base.get_submodule(model.cls_layer_name)(hidden)
    fields = {"logits": logits}
    if isinstance(model, PeftModelForQuestionAnswering):
        output_cls = modeling_outputs.QuestionAnsweringModelOutput
        fields = dict(zip(("start_logits", "end_logits"), (x.contiguous() for x in logits.unbind(-1)), strict=True))
        loss = loss_utils.ForQuestionAnsweringLoss(**fields, start_positions=start, end_positions=end)
    elif is_sequence:
        output_cls = modeling_outputs.SequenceClassifierOutput
        if labels is not None:
            loss = loss_utils.ForSequenceClassificationLoss(labels, logits, base.config)
    else:
        output_cls = modeling_outputs.TokenClassifierOutput
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))
    if not kwargs["return_dict"]:
        output = (*fields.values(), *outputs[2:])
        return output if loss is None else (loss, *output)
    return output_cls(loss=loss, **fields, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


# ----------------------------------------------------------------------------------------------------- generation


def generate(model: PeftModel, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The base model's `generate`. An encoder-decoder model gets its prompt here, others with their inputs."""
    from .peft_model import PeftModelForSeq2SeqLM

    base = model.base_model
    if model._adapters_disabled:
        kwargs.pop("task_ids", None)  # which choose prompts
    if model._adapters_disabled or not isinstance(model, PeftModelForSeq2SeqLM):
        return base.generate(*args, **kwargs)
    config, encoder = _active(model)
    if "input_ids" not in kwargs:
        raise ValueError("input_ids must be provided for Peft model generation")
    _adjust(config, encoder.fills_cache, kwargs, token_types=False)
    if encoder.fills_cache:
        return base.generate(**kwargs)
    if kwargs.pop("encoder_outputs", None) is not None:
        warnings.warn("`encoder_outputs` should not be passed to `generate` when using prompt tuning. Ignoring it.")
    length = config.num_virtual_tokens
    prompts, inputs_embeds = _embedded(model, kwargs.pop("input_ids"), None, kwargs.pop("task_ids", None))
    kwargs["inputs_embeds"] = torch.cat((prompts[:, :length], inputs_embeds), dim=1)
    if "attention_mask" in kwargs:
        kwargs["attention_mask"] = _lengthened(kwargs["attention_mask"], len(prompts), length)
    return base.generate(**kwargs)


def prepare_inputs_for_generation(
    model: PeftModel, model_kwargs: dict[str, Any], task_ids: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The inputs of one step of generation, which the base model has prepared from `kwargs`, with the prompt in the
    first step and with masks of the right length in all."""
    from .peft_model import PeftModelForSeq2SeqLM

    _, encoder = _active(model)
    if not isinstance(model, PeftModelForSeq2SeqLM):
        return _prepare_causal(model, model_kwargs, task_ids)
    if encoder.fills_cache:
        first = kwargs.get("is_first_iteration")
        if first is None:  # transformers before 5
            first = _cached_tokens(model_kwargs.get("past_key_values")) == 0
        if first:
            model_kwargs["past_key_values"] = model.get_prompt(len(model_kwargs["decoder_input_ids"]))
    return model_kwargs


def _cached_tokens(cache: Any) -> int:
    """How many tokens a cache holds, 0 for None."""
    if cache is None:
        return 0
    return cache[0][0].shape[-2] if isinstance(cache, (tuple, list)) else cache.get_seq_length()


def _prepare_causal(model: PeftModel, model_kwargs: dict[str, Any], task_ids: Any) -> dict[str, Any]:
    config, encoder = _active(model)
    position = model_kwargs.get("cache_position")
    is_prefill = position is not None and bool(position[0] == 0)
    cache, input_ids = model_kwargs.get("past_key_values"), model_kwargs["input_ids"]
    if cache is not None and _cached_tokens(cache) >= input_ids.shape[1]:
        # with virtual tokens, the cache is longer than the input, from which the base model would not see what is new
        input_ids = model_kwargs["input_ids"] = input_ids[:, -1:]
    if model_kwargs.get("attention_mask") is not None:
        model_kwargs["attention_mask"] = _mask_of_step(model, config, model_kwargs, is_prefill, encoder.fills_cache)
    _adjust(config, encoder.fills_cache, model_kwargs, token_types=False)

    if _cached_tokens(cache) == 0:
        if encoder.fills_cache:
            model_kwargs["past_key_values"] = model.get_prompt(len(input_ids))
        else:
            prompts, embeddings = _embedded(model, input_ids, None, task_ids)
            model_kwargs["inputs_embeds"] = torch.cat((prompts, embeddings), dim=1)
            model_kwargs["input_ids"] = None
    if not encoder.fills_cache:
        model_kwargs.pop("cache_position", None)  # the base model computes it from the embeddings
    elif is_prefill:
        model_kwargs["cache_position"] = position + config.num_virtual_tokens
    return model_kwargs


def _mask_of_step(
    model: PeftModel, config: PeftConfig, model_kwargs: dict[str, Any], is_prefill: bool, fills_cache: bool
) -> Any:
    from .peft_model import create_attention_mask  # where PEFT has it, and where others replace it

    mask, input_ids = model_kwargs["attention_mask"], model_kwargs["input_ids"]
    if isinstance(mask, dict):  # by type of layer
        if len(mask) != 1:
            raise ValueError(f"Expected a single attention mask, got {len(mask)}: {sorted(mask)}.")
        (mask,) = mask.values()
    if mask.dim() != 4:
        return _lengthened(mask, len(input_ids), config.num_virtual_tokens)
    # A mask (batch, heads, tokens, tokens in the cache) is made anew by transformers, for a longer sequence.
    length = config.num_virtual_tokens + mask.shape[2]
    position = model_kwargs["cache_position"]
    if is_prefill and not fills_cache:
        position = torch.arange(length, device=input_ids.device)
    return create_attention_mask(
        model.get_base_model(),
        model_input=None,
        attention_mask=torch.ones((len(mask), length), dtype=mask.dtype),
        past_key_values=model_kwargs.get("past_key_values"),
        cache_position=position,
        batch_size=len(mask),
        sequence_length=length,
        position_ids=model_kwargs.get("position_ids"),
    )
