"""ShadowPEFT's shadow networks: where a model's blocks are, small models of its class, pretrained ones, losses."""

from __future__ import annotations

import inspect
import json
from copy import deepcopy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from .shadow import ShadowConfig

_STACKS = ("layers", "h", "single_transformer_blocks", "transformer_blocks")


def _stack_of(module: Any) -> str | None:
    return next((name for name in _STACKS if isinstance(getattr(module, name, None), nn.ModuleList)), None)


def is_diffusion_transformer(model: nn.Module) -> bool:
    """Whether a model has its blocks where those of diffusers do."""
    return _stack_of(model) in _STACKS[2:]


def flux_backend(model: nn.Module) -> Any:
    """What knows how to make shadows of Flux2 models, None for other models."""
    if type(model).__name__ != "Flux2Transformer2DModel":
        return None
    from .shadow_flux import Flux2ShadowBackend

    return Flux2ShadowBackend


def blocks_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that has a model's blocks, and the name of their ModuleList there; AttributeError if not found."""
    candidates: list[Any] = [model] if is_diffusion_transformer(model) else []
    for name in ("model", "transformer", "base_model", "decoder"):
        inner = getattr(model, name, None)
        candidates += [getattr(inner, "decoder", None), inner] if isinstance(inner, nn.Module) else []
    for module in (*candidates, model):
        stack = _stack_of(module)
        if stack is not None:
            return module, stack
    raise AttributeError(
        "Unable to automatically find the transformer blocks of the model. Please set `target_modules` to the blocks "
        r"to wrap, e.g. r'.*\.layers\.\d+$'."
    )


def hidden_size_of(config: Any) -> int:
    """The size of the hidden states; AttributeError if the config does not have it."""
    for name in ("hidden_size", "n_embd", "d_model"):
        if hasattr(config, name):
            return int(getattr(config, name))
    if hasattr(config, "num_attention_heads") and hasattr(config, "attention_head_dim"):
        return int(config.num_attention_heads) * int(config.attention_head_dim)
    raise AttributeError("Unable to infer the hidden size from the model config.")


class _TokenShadowBackbone(nn.Module):
    """The shadow of diffusion models of other classes: residual MLPs for each token, whose input is the blocks'."""

    def __init__(self, in_features: int, hidden_size: int, num_layers: int, intermediate_size: int | None) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=hidden_size)
        self.proj_in = nn.Linear(in_features, hidden_size)
        width = intermediate_size or hidden_size
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, hidden_size)
            )
            for _ in range(max(1, num_layers))
        )

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> Any:
        hidden = self.proj_in(inputs_embeds)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return SimpleNamespace(last_hidden_state=hidden)


# option -> names of the same thing in the models' configs
_SIZES = {
    "shadow_num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "shadow_hidden_size": ("hidden_size", "n_embd", "d_model"),
    "shadow_intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "shadow_num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
}


def _mirror(model: nn.Module, config: ShadowConfig, size: int) -> nn.Module:
    """A new, small model of the class that has the model's blocks."""
    layers = config.shadow_num_hidden_layers or 1
    if is_diffusion_transformer(model):
        backend = flux_backend(model)
        if backend is not None:
            return backend.mirror(model, config)
        return _TokenShadowBackbone(size, config.shadow_hidden_size or size, layers, config.shadow_intermediate_size)
    backbone = blocks_of(model)[0]
    sizes = deepcopy(backbone.config)
    for option, names in _SIZES.items():
        value = layers if option == "shadow_num_hidden_layers" else getattr(config, option)
        name = next((name for name in names if hasattr(sizes, name)), None)
        if value is not None and name is None:
            raise AttributeError(
                f"Unable to set `{option}`: the model's config has none of {names}. Give a pretrained `shadow_model`."
            )
        if value is not None:
            setattr(sizes, name, int(value))
    types = getattr(sizes, "layer_types", None)
    if types is not None:
        types = list(types) or ["full_attention"]
        sizes.layer_types = (types + types[-1:] * layers)[:layers]
    if (getattr(sizes, "max_window_layers", None) or 0) > layers:
        sizes.max_window_layers = layers
    return type(backbone)(sizes)


def _pretrained(model: nn.Module, path: str) -> tuple[nn.Module, nn.Linear | None]:
    """The model at a path, and its projection to the base model's hidden size if it comes with one."""
    if is_diffusion_transformer(model):
        backend = flux_backend(model)
        if backend is None:
            raise ValueError(
                "Pretrained `shadow_model` checkpoints are not supported for this Diffusers architecture; use "
                '`shadow_model="mirror"`.'
            )
        return backend.load(model, path), None
    from transformers import AutoConfig, AutoModel
    from transformers.utils import cached_file

    with open(cached_file(path, "config.json")) as file:
        raw = json.load(file)
    if raw.get("model_type") != "causal_lm_with_hidden_projection":
        return AutoModel.from_pretrained(path), None
    from safetensors.torch import load_file

    inner = dict(raw["shadow_model_config"])
    backbone = AutoModel.from_config(AutoConfig.for_model(inner.pop("model_type"), **inner))
    weights = load_file(cached_file(path, "model.safetensors"))
    prefix, key = "shadow_model.", "shadow_hidden_projection.weight"
    backbone.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    if key not in weights:
        raise ValueError(f"'{path}' is a projected shadow checkpoint but has no '{key}'.")
    projection = nn.Linear(*reversed(weights[key].shape), bias=False)
    projection.weight.data = weights[key].to(projection.weight.dtype)
    return backbone, projection


def build_backbone(model: nn.Module, config: ShadowConfig, size: int) -> tuple[nn.Module, nn.Module, bool]:
    """A shadow network, its projection to hidden size `size`, and whether it uses the model's embeddings."""
    mirrors = config.shadow_model == "mirror"
    backbone, projection = (_mirror(model, config, size), None) if mirrors else _pretrained(model, config.shadow_model)
    width = hidden_size_of(backbone.config)
    if projection is not None and (projection.in_features, projection.out_features) != (width, size):
        raise ValueError(
            f"The loaded shadow projection maps {projection.in_features}->{projection.out_features}, but the "
            f"shadow/base hidden sizes are {width}/{size}."
        )
    if projection is None:
        projection = nn.Identity() if width == size else nn.Linear(width, size, bias=False)
        if width != size and flux_backend(model) is not None:
            nn.init.eye_(projection.weight)
    takes_embeddings = "inputs_embeds" in inspect.signature(backbone.forward).parameters
    shares = config.share_embeddings and mirrors and takes_embeddings and width == size
    shares = shares and not is_diffusion_transformer(model)
    if shares and isinstance(getattr(backbone, "embed_tokens", None), nn.Module):
        del backbone.embed_tokens
    return backbone, projection, shares


def freeze_embeddings(model: nn.Module, backbone: nn.Module) -> None:
    """Freeze the embeddings of a pretrained shadow of `model`."""
    backend = flux_backend(model)
    if backend is not None:
        backend.freeze_embeddings(backbone)
        return
    for name in ("get_input_embeddings", "get_output_embeddings"):
        embeddings = getattr(backbone, name, lambda: None)()
        if isinstance(embeddings, nn.Module):
            embeddings.requires_grad_(False)


def pool_last_token(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The hidden states (batch, size) of the last tokens that are no padding."""
    if attention_mask is None:
        return hidden[:, -1]
    last = (attention_mask.ne(0) * torch.arange(attention_mask.shape[-1], device=hidden.device)).argmax(dim=-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def shifted_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of causal language models."""
    return F.cross_entropy(logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten(), ignore_index=-100)


def sequence_classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of transformers' classifiers: one output is a regression, float labels are several labels at once."""
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).view(-1))
    if labels.dtype in (torch.long, torch.int):
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    return F.binary_cross_entropy_with_logits(logits, labels)
