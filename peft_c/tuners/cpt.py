"""Context-aware prompt tuning: embeddings of example tokens, refined (https://arxiv.org/abs/2410.17222)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..config import PromptLearningConfig
from ..utils.peft_types import PeftType, TaskType
from .prompt_learning import embedded, register
from .room import option
from .tuners_utils import BasePromptEncoder


@dataclass
class CPTConfig(PromptLearningConfig):
    """Options of context-aware prompt tuning. The length of the prompt is that of `cpt_token_ids`."""

    cpt_token_ids: list[int] | None = option(None, "Tokens that the prompt starts as; [0] by default.")
    cpt_mask: list[int] | None = option(None, "Attention mask of these tokens; ones by default.")
    cpt_tokens_type_mask: list[int] | None = option(None, "What each of these tokens is; ones by default.")
    opt_weighted_loss_type: Literal["none", "decay"] | None = option("none", "How the loss is weighted over examples.")
    opt_loss_decay_factor: float | None = option(1.0, "Factor from one example to the next, for decay.")
    opt_projection_epsilon: float | None = option(0.1, "How far the embeddings of inputs may move.")
    opt_projection_format_epsilon: float | None = option(0.1, "How far the embeddings of the format may move.")
    tokenizer_name_or_path: str | None = option(None, "The tokenizer of these tokens.")

    is_prompt_learning = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CPT
        self.is_prompt_learning = True
        self.num_layers = self.token_dim = self.num_attention_heads = None
        self.num_transformer_submodules = 1
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(f"{type(self).__name__} only supports task_type = {TaskType.CAUSAL_LM.value}.")
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        self.num_virtual_tokens = len(self.cpt_token_ids)
        if self.cpt_mask is None:
            self.cpt_mask = [1] * self.num_virtual_tokens
        if self.cpt_tokens_type_mask is None:
            self.cpt_tokens_type_mask = [1] * self.num_virtual_tokens
        if not len(self.cpt_mask) == len(self.cpt_tokens_type_mask) == self.num_virtual_tokens:
            raise ValueError("cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length.")


# What a token is: its type modulo 4. Types grow by 4 from one example to the next; 0 alone is padding.
_INPUT_TEMPLATE, _INPUT, _OUTPUT_TEMPLATE, _LABEL = 1, 2, 3, 0


class CPTEmbedding(BasePromptEncoder):
    """The embeddings of the example tokens plus a trained difference of bounded norm; labels stay as they are.

    Args:
        config: the options; `token_dim` has to be set.
        word_embeddings: the base model's.

    Attributes:
        embedding (`nn.Embedding`): the tokens' embeddings, (num_virtual_tokens, token_dim), frozen.
        delta_embedding (`nn.Embedding`): what is added to them, zero at first.
    """

    starts_from_tokens = True

    def __init__(self, config: CPTConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.config = copy.deepcopy(config)
        shape = config.num_virtual_tokens, config.token_dim
        self.embedding = nn.Embedding(*shape)
        if not config.inference_mode:
            self.embedding.weight = embedded(word_embeddings, config.cpt_token_ids)
        self.embedding.requires_grad_(False)
        self.delta_embedding = nn.Embedding(*shape)
        nn.init.zeros_(self.delta_embedding.weight)
        self.set_updated_tokens()

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """The prompt (batch, tokens, token_dim) of virtual tokens (batch, tokens); shortens differences that are too
        long."""
        self.delta_embedding.weight.data = self.get_projection()
        return self.embedding(indices) + self.delta_embedding(indices)

    def _kinds(self) -> torch.Tensor:
        return torch.tensor(self.config.cpt_tokens_type_mask, dtype=torch.long) % 4

    def set_updated_tokens(self) -> None:
        """Lets gradients through to the differences of inputs and templates only."""
        trained = (self._kinds() != _LABEL).view(-1, 1)
        self.delta_embedding.weight.register_hook(lambda grad: grad * trained.to(grad.device))

    def get_epsilon(self) -> torch.Tensor:
        """How long each token's difference may be, (num_virtual_tokens,)."""
        config, kinds = self.config, self._kinds()
        scale = (config.token_dim / 2048) ** 0.5
        real = torch.tensor(config.cpt_tokens_type_mask) > 0
        epsilon = torch.full((len(kinds),), 1e-10)
        template = (kinds == _INPUT_TEMPLATE) | (kinds == _OUTPUT_TEMPLATE)
        epsilon[real & template] = config.opt_projection_format_epsilon * scale
        epsilon[real & (kinds == _INPUT)] = config.opt_projection_epsilon * scale
        return epsilon

    @torch.no_grad()
    def get_projection(self) -> torch.Tensor:
        """The differences, (num_virtual_tokens, token_dim), shortened to the norms of `get_epsilon`."""
        delta = self.delta_embedding.weight.clone()
        norm = delta.norm(dim=1)
        epsilon = self.get_epsilon().to(delta.device)
        changed = norm > 0
        delta[changed] *= (epsilon / norm.clamp(min=epsilon))[changed].view(-1, 1)
        return delta

    @staticmethod
    def calculate_loss(
        base_model_output: Any, labels: torch.Tensor, cpt_type_mask: torch.Tensor, config: CPTConfig
    ) -> Any:
        """Sets `loss` of the base model's output: the cross entropy of the labels, weighted by example if the config
        says so, the last example most.

        Args:
            base_model_output: with `logits`, (batch, length, vocabulary).
            labels: (batch, length), -100 where there is none.
            cpt_type_mask: the tokens' types, (batch, length).
            config: the options.
        """
        logits = base_model_output.logits[:, :-1]
        labels = labels.to(logits.device)[:, 1:]
        types = cpt_type_mask.to(logits.device)[:, 1:]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        weights = torch.ones_like(losses, dtype=torch.float32)
        if config.opt_weighted_loss_type == "decay":
            for row, kinds in zip(weights, types, strict=True):
                examples = kinds[(kinds > 0) & (kinds % 4 == _LABEL)].unique()
                for age, example in enumerate(examples.flip(0)):
                    row[kinds == example] = config.opt_loss_decay_factor**age
        counted = labels != -100
        base_model_output.loss = (losses[counted] * weights[counted]).mean()
        return base_model_output


register("cpt", CPTConfig, CPTEmbedding)
