"""Options of trainable tokens."""

from __future__ import annotations

from dataclasses import dataclass

from ..room import RoomConfig, documented, option


@dataclass
class TrainableTokensConfig(RoomConfig):
    """Which rows of which embeddings to train. Few tokens are cheap: storage and memory grow with their number."""

    method = "trainable_tokens"
    as_sets = ()

    token_indices: list[int] = option([], "Indices of the tokens, as a tokenizer returns them in `input_ids`.")
    target_modules: list[str] | str | None = option(
        None, "Names, or a regular expression for names, of the embeddings. None: the model's input embedding."
    )
    init_weights: bool = option(True, "Whether rows start as those of the embedding; else at random.")


TrainableTokensConfig.__doc__ = documented(TrainableTokensConfig)
