"""The same work done with peft_c and with the installed peft: equal losses, equal outputs, files read both ways."""

import json

import pytest
import torch
from safetensors.torch import load_file

import peft_c

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "default": {"r": 4},
    "all_linear": {"r": 4, "target_modules": "all-linear"},
    "dropout": {"r": 4, "lora_dropout": 0.2, "target_modules": ALL},
    "rslora": {"r": 4, "use_rslora": True, "target_modules": ALL},
    "dora": {"r": 4, "use_dora": True, "target_modules": ALL},
    "lora_bias": {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "v_proj"]},
    "modules_to_save": {"r": 4, "modules_to_save": ["lm_head"], "target_modules": ALL},
    "tokens": {"r": 4, "trainable_token_indices": [0, 3, 5], "target_modules": ["q_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8},
        "alpha_pattern": {"v_proj": 3},
        "layers_to_transform": [1],
    },
    "regex": {"r": 4, "target_modules": r".*\.1\.self_attn\.(q|v)_proj"},
    "exclude": {"r": 4, "target_modules": ALL, "exclude_modules": ["down_proj"]},
    "gaussian": {"r": 4, "init_lora_weights": "gaussian", "target_modules": ALL},
    "pissa": {"r": 4, "init_lora_weights": "pissa", "target_modules": ["q_proj", "down_proj"]},
    "olora": {"r": 4, "init_lora_weights": "olora", "target_modules": ["q_proj", "down_proj"]},
    "parameters": {"r": 4, "target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]},
}


def built(package, base, options, **kwargs):
    """A model of that package over a fresh base model."""
    torch.manual_seed(3)
    config = package.LoraConfig(task_type="CAUSAL_LM", lora_alpha=8, **options)
    return package.get_peft_model(base(), config, **kwargs)


def trained(model, steps=4, lr=0.02):
    """Losses of a few steps on the same random tokens."""
    torch.manual_seed(5)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 64, (3, 10))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def logits(model):
    """What the model says to eight fixed sentences of six tokens."""
    ids = torch.arange(48).reshape(8, 6) % 64
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_same_start_same_losses_same_files(peft, llama, tmp_path, name):
    mine, theirs = (built(package, llama, CONFIGS[name]) for package in (peft_c, peft))
    start = [dict(model.named_parameters()) for model in (mine, theirs)]
    assert list(start[0]) == list(start[1])
    for key, value in start[1].items():
        assert torch.equal(start[0][key], value), f"{key} starts with other numbers"
        assert start[0][key].requires_grad == value.requires_grad, key

    torch.testing.assert_close(trained(mine), trained(theirs), rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=2e-3, atol=2e-3)

    folders = [tmp_path / "mine", tmp_path / "theirs"]
    for model, folder in zip((mine, theirs), folders, strict=True):
        model.save_pretrained(folder)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert list(weights[0]) == list(weights[1])
    assert all(weights[0][key].dtype == value.dtype for key, value in weights[1].items())
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    assert [list(configs[0]), configs[0]] == [list(configs[1]), configs[1]]

    if CONFIGS[name].get("init_lora_weights") not in ("pissa", "olora"):  # these change the base model they start from
        for reader, folder, writer in ((peft, folders[0], mine), (peft_c, folders[1], theirs)):
            loaded = reader.PeftModel.from_pretrained(llama(), folder).eval()
            torch.testing.assert_close(logits(loaded), logits(writer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_dtypes(peft, llama, dtype):
    options = {"r": 4, "target_modules": ALL}
    models = [built(package, lambda: llama(dtype), options) for package in (peft_c, peft)]
    kinds = [{key: p.dtype for key, p in model.named_parameters()} for model in models]
    assert kinds[0] == kinds[1]
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    losses = [trained(model) for model in models]
    torch.testing.assert_close(losses[0], losses[1], rtol=bound, atol=bound)


def test_several_adapters(peft, llama):
    outputs = []
    for package in (peft_c, peft):
        model = built(package, llama, {"r": 4, "target_modules": ALL}, adapter_name="one")
        trained(model)
        for number, name in enumerate(("two", "three")):
            torch.manual_seed(20 + number)
            config = package.LoraConfig(
                task_type="CAUSAL_LM", r=2 + number, target_modules=ALL, init_lora_weights=False
            )
            model.add_adapter(name, config)
        seen = []
        for name in ("one", "two", "three"):
            model.set_adapter(name)
            seen.append(logits(model))
        model.base_model.set_adapter(["one", "three"])
        seen.append(logits(model))
        with model.disable_adapter():
            seen.append(logits(model))
        ids = torch.arange(48).reshape(8, 6) % 64
        names = ["one", "__base__", "two", "three", "one", "one", "__base__", "two"]
        with torch.no_grad():
            seen.append(model(input_ids=ids, adapter_names=names).logits)
        kinds = ("linear", "svd", "cat", "ties", "dare_linear", "magnitude_prune")
        for kind in kinds:
            more = {"density": 0.5} if kind in ("ties", "dare_linear", "magnitude_prune") else {}
            pair = ["two", "two"] if kind not in ("svd", "cat") else ["two", "three"]
            torch.manual_seed(9)
            model.add_weighted_adapter(pair, [0.7, 0.4], kind, combination_type=kind, **more)
            model.set_adapter(kind)
            seen.append(logits(model))
        model.delete_adapter("two")
        model.set_adapter("three")
        model.merge_adapter()
        seen.append(logits(model))
        model.unmerge_adapter()
        seen.append(logits(model.merge_and_unload()))
        outputs.append(seen)
    for mine, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_state_dicts_are_exchanged(peft, mlp):
    def build(package):
        torch.manual_seed(3)
        config = package.LoraConfig(r=4, target_modules=["embed", "up", "down"], modules_to_save=["head"])
        return package.get_peft_model(mlp(), config)

    mine, theirs = build(peft_c), build(peft)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    peft_c.set_peft_model_state_dict(mine, peft.get_peft_model_state_dict(theirs))
    ids = torch.arange(15).reshape(3, 5)
    torch.testing.assert_close(mine(ids), theirs(ids), rtol=1e-5, atol=1e-6)
    back, there = peft_c.get_peft_model_state_dict(mine), peft.get_peft_model_state_dict(theirs)
    assert list(back) == list(there)
    assert all(torch.equal(back[key], value) for key, value in there.items())
