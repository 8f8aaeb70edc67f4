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
