"""Adapted weights that are kept between forwards in evaluation: the same bits, never stale, bounded, gone in time."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import peft_c
from peft_c import _C, get_peft_model, kept_weights
from peft_c.tuners.kept import kept_bytes

CONFIGS = {
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 50, "init_weights": False},
    "glora": {"init_weights": False},
    "hira": {"r": 4, "init_weights": False},
    "loha": {"r": 4, "init_weights": False},
    "lokr": {"r": 4, "init_weights": False},
    "miss": {"r": 16, "init_weights": "bat"},
    "osf": {"effective_rank": 32, "init_weights": False},
    "randlora": {"r": 4, "init_weights": False},
    "supertuning": {"sparsity": 0.5, "init_weights": False},
    "vera": {"r": 8, "init_weights": False},
    "waveft": {"n_frequency": 50, "init_weights": False},
}
ROWS = 256


def build(method="hira", size=64, adapters=("default",)):
    torch.manual_seed(0)
    config = peft_c.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method.upper()]
    model = get_peft_model(nn.Sequential(nn.Linear(size, size)), config(target_modules=["0"], **CONFIGS[method]))
    for name in adapters[1:]:
        model.add_adapter(name, config(target_modules=["0"], **CONFIGS[method]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" not in name and parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), torch.randn(ROWS, size)


def layer_of(model):
    return model.base_model.model[0]


@torch.no_grad()
def fresh(model, x):
    with kept_weights(0):
        return model(x)


@torch.no_grad()
def assert_follows(model, x):
    for _ in range(3):
        assert torch.equal(model(x), fresh(copy.deepcopy(model), x))


@pytest.mark.parametrize("method", CONFIGS)
@torch.no_grad()
def test_the_same_bits(method):
    model, x = build(method)
    wanted = fresh(model, x)
    assert kept_bytes(layer_of(model)) == 0
    for kept in (False, True, True):
        assert torch.equal(model(x), wanted)
        assert bool(kept_bytes(layer_of(model))) is kept


@pytest.mark.parametrize("method", CONFIGS)
@torch.no_grad()
def test_what_is_written_to_anything_is_seen(method):
    model, x = build(method)
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    for tensor in tensors:
        for _ in range(2):
            model(x)
        assert kept_bytes(layer_of(model))
        before = model(x)
        tensor.data.view(-1)[:8] += 0.5  # autograd does not count this
        with kept_weights(0):
            wanted = model(x)
        assert not torch.equal(wanted, before) or method in ("osf", "randlora", "vera")  # not all of these is in use
        for _ in range(3):
            assert torch.equal(model(x), wanted)


@torch.no_grad()
def test_scales_adapters_and_weights_that_are_replaced():
    model, x = build("loha", adapters=("default", "second"))
    layer = layer_of(model)
    assert_follows(model, x)
    layer.set_scale("default", 3.0)
    assert_follows(model, x)
    model.base_model.set_adapter(["default", "second"])
    assert_follows(model, x)
    model.set_adapter("second")
    assert_follows(model, x)
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.data.T)  # the same memory
    assert_follows(model, x)
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()})
    assert_follows(model, x)
    with model.disable_adapter():
        assert_follows(model, x)
    assert_follows(model.double(), x.double())


@torch.no_grad()
def kept_model():
    model, x = build()
    model(x), model(x)
    assert kept_bytes(layer_of(model)) == 64 * 64 * 4
    return model, x


@pytest.mark.parametrize("act", ["train", "to", "merge", "delete"])
def test_it_goes(act):
    model, x = kept_model()
    layer = layer_of(model)
    if act == "train":
        model.train()
    elif act == "to":
        model.to(torch.float64)
    elif act == "merge":
        model.merge_adapter()
        assert kept_bytes(layer) == 0
        model.unmerge_adapter()
    else:
        layer.delete_adapter("default")
    assert kept_bytes(layer) == 0
    if act == "merge":
        assert_follows(model, x)


def test_it_goes_with_its_layer_and_is_in_no_copy():
    gc.collect()
    others = kept_bytes()
    model, _ = kept_model()
    size = len(pickle.dumps(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kept_bytes(layer_of(other)) == 0
    layer_of(model).train(False)
    assert len(pickle.dumps(model)) == size
    del model, _
    gc.collect()
    assert kept_bytes() == others


@torch.no_grad()
def test_no_more_is_kept_than_the_limit():
    models = [build(size=128) for _ in range(3)]
    wanted = [fresh(model, x) for model, x in models]
    with kept_weights(kept_bytes() / 2**20 + 0.13):  # two of 64 KiB
        for _ in range(3):
            for (model, x), output in zip(models, wanted, strict=True):
                assert torch.equal(model(x), output)
        assert [bool(kept_bytes(layer_of(model))) for model, _ in models] == [True, True, False]


def test_threads():
    models = [build() for _ in range(8)]
    wanted = [fresh(model, x) for model, x in models]

    @torch.no_grad()
    def work(number):
        for i in range(200):
            model, x = models[(i * (number + 1)) % len(models)]
            assert torch.equal(model(x), wanted[(i * (number + 1)) % len(models)])
            if i % 7 == number:
                model.eval(), layer_of(model).train(False)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    gc.collect()
    before = kept_bytes()
    kept = sum(kept_bytes(layer_of(model)) for model, _ in models)
    models.clear()
    gc.collect()
    assert kept_bytes() == before - kept


def test_training_and_gradients_keep_nothing():
    model, x = build()
    for _ in range(3):
        model(x).sum().backward()
    assert kept_bytes(layer_of(model)) == 0
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert kept_bytes(layer_of(model)) == 0


@torch.no_grad()
def test_compiled_models_keep_nothing():
    model, x = build()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), fresh(model, x))
    assert kept_bytes(layer_of(model)) == 0


def test_explain_says_so():
    model, _ = kept_model()
    assert "KiB of adapted weights are kept" in str(peft_c.explain(model))


def test_fingerprints():
    a, b = torch.arange(12.0).view(3, 4), torch.arange(12, dtype=torch.int64)
    assert _C.fingerprint([a, b]) == _C.fingerprint([a.clone(), b.clone()])
    others = [[b, a], [a], [a, b, b], [a.view(4, 3), b], [a + 1, b], [a, b + 1], [a, b.int()], []]
    assert len({_C.fingerprint(other) for other in [[a, b], *others]}) == len(others) + 1
    assert _C.fingerprint([a[:, :2]]) is None and _C.fingerprint([a.to("meta")]) is None
    assert _C.fingerprint([torch.ones(3, dtype=torch.bool)]) is None and _C.fingerprint([torch.ones(0, 3)]) is not None
    with pytest.raises(TypeError):
        _C.fingerprint(a)
