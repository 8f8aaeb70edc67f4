"""What every method has to keep on every base layer that it adapts, whichever it is."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import peft_c
from peft_c.tuners.room import Room, RoomModel
from peft_c.tuners.tuners_utils import BaseTuner
from tests.rooms.cases import (
    MERGEABLE,
    METHODS,
    NEUTRAL,
    NO_MERGE,
    NO_MIXED,
    ONE_ACTIVE,
    ONE_ADAPTER,
    PAIRS,
    RANDOM_START,
    TUNERS,
    WHOLE_MODELS,
    call,
    config_of,
    disturb,
    kinds_of,
    layers,
    make,
    network,
    run,
    same,
    start,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore")
each = pytest.mark.parametrize(("method", "kind"), PAIRS)
mergeable = pytest.mark.parametrize(("method", "kind"), MERGEABLE)
several = pytest.mark.parametrize(("method", "kind"), [pair for pair in PAIRS if pair[0] not in ONE_ADAPTER])


def close(left, right, tolerance=1e-4):
    return torch.allclose(left, right, atol=tolerance * max(1.0, right.abs().max().item()), rtol=0)


@pytest.mark.parametrize(("method", "kind"), [pair for pair in PAIRS if pair[0] not in RANDOM_START])
def test_a_new_adapter_changes_nothing(method, kind):
    neutral = {
        **dict.fromkeys(("init_weights", "init_lora_weights", "init_ia3_weights"), True),
        **NEUTRAL.get(method, {}),
    }
    assert close(run(start(method, kind, **neutral), method, kind), run(network(kind)[0], kind=kind))


@each
def test_the_adapter_acts_and_can_be_disabled(method, kind):
    model, plain = make(method, kind), run(network(kind)[0], kind=kind)
    assert not close(run(model, method, kind), plain, 1e-5)
    with model.disable_adapter():
        assert close(run(model, "", kind), plain, 1e-5)
    assert not close(run(model, method, kind), plain, 1e-5)


@each
def test_training_reaches_all_parameters_and_no_others(method, kind):
    model = make(method, kind).train()
    call(model, method, network(kind)[1]).square().sum().backward()
    prefix = model.base_model.prefix
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert prefix in name or not parameter.requires_grad, name


@mergeable
def test_merge_keeps_the_output_and_unmerge_every_bit(method, kind):
    model = make(method, kind)
    expected, before, found = run(model, method, kind), weights(model), []
    addresses = [layer.get_base_layer().weight.data_ptr() for layer in layers(model) if kind != "MultiheadAttention"]
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        found.append(weights(model))
        assert close(run(model, method, kind), expected)
        assert all(layer.merged for layer in layers(model))
        with model.disable_adapter():
            assert close(run(model, method, kind), run(network(kind)[0], kind=kind), 1e-5)
        model.unmerge_adapter()
        assert same(weights(model), before)
    assert same(*found)
    model.merge_adapter()
    disturb(model)  # training while merged does not matter
    model.unmerge_adapter()
    assert same(weights(model), before)
    for layer, address in zip(layers(model), addresses, strict=False):
        assert layer.get_base_layer().weight.data_ptr() == address


@mergeable
def test_nothing_changes_when_one_layer_is_broken(method, kind):
    model = make(method, kind)
    before = weights(model)
    last = layers(model)[-1]
    for name in last.adapter_layer_names:
        container = getattr(last, name, None)
        for parameter in container.parameters() if isinstance(container, nn.Module) else ():
            parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert same(weights(model), before)
    assert not any(layer.merged for layer in layers(model))


@mergeable
def test_nothing_is_merged_on_the_meta_device(method, kind):
    model = make(method, kind).to("meta")
    with pytest.raises(ValueError, match="meta device"):
        model.merge_adapter()
    assert not any(layer.merged for layer in layers(model))


@several
def test_adapters_switch_and_delete(method, kind):
    model = make(method, kind)
    first, plain = run(model, method, kind), run(network(kind)[0], kind=kind)
    torch.manual_seed(11)
    model.add_adapter("other", config_of(method, kind))
    model.set_adapter("other")
    disturb(model)
    disturb(model, of="other")
    assert not close(first, run(model, method, kind), 1e-6)
    model.set_adapter("default")
    assert torch.equal(run(model, method, kind), first)
    model.delete_adapter("other")
    assert torch.equal(run(model, method, kind), first)
    names = [*model.state_dict(), *(name for name, _ in model.named_parameters())]
    assert not [name for name in names if ".other" in name]
    model.delete_adapter("default")
    assert close(run(model, "", kind), plain, 1e-6)


@pytest.mark.parametrize(("method", "kind"), [pair for pair in MERGEABLE if pair[0] not in ONE_ADAPTER | ONE_ACTIVE])
def test_two_active_adapters_merge_in_any_order(method, kind):
    model = start(method, kind, adapters=("default", "other"))
    disturb(model, of="other")
    before = weights(model)
    for names in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(names)
        expected = run(model, method, kind)
        model.merge_adapter(names)
        at_once = run(model, method, kind)
        assert close(at_once, expected, 1e-3)
        model.unmerge_adapter()
        assert same(weights(model), before)
        model.merge_adapter(names[:1])
        model.merge_adapter(names[1:])
        assert close(run(model, method, kind), at_once)
        model.unmerge_adapter()
        assert same(weights(model), before)


@pytest.mark.parametrize(("method", "kind"), [pair for pair in PAIRS if pair[0] not in ONE_ADAPTER | NO_MIXED])
def test_each_row_of_a_mixed_batch_gets_its_adapter(method, kind):
    model = start(method, kind, adapters=("default", "other"))
    disturb(model, of="other")
    x, rows = network(kind)[1], ["default", "other", "__base__", "other", "default"]
    if kind == "MultiheadAttention":
        with pytest.raises(TypeError, match="does not support mixed adapter batches"):
            model(x, adapter_names=rows)
        return
    with torch.no_grad():
        found = model(x, adapter_names=rows)
        for name in ("default", "other"):
            model.set_adapter(name)
            own = [i for i, row in enumerate(rows) if row == name]
            assert close(found[own], model(x[own]))
    assert close(found[2], run(network(kind)[0], kind=kind)[2])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(x, adapter_names=rows[:2])


@each
def test_deepcopy_and_pickle(method, kind):
    model = make(method, kind)
    expected = run(model, method, kind)
    assert torch.equal(run(copy.deepcopy(model), method, kind), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), method, kind), expected)


@mergeable
def test_a_copy_of_a_merged_model_unmerges(method, kind):
    model = make(method, kind)
    before = weights(model)
    model.merge_adapter()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        clone.unmerge_adapter()
        assert same(weights(clone), before)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_moves(method, kind, dtype):
    model, x = make(method, kind), network(kind)[1]
    expected = run(model, method, kind)
    moved = copy.deepcopy(model).to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    found = run(moved, method, kind, x)
    assert found.dtype is dtype
    if dtype is torch.float64:
        assert close(found.float(), expected, 1e-3)
        assert close(run(moved.to(torch.float32), method, kind), expected)


@each
def test_files_and_low_memory_loading(method, kind, tmp_path):
    model = make(method, kind)
    expected = run(model, method, kind)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        read = peft_c.PeftModel.from_pretrained(network(kind)[0], tmp_path, low_cpu_mem_usage=low).eval()
        assert not [name for name, tensor in read.state_dict().items() if tensor.is_meta]
        assert not [name for name, parameter in read.named_parameters() if parameter.requires_grad]
        assert close(run(read, method, kind), expected, 1e-5)


@pytest.mark.parametrize("method", sorted(set(METHODS) - NO_MERGE))
def test_unloading_gives_the_base_model_back(method):
    kind = {"ln_tuning": "LayerNorm", "trainable_tokens": "Embedding"}.get(method, "Linear")
    model, plain = make(method, kind), network(kind)[0]
    expected = run(model, method, kind)
    merged = copy.deepcopy(model).merge_and_unload()
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
    assert close(run(merged, "", kind), expected)
    assert close(run(model.unload(), "", kind), run(plain, "", kind), 1e-6)


def test_every_method_is_tested_here():
    injected = {name for name, tuner in TUNERS.items() if isinstance(tuner, type) and issubclass(tuner, BaseTuner)}
    assert injected == set(METHODS) | WHOLE_MODELS


def test_rooms_leave_the_work_to_the_base():
    """No room writes merging, injection, deletion or a layer's forward of its own."""
    forbidden = {"merge", "unmerge", "update_layer", "delete_adapter", "forward"}
    found = []
    for tuner in (tuner for tuner in TUNERS.values() if hasattr(tuner, "rooms")):
        module = inspect.getmodule(tuner)
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__ and issubclass(cls, (Room, RoomModel)):
                own = forbidden if issubclass(cls, Room) else {"_create_and_replace", "_create_new_module"}
                found += [f"{cls.__qualname__}.{name}" for name in own & vars(cls).keys()]
    assert not found


@pytest.mark.parametrize("method", METHODS)
def test_a_name_with_a_dot_is_refused(method):
    kind = kinds_of(method)[0]
    model = start(method, kind)
    before = repr(model)
    with pytest.raises(ValueError if method in ONE_ADAPTER else KeyError):
        model.add_adapter("x.y", config_of(method, kind))
    assert repr(model) == before and list(model.peft_config) == ["default"]
