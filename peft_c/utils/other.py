"""Small helpers, and every name that PEFT keeps in its `utils.other`, gathered from the modules beside this one."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

from . import constants
from .aux_wrappers import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    _set_adapter,
    _set_layer_requires_grad,
)
from .constants import *  # noqa: F403
from .constants import bloom_model_postprocess_past_key_value, starcoder_model_postprocess_past_key_value
from .matching import (
    _get_input_embeddings_name,
    _get_module_names_tied_with_embedding,
    _get_submodules,
    _get_submodules_with_grandparent,
    _is_valid_match,
    get_pattern_key,
    match_target_against_key,
)
from .model_prep import (
    _get_no_split_modules,
    _prepare_prompt_learning_config,
    cast_mixed_precision_params,
    create_attention_mask,
    fsdp_auto_wrap_policy,
    get_gptqmodel_quant_linear,
    get_quantization_config,
    infer_device,
    is_gptqmodel_awq_layer,
    is_gptqmodel_quant_linear,
    prepare_model_for_kbit_training,
)
from .trainable_modules import _freeze_adapter, _set_trainable, set_additional_trainable_modules

__all__ = [
    *(name for name in vars(constants) if name[0].isupper()),
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",  # noqa: F405
    "bloom_model_postprocess_past_key_value",
    "starcoder_model_postprocess_past_key_value",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "_freeze_adapter",
    "_get_batch_size",
    "_get_input_embeddings_name",
    "_get_module_names_tied_with_embedding",
    "_get_no_split_modules",
    "_get_submodules",
    "_get_submodules_with_grandparent",
    "_is_valid_match",
    "_prepare_prompt_learning_config",
    "_set_adapter",
    "_set_layer_requires_grad",
    "_set_trainable",
    "cast_mixed_precision_params",
    "check_file_exists_on_hf_hub",
    "create_attention_mask",
    "fsdp_auto_wrap_policy",
    "get_gptqmodel_quant_linear",
    "get_pattern_key",
    "get_quantization_config",
    "id_tensor_storage",
    "infer_device",
    "is_gptqmodel_awq_layer",
    "is_gptqmodel_quant_linear",
    "match_target_against_key",
    "prepare_model_for_kbit_training",
    "set_additional_trainable_modules",
    "shift_tokens_right",
    "str_to_bool",
    "transpose",
]


def __getattr__(name: str) -> Any:
    # constants makes the table of postprocessing functions when it is asked for
    if name == "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING":
        return getattr(constants, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """The weight as (out, in): transposed if the layer stores (in, out). Parameters stay parameters."""
    if not fan_in_fan_out:
        return weight
    return torch.nn.Parameter(weight.T) if isinstance(weight, torch.nn.Parameter) else weight.T


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """Decoder inputs from labels (batch, length): start token first, last token dropped, -100 replaced by padding."""
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    shifted = input_ids.roll(1, dims=-1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill_(shifted == -100, pad_token_id)


def _get_batch_size(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> int:
    """First dimension of whichever is given; ValueError if neither is."""
    given = inputs_embeds if input_ids is None else input_ids
    if given is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return given.shape[0]


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """(device, identity, bytes) of a tensor's storage: equal for tensors that share it while it lives."""
    from safetensors.torch import storage_ptr, storage_size

    from ..import_utils import is_torch_tpu_available

    if tensor.device.type == "xla" and is_torch_tpu_available():
        import torch_xla

        # no storages there; the tensor's own number has to do
        identity = torch_xla._XLAC._xla_get_tensor_id(tensor)
    else:
        identity = storage_ptr(tensor)
    return tensor.device, identity, storage_size(tensor)


def str_to_bool(value: str) -> int:
    """1 for y, yes, t, true, on, 1 and 0 for n, no, f, false, off, 0, in any case; ValueError for anything else."""
    words = {
        "y": 1,
        "yes": 1,
        "t": 1,
        "true": 1,
        "on": 1,
        "1": 1,
        "n": 0,
        "no": 0,
        "f": 0,
        "false": 0,
        "off": 0,
        "0": 0,
    }
    try:
        return words[value.lower()]
    except KeyError:
        raise ValueError(f"invalid truth value {value.lower()}") from None


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether the hub has the file; None if it cannot be told (offline mode, not a repository, network trouble)."""
    if str_to_bool(os.environ.get("HF_HUB_OFFLINE", "0")):
        return None
    from huggingface_hub import file_exists
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        return file_exists(repo_id, filename, **kwargs)
    except (HFValidationError, EntryNotFoundError):
        return None
    except Exception as exc:
        warnings.warn(
            f"Unable to fetch remote file due to the following error {exc} - silently ignoring the lookup"
            f" for the file {filename} in {repo_id}."
        )
        return None
