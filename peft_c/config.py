"""The base classes of adapter configurations: fields that all share, and their JSON file."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import re
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

from . import __version__, hub
from .utils.constants import CONFIG_NAME
from .utils.peft_types import PeftType, TaskType

# A JSON file with unknown keys counts as an adapter configuration only when it has these.
MIN_EXPECTED_CONFIG_KEYS = {"peft_type"}


def _is_dev_version(version: str) -> bool:
    return re.search(r"[.\d_-]dev\d*", version) is not None


def _get_commit_hash(pkg_name: str) -> str | None:
    """The commit that `pip install git+...` recorded for the distribution `pkg_name`, or None."""
    try:
        recorded = importlib.metadata.distribution(pkg_name).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(recorded).get("vcs_info", {}).get("commit_id") if recorded else None


def _check_and_remove_unused_kwargs(cls: type, kwargs: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Takes what the class does not know out of `kwargs`; returns them and the names taken out."""
    unknown = kwargs.keys() - inspect.signature(cls.__init__).parameters.keys()
    for name in unknown:
        del kwargs[name]
    return kwargs, unknown


def check_is_config(value: Any) -> None:
    """TypeError unless `value` is the configuration of an adapter."""
    if not hasattr(value, "peft_type"):
        raise TypeError(f"Expected the configuration of an adapter, such as a LoraConfig, got {value!r:.80}.")


@dataclass
class PeftConfigMixin(hub.PushToHubMixin):
    """Loading and saving of `adapter_config.json`, and the fields that name the method and the task.

    Args:
        task_type (`TaskType` or `str`): what the base model is used for; selects the `PeftModelFor...` class.
        peft_type (`PeftType` or `str`): the method, set by the subclass.
        auto_mapping (`dict`): class and library of a base model without a task type, written when saving.
        peft_version (`str`): filled in with the version whose file format this is.

    Raises `ValueError` for an unknown task type.
    """

    task_type: TaskType | None = field(default=None, metadata={"help": "Task of the base model."})
    peft_type: PeftType | None = field(default=None, metadata={"help": "Adapter method."})
    auto_mapping: dict | None = field(
        default=None, metadata={"help": "Class and parent library of the base model, for AutoPeftModel."}
    )
    peft_version: str | None = field(default=None, metadata={"help": "Filled in automatically."})

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ValueError(
                f"Invalid task type: '{self.task_type}'. Must be one of the following task types: "
                f"{', '.join(TaskType)}."
            )
        if self.peft_version is None:
            self.peft_version = self._get_peft_version()

    @staticmethod
    def _get_peft_version() -> str:
        """The version; for a development version with `@` and the commit, as that version alone is ambiguous."""
        if not _is_dev_version(__version__):
            return __version__
        try:
            commit = _get_commit_hash("peft_c")
        except Exception as exc:
            commit = None
            warnings.warn(
                "A dev version of PEFT is used but there was an error while trying to determine the commit hash "
                f"({type(exc).__name__}: {exc}); it is recorded as UNKNOWN."
            )
        return f"{__version__}@{commit or 'UNKNOWN'}"

    def to_dict(self) -> dict:
        """The configuration as a new dictionary of plain values, nested configurations included."""
        return asdict(self)

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Writes `adapter_config.json` into the folder `save_directory`, which is created if needed.

        `auto_mapping_dict` in `kwargs` is written as the `auto_mapping` entry. Sets become lists. Raises
        `AssertionError` when `save_directory` is a file.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        entries = {key: list(value) if isinstance(value, set) else value for key, value in self.to_dict().items()}
        if kwargs.get("auto_mapping_dict") is not None:
            entries["auto_mapping"] = kwargs["auto_mapping_dict"]
        text = json.dumps(entries, indent=2, sort_keys=True)
        os.makedirs(save_directory, exist_ok=True)
        with open(os.path.join(save_directory, CONFIG_NAME), "w") as file:
            file.write(text)

    @classmethod
    def from_peft_type(cls, **kwargs):
        """Builds the configuration class that `peft_type` names, or this class when it is not given.

        Keys that the class does not know come from a newer version: they are dropped with a warning. Raises
        `TypeError` when there are such keys and no `peft_type`: then it is no adapter configuration at all.
        """
        from .mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[kwargs["peft_type"]] if "peft_type" in kwargs else cls
        parameters = inspect.signature(config_cls).parameters
        unknown = set() if "kwargs" in parameters else kwargs.keys() - parameters.keys()
        if unknown:
            if not MIN_EXPECTED_CONFIG_KEYS <= kwargs.keys():
                raise TypeError(
                    f"The {cls.__name__} config that is trying to be loaded is missing required keys: "
                    f"{MIN_EXPECTED_CONFIG_KEYS}. Its keys are {sorted(kwargs)}."
                )
            warnings.warn(
                f"Unexpected keyword arguments {sorted(unknown)} for class {config_cls.__name__}, these are ignored. "
                "The file was probably written by a newer version; what those settings do is lost here."
            )
        return config_cls(**{key: value for key, value in kwargs.items() if key not in unknown})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        """Loads `adapter_config.json` from a folder or a Hub repository.

        The result has the class that the file's `peft_type` names, whatever class this is called on. Arguments of
        `huggingface_hub.hf_hub_download` (token, revision, cache_dir ...) go there; the file has precedence over
        arguments that are fields of this class. Raises `ValueError` when there is no such file or it is not JSON.
        """
        download, class_kwargs, _ = cls._split_kwargs(kwargs)
        path = hub.find_file(pretrained_model_name_or_path, CONFIG_NAME, subfolder, **download)
        return cls.from_peft_type(**cls.check_kwargs(**{**class_kwargs, **cls.from_json_file(path)}))

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs) -> dict[str, Any]:
        """Reads a configuration file into a dictionary; a `runtime_config` in it is dropped with a warning."""
        try:
            with open(path_json_file, encoding="utf-8") as file:
                entries = json.load(file)
        except json.JSONDecodeError as exc:
            words = f"The adapter configuration '{path_json_file}' is not valid JSON: {exc.msg}"
            raise json.JSONDecodeError(words, exc.doc, exc.pos) from exc
        except UnicodeDecodeError as exc:
            raise ValueError(f"The adapter configuration '{path_json_file}' is not valid JSON: {exc}") from exc
        if not isinstance(entries, dict):
            raise ValueError(
                f"The adapter configuration '{path_json_file}' should hold a JSON object, not a "
                f"{type(entries).__name__}."
            )
        if entries.pop("runtime_config", None) is not None:
            warnings.warn(
                f"'{path_json_file}' contains a `runtime_config` key. This is ignored: it belongs to one run only."
            )
        return entries

    @classmethod
    def _split_kwargs(cls, kwargs):
        download, rest = hub.split_download_kwargs(kwargs, extra=("use_auth_token",))
        own = {key: value for key, value in rest.items() if key in cls.__annotations__}
        return download, own, {key: value for key, value in rest.items() if key not in own}

    @classmethod
    def _get_peft_type(cls, model_id: str, **hf_hub_download_kwargs):
        """The `peft_type` that the configuration file of `model_id` names."""
        path = hub.find_file(model_id, CONFIG_NAME, **hf_hub_download_kwargs)
        entries = cls.from_json_file(path)
        if "peft_type" not in entries:
            raise KeyError(f"'{path}' is no adapter configuration: it has no 'peft_type' among {sorted(entries)}.")
        return entries["peft_type"]

    @classmethod
    def check_kwargs(cls, **kwargs):
        """A hook for subclasses: checks or rewrites the arguments that come from a file."""
        return kwargs

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method learns a prompt and leaves the modules of the base model as they are."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is adaption prompt."""
        return False


@dataclass
class PeftConfig(PeftConfigMixin):
    """What the configurations of all methods have.

    Args:
        base_model_name_or_path (`str`): where the base model came from; filled in by `get_peft_model`.
        revision (`str`): revision of the base model on the Hub.
        inference_mode (`bool`, defaults to False): whether the adapter is created frozen.
    """

    base_model_name_or_path: str | None = field(default=None, metadata={"help": "Name or path of the base model."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the base model."})
    peft_type: str | PeftType | None = field(default=None, metadata={"help": "Adapter method."})
    task_type: str | TaskType | None = field(default=None, metadata={"help": "Task of the base model."})
    inference_mode: bool = field(default=False, metadata={"help": "Whether the adapter is frozen."})


@dataclass
class PromptLearningConfig(PeftConfig):
    """What the configurations of prompt-learning methods have; sizes left at None are read from the base model.

    Args:
        num_virtual_tokens (`int`): length of the learned prompt.
        token_dim (`int`): width of the base model's embeddings.
        num_transformer_submodules (`int`): 1 for decoder-only and encoder-only models, 2 for encoder-decoder models.
        num_attention_heads (`int`): attention heads of the base model.
        num_layers (`int`): layers of the base model.
        modules_to_save (`list[str]`): modules that are trained and saved in full beside the prompt.
    """

    num_virtual_tokens: int = field(default=None, metadata={"help": "Length of the learned prompt."})
    token_dim: int = field(default=None, metadata={"help": "Width of the base model's embeddings."})
    num_transformer_submodules: int | None = field(
        default=None, metadata={"help": "1, or 2 for encoder-decoder models."}
    )
    num_attention_heads: int | None = field(default=None, metadata={"help": "Attention heads of the base model."})
    num_layers: int | None = field(default=None, metadata={"help": "Layers of the base model."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved in full, such as a freshly initialised head."}
    )

    @property
    def is_prompt_learning(self) -> bool:
        """Always true here."""
        return True
