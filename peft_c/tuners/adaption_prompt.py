"""Adaption prompts: gated prompts in the attention of the top layers (https://arxiv.org/abs/2303.16199)."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import PeftConfig
from ..utils.peft_types import PeftType
from .adaption_prompt_layer import (  # noqa: F401
    AdaptedAttention,
    AdaptedAttentionGPT,
    gpt2_compute_query_states,
    is_adaption_prompt_trainable,
    llama_apply_rotary_pos_emb,
    llama_compute_query_states,
    llama_rotate_half,
)
from .prompt_learning import register
from .room import option
from .tuners_utils import UnnamedKeys


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """Options of adaption prompts."""

    target_modules: str = option(None, "Name of the attention modules that get prompts.")
    adapter_len: int = option(None, "Length of the prompts.")
    adapter_layers: int = option(None, "How many layers get prompts, from the top.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADAPTION_PROMPT

    @property
    def is_adaption_prompt(self) -> bool:
        """Always true here."""
        return True


ModelTypeConfig = namedtuple(
    "ModelTypeConfig", ["compute_query_states", "target_modules", "k_proj_layer", "v_proj_layer", "o_proj_layer"]
)
_LLAMA = ModelTypeConfig(llama_compute_query_states, "self_attn", "k_proj", "v_proj", "o_proj")
# What is known of each type of model: how it computes queries, and the names of its layers. None: part of another.
TRANSFORMERS_MODEL_CONFIG = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gpt2": ModelTypeConfig(gpt2_compute_query_states, "attn", "c_attn", None, None),
}


def prepare_config(peft_config: AdaptionPromptConfig, model: nn.Module) -> AdaptionPromptConfig:
    """Fills in the target modules, in place; `ValueError` for types of models that are not supported."""
    model_type = model.config.model_type
    if model_type not in TRANSFORMERS_MODEL_CONFIG:
        raise ValueError(f"Unsupported model type for adaption prompt: '{model_type}'.")
    if peft_config.target_modules is None:
        peft_config.target_modules = TRANSFORMERS_MODEL_CONFIG[model_type].target_modules
    return peft_config


class AdaptionPromptModel(UnnamedKeys, nn.Module):
    """A model whose top attention modules have prompts.

    The modules of the active adapter stand in the model; those of the others wait outside, and all of them do while
    adapters are disabled.

    Args:
        model: the base model, changed in place.
        configs: the options by adapter.
        adapter_name: the first adapter.

    Attributes:
        peft_config (`dict[str, AdaptionPromptConfig]`): the options of each adapter.
    """

    def __init__(self, model: nn.Module, configs: dict[str, PeftConfig], adapter_name: str) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, AdaptionPromptConfig] = {}
        # By adapter: the modules that hold its attention modules, and, while they wait, its own modules.
        self._parents: dict[str, list[nn.Module]] = {}
        self._cached_adapters: dict[str, list[AdaptedAttention]] = {}
        self._active_adapter: str | None = None
        self._enabled = True
        self.forward = model.forward
        self.add_adapter(adapter_name, configs[adapter_name])
        for name, parameter in model.named_parameters():
            if not is_adaption_prompt_trainable(name):
                parameter.requires_grad = False

    def __getattr__(self, name: str) -> Any:
        """Attributes that are not found here are those of the base model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not constructed yet
                raise
            return getattr(self.model, name)

    @property
    def active_adapters(self) -> list[str]:
        """The active adapter's name in a list, empty when there is none."""
        return [] if self._active_adapter is None else [self._active_adapter]

    def add_adapter(self, adapter_name: str, config: AdaptionPromptConfig) -> None:
        """Adds an adapter; the first one becomes the active one.

        Raises `ValueError` for a name in use, an unsupported model, and more layers than the model has.
        """
        config = prepare_config(config, self.model)
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        modules = dict(self.model.named_modules())
        names = [name for name in modules if name.endswith(f".{config.target_modules}")]
        if len(names) < config.adapter_layers:
            raise ValueError(
                f"Config specifies more adapter layers '{config.adapter_layers}' than the model has '{len(names)}'."
            )
        parents = [modules[name.rpartition(".")[0]] for name in names[-config.adapter_layers :]]
        model_type = self.model.config.model_type
        layer = AdaptedAttentionGPT if model_type == "gpt2" else AdaptedAttention
        with self._swapped_out():
            adapted = [
                layer(model_type, config.adapter_len, getattr(parent, config.target_modules)) for parent in parents
            ]
        self.peft_config[adapter_name] = config
        self._parents[adapter_name] = parents
        self._cached_adapters[adapter_name] = adapted
        if self._active_adapter is None:
            self._active_adapter = adapter_name
            if self._enabled:
                self._set_adapted_attentions(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; if it was active, the first of the others becomes so. `ValueError` if it is unknown."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        if adapter_name == self._active_adapter:
            self._activate(next((name for name in self.peft_config if name != adapter_name), None))
        for by_adapter in (self.peft_config, self._parents, self._cached_adapters):
            by_adapter.pop(adapter_name, None)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Makes an adapter the active one. `ValueError` if it is unknown, and for `inference_mode`."""
        if inference_mode:
            raise ValueError("inference_mode is not supported for AdaptionPromptModel.")
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' does not exist.")
        if adapter_name != self._active_adapter:
            self._activate(adapter_name)

    def enable_adapter_layers(self) -> None:
        """Puts the active adapter's modules into the model."""
        if not self._enabled:
            self._enabled = True
            self._set_adapted_attentions(self._active_adapter)

    def disable_adapter_layers(self) -> None:
        """Takes them out again."""
        if self._enabled:
            self._remove_adapted_attentions(self._active_adapter)
            self._enabled = False

    def _activate(self, adapter_name: str | None) -> None:
        if self._enabled:
            self._remove_adapted_attentions(self._active_adapter)
            self._set_adapted_attentions(adapter_name)
        self._active_adapter = adapter_name

    def _set_adapted_attentions(self, adapter_name: str | None) -> None:
        if adapter_name is None:
            return
        name = self.peft_config[adapter_name].target_modules
        for parent, module in zip(self._parents[adapter_name], self._cached_adapters.pop(adapter_name), strict=True):
            setattr(parent, name, module)

    def _remove_adapted_attentions(self, adapter_name: str | None) -> None:
        if adapter_name is None:
            return
        name, parents = self.peft_config[adapter_name].target_modules, self._parents[adapter_name]
        self._cached_adapters[adapter_name] = [getattr(parent, name) for parent in parents]
        for parent in parents:
            setattr(parent, name, getattr(parent, name).model)

    @contextmanager
    def _swapped_out(self) -> Iterator[None]:
        """The base model as it is without adapters."""
        enabled = self._enabled
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if enabled:
                self.enable_adapter_layers()

    @contextmanager
    def _temporarily_active(self, adapter_name: str) -> Iterator[None]:
        """The model with this adapter's modules in it, to save or to load them."""
        before, enabled = self._active_adapter, self._enabled
        self.enable_adapter_layers()
        try:
            self.set_adapter(adapter_name)
            yield
        finally:
            self._activate(before)
            if not enabled:
                self.disable_adapter_layers()

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        """The prompts and gates of the adapter, also when its modules wait outside the model."""
        tuner = getattr(model, "base_model", model)
        if isinstance(tuner, cls) and tuner._active_adapter != adapter_name:
            with tuner._temporarily_active(adapter_name):
                state_dict = model.state_dict()
        return {key: value for key, value in state_dict.items() if is_adaption_prompt_trainable(key)}


register("adaption_prompt", AdaptionPromptConfig, AdaptionPromptModel, parts=("layer", "utils"))
