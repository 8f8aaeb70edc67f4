"""Every method on every base layer that it adapts, against the installed peft: the same numbers, names, files, flags
and kinds of error."""

import dataclasses
import warnings
from typing import get_args, get_type_hints

import pytest
import torch

import peft_c
from peft_c.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_c.tuners.room import Room
from tests.rooms.cases import (
    MERGEABLE,
    METHODS,
    NEUTRAL,
    NO_MERGE,
    ONE_ACTIVE,
    ONE_ADAPTER,
    PAIRS,
    call,
    config_of,
    disturb,
    layers,
    make,
    network,
    run,
    start,
    weights,
)

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
each = pytest.mark.parametrize(("method", "kind"), PAIRS)

# where PEFT computes something else or raises: see docs/numerics.md
OTHER_FORWARD = {("oft", "Conv2d")}
OTHER_GRADIENTS = {"c3a"}
OTHER_MERGE = {("lora", "MultiheadAttention"), ("oft", "Conv2d")}
OTHER_WITH_TWO = {
    ("c3a", "Linear"),
    ("osf", "Linear"),
    ("tinylora", "Conv1D"),
    ("oft", "Linear"),
    ("oft", "Conv2d"),
    ("oft", "Embedding"),
}


def close(left, right, tolerance=1e-4):
    return torch.allclose(left, right, atol=tolerance * max(1.0, right.abs().max().item()), rtol=0)


@each
@pytest.mark.parametrize("neutral", [False, True])
def test_a_new_adapter_has_the_same_values_names_and_flags(method, kind, neutral):
    options = dict.fromkeys(("init_weights", "init_lora_weights", "init_ia3_weights"), True) if neutral else {}
    options.update(NEUTRAL.get(method, {}) if neutral else {})
    ours, theirs = (start(method, kind, package, **options) for package in (peft_c, peft))
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (ours, theirs)]
    assert flags[0] == flags[1]
    saved = peft_c.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert [(name, t.shape) for name, t in saved[0].items()] == [(name, t.shape) for name, t in saved[1].items()]
    if kind != "MultiheadAttention":  # PEFT registers its frozen parameters anew
        assert list(left) == list(right)
        assert list(flags[0]) == list(flags[1]), "the order in which optimizers count parameters"


@pytest.mark.parametrize("method", sorted(NO_MERGE))
def test_what_cannot_be_merged_cannot_be_unmerged(method):
    for package in (peft_c, peft):
        model = make(method, package=package)
        for refused in (model.merge_adapter, model.unmerge_adapter, model.merge_and_unload):
            with pytest.raises(NotImplementedError):
                refused()


@each
def test_a_wrong_fan_in_fan_out(method, kind):
    found = []
    for package in (peft_c, peft):
        config = config_of(method, kind, package, fan_in_fan_out=kind != "Conv1D")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            package.get_peft_model(network(kind)[0], config)
        found.append(
            (sum("fan_in_fan_out" in str(w.message) for w in caught), getattr(config, "fan_in_fan_out", None))
        )
    assert found[0] == found[1]


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_new_adapter_has_the_same_values_dtypes_and_flags_in_other_dtypes(method, kind, dtype):
    if method == "psoft" and dtype is torch.float64:
        for package in (peft_c, peft):
            with pytest.raises(TypeError, match="float32"):
                start(method, kind, package, dtype=dtype)
        return
    ours, theirs = (start(method, kind, package, dtype=dtype) for package in (peft_c, peft))
    theirs, ours = (dict(model.named_parameters()) for model in (theirs, ours))
    assert ours.keys() == theirs.keys()
    for name, left in ours.items():
        right = theirs[name]
        assert left.dtype is right.dtype
        assert left.requires_grad is (right.requires_grad and "ranknum" not in name)
        assert torch.allclose(left.float(), right.float(), atol=1e-3, rtol=1e-2), name


def without(pairs, *exceptions):
    """Parametrised over the pairs of method and kind that are in none of the exceptions."""
    left = [pair for pair in pairs if not any(pair in each or pair[0] in each for each in exceptions)]
    return pytest.mark.parametrize(("method", "kind"), left)


@without(PAIRS, OTHER_FORWARD, {"trainable_tokens"})
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_input_of_another_dtype_than_the_weights(method, kind, dtype):
    x = network(kind)[1]
    if not x.is_floating_point():
        return
    try:
        theirs = run(make(method, kind, peft), method, kind, x.to(dtype))
    except RuntimeError:  # of a method whose base layer gets it as it is
        return
    ours = run(make(method, kind), method, kind, x.to(dtype))
    assert ours.dtype is theirs.dtype
    torch.testing.assert_close(ours, theirs, atol=0.05 * theirs.abs().max().item(), rtol=0)


@without(PAIRS, OTHER_FORWARD)
def test_hooks_on_an_adapters_dropout_are_called(method, kind):
    found = []
    for package in (peft_c, peft):
        model = make(method, kind, package)
        for layer in layers(model):
            for name, part in layer.named_modules():
                if "dropout" in name and isinstance(part, torch.nn.Identity):
                    part.register_forward_hook(lambda part, inputs, output: 3 * output)
        found.append(run(model, method, kind))
    assert close(*found)


class Halving(torch.nn.Module):
    """What a program may put in the place of an adapter's dropout: no class of torch's."""

    def forward(self, x):
        return x / 2 if self.training and x.is_floating_point() else x


@without(PAIRS, OTHER_FORWARD)
@pytest.mark.parametrize("training", [True, False])
def test_other_modules_in_the_place_of_an_adapters_dropout_are_called(method, kind, training):
    found = []
    for package in (peft_c, peft):
        model = make(method, kind, package)
        for layer in layers(model):
            for name, part in list(layer.named_modules()):
                if "dropout" in name and isinstance(part, torch.nn.Identity):
                    layer.set_submodule(name, Halving())
        found.append(run(model.train(training), method, kind))
    assert close(*found)


@each
def test_no_input_is_a_type_error_that_names_the_layer(method, kind):
    for layer in layers(start(method, kind)):
        if isinstance(layer, Room):
            for arguments in ((), (None,)):
                with pytest.raises(TypeError, match="got no input"):
                    layer(*arguments)


@without(PAIRS, OTHER_FORWARD)
def test_outputs_and_gradients(method, kind):
    ours, theirs = make(method, kind).train(), make(method, kind, peft).train()
    found, drawn = [], []
    for model in (ours, theirs):
        x = network(kind)[1]
        x = x.requires_grad_() if x.is_floating_point() else x
        torch.manual_seed(7)
        output = call(model, method, x)
        output.square().sum().backward()
        found.append((output, x.grad, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        drawn.append(torch.rand(1))
    assert close(found[0][0], found[1][0])
    assert torch.equal(*drawn), "a forward in training draws as many random numbers as PEFT's"
    assert close(run(ours.eval(), method, kind), run(theirs.eval(), method, kind))
    if found[1][1] is not None and method not in OTHER_GRADIENTS:
        assert close(found[0][1], found[1][1], 1e-3)
    assert found[0][2].keys() == found[1][2].keys()
    for name, gradient in found[1][2].items():
        assert method in OTHER_GRADIENTS or close(found[0][2][name], gradient, 1e-3), name


WITH_DROPOUT = [
    (method, kind, field.name)
    for method, kind in PAIRS
    for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[method.upper()])
    if field.name.endswith("dropout") and (method, kind) not in OTHER_FORWARD
]


@pytest.mark.parametrize(("method", "kind", "option"), WITH_DROPOUT)
def test_dropout(method, kind, option):
    """Of blocks that do not divide the inputs, too."""
    found = []
    for package in (peft_c, peft):
        model = start(method, kind, package, **{option: 0.4}, **({"r": 5} if method == "miss" else {})).train()
        disturb(model)
        found += [run(model, method, kind), torch.rand(1)]
    assert close(found[0], found[2])
    assert torch.equal(found[1], found[3])


@without(MERGEABLE, OTHER_MERGE)
def test_merged_weights(method, kind):
    ours, theirs = make(method, kind), make(method, kind, peft)
    for model in (ours, theirs):
        model.merge_adapter()
    for left, right in zip(weights(ours), weights(theirs), strict=True):
        assert left.dtype is right.dtype and close(left, right)


@without(PAIRS, ONE_ADAPTER, ONE_ACTIVE, OTHER_WITH_TWO)
def test_two_active_adapters(method, kind):
    found = []
    for package in (peft_c, peft):
        model = start(method, kind, package, adapters=("default", "other"))
        disturb(model, of="other")
        model.base_model.set_adapter(["default", "other"])
        found.append((run(model, method, kind), {name: p.requires_grad for name, p in model.named_parameters()}))
    assert close(*(output for output, _ in found), 1e-3)
    assert found[0][1] == found[1][1]


@without(PAIRS, ONE_ADAPTER)
def test_flags_after_adding_switching_and_deleting(method, kind):
    found = []
    for package in (peft_c, peft):
        model, flags = start(method, kind, package, adapters=("default", "other")), []

        def note(model=model, flags=flags):
            flags.append({name: p.requires_grad for name, p in model.named_parameters()})

        note()
        model.set_adapter("other")
        note()
        with model.disable_adapter():
            note()
        note()
        model.set_adapter("default", inference_mode=True)
        note()
        model.set_adapter("default")
        model.delete_adapter("other")
        note()
        found.append(flags)
    assert found[0] == found[1]


@without(PAIRS, ONE_ADAPTER)
@pytest.mark.parametrize("active", ["default", "other"])
def test_an_adapter_that_one_layer_gets_rid_of(method, kind, active):
    """What the layers share stays for the others, with the flags that it has in PEFT."""
    found = []
    for package in (peft_c, peft):
        model, states = start(method, kind, package, adapters=("default", "other")), []
        model.set_adapter(active)
        first, last = layers(model)[0], layers(model)[-1]
        acts = (
            lambda layer=first: layer.delete_adapter("default"),
            lambda model=model: model.set_adapter("other"),
            lambda model=model: model.set_adapter("default"),
            lambda model=model: model.delete_adapter("default"),
        )
        for act in acts:
            act()
            flags = {name: p.requires_grad for name, p in model.named_parameters()}
            names = [(layer.active_adapters, layer._all_available_adapter_names()) for layer in (first, last)]
            states.append((sorted(model.state_dict()), flags, names))
        found.append(states)
    assert found[0] == found[1]


@each
def test_files_both_ways(method, kind, tmp_path):
    ours, theirs = make(method, kind), make(method, kind, peft)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    read_by_peft = peft.PeftModel.from_pretrained(network(kind)[0], tmp_path / "ours").eval()
    read_by_us = peft_c.PeftModel.from_pretrained(network(kind)[0], tmp_path / "theirs").eval()
    assert close(run(read_by_peft, method, kind), run(theirs, method, kind))
    assert close(run(read_by_us, method, kind), run(ours, method, kind))


@each
def test_status(method, kind):
    ours, theirs = (start(method, kind, package).get_layer_status() for package in (peft_c, peft))
    for left, right in zip(ours, theirs, strict=True):
        assert dataclasses.asdict(left) == dataclasses.asdict(right)


# ------------------------------------------------------------------------------------------------ bad config values


def bad_values(method):
    """(option, value) that a config may refuse: numbers of no use, strings that mean nothing."""
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[method.upper()]
    hints = get_type_hints(cls)
    skipped = {field.name for field in dataclasses.fields(peft_c.PeftConfig)} | {"bias", "layers_pattern"}
    for field in dataclasses.fields(cls):
        if field.name in skipped or not field.init:
            continue
        kinds = {hints[field.name], *get_args(hints[field.name])}
        if type(field.default) is int or type(field.default) is float:
            yield from ((field.name, value) for value in (0, -1))
        if (
            type(field.default) is str
            or field.name.startswith("init_")
            and str in map(type, kinds)
            or any(get_args(kind) and all(isinstance(arg, str) for arg in get_args(kind)) for kind in kinds)
        ):
            yield field.name, "nonsense"
    if method not in ("xlora", "trainable_tokens", "osf"):
        yield "target_modules", ["nothing"]
        yield "target_modules", ["1"]


def error_of(method, package, option, value):
    kind = {"ln_tuning": "LayerNorm", "trainable_tokens": "Embedding"}.get(method, "Linear")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = config_of(method, kind, package)
            values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
            base, x = network(kind)
            model = package.get_peft_model(base, type(config)(**{**values, option: value}))
            call(model, method, x)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [(method, *bad) for method in METHODS for bad in bad_values(method)],
    ids=str,
)
def test_bad_values_are_refused_as_by_peft(method, option, value):
    theirs, ours = (error_of(method, package, option, value) for package in (peft, peft_c))
    if theirs is not None:
        assert ours is not None, f"PEFT raises {theirs!r}"
        assert isinstance(ours, (type(theirs), ValueError)), f"PEFT raises {theirs!r}, this is {ours!r}"


@pytest.mark.parametrize("kind", [kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind != "CPT"])
def test_configs_keep_lists_and_sets_as_peft_does(kind):
    found = []
    for package in (peft_c, peft):
        cls = getattr(package, PEFT_TYPE_TO_CONFIG_MAPPING[kind].__name__)
        known = {field.name for field in dataclasses.fields(cls)} & {"target_modules", "exclude_modules", "total_step"}
        config = cls(**{name: 3 if name == "total_step" else ["b", "a"] for name in known}).to_dict()
        found.append({name: config[name] for name in known})
    assert found[0] == found[1]
