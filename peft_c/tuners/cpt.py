"""The config of context-aware prompt tuning: embeddings of example tokens, refined (https://arxiv.org/abs/2410.17222)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import PromptLearningConfig
from ..utils.peft_types import PeftType, TaskType
from .prompt_learning import MissingEncoder, register
from .room import option


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


class CPTEmbedding(MissingEncoder):
    """PEFT's prompt for context-aware prompt tuning."""


register("cpt", CPTConfig, CPTEmbedding)
