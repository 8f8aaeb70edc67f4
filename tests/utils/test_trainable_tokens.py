"""Trainable tokens: same numbers as PEFT, exact merging, ties, and errors that change nothing."""

import warnings

import pytest
import torch
from torch import nn

from .pairs import network, pair

pytest.importorskip("peft")
IDS = torch.arange(12).reshape(2, 6)


def adapted(peft, *token_lists, model=None, **options):
    model = network() if model is None else model
    wrapped = None
    for number, tokens in enumerate(token_lists):
        config = peft.TrainableTokensConfig(token_indices=tokens, target_modules=["embed"], **options)
        torch.manual_seed(number)
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, adapter_name="a0")
        else:
            wrapped.add_adapter(f"a{number}", config)
    layer = wrapped.base_model.model.embed
    for number, delta in enumerate(layer.trainable_tokens_delta.values()):
        delta.data += number + 1
    return wrapped.eval(), layer


@pytest.mark.parametrize("init_weights", [True, False])
def test_same_as_peft(init_weights):
    theirs, ours = (adapted(p, [1, 3], [5], init_weights=init_weights)[0] for p in pair(""))
    for name in ("a0", "a1"):
        theirs.set_adapter(name)
        ours.set_adapter(name)
        assert torch.equal(ours(IDS), theirs(IDS))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours(IDS).sum().backward()
    theirs(IDS).sum().backward()
    left, right = (m.base_model.model.embed.trainable_tokens_delta["a1"].grad for m in (theirs, ours))
    assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge_are_exact_and_in_place(dtype, safe):
    import peft_c

    model, layer = adapted(peft_c, [1, 3], [5], model=network().to(dtype))
    weight = layer.base_layer.weight
    before, pointer = weight.detach().clone(), weight.data_ptr()
    expected = layer.get_merged_weights(["a0", "a1"]).detach()
    for _ in range(3):
        layer.merge(safe_merge=safe, adapter_names=["a0"])
        layer.merge(safe_merge=safe, adapter_names=["a1"])
        assert layer.merged_adapters == ["a0", "a1"] and torch.equal(weight, expected)
        layer.unmerge()
        assert not layer.merged and torch.equal(weight, before)
    assert layer.base_layer.weight is weight and weight.data_ptr() == pointer


def test_adapters_of_other_layers_are_not_merged():
    model, layer = adapted(pair("")[1], [1, 3])
    before = layer.base_layer.weight.clone()
    layer.merge(adapter_names=["elsewhere"])
    assert not layer.merged_adapters and torch.equal(layer.base_layer.weight, before)
    layer.merge(adapter_names=["elsewhere", "a0"])
    assert layer.merged_adapters == ["a0"]
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_unmerge_restores_what_was_there_at_the_merge():
    import peft_c

    _, layer = adapted(peft_c, [1, 3])
    layer.base_layer.weight.data[1] = 7.0  # after the adapter was created
    layer.merge()
    layer.unmerge()
    assert (layer.base_layer.weight[1] == 7.0).all()


def test_disabled_while_merged_is_the_base_model_and_stays_merged():
    import peft_c

    model, layer = adapted(peft_c, [1, 3])
    base, merged = network()(IDS), model(IDS)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.allclose(model(IDS), base)
    assert layer.merged and torch.allclose(model(IDS), merged)


def test_errors_change_nothing():
    import peft_c

    model, layer = adapted(peft_c, [1, 3], [3, 4])
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="already defined"):
        layer.merge(adapter_names=["a0", "a1"])
    layer.trainable_tokens_delta["a1"].data[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True, adapter_names=["a1"])
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged
    with pytest.raises(IndexError, match=r"\[19\] of adapter a2 are out of bounds"):
        layer.update_layer("a2", token_indices=[0, 19])
    assert "a2" not in layer.token_indices and "a2" not in layer.trainable_tokens_delta


class Tied(nn.Module):
    """A model whose head shares the embedding's weight, as transformers' models declare it."""

    _tied_weights_keys = ["head.weight"]

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(19, 12)
        self.head = nn.Linear(12, 19, bias=False)
        self.head.weight = self.embed.weight
        self.config = {"tie_word_embeddings": True, "model_type": "custom"}

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


@pytest.mark.parametrize("targets", [["embed"], ["embed", "head"]])
def test_tied_layers_follow_the_embedding(targets):
    outputs = []
    for peft in pair(""):
        config = peft.TrainableTokensConfig(token_indices=[1, 3], target_modules=targets)
        model = peft.get_peft_model(Tied(), config)
        inner = model.base_model.model
        assert inner.head.tied_adapter is inner.embed
        inner.embed.trainable_tokens_delta["default"].data += 1
        outputs.append(model(IDS))
    assert torch.equal(*outputs)

    before = Tied().embed.weight
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is untied
            model.merge_adapter()
        assert inner.head.base_layer.weight is inner.embed.base_layer.weight
        torch.testing.assert_close(model(IDS), outputs[1])
        model.unmerge_adapter()
        assert torch.equal(inner.embed.base_layer.weight, before)
        assert not inner.embed._replaced_rows and not inner.head._replaced_rows


def test_a_second_adapter_does_not_become_active_on_the_tied_layer():
    import peft_c

    model = peft_c.get_peft_model(Tied(), peft_c.TrainableTokensConfig(token_indices=[1], target_modules=["embed"]))
    output = model(IDS)
    config = peft_c.TrainableTokensConfig(token_indices=[2], target_modules=["embed"], init_weights=False)
    model.add_adapter("other", config)
    assert torch.equal(model(IDS), output)
