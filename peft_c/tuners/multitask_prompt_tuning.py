"""The config of multitask prompt tuning: a shared prompt times a low-rank one a task
(https://arxiv.org/abs/2303.02861)."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..utils.peft_types import PeftType
from .prompt_learning import MissingEncoder, register
from .prompt_tuning import PromptTuningConfig
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


class MultitaskPromptEmbedding(MissingEncoder):
    """PEFT's prompt for multitask prompt tuning."""


register("multitask_prompt_tuning", MultitaskPromptTuningConfig, MultitaskPromptEmbedding)
