"""Options of trainable tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...config import PeftConfig
from ...utils.peft_types import PeftType


def _option(default, help: str):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainableTokensConfig(PeftConfig):
    """Which rows of which embeddings to train.

    Storage and memory grow with the number of rows, so few tokens are cheap and all tokens are not.

    Args:
        token_indices: Indices of the tokens, as a tokenizer returns them in `input_ids`.
        target_modules: Names, or a regular expression for names, of the embeddings. None: the model's input embedding,
            or "embed_tokens" if the model does not tell which that is.
        init_weights: Whether the rows start as those of the embedding, so that nothing changes before training
            (default), or at random.
    """

    token_indices: list[int] = _option([], "Indices of the tokens whose embeddings are trained.")
    target_modules: list[str] | str | None = _option(
        None, "Names or regular expression of the embeddings; None for the model's input embedding."
    )
    init_weights: bool = _option(True, "Start from the rows of the embedding (True) or from random rows (False).")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TRAINABLE_TOKENS
