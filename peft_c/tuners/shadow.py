"""ShadowPEFT: a small shadow network runs beside the model's blocks and corrects their inputs
(https://arxiv.org/abs/2604.19254)."""

from __future__ import annotations

import importlib
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..utils.peft_types import TaskType
from .room import RoomConfig, RoomModel, option, register, shared
from .shadow_backbone import blocks_of, build_backbone, freeze_embeddings, hidden_size_of, is_diffusion_transformer
from .shadow_path import MERGE_MESSAGE, ShadowCarrier, ShadowLayer, ShadowPath  # noqa: F401

_MIRROR_OPTIONS = (
    "shadow_num_hidden_layers",
    "shadow_hidden_size",
    "shadow_num_attention_heads",
    "shadow_intermediate_size",
)


@dataclass
class ShadowConfig(RoomConfig):
    """Options of ShadowPEFT. ValueError for options of a mirrored shadow beside a pretrained one."""

    target_modules: list[str] | str | None = option(None, "Blocks (not linear layers) to wrap; None: all.")
    exclude_modules: list[str] | str | None = shared("exclude_modules")
    r: int = option(8, "Rank of the correction of a block's input.")
    shadow_alpha: float = option(0.1, "Factor of the correction.")
    shadow_dropout: float = option(0.2, "Dropout of what the correction is computed from.")
    init_weights: bool = shared("init_weights")
    shadow_model: str = option(
        "mirror",
        "'mirror': a small, new model of the base model's class; else path or repository of a pretrained one.",
    )
    shadow_num_hidden_layers: int | None = option(None, "Number of a mirrored shadow's layers; None: 1.")
    shadow_hidden_size: int | None = option(None, "Hidden size of a mirrored shadow; None: the base model's.")
    shadow_num_attention_heads: int | None = option(None, "Number of a mirrored shadow's heads; None: as the base.")
    shadow_intermediate_size: int | None = option(None, "Size of a mirrored shadow's MLPs; None: as the base.")
    share_embeddings: bool = option(True, "Whether a mirrored shadow uses the base model's frozen embeddings.")
    update_hidden_size: int | None = option(None, "Hidden size of the networks that update the shadow; None: r.")
    auxiliary_loss_weight: float = option(0.05, "Weight of the shadow's own loss; 0: none.")
    layers_to_transform: list[int] | int | None = shared("layers_to_transform")
    layers_pattern: list[str] | str | None = shared("layers_pattern")
    modules_to_save: list[str] | None = shared("modules_to_save")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in _MIRROR_OPTIONS if getattr(self, name) is not None]
        if self.shadow_model != "mirror" and given:
            raise ValueError(f"A pretrained `shadow_model` has its sizes; unset these mirror-only overrides: {given}.")


class ShadowModel(ShadowPath, RoomModel):
    """Wraps blocks with ShadowPEFT. Exactly one adapter acts at a time.

    A forward computes the shadow s of the inputs, `projection(backbone(inputs))`; it then goes with the hidden states
    from the first wrapped block to the last. With labels, the shadow's own loss (of `head(s)`) is added to the
    output's and is in `last_shadow_loss`, and the output's `shadow_loss`, without its weight.
    """

    rooms = {nn.Module: ShadowLayer}

    # --- adapters ---

    def _pre_injection_hook(self, model: nn.Module, config: ShadowConfig, adapter_name: str) -> None:
        self._ensure()

    def _prepare_adapter_config(self, peft_config: ShadowConfig, model_config: dict) -> ShadowConfig:
        if peft_config.target_modules is None:
            backbone, attribute = blocks_of(self.model)
            prefix = next(name for name, module in self.model.named_modules() if module is backbone)
            stem = ".".join(filter(None, (prefix, attribute)))
            peft_config.target_modules = {f"{stem}.{i}" for i in range(len(getattr(backbone, attribute)))}
        return peft_config

    def _check_new_adapter_config(self, config: ShadowConfig) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1 and any(c.task_type == TaskType.SEQ_CLS for c in self.peft_config.values()):
            raise ValueError(
                "ShadowPEFT does not support multiple adapters when any adapter uses sequence classification: each "
                "would need a classifier in `modules_to_save` and a `shadow_head`."
            )

    def settings_of(self, name: str, config: ShadowConfig, key: str, base: nn.Module) -> dict[str, Any]:
        self._ensure()
        size = hidden_size_of(self.model.config)
        if name not in self.shadow_backbone:
            backbone, projection, shares = build_backbone(self.model, config, size)
            head = None
            if config.task_type == TaskType.SEQ_CLS:
                head = deepcopy(getattr(self.model, "score", None) or getattr(self.model, "classifier", None))
            like = next(self.model.parameters())
            containers = (self.shadow_backbone, self.shadow_projection, self.shadow_head)
            for container, module in zip(containers, (backbone, projection, head), strict=True):
                if module is not None:
                    container[name] = module.to(like.device, like.dtype)
            self._shadow_share_embeddings[name] = shares
        return {"hidden_size": size}

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)
        device = next((p.device for p in child.parameters() if not p.is_meta), None)
        if device is not None:
            new_module.to(device)

    def finish(self, name: str) -> None:
        self._bind()

    def _sync(self, inference_mode: bool = False) -> None:
        """Train the shadow networks of the active adapter only, and never a pretrained one's embeddings."""
        self._ensure()
        for container in (self.shadow_backbone, self.shadow_projection, self.shadow_head):
            for name, module in container.items():
                module.requires_grad_(name in self.active_adapters and not inference_mode)
        for name, backbone in self.shadow_backbone.items():
            if self.peft_config[name].shadow_model != "mirror":
                freeze_embeddings(self.model, backbone)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        self._sync()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one; ValueError for several."""
        count = 1 if isinstance(adapter_name, str) else len(adapter_name)
        if count != 1:
            raise ValueError(f"ShadowPEFT requires exactly one active adapter, but got {count} adapters.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._sync(inference_mode)
        self._bind()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter with its shadow network."""
        super().delete_adapter(adapter_name)
        for container in (
            self.shadow_backbone,
            self.shadow_projection,
            self.shadow_head,
            self._shadow_share_embeddings,
        ):
            if adapter_name in container:
                del container[adapter_name]
        self._bind()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # files have the name "default" where an adapter's name stands before a module's
        modules = ("shadow_backbone", "shadow_projection", "shadow_head", *ShadowLayer.adapter_layer_names[:4])
        for container in modules:
            if f"{container}.{adapter_name}." in key:
                return key.replace(f"{container}.{adapter_name}.", f"{container}.default.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    # --- leaving ---

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(MERGE_MESSAGE)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        for handle in self._handles:
            handle.remove()
        self._handles, self._ends = [], []
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def unload_shadow(self, adapter_name: str | None = None, copy: bool = False) -> nn.Module:
        """The shadow network as a model of its own, a `DetachedShadowModel`.

        copy: whether it shares nothing with this model. Only a copy can be saved in full if embeddings are shared.
        NotImplementedError for diffusion models.
        """
        from .shadow_models import DetachedShadowModel

        name = self.active_adapters[0] if adapter_name is None else adapter_name
        if name not in self.shadow_backbone:
            raise ValueError(f"No shadow backbone found for adapter '{name}'.")
        if is_diffusion_transformer(self.model):
            raise NotImplementedError(
                "`unload_shadow()` is not supported for Diffusers models: they are no denoisers."
            )
        parts = (self.shadow_backbone[name], self.shadow_projection[name], self._resolve_shadow_head(name))
        backbone, projection, head = map(deepcopy, parts) if copy else parts
        embeddings = self.model.get_input_embeddings() if self._shadow_share_embeddings[name] else None
        if copy and embeddings is not None:
            backbone.embed_tokens, embeddings = deepcopy(embeddings), None
        classifies = self.peft_config[name].task_type == TaskType.SEQ_CLS
        return DetachedShadowModel(backbone, projection, head, classifies, input_embeddings=embeddings)


_ELSEWHERE = {
    "DetachedShadowModel": "shadow_models",
    "ShadowCache": "shadow_models",
    "DetachedFluxShadowModel": "shadow_flux",
}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:  # needs transformers or diffusers
        return getattr(importlib.import_module(f".{_ELSEWHERE[name]}", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register("shadow", ShadowConfig, ShadowModel, parts=("layers", "diffusion_models"))
