"""What X-LoRA is made of: the classifier that scales experts, the layer in which it does so, loading experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .lora.layer import Conv2d, Embedding, Linear, LoraLayer
from .lora.model import LoraModel

if TYPE_CHECKING:
    from .xlora import XLoraConfig


class TemperatureScaledSoftmax(nn.Module):
    """softmax(logits / temperature)."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return self.softmax(logits / self.temperature)


class XLoraClassifier(nn.Module):
    """Scalings (batch, length, n_layers, n_classes) of the experts from the last hidden state.

    n_layers: number of LoRA layers. n_classes: number of experts.
    """

    def __init__(
        self, model: nn.Module, config: XLoraConfig, n_classes: int, n_layers: int, device: torch.device | None
    ) -> None:
        super().__init__()
        if config.xlora_depth <= 0:
            raise ValueError("X-LoRA depth must be strictly positive.")
        self.n_classes, self.n_layers, self.config = n_classes, n_layers, config
        self.log_scalings: list[torch.Tensor] = []
        self.scalings_logging = False
        self.softmax = TemperatureScaledSoftmax(config.softmax_temperature)
        self.override_scaling_pass_value = config.scaling_pass_value
        self.dtype = next(model.parameters()).dtype

        hidden = [config.hidden_size] + [config.xlora_size] * (config.xlora_depth - 1)
        layers: list[nn.Module] = []
        for size, following in zip(hidden, hidden[1:], strict=False):
            layers += [nn.Linear(size, following).to(device, self.dtype), nn.ReLU()]
            if config.xlora_dropout_p > 0.0:
                layers.append(nn.Dropout(p=config.xlora_dropout_p))
        outputs = n_classes * n_layers if config.layerwise_scalings else n_classes
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], outputs).to(device, self.dtype))

    def make_dummy_scalings(
        self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None, *_: Any, **__: Any
    ) -> torch.Tensor:
        """The scalings of the pass that computes the hidden states."""
        given = inputs_embeds if input_ids is None else input_ids
        shape = (*given.shape[:2], self.n_layers, self.n_classes)
        return torch.full(shape, self.override_scaling_pass_value, device=given.device, dtype=self.dtype)

    def forward(self, result: Any, *_: Any, **__: Any) -> torch.Tensor:
        """The scalings from a model's output with hidden states."""
        logits = self.layers(result.hidden_states[-1]).unflatten(-1, (-1, self.n_classes))
        scalings = logits.expand(-1, -1, self.n_layers, -1)
        if self.config.enable_softmax:
            scalings = self.softmax(scalings)
        if self.scalings_logging:
            self.log_scalings.append(scalings)
        return scalings


class XLoraLayer:
    """Takes the place of a LoRA layer's forward: each expert's part is multiplied by its scaling for the token."""

    def __init__(
        self,
        model: nn.Module,
        target: LoraLayer,
        target_forward: Callable[..., Any],
        layer_number: int,
        config: XLoraConfig,
    ) -> None:
        self.model, self.target, self.target_forward = model, target, target_forward
        self.layer_number, self.config = layer_number, config

    def get_maybe_topk_scalings(self, scalings: torch.Tensor) -> torch.Tensor:
        """This layer's scalings (batch, length, n_classes): of all experts, or of the best ones and else 0."""
        own = scalings[:, :, self.layer_number, :]
        if self.config.top_k_lora is not None:
            best = torch.topk(own, k=self.config.top_k_lora, dim=-1).indices
            own = own * torch.zeros_like(own).scatter_(-1, best, 1.0)
        if self.config.enable_softmax_topk:
            left_out = own == 0
            own = torch.softmax(own.masked_fill(left_out, float("-inf")), dim=-1).masked_fill(left_out, 0.0)
        return own

    def forward(self, x: torch.Tensor, *args: Any, scalings: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The base layer's output plus the scaled experts; without scalings the experts add up as in LoRA."""
        target = self.target
        result = target.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        scalings = self.model.current_scalings if scalings is None else scalings
        if self.model.disabled or target.merged:
            return result
        weights = None if scalings is None else self.get_maybe_topk_scalings(scalings)
        own = target._merge_adapters()
        for number, name in enumerate(target.active_adapters):
            if name not in own:
                continue
            if target.use_dora.get(name, False):
                raise ValueError("X-LoRA currently does not support LoRA layers with DoRA")
            wanted = target._input_dtype(name)
            term = target._lora_term(name, x if wanted is None else x.to(wanted))
            if weights is not None:
                term = term * weights[:, :, number].unsqueeze(-1) * self.config.global_scaling_weight
            result = result + term
        return result.to(dtype)


def convert_layers_to_xlora(
    base: nn.Module, xloramodel: nn.Module, config: XLoraConfig
) -> tuple[int, torch.device | None]:
    """Make X-LoRA layers of all LoRA layers in `base`: their number, and the experts' device."""
    layers = [module for module in base.modules() if isinstance(module, (Linear, Embedding, Conv2d))]
    device = None
    for number, layer in enumerate(layers):
        device = next(p for name, p in layer.named_parameters() if name.startswith("lora_")).device
        layer.forward = XLoraLayer(xloramodel, layer, layer.forward, number, config).forward
    return len(layers), device


def _load_expert(
    lora_model: LoraModel,
    name: str,
    model_id: str,
    torch_device: str | None,
    autocast_adapter_dtype: bool,
    ephemeral_gpu_offload: bool = False,
    **kwargs: Any,
) -> None:
    """Add a saved LoRA adapter to the model; ValueError if its weights do not belong there."""
    from ..peft_model import PeftModel
    from ..utils.other import infer_device
    from ..utils.save_and_load import load_peft_weights, set_peft_model_state_dict
    from .lora.config import LoraConfig

    hub, kwargs = PeftModel._split_kwargs(kwargs)
    if name not in lora_model.peft_config:
        config = LoraConfig.from_pretrained(model_id, ephemeral_gpu_offload=ephemeral_gpu_offload, **hub)
        config.inference_mode = False
        lora_model.peft_config[name] = config
        lora_model.inject_adapter(lora_model.model, name)
    weights = load_peft_weights(model_id, device=torch_device or infer_device(), **hub)
    # keys of files start with "base_model.model.", those of the LoraModel with "model."
    weights = {f"model.{key.removeprefix('base_model.model.')}": value for key, value in weights.items()}
    ignore = kwargs.get("ignore_mismatched_sizes", False)
    result = set_peft_model_state_dict(lora_model, weights, adapter_name=name, ignore_mismatched_sizes=ignore)
    if result.unexpected_keys:
        raise ValueError(f"The expert {name} ({model_id}) has unexpected keys: {result.unexpected_keys}")
    lora_model._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=autocast_adapter_dtype)
