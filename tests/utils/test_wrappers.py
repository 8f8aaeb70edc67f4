"""ModulesToSaveWrapper and TrainableTokensWrapper: random programs against PEFT, and what PEFT gets wrong."""

import copy
import importlib
import pickle
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from .pairs import PACKAGES, network, pair, with_adapters

pytest.importorskip("peft")
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
NAMES = ["a", "b", "c"]
step = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(NAMES)),
    st.tuples(st.just("set"), st.sampled_from([*NAMES, []])),
    st.tuples(st.just("freeze"), st.sampled_from(NAMES)),
    st.tuples(st.just("enable"), st.sampled_from([True, False])),
    st.tuples(st.just("delete"), st.sampled_from(NAMES)),
    st.tuples(st.just("grad"), st.sampled_from(NAMES)),
    st.tuples(st.just("check"), st.lists(st.sampled_from(NAMES), max_size=3)),
)


def apply(wrapper, step):
    what, value = step
    if what == "add":
        wrapper.update(value)
    elif what == "set":
        wrapper.set_adapter(value)
    elif what == "freeze":
        wrapper.set_adapter(value, inference_mode=True)
    elif what == "enable":
        wrapper.enable_adapters(value)
    elif what == "delete":
        rest = [name for name in NAMES if name != value and name in wrapper._adapters][:1]
        wrapper.delete_adapter(value, rest)
    elif what == "grad":
        wrapper.set_requires_grad(value, False)
    else:
        return wrapper.check_set_adapter(value)


def outcome(wrapper, step):
    try:
        return apply(wrapper, step), None
    except (ValueError, KeyError, IndexError) as exc:
        return None, type(exc)


def state(wrapper):
    return (
        sorted(wrapper._adapters),
        list(wrapper.active_adapters),
        wrapper.disable_adapters,
        sorted(wrapper._get_available_adapters()),
        sorted(name for name, _ in wrapper.named_parameters()),
    )


@settings(max_examples=150, deadline=None)
@given(program=st.lists(step, max_size=8))
def test_programs(program):
    wrappers = []
    for module in pair("utils.other"):
        torch.manual_seed(0)
        wrapper = module.ModulesToSaveWrapper(nn.Linear(6, 3), "a")
        wrapper.set_adapter("a")
        for number, param in enumerate(wrapper.parameters()):
            param.data.add_(0.1 * number)
        wrappers.append(wrapper)
    theirs, ours = wrappers
    for one in program:
        before = state(ours)
        expected, got = outcome(theirs, one), outcome(ours, one)
        if expected[1] is IndexError:  # PEFT cannot delete an adapter while none is active
            assert got[1] is None
            return
        assert got == expected
        if got[1] is not None:
            # PEFT has already frozen the active adapter when it finds the name unknown
            assert state(ours) == before
            return
        assert state(ours) == state(theirs)
        assert torch.equal(ours(X), theirs(X))
        assert torch.equal(ours.weight, theirs.weight)


def test_disabling_does_not_unfreeze():
    from peft_c.utils import ModulesToSaveWrapper

    wrapper = ModulesToSaveWrapper(nn.Linear(6, 3), "a")
    for frozen in (True, False):
        wrapper.set_adapter("a", inference_mode=frozen)
        wrapper.enable_adapters(False)
        wrapper.enable_adapters(False)
        assert not any(p.requires_grad for p in wrapper.parameters())
        wrapper.enable_adapters(True)
        assert wrapper.modules_to_save["a"].weight.requires_grad is not frozen


def test_an_adapter_of_the_original_of_a_trained_module_is_disabled():
    outputs = []
    for package in PACKAGES:
        peft = importlib.import_module(package)
        model = with_adapters(
            peft, {"target_modules": ["lin"], "modules_to_save": ["head"]}, {"target_modules": ["original_module"]}
        )
        model.set_adapter("a1")
        ids = torch.tensor([[1, 2, 3]])
        enabled = model(ids)
        with model.disable_adapter():
            assert torch.allclose(model(ids), network()(ids), atol=1e-6)
        assert torch.equal(model(ids), enabled)
        outputs.append(enabled)
    assert torch.allclose(*outputs, atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_copies(copied):
    from peft_c.utils import ModulesToSaveWrapper

    wrapper = ModulesToSaveWrapper(nn.Linear(6, 3), "a")
    wrapper.set_adapter("a")
    other = copied(wrapper)
    assert torch.equal(other(X), wrapper(X)) and state(other) == state(wrapper)


@pytest.mark.parametrize("cls", [nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList])
def test_containers_are_refused(cls):
    from peft_c.utils import ModulesToSaveWrapper

    with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
        ModulesToSaveWrapper(cls(), "a")


def test_mixed_batch_of_a_wrapper():
    outputs = []
    for module in pair("utils.other"):
        torch.manual_seed(0)
        wrapper = module.ModulesToSaveWrapper(nn.Linear(6, 3), "a")
        wrapper.update("b")
        for number, param in enumerate(wrapper.parameters()):
            param.data.add_(0.1 * number)
        outputs.append(wrapper(X, adapter_names=["b", "a", "__base__", "b"]))
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            wrapper(X, adapter_names=["b", "a"])
    assert torch.equal(*outputs)


def test_a_module_named_like_the_adapter_is_not_wrapped():
    import peft_c

    with pytest.raises(ValueError, match="does not conflict with any of the targeted modules"):
        with_adapters(peft_c, {"target_modules": ["lin"], "modules_to_save": ["a0"]})


@pytest.mark.parametrize("package", PACKAGES)
def test_token_wrapper_of_a_model(package):
    """Trained rows change the output of their tokens only, under set_adapter, disabling and deletion."""
    peft = importlib.import_module(package)
    config = {"target_modules": ["lin"], "init_lora_weights": True, "trainable_token_indices": {"embed": [1, 3]}}
    model = with_adapters(peft, config, {"target_modules": ["lin"], "init_lora_weights": True})
    ids = torch.tensor([[1, 1, 1], [2, 2, 2]])
    with model.disable_adapter():
        base = model(ids)
    with torch.no_grad():
        model.base_model.model.embed.token_adapter.trainable_tokens_delta["a0"] += 1
    trained = model(ids)
    assert not torch.allclose(trained[0], base[0]) and torch.allclose(trained[1], base[1])
    assert isinstance(model.base_model.model.embed.weight, torch.Tensor)
    model.set_adapter("a1")
    assert torch.allclose(model(ids), base)
    model.set_adapter("a0")
    assert torch.equal(model(ids), trained)
    model.delete_adapter("a0")
    assert torch.allclose(model(ids), base)


def test_other_attributes_of_an_embedding_shine_through():
    import peft_c

    model = with_adapters(peft_c, {"target_modules": ["lin"], "trainable_token_indices": {"embed": [1]}})
    embed = model.base_model.model.embed
    assert embed.embedding_dim == network().embed.embedding_dim and embed.padding_idx is None
    with pytest.raises(AttributeError, match="nonsense"):
        embed.nonsense  # noqa: B018


def test_what_delora_calls_a_norm_is_not_saved_as_a_module(tmp_path):
    peft_c = importlib.import_module("peft_c")
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(linear=nn.Linear(6, 6), norm=nn.LayerNorm(6)))
    config = peft_c.DeloraConfig(target_modules=["linear"], modules_to_save=["norm"], r=2, init_weights=False)
    model = peft_c.get_peft_model(copy.deepcopy(base), config).eval()  # PEFT wraps `delora_w_norm`; forwards fail
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(peft_c.PeftModel.from_pretrained(base, tmp_path)(X), model(X))
