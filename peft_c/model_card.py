"""The README.md that is saved beside an adapter."""

from __future__ import annotations

import os

from torch import nn

from . import __version__
from .import_utils import loaded
from .tuners.tuners_utils import BaseTuner
from .utils.constants import DUMMY_MODEL_CONFIG


def adapter_tags(model: nn.Module) -> list[str]:
    """Tags by which the Hub finds the adapter: library of the base model, method, name of the base model."""
    peft_type = model.active_peft_config.peft_type
    pretrained = loaded("transformers.modeling_utils", "PreTrainedModel")
    tags = []
    if pretrained and isinstance(getattr(model.base_model, "model", None), pretrained):
        tags.append("transformers")
    if getattr(peft_type, "value", peft_type) == "LORA":
        tags.append("lora")
    if hasattr(model.base_model, "name_or_path"):
        tags.append(f"base_model:adapter:{model.base_model.name_or_path}")
    return tags


def _put(lines: list[str], heading: str, text: str, gap: str) -> None:
    """Inserts `text` below `heading`, which is appended with `gap` after it when it is not there."""
    if heading in lines:
        lines.insert(lines.index(heading) + 2, text)
    else:
        lines.append(f"{heading}{gap}{text}")


def write_model_card(model: nn.Module, folder: str) -> None:
    """Creates `README.md` in `folder`, or updates the one there: library, tags, base model, quantisation, version."""
    from huggingface_hub import ModelCard, ModelCardData

    path = os.path.join(folder, "README.md")
    card = ModelCard.load(path) if os.path.exists(path) else ModelCard.from_template(ModelCardData())
    card.data["library_name"] = "peft"
    tags = {*(getattr(model.get_base_model(), "model_tags", None) or []), *model._get_peft_specific_model_tags()}
    if tags:
        card.data["tags"] = sorted(tags)
    if model._pipeline_tag and not card.data.pipeline_tag:
        card.data.pipeline_tag = model._pipeline_tag
    config = BaseTuner.get_model_config(model)
    if isinstance(config, dict) and config != DUMMY_MODEL_CONFIG and "_name_or_path" in config:
        card.data["base_model"] = config["_name_or_path"]

    lines = card.text.splitlines()
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    prefix = "The following `bitsandbytes` quantization config was used during training:"
    if quantization is not None and prefix not in lines:
        settings = quantization.to_dict() if hasattr(quantization, "to_dict") else dict(quantization)
        entries = "".join(f"- {name}: {value}\n" for name, value in settings.items())
        _put(lines, "## Training procedure", f"\n{prefix}\n{entries}", "\n")
    version = f"- PEFT {__version__}"
    if version not in lines:
        _put(lines, "### Framework versions", version, "\n\n")
    card.text = "\n".join(lines)
    card.save(path)
