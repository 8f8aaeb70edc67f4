"""Trainable tokens: train chosen rows of an embedding and leave the rest as it is."""

from ...utils.peft_types import register_peft_method
from .config import TrainableTokensConfig
from .layer import TrainableTokensLayer
from .model import TrainableTokensModel

__all__ = ["TrainableTokensConfig", "TrainableTokensLayer", "TrainableTokensModel"]

register_peft_method(name="trainable_tokens", config_cls=TrainableTokensConfig, model_cls=TrainableTokensModel)
