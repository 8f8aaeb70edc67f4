"""Mixed batches in C equal the composed path, row by row."""

import pytest
import torch
from torch import nn

import peft_c


def make(dtype=torch.float32, adapter_dtype=None, dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 9)).to(dtype)
    config = {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": False, "lora_dropout": dropout}
    model = peft_c.get_peft_model(model, peft_c.LoraConfig(**config), "one", autocast_adapter_dtype=False)
    model.add_adapter("two", peft_c.LoraConfig(**{**config, "r": 7}), autocast_adapter_dtype=False)
    model.add_adapter("three", peft_c.LoraConfig(**{**config, "target_modules": ["2"]}), autocast_adapter_dtype=False)
    if adapter_dtype is not None:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
    return model.eval()


NAMES = ["one", "one", "__base__", "two", "three", "one", "two", "two"]


@pytest.mark.parametrize("shape", [(8, 24), (8, 3, 24), (8, 2, 3, 24)])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, None), (torch.float64, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)],
)
def test_equals_the_composed_path(shape, dtype, adapter_dtype):
    model = make(dtype, adapter_dtype)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        fast = model(x, adapter_names=NAMES)
        with peft_c.fast_paths(False):
            composed = model(x, adapter_names=NAMES)
        for i, name in enumerate(NAMES):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(x[i : i + 1])
            else:
                model.set_adapter(name)
                alone = model(x[i : i + 1])
            tolerance = 5e-2 if dtype is torch.bfloat16 else 1e-5
            assert torch.allclose(fast[i : i + 1], alone, atol=tolerance, rtol=tolerance), (i, name)
    assert torch.allclose(fast, composed, atol=5e-2 if dtype is torch.bfloat16 else 1e-5, rtol=1e-2)


def calls(monkeypatch):
    from peft_c.tuners.lora import core

    answers = []
    mixed = core._C.lowrank_mixed

    class Spy:
        def __getattr__(self, name):
            return (
                (lambda *a: answers.append(mixed(*a)) or answers[-1])
                if name == "lowrank_mixed"
                else getattr(peft_c._C, name)
            )

    monkeypatch.setattr(core, "_C", Spy())
    return answers


def test_c_acts_without_a_graph_only(monkeypatch):
    model, x, answers = make(), torch.randn(8, 24), calls(monkeypatch)
    with torch.no_grad():
        model(x, adapter_names=NAMES)
    assert len(answers) == 2 and None not in answers
    answers.clear()
    model.set_adapter("one")
    model(x, adapter_names=NAMES).sum().backward()
    assert all(answer is None for answer in answers)
    assert model.base_model.model[0].lora_A["one"].weight.grad is not None


def test_active_dropout_is_composed(monkeypatch):
    model, answers = make(dropout=0.5).train(), calls(monkeypatch)
    with torch.no_grad():
        model.base_model.model[0](torch.randn(8, 24), adapter_names=NAMES)
    assert answers == [None, None]


def test_transposed_and_expanded_inputs():
    model = make()
    with torch.no_grad():
        for x in (torch.randn(3, 8, 24).transpose(0, 1), torch.randn(1, 24).expand(8, 24)):
            fast = model(x, adapter_names=NAMES)
            with peft_c.fast_paths(False):
                assert torch.allclose(fast, model(x, adapter_names=NAMES), atol=1e-5)


@pytest.mark.parametrize(
    "names", [["a", "b"] * 4, ["a"] * 7 + ["b"], ["__base__"] * 8, ["b", "a", "c", "c", "b", "a", "c", "a"]]
)
@pytest.mark.parametrize("tokens", [1, 40])
def test_large_layers_and_any_order(names, tokens):
    torch.manual_seed(0)
    config = peft_c.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
    model = peft_c.get_peft_model(nn.Sequential(nn.Linear(600, 500)), config, "a")
    for name in "bc":
        model.add_adapter(name, config)
    x = torch.randn(8, tokens, 600)
    with torch.no_grad():
        fast = model.eval()(x, adapter_names=names)
        with peft_c.fast_paths(False):
            assert torch.allclose(fast, model(x, adapter_names=names), atol=1e-4)


def test_a_trainable_base_keeps_its_gradient():
    model, x = make(), torch.randn(8, 24)
    model.requires_grad_(False)
    for i in (0, 2):
        model.base_model.model[i].base_layer.weight.requires_grad_(True)

    def gradient():
        model.zero_grad()
        model(x, adapter_names=NAMES).sum().backward()
        return model.base_model.model[0].base_layer.weight.grad.clone()

    fast = gradient()
    with peft_c.fast_paths(False):
        assert torch.allclose(fast, gradient(), atol=1e-5)


def test_names_are_checked_before_anything_runs():
    model = make()
    with pytest.raises(ValueError, match="non-existing adapter.*four, nine"):
        model(torch.randn(8, 24), adapter_names=[*NAMES[:6], "nine", "four"])
    with pytest.raises(ValueError, match="Length of"):
        model(torch.randn(7, 24), adapter_names=NAMES)
    assert not any(module._forward_pre_hooks for module in model.modules())


def embeddings(dtype=torch.float32, adapter_dtype=None):
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": ["0", "1"], "init_lora_weights": False}
    model = nn.Sequential(nn.Embedding(50, 40), nn.Linear(40, 9)).to(dtype)
    model = peft_c.get_peft_model(model, peft_c.LoraConfig(**config), "one", autocast_adapter_dtype=False)
    model.add_adapter("two", peft_c.LoraConfig(**{**config, "r": 7}), autocast_adapter_dtype=False)
    model.add_adapter("three", peft_c.LoraConfig(**{**config, "target_modules": ["1"]}), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name and adapter_dtype is not None:
            parameter.data = parameter.data.to(adapter_dtype)
    return model.eval().base_model.model[0]


def lookups(monkeypatch):
    from peft_c.tuners.lora import layer

    answers = []

    class Spy:
        lookup_add = staticmethod(lambda *args: answers.append(peft_c._C.lookup_add(*args)) or answers[-1])

    monkeypatch.setattr(layer, "_C", Spy())
    return answers


@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(8,), (8, 3), (8, 2, 7)])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, None), (torch.float64, None), (torch.bfloat16, None), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize("names", [None, NAMES])
def test_embeddings_are_looked_up_in_c(dtype, adapter_dtype, shape, ids, names, monkeypatch):
    layer, answers = embeddings(dtype, adapter_dtype), lookups(monkeypatch)
    if names is None:
        layer.set_adapter(["two", "one"])
    x = torch.randint(0, 50, shape, dtype=ids)
    with torch.no_grad():
        fast = layer(x, adapter_names=names)
        assert answers == ([True] if names else [True, True])
        with peft_c.fast_paths(False):
            composed = layer(x, adapter_names=names)
    assert answers == ([True] if names else [True, True])
    tolerance = 5e-2 if dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(fast, composed, atol=tolerance, rtol=tolerance)
    if names:
        assert torch.equal(fast[NAMES.index("__base__")], layer.base_layer(x[NAMES.index("__base__")]))
        assert torch.equal(fast[NAMES.index("three")], layer.base_layer(x[NAMES.index("three")]))


def test_embeddings_that_c_does_not_take(monkeypatch):
    layer, answers = embeddings(), lookups(monkeypatch)
    x, names = torch.randint(0, 50, (8, 4)), ["one"] * 4 + ["two"] * 4

    def differs():
        fast = layer(x, adapter_names=names)
        with peft_c.fast_paths(False):
            torch.testing.assert_close(fast, layer(x, adapter_names=names), atol=1e-5, rtol=1e-5)
        return [answers.pop() for _ in range(len(answers))] != [True]

    assert differs()  # autograd
    with torch.no_grad():
        assert not differs()
        handle = layer.base_layer.register_forward_hook(lambda *args: None)
        assert differs()
        handle.remove()
        layer.base_layer.max_norm = 0.5
        assert differs()
        layer.base_layer.max_norm = None
        layer.base_layer.embed_scale = torch.tensor(2.0)
        assert differs()
        del layer.base_layer.embed_scale
        handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
        assert differs()
        handle.remove()
        x = x.T.contiguous().T  # not contiguous
        assert differs()
        B = layer.lora_embedding_B["two"]
        B.data = B.data.double()
        x = x.contiguous()
        layer.lora_embedding_A["two"].data = layer.lora_embedding_A["two"].data.double()
        assert not differs()


def test_one_id_without_a_batch():
    layer = embeddings()
    with torch.no_grad():
        torch.testing.assert_close(layer(torch.tensor(3)), layer(torch.tensor([3]))[0])


def test_lookups_that_do_not_fit_write_nothing():
    torch.manual_seed(0)
    add, A, B = peft_c._C.lookup_add, torch.randn(2, 9), torch.randn(5, 2)
    x, y, term = torch.randint(0, 9, (4, 3)), torch.randn(4, 3, 5), (A, B, 0.5)
    before = y.clone()
    for ids in (x + 9, x - 9, x.float(), x.short(), x[:, :2], x[0], x.T):
        assert add(y, ids, [None, term, term, term]) is False
    small, wide = (A[:, :3], B, 0.5), (A, torch.randn(6, 2), 0.5)
    for terms in ([term] * 3, [term] * 5, [], [term, small, term, term], [wide] * 4, [(A, B.T, 1)] * 4):
        assert add(y, x.clamp(3), terms) is False
    assert add(y[:1].expand(4, 3, 5), x, [term] * 4) is False
    assert add(y.to("meta"), x, [term] * 4) is False
    for terms in ([term, (A, B)] * 2, [term, 3] * 2, [(A, B, "one")] * 4):
        with pytest.raises(TypeError):
            add(y, x, terms)
    with pytest.raises(TypeError, match="a list"):
        add(y, x, (term,) * 4)
    assert torch.equal(y, before)
    assert add(y, x, [term, None, (A, B, 2), term]) is True
    expected = before + torch.tensor([0.5, 0, 2, 0.5]).view(4, 1, 1) * (A.T[x] @ B.T)
    torch.testing.assert_close(y, expected)
