"""X-LoRA: a mixture of LoRA experts, scaled for each token by a classifier of the base model's last hidden state
(https://arxiv.org/abs/2402.07148)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..utils.constants import DUMMY_TARGET_MODULES
from .lora.model import LoraModel
from .room import RoomConfig, option, register
from .tuners_utils import BaseTuner
from .xlora_parts import (  # noqa: F401
    TemperatureScaledSoftmax,
    XLoraClassifier,
    XLoraLayer,
    _load_expert,
    convert_layers_to_xlora,
)


@dataclass
class XLoraConfig(RoomConfig):
    """Options of X-LoRA."""

    hidden_size: int = option(None, "Size of the base model's hidden states.")
    adapters: dict[str, str] = option(None, "The experts: name -> path or repository of a LoRA adapter.")
    enable_softmax: bool = option(True, "Whether a softmax makes the scalings of all experts.")
    enable_softmax_topk: bool = option(False, "Whether a softmax is taken over the scalings of the best experts only.")
    layerwise_scalings: bool = option(False, "Whether each layer gets scalings of its own.")
    xlora_depth: int = option(1, "Number of the classifier's layers.")
    xlora_size: int = option(2048, "Size of the classifier's hidden states.")
    xlora_dropout_p: float = option(0.2, "Dropout in the classifier.")
    use_trainable_adapters: bool = option(False, "Whether the experts are trained, too.")
    softmax_temperature: float = option(1.0, "Temperature of the softmax; lower is sharper.")
    top_k_lora: int | None = option(None, "Number of the best experts that act on a token; None: all.")
    scaling_pass_value: float = option(0.0, "Scalings in the pass that computes the hidden states.")
    global_scaling_weight: float = option(1.0, "Factor of what all experts add.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("hidden_size", 4096), ("adapters", {})):
            if getattr(self, name) is None:
                warnings.warn(
                    f"No value was provided for `{name}`; it is set to {value}. Please check that this fits."
                )
                setattr(self, name, value)
        if self.enable_softmax_topk and self.top_k_lora is None:
            warnings.warn("`enable_softmax_topk` enabled `top_k_lora` is not set")
        if self.enable_softmax_topk and self.enable_softmax:
            warnings.warn("`enable_softmax_topk` and `enable_softmax` are both enabled: two softmaxes work worse.")
        if self.top_k_lora is not None and self.top_k_lora < 1:
            warnings.warn("`top_k_lora` value must be at least 1.")


XLoraLinearLayer = XLoraEmbeddingLayer = XLoraConv2dLayer = XLoraLayer


class XLoraModel(BaseTuner):
    """A model with LoRA experts and a classifier that scales them. The base model's `use_cache` has to be False.

    A forward runs the base model twice: without experts for the hidden states that the classifier needs, then with
    them. Other arguments go to the loading of the experts.
    """

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, XLoraConfig] | XLoraConfig,
        adapter_name: str,
        torch_device: str | None = None,
        ephemeral_gpu_offload: bool = False,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        if getattr(getattr(model, "config", None), "use_cache", False):
            raise ValueError("`use_cache` must be False")
        self.xlora_config = config = config[adapter_name] if isinstance(config, dict) else config
        empty = copy.copy(config)  # a LoraConfig as far as the LoraModel needs one
        empty.target_modules, empty.layer_replication, empty.bias = DUMMY_TARGET_MODULES, None, "none"
        self.lora_model = LoraModel(model, empty, adapter_name)
        kwargs.pop("low_cpu_mem_usage", None)
        for i, path in enumerate(config.adapters.values()):
            _load_expert(
                self.lora_model, str(i), path, torch_device, autocast_adapter_dtype, ephemeral_gpu_offload, **kwargs
            )
        self.set_adapter(adapter_name)
        n_layers, device = convert_layers_to_xlora(model, self, config)
        self.internal_xlora_classifier = XLoraClassifier(model, config, len(config.adapters), n_layers, device)
        self.internal_xlora_scalings: torch.Tensor | None = None
        self.current_scalings: torch.Tensor | None = None  # during a forward
        self.disabled = False
        self.eval()

    # --- forward ---

    def _predict(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Compute the scalings for the inputs of a forward."""
        classifier = self.internal_xlora_classifier
        self.current_scalings = classifier.make_dummy_scalings(*args, **kwargs)
        with torch.no_grad():
            output = module.forward(*args, **{**kwargs, "output_hidden_states": True, "return_dict": True})
        self.internal_xlora_scalings = self.current_scalings = classifier(output)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if self.disabled:
            yield
            return
        handle = self.lora_model.model.register_forward_pre_hook(self._predict, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self.current_scalings = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.lora_model.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, without a cache."""
        return self.lora_model.generate(*args, **{**kwargs, "use_cache": False})

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "lora_model":
                raise
            return getattr(self.lora_model, name)

    # --- there are no targets ---

    def _mark_only_adapters_as_trainable(self, *_: Any) -> None: ...

    @staticmethod
    def _prepare_adapter_config(peft_config: XLoraConfig, model_config: dict) -> XLoraConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(config: XLoraConfig, key: str) -> bool:
        return False

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None: ...

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let some experts act, by their numbers, or all of them, by X-LoRA's own name."""
        own, *experts = self.peft_config
        frozen = inference_mode or not self.xlora_config.use_trainable_adapters
        self.lora_model.set_adapter(experts if adapter_name == own else adapter_name, frozen)

    def enable_adapter_layers(self) -> None:
        """Switch X-LoRA on."""
        self.disabled = False

    def disable_adapter_layers(self) -> None:
        """Switch X-LoRA off: the outputs are the base model's."""
        self.disabled = True

    # --- settings, reflected in the config, and the log of scalings ---

    def set_topk_lora(self, value: int | None) -> None:
        """Let only the `value` best experts act on a token; None: all."""
        self.xlora_config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Set the factor of what all experts add."""
        self.xlora_config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """The factor of what all experts add."""
        return self.xlora_config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Set the scalings in the pass that computes the hidden states; None: 1 / number of experts."""
        classifier = self.internal_xlora_classifier
        value = 1 / classifier.n_classes if value is None else value
        classifier.override_scaling_pass_value = self.xlora_config.scaling_pass_value = value

    def get_latest_scalings(self) -> torch.Tensor | None:
        """The last scalings (batch, length, n_layers, n_classes), None before the first forward."""
        return self.internal_xlora_scalings

    def enable_scalings_logging(self) -> None:
        """Keep the scalings of all forwards."""
        self.internal_xlora_classifier.scalings_logging = True

    def disable_scalings_logging(self) -> None:
        """Keep no further scalings."""
        self.internal_xlora_classifier.scalings_logging = False

    def clear_scalings_log(self) -> None:
        """Drop the scalings that were kept."""
        self.internal_xlora_classifier.log_scalings.clear()

    def get_scalings_log(self) -> list[torch.Tensor]:
        """The scalings that were kept, in a new list."""
        return self.internal_xlora_classifier.log_scalings.copy()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[torch.Tensor]]]:
        """The scalings that were kept by length of the sequence: their positions in the log, and they."""
        buckets: dict[int, tuple[list[int], list[torch.Tensor]]] = {}
        for i, scalings in enumerate(self.internal_xlora_classifier.log_scalings):
            positions, kept = buckets.setdefault(scalings.shape[1], ([], []))
            positions.append(i)
            kept.append(scalings)
        return buckets

    # --- files hold the classifier only ---

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Any, unwanted_adapter_names: Any
    ) -> dict[str, torch.Tensor]:
        return {key: value for key, value in state_dict.items() if "internal_xlora_classifier" in key}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: Any, config: Any, adapter_name: str, state_dict: Any) -> Any:
        return state_dict


register("xlora", XLoraConfig, XLoraModel, parts=("classifier",))
