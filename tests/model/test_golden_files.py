"""Files, outputs and status against the installed peft: what one writes the other reads, with the same bytes."""

import dataclasses
import json

import pytest
import torch

from . import tiny

peft = pytest.importorskip("peft")
import peft_c  # noqa: E402

IDS = torch.arange(12).view(2, 6)
CASES = {
    "mlp": (tiny.mlp, {"target_modules": ["lin0", "lin1"]}, torch.linspace(-1, 1, 30).view(3, 10)),
    "mlp-dora": (
        tiny.mlp,
        {"target_modules": ["lin0"], "use_dora": True, "bias": "lora_only"},
        torch.linspace(-1, 1, 30).view(3, 10),
    ),
    "mlp-bias": (
        tiny.mlp,
        {"target_modules": ["lin0"], "lora_bias": True, "bias": "all"},
        torch.linspace(-1, 1, 30).view(3, 10),
    ),
    "embedding-and-head": (
        tiny.token_mlp,
        {"target_modules": ["emb", "lin0"], "modules_to_save": ["lin1"], "rank_pattern": {"lin0": 4}},
        IDS,
    ),
    "tokens": (tiny.token_mlp, {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [1, 3, 5]}}, IDS),
    "llama": (tiny.llama, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}, IDS),
    "bert": (tiny.bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}, IDS),
    "bert-tokens": (
        lambda: tiny.bert("TokenClassification"),
        {"target_modules": ["query"], "task_type": "TOKEN_CLS", "use_rslora": True},
        IDS,
    ),
}


def run(model, inputs):
    with torch.no_grad():
        out = model(inputs) if inputs.is_floating_point() or not hasattr(model, "config") else model(input_ids=inputs)
    return getattr(out, "logits", out)


def build(lib, make, settings):
    torch.manual_seed(3)
    config = lib.LoraConfig(r=2, lora_alpha=6, **settings)
    return tiny.randomize(lib.get_peft_model(make(), config)).eval()


@pytest.fixture(params=CASES, ids=str)
def case(request):
    if request.param.startswith(("llama", "bert")):
        pytest.importorskip("transformers")
    return CASES[request.param]


def test_same_bytes(case, tmp_path):
    make, settings, _ = case
    for lib in (peft, peft_c):
        build(lib, make, settings).save_pretrained(tmp_path / lib.__name__)
    names = sorted(path.name for path in (tmp_path / "peft").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "peft_c").iterdir())
    for name in names:
        theirs, ours = ((tmp_path / lib / name).read_bytes() for lib in ("peft", "peft_c"))
        if name == "adapter_config.json":
            theirs, ours = (
                # sets have no order, and the class of a test model is where it is
                {k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
                for text in (theirs, ours)
            )
        assert theirs == ours, name


@pytest.mark.parametrize("writer,reader", [(peft, peft_c), (peft_c, peft), (peft_c, peft_c)])
def test_round_trip(case, writer, reader, tmp_path):
    make, settings, inputs = case
    written = build(writer, make, settings)
    expected = run(written, inputs)
    written.save_pretrained(tmp_path)
    read = reader.PeftModel.from_pretrained(make(), tmp_path)
    assert type(read).__name__ == type(written).__name__
    torch.testing.assert_close(run(read, inputs), expected, rtol=1e-5, atol=1e-6)
    again = reader.get_peft_model_state_dict(read)
    for key, value in writer.get_peft_model_state_dict(written).items():
        torch.testing.assert_close(again.pop(key), value, rtol=0, atol=0)
    assert not again


def test_low_cpu_mem_usage(case, tmp_path):
    make, settings, inputs = case
    written = build(peft, make, settings)
    written.save_pretrained(tmp_path)
    read = peft_c.PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=True)
    assert not any(param.is_meta for param in read.parameters())
    torch.testing.assert_close(run(read, inputs), run(written, inputs), rtol=1e-5, atol=1e-6)


def test_same_initialisation_and_names(case):
    make, settings, _ = case
    models = []
    for lib in (peft, peft_c):
        torch.manual_seed(5)
        model = lib.get_peft_model(make(), lib.LoraConfig(r=2, **settings))
        if not {"trainable_token_indices", "bias"} & settings.keys():
            model.add_adapter("other", lib.LoraConfig(r=3, **settings))
        models.append(dict(model.named_parameters()))
    theirs, ours = models
    assert set(theirs) == set(ours)
    for name, param in theirs.items():
        torch.testing.assert_close(ours[name], param, rtol=0, atol=0, msg=name)
        assert ours[name].requires_grad == param.requires_grad, name


def test_same_status(case):
    make, settings, _ = case
    seen = []
    for lib in (peft, peft_c):
        model = build(lib, make, settings)
        if not {"trainable_token_indices", "bias"} & settings.keys():
            model.add_adapter("other", lib.LoraConfig(r=3, **settings))
        states = [lib.get_model_status(model), *lib.get_layer_status(model)]
        with model.disable_adapter():
            states += [model.get_model_status(), *model.get_layer_status()]
        next(m for m in model.modules() if hasattr(m, "adapter_layer_names")).enable_adapters(False)
        states += [model.get_model_status(), *model.get_layer_status()]
        seen.append([dataclasses.asdict(state) for state in states])
        seen[-1].append(model.get_nb_trainable_parameters())
    assert seen[0] == seen[1]


def test_selected_adapters_and_pickle(tmp_path):
    x = CASES["mlp"][2]
    model = build(peft_c, tiny.mlp, {"target_modules": ["lin0"]})
    model.add_adapter("other", peft_c.LoraConfig(r=3, target_modules=["lin1"], init_lora_weights=False))
    model.set_adapter("other")
    expected = run(model, x)
    model.save_pretrained(tmp_path, selected_adapters=["other"], safe_serialization=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "other"]
    assert (tmp_path / "other" / "adapter_model.bin").is_file()
    theirs = peft.PeftModel.from_pretrained(tiny.mlp(), tmp_path / "other")
    torch.testing.assert_close(run(theirs, x), expected)
    with pytest.raises(ValueError, match="current supported adapter names"):
        model.save_pretrained(tmp_path, selected_adapters=["nope"])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_conversion_of_initialised_adapters(init, tmp_path):
    x = CASES["mlp"][2]
    texts, outputs = [], []
    for lib in (peft, peft_c):
        torch.manual_seed(0)
        config = lib.LoraConfig(r=2, target_modules=["lin0", "lin1"], init_lora_weights=init)
        model = lib.get_peft_model(tiny.mlp(), config).eval()
        folder = tmp_path / lib.__name__
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "start")
        model.peft_config["default"].init_lora_weights = init
        tiny.randomize(model)
        expected = run(model, x)
        model.save_pretrained(folder / "end", path_initial_model_for_weight_conversion=folder / "start")
        texts.append(json.loads((folder / "end" / "adapter_config.json").read_text()))
        outputs.append(run(lib.PeftModel.from_pretrained(tiny.mlp(), folder / "end"), x))
        torch.testing.assert_close(outputs[-1], expected, rtol=1e-4, atol=1e-5)
        assert model.peft_config["default"].r == 2
    for text in texts:
        text["target_modules"].sort()
    assert texts[0] == texts[1]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_base_model_state_dict():
    plain = tiny.token_mlp()
    settings = {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "trainable_token_indices": {"emb": [1]}}
    model = build(peft_c, tiny.token_mlp, settings)
    state = peft_c.get_base_model_state_dict(model)
    assert list(state) == list(plain.state_dict())
    result = peft_c.set_base_model_state_dict(model, {key: value + 1 for key, value in state.items()})
    assert not result.missing_keys and not result.unexpected_keys
    for key, value in peft_c.get_base_model_state_dict(model).items():
        torch.testing.assert_close(value, plain.state_dict()[key] + 1)
    with pytest.raises(RuntimeError, match="Missing.*emb.weight"):
        peft_c.set_base_model_state_dict(model, {})


def test_generate_equals(tmp_path):
    pytest.importorskip("transformers")
    tokens = []
    for lib in (peft, peft_c):
        model = build(lib, tiny.llama, CASES["llama"][1])
        tokens.append(model.generate(input_ids=IDS[:, :3], max_new_tokens=5, do_sample=False))
        assert "prepare_inputs_for_generation" not in vars(model.get_base_model())
    assert torch.equal(*tokens)


def test_a_models_own_state_dict_is_what_is_saved(tmp_path):
    from safetensors.torch import load_file

    saved = []
    for package in (peft, peft_c):
        torch.manual_seed(0)
        model = package.get_peft_model(tiny.mlp(), package.LoraConfig(target_modules=["lin0", "lin1"]))
        left = {key: value for key, value in model.state_dict().items() if "lin1.lora_A" not in key}
        model.state_dict = lambda left=left: left
        model.save_pretrained(tmp_path / package.__name__)
        saved.append(sorted(load_file(tmp_path / package.__name__ / "adapter_model.safetensors")))
    assert saved[0] == saved[1] and not any("lin1.lora_A" in key for key in saved[0])
