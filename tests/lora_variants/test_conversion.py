"""Conversion to LoRA, intruder reduction and Arrow against PEFT's."""

import pytest
import torch
from variant_cases import adapted, assert_same_state, build

import peft_c
from peft_c.tuners.lora import _targets


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("rank", [4, 2, 0.9, 1.0])
@pytest.mark.filterwarnings("ignore:Converting")
def test_convert(peft, kind, rank, tmp_path):
    results = []
    for package in (peft_c, peft):
        model, x = adapted(package, kind, random_values=True, fan_in_fan_out=kind == "conv1d")
        results.append(package.convert_to_lora(model, rank=rank))
    (mine, state), (theirs, reference) = results
    assert state.keys() == reference.keys()
    assert (mine.r, mine.rank_pattern, mine.alpha_pattern) == (theirs.r, theirs.rank_pattern, theirs.alpha_pattern)
    assert set(mine.target_modules) == set(theirs.target_modules)
    for prefix in {key.rpartition(".lora_")[0] for key in state}:
        products = [s[f"{prefix}.lora_B.weight"] @ s[f"{prefix}.lora_A.weight"] for s in (state, reference)]
        torch.testing.assert_close(*products, atol=1e-4, rtol=1e-4)

    model, x = adapted(peft_c, kind, random_values=True, fan_in_fan_out=kind == "conv1d")
    peft_c.save_as_lora(tmp_path, model, rank=rank)
    loaded = peft_c.PeftModel.from_pretrained(build(kind)[0], tmp_path)
    if rank == 4:
        torch.testing.assert_close(loaded(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rank", "text"), [(0, "rank of 0"), (-1, "of -1"), (1.5, "threshold"), (99, "lower rank")])
@pytest.mark.filterwarnings("ignore:Converting")
def test_bad_ranks(rank, text, tmp_path):
    model, _ = adapted(peft_c, "linear", random_values=True)
    with pytest.raises(ValueError, match=text):
        peft_c.save_as_lora(tmp_path / "new", model, rank=rank)
    assert not (tmp_path / "new").exists()


def test_nothing_to_convert():
    with pytest.raises(TypeError, match="any layer that supports"):
        peft_c.convert_to_lora(build("linear")[0], rank=2)
    with pytest.raises(TypeError, match="Some module types"):
        peft_c.convert_to_lora(adapted(peft_c, "embedding")[0], rank=2)


@pytest.mark.parametrize("epsilon", [0.0, 0.9])
def test_intruders(peft, epsilon):
    from peft.tuners.lora.intruders import reduce_intruder_dimension as theirs

    from peft_c.tuners.lora.intruders import reduce_intruder_dimension as mine

    outputs, logs = [], []
    for package, reduce in ((peft_c, mine), (peft, theirs)):
        model, x = adapted(package, "linear", random_values=True)
        logs.append([])
        reduce(model, threshold_epsilon=epsilon, logging_sink=logs[-1].append)
        assert model.active_adapter == "intruder_reduced"
        outputs.append(model.eval()(x))
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)
    assert logs[0] == logs[1]


def test_intruders_of_an_embedding():
    """PEFT gives the factors the wrong shapes here."""
    from peft_c.tuners.lora.intruders import reduce_intruder_dimension

    model, x = adapted(peft_c, "embedding", random_values=True)
    expected = model(x)
    reduce_intruder_dimension(model, threshold_epsilon=2.0, mitigation_lambda=1.0, logging_sink=None)
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)  # kept in full
    with pytest.raises(ValueError, match="no adapter 'nope'"):
        reduce_intruder_dimension(model, old_adapter_name="nope")


@pytest.mark.parametrize("gks", [False, True])
def test_arrow(peft, tmp_path, gks):
    outputs, models = [], []
    for package in (peft_c, peft):
        paths = []
        for i in range(5):
            model, _ = adapted(package, "linear", seed=i, init_lora_weights=False)
            paths.append(str(tmp_path / package.__name__ / f"expert{i}"))
            model.save_pretrained(paths[-1])
        lora = __import__(f"{package.__name__}.tuners.lora", fromlist=["ArrowConfig"])
        config = lora.ArrowConfig(top_k=2, use_gks=gks, rng_seed=3, router_temperature=0.7)
        net, x, _ = build("linear")
        model = lora.create_arrow_model(net, paths[:3], config, general_adapter_paths=paths[3:] if gks else None)
        outputs.append([model.eval()(x)])
        model.load_adapter(paths[4], adapter_name="late")  # a fourth expert
        model.set_adapter("arrow_router")
        outputs[-1].append(model.eval()(x))
        models.append(model)
    for left, right in zip(*outputs, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)
    assert_same_state(*models)
    with pytest.raises(RuntimeError, match="Cannot merge an active Arrow router"):
        models[0].merge_adapter()


def test_arrow_needs_alike_experts(tmp_path):
    from peft_c.tuners.lora import ArrowConfig, create_arrow_model

    for name, options in (("a", {"r": 4}), ("b", {"r": 2}), ("c", {"r": 4, "target_modules": ["up"]})):
        net = build("linear")[0]
        config = peft_c.LoraConfig(**{"target_modules": ["up", "down"], **options})
        peft_c.get_peft_model(net, config).save_pretrained(tmp_path / name)
    for other, text in (("b", "rank mismatch"), ("c", "target_modules mismatch|shape mismatch")):
        with pytest.raises(ValueError, match=text):
            create_arrow_model(build("linear")[0], [str(tmp_path / "a"), str(tmp_path / other)], ArrowConfig())
    for paths, options, text in (([], {}, "at least one"), (["x"], {"use_gks": True}, "general LoRA paths")):
        with pytest.raises(ValueError, match=text):
            create_arrow_model(build("linear")[0], paths, ArrowConfig(**options))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="adapter_config.json"):
        create_arrow_model(build("linear")[0], [str(tmp_path / "empty")], ArrowConfig())


def test_cache_files_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _targets.save_cache("here.pt", {"a": torch.ones(1)})
    assert _targets.load_cache("here.pt", torch.nn.Linear(1, 1))["a"] == 1
    (tmp_path / "none.pt").touch()
    assert _targets.load_cache("none.pt", torch.nn.Linear(1, 1)) is None
