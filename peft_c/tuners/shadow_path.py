"""ShadowPEFT's layer, and how shadows go through a model from the first wrapped block to the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..utils.peft_types import TaskType
from .room import Room, positive
from .shadow_backbone import (
    flux_backend,
    is_diffusion_transformer,
    pool_last_token,
    sequence_classification_loss,
    shifted_loss,
)

if TYPE_CHECKING:
    from .shadow import ShadowConfig

MERGE_MESSAGE = (
    "ShadowPEFT cannot be merged into the base model: what it does depends on the inputs of each forward. Use "
    "`unload()` for the base model or `unload_shadow()` for the shadow network alone."
)


@dataclass(slots=True)
class ShadowCarrier:
    """What goes from block to block in place of the hidden states: they, and the shadow states beside them."""

    hidden: torch.Tensor
    shadow: torch.Tensor


class ShadowLayer(Room):
    """A block: h' = h + alpha * up(down(dropout(h - s))) goes in; from its output o the shadow becomes
    s' = (1 - g) s + g T(o), g = sigmoid(G(o)). Without a ShadowCarrier as input it is the block alone."""

    __module__ = f"{__package__}.shadow"  # as its repr says
    returns_input_dtype, never_merged = False, MERGE_MESSAGE
    adapter_layer_names = tuple(f"shadow_{part}" for part in "down up update_transform update_gate dropout".split())
    other_param_names = ("shadow_r", "shadow_alpha")
    containers = dict.fromkeys((*adapter_layer_names[:2], "shadow_dropout", *adapter_layer_names), nn.ModuleDict)
    input_name = "hidden_states"

    def prepare(self, base: nn.Module, config: ShadowConfig) -> None: ...

    def create(self, name: str, config: ShadowConfig, hidden_size: int) -> None:
        r, size = positive("r", config.r), int(hidden_size)
        self.hidden_size = size
        self.shadow_r[name], self.shadow_alpha[name] = r, config.shadow_alpha
        self.shadow_down[name] = nn.Linear(size, r, bias=False)
        self.shadow_up[name] = nn.Linear(r, size, bias=False)
        if config.init_weights:
            nn.init.zeros_(self.shadow_up[name].weight)
        p = config.shadow_dropout
        self.shadow_dropout[name] = nn.Dropout(p) if p else nn.Identity()  # a negative one is refused, as in PEFT
        width = config.update_hidden_size or r
        for container in (self.shadow_update_transform, self.shadow_update_gate):
            container[name] = nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, size))

    def adapt(self, names: list[str], x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, ShadowCarrier):
            return self.base_layer(x, *args, **kwargs)
        (name,) = names
        down = self.shadow_down[name]
        dtype = down.weight.dtype
        difference = self.shadow_dropout[name]((x.hidden - x.shadow).to(dtype))
        correction = self.shadow_alpha[name] * self.shadow_up[name](down(difference))
        output = self.base_layer(x.hidden + correction.to(x.hidden.dtype), *args, **kwargs)

        parts = output if isinstance(output, tuple) else (output,)
        hidden = parts[0]
        for attribute in ("hidden_states", "last_hidden_state") if not isinstance(hidden, torch.Tensor) else ():
            hidden = getattr(hidden, attribute, hidden)
        if not isinstance(hidden, torch.Tensor):
            raise TypeError(f"Unsupported decoder block output type: {type(output)}. Expected a Tensor or a tuple.")
        wide = hidden.to(dtype)
        gate = torch.sigmoid(self.shadow_update_gate[name](wide))
        shadow = (1.0 - gate) * x.shadow.to(dtype) + gate * self.shadow_update_transform[name](wide)
        carrier = ShadowCarrier(hidden, shadow.to(x.shadow.dtype))
        return (carrier, *parts[1:]) if isinstance(output, tuple) else carrier

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)  # models read attributes of their blocks


class ShadowPath:
    """The part of `ShadowModel` that computes the shadow, puts it beside the hidden states, and takes its loss."""

    def _ensure(self) -> None:
        """Make what holds the shadow networks, once."""
        if "shadow_backbone" in self._modules:
            return
        self.shadow_backbone, self.shadow_projection, self.shadow_head = (nn.ModuleDict() for _ in range(3))
        self._handles: list[Any] = []
        self._ends: list[ShadowLayer] = []  # the first and the last wrapped block; a list, so no submodules
        self._shadow_share_embeddings: dict[str, bool] = {}
        self._seed_shadow_state: torch.Tensor | None = None
        self._cache: Any = None  # the shadow's cache, and whether to return it
        self._pack = self._seed_in_block = False
        self.last_shadow_loss: torch.Tensor | None = None

    def _bind(self) -> None:
        """Register the hooks of the model and of the first and the last block of the active adapter anew."""
        for handle in self._handles:
            handle.remove()
        layers = [module for module in self.model.modules() if isinstance(module, ShadowLayer)]
        layers = [layer for layer in layers if not layer.shadow_down.keys().isdisjoint(self.active_adapters)]
        self._handles, self._ends = [], [layers[0], layers[-1]] if layers else []
        if layers:
            self._handles = [
                self.model.register_forward_pre_hook(self._start, with_kwargs=True),
                self.model.register_forward_hook(self._end),
                layers[0].register_forward_pre_hook(self._enter, with_kwargs=True),
                layers[-1].register_forward_hook(self._leave),
            ]

    def _shadow_path_active(self) -> bool:
        return bool(self._ends) and not self._ends[0].disable_adapters

    def _start(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the model: compute the shadow from the inputs, and give the model its own cache only."""
        from .shadow_models import ShadowCache

        self._seed_shadow_state = self._cache = None
        self._pack = self._seed_in_block = False
        past = kwargs.get("past_key_values")
        shadow_past = past.shadow if isinstance(past, ShadowCache) else None
        if isinstance(past, ShadowCache):
            kwargs = {**kwargs, "past_key_values": past.base}
        if not self._shadow_path_active():
            return args, kwargs
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(getattr(model, "config", None), "use_cache", False)
        ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        if ids is None and embeds is None:
            embeds = kwargs.get(getattr(model, "main_input_name", None))
        if is_diffusion_transformer(model) and flux_backend(model) is not None or ids is None and embeds is None:
            self._seed_in_block = True  # from the first block's input
            return args, kwargs
        options = {key: kwargs[key] for key in ("attention_mask", "position_ids") if kwargs.get(key) is not None}
        self._pack = bool(use_cache)
        self._seed(ids, embeds, past_key_values=shadow_past, use_cache=self._pack, return_dict=True, **options)
        return args, kwargs

    def _seed(self, ids: torch.Tensor | None, embeds: torch.Tensor | None, **kwargs: Any) -> None:
        """Compute the shadow of the inputs."""
        name = self.active_adapters[0]
        if embeds is None and self._shadow_share_embeddings[name]:
            embeds = self.model.get_input_embeddings()(ids)
        inputs = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
        output = self.shadow_backbone[name](**inputs, **kwargs)
        if not hasattr(output, "last_hidden_state"):
            raise TypeError("The shadow backbone returns no `last_hidden_state`: its architecture is not supported.")
        self._seed_shadow_state = self.shadow_projection[name](output.last_hidden_state)
        self._cache = getattr(output, "past_key_values", None)

    def _enter(self, layer: ShadowLayer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before the first block: put the shadow beside the hidden states."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if hidden is None:
            return None
        if self._seed_in_block:  # at each call, so also when a checkpointed forward is computed again
            backend = flux_backend(self.model)
            self._seed(None, hidden, **({} if backend is None else backend.block_inputs(args, kwargs)))
        shadow = self._seed_shadow_state
        if shadow is None:
            return None
        if hidden.shape[:-1] != shadow.shape[:-1]:
            raise ValueError(
                f"The shadow of shape {tuple(shadow.shape)} does not fit the hidden states {tuple(hidden.shape)}. "
                "With a cache both need the same new tokens: pass the returned `ShadowCache` as `past_key_values`."
            )
        carrier = ShadowCarrier(hidden, shadow)
        return ((carrier, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": carrier})

    @staticmethod
    def _leave(layer: ShadowLayer, args: tuple, output: Any) -> Any:
        """After the last block: leave the hidden states only."""
        if isinstance(output, ShadowCarrier):
            return output.hidden
        if isinstance(output, tuple) and output and isinstance(output[0], ShadowCarrier):
            return (output[0].hidden, *output[1:])
        return output

    def _end(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """After the model: return the shadow's cache with its own."""
        from .shadow_models import ShadowCache

        if self._pack and hasattr(output, "past_key_values"):
            output.past_key_values = ShadowCache(base=output.past_key_values, shadow=self._cache)
        self._pack, self._cache = False, None
        return output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        self.last_shadow_loss = None
        labels = kwargs.get("labels")
        if labels is not None and getattr(output, "loss", None) is not None and self._shadow_path_active():
            loss = self.shadow_auxiliary_loss(labels, attention_mask=kwargs.get("attention_mask"))
            if loss is not None:
                output.shadow_loss = self.last_shadow_loss = loss.detach()
                if (weight := self.peft_config[self.active_adapters[0]].auxiliary_loss_weight) > 0:
                    output.loss = output.loss + weight * loss
        return output

    def _resolve_shadow_head(self, name: str) -> nn.Module | None:
        """What makes predictions of a shadow: its classifier, or the base model's output layer."""
        if name in self.shadow_head:
            return self.shadow_head[name]
        causal = self.peft_config[name].task_type == TaskType.CAUSAL_LM
        return self.model.get_output_embeddings() if causal else None

    def shadow_auxiliary_loss(
        self, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The loss of the shadow's own predictions in the last forward; None if there are none."""
        name, shadow = self.active_adapters[0], self._seed_shadow_state
        head = self._resolve_shadow_head(name)
        if shadow is None or head is None:
            return None
        if self.peft_config[name].task_type == TaskType.CAUSAL_LM:
            return shifted_loss(head(shadow), labels)
        return sequence_classification_loss(head(pool_last_token(shadow, attention_mask)), labels)
