"""Names, file names, dtypes and the default target modules of each method per transformers model type."""

from __future__ import annotations

import torch

# How to read the tables: each row gives target modules (names separated by blanks, or one regular expression) and the
# transformers `config.model_type`s that they are the default for.
_Rows = tuple[tuple[str, str], ...]

_LLAMA_LIKE = "llama llama4 gemma gemma2 gemma3_text qwen2 qwen3"
_GEMMA4_ATTENTION = r".*language_model\..*\.(q_proj|v_proj)"

_LORA: _Rows = (
    ("q_proj v_proj", f"{_LLAMA_LIKE} mistral mixtral stablelm bart opt gptj gpt_neo"),
    ("q_proj v_proj fc1 fc2", "phi"),
    ("q_proj k_proj v_proj o_proj", "nemotron_h"),
    (_GEMMA4_ATTENTION, "gemma4"),
    ("query_key_value", "bloom gpt_neox chatglm falcon RefinedWeb RefinedWebModel"),
    ("query value", "bert roberta xlm-roberta electra layoutlm"),
    ("query_proj value_proj", "deberta-v2"),
    ("in_proj", "deberta"),
    ("q v", "t5 mt5"),
    ("q v q_proj v_proj", "blip-2"),
    ("c_attn", "gpt2 gpt_bigcode"),
    ("c_proj c_attn", "btlm"),
    ("qkv_proj", "codegen"),
    ("Wqkv", "mpt"),
    ("key value receptance output", "rwkv"),
    ("r_proj k_proj v_proj o_proj key value", "rwkv7"),
)

_ALL_ATTENTION: _Rows = (
    ("q k v o wi wo", "t5"),
    ("q k v o wi_0 wi_1 wo", "mt5"),
    ("q_proj k_proj v_proj out_proj fc1 fc2", "bart opt"),
    ("c_attn", "gpt2 gpt_bigcode"),
    ("query_key_value", "bloom gpt_neox"),
    ("q_proj v_proj", f"{_LLAMA_LIKE} gptj gpt_neo"),
    ("q_proj k_proj v_proj o_proj", "nemotron_h"),
    (_GEMMA4_ATTENTION, "gemma4"),
    ("query value", "bert"),
    ("query_proj key_proj value_proj dense", "deberta-v2"),
    ("in_proj", "deberta"),
)

_NORMS: _Rows = (
    ("input_layernorm post_attention_layernorm norm", "llama mistral gemma"),
    (
        "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm",
        "gemma2 gemma3_text",
    ),
    ("input_layernorm post_attention_layernorm ln_f", "bloom falcon"),
    ("multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head", "llava"),
    ("layer_norm final_layer_norm", "t5 mt5"),
    ("self_attn_layer_norm encoder_attn_layer_norm final_layer_norm", "bart"),
    ("layernorm LayerNorm final_layer_norm self_attn_layer_norm", "blip-2"),
    ("ln_1 ln_2 ln_f", "gpt2"),
    ("ln_1 ln_f", "gptj"),
    ("input_layernorm final_layernorm", "phi"),
    ("post_attention_layernorm", "qwen2 qwen3"),
)

_IA3: _Rows = (
    ("k v wo", "t5"),
    ("k v wi_1", "mt5"),
    ("c_attn mlp.c_proj", "gpt2 gpt_bigcode"),
    ("query_key_value mlp.dense_4h_to_h", "bloom"),
    ("query_key_value dense_4h_to_h", "gpt_neox falcon RefinedWeb RefinedWebModel"),
    ("key value output.dense", "bert roberta"),
    ("key_proj value_proj output.dense", "deberta-v2"),
    ("in_proj output.dense", "deberta"),
    ("q_proj k_proj fc2", "opt"),
    ("q_proj v_proj fc2", "bart phi"),
    ("q_proj v_proj fc_out", "gptj"),
    ("q_proj v_proj c_proj", "gpt_neo"),
    ("k_proj v_proj down_proj", "llama mistral"),
    ("k_proj v_proj w2", "mixtral"),
    ("q_proj v_proj down_proj", "llama4 gemma gemma2 gemma3_text qwen2 qwen3"),
)

_IA3_FEEDFORWARD: _Rows = (
    ("wo", "t5"),
    ("", "mt5"),
    ("mlp.c_proj", "gpt2 gpt_bigcode"),
    ("mlp.dense_4h_to_h", "bloom"),
    ("dense_4h_to_h", "gpt_neox falcon RefinedWeb RefinedWebModel"),
    ("output.dense", "bert roberta deberta deberta-v2"),
    ("fc2", "opt bart phi"),
    ("fc_out", "gptj"),
    ("c_proj", "gpt_neo"),
    ("w2", "mixtral"),
    ("down_proj", f"{_LLAMA_LIKE} mistral"),
)

_BEFT: _Rows = (
    ("v", "t5 mt5"),
    ("value", "bert roberta"),
    ("value_proj", "deberta-v2"),
    ("v_proj", f"{_LLAMA_LIKE} mistral mixtral phi bart opt gptj gpt_neo"),
)

_OSF: _Rows = (
    ("q_proj k_proj v_proj o_proj gate_proj down_proj up_proj", f"{_LLAMA_LIKE} mistral mixtral phi"),
    ("q_proj k_proj v_proj out_proj fc1 fc2", "opt"),
    ("q_proj k_proj v_proj out_proj fc_in fc_out", "gptj"),
    ("c_attn c_proj", "gpt2 gpt_bigcode"),
    ("query_key_value dense_4h_to_h", "bloom gpt_neox falcon"),
)


def _table(rows: _Rows, without: str = "", **extra: str) -> dict[str, list[str] | str]:
    """`{model type: target modules}` of `rows`, minus the model types in `without`, plus `extra` (model=targets)."""
    dropped = without.split()
    table: dict[str, list[str] | str] = {}
    for targets, models in (*rows, *((targets, model) for model, targets in extra.items())):
        is_regex = "(" in targets
        for model in models.split():
            if model not in dropped:
                table[model] = targets if is_regex else targets.split()
    return table


_MLP_OF_GPT2 = {"gpt2": "mlp.c_proj", "gpt_bigcode": "mlp.c_proj"}
_ATTENTION_OF_PHI = {"phi": "q_proj v_proj"}
_VIT = {"vit": "query value"}

TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_DEFT_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_PSOFT_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_SUPERTUNING_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING = _table(_LORA)
TRANSFORMERS_MODELS_TO_ADAMSS_TARGET_MODULES_MAPPING = _table(_LORA, **_VIT)
TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING = _table(_LORA, **_MLP_OF_GPT2)
TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING = _table(_LORA, **_MLP_OF_GPT2)
TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING = _table(_LORA, without="btlm rwkv rwkv7", **_MLP_OF_GPT2)
TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING = _table(_LORA, **_ATTENTION_OF_PHI)
TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING = _table(_LORA, **_ATTENTION_OF_PHI)
TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING = _table(_LORA, **_ATTENTION_OF_PHI, **_VIT)
TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING = _table(_LORA, **_ATTENTION_OF_PHI, dinov2="query value")
TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING = _table(_ALL_ATTENTION, roberta="query key value dense")
TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING = _table(_ALL_ATTENTION, roberta="query value")
TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING = _table(_NORMS)
TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING = _table(_IA3)
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = _table(_IA3_FEEDFORWARD)
TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING = _table(_BEFT)
TRANSFORMERS_MODELS_TO_OSF_TARGET_MODULES_MAPPING = _table(_OSF)

WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
# From this many target modules on, the list is shortened to suffixes before the modules are matched.
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
# dtypes that an adapter may compute in
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# names of storage dtypes that an adapter never computes in: its own weights are made float32 instead
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


def bloom_model_postprocess_past_key_value(
    past_key_values: tuple[torch.Tensor, ...],
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Virtual tokens in old BLOOM's cache layout.

    The concatenated input is (2 layers, batch, heads, tokens, head_dim), keys first; each layer's pair is shaped
    key (batch * heads, head_dim, tokens) and value (batch * heads, tokens, head_dim). Checkpoints were trained with
    this order of the keys' elements, so it has to stay.
    """
    keys, values = torch.cat(past_key_values).chunk(2)
    layers, batch, heads, tokens, head_dim = keys.shape
    keys = keys.transpose(2, 3).reshape(layers, batch * heads, head_dim, tokens)
    return tuple(zip(keys, values.flatten(1, 2), strict=True))


def starcoder_model_postprocess_past_key_value(past_key_values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Virtual tokens for multi-query attention: (2, batch, heads, tokens, head_dim) to (batch, tokens, 2 head_dim)."""
    return tuple(torch.cat(tuple(kv[:, :, 0]), dim=-1) for kv in past_key_values)


def _prefix_postprocess_mapping() -> dict[str, object]:
    """Model types whose cache layout of the installed transformers needs a postprocessing of virtual tokens."""
    from ..import_utils import is_transformers_le_4_53

    mapping: dict[str, object] = {}
    if is_transformers_le_4_53:
        mapping["gpt_bigcode"] = starcoder_model_postprocess_past_key_value
    try:
        from transformers import BloomPreTrainedModel
    except ImportError:
        return mapping
    if hasattr(BloomPreTrainedModel, "_convert_to_standard_cache"):
        mapping["bloom"] = bloom_model_postprocess_past_key_value
    return mapping


def __getattr__(name: str) -> object:
    # this table depends on the installed transformers, so it is made when asked for
    if name == "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING":
        return globals().setdefault(name, _prefix_postprocess_mapping())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
