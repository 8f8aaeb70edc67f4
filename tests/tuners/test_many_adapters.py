"""What a switch costs does not depend on how many adapters there are. Shown by counting what is touched and called."""

import functools
import gc
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peft_c
from peft_c import _C
from peft_c.tuners.tuners_utils import BaseTunerLayer
from peft_c.utils.save_and_load import get_peft_model_state_dict, load_adapter_state

touched: list[str] = []


class Entry(nn.Module):
    """An adapter's weights. It has a child, so it is asked for its parameters, and notes that."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.inner = nn.Linear(2, 2)

    def parameters(self, recurse=True):
        touched.append(self.name)
        return super().parameters(recurse)


class Layer(nn.Module, BaseTunerLayer):
    adapter_layer_names = ("first", "second")
    other_param_names = ()

    def __init__(self, names, entry=Entry):
        super().__init__()
        self.base_layer = nn.Linear(2, 2)
        self.first = nn.ModuleDict({name: entry(name) for name in names})
        self.second = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in names})


def trainable(layer):
    return {name.split(".")[1] for name, p in layer.named_parameters() if p.requires_grad and "base" not in name}


@pytest.mark.parametrize("count", [4, 400])
def test_a_switch_touches_only_the_adapters_that_it_changes(count):
    names = [f"a{i}" for i in range(count)]
    layers = [Layer(names), Layer(names)]
    _C.set_adapter(layers, "a0", False)  # the first call looks at all: it cannot know what is trainable

    def touches(call):
        touched.clear()
        call()
        return sorted(touched)

    assert touches(lambda: _C.set_adapter(layers, "a1", False)) == ["a0"] * 2 + ["a1"] * 2
    assert touches(lambda: _C.set_adapter(layers, ["a1", "a2"], False)) == ["a1"] * 2 + ["a2"] * 2
    assert touches(lambda: _C.enable_adapters(layers, False)) == ["a1"] * 2 + ["a2"] * 2
    assert touches(lambda: _C.enable_adapters(layers, True)) == ["a1"] * 2 + ["a2"] * 2
    assert [trainable(layer) for layer in layers] == [{"a1", "a2"}] * 2
    assert touches(lambda: _C.set_requires_grad(layers, "a3", True)) == ["a3"] * 2
    assert touches(lambda: _C.set_adapter(layers, "a0", True)) == [n for n in ("a0", "a1", "a2", "a3") for _ in "12"]
    for layer in layers:
        layer.first["new"], layer.second["new"] = Entry("new"), nn.Parameter(torch.zeros(1))
    assert touches(lambda: _C.set_adapter(layers, "a1", False)) == ["a0"] * 2 + ["a1"] * 2 + ["new"] * 2
    assert touches(lambda: _C.find(nn.Sequential(*layers), BaseTunerLayer)) == []
    assert [trainable(layer) for layer in layers] == [{"a1"}] * 2


def calls(function):
    """How many Python and C functions a call calls."""
    count = 0

    def note(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # its callbacks would be counted
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def lora(**options):
    return peft_c.LoraConfig(r=2, target_modules=["0", "1"], **options)


def test_the_work_on_a_model_does_not_grow_with_its_adapters():
    pytest.importorskip("accelerate.hooks")  # once it is imported, modules may be offloaded
    model = peft_c.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), lora())

    def cycle():
        """Calls of each operation; the model has the same adapters afterwards."""
        yield "set_adapter", calls(lambda: model.set_adapter("a1"))
        yield "set_adapter back", calls(lambda: model.set_adapter("default"))
        yield "disable", calls(model.base_model.disable_adapter_layers)
        yield "enable", calls(model.base_model.enable_adapter_layers)
        yield "requires_grad", calls(lambda: model.set_requires_grad("a1", True))
        model.set_requires_grad("a1", False)
        yield "add_adapter", calls(lambda: model.add_adapter("extra", lora()))
        yield "delete_adapter", calls(lambda: model.delete_adapter("extra"))
        save = functools.partial(get_peft_model_state_dict, model)
        yield "state dict to save", calls(save)
        state = save()
        yield "state dict loaded", calls(lambda: load_adapter_state(model, state, "a1", False, False, False))

    def grow(count):
        for i in range(len(model.peft_config), count):
            model.add_adapter(f"a{i}", lora())

    grow(20)
    dict(cycle())
    few = dict(cycle())
    grow(60)
    dict(cycle())
    many = dict(cycle())
    # what is left are a few steps an adapter of the model, not of its layers: comparing the configs
    more = {name: (many[name] - few[name]) / 40 for name in few}
    assert all(more[name] == 0 for name in ("set_adapter", "set_adapter back", "disable", "enable", "requires_grad"))
    assert max(more.values()) <= 16, max(more.items(), key=lambda item: item[1])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=24))
def test_find_has_the_order_of_modules(edges):
    modules = [nn.Module() for _ in range(10)]
    for i, (parent, child) in enumerate(edges):  # shared modules and cycles among them
        modules[parent].add_module(f"m{i}", modules[child])
    assert _C.find(modules[0], nn.Module)[0] == list(modules[0].modules())


@pytest.mark.parametrize("list_last", [True, False])
def test_modules_that_are_listed_by_their_parent_are_not_asked_for_theirs(list_last):
    class Listing(nn.Module):
        def named_modules(self, memo=None, prefix="", remove_duplicate=True):
            yield prefix, self
            yield prefix + ".only", self.__dict__["only"]

    below = nn.Sequential(nn.ReLU())
    listing = Listing()
    listing.__dict__["only"] = below
    parts = [below, listing] if list_last else [listing, below]
    found = _C.find(nn.Sequential(*parts), nn.Module)[0]
    assert found[1:] == ([below, below[0], listing] if list_last else [listing, below])


def test_threads_leave_all_layers_in_one_state():
    names = [f"a{i}" for i in range(5)]
    layers = [Layer(names, entry=lambda name: nn.Linear(2, 2)) for _ in range(30)]
    _C.set_adapter(layers, "a0", False)

    def work(name):
        for _ in range(300):
            _C.set_adapter(layers, name, False)

    threads = [threading.Thread(target=work, args=(name,)) for name in names[:3]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    states = {(tuple(layer.active_adapters), *sorted(trainable(layer))) for layer in layers}
    assert len(states) == 1 and states.pop() in {((name,), name) for name in names[:3]}


def test_threads_that_run_the_model_while_another_switches():
    model = peft_c.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft_c.LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("other", peft_c.LoraConfig(r=2, target_modules=["0"]))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x, wrong, stop = torch.randn(3, 4), [], threading.Event()
    expected = []
    for name in ("default", "other"):
        model.set_adapter(name)
        expected.append(model(x).detach())
    with model.disable_adapter():
        expected.append(model(x).detach())

    def run():
        while not stop.is_set():
            y = model(x)
            if not any(torch.equal(y, value) for value in expected):
                wrong.append(y)

    runners = [threading.Thread(target=run) for _ in range(2)]
    for thread in runners:
        thread.start()
    for i in range(300):
        model.set_adapter(("default", "other")[i % 2])
        with model.disable_adapter():
            pass
    stop.set()
    for thread in runners:
        thread.join()
    assert not wrong and model.base_model.model[0].active_adapters == ["other"]
