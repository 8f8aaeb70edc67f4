"""The example of docs/adding_a_tuner.md: a method that PEFT does not have, in one file, keeps the contract."""

import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import peft_c
from peft_c.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft_c.tuners.room import AddRoom
from tests.rooms import test_contract
from tests.rooms.cases import call, make, network

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding_a_tuner.md"
CONTRACT = sorted(
    name
    for name, test in vars(test_contract).items()
    if name.startswith("test_") and "method" in inspect.signature(test).parameters
)


@pytest.fixture(scope="module", autouse=True)
def source(tmp_path_factory):
    """The example's text, while it is registered as a module of its own."""
    text = PAGE.read_text().split("```python\n")[1].split("```")[0]
    folder = tmp_path_factory.mktemp("example")
    (folder / "svf.py").write_text(text)
    sys.path.insert(0, str(folder))
    importlib.import_module("svf")
    yield text
    sys.path.remove(str(folder))
    del sys.modules["svf"]
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        del mapping["SVF"]
    kinds = peft_c.PeftType
    kinds._member_names_.remove("SVF")
    del kinds._member_map_["SVF"], kinds._value2member_map_["SVF"]
    type.__delattr__(kinds, "SVF")


def test_it_is_short_and_new(source):
    peft = pytest.importorskip("peft")
    assert len(source.splitlines()) <= 60
    assert "SVF" not in peft.PeftType.__members__ and peft_c.PeftType("SVF") is peft_c.PeftType.SVF


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("contract", CONTRACT)
def test_it_keeps_the_contract(contract, kind, tmp_path):
    test = getattr(test_contract, contract)
    given = {"method": "svf", "kind": kind, "tmp_path": tmp_path, "dtype": torch.bfloat16}
    test(**{name: given[name] for name in inspect.signature(test).parameters})


def test_it_scales_singular_values():
    model = make("svf", "Linear")
    layer = model.base_model.model[0]
    values = torch.linalg.svdvals(layer.get_base_layer().weight)
    expected = values.clone()
    expected[:4] *= 1 + layer.svf_z["default"]
    merged = model.merge_and_unload()[0].weight
    torch.testing.assert_close(torch.linalg.svdvals(merged), expected.abs().sort(descending=True)[0])


def test_its_options_are_checked_and_documented(source):
    config = PEFT_TYPE_TO_CONFIG_MAPPING["SVF"]
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        config(target_modules=["0"], r=0)
    assert "r (int): Number of singular values that are scaled." in config.__doc__
    assert call(make("svf"), "svf", network("Linear")[1]).requires_grad


def create_from_one(self, name, config, width):
    self.seen, self.layer_w[name] = {"width": width}, nn.Parameter(torch.zeros(1))


def create_from_any(self, name, config, **settings):
    self.seen, self.layer_w[name] = settings, nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("create", "given"), [(create_from_one, {"width": 3}), (create_from_any, {"width": 3, "depth": 4})]
)
def test_settings_arrive_in_create(create, given):
    room = type("Layer", (AddRoom,), {"adapter_layer_names": ("layer_w",), "create": create})
    layer = room(nn.Linear(2, 2), "one", config=peft_c.HRAConfig(), **given)
    assert layer.seen == given
    layer.seen = None
    layer.update_layer("two", config=peft_c.HRAConfig(), **given)
    assert layer.seen == given
