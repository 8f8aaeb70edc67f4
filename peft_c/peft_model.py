"""PeftModel and its task classes: a base model with named adapters that are added, switched, saved and loaded."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from . import _C, hub, offload, prompt_learning
from .config import PeftConfig, check_is_config
from .mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from .reexports import elsewhere
from .rollback import undo_on_error
from .status import (
    TunerLayerStatus,
    TunerModelStatus,
    count_parameters,
    get_layer_status,
    get_model_status,
)
from .tuners.tuners_utils import SWITCHES, BaseTuner, BaseTunerLayer
from .utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from .utils.integrations import init_empty_weights
from .utils.other import (
    AuxiliaryTrainingWrapper,
    _set_trainable,
    create_attention_mask,  # noqa: F401
    id_tensor_storage,
    infer_device,
    set_additional_trainable_modules,
)
from .utils.peft_types import PeftType
from .utils.save_and_load import get_peft_model_state_dict, load_adapter_state, load_peft_weights

# Initialisations that change the base weights: (value of init_lora_weights, its name).
# value of `init_lora_weights`, its name, and the section of its example that says how to convert adapters
_INITS_THAT_CHANGE_BASE_WEIGHTS = (
    ("pissa", "PiSSA", "convert-pissa-to-lora"),
    ("corda", "CorDA", "convert-corda-to-lora"),
    ("olora", "OLoRA", "olora-and-lora"),
)


def warn_if_name_in_prefix(adapter_name: str, prefix: str | None) -> None:
    """Warns when the adapter's name is part of the parameters' prefix: keys with and without it look alike then."""
    if prefix and adapter_name in prefix:
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. "
            "This may lead to reinitialization of the adapter weights during loading."
        )


def _is_shared_copy(key: str, peft_type: str) -> bool:
    """Whether `key` is a layer's reference to a parameter that the model stores once: checkpoints do not have it."""
    if "vblora_vector_bank" in key or "prompt_encoder" in key or ".tinylora_v." in key:
        return True
    return peft_type == "UNILORA" and ".unilora_theta_d." in key and not key.startswith("base_model.unilora_theta_d.")


def enable_input_grads(model: nn.Module) -> None:
    """Makes the embeddings' output require grad, which gradient checkpointing needs under frozen base weights.
    Quantised models are left to `prepare_model_for_kbit_training`."""
    if any(getattr(model, f"is_{kind}", False) for kind in ("loaded_in_8bit", "loaded_in_4bit", "quantized")):
        return
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):

        def require_grad(module, args, output):
            output.requires_grad_(True)

        model.get_input_embeddings().register_forward_hook(require_grad)


def checkpoints_gradients(model: nn.Module) -> bool:
    """Whether the model recomputes activations; true when it does not say."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):  # of transformers, new and old
        if hasattr(model, name):
            return getattr(model, name)
    return True


def load_config(model_id, config: PeftConfig | None, kwargs: dict[str, Any]) -> PeftConfig:
    """The configuration given, checked, or else the one that `model_id` has, of the class that it names."""
    if config is None:
        download, _ = hub.split_download_kwargs(kwargs, extra=("use_auth_token",))
        peft_type = PeftConfig._get_peft_type(model_id, **download)
        return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].from_pretrained(model_id, **kwargs)
    if not isinstance(config, PeftConfig):
        raise ValueError(f"The input config must be a PeftConfig, got {config.__class__}")
    return config


def _check_same_type(model_id, subfolder: str | None, adapter_name: str, config: PeftConfig) -> None:
    """Raises `ValueError` when the folder `model_id` holds an adapter of another type than that of `config`."""
    path = hub.local_file(model_id, CONFIG_NAME, subfolder)
    saved = PeftConfig.from_json_file(path).get("peft_type") if path else None
    wanted = getattr(config.peft_type, "value", config.peft_type)
    if saved is not None and saved != wanted:
        raise ValueError(
            f"Cannot load '{path}' into the adapter '{adapter_name}': it is of type {saved}, the adapter of {wanted}."
        )


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of the object `owner` and restores what was there."""
    missing = object()
    before = owner.__dict__.get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


class AdapterLoadingMixin(hub.PushToHubMixin):
    """What PeftModel and PeftMixedModel share: forwarding to the tuner, parameter counts, loading of adapters."""

    def __getattr__(self, name: str) -> Any:
        """Attributes that are not found here are those of the wrapped model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not constructed yet
                raise
            return getattr(self.base_model, name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters), base model and adapters together."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trainable, of how many, and the percentage."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    @classmethod
    def _split_kwargs(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return hub.split_download_kwargs(kwargs, extra=("use_auth_token",))

    def _check_new_adapter_config(self, peft_config: PeftConfig, is_trainable: bool) -> None:
        """Refuses or warns about an adapter that does not go together with how, or to what, it is added."""
        if peft_config.is_prompt_learning and is_trainable:
            raise ValueError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")
        others = list(self.peft_config.values())
        inits = [getattr(config, "init_lora_weights", None) for config in (peft_config, *others)]
        for init, name, section in _INITS_THAT_CHANGE_BASE_WEIGHTS:
            if others and init in inits:
                warnings.warn(
                    f"{name} changes the base weights of the model and should thus not be used with other adapters. "
                    f"Consider converting the {name} adapter into a normal LoRA adapter: "
                    f"https://github.com/huggingface/peft/tree/main/examples/{init}_finetuning#{section}"
                )
                break

    def _load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ):
        download, options = self._split_kwargs(kwargs)
        is_new = adapter_name not in self.peft_config
        if is_new:
            config = load_config(model_id, None, dict(download))
            self._check_new_adapter_config(config, is_trainable=is_trainable)
            config.inference_mode = not is_trainable
            if hasattr(config, "runtime_config"):
                config.runtime_config.ephemeral_gpu_offload = ephemeral_gpu_offload
        else:
            _check_same_type(model_id, download.get("subfolder"), adapter_name, self.peft_config[adapter_name])
        # Everything is read before the model is touched.
        device = infer_device() if torch_device is None else torch_device
        weights = load_peft_weights(model_id, device=device, key_mapping=key_mapping, **download)

        with undo_on_error(self) if is_new else nullcontext():
            if is_new:
                self.add_adapter(
                    adapter_name,
                    config,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                )
                if is_trainable:
                    self.set_requires_grad(adapter_name)
            config = self.peft_config[adapter_name]
            swapped_in = (
                self.base_model._temporarily_active(adapter_name) if config.is_adaption_prompt else nullcontext()
            )
            with swapped_in:
                # Other packages assign functions of their own to this module under PEFT's name.
                load = globals().get("set_peft_model_state_dict") or partial(
                    load_adapter_state, missing_of_model=False
                )
                try:
                    result = load(
                        self,
                        weights,
                        adapter_name=adapter_name,
                        ignore_mismatched_sizes=options.get("ignore_mismatched_sizes", False),
                        low_cpu_mem_usage=low_cpu_mem_usage,
                    )
                except (RuntimeError, KeyError) as exc:
                    reason = exc.args[0] if exc.args else exc
                    raise type(exc)(
                        f"The adapter '{adapter_name}' could not be loaded from '{model_id}'; the model is unchanged. "
                        f"{reason}"
                    ) from exc

        prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
        result.missing_keys[:] = [
            key
            for key in result.missing_keys
            if prefix in key and adapter_name in key and not _is_shared_copy(key, config.peft_type)
        ]
        if offload.is_offloaded(self) and len(self.peft_config) == 1:
            offload.redispatch(self, adapter_name, weights, options)
        if hasattr(self.base_model, "_cast_adapter_dtype"):
            self.base_model._cast_adapter_dtype(
                adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
            )
        if not is_trainable:
            self.eval()
        return result


def _disable(tuner: nn.Module) -> bool | str | None:
    """Disables the adapter layers. Returns whether they were enabled before: True, False, None if there are none, or
    "irregular", with a warning, when they differed."""
    disable, enable = tuner.disable_adapter_layers, getattr(tuner, "_enable_adapter_layers", None)
    usual = tuple(getattr(method, "__func__", None) for method in (disable, enable)) == SWITCHES
    if usual:
        tuner._warn_about_bias()
        enabled = enable(False, irregular=False)
    else:
        (layers,) = _C.find(tuner, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        states = {not layer.disable_adapters for layer in layers}
        enabled = None if not states else states.pop() if len(states) == 1 else "irregular"
    if enabled == "irregular":
        warnings.warn(
            "The model contains some adapter layers that are enabled and others that are disabled. This is most "
            "likely unintentional. After exiting the disable_adapter context, all adapters will be enabled"
        )
    if not usual:
        disable()
    elif enabled == "irregular":
        enable(False)
    return enabled


class PeftModel(AdapterLoadingMixin, nn.Module):
    """A base model with adapters.

    Attributes that it does not have itself are those of the tuner (`base_model`) and of the base model in it.

    Args:
        model: the base model; its modules are replaced in place.
        peft_config: configuration of the first adapter.
        adapter_name: name of the first adapter.
        autocast_adapter_dtype: keep float16 and bfloat16 adapter weights in float32.
        low_cpu_mem_usage: create the adapter on the meta device, for weights that are loaded right after.

    Attributes:
        base_model: the tuner, such as a LoraModel, which holds the base model as `model`.
        peft_config (`dict[str, PeftConfig]`): configuration of each adapter.
        active_adapter (`str`): the adapter in use; `active_adapters` has all when there are several.
        modules_to_save (`set[str]` or None): modules that are trained and saved in full beside the adapters.
    """

    _pipeline_tag: str | None = None
    # Names of the modules at the end of the model that a task trains in full.
    _head_names: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self.active_adapter = adapter_name
        self.peft_type = peft_config.peft_type
        # Arguments of a forward call that are for the adapters, not for the base model.
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._is_prompt_learning = peft_config.is_prompt_learning
        self._adapters_disabled = False
        if self._is_prompt_learning:
            self._peft_config = {}
            self.base_model = model
            self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage)
        else:
            self._peft_config = None
            tuner_cls = PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type]
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self.base_model = tuner_cls(model, {adapter_name: peft_config}, adapter_name)
        if hasattr(self.base_model, "_cast_adapter_dtype"):
            self.base_model._cast_adapter_dtype(
                adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
            )
        if checkpoints_gradients(model):
            self.prepare_model_for_gradient_checkpointing(model)
        # Simulated tensor parallelism sums in another order, so that merged and unmerged outputs would differ.
        if hasattr(getattr(self.base_model, "config", None), "pretraining_tp"):
            self.base_model.config.pretraining_tp = 1

    # ------------------------------------------------------------------------------------------------ properties

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configuration of each adapter."""
        return self._peft_config if self._is_prompt_learning else self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        if self._is_prompt_learning:
            self._peft_config = value
        else:
            self.base_model.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        adapters = getattr(self.base_model, "active_adapters", None)
        if isinstance(adapters, list):
            return adapters
        # Under prompt learning the base model may be transformers' own, where this is a method.
        return [self.active_adapter] if isinstance(self.active_adapter, str) else self.active_adapter

    @property
    def active_peft_config(self) -> PeftConfig:
        """Configuration of the active adapter; `ValueError` when there is none."""
        if not isinstance(self.active_adapter, str):
            raise ValueError(f"No adapter is active. Activate one of {list(self.peft_config)} with `set_adapter`.")
        return self.peft_config[self.active_adapter]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether adapters take part in a forward call: false inside of `disable_adapter()`."""
        if self._is_prompt_learning:
            return not self._adapters_disabled
        return not self._adapters_disabled or not self.active_adapters

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's `dtype`, if it has one."""
        return getattr(self.base_model, "dtype", None)

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that any adapter trains and saves in full, or None."""
        names = {name for cfg in self.peft_config.values() for name in getattr(cfg, "modules_to_save", None) or ()}
        return names or None

    # --------------------------------------------------------------------------------------------- save and load

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes each adapter's weights and configuration, and a model card, into `save_directory`.

        The adapter "default" goes into the folder itself, others into sub-folders of their names.

        Args:
            save_directory: folder, created if needed.
            safe_serialization: write `adapter_model.safetensors`; if False, `adapter_model.bin` with torch.save.
            selected_adapters: names of the adapters to save; all by default.
            save_embedding_layers: save the embeddings too; "auto": when they are targeted or were resized.
            is_main_process: only the main process writes.
            path_initial_model_for_weight_conversion: folder with the adapter as it was after an initialisation that
                changed the base weights (PiSSA, CorDA, OLoRA ...); what is saved then is an ordinary LoRA of twice
                the rank for the original base weights.
            kwargs: `state_dict`, a state dict to take the weights from instead of the model's.

        Raises `ValueError` when `save_directory` is a file or an adapter is unknown.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        if not set(names) <= set(self.peft_config):
            raise ValueError(
                "You passed an invalid `selected_adapters` arguments, current supported adapter names are"
                f" {list(self.peft_config)} - got {selected_adapters}."
            )
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            self.create_or_update_model_card(save_directory)
        for name in names:
            state_dict = get_peft_model_state_dict(
                self,
                state_dict=kwargs.get("state_dict"),
                adapter_name=name,
                save_embedding_layers=save_embedding_layers,
            )
            folder = save_directory if name == "default" else os.path.join(save_directory, name)
            os.makedirs(folder, exist_ok=True)
            if is_main_process:
                self._save_adapter(
                    name, state_dict, folder, safe_serialization, path_initial_model_for_weight_conversion, kwargs
                )

    def _save_adapter(
        self,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        folder: str,
        safe_serialization: bool,
        initial: str | None,
        kwargs: dict[str, Any],
    ) -> None:
        config = self.peft_config[adapter_name]
        if safe_serialization:
            _clone_aliases(state_dict)
        if initial is not None:
            config = copy.deepcopy(config)
            is_lora = config.peft_type == PeftType.LORA
            setattr(config, "init_lora_weights" if is_lora else "init_weights", True)
            config.save_pretrained(initial)
            tuner_cls = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
            state_dict = tuner_cls._convert_state_dict_for_initial_model(self, config, initial, state_dict, kwargs)
        if safe_serialization:
            from safetensors.torch import save_file

            contiguous = {key: value.contiguous() for key, value in state_dict.items()}
            save_file(contiguous, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        else:
            torch.save(state_dict, os.path.join(folder, WEIGHTS_NAME))

        if config.base_model_name_or_path is None:
            base = self.base_model if config.is_prompt_learning else self.base_model.model
            config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
        auto_mapping = None
        if config.task_type is None:
            base_cls = self._get_base_model_class(is_prompt_tuning=config.is_prompt_learning)
            auto_mapping = {"base_model_class": base_cls.__name__, "parent_library": base_cls.__module__}
        if initial is not None:
            _double_rank(config)
        with _replaced(config, "inference_mode", True):
            config.save_pretrained(folder, auto_mapping_dict=auto_mapping)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Adds a saved adapter to `model`, in place, and returns the PeftModel around it.

        The class is the one for the configuration's task type. When anything fails, `model` is left as it was.

        Args:
            model: the base model.
            model_id: folder that `save_pretrained` wrote, or Hub repository.
            adapter_name: name for the adapter.
            is_trainable: whether it will be trained; otherwise it is frozen and the model put in evaluation mode.
            config: configuration to use instead of the one in `model_id`.
            autocast_adapter_dtype: keep float16 and bfloat16 adapter weights in float32.
            ephemeral_gpu_offload: move what is on the CPU to the GPU only for expensive operations on it.
            low_cpu_mem_usage: create the adapter on the meta device before its weights are loaded.
            key_mapping: regular expressions and replacements for the checkpoint's keys (without prefix and adapter
                name); by default those of a transformers model that renamed its modules.
            kwargs: `torch_device`, `ignore_mismatched_sizes`, the arguments of `hf_hub_download`, and those of
                `accelerate.dispatch_model`.

        Raises `ValueError` for files that are missing or cannot be read, `RuntimeError` for weights of other shapes.
        """
        from .auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        config = load_config(model_id, config, kwargs)
        if config.is_prompt_learning and is_trainable:
            raise ValueError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")
        config.inference_mode = not is_trainable
        if key_mapping is None and not config.is_prompt_learning:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", {})
        if hasattr(config, "runtime_config"):
            config.runtime_config.ephemeral_gpu_offload = ephemeral_gpu_offload
        elif ephemeral_gpu_offload:
            warnings.warn("Ephemeral GPU offloading is not supported for this model. Ignoring.")
        if ephemeral_gpu_offload:  # a `load_adapter` that is overridden need not know it
            kwargs["ephemeral_gpu_offload"] = True
        index = offload.disk_index(model, kwargs.get("use_safetensors", True))
        if index is not None:
            kwargs["offload_index"] = index
        offload.detach_hooks(model)

        model_cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, cls)
        with undo_on_error(model):
            peft_model = model_cls(
                model,
                config,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            result = peft_model.load_adapter(
                model_id,
                adapter_name,
                is_trainable=is_trainable,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                key_mapping=key_mapping,
                **kwargs,
            )
        missing = [key for key in result.missing_keys if not _is_shared_copy(key, config.peft_type)]
        if missing:
            message = f"Found missing adapter keys while loading the checkpoint: {missing}."
            prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type)
            if prefix and adapter_name in prefix:
                message = (
                    f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. "
                    f"This could be the potential reason for missing adapter keys. {message}"
                )
            warnings.warn(message)
        return peft_model

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ):
        """Adds a saved adapter, without activating it. When anything fails, the model is left as it was.

        If there is an adapter of this name, its weights are replaced. Arguments are those of `from_pretrained`, and
        `torch_device` for the device to read the file to.

        Returns torch's named tuple with `missing_keys` (of this adapter only) and `unexpected_keys`. Raises
        `ValueError` for files that are missing or cannot be read and for an adapter of another type, `RuntimeError`
        for weights of other shapes.
        """
        return self._load_adapter(
            model_id,
            adapter_name,
            is_trainable=is_trainable,
            torch_device=torch_device,
            autocast_adapter_dtype=autocast_adapter_dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
            **kwargs,
        )

    # ------------------------------------------------------------------------------------------ adapters, by name

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds a new, untrained adapter without activating it.

        Args:
            adapter_name: a name that no adapter has.
            peft_config: configuration, of the type that the model's adapters have.
            low_cpu_mem_usage: create it on the meta device, for weights that are loaded right after.
            autocast_adapter_dtype: keep float16 and bfloat16 weights in float32.

        Raises `ValueError` for a name in use and for another type of adapter.
        """
        if isinstance(adapter_name, str) and adapter_name in self.peft_config:
            raise ValueError(
                f"Adapter with name '{adapter_name}' already exists. Choose another name, or delete it first."
            )
        check_is_config(peft_config)
        warn_if_name_in_prefix(adapter_name, PEFT_TYPE_TO_PREFIX_MAPPING.get(peft_config.peft_type))
        if peft_config.peft_type != self.peft_type:
            raise ValueError(
                "Cannot combine adapters with different peft types. "
                f"Found {self.peft_type} and {peft_config.peft_type} (adapter '{adapter_name}')."
            )
        self._add_head(peft_config)
        try:
            if peft_config.is_prompt_learning:
                prompt_learning.add_adapter(self, adapter_name, peft_config)
            elif peft_config.is_adaption_prompt:
                self.base_model.add_adapter(adapter_name, peft_config)
                set_additional_trainable_modules(
                    model=self.base_model,
                    peft_config=peft_config,
                    model_config=BaseTuner.get_model_config(self),
                    adapter_name=adapter_name,
                )
            else:
                self.peft_config[adapter_name] = peft_config
                self.base_model.inject_adapter(
                    self.base_model.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
                )
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise
        if hasattr(self.base_model, "_cast_adapter_dtype"):
            self.base_model._cast_adapter_dtype(
                adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
            )

    def _add_head(self, peft_config: PeftConfig) -> None:
        """Adds the modules at the end of the model to those that the adapter trains and saves in full."""
        if self._head_names and hasattr(peft_config, "modules_to_save"):
            names = list(peft_config.modules_to_save or ())
            peft_config.modules_to_save = names + [name for name in self._head_names if name not in names]

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Activates one adapter, and only that, and makes it trainable unless `inference_mode` is true.

        Raises `ValueError` for an unknown name. For several active adapters use `model.base_model.set_adapter`.
        """
        if isinstance(adapter_name, (list, tuple, set)):
            raise TypeError(
                f"Expected the name of one adapter, got {adapter_name!r}. To activate several adapters, call "
                "`model.base_model.set_adapter`."
            )
        tuner = self._modules["base_model"]
        configs = self._peft_config if self._is_prompt_learning else tuner.peft_config
        if adapter_name not in configs:
            raise ValueError(f"Adapter {adapter_name} not found. The adapters are {list(configs)}.")
        if self._is_prompt_learning:
            prompt_learning.set_adapter(self, adapter_name, inference_mode)
        else:
            tuner.set_adapter(adapter_name, inference_mode=inference_mode)
        object.__setattr__(self, "active_adapter", adapter_name)  # no module or weight, which torch would look for

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Makes the parameters of the adapter(s) trainable, or freezes them, whether they are active or not.

        Raises `TypeError` for prompt learning.
        """
        if self._is_prompt_learning:
            raise TypeError(
                "Setting `requires_grad` is not supported for prompt learning methods like "
                f"{self.active_peft_config.peft_type.value}."
            )
        self.base_model.set_requires_grad(adapter_names=adapter_names, requires_grad=requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was the active one, another becomes active; if it was the only one, none is.

        Raises `ValueError` for an unknown name.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist. The adapters are {list(self.peft_config)}.")
        if self._is_prompt_learning:
            prompt_learning.delete_adapter(self, adapter_name)
            return
        self.base_model.delete_adapter(adapter_name=adapter_name)
        active = self.active_adapters
        if len(active) == 1 or self.active_adapter == adapter_name:
            self.active_adapter = active[0] if active else []

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside of this context the model computes what the base model computes.

        Contexts may be nested. Adapters that were disabled before stay disabled after it.
        """
        if self._is_prompt_learning:
            with prompt_learning.disabled(self):
                yield
            return
        tuner, was_disabled = self._modules["base_model"], self._adapters_disabled
        enabled = _disable(tuner)
        self.__dict__["_adapters_disabled"] = True
        try:
            yield
        finally:
            if enabled is not False and not (enabled is None and was_disabled):
                tuner.enable_adapter_layers()
            self.__dict__["_adapters_disabled"] = was_disabled

    # --------------------------------------------------------------------------------------------------- running

    def get_base_model(self) -> nn.Module:
        """The base model, with the adapter layers in it."""
        return self.base_model if self._is_prompt_learning else self.base_model.model

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type:
        return type(self.base_model if is_prompt_tuning else self.base_model.model)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        """The tuner's context for one call with these arguments, when it has one and the adapters are enabled."""
        hooks = getattr(self.base_model, "_enable_peft_forward_hooks", None)
        return nullcontext() if hooks is None or not self.has_active_enabled_adapter else hooks(*args, **kwargs)

    def _for_base_model(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in kwargs.items() if key not in self.special_peft_forward_args}

    def forward(self, *args: Any, **kwargs: Any):
        """Calls the base model with the adapters in it.

        `adapter_names` (`list[str]`) names the adapter for each sample of the batch, "__base__" for none.
        """
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model()(*args, **self._for_base_model(kwargs))

    def generate(self, *args: Any, **kwargs: Any):
        """Calls the base model's `generate` with the adapters in it; `adapter_names` as in `forward`."""
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model().generate(*args, **self._for_base_model(kwargs))

    def _task_forward(self, inputs: dict[str, Any], task_ids: Any, kwargs: dict[str, Any]):
        """The forward of the task classes: `inputs` are their named arguments, all of which the base model takes."""
        if self._is_prompt_learning:
            return prompt_learning.forward(self, inputs, task_ids, kwargs)
        if self.peft_type == PeftType.POLY:
            kwargs["task_ids"] = task_ids
        with self._enable_peft_forward_hooks(**kwargs):
            return self.base_model(**inputs, **self._for_base_model(kwargs))

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Makes the embeddings' output require grad unless the model is quantised."""
        self._prepare_model_for_gradient_checkpointing(model)

    def _prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        enable_input_grads(model)
        return model

    def _setup_prompt_encoder(self, adapter_name: str) -> None:
        """Makes the prompt of an adapter whose config is there; subclasses with prompts of their own override it."""
        prompt_learning.set_up_encoder(self, adapter_name)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """The prompt of a prompt-learning adapter as it is saved, (num_virtual_tokens, token_dim) on the CPU."""
        return prompt_learning.prompt_to_save(self, adapter_name)

    def get_prompt(
        self, batch_size: int, task_ids: torch.Tensor | None = None, max_cache_len: int | None = None
    ) -> torch.Tensor:
        """The active prompt for `batch_size` samples: embeddings, or past keys and values for prefix tuning."""
        return prompt_learning.prompt(self, batch_size, task_ids)

    # ---------------------------------------------------------------------------------------------- descriptions

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The status of each adapter layer: see `peft_c.get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The status of the adapters as a whole: see `peft_c.get_model_status`."""
        return get_model_status(self)

    def _repr_html_(self) -> str:
        """Notebooks show this: base model, adapters, which are active, trainable and merged, parameters."""
        from .notebook import summary_html

        return summary_html(self)

    def _get_peft_specific_model_tags(self) -> list[str]:
        from .model_card import adapter_tags

        return adapter_tags(self)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Writes `README.md` into `output_dir`, or updates the one there: library, tags, base model, version."""
        from .model_card import write_model_card

        write_model_card(self, output_dir)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapters can be turned into LoRA: all layers add a delta to the base weight."""
        if self._is_prompt_learning or not hasattr(self.base_model, "supports_lora_conversion"):
            return False
        return self.base_model.supports_lora_conversion()


def _clone_aliases(state_dict: dict[str, torch.Tensor]) -> None:
    """Clones tensors that share storage with an earlier one: safetensors refuses those."""
    seen = set()
    for key, tensor in state_dict.items():
        where = id_tensor_storage(tensor) if isinstance(tensor, torch.Tensor) else id(tensor)
        if where in seen:
            state_dict[key] = tensor.clone()
        seen.add(where)


def _double_rank(config: PeftConfig) -> None:
    """Describes the difference of two adapters: twice the rank and the same scaling."""
    config.init_lora_weights = True
    config.r *= 2
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name):
            setattr(config, name, {key: 2 * value for key, value in getattr(config, name).items()})


def _return_dict(model: nn.Module, return_dict: bool | None) -> bool:
    """The argument, or the base model's default when it is None."""
    if return_dict is not None:
        return return_dict
    config = model.config
    return getattr(config, "return_dict", True) and not getattr(config, "torchscript", False)


class _PeftModelWithHead(PeftModel):
    """A model whose last layer is new for the task: it is trained and saved in full beside each adapter."""

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        self._add_head(peft_config)
        super().__init__(model, peft_config, adapter_name, **kwargs)
        head_names = getattr(peft_config, "modules_to_save", None) or ()
        for name, _ in self.base_model.named_children():
            if any(head in name for head in head_names):
                self.cls_layer_name = name
                break
        _set_trainable(self, adapter_name, module_names=head_names, inference_mode=peft_config.inference_mode)


class PeftModelForSequenceClassification(_PeftModelWithHead):
    """For models that classify sequences; modules named "classifier" and "score" are trained in full.

    Args: as `PeftModel`.
    """

    _head_names = ("classifier", "score")

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        task_ids=None,
        **kwargs,
    ):
        """As the base model's forward. `task_ids` is for multi-task methods."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": _return_dict(self, return_dict),
        }
        return self._task_forward(inputs, task_ids, kwargs)


class PeftModelForTokenClassification(_PeftModelWithHead):
    """For models that classify tokens; modules named "classifier" and "score" are trained in full.

    Args: as `PeftModel`.
    """

    _head_names = ("classifier", "score")

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig = None, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)

    forward = PeftModelForSequenceClassification.forward


class PeftModelForQuestionAnswering(_PeftModelWithHead):
    """For models that find the answer in a text; modules named "qa_outputs" are trained in full.

    Args: as `PeftModel`.
    """

    _head_names = ("qa_outputs",)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        task_ids=None,
        **kwargs,
    ):
        """As the base model's forward; `token_type_ids` and `position_ids` go there when they are given."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "start_positions": start_positions,
            "end_positions": end_positions,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": _return_dict(self, return_dict),
        }
        optional = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        inputs.update({key: value for key, value in optional.items() if value is not None})
        return self._task_forward(inputs, task_ids, kwargs)


class PeftModelForFeatureExtraction(PeftModel):
    """For models whose hidden states are used, such as sentence embeddings.

    Args: as `PeftModel`.
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any):
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        task_ids=None,
        **kwargs,
    ):
        """As the base model's forward. `task_ids` is for multi-task methods."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        return self._task_forward(inputs, task_ids, kwargs)


class _PeftModelThatGenerates(PeftModel):
    """A language model: while it generates, it prepares its inputs through `prepare_inputs_for_generation` here."""

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.base_model_prepare_inputs_for_generation = self.base_model.prepare_inputs_for_generation

    def _generate(self, args: tuple, kwargs: dict[str, Any]):
        with _replaced(self.base_model, "prepare_inputs_for_generation", self.prepare_inputs_for_generation):
            if self._is_prompt_learning:
                return prompt_learning.generate(self, args, kwargs)
            with self._enable_peft_forward_hooks(*args, **kwargs):
                return self.base_model.generate(*args, **self._for_base_model(kwargs))

    def _prepare_inputs(self, args: tuple, task_ids: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        model_kwargs = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        if self.peft_type == PeftType.POLY:
            model_kwargs["task_ids"] = task_ids
        if self._is_prompt_learning:
            return prompt_learning.prepare_inputs_for_generation(self, model_kwargs, task_ids, kwargs)
        return model_kwargs


class PeftModelForCausalLM(_PeftModelThatGenerates):
    """For causal language models.

    Args: as `PeftModel`.
    """

    _pipeline_tag = "text-generation"

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        task_ids=None,
        **kwargs,
    ):
        """As the base model's forward; finds where the adapters with invocation tokens (aLoRA) start to act."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        if not self._is_prompt_learning:
            if self.active_adapter:
                from .tuners.lora.variants import get_alora_offsets_for_forward

                kwargs = get_alora_offsets_for_forward(self, input_ids, inputs_embeds, **kwargs)
            if getattr(getattr(self.base_model, "config", None), "model_type", None) == "mpt":
                if inputs.pop("inputs_embeds") is not None:
                    raise AssertionError("forward in MPTForCausalLM does not support inputs_embeds")
        return self._task_forward(inputs, task_ids, kwargs)

    def generate(self, *args: Any, **kwargs: Any):
        """Calls the base model's `generate` with the adapters in it; `adapter_names` as in `forward`."""
        if hasattr(self.base_model, "model"):
            self.base_model.model.generation_config = self.generation_config
        else:
            self.base_model.generation_config = self.generation_config
        if self.active_adapter and not self._is_prompt_learning:
            from .tuners.lora.variants import get_alora_offsets_for_generate

            kwargs = get_alora_offsets_for_generate(self, *args, **kwargs)
        return self._generate(args, kwargs)

    def prepare_inputs_for_generation(self, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any):
        """The base model's inputs of one generation step; the position in the cache is left to the base model."""
        model_kwargs = self._prepare_inputs(args, task_ids, kwargs)
        if not self._is_prompt_learning:
            model_kwargs.pop("cache_position", None)
        return model_kwargs


class PeftModelForSeq2SeqLM(_PeftModelThatGenerates):
    """For encoder-decoder language models.

    Args: as `PeftModel`.
    """

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        decoder_inputs_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        task_ids=None,
        **kwargs,
    ):
        """As the base model's forward. `task_ids` is for multi-task methods."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        return self._task_forward(inputs, task_ids, kwargs)

    def generate(self, **kwargs: Any):
        """Calls the base model's `generate` with the adapters in it; `adapter_names` as in `forward`."""
        return self._generate((), kwargs)

    def prepare_inputs_for_generation(self, *args: Any, task_ids: torch.Tensor = None, **kwargs: Any):
        """The base model's inputs of one generation step."""
        return self._prepare_inputs(args, task_ids, kwargs)


__getattr__ = elsewhere(__name__, "tuners.lora.variants")
