"""TrainableTokensModel: trainable tokens on a model's embeddings, and on what is tied to the input embedding."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...config import PeftConfig
from ...utils.matching import _get_input_embeddings_name, _get_submodules
from ..tuners_utils import BaseTuner
from .config import TrainableTokensConfig
from .layer import TrainableTokensLayer


class TrainableTokensModel(BaseTuner):
    """A model with trainable tokens injected into it, in place; arguments as for every `BaseTuner`."""

    prefix: str = "trainable_tokens_"
    tuner_layer_cls = TrainableTokensLayer

    def _prepare_adapter_config(self, peft_config: TrainableTokensConfig, model_config: dict) -> PeftConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = _get_input_embeddings_name(self.model, "embed_tokens")
        return peft_config

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        """Inject the adapter into its targets; layers tied to the input embedding share the embedding's rows."""
        super().inject_adapter(
            model=model,
            adapter_name=adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            **kwargs,
        )
        if not self.get_model_config(self).get("tie_word_embeddings", False):
            return
        tied_names = tuple(self._get_module_names_tied_with_embedding())
        embedding = self.model.get_input_embeddings() if tied_names else None
        if not isinstance(embedding, TrainableTokensLayer):
            return
        # a tied module is the same object under several names, all of which have to be found
        matches = [name for name, _ in self.model.named_modules(remove_duplicate=False) if name.endswith(tied_names)]
        for name in matches:
            parent, target, target_name = _get_submodules(model, name)
            if isinstance(target, TrainableTokensLayer):
                if target.tied_adapter is not None:
                    continue
                # it was a target itself and got rows of its own
                target = target.base_layer
            config = self.peft_config[adapter_name]
            # it has no adapters of its own, so it starts with the active ones of the embedding
            layer = self._create_new_module(config, embedding.active_adapter, target, tied_adapter=embedding)
            self._replace_module(parent, target_name, layer, target)

    def _get_tied_target_modules(self, *args: Any, **kwargs: Any) -> list[str]:
        # tied weights are dealt with, so there is nothing to warn of
        return []

    def _create_and_replace(
        self,
        peft_config: TrainableTokensConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        tied_adapter: nn.Module | None = None,
    ) -> None:
        if isinstance(target, TrainableTokensLayer):
            target.update_layer(adapter_name, config=peft_config, tied_adapter=tied_adapter)
        else:
            layer = self._create_new_module(peft_config, adapter_name, target, tied_adapter=tied_adapter)
            self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _create_new_module(
        peft_config: TrainableTokensConfig, adapter_name: str, target: nn.Module, tied_adapter: nn.Module | None
    ) -> TrainableTokensLayer:
        layer = TrainableTokensLayer(target, adapter_name, config=peft_config, tied_adapter=tied_adapter)
        layer.update_layer(adapter_name, config=peft_config, tied_adapter=tied_adapter)
        return layer
