"""AutoPeftModel*: the base model and its adapter, loaded from the adapter's files alone."""

from __future__ import annotations

import importlib
import os

from .config import PeftConfig
from .peft_model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .utils.constants import TOKENIZER_CONFIG_NAME

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def get_default_import_allowlist() -> list[str]:
    """Packages that an adapter configuration may name as the home of its base model."""
    return ["diffusers", "lerobot", "megatron-core", "transformers"]


def check_import_allowlist(allowlist: list[str], parent_name: str) -> bool:
    """Whether the module `parent_name` is one of `allowlist` or inside of one. Importing runs code, and the name
    comes from a file that may have been downloaded."""
    return any(parent_name == allowed or parent_name.startswith(f"{allowed}.") for allowed in allowlist)


class _FromTransformers:
    """A class attribute that is a class of transformers, imported on first access."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance, owner):
        import transformers

        return getattr(transformers, self.name)


class _BaseAutoPeftModel:
    _target_class = None
    _target_peft_class = None

    def __init__(self, *args, **kwargs):
        name = type(self).__name__
        raise OSError(
            f"{name} is designed to be instantiated using the `{name}.from_pretrained(pretrained_model_name_or_path)` "
            f"or `{name}.from_config(config)` methods."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs,
    ):
        """Loads the base model that the adapter's configuration names, then the adapter on top of it.

        The embeddings are enlarged when a tokenizer was saved beside the adapter and has more tokens. Arguments are
        those of `PeftModel.from_pretrained`, and of the base model's `from_pretrained` in `kwargs`.

        Args:
            import_allowlist: packages that may be imported for a base model without a task type; the default is
                `get_default_import_allowlist()`.

        Raises `ValueError` when the configuration does not say which class to use, asks for another one, or names a
        package that is not allowed.
        """
        peft_config = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **kwargs)
        allowed = get_default_import_allowlist() if import_allowlist is None else import_allowlist
        base_cls = cls._base_model_class(peft_config, allowed)
        base_model = base_cls.from_pretrained(
            peft_config.base_model_name_or_path, revision=peft_config.revision, **kwargs
        )
        cls._fit_embeddings(base_model, pretrained_model_name_or_path, revision, kwargs)
        return cls._target_peft_class.from_pretrained(
            base_model,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **kwargs,
        )

    @classmethod
    def _base_model_class(cls, config: PeftConfig, import_allowlist: list[str]):
        task_type = config.task_type
        if task_type is not None:
            if cls._target_class is None:
                raise ValueError(
                    "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type. "
                    "(e.g. `AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`)"
                )
            expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task_type].__name__
            if cls._target_peft_class.__name__ != expected:
                raise ValueError(
                    f"Expected target PEFT class: {expected}, but you have asked for: "
                    f"{cls._target_peft_class.__name__} make sure that you are loading the correct model for your "
                    f"task type ({task_type})."
                )
            return cls._target_class
        if config.auto_mapping is None:
            raise ValueError(
                "Cannot infer the auto class from the config, please make sure that you are loading the correct model "
                "for your task type."
            )
        library = config.auto_mapping["parent_library"]
        if not check_import_allowlist(import_allowlist, library):
            raise ValueError(
                f"The auto mapping wants to import '{library}' which is not in the import allowlist. If you are sure "
                f"that importing this library is safe, specify `import_allowlist=['{library}']` in "
                "`from_pretrained()`."
            )
        return getattr(importlib.import_module(library), config.auto_mapping["base_model_class"])

    @staticmethod
    def _fit_embeddings(base_model, model_id, revision: str | None, kwargs: dict) -> None:
        if not hasattr(base_model, "get_input_embeddings"):
            return
        token = kwargs.get("token") or kwargs.get("use_auth_token")
        found = os.path.exists(os.path.join(model_id, TOKENIZER_CONFIG_NAME))
        if not found:
            from .utils.other import check_file_exists_on_hf_hub

            found = check_file_exists_on_hf_hub(
                repo_id=model_id,
                filename=TOKENIZER_CONFIG_NAME,
                revision=revision,
                repo_type=kwargs.get("repo_type"),
                token=token,
            )
        if not found:
            return
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            model_id, revision=revision, token=token, trust_remote_code=kwargs.get("trust_remote_code", False)
        )
        if len(tokenizer) > base_model.get_input_embeddings().weight.shape[0]:
            base_model.resize_token_embeddings(len(tokenizer))


class AutoPeftModel(_BaseAutoPeftModel):
    """For adapters without a task type."""

    _target_class = None
    _target_peft_class = PeftModel


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """For adapters with task type CAUSAL_LM."""

    _target_class = _FromTransformers("AutoModelForCausalLM")
    _target_peft_class = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """For adapters with task type SEQ_2_SEQ_LM."""

    _target_class = _FromTransformers("AutoModelForSeq2SeqLM")
    _target_peft_class = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """For adapters with task type SEQ_CLS."""

    _target_class = _FromTransformers("AutoModelForSequenceClassification")
    _target_peft_class = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """For adapters with task type TOKEN_CLS."""

    _target_class = _FromTransformers("AutoModelForTokenClassification")
    _target_peft_class = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """For adapters with task type QUESTION_ANS."""

    _target_class = _FromTransformers("AutoModelForQuestionAnswering")
    _target_peft_class = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """For adapters with task type FEATURE_EXTRACTION."""

    _target_class = _FromTransformers("AutoModel")
    _target_peft_class = PeftModelForFeatureExtraction
