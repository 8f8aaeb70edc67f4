"""Which modules a config targets, against the installed peft, over random configs."""

import random
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import peft_c
from peft_c.tuners.targets import compile_target_matcher, outer_modules
from peft_c.tuners.tuners_utils import (
    _find_minimal_target_modules,
    check_target_module_exists,
    inspect_matched_modules,
)

peft = pytest.importorskip("peft")
reference = pytest.importorskip("peft.tuners.tuners_utils")

PARTS = ("q_proj", "v_proj", "fc", "out.proj", "experts.0", "experts.11", "attn", "q_proj.inner", "x")
KEYS = [
    *("q_proj", "layers.0", "h.1.q_proj", "my.layers.10.attn.q_proj"),
    *(f"{stem}.{i}.{part}" for stem in ("model.layers", "enc.h", "layers") for i in (0, 1, 2, 10) for part in PARTS),
]


def random_config(rng):
    names = rng.sample(KEYS, 3) + rng.sample(PARTS, 3)
    listed = rng.choice([list, set])(rng.sample(names, rng.randint(1, 4)))
    regex = rng.choice([r".*q_proj", r".*\.(fc|x)$", r"model\.layers\.\d\.attn", "q_proj", r".*"])
    targets = rng.choice([listed, listed, listed, regex])
    layers = rng.choice([None, None, 1, 10, [0, 2], [], [10], range(2)])
    return SimpleNamespace(
        target_modules=targets,
        target_parameters=None,
        exclude_modules=rng.choice([None, None, rng.sample(names, 2), r".*\.1\..*", []]),
        modules_to_save=rng.choice([None, None, ["fc"], ["out", "experts"], ["q_proj"]]),
        layers_to_transform=layers,
        layers_pattern=rng.choice([None, "layers", ["h", "layers"], ["h"], "", []]),
    )


def outcome(match, key):
    try:
        result = match(key)
    except Exception as exc:
        return type(exc)
    return type(result).__name__, bool(result)


@pytest.mark.parametrize("seed", range(300))
def test_matching(seed):
    config = random_config(random.Random(seed))
    for key in KEYS:
        expected = outcome(lambda key: reference.check_target_module_exists(config, key), key)
        assert outcome(lambda key: check_target_module_exists(config, key), key) == expected, (config, key)
        assert outcome(lambda key: compile_target_matcher(config)(key), key) == expected


def test_a_broken_expression_is_an_error():
    config = SimpleNamespace(target_modules="(", target_parameters=None)
    with pytest.raises(re.error):
        check_target_module_exists(config, "x")


def test_no_targets_at_all_is_an_error():
    config = SimpleNamespace(target_modules=None, target_parameters=None)
    with pytest.raises(ValueError, match="target_modules"):
        check_target_module_exists(config, "x")
    config.target_parameters = ["x"]
    assert not check_target_module_exists(config, "x")


@pytest.mark.parametrize("seed", range(200))
def test_condensing_lists(seed):
    rng = random.Random(seed)
    keys = rng.sample(KEYS, 14)
    targets, others = keys[:5], keys[5:]
    ours = _find_minimal_target_modules(targets, others)
    assert ours == reference._find_minimal_target_modules(targets, others)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        layer = lambda: nn.ModuleDict({"q_proj": nn.Linear(6, 6), "fc": nn.Linear(6, 6), "conv": nn.Conv1d(2, 2, 3)})  # noqa: E731
        self.layers = nn.ModuleList(layer() for _ in range(3))
        self.head = nn.Linear(6, 2)
        self.scale = nn.ParameterDict({"w": nn.Parameter(torch.ones(2, 3))})


def kinds(log):
    return sorted({w.category.__name__ for w in log} & {"UserWarning", "RuntimeWarning"})


def inject(package, configs):
    torch.manual_seed(0)
    model = Net()
    try:
        with warnings.catch_warnings(record=True) as log:
            warnings.simplefilter("always")
            model = package.get_peft_model(model, package.LoraConfig(r=2, **configs[0]), adapter_name="a0")
            for i, config in enumerate(configs[1:], 1):
                model.add_adapter(f"a{i}", package.LoraConfig(r=2, **config))
    except Exception as exc:
        return type(exc).__name__, kinds(log)
    tuner = model.base_model
    return (
        [type(m).__name__ for m in model.modules()],
        {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()},
        {n: (dict(m.r), dict(m.lora_alpha)) for n, m in model.named_modules() if hasattr(m, "lora_alpha")},
        tuner.targeted_module_names,
        tuner.targeted_parameter_names,
        {name: config.target_modules for name, config in model.peft_config.items()},
        inspect_matched_modules(tuner, "a0"),
        kinds(log),
    )


def random_lora(rng):
    regular = ["q_proj", "fc", "conv", "layers.1.fc", "head", "nothing", "embed"]
    config = {"target_modules": rng.choice([rng.sample(regular, 2), rng.sample(regular, 3), "all-linear", r".*fc"])}
    if isinstance(config["target_modules"], list):
        config["layers_to_transform"] = rng.choice([None, None, 1, [0, 2]])
    config["exclude_modules"] = rng.choice([None, None, ["head"], r".*\.0\..*", ["none"]])
    config["rank_pattern"] = rng.choice([{}, {"fc": 3}, {"layers.0.fc": 1, "typo": 4}, {r"^layers\.1\..*": 5}])
    config["alpha_pattern"] = rng.choice([{}, {"q_proj": 3}])
    config["modules_to_save"] = rng.choice([None, None, ["head"]])
    config["inference_mode"] = rng.random() < 0.2
    if config["exclude_modules"] is None:
        config.pop("exclude_modules")
    return config


@pytest.mark.parametrize("seed", range(60))
def test_injection(seed):
    rng = random.Random(seed)
    configs = [random_lora(rng) for _ in range(rng.randint(1, 3))]
    theirs, ours = inject(peft, configs), inject(peft_c, configs)
    assert len(theirs) == len(ours), (theirs, ours, configs)
    for expected, got in zip(theirs, ours, strict=True):
        if isinstance(expected, dict) and expected and isinstance(next(iter(expected.values())), tuple):
            assert list(expected) == list(got), configs
            for key in expected:
                for a, b in zip(expected[key], got[key], strict=True):
                    assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, (key, configs)
        else:
            assert expected == got, configs


@pytest.mark.parametrize(
    "targets",
    [["scale.w"], ["layers.0.fc.weight"], ["fc.weight", "fc.bias"], ["embed.weight"], ["nope"], ["head.weight"]],
)
def test_target_parameters(targets):
    configs = [{"target_modules": [], "target_parameters": targets}] * 2
    theirs, ours = inject(peft, configs), inject(peft_c, configs)
    assert len(theirs) == len(ours), (theirs, ours)
    if len(theirs) > 2:
        assert list(theirs[1]) == list(ours[1]) and theirs[4] == ours[4]
    else:
        assert theirs == ours


def test_outer_modules_stop_at_tuner_layers():
    model = peft_c.get_peft_model(Net(), peft_c.LoraConfig(target_modules=["fc"]))
    net = model.base_model.model
    names = [name for name, _ in outer_modules(net)]
    assert names == [name for name, _ in Net().named_modules()]
    into = [name for name, _ in outer_modules(net, into_base_layers=True)]
    assert set(into) - set(names) == {f"layers.{i}.fc.base_layer" for i in range(3)}


@pytest.mark.parametrize("order", [("body", "again"), ("again", "body")])
def test_a_further_adapter_on_a_module_with_two_names(order, tmp_path):
    found = []
    for package in (peft_c, peft):
        shared = nn.Linear(4, 4)
        config = package.LoraConfig(target_modules=["body", "again"], r=2)
        model = package.get_peft_model(nn.ModuleDict({name: shared for name in order}), config)
        model.add_adapter("other", config)
        model.save_pretrained(tmp_path / package.__name__)
        result = model.load_adapter(tmp_path / package.__name__, "third")
        found.append((list(model.state_dict()), [n for n, _ in model.named_parameters()], list(result.missing_keys)))
    assert found[0] == found[1]
    assert found[0][2] == []


def test_all_names_that_others_import_are_there():
    from peft_c.tuners import tuners_utils

    names = {n for n in vars(reference) if getattr(getattr(reference, n), "__module__", "") == reference.__name__}
    assert {n for n in names if not hasattr(tuners_utils, n)} <= {"_extend_unique"}
