"""Layers that are called by hand: the order of arguments and the deltas are PEFT's, for every method."""

import pytest
import torch

import peft_c
from peft_c.tuners.layer_calls import argument_orders
from tests.rooms.cases import METHODS, PAIRS, config_of, disturb, kinds_of, layers, make, network, start

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

GIVEN = {"adapter_name": "new", "r": 4, "lora_alpha": 6, "alpha": 3, "module_name": "0", "block_size": 2}
GIVEN |= {"delora_lambda": 3.0, "n_frequency": 7, "effective_rank": 3, "inference_mode": True, "is_feedforward": True}
GIVEN |= {"device": None, "dtype": None}
GIVEN |= {"v_key": "0"}
OTHERS = {"lora", "trainable_tokens"}
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
        place = {"layer_idx": 0} if method == "tinylora" else {}
        made = type(layer)(layer.get_base_layer(), *values, **place)
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


# HiRA's is another one, MiSS's takes the weight, BEFT and GLoRA have none
DELTAS = [pair for pair in PAIRS if pair[0] not in ("beft", "glora", "hira", "miss", "trainable_tokens")]
TURNED = {("fourierft", "Conv1D"), ("waveft", "Conv1D")}  # PEFT's have the shape (out, in)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "kind"), DELTAS)
def test_what_get_delta_weight_returns(method, kind, dtype):
    for cast in (True, False):
        found = []
        for package in (peft_c, peft):
            base, config = network(kind)[0].to(dtype), config_of(method, kind, package)
            torch.manual_seed(1)
            model = package.get_peft_model(base, config, autocast_adapter_dtype=cast)
            disturb(model)
            layer = layers(model.eval())[0]
            try:
                found.append(layer.get_delta_weight("default") if hasattr(layer, "get_delta_weight") else None)
            except (NotImplementedError, RuntimeError) as error:
                found.append(type(error))
        ours, theirs = found
        if not isinstance(theirs, torch.Tensor):
            assert ours is theirs or isinstance(theirs, tuple)
            continue
        assert (ours.dtype, ours.layout) == (theirs.dtype, theirs.layout)
        ours, theirs = ours.to_dense().double(), theirs.to_dense().double()
        theirs = theirs.T if (method, kind) in TURNED else theirs
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(1.0, theirs.abs().max().item()))


def test_merging_rounds_a_delta_once():
    model = make("deft", dtype=torch.bfloat16)
    layer = layers(model)[0]
    expected = layer.weight + layer.whole_delta("default")
    layer.merge()
    assert torch.equal(layer.weight, expected.to(torch.bfloat16))
    assert layer.whole_delta("default").dtype is torch.float32
