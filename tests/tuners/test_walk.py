"""The C side: the walk over a live module tree, and the C base of tuner layers."""

import copy
import gc
import inspect
import io
import os
import weakref

import pytest
import torch
from torch import nn

from peft_c import _C
from peft_c.tuners.tuners_utils import BaseTunerLayer


class AddLayer(nn.Module, BaseTunerLayer):
    adapter_layer_names = ("add_a", "add_b")
    other_param_names = ("sizes", "add_dropout")

    def __init__(self, base_layer=None, adapters=("x", "y")):
        super().__init__()
        self.base_layer = base_layer or nn.Linear(3, 3)
        self.add_a, self.add_b = nn.ModuleDict(), nn.ParameterDict()
        self.add_dropout = nn.ModuleDict()
        self.sizes = {}
        for name in adapters:
            self.add_a[name] = nn.Linear(3, 2)
            self.add_b[name] = nn.Parameter(torch.zeros(3))
            self.add_dropout[name] = nn.Dropout()
            self.sizes[name] = 3

    def trainable(self):
        return sorted(n for n, p in self.named_parameters() if p.requires_grad and not n.startswith("base_layer"))


def weights(*names):
    return sorted(f"add_{k}" for n in names for k in (f"a.{n}.weight", f"a.{n}.bias", f"b.{n}"))


def find(model, *classes):
    return _C.find(model, *classes)


def test_find_visits_what_modules_visits():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared), nn.ModuleDict({"a": nn.ReLU()}))
    model.append(None)
    model[1].add_module("loop", model)  # a cycle
    assert find(model, nn.Module)[0] == list(model.modules())
    linear, relu, both = find(model, nn.Linear, nn.ReLU, (nn.ReLU, (nn.Linear,)))
    assert linear == [shared] and len(relu) == 2 and both == [shared, *relu]


def test_find_leaves_out_adapter_containers_only():
    inner = AddLayer()
    layer = AddLayer(inner)
    layer.extra = nn.ModuleDict({"z": nn.ReLU()})
    names = {id(m): n for n, m in layer.named_modules()}
    found = [names[id(m)] for m in find(layer, nn.Module)[0]]
    assert found == ["", "base_layer", "base_layer.base_layer", "extra", "extra.z"]


def test_find_asks_classes_that_have_their_own_modules():
    class Hidden(nn.Module):
        def named_modules(self, memo=None, prefix="", remove_duplicate=True):
            yield prefix, self
            yield prefix + ".ghost", self.__dict__["ghost"]

    model = nn.Sequential(Hidden(), nn.ReLU())
    model[0].__dict__["ghost"] = AddLayer()
    assert find(model, BaseTunerLayer)[0] == [model[0].ghost]


def test_find_on_a_deep_tree_and_wrong_arguments():
    model = nn.Identity()
    for _ in range(20_000):
        outer = nn.Module()
        outer._modules["m"] = model
        model = outer
    assert len(find(model, nn.Identity)[0]) == 1
    while model._modules:  # a recursive deallocation of so many would be the interpreter's problem
        model = model._modules.pop("m")
    with pytest.raises(TypeError):
        _C.find(nn.ReLU())
    with pytest.raises(TypeError):
        _C.find(nn.ReLU(), "ReLU")
    with pytest.raises(TypeError):
        _C.set_adapter((), "x", False)
    with pytest.raises(TypeError):
        _C.enable_adapters([])


def test_signatures_are_those_of_peft():
    reference = pytest.importorskip("peft.tuners.tuners_utils").BaseTunerLayer
    for name in ("set_adapter", "enable_adapters", "set_requires_grad", "_freeze_non_trainable_peft_weights"):
        ours, theirs = (
            [(p.name, p.default, p.kind) for p in inspect.signature(getattr(cls, name)).parameters.values()][1:]
            for cls in (BaseTunerLayer, reference)
        )
        assert ours == theirs


@pytest.mark.parametrize("call", ["x", ["x"], ("x",)])
def test_set_adapter(call):
    layer = AddLayer()
    layer.set_adapter(adapter_names=call)
    assert layer.active_adapters == ["x"] and layer.trainable() == weights("x")
    layer.set_adapter(call, True)
    assert layer.trainable() == []
    layer.set_adapter(["x", "y"], inference_mode=False)
    assert layer.trainable() == weights("x", "y")


def test_names_given_are_not_shared_with_the_layer():
    layer, names = AddLayer(), ["x"]
    layer.set_adapter(names)
    names.append("y")
    assert layer.active_adapters == ["x"]


@pytest.mark.parametrize(
    "call",
    [
        lambda layer: layer.set_adapter(),
        lambda layer: layer.set_adapter(3),
        lambda layer: layer.set_adapter("x", nope=1),
        lambda layer: layer.set_adapter("x", adapter_names="y"),
        lambda layer: layer.set_adapter("x", False, 1),
        lambda layer: layer.enable_adapters(),
        lambda layer: layer.set_requires_grad(),
        lambda layer: layer._freeze_non_trainable_peft_weights("x", "y"),
    ],
)
def test_wrong_calls_change_nothing(call):
    layer = AddLayer()
    layer.set_adapter("y")
    with pytest.raises(TypeError):
        call(layer)
    assert layer.active_adapters == ["y"] and layer.trainable() == weights("y")


def test_entries_added_behind_the_layers_back_are_noticed():
    layer = AddLayer()
    layer.set_adapter("x")
    layer.add_a["z"] = nn.Linear(3, 2)
    layer.add_b["z"] = nn.Parameter(torch.zeros(3))
    layer.set_adapter("y")
    assert layer.trainable() == weights("y")
    del layer.add_a["x"]
    layer.add_a["w"] = nn.Linear(3, 2)
    layer.add_b["w"] = nn.Parameter(torch.zeros(3))
    layer.set_adapter([])
    assert layer.trainable() == []


def test_disabling_remembers_what_was_trainable():
    layer = AddLayer()
    layer.set_adapter("x", inference_mode=True)
    layer.add_b["x"].requires_grad_(True)
    for _ in range(2):
        layer.enable_adapters(False)
        layer.enable_adapters(False)
        assert layer.disable_adapters and layer.trainable() == []
        layer.enable_adapters(enabled=True)
        assert not layer.disable_adapters and layer.trainable() == ["add_b.x"]
    layer.enable_adapters(False)
    layer.set_adapter("y")
    layer.enable_adapters(True)
    assert layer.trainable() == weights("y")
    layer.enable_adapters(False)
    layer.set_requires_grad("y", False)
    layer.enable_adapters(True)
    assert layer.trainable() == []


def test_a_name_given_twice_is_active_once():
    layer = AddLayer()
    layer.set_adapter(["y", "x", "y"])
    assert layer.active_adapters == ["y", "x"]
    layer.set_adapter(("x", "x"))
    assert layer.active_adapters == ["x"] and layer.trainable() == weights("x")
    with pytest.raises(TypeError):
        layer.set_adapter([[], []])
    assert layer.active_adapters == ["x"]


def test_what_was_trainable_of_a_deleted_adapter_is_forgotten():
    layer = AddLayer(adapters=("x", "y"))
    layer.set_adapter("y")
    layer.set_requires_grad("x")
    layer.enable_adapters(False)
    layer.delete_adapter("x")
    layer.add_a["x"] = nn.Linear(3, 2).requires_grad_(False)
    layer.enable_adapters(True)
    assert layer.trainable() == weights("y")


def test_declared_weights_stay_frozen():
    layer = AddLayer()
    layer.frozen_peft_weight_names = {"x": ("add_b", "unknown")}
    only_a = [name for name in weights("x") if name.startswith("add_a")]
    for act in (
        lambda: layer.set_adapter("x"),
        lambda: layer.set_requires_grad(["x"]),
        lambda: (layer.enable_adapters(False), layer.enable_adapters(True)),
        lambda: (
            layer.add_b["x"].requires_grad_(True),
            layer._freeze_non_trainable_peft_weights(adapter_names=None),
        ),
    ):
        act()
        assert layer.trainable() == only_a


def test_overrides_are_called_by_the_model_wide_switches():
    calls = []

    class Loud(AddLayer):
        def set_adapter(self, adapter_names, inference_mode=False):
            calls.append(("set", adapter_names, inference_mode))
            super().set_adapter(adapter_names, inference_mode)

        def enable_adapters(self, enabled):
            calls.append(("enable", enabled))
            super().enable_adapters(enabled)

        def set_requires_grad(self, adapter_names, requires_grad=True):
            calls.append(("grad", adapter_names, requires_grad))
            super().set_requires_grad(adapter_names, requires_grad)

        def _freeze_non_trainable_peft_weights(self, adapter_names=None):
            calls.append(("freeze",))

    layers = [AddLayer(), Loud()]
    _C.set_adapter(layers, "y", True)
    _C.set_requires_grad(layers, ["x"], True)
    _C.enable_adapters(layers, False)
    assert calls == [("set", "y", True), ("freeze",), ("grad", ["x"], True), ("freeze",), ("enable", False)]
    _C.enable_adapters(layers, True)
    assert [layer.trainable() for layer in layers] == [weights("x")] * 2


def test_model_wide_switches_are_all_or_nothing():
    class Broken(AddLayer):
        def set_adapter(self, adapter_names, inference_mode=False):
            raise KeyboardInterrupt

        enable_adapters = set_requires_grad = set_adapter

    layers = [AddLayer(), AddLayer(), Broken()]
    _C.set_adapter(layers[:2], "x", False)
    before = [(layer.trainable(), layer.active_adapters, layer.__dict__.copy()) for layer in layers[:2]]
    for call in (
        lambda: _C.set_adapter(layers, "y", False),
        lambda: _C.set_requires_grad(layers, "y", True),
        lambda: _C.enable_adapters(layers, False),
    ):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert [(layer.trainable(), layer.active_adapters, layer.__dict__) for layer in layers[:2]] == before


def test_integer_weights_cannot_be_trained_and_nothing_is_changed():
    layers = [AddLayer(), AddLayer()]
    layers[1].add_b["y"] = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    _C.set_adapter(layers, "x", False)
    with pytest.raises(RuntimeError):
        _C.set_adapter(layers, "y", False)
    assert [layer.trainable() for layer in layers] == [weights("x")] * 2


def test_copies_are_independent():
    layer = AddLayer()
    layer.set_adapter("x")
    twin = copy.deepcopy(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    layer.set_adapter("y")
    for other in (twin, loaded):
        assert other.trainable() == weights("x") and other.active_adapters == ["x"]
        other.set_adapter(["y"])
        assert other.trainable() == weights("y")


def test_layers_are_collected():
    layer = AddLayer()
    layer.set_adapter("x")
    layer.me = [layer]
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_no_reference_and_no_byte_is_lost():
    import sys

    layers = [AddLayer(), AddLayer()]
    model = nn.Sequential(*layers, nn.ReLU())
    layers[0].frozen_peft_weight_names = {"x": ("add_b",)}
    names = ["x", "y"]

    class Broken(AddLayer):
        def set_adapter(self, adapter_names, inference_mode=False):
            raise ValueError

    broken = [*layers, Broken()]

    def fails(call):
        try:
            call()
        except (ValueError, TypeError):
            pass

    def one_round():
        _C.find(model, BaseTunerLayer, (nn.ReLU, nn.Module))
        _C.set_adapter(layers, "x", False)
        _C.set_adapter(layers, names, False)
        _C.enable_adapters(layers, False)
        _C.enable_adapters(layers, True)
        _C.set_requires_grad(layers, names, False)
        _C.flags(layers[0], names, ["x"])
        layers[0].set_adapter("y", inference_mode=True)
        layers[0].enable_adapters(enabled=False)
        layers[0].set_requires_grad(adapter_names=["y"])
        layers[0].set_requires_grad("y", False)
        layers[0].enable_adapters(True)
        layers[0]._freeze_non_trainable_peft_weights(["x"])
        fails(lambda: _C.set_adapter(broken, "y", False))
        fails(lambda: layers[0].set_adapter(3))
        fails(lambda: layers[0].set_adapter("x", nope=1))

    objects = [names, layers[0], layers[1], layers[0].add_a["x"].weight, layers[0].__dict__, BaseTunerLayer, nn.ReLU]
    for _ in range(500):
        one_round()
    gc.collect()
    before, counts = resident(), [sys.getrefcount(o) for o in objects]
    for _ in range(10_000):
        one_round()
    gc.collect()
    after, new_counts = resident(), [sys.getrefcount(o) for o in objects]
    assert new_counts == counts
    assert after - before < 2**20
