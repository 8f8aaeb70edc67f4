"""Optimizers: the parameter groups and the steps of PEFT."""

import importlib

import pytest
import torch

from .pairs import PACKAGES, network, pair, with_adapters

pytest.importorskip("peft")
IDS = torch.arange(12).reshape(2, 6)
CONFIG = {"r": 3, "target_modules": ["embed", "lin", "head"], "rank_pattern": {"head": 2}, "bias": "lora_only"}


def trained(package, create, steps=4, configs=(CONFIG,), **options):
    """A model after some steps, and the optimizer."""
    peft = importlib.import_module(package)
    model = with_adapters(peft, *configs)
    model.base_model.model.conv.requires_grad_(True)
    optimizer = getattr(importlib.import_module(f"{package}.optimizers"), create)(model, **options)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        (model(IDS) - torch.randn(2, 6, 5)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def assert_same(results):
    (left, _), (right, _) = results
    for (name, a), (other, b) in zip(left.named_parameters(), right.named_parameters(), strict=True):
        assert name == other and a.requires_grad == b.requires_grad
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("options", [{}, {"loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-3, "eps": 1e-6}])
def test_loraplus(options):
    options = {"optimizer_cls": torch.optim.AdamW, "lr": 1e-2, "loraplus_lr_ratio": 4.0, **options}
    results = [trained(package, "create_loraplus_optimizer", **options) for package in PACKAGES]
    assert_same(results)
    groups = [
        [
            (len(g["params"]), g["lr"], g["weight_decay"], [p.shape for p in g["params"]])
            for g in optimizer.param_groups
        ]
        for _, optimizer in results
    ]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}])
def test_lorafa(options):
    options = {"r": 3, "lora_alpha": 8, "lr": 1e-2, **options}
    results = [trained(package, "create_lorafa_optimizer", **options) for package in PACKAGES]
    assert_same(results)
    left, right = (optimizer for _, optimizer in results)
    assert left.state.keys() == right.state.keys()
    assert left.param_groups[0]["names"] == right.param_groups[0]["names"]
    assert left.param_groups[0]["scaling_factors"] == right.param_groups[0]["scaling_factors"]


def test_lorafa_with_a_second_adapter_trains_the_active_one():
    other = {**CONFIG, "bias": "none"}
    options = {"r": 3, "lora_alpha": 8, "lr": 1e-2}
    alone, _ = trained("peft_c", "create_lorafa_optimizer", configs=(other,), **options)
    both, _ = trained("peft_c", "create_lorafa_optimizer", configs=(other, other), **options)
    for name, param in alone.named_parameters():
        torch.testing.assert_close(both.get_parameter(name), param)


def test_lorafa_runs_a_closure_with_gradients():
    from peft_c.optimizers import create_lorafa_optimizer

    model = with_adapters(importlib.import_module("peft_c"), CONFIG)
    optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=8, lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = model(IDS).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_riemannian():
    options = {"optimizer_cls": torch.optim.SGD, "lr": 1e-2, "reg": 1e-3}
    assert_same([trained(package, "create_riemannian_optimizer", **options) for package in PACKAGES])


def test_riemannian_refuses():
    theirs, ours = pair("optimizers")
    model = with_adapters(importlib.import_module("peft_c"), CONFIG)
    with pytest.raises(TypeError, match="subclass of torch.optim.Optimizer"):
        ours.create_riemannian_optimizer(model, dict, lr=1)
    with pytest.raises(ValueError, match="requires a closure"):
        ours.create_riemannian_optimizer(model, torch.optim.LBFGS, lr=1)
    with pytest.raises(ValueError, match="did not find any trainable"):
        ours.create_riemannian_optimizer(network(), torch.optim.SGD, lr=1)
    optimizer = ours.create_riemannian_optimizer(model, torch.optim.SGD, lr=1)
    with pytest.raises(ValueError, match="does not support closures"):
        optimizer.step(lambda: 0.0)
