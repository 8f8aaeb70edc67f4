"""Adapter files on disk or on the Hugging Face Hub, and `push_to_hub`; huggingface_hub is imported on first use."""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
from collections.abc import Iterable
from typing import Any


def user_agent() -> str:
    """What Hub requests say about their sender."""
    import torch

    from . import __version__

    return f"peft/{__version__}; python/{sys.version.split()[0]}; torch/{torch.__version__}"


def split_download_kwargs(kwargs: dict[str, Any], extra: Iterable[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits `kwargs` into those of `hf_hub_download` (and the names in `extra`) and the rest."""
    if not kwargs:
        return {}, {}
    from huggingface_hub import hf_hub_download

    known = set(inspect.signature(hf_hub_download).parameters) | set(extra)
    download = {key: value for key, value in kwargs.items() if key in known}
    return download, {key: value for key, value in kwargs.items() if key not in known}


def local_file(model_id: str | os.PathLike, filename: str, subfolder: str | None = None) -> str | None:
    """The path of `filename` in the folder `model_id`, or None when there is no such file."""
    path = os.path.join(model_id, subfolder or "", filename)
    return path if os.path.isfile(path) else None


def find_file(model_id: str | os.PathLike, filename: str, subfolder: str | None = None, **download: Any) -> str:
    """The path of `filename`, looked up in the folder `model_id` first and downloaded from the Hub otherwise.

    Raises ValueError when it is in neither place.
    """
    path = local_file(model_id, filename, subfolder)
    if path is not None:
        return path
    try:
        return download_file(model_id, filename, subfolder=subfolder, **download)
    except Exception as exc:
        raise ValueError(f"Can't find '{filename}' at '{model_id}'") from exc


def download_file(model_id: str | os.PathLike, filename: str, **download: Any) -> str:
    """The path of `filename` in the local cache, after downloading it if needed; `use_auth_token` is a token too."""
    from huggingface_hub import hf_hub_download

    old_token = download.pop("use_auth_token", None)
    if download.get("token") is None:
        download["token"] = old_token
    return hf_hub_download(model_id, filename, **{"user_agent": user_agent(), **download})


class PushToHubMixin:
    """Gives a class with `save_pretrained` a `push_to_hub`, with the arguments that transformers' mixin takes."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> Any:
        """Saves to a temporary folder and uploads it to the Hub repository `repo_id`, which is created if needed.

        `tags` are added to the model card. `max_shard_size` is accepted for compatibility: adapters are one file.
        Returns huggingface_hub's CommitInfo.
        """
        from huggingface_hub import HfApi, ModelCard, ModelCardData

        api = HfApi(token=token, user_agent=user_agent())
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if tags:
                readme = os.path.join(folder, "README.md")
                card = ModelCard.load(readme) if os.path.isfile(readme) else ModelCard.from_template(ModelCardData())
                card.data.tags = sorted({*(card.data.tags or []), *tags})
                card.save(readme)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or f"Upload {'config' if 'Config' in type(self).__name__ else 'model'}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
