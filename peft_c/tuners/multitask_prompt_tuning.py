"""Multitask prompt tuning: a shared prompt times a low-rank one a task
(https://arxiv.org/abs/2303.02861)."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import nn

from ..utils.peft_types import PeftType, TaskType
from ..utils.save_and_load import torch_load
from .prompt_learning import register
from .prompt_tuning import PromptEmbedding, PromptTuningConfig
from .room import option


class MultitaskPromptTuningInit(str, enum.Enum):
    """What the prompt starts as: text, random numbers, or parts of a prompt that was trained on source tasks."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Options of multitask prompt tuning."""

    prompt_tuning_init: MultitaskPromptTuningInit | str = option(
        MultitaskPromptTuningInit.RANDOM,
        "What the prompt starts as: TEXT, RANDOM, AVERAGE_SOURCE_TASKS, EXACT_SOURCE_TASK or ONLY_SOURCE_SHARED.",
    )
    prompt_tuning_init_state_dict_path: str | None = option(None, "File with the prompt trained on source tasks.")
    prompt_tuning_init_task: int | None = option(0, "Number of the source task to start from.")
    num_ranks: int | None = option(1, "Rank of a task's part.")
    num_tasks: int | None = option(1, "How many tasks there are.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MULTITASK_PROMPT_TUNING


# The starts that need a prompt trained on source tasks.
_FROM_SOURCE = (
    MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS,
    MultitaskPromptTuningInit.EXACT_SOURCE_TASK,
    MultitaskPromptTuningInit.ONLY_SOURCE_SHARED,
)


class MultitaskPromptEmbedding(PromptEmbedding):
    """A shared prompt, times for each task a matrix of low rank.

    Args:
        config: the options, as for `PromptEmbedding`, with `num_tasks` and `num_ranks`.
        word_embeddings: the base model's.

    Attributes:
        embedding (`nn.Embedding`): the shared prompt.
        prefix_task_cols (`nn.Parameter`): (num_tasks, tokens, num_ranks).
        prefix_task_rows (`nn.Parameter`): (num_tasks, num_ranks, token_dim).

    Raises `ValueError` for a start from source tasks without their file.
    """

    by_task = True

    def __init__(self, config: MultitaskPromptTuningConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__(config, word_embeddings)
        self.num_tasks, self.num_ranks = config.num_tasks, config.num_ranks
        self.num_virtual_tokens, self.token_dim = config.num_virtual_tokens, config.token_dim
        self.num_transformer_submodules = config.num_transformer_submodules
        if self.num_transformer_submodules is None:
            self.num_transformer_submodules = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
        tokens = self.num_virtual_tokens * self.num_transformer_submodules
        self.prefix_task_cols = nn.Parameter(torch.empty(self.num_tasks, tokens, self.num_ranks).normal_(0, 0.02))
        rows = torch.empty(self.num_tasks, self.num_ranks, self.token_dim)
        self.prefix_task_rows = nn.Parameter(rows.normal_(0, 0.02))
        if config.prompt_tuning_init in _FROM_SOURCE:
            self._start_from_source(config, word_embeddings.weight.device)

    def _start_from_source(self, config: MultitaskPromptTuningConfig, device: torch.device) -> None:
        path, init = config.prompt_tuning_init_state_dict_path, config.prompt_tuning_init
        if path is None:
            raise ValueError(f"prompt_tuning_init_state_dict_path needs to be specified with {init} init method")
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            source = load_file(path)
        else:
            source = torch_load(path, map_location=device)
        start = {"embedding.weight": source["prompt_embeddings"]}
        shared_only = init == MultitaskPromptTuningInit.ONLY_SOURCE_SHARED
        if not shared_only:
            for name in ("prefix_task_cols", "prefix_task_rows"):
                tasks = source[name]
                if init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
                    start[name] = tasks.mean(0, keepdim=True)
                else:
                    start[name] = tasks[config.prompt_tuning_init_task].unsqueeze(0)
        self.load_state_dict(start, strict=not shared_only)

    def forward(self, indices: torch.Tensor, task_ids: torch.Tensor | None) -> torch.Tensor:
        """The prompts (batch, tokens, token_dim) of virtual tokens (batch, tokens) for tasks (batch,).

        Raises `ValueError` when the tasks are not given.
        """
        if task_ids is None:
            raise ValueError("task_ids cannot be None")
        return self.embedding(indices) * (self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids])

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        encoder = model.prompt_encoder[adapter_name]
        return {
            "prefix_task_cols": encoder.prefix_task_cols,
            "prefix_task_rows": encoder.prefix_task_rows,
            "prompt_embeddings": encoder.embedding.weight,
        }

    def _load_adapter_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        super()._load_adapter_state_dict(state_dict)
        self.load_state_dict(state_dict, strict=False)  # the tasks' parts


register("multitask_prompt_tuning", MultitaskPromptTuningConfig, MultitaskPromptEmbedding)
