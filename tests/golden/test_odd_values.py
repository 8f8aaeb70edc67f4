"""Odd values of options and arguments mean what they mean to the installed peft; names that few programs use exist."""

import importlib
import inspect
import warnings
from typing import get_args

import pytest
import torch
from torch import nn

import peft_c
from tests.rooms.cases import PAIRS, config_of, layers, network, start

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def outcome(call, package):
    """What a call gives, or its error's type, and the categories of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call(package)
        except Exception as error:
            result = type(error)
    return result, [warning.category for warning in caught if issubclass(warning.category, UserWarning)]


def lora(package, **options):
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return package.get_peft_model(base, package.LoraConfig(**{"target_modules": ["0"], **options}))


def shadow(package, p):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers = pytest.importorskip("transformers")
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes))
    model = package.get_peft_model(base, package.ShadowConfig(r=2, shadow_dropout=p, task_type="CAUSAL_LM"))
    return [repr(module) for name, module in model.named_modules() if name.endswith("dropout.default")]


def targeted(model):
    return model.base_model.targeted_module_names


@pytest.mark.parametrize(
    "call",
    [
        *(lambda p, v=v: targeted(lora(p, exclude_modules=v)) for v in (None, False, 0, "", [], ())),
        *(lambda p, v=v: lora(p).set_adapter(v) for v in (None, 1, "nope", ["default"], {"default"})),
        *(
            lambda p, v=v: layers(start("c3a", package=p))[0].get_delta_weight(v)
            for v in ("nope", None, 1, ["default"])
        ),
        *(lambda p, v=v: shadow(p, v) for v in (None, 0, 0.5, -1, 2)),
        *(lambda p, v=v: lora(p).base_model.delete_adapter(v) for v in (["default"], None, 1, "nope")),
    ],
)
def test_what_calls_do_with_odd_values(call):
    assert outcome(call, peft_c) == outcome(call, peft)


@pytest.mark.parametrize("value", [None, 0, 1, "", "yes"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("method", ["deft", "fourierft", "vera"])
def test_whether_a_weight_is_stored_transposed(method, kind, value):
    def call(package):
        model = start(method, kind, package, fan_in_fan_out=value)
        return bool(model.peft_config["default"].fan_in_fan_out)

    assert outcome(call, peft_c) == outcome(call, peft)


# PEFT's says that Conv1D is none
@pytest.mark.parametrize(("method", "kind"), [pair for pair in PAIRS if pair != ("pvera", "Conv1D")])
def test_attributes_of_layers(method, kind):
    ours, theirs = (layers(start(method, kind, package))[0] for package in (peft_c, peft))
    for name in ("kwargs", "is_target_conv_1d_layer", "use_dora", "lora_bias", "ephemeral_gpu_offload"):
        if hasattr(theirs, name):
            assert type(getattr(ours, name)) is type(getattr(theirs, name))
            assert name == "kwargs" or getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("form", [True, "bat", "mini"])
def test_the_dropout_of_each_form_of_miss(form):
    found = []
    for package in (peft_c, peft):
        model = start("miss", package=package, init_weights=form, mini_r=2, miss_dropout=0.5).train()
        torch.manual_seed(0)
        found.append((repr(layers(model)[0].miss_dropout), model(torch.ones(2, 16))))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])


def test_what_adamss_adds_to_the_bias():
    ours, theirs = (
        layers(start("adamss", package=package))[0].get_delta_bias("default") for package in (peft_c, peft)
    )
    assert ours.abs().max() > 0
    torch.testing.assert_close(ours, theirs)


def parts(package, path):
    return importlib.import_module(f"{package.__name__}.tuners.{path}")


def test_collections_of_mixed_models():
    ours, theirs = (parts(package, "mixed.model") for package in (peft_c, peft))
    assert sorted(ours.PREFIXES) == sorted(theirs.PREFIXES)
    assert [c.__name__ for c in get_args(ours.Configs)] == [c.__name__ for c in get_args(theirs.Configs)]
    assert issubclass(parts(peft_c, "lora").Linear, ours.Layers)
    assert ours.ModulesToSaveWrapper is importlib.import_module("peft_c.utils.other").ModulesToSaveWrapper


@pytest.mark.parametrize("method", ["trainable_tokens", "ln_tuning"])
def test_a_model_whose_config_is_none(method):
    found = []
    for package in (peft_c, peft):
        kind = "Embedding" if method == "trainable_tokens" else "LayerNorm"
        base = network(kind)[0]
        base.config = None
        model = package.get_peft_model(base, config_of(method, kind, package))
        found.append(model(network(kind)[1]))
    torch.testing.assert_close(*found)


FACTORS, KERNEL = [(6, 2), (2, 5)], [(2, 2, 3, 3), (2, 6), (2, 5)]


@pytest.mark.parametrize(
    ("path", "name", "shapes", "more"),
    [
        ("loha.layer", "HadaWeight", FACTORS * 2, (torch.tensor(0.5),)),
        ("loha.layer", "HadaWeight", FACTORS * 2, ()),
        ("loha.layer", "HadaWeightCP", KERNEL * 2, (torch.tensor(0.5),)),
        ("loha.layer", "make_weight", FACTORS * 2, (torch.tensor(0.5),)),
        ("loha.layer", "make_weight_cp", KERNEL * 2, (torch.tensor(0.5),)),
        ("lokr.layer", "make_kron", FACTORS, ()),
        ("lokr.layer", "make_kron", [(6, 2), (2, 5, 3, 3)], (0.5,)),
        ("lokr.layer", "make_weight_cp", KERNEL, ()),
        ("c3a.utils", "BlockCircularConvolution", [(3, 8), (3, 2, 4)], ()),
    ],
)
def test_functions_of_tensors(path, name, shapes, more):
    torch.manual_seed(0)
    factors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    found = []
    for package in (peft_c, peft):
        function = getattr(parts(package, path), name)
        result = (function.apply if inspect.isclass(function) else function)(*factors, *more)
        found.append((result, *torch.autograd.grad(result.pow(2).sum(), factors)))
    # gradients of PEFT's that torch's gradcheck finds wrong: of w1a and w2a, and of the input
    wrong = {"HadaWeightCP": (2, 5), "make_weight_cp": (2, 5), "BlockCircularConvolution": (1,)}
    for index, (ours, theirs) in enumerate(zip(*found, strict=True)):
        if index not in wrong.get(name, ()) or path == "lokr.layer":
            torch.testing.assert_close(ours, theirs)


PATTERNS = ("a.0", r"a\.\d", "0|1", r"\d", "^a.1$", "b", "1")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("fourierft", "n_frequency_pattern", 3),
        ("waveft", "n_frequency_pattern", 3),
        ("c3a", "block_size_pattern", 8),
        ("loha", "rank_pattern", 3),
        ("delora", "rank_pattern", 3),
    ],
)
def test_which_modules_a_pattern_fits(method, option, value, pattern):
    shapes = []
    for package in (peft_c, peft):
        config = config_of(method, package=package, **{option: {pattern: value}})
        config.target_modules = {"0", "1", "b"}
        parts = {"a": nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), "b": nn.Linear(16, 16)}
        model = package.get_peft_model(nn.ModuleDict(parts), config)
        shapes.append({name: part.shape for name, part in package.get_peft_model_state_dict(model).items()})
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("dynamic", [True, False])
def test_subspaces_of_rank_0_have_rank_1(dynamic):
    pytest.importorskip("sklearn")
    ours, theirs = (
        start("adamss", package=package, subspace_rank=0, use_dynamic_rank=dynamic).state_dict()
        for package in (peft_c, peft)
    )
    torch.testing.assert_close(ours, theirs)
