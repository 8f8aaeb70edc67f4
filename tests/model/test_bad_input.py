"""What cannot be loaded, added or switched: a clear error, and nothing has changed."""

import json
import pickle
import re
import shutil
import sys
import warnings

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import peft_c
from peft_c import LoraConfig, PeftModel, get_peft_model

from . import tiny

X = torch.linspace(-1, 1, 30).view(3, 10)
CONFIG = {"r": 2, "target_modules": ["lin0", "lin1"]}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    tiny.randomize(get_peft_model(tiny.mlp(), LoraConfig(**CONFIG))).save_pretrained(tmp_path / "good")
    return tmp_path / "good"


def photo(model, x=X):
    """Everything that an adapter could have changed."""
    return {
        "modules": {name: type(module) for name, module in model.named_modules()},
        "params": {name: (id(p), p.data_ptr(), p.requires_grad, p._version) for name, p in model.named_parameters()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "keys": sorted(key for module in model.modules() for key in vars(module)),
        "training": model.training,
        "out": model(x).detach().clone(),
    }


def same(before, after):
    out = before.pop("out"), after.pop("out")
    assert torch.equal(*out)
    assert before == after


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    return path


def scribble(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    return path


def empty(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(b"")
    return path


def bad_pickle(folder):
    (folder / "adapter_model.safetensors").unlink()
    path = folder / "adapter_model.bin"
    path.write_bytes(b"not a pickle")
    return path


def no_json(folder):
    path = folder / "adapter_config.json"
    path.write_text('{"peft_type": "LORA", ')
    return path


def no_object(folder):
    path = folder / "adapter_config.json"
    path.write_text("[1, 2]")
    return path


def unknown_type(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "NEW_METHOD", "r": 2}))
    return "NEW_METHOD"


def no_type(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"r": 2}))
    return path


def no_weights(folder):
    (folder / "adapter_model.safetensors").unlink()
    return folder


def wrong_rank(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 5}))
    return "size mismatch for .*lin0.lora_A"


BROKEN = [truncate, scribble, empty, bad_pickle, no_json, no_object, unknown_type, no_type, no_weights, wrong_rank]


@pytest.mark.parametrize("break_it", BROKEN)
def test_from_pretrained_leaves_the_base_model_alone(break_it, saved):
    named = break_it(saved)
    model = tiny.mlp()
    before = photo(model)
    with pytest.raises((ValueError, RuntimeError, KeyError), match=str(named)):
        PeftModel.from_pretrained(model, saved)
    same(before, photo(model))
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    "break_it,kind",
    [(truncate, SafetensorError), (bad_pickle, pickle.UnpicklingError), (no_json, json.JSONDecodeError)],
)
def test_unreadable_files_raise_what_peft_raises(break_it, kind, saved):
    break_it(saved)
    with pytest.raises(kind):
        PeftModel.from_pretrained(tiny.mlp(), saved)


def test_a_device_that_is_not_there_is_no_unreadable_file(saved):
    if torch.cuda.is_available():
        pytest.skip("CUDA is there")
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        peft_c.load_peft_weights(saved, device="cuda")
    assert "truncated" not in str(caught.value)


@pytest.mark.parametrize("break_it", BROKEN)
def test_load_adapter_leaves_the_model_alone(break_it, saved):
    model = PeftModel.from_pretrained(tiny.mlp(), saved)
    named = break_it(saved)
    before = photo(model)
    with pytest.raises((ValueError, RuntimeError, KeyError), match=str(named)):
        model.load_adapter(saved, "second")
    same(before, photo(model))
    assert list(model.peft_config) == ["default"]
    shutil.rmtree(saved)
    model.add_adapter("second", LoraConfig(**CONFIG))  # the name is free
    assert model.get_model_status().available_adapters == ["default", "second"]


def test_a_failure_takes_back_new_layers_too(saved):
    """The second adapter would turn another module into a layer, and another into a fully trained one."""
    ids = torch.arange(12).view(2, 6)
    settings = {"r": 2, "target_modules": ["lin1"], "modules_to_save": ["emb"]}
    get_peft_model(tiny.token_mlp(out=7), LoraConfig(**settings)).save_pretrained(saved.parent / "wide")
    model = get_peft_model(tiny.token_mlp(), LoraConfig(r=2, target_modules=["lin0"]))
    before = photo(model, ids)
    where = re.escape(f"'second' could not be loaded from '{saved.parent / 'wide'}'; the model is unchanged")
    with pytest.raises(RuntimeError, match=rf"{where}(.|\n)*lin1.*\[7, 2\].*\[4, 2\]"):
        model.load_adapter(saved.parent / "wide", "second")
    same(before, photo(model, ids))
    assert type(model.base_model.model.mlp.lin1) is nn.Linear
    assert type(model.base_model.model.emb) is nn.Embedding
    get_peft_model(tiny.token_mlp(), LoraConfig(**settings)).save_pretrained(saved.parent / "fits")
    model.load_adapter(saved.parent / "fits", "second")
    assert type(model.base_model.model.emb) is not nn.Embedding


def test_weights_of_a_loaded_adapter_are_replaced_or_kept(saved):
    model = PeftModel.from_pretrained(tiny.mlp(), saved)
    weights = peft_c.load_peft_weights(saved)
    bad = {key: torch.zeros(9, 9) if "lin1.lora_B" in key else value + 1 for key, value in weights.items()}
    before = photo(model)
    with pytest.raises(RuntimeError, match="lin1.lora_B"):
        peft_c.set_peft_model_state_dict(model, bad)
    same(before, photo(model))
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        peft_c.set_peft_model_state_dict(model, bad, ignore_mismatched_sizes=True)
    state = peft_c.get_peft_model_state_dict(model)
    for key, value in weights.items():
        torch.testing.assert_close(state[key], value if "lin1.lora_B" in key else value + 1)


def test_another_method_is_refused(saved):
    model = PeftModel.from_pretrained(tiny.mlp(), saved)
    other = peft_c.TrainableTokensConfig(target_modules=["lin0"], token_indices=[0])
    before = photo(model)
    with pytest.raises(ValueError, match="different peft types.*LORA.*TRAINABLE_TOKENS"):
        model.add_adapter("tokens", other)
    other.save_pretrained(saved)
    with pytest.raises(ValueError, match="different peft types"):
        model.load_adapter(saved, "tokens")
    with pytest.raises(ValueError, match="'default': it is of type TRAINABLE_TOKENS, the adapter of LORA"):
        model.load_adapter(saved, "default")
    same(before, photo(model))


def test_missing_fully_trained_module_is_named(saved):
    config = LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["lin1"])
    get_peft_model(tiny.mlp(), LoraConfig(r=2, target_modules=["lin0"])).save_pretrained(saved)
    config.save_pretrained(saved)
    with pytest.raises(KeyError, match="lin1.weight.*missing"):
        PeftModel.from_pretrained(tiny.mlp(), saved)


def test_names(saved):
    model = PeftModel.from_pretrained(tiny.mlp(), saved)
    before = photo(model)
    with pytest.raises(ValueError, match="nope not found.*default"):
        model.set_adapter("nope")
    with pytest.raises(TypeError, match="base_model.set_adapter"):
        model.set_adapter(["default"])
    with pytest.raises(ValueError, match="nope does not exist"):
        model.delete_adapter("nope")
    with pytest.raises(ValueError, match="'default' already exists"):
        model.add_adapter("default", LoraConfig(**CONFIG))
    with pytest.raises(KeyError, match="nope"):
        peft_c.get_peft_model_state_dict(model, adapter_name="nope")
    with pytest.raises(ValueError, match="must be a PeftConfig"):
        PeftModel.from_pretrained(tiny.mlp(), saved, config={"r": 2})
    with pytest.raises(ValueError, match="should be a directory"):
        model.save_pretrained(saved / "adapter_config.json")
    same(before, photo(model))


def test_unknown_keys_and_runtime_config_are_dropped_with_a_warning(saved):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1, "runtime_config": {"x": 1}}))
    with pytest.warns(UserWarning) as caught:
        config = peft_c.PeftConfig.from_pretrained(saved)
    texts = [str(warning.message) for warning in caught]
    assert any("['from_the_future'] for class LoraConfig" in text for text in texts)
    assert any("runtime_config" in text for text in texts)
    assert type(config) is LoraConfig


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": "["}, re.error, r"target_modules='\[' is no regular expression"),
        ({"exclude_modules": "["}, re.error, r"exclude_modules='\[' is no regular expression"),
        ({"target_modules": 3}, TypeError, "target_modules must be a list of names"),
        ({"target_modules": [nn.Linear(2, 2)]}, TypeError, "target_modules must be a list of names"),
        ({"r": 0}, ValueError, "`r` should be a positive integer"),
        ({"lora_dropout": 2}, ValueError, "dropout"),
        ({"r": 2.5}, TypeError, "float|combination of arguments"),
    ],
)
def test_options(options, error, message, saved):
    model = PeftModel.from_pretrained(tiny.mlp(), saved)
    before = photo(model)
    with pytest.raises(error, match=message) as raised:
        model.add_adapter("other", LoraConfig(**{**CONFIG, **options}))
    same(before, photo(model))
    if sys.version_info >= (3, 11) and not {"target_modules", "exclude_modules"} & set(options):
        assert raised.value.__notes__ == ["(adapter 'other', layer 'lin0')"]


def test_what_is_no_configuration(saved):
    model = PeftModel.from_pretrained(tiny.mlp(), saved)
    before = photo(model)
    for args in (("other", {"r": 2}), (LoraConfig(**CONFIG), "other")):
        with pytest.raises(TypeError, match="such as a LoraConfig, got"):
            model.add_adapter(*args)
    with pytest.raises(TypeError, match="such as a LoraConfig, got"):
        get_peft_model(LoraConfig(**CONFIG), tiny.mlp())
    with pytest.raises(TypeError, match="such as a LoraConfig, got None"):
        get_peft_model(tiny.mlp(), None)
    same(before, photo(model))


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_that_is_refused_leaves_others_merged(tied):
    """Adding an adapter unmerges; one that is refused after that leaves what was merged, and its record."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False))
    if tied:
        base[2].weight = base[0].weight
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1", "2"], init_lora_weights=False)).eval()
    layers = model.base_model.model
    old = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
        before = photo(model, torch.arange(4)), {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(TypeError, match="trainable_token_indices"):
            model.add_adapter("second", LoraConfig(target_modules=["1"], trainable_token_indices={"0": [1]}))
    state = model.state_dict()
    assert state.keys() == before[1].keys() and all(torch.equal(state[key], before[1][key]) for key in state)
    assert [layer.merged_adapters for layer in layers] == [["default"]] * 3
    assert torch.equal(model(torch.arange(4)), before[0]["out"])
    model.unmerge_adapter()
    state = model.state_dict()
    assert all(torch.equal(state[key], old[key]) for key in state)
    assert (layers[2].get_base_layer().weight is layers[0].get_base_layer().weight) == tied


def test_a_combination_that_fails_leaves_the_layers_alone():
    model = get_peft_model(tiny.mlp(), LoraConfig(r=2, target_modules=["lin0"]))
    other = LoraConfig(r=2, target_modules=["lin0", "lin1"], exclude_modules=["lin1"])
    model.add_adapter("other", other)
    before = photo(model)
    with pytest.raises(ValueError, match="No matching LoRAs"):
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum", "cat")
    same(before, photo(model))
    assert sorted(model.peft_config) == ["default", "other"]


def test_a_mixed_model_with_trained_tokens_unloads():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6))
    config = LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [1, 3]}, init_lora_weights=False)
    model = get_peft_model(base, config, mixed=True).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 1
    expected = model(torch.arange(9))
    torch.testing.assert_close(model.merge_and_unload()(torch.arange(9)), expected)
    assert type(base[0]) is nn.Embedding


def test_a_mixed_model_adds_lora_to_an_adapted_convolution():
    torch.manual_seed(0)
    config = peft_c.LoKrConfig(r=2, target_modules=["0"], init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), config, mixed=True).eval()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.set_adapter(["default", "second"])
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-4)
