"""What is kept about a model between two switches never stands in for the live model."""

import copy
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

import peft_c
from peft_c import _C
from peft_c.tuners.lora import LoraLayer
from peft_c.tuners.switching import tree_of
from peft_c.tuners.tuners_utils import BaseTunerLayer, set_adapter


def base():
    return nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.LayerNorm(4))


def adapted(adapters=("default", "other")):
    config = peft_c.LoraConfig(r=2, target_modules=["0", "1.0", "1.1"])
    model = peft_c.get_peft_model(base(), config)
    for name in adapters[1:]:
        model.add_adapter(name, config)
    for name in adapters:
        model.set_adapter(name)
    return model


def fresh_layer(adapters=("default", "other")):
    return adapted(adapters).base_model.model[0]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def replace_a_layer(net):
    net[0] = fresh_layer()


def replace_a_list(net):
    net[1] = nn.ModuleList([fresh_layer(), fresh_layer(), fresh_layer()])


def delete_from_a_list(net):
    del net[1][0]  # the list gets another `_modules`


def append_to_a_list(net):
    net[1].append(fresh_layer())


def write_to_modules(net):
    net._modules["2"] = nn.Sequential(fresh_layer())


def give_a_leaf_a_child(net):
    net[2].child = fresh_layer()


def give_a_base_layer_a_child(net):
    net[0].base_layer.add_module("child", fresh_layer())


def give_a_leaf_other_modules(net):
    net[2].__dict__["_modules"] = {"child": fresh_layer()}


def put_under_another_name(net):
    net._modules["renamed"] = net._modules.pop("0")


def replace_a_container(net):
    net[0].lora_A = copy.deepcopy(net[0].lora_A)


def clear_a_container(net):
    for container in (net[0].lora_A, net[0].lora_B):
        container.clear()


def replace_an_entry(net):
    net[0].lora_A["other"] = nn.Linear(4, 2, bias=False)


def replace_a_weight(net):
    net[0].lora_A["default"].weight = nn.Parameter(torch.zeros(2, 4))


def add_entries(net):
    net[0].lora_A["third"], net[0].lora_B["third"] = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)


def change_a_class(net):
    net[0].__class__ = type("Other", (type(net[0]),), {"adapter_layer_names": ("lora_B",)})


def declare_on_a_layer(net):
    net[0].adapter_layer_names = ("lora_B",)


def declare_in_place_of_the_last_attribute(net):
    net[0].__dict__.popitem()
    net[0].adapter_layer_names = ("lora_B",)


def freeze_in_place_of_another_attribute(net):
    del net[0].fan_in_fan_out
    net[0].frozen_peft_weight_names = {"other": ("lora_A",)}


def freeze_a_declared_weight(net):
    net[0].frozen_peft_weight_names = {"other": ("lora_A",)}


CHANGES = [value for value in list(globals().values()) if getattr(value, "__code__", None) is not None]
CHANGES = [f for f in CHANGES if f.__code__.co_varnames[: f.__code__.co_argcount] == ("net",)]


def states_after_each_switch(change, forget):
    """What a change and then each switch leave; with `forget`, nothing is kept from one switch to the next."""
    torch.manual_seed(0)
    model, states = adapted(), []
    net = model.base_model.model
    assert "_adapter_tree" in net.__dict__
    change(net)
    for act in (
        lambda: model.set_adapter("other"),
        model.base_model.disable_adapter_layers,
        model.base_model.enable_adapter_layers,
        lambda: model.set_requires_grad("default"),
        lambda: model.set_adapter("default", inference_mode=True),
        lambda: model.set_adapter("default"),
    ):
        if forget:
            net.__dict__.pop("_adapter_tree", None)
        act()
        layers = [m for m in net.modules() if isinstance(m, BaseTunerLayer)]
        states.append((trainable(model), [(m.active_adapters, m.disable_adapters) for m in layers]))
        assert tree_of(net).find(net, BaseTunerLayer) == (layers,)
    return states


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_behind_its_back_are_seen(change):
    assert states_after_each_switch(change, forget=False) == states_after_each_switch(change, forget=True)


@pytest.mark.parametrize("usual", [True, False])
def test_disable_adapter_warns_of_irregular_layers(monkeypatch, usual):
    model = adapted()
    if not usual:  # a tuner with a method of its own
        own = type("Own", (type(model.base_model),), {})
        own.disable_adapter_layers = lambda self: super(own, self).disable_adapter_layers()
        model.base_model.__class__ = own
    model.base_model.model[0].enable_adapters(False)
    with pytest.warns(UserWarning, match="some adapter layers that are enabled"), model.disable_adapter():
        assert trainable(model) == set()
    assert all(".other." in name for name in trainable(model)) and len(trainable(model)) == 6


def test_a_layer_that_a_token_wrapper_holds_can_be_irregular():
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    config = peft_c.LoraConfig(target_modules=["1"], trainable_token_indices={"0": [0, 1]})
    model = peft_c.get_peft_model(net, config)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    layers[0].enable_adapters(False)
    with pytest.warns(UserWarning, match="some adapter layers that are enabled"), model.disable_adapter():
        assert all(layer.disable_adapters for layer in layers)
    assert not any(layer.disable_adapters for layer in layers)


def test_methods_put_on_a_class_are_called(monkeypatch):
    model, calls = adapted(), []
    monkeypatch.setattr(LoraLayer, "set_adapter", lambda self, names, inference_mode=False: calls.append(names))
    model.set_adapter("other")
    assert calls == ["other"] * 3
    monkeypatch.undo()
    model.set_adapter("other")
    assert len(calls) == 3 and all(".other." in name for name in trainable(model))


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize(
    ("method", "switch"),
    [
        ("set_adapter", lambda model: model.base_model.set_adapter(["other"])),
        ("set_adapter", lambda model: model.base_model.enable_adapter_layers()),
        ("enable_adapters", lambda model: model.base_model.disable_adapter_layers()),
        ("set_requires_grad", lambda model: model.set_requires_grad("other", False)),
    ],
)
def test_methods_put_on_one_layer_are_called_as_in_peft(method, switch, seen):
    peft, calls = pytest.importorskip("peft"), []
    for package in (peft, peft_c):
        model = package.get_peft_model(base(), package.LoraConfig(r=2, target_modules=["0", "1.0", "1.1"]))
        model.add_adapter("other", package.LoraConfig(r=2, target_modules=["0", "1.0", "1.1"]))
        if seen:
            switch(model)
        layer = model.base_model.model[0]
        own, found = getattr(layer, method), []

        def spied(*args, own=own, found=found, **kwargs):
            found.append([*args, *kwargs.values()][0])
            return own(*args, **kwargs)

        setattr(layer, method, spied)
        switch(model)
        delattr(layer, method)
        switch(model)
        calls.append(found)
    assert calls[0] == calls[1] and len(calls[0]) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), copy.copy])
def test_copies_have_trees_of_their_own(copied):
    model = adapted()
    twin = copied(model.base_model.model)
    set_adapter(twin, "default")
    if copied is not copy.copy:  # which shares the modules
        assert trainable(model) != trainable(twin)
        model.set_adapter("other")
    assert all(".default." in name for name in trainable(twin))
    assert pickle.loads(pickle.dumps(_C.Tree())).find(twin, nn.LayerNorm) == ([twin[2]],)


def test_a_model_dies_with_its_last_reference():
    model = adapted()
    gone = [weakref.ref(model.base_model.model), weakref.ref(model.base_model.model[0].lora_A["default"])]
    gc.collect()
    gc.disable()
    try:
        model.delete_adapter("default")
        assert gone[1]() is None
        del model
        assert gone[0]() is None
    finally:
        gc.enable()


def test_cycles_through_the_model_are_collected():
    model = adapted()
    model.base_model.model[0].outer = [model]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_unloading_leaves_no_tree():
    assert "_adapter_tree" not in adapted().unload().__dict__
    assert "_adapter_tree" not in adapted().merge_and_unload().__dict__


@pytest.mark.parametrize("listed", [True, False])
def test_models_that_cannot_be_checked_are_walked_each_time(listed):
    class Listing(nn.Module):
        def named_modules(self, memo=None, prefix="", remove_duplicate=True):
            yield prefix, self
            yield prefix + ".hidden", self.__dict__["hidden"]

    if listed:
        net = Listing()
        net.__dict__["hidden"] = layer = fresh_layer()
    else:
        net = layer = fresh_layer()
    for name in ("other", "default"):
        set_adapter(net, name)
        assert layer.active_adapters == [name]
        if listed:
            net.__dict__["hidden"] = layer = fresh_layer()


def test_a_call_inside_of_another_and_threads_get_trees_of_their_own():
    model, seen = adapted(), []
    net = model.base_model.model
    tree = tree_of(net)

    class Calling(type(net[0])):
        def set_adapter(self, adapter_names, inference_mode=False):
            seen.append(tree.find(net, LoraLayer)[0])
            super().set_adapter(adapter_names, inference_mode)

    net[0].__class__ = Calling
    model.set_adapter("other")
    assert seen == [[net[0], *net[1]]]
    assert all(".other." in name for name in trainable(model)) and len(trainable(model)) == 6

    def work(name):
        for _ in range(100):
            model.base_model.set_adapter(name)
            net[2] = nn.LayerNorm(4).requires_grad_(False)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("default", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model.set_adapter("default")
    assert all(".default." in name for name in trainable(model))


def test_a_switch_that_fails_halfway_changes_nothing():
    model = adapted()
    net = model.base_model.model
    net[1][1].lora_B["default"].weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.int8), requires_grad=False)

    def state():
        return trainable(model), [(layer.active_adapters, layer.__dict__.copy()) for layer in (net[0], *net[1])]

    before = state()
    with pytest.raises(RuntimeError):  # integers cannot be trained
        model.set_adapter("default")
    assert state() == before
    with pytest.raises(RuntimeError):
        model.set_requires_grad("default")
    assert state() == before
    assert model.active_adapter == model.base_model.active_adapter == "other"


class Name(str):
    """No plain string, so it cannot be interned."""


@pytest.mark.parametrize("kind", (str, Name))
def test_adapters_are_found_by_any_equal_name(kind):
    model = adapted(("default", kind("other")))
    config = peft_c.LoraConfig(r=2, target_modules=["0"])
    model.add_adapter(kind("".join(["thi", "rd"])), config)
    for name in ("third", "other"):
        model.set_adapter(kind("".join(list(name))))
        assert {key.split(".")[-2] for key in trainable(model)} == {name}
        with model.disable_adapter():
            assert not trainable(model)
        assert {key.split(".")[-2] for key in trainable(model)} == {name}
    if kind is str:  # by identity
        names = [
            key
            for layer in tree_of(model.base_model.model).find(model.base_model.model, LoraLayer)[0]
            for key in (*layer.lora_A, *layer.active_adapters)
        ]
        assert all(name is sys.intern(name) for name in names)


def test_what_was_trainable_is_kept_for_each_layer():
    model = adapted()
    model.set_requires_grad("default")
    layers = tree_of(model.base_model.model).find(model.base_model.model, LoraLayer)[0]
    layers[1].lora_A["other"].requires_grad_(False)
    layers[2].lora_B["default"].requires_grad_(False)
    before = trainable(model)
    for _ in range(2):
        with model.disable_adapter():
            assert not trainable(model)
        assert trainable(model) == before


def test_wrong_calls():
    net = adapted().base_model.model
    tree = tree_of(net)
    for call in (
        lambda: tree.find(net),
        lambda: tree.find(net, "LoraLayer"),
        lambda: tree.find(net, model=net),
        lambda: tree.set_adapter(net, LoraLayer, None, "other"),
        lambda: tree.set_adapter(net, LoraLayer, None, 3, False),
        lambda: tree.enable_adapters(net, LoraLayer),
        lambda: tree.find(3, LoraLayer),
    ):
        with pytest.raises((TypeError, AttributeError)):
            call()
    tree.set_adapter(net, LoraLayer, None, "other", False)
    assert [layer.active_adapters for layer in tree.find(net, LoraLayer)[0]] == [["other"]] * 3


def test_no_reference_is_lost():
    model = adapted()
    net = model.base_model.model
    objects = [net, net[0], net[0].__dict__, net[0].lora_A, net[0].lora_A._modules, net[2], nn.LayerNorm, LoraLayer]

    def cycle(i):
        model.set_adapter(("default", "other")[i % 2])
        with model.disable_adapter():
            pass
        if i % 3 == 0:
            net[1] = nn.ModuleList(list(net[1]))  # walk again

    counts = []
    for rounds in (12, 600):
        for i in range(rounds):
            cycle(i)
        gc.collect()
        counts.append([sys.getrefcount(o) for o in objects])
    assert counts[0] == counts[1]
