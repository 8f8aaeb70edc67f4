"""Layers that are called by hand: PEFT's order of arguments, for every method."""

import pytest
import torch

import peft_c
from peft_c.tuners.layer_calls import argument_orders
from tests.rooms.cases import METHODS, PAIRS, config_of, kinds_of, layers, make, start

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

GIVEN = {"adapter_name": "new", "r": 4, "lora_alpha": 6, "alpha": 3, "module_name": "0", "block_size": 2}
GIVEN |= {"delora_lambda": 3.0, "n_frequency": 7, "effective_rank": 3, "inference_mode": True, "is_feedforward": True}
GIVEN |= {"device": None, "dtype": None}
OTHERS = {"lora", "tinylora", "trainable_tokens"}  # TinyLoRA's layers know their place in the model
REFUSED = {("hira", kind) for kind in ("Conv1d", "Conv2d", "Conv3d")} | {("frod", "Conv1D")}  # by PEFT, so called


def layer_and_values(method, kind, package, call):
    """A layer, and a value for each argument of `update_layer` (call 0) or of its constructor (1)."""
    layer = layers(start(method, kind, package))[0]
    base, config = layer.get_base_layer(), config_of(method, kind, package)
    given = {**GIVEN, "config": config, "poly_config": config, "layer": base}
    given |= dict.fromkeys(("is_target_conv_1d_layer", "fan_in_fan_out"), kind == "Conv1D")
    if method == "oft":
        config.oft_block_size = 0
    if method == "shira":
        given["mask"] = torch.zeros_like(base.weight)
        given["mask"].view(-1)[: 4 * sum(base.weight.shape)] = 1
    names = argument_orders(method)[call]
    if kind == "Embedding" or kind.startswith("Conv") and kind != "Conv1D":
        names = [name for name in names if name != "is_target_conv_1d_layer"]
    for name in names:
        if name not in given:  # what the model's layers share
            given[name] = getattr(layer, name)
            given[name]["new"] = given[name]["default"]
    return layer, [given[name] for name in names]


def new_parameters(layer):
    return {name: p.detach() for name, p in layer.named_parameters() if ".new" in name}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("method", sorted({*METHODS} - OTHERS))
def test_update_layer(method):
    found = []
    for package in (peft_c, peft):
        layer, values = layer_and_values(method, kinds_of(method)[0], package, 0)
        torch.manual_seed(5)
        layer.update_layer(*values)
        found.append(new_parameters(layer))
    assert_same(*found)


@pytest.mark.parametrize(("method", "kind"), [pair for pair in PAIRS if pair[0] not in OTHERS and pair not in REFUSED])
def test_constructors(method, kind):
    found = []
    for package in (peft_c, peft):
        layer, values = layer_and_values(method, kind, package, 1)
        torch.manual_seed(5)
        made = type(layer)(layer.get_base_layer(), *values)
        assert made.merged_adapters == []
        found.append(new_parameters(made))
    assert_same(*found)


def test_what_is_not_given_is_the_configs():
    layer = layers(make("loha"))[0]
    config = config_of("loha", r=3, alpha=5)
    made = type(layer)(layer.get_base_layer(), "new", config)
    assert (made.r, made.alpha) == ({"new": 3}, {"new": 5})
    layer.update_layer("new", 2, config=config)
    assert (layer.r["new"], layer.alpha["new"], config.r) == (2, 5, 3)


def test_values_leave_the_config_as_it_is():
    layer = layers(make("hra"))[0]
    config = config_of("hra")
    layer.update_layer("new", 2, config)
    assert (layer.hra_r["new"], config.r) == (2, 4)
    layer.reset_hra_parameters_random("new")
    assert layer.hra_u["new"].shape[1] == 2


@pytest.mark.parametrize(
    ("values", "named", "message"),
    [
        (("new",), {}, "missing 1 required argument: 'config'"),
        (("new", 2, None, 4), {}, "takes 3 arguments"),
        (("new", 2), {"r": 2, "config": None}, "multiple values for argument 'r'"),
        (("new", 2), {"config": config_of("hra"), "hra_A": torch.zeros(2)}, "does not take 'hra_A'"),
    ],
)
def test_arguments_that_do_not_fit(values, named, message):
    layer = layers(make("hra"))[0]
    with pytest.raises(TypeError, match=message):
        layer.update_layer(*values, **named)
    assert list(layer.hra_u) == ["default"]
