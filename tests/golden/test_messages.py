"""What users and their filters read: the same warnings and reprs as in PEFT."""

import importlib
import warnings

import peft
import pytest
import torch
from torch import nn

import peft_c
from tests.rooms.cases import config_of, start


def two_adapters(package, scheme):
    torch.manual_seed(0)
    plain = package.LoraConfig(target_modules=["0"], r=2)
    model = package.get_peft_model(nn.Sequential(nn.Linear(4, 4)), plain)
    model._check_new_adapter_config(package.LoraConfig(target_modules=["0"], init_lora_weights=scheme), False)


WARNINGS = {
    "adalora": lambda p: p.AdaLoraConfig(r=4, total_step=10),
    "vera": lambda p: p.VeraConfig(save_projection=False),
    "pvera": lambda p: p.PveraConfig(save_projection=False),
    "randlora": lambda p: p.RandLoraConfig(save_projection=False),
    "tinylora": lambda p: p.TinyLoraConfig(save_projection=False),
    "frod": lambda p: p.FrodConfig(save_projection=False),
    "rslora": lambda p: p.LoraConfig(use_rslora=True, rank_pattern={"0": 2}, init_lora_weights="pissa"),
    **{init: lambda p, init=init: two_adapters(p, init) for init in ("pissa", "olora")},
}


@pytest.mark.parametrize("case", WARNINGS)
def test_warnings(case):
    texts = []
    for package in (peft, peft_c):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            WARNINGS[case](package)
        texts.append([str(warning.message) for warning in caught])
    assert texts[0] == texts[1]
    assert texts[0] or case == "frod"


def test_repr_of_a_layer_of_trainable_tokens():
    texts = []
    for package in (peft, peft_c):
        config = package.LoraConfig(target_modules=["1"], trainable_token_indices={"0": [1, 2]})
        model = package.get_peft_model(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4)), config)
        texts.append(repr(model.base_model.model))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("numbers", [(None, 0), (0, None), (None, 4), (4, None), (None, None), (0, 0), (4, 4)])
@pytest.mark.parametrize("method", ["oft", "boft"])
def test_numbers_and_sizes_of_blocks_that_are_refused(method, numbers):
    names = ("r", "oft_block_size") if method == "oft" else ("boft_block_num", "boft_block_size")
    refused = []
    for package in (peft, peft_c):
        config = None
        with pytest.raises((TypeError, ValueError)) as caught:
            config = config_of(method, package=package, **dict(zip(names, numbers, strict=True)))
            package.get_peft_model(nn.Sequential(nn.Linear(16, 16)), config)
        refused.append((config is None, caught.type))
    assert refused[0] == refused[1]


@pytest.mark.parametrize("method", ["pvera", "randlora", "tinylora", "unilora", "vera"])
def test_a_rank_that_is_not_positive(method):
    for package in (peft, peft_c):
        model = start(method, package=package)
        config = config_of(method, package=package)
        config.r = -1
        with pytest.raises(ValueError, match="positive"):
            model.add_adapter("more", config)


def test_adamss_is_not_converted_to_lora():
    pytest.importorskip("sklearn")
    for package in (peft, peft_c):
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            package.convert_to_lora(start("adamss", package=package), rank=2)


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_the_layers_of_lycoris_methods(method):
    ours, theirs = (
        {kind: layer.__name__ for kind, layer in start(method, package=package).base_model.layers_mapping.items()}
        for package in (peft_c, peft)
    )
    assert ours == theirs


def test_proportional_parameters_of_targets_that_waveft_does_not_adapt():
    for package in (peft, peft_c):
        config = package.WaveFTConfig(target_modules=["0"], n_frequency=4, proportional_parameters=True)
        with pytest.raises(ValueError, match="No target modules found for proportional"):
            package.get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 1)), config)


def refuse_in_offline_mode(package, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("huggingface_hub").constants, "HF_HUB_OFFLINE", True)
    package.load_peft_weights("some/adapter")


def load_keys_of_no_adapter(package, folder):
    pytest.importorskip("safetensors.torch").save_file({"x.y": torch.ones(2)}, folder / "adapter_model.safetensors")
    package.load_peft_weights(folder, key_mapping={"a": "b"})


def load_onto_no_device(package, folder, ending):
    tensors = {"base_model.model.x.lora_A.weight": torch.ones(2)}
    if ending == "bin":
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        pytest.importorskip("safetensors.torch").save_file(tensors, folder / "adapter_model.safetensors")
    package.load_peft_weights(folder, device="nope")


def preprocess(package, layer):
    loraga = importlib.import_module(f"{package.__name__}.tuners.lora.loraga")
    config = package.LoraConfig(
        target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=package.LoraGAConfig(), r=2
    )
    loraga.preprocess_loraga(nn.Sequential(layer), config, lambda: None)


def use_kasa_on_the_meta_device(package):
    variants = importlib.import_module(f"{package.__name__}.tuners.lora.variants")
    config = package.LoraConfig(target_modules=["0"], kasa_config=package.KasaConfig(), r=2)
    model = package.get_peft_model(nn.Sequential(nn.Linear(4, 4, device="meta")), config)
    variants.KasaLinearVariant._apply_deferred_truncation(model.base_model.model[0], "default")


class Quantised(nn.Linear):
    quant_state = ()


REFUSALS = {
    "offline": lambda package, monkeypatch, folder: refuse_in_offline_mode(package, monkeypatch),
    "keys": lambda package, monkeypatch, folder: load_keys_of_no_adapter(package, folder),
    "device": lambda package, monkeypatch, folder: load_onto_no_device(package, folder, "safetensors"),
    "device of a .bin": lambda package, monkeypatch, folder: load_onto_no_device(package, folder, "bin"),
    "lora_ga quantised": lambda package, monkeypatch, folder: preprocess(package, Quantised(4, 4)),
    "lora_ga layers": lambda package, monkeypatch, folder: preprocess(package, nn.Conv1d(4, 4, 1)),
    "kasa meta": lambda package, monkeypatch, folder: use_kasa_on_the_meta_device(package),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_begin_as_in_peft(case, monkeypatch, tmp_path):
    texts = []
    for package in (peft, peft_c):
        with pytest.raises(Exception) as caught:
            REFUSALS[case](package, monkeypatch, tmp_path)
        texts.append((caught.type, str(caught.value)))
    assert texts[0][0] is texts[1][0]
    assert texts[1][1].startswith(texts[0][1].split(". ")[0])


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} or in the Hugging Face Hub"):
        peft_c.load_peft_weights(tmp_path)
