"""Preparing models and configs: devices, casts, k-bit training, FSDP, attention masks, quantisation settings."""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..import_utils import is_gptqmodel_available

_KBIT_METHODS = ("gptq", "aqlm", "eetq", "torchao", "hqq")


def _has_device(kind: str) -> bool:
    backend = getattr(torch, kind, None)
    return backend is not None and backend.is_available()


def infer_device() -> str:
    """The first of "cuda", "mps", "mlu", "xpu", "npu" that this machine has, else "cpu"."""
    return next((kind for kind in ("cuda", "mps", "mlu", "xpu", "npu") if _has_device(kind)), "cpu")


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Prepare a (quantised) transformers model for adapters to be trained on it, in place.

    All parameters are frozen. bitsandbytes and unquantised models get their half-precision parameters cast to float32.
    Quantised models get gradient checkpointing and, for its re-entrant kind, inputs that require gradients.

    Args:
        model: The model.
        use_gradient_checkpointing: Whether to set up gradient checkpointing, if the model is quantised.
        gradient_checkpointing_kwargs: Arguments of `torch.utils.checkpoint.checkpoint`.
        auto_clear_cache: Whether to free the accelerator's cache after the casts.
    """
    method = getattr(model, "quantization_method", None)
    method = "hqq" if getattr(model, "hqq_quantized", False) else method
    in_bits = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)

    for param in model.parameters():
        param.requires_grad = False
    if method not in _KBIT_METHODS:
        for param in model.parameters():
            if param.dtype in (torch.float16, torch.bfloat16) and type(param).__name__ != "Params4bit":
                param.data = param.data.float()
        for kind in ("cuda", "xpu") if auto_clear_cache else ():
            if _has_device(kind):
                getattr(torch, kind).empty_cache()
    if use_gradient_checkpointing and (in_bits or method in _KBIT_METHODS):
        _enable_gradient_checkpointing(model, gradient_checkpointing_kwargs or {})
    return model


def _enable_gradient_checkpointing(model: nn.Module, kwargs: dict[str, Any]) -> None:
    if kwargs.get("use_reentrant", True):
        # a re-entrant checkpoint only passes gradients if its input requires them
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            embedding = model.get_input_embeddings()
            embedding.register_forward_hook(lambda module, args, output: output.requires_grad_(True) and None)

    name = "gradient_checkpointing_kwargs"
    if name in inspect.signature(model.gradient_checkpointing_enable).parameters:
        model.gradient_checkpointing_enable(**{name: kwargs})
        return
    if kwargs:
        warnings.warn(
            f"{name} is not supported in this version of transformers. The passed kwargs will be ignored. "
            "Upgrade transformers if you want to use that feature.",
            FutureWarning,
        )
    model.gradient_checkpointing_enable()


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """For automatic mixed precision: cast frozen parameters to `dtype` and trainable ones to float32, in place."""
    for param in model.parameters():
        param.data = param.to(torch.float32 if param.requires_grad else dtype)


def _first_entry(config: dict[str, Any], names: tuple[str, ...], field: str) -> Any:
    for name in names:
        if name in config:
            return config[name]
    raise ValueError(f"Please specify `{field}` in `peft_config`")


def _largest_kv_shape(config: dict[str, Any], token_dim: int, num_heads: int) -> tuple[int, int]:
    """(head_dim, number of key/value heads) of the largest cache entry of a grouped-query attention model.

    Models whose layers differ get prefixes for the largest layer; those that do not fit are skipped at injection.
    """
    num_kv_heads = config["num_key_value_heads"]
    if config.get("global_head_dim") is not None:
        return config["global_head_dim"], config.get("num_global_key_value_heads") or num_kv_heads
    if config.get("per_layer_config") is not None:
        base = config.get("head_dim", token_dim // num_heads), num_kv_heads
        layers = [
            (layer.get("head_dim", base[0]), layer.get("num_key_value_heads", base[1]))
            for layer in config["per_layer_config"].values()
        ]
        return max([base, *layers], key=lambda shape: shape[0])
    if config.get("head_dim") is not None:
        return config["head_dim"], num_kv_heads
    return token_dim // num_heads, num_kv_heads


def _prepare_prompt_learning_config(peft_config: Any, model_config: Any) -> Any:
    """Fill in what a prompt learning config leaves open (layers, widths, heads) from the model's config.

    For multimodal models the text part counts. ValueError if the model's config does not say.
    """
    config = model_config.to_dict() if hasattr(model_config, "to_dict") else model_config
    config = config.get("text_config", config)

    if peft_config.num_layers is None:
        layers = getattr(model_config, "num_hidden_layers", None)
        if layers is None:
            layers = _first_entry(config, ("num_hidden_layers", "num_layers", "n_layer"), "num_layers")
        peft_config.num_layers = layers
    if peft_config.token_dim is None:
        peft_config.token_dim = _first_entry(config, ("hidden_size", "n_embd", "d_model"), "token_dim")
    if peft_config.num_attention_heads is None:
        names = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
        peft_config.num_attention_heads = _first_entry(config, names, "num_attention_heads")

    # what goes into the cache has the shape of keys and values
    if peft_config.peft_type in ("PREFIX_TUNING", "CARTRIDGE") and "num_key_value_heads" in config:
        head_dim, heads = _largest_kv_shape(config, peft_config.token_dim, peft_config.num_attention_heads)
        peft_config.token_dim = head_dim * heads
        peft_config.num_attention_heads = heads

    if getattr(peft_config, "encoder_hidden_size", None) is None:
        peft_config.encoder_hidden_size = peft_config.token_dim
    return peft_config


def _get_no_split_modules(model: nn.Module) -> set[str]:
    """Class names of the model's blocks that have to stay on one device, as transformers lists them."""
    if not hasattr(model, "_no_split_modules"):
        return set()
    from .. import import_utils

    if import_utils.is_transformers_ge_v5_1_0:
        return model._no_split_modules
    # older versions list them on each sub-model; blocks listed already are not searched
    names: set[str] = set()
    pending = [model]
    while pending:
        module = pending.pop()
        if type(module).__name__ not in names:
            names |= set(getattr(module, "_no_split_modules", None) or ())
            pending += module.children()
    return names


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable:
    """FSDP policy that shards transformer blocks, prompt encoders and trainable leaf modules each on their own.

    The blocks' class names come from the environment variable FSDP_TRANSFORMER_CLS_TO_WRAP (comma-separated), else
    from the model. TypeError if the model has no module of such a class.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    from .. import tuners

    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(_get_no_split_modules(model) or ()))
    class_of = {type(module).__name__: type(module) for module in model.modules()}
    encoders = ("CartridgeEncoder", "PrefixEncoder", "PromptEncoder", "PromptEmbedding")
    blocks = {getattr(tuners, name) for name in encoders if hasattr(tuners, name)}
    for name in filter(None, names.split(",")):
        if name not in class_of:
            raise TypeError(f"Could not find the transformer layer class to wrap in the model: {name}.")
        blocks.add(class_of[name])

    def is_trainable_leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return weight is not None and weight.requires_grad and next(module.children(), None) is None

    policies = [
        functools.partial(lambda_auto_wrap_policy, lambda_fn=is_trainable_leaf),
        functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks),
    ]
    return functools.partial(_or_policy, policies=policies)


def get_quantization_config(model: nn.Module, method: str) -> Any | None:
    """`model.config.quantization_config` if the model is quantised by `method` ("gptq", "awq", ...), else None."""
    if getattr(model, "quantization_method", None) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)


def is_gptqmodel_quant_linear(module: nn.Module | None) -> bool:
    """Whether the module is a quantised linear layer of GPT-QModel."""
    if module is None or not is_gptqmodel_available():
        return False
    try:
        from gptqmodel.nn_modules.qlinear import BaseQuantLinear
    except ImportError:
        return False
    return isinstance(module, BaseQuantLinear)


def is_gptqmodel_awq_layer(module: nn.Module | None) -> bool:
    """Whether the module is one of GPT-QModel's layers for AWQ weights."""
    methods = getattr(module, "SUPPORTS_METHODS", ()) if is_gptqmodel_quant_linear(module) else ()
    return any(method.value == "awq" for method in methods)


def get_gptqmodel_quant_linear(gptq_quantization_config: Any, device_map: Any = None) -> type | None:
    """The trainable layer class that GPT-QModel chooses for a GPTQ config; None without a config or the library."""
    if gptq_quantization_config is None or not is_gptqmodel_available():
        return None
    from gptqmodel import BACKEND
    from gptqmodel.quantization import METHOD
    from gptqmodel.utils.importer import hf_select_quant_linear_v2

    config = gptq_quantization_config
    return hf_select_quant_linear_v2(
        bits=config.bits,
        group_size=config.group_size,
        desc_act=config.desc_act,
        sym=config.sym,
        device_map=device_map,
        format=getattr(config, "checkpoint_format", "gptq"),
        quant_method=METHOD.GPTQ,
        meta=getattr(config, "meta", None),
        backend=BACKEND.AUTO_TRAINABLE,
        pack=False,
    )


def create_attention_mask(
    model: nn.Module,
    *,
    model_input: Any,
    attention_mask: torch.Tensor | None,
    past_key_values: Any,
    cache_position: torch.Tensor | None,
    batch_size: int,
    sequence_length: int,
    position_ids: torch.Tensor | None,
) -> Any:
    """The attention mask for generation after virtual tokens have lengthened the sequence, made by transformers."""
    try:
        from transformers.masking_utils import create_masks_for_generate
    except ImportError as exc:
        raise ImportError("Your transformers version is too old, please upgrade it to >= 4.53.1") from exc
    from .. import import_utils

    arguments = {
        "config": model.config,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
    }
    # some architectures still make 4d masks of fixed shape themselves, in the base model or in its decoder
    base_model = getattr(model, model.base_model_prefix, model)
    decoder = base_model.get_decoder() if hasattr(base_model, "get_decoder") else None
    for owner in (base_model, decoder):
        create = getattr(owner, "_prepare_4d_causal_attention_mask_with_cache_position", None)
        if create is not None:
            mask = arguments.pop("attention_mask")
            return create(
                mask,
                sequence_length=sequence_length,
                target_length=past_key_values.get_max_cache_shape(),
                dtype=model.dtype,
                cache_position=cache_position,
                batch_size=batch_size,
                **arguments,
            )

    # only shape and dtype of the embeddings matter for the mask
    embeds = torch.empty((batch_size, sequence_length), dtype=model.dtype)
    if import_utils.is_transformers_ge_v5:
        arguments["inputs_embeds"] = embeds
    else:
        arguments.update(input_embeds=embeds, cache_position=cache_position)
    create = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    return create(token_type_ids=getattr(model_input, "token_type_ids", None), **arguments)
