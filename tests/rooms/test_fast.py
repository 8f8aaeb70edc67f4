"""The forward of rooms with C and without: the same numbers, and C stays out where it may not act."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_c
from peft_c import _C
from peft_c.tuners import products, room_layer
from peft_c.tuners.products import einsum, linear, multipliable, product
from tests.rooms.cases import PAIRS, config_of

LINEAR = sorted({method for method, kind in PAIRS if kind == "Linear"} - {"poly"})


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", LINEAR)
def test_with_c_and_without(method, dtype):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 64)).to(dtype)
    model = peft_c.get_peft_model(base, config_of(method, "Linear", peft_c), autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    for rows in (1, 6, 90):
        x = torch.randn(rows, 16, dtype=dtype)
        for training in (False, True):
            layer.train(training)
            outputs = []
            for fast in (True, False):
                torch.manual_seed(1)
                with peft_c.fast_paths(fast):
                    outputs.append(layer(x))
            tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(*outputs, atol=tolerance * outputs[1].abs().max().item(), rtol=0)
            assert outputs[0].is_contiguous()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(8, 96), (2, 3, 96), (96,), (0, 96), (200, 96)])
def test_products(shape):
    x, weight, bias = torch.randn(shape), torch.randn(64, 96), torch.randn(64)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(product(x, weight.T.contiguous()), x @ weight.T, atol=1e-4, rtol=1e-4)


def test_c_stays_out():
    x, weight = torch.randn(8, 96), torch.randn(64, 96, requires_grad=True)
    assert linear(x, weight).requires_grad
    with torch.no_grad():
        assert _C.may_act()
        with peft_c.fast_paths(False):
            assert not _C.may_act()
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight).dtype == torch.bfloat16
        per_row = torch.func.vmap(lambda row: linear(row, weight))(x)
        torch.testing.assert_close(per_row, F.linear(x, weight), atol=1e-4, rtol=1e-4)
        with FakeTensorMode():
            fake = torch.empty(8, 96), torch.empty(64, 96)
            assert linear(*fake).shape == (8, 64)
            assert product(fake[0], fake[1].T).shape == (8, 64)


@torch.no_grad()
def test_hooks_on_the_base_layer_are_called():
    model = peft_c.get_peft_model(nn.Sequential(nn.Linear(64, 64)), peft_c.BeftConfig(target_modules=["0"]))
    layer, calls = model.base_model.model[0], []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(4, 64))
    assert calls == [1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["ia3", "loha", "vera"])
def test_gradients_through_a_base_layer(method, dtype):
    """A frozen one is C's where that is faster; one that is trained gets its own gradient."""
    torch.manual_seed(0)
    model = peft_c.get_peft_model(
        nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 64)).to(dtype),
        config_of(method, "Linear", peft_c),
        autocast_adapter_dtype=False,
    )
    layer, start = model.base_model.model[0], torch.randn(20, 512, dtype=dtype)
    for trained in (False, True):
        layer.get_base_layer().weight.requires_grad_(trained)
        results = []
        for fast in (True, False):
            layer.zero_grad()
            x = start.clone().requires_grad_()
            with peft_c.fast_paths(fast):
                y = layer(x)
                y.float().square().sum().backward()
            results.append([y, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
        assert len(results[0]) == len(results[1]) > 2 + trained
        for actual, expected in zip(*results, strict=True):
            tolerance = (4e-2 if dtype == torch.bfloat16 else 1e-4) * expected.abs().max().item()
            torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def test_a_frozen_base_layer_is_one_node_where_torch_is_slow_and_torchs_own_elsewhere():
    layer = peft_c.get_peft_model(
        nn.Sequential(nn.Linear(512, 512)), peft_c.BeftConfig(target_modules=["0"])
    ).base_model.model[0]
    x = torch.randn(8, 512, requires_grad=True)
    assert layer.base_output(x).grad_fn.name() == "AddmmBackward0"
    layer, x = layer.half(), x.detach().half().requires_grad_()
    in_c = _C.info()["isa"].startswith("avx")
    assert (layer.base_output(x).grad_fn.name() == "_LowRankBackward") == in_c
    layer.get_base_layer().weight.requires_grad_()
    assert layer.base_output(x).grad_fn.name() == "AddmmBackward0"
    layer.get_base_layer().weight.requires_grad_(False)
    with peft_c.fast_paths(False):
        assert layer.base_output(x).grad_fn.name() == "AddmmBackward0"


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(40, 256), (3, 5, 256), (1, 256), (0, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_in_a_graph(dtype, shape, turned):
    torch.manual_seed(0)
    x, bias = (torch.randn(s).to(dtype).requires_grad_() for s in (shape, 192))
    weight = (torch.randn((256, 192) if turned else (192, 256)) / 16).to(dtype).requires_grad_()
    eps = torch.finfo(dtype).eps
    tolerance = {"atol": (100 if dtype == torch.float32 else 8) * eps, "rtol": 4 * eps}
    matrix = weight if turned else weight.T
    for actual, leaves in ((linear(x, matrix.T, bias), (x, weight, bias)), (product(x, matrix), (x, weight))):
        wanted = x.float() @ matrix.float() + (bias.float() if len(leaves) == 3 else 0)
        assert actual.grad_fn.name() == "_ProductBackward" or dtype != torch.float16
        torch.testing.assert_close(actual.float(), wanted, **tolerance)
        g = torch.randn(wanted.shape).to(dtype)
        found, expected = (torch.autograd.grad(y, leaves, by) for y, by in ((actual, g), (wanted, g.float())))
        for one, other, leaf in zip(found, expected, leaves, strict=True):
            assert one.dtype == dtype and one.stride() == leaf.stride()
            torch.testing.assert_close(one.float(), other.float(), **(tolerance | {"rtol": 4e-2}))


def test_products_in_a_graph_are_differentiated_twice():
    x, weight = (torch.randn(s).half().requires_grad_() for s in ((4, 256), (192, 256)))
    seen = []
    for multiply in (linear, F.linear):
        (dx,) = torch.autograd.grad(multiply(x, weight / 16).square().sum(), x, create_graph=True)
        seen.append(torch.autograd.grad(dx.square().sum(), (x, weight)))
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, atol=2e-2 * other.abs().max().item(), rtol=0)
    frozen = linear(x.detach(), weight.detach())
    assert not frozen.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_half_precision_are_rounded_once_on_cpus_that_multiply_it_slowly(monkeypatch, dtype):
    monkeypatch.setattr(products, "multiplies_slowly", lambda tensor: tensor.dtype == dtype)
    x, weight, bias = (torch.randn(size, dtype=dtype, requires_grad=True) for size in ((2, 5, 24), (24, 24), (24,)))
    expected = (x.float() @ weight.float()).to(dtype)
    assert torch.equal(product(x, weight), expected)
    assert torch.equal(linear(x, weight.T), expected)
    assert torch.equal(einsum("bij,jk->bik", x, weight), expected)
    assert torch.equal(linear(x, weight, bias), F.linear(x.float(), weight.float(), bias.float()).to(dtype))
    assert multipliable(x).dtype == torch.float32
    grads = torch.autograd.grad(product(x, weight).float().sum(), (x, weight))
    assert [grad.dtype for grad in grads] == [dtype, dtype]
    assert torch.equal(grads[0], weight.float().sum(1).to(dtype).expand_as(x))


@torch.no_grad()
def test_convolutions_in_half_precision_are_computed_in_fp32_unless_somebody_looks_at_them(monkeypatch):
    for module in (products, room_layer):
        monkeypatch.setattr(module, "multiplies_slowly", lambda tensor: tensor.dtype == torch.bfloat16)
    base = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)).to(torch.bfloat16)
    conv, x = base[0], torch.randn(2, 4, 5, 5, dtype=torch.bfloat16)
    wide = F.conv2d(x.float(), conv.weight.float(), conv.bias.float(), padding=1).to(torch.bfloat16)
    config = peft_c.IA3Config(target_modules=["0"], feedforward_modules=[])
    layer = peft_c.get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model[0]
    calls = []
    monkeypatch.setattr(
        nn.Conv2d, "forward", lambda self, x: calls.append(1) or self._conv_forward(x, *self.parameters())
    )
    assert torch.equal(layer(x), wide) and not calls
    hook = conv.register_forward_hook(lambda *args: calls.append(2))
    layer(x)
    hook.remove()
    assert calls == [1, 2]
    with peft_c.fast_paths(False):
        layer(x)
    assert calls == [1, 2, 1]
