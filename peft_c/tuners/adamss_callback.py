"""The callback of transformers' Trainer for AdaMSS."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class AdamssAsaCallback(TrainerCallback):
    """Calls the model's `update_and_allocate` in each step; its settings are those of the model's AdamssConfig."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        model = kwargs.get("model")
        tuner = getattr(model, "base_model", model)
        if hasattr(tuner, "update_and_allocate"):
            tuner.update_and_allocate(state.global_step)
        return super().on_optimizer_step(args=args, state=state, control=control)
