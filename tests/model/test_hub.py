"""Uploading, and finding files, without a network."""

import os

import pytest
import torch

from peft_c import LoraConfig, PeftModel, get_peft_model, hub, load_peft_weights

from . import tiny

huggingface_hub = pytest.importorskip("huggingface_hub")


class FakeApi:
    def __init__(self, token=None, user_agent=None):
        self.calls = [("token", token)]
        FakeApi.last = self

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("repo", kwargs))
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    def create_branch(self, repo_id, branch, **kwargs):
        self.calls.append(("branch", branch))

    def upload_folder(self, folder_path, **kwargs):
        self.calls.append(("files", sorted(os.listdir(folder_path))))
        with open(os.path.join(folder_path, "README.md")) if "Model" in self.kind else open(os.devnull) as file:
            self.card = file.read()
        return kwargs


def test_push_to_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    config = LoraConfig(r=2, target_modules=["lin0"])
    model = get_peft_model(tiny.mlp(), config)
    FakeApi.kind = "Model"
    sent = model.push_to_hub("adapter", token="secret", revision="draft", tags=["mine"], private=True)
    calls = dict(FakeApi.last.calls)
    assert calls["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert calls["token"] == "secret" and calls["branch"] == "draft" and calls["repo"]["private"] is True
    assert sent["repo_id"] == "me/adapter" and sent["commit_message"] == "Upload model"
    assert "- mine" in FakeApi.last.card and "- lora" in FakeApi.last.card
    FakeApi.kind = "Config"
    assert config.push_to_hub("adapter")["commit_message"] == "Upload config"
    assert dict(FakeApi.last.calls)["files"] == ["adapter_config.json"]


def test_old_name_of_the_token_is_understood(monkeypatch, tmp_path):
    seen = {}
    model = get_peft_model(tiny.mlp(), LoraConfig(r=2, target_modules=["lin0"]))
    model.save_pretrained(tmp_path)

    def download(repo_id, filename, subfolder=None, token=None, revision=None, **others):
        seen[filename] = (repo_id, subfolder, token, revision)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    again = PeftModel.from_pretrained(tiny.mlp(), "me/adapter", subfolder="sub", use_auth_token="t", revision="v1")
    assert seen["adapter_config.json"] == ("me/adapter", "sub", "t", "v1")
    assert seen["adapter_model.safetensors"] == ("me/adapter", "sub", "t", "v1")
    assert torch.equal(again.lin0.lora_A["default"].weight, model.lin0.lora_A["default"].weight)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at 'me/nothing'"):
        hub.find_file("me/nothing", "adapter_config.json")


def test_weights_that_are_not_there_without_the_hub(monkeypatch):
    """The type of error that programs know from huggingface_hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError):
        load_peft_weights("me/nothing")
