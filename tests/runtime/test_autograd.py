"""The graph around the kernels: gradients, what is saved, double backward, dropout, in-place safety."""

import itertools

import pytest
import torch
from torch import nn
from toy_layer import ToyLayer, close, make

from peft_c import _C, fast


def gradients(layer, function, x, g, create_graph=False):
    out = function(x)
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    found = torch.autograd.grad(out, wanted, g.to(out.dtype), create_graph=create_graph, allow_unused=True)
    return out, found


def compare(layer, x, scale=1.0, seed=None):
    g = torch.randn(*x.shape[:-1], layer.lora_B[next(iter(layer.lora_B))].out_features)
    if seed is not None:
        torch.manual_seed(seed)
    out, found = gradients(layer, layer, x, g)
    if seed is not None:
        torch.manual_seed(seed)
    expected_out, expected = gradients(layer, layer.composed, x, g)
    close(out.detach(), expected_out.detach(), scale)
    for actual, want in zip(found, expected, strict=True):
        assert (actual is None) == (want is None)
        if want is not None:
            assert actual.dtype == want.dtype and actual.shape == want.shape
            close(actual, want, scale)
    return out


PAIRS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0]}+{p[1]}".replace("torch.", ""))
@pytest.mark.parametrize("lead", [(), (6,), (90,), (2, 3), (2, 1, 3), (2, 1, 2, 2)], ids=str)
def test_gradients(pair, lead):
    layer = make(dtype=pair[0], adapter_dtype=pair[1])
    x = torch.randn(*lead, 24, dtype=pair[0]).requires_grad_()
    out = compare(layer, x, 2.0)
    assert out.grad_fn.name() == "_LowRankBackward" and out.dtype == pair[0]


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_combination_of_requires_grad(flags):
    layer = make()
    x = torch.randn(5, 24).requires_grad_(flags[0])
    layer.lora_A["default"].requires_grad_(flags[1])
    layer.lora_B["default"].requires_grad_(flags[2])
    layer.base_layer.requires_grad_(flags[3])
    if any(flags):
        compare(layer, x)
    out = layer(x)
    assert out.requires_grad == any(flags)


@pytest.mark.parametrize(
    "strided", [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[:1].expand(4, -1, -1)]
)
def test_strided_inputs_and_gradients(strided):
    layer = make()
    leaf = torch.randn(4, 6, 24).requires_grad_()
    g = torch.randn(40, *strided(leaf).shape[:-1]).movedim(0, -1)
    found = torch.autograd.grad(layer(strided(leaf)), leaf, g)[0]
    expected = torch.autograd.grad(layer.composed(strided(leaf)), leaf, g)[0]
    close(found, expected)
    layer(strided(leaf)).sum().backward()  # an expanded gradient
    ours = [p.grad.clone() for p in (leaf, layer.lora_A["default"].weight)]
    leaf.grad, layer.lora_A["default"].weight.grad = None, None
    layer.composed(strided(leaf)).sum().backward()
    close(ours[0], leaf.grad, 10)
    close(ours[1], layer.lora_A["default"].weight.grad, 10)


def test_several_adapters_and_low_precision():
    compare(make(adapters=("a", "b", "c")), torch.randn(5, 24).requires_grad_(), 4)
    compare(
        make(adapters=("a", "b"), dtype=torch.bfloat16, adapter_dtype=torch.float32),
        torch.randn(5, 24, dtype=torch.bfloat16).requires_grad_(),
        2,
    )


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0]}+{p[1]}".replace("torch.", ""))
def test_dropout_draws_the_same_numbers(pair):
    layer = make(dtype=pair[0], adapter_dtype=pair[1], adapters=("a", "b"), dropout=0.3).train()
    compare(layer, torch.randn(4, 5, 24, dtype=pair[0]).requires_grad_(), 3, seed=5)
    with torch.no_grad():
        torch.manual_seed(0)
        actual = layer(x := torch.randn(3, 24, dtype=pair[0]))
        torch.manual_seed(0)
        torch.randn(3, 24, dtype=pair[0])
        close(actual, layer.composed(x), 3)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_everything(p):
    for dtype in (torch.float32, torch.bfloat16):
        layer = make(dtype=dtype, adapter_dtype=torch.float32)
        layer.lora_dropout["default"] = nn.Dropout(p)
        compare(layer, torch.randn(4, 24, dtype=dtype).requires_grad_(), 2, seed=2)


def test_some_adapters_with_dropout():
    layer = make(adapters=("a", "b", "c"))
    layer.lora_dropout["b"] = nn.Dropout(0.5)
    compare(layer, torch.randn(4, 24).requires_grad_(), 3, seed=2)


def test_gradcheck():
    layer = make(k=5, n=6, r=3, dtype=torch.float64, adapters=("a", "b"))
    x = torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_()
    weights = [p for p in layer.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda v, *_: layer(v), (x, *weights))
    assert torch.autograd.gradgradcheck(lambda v, *_: layer(v), (x, *weights))


def test_create_graph():
    layer = make(dtype=torch.float64)
    x = torch.randn(3, 24, dtype=torch.float64).requires_grad_()

    def penalty(function):
        first = torch.autograd.grad(function(x).pow(2).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.pow(2).sum(), [x, layer.lora_A["default"].weight])

    for actual, expected in zip(penalty(layer), penalty(layer.composed), strict=True):
        close(actual, expected, 1e3)


def test_batched_gradients():
    layer = make()
    x = torch.randn(3, 24).requires_grad_()
    g = torch.randn(4, 3, 40)
    for actual, expected in zip(
        torch.autograd.grad(layer(x), x, g, is_grads_batched=True),
        torch.autograd.grad(layer.composed(x), x, g, is_grads_batched=True),
        strict=True,
    ):
        close(actual, expected)


def saved(function, *args):
    """The tensors that the graph of function(*args) keeps, by storage."""
    kept = {}

    def pack(t):
        kept[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function(*args)
    return out, list(kept.values())


def test_no_wide_copy_of_the_input_is_kept():
    layer = make(k=256, n=512, r=8, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    x = torch.randn(64, 256, dtype=torch.bfloat16).requires_grad_()
    _, ours = saved(layer, x)
    _, theirs = saved(layer.composed, x)
    assert any(t.dtype == torch.float32 and t.shape == x.shape for t in theirs)
    assert not any(t.dtype == torch.float32 and t.numel() >= x.numel() for t in ours)
    assert not any(t.shape == (64, 512) for t in ours), "nothing of output size"
    assert x.data_ptr() in {t.data_ptr() for t in ours}

    def size(tensors):
        return sum(t.numel() * t.itemsize for t in tensors if t.data_ptr() != x.data_ptr())

    assert size(ours) < size(theirs) - x.numel() * 3


def test_frozen_adapters_keep_no_input():
    layer = make(k=64, n=64).requires_grad_(False)
    x = torch.randn(32, 64).requires_grad_()
    _, ours = saved(layer, x)
    assert x.data_ptr() not in {t.data_ptr() for t in ours}
    compare(layer, x)


def test_outputs_can_be_changed_in_place():
    layer = make()
    for x in (torch.randn(5, 24).requires_grad_(), torch.randn(2, 5, 24).requires_grad_()):
        out = layer(x)
        assert out._base is None and out.is_leaf is False
        out += 1
        out.relu_()
        expected = (layer.composed(x) + 1).relu()
        close(out.detach(), expected.detach())
        close(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0], 10)


def test_changed_factors_are_noticed():
    layer = make()
    x = torch.randn(5, 24).requires_grad_()
    out = layer(x)
    with torch.no_grad():
        layer.lora_A["default"].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = layer(x * 1.0)
    h = x * 1.0
    out = layer(h)
    h.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_input_and_factor_versions_do_not_move():
    layer = make()
    x = torch.randn(5, 24).requires_grad_()
    tensors = [x, *layer.parameters()]
    before = [t._version for t in tensors]
    layer(x).sum().backward()
    assert before == [t._version for t in tensors]


def test_raw_writes_can_be_announced():
    t = torch.zeros(3)
    before = t._version
    fast.increment_version(t)
    assert t._version > before


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    from torch.utils.checkpoint import checkpoint

    layer = make(dropout=0.5)
    x = torch.randn(5, 24).requires_grad_()
    torch.manual_seed(0)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    torch.manual_seed(0)
    out = checkpoint(layer, x, use_reentrant=reentrant)
    out.sum().backward()
    close(x.grad, expected)


def test_trainable_base_and_stacked_layers():
    first, second = make(24, 40), make(40, 24, seed=1)
    first.base_layer.requires_grad_(True)
    model = nn.Sequential(first, nn.GELU(), second)
    x = torch.randn(5, 24)
    model(x).pow(2).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    second.composed(nn.functional.gelu(first.composed(x))).pow(2).sum().backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() and "0.base_layer.weight" in ours
    for name in ours:
        close(ours[name], theirs[name], 10)


def test_base_of_another_type_gets_a_copy_in_the_graph():
    class Other(nn.Linear):
        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept

    layer = ToyLayer(Other(24, 40))
    x = torch.randn(5, 24).requires_grad_()
    compare(layer, x)
    out = layer(x)
    assert out.data_ptr() != layer.base_layer.kept.data_ptr()


def test_no_gradient_reaches_the_output():
    class Ignore(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.sum()

        @staticmethod
        def backward(ctx, g):
            return None

    layer = make()
    Ignore.apply(layer(torch.randn(3, 24))).backward()
    grad = layer.lora_A["default"].weight.grad
    assert grad is None or not grad.any()


def test_backward_says_false_for_what_has_no_view():
    g = torch.zeros(3, 40, device="meta")
    factors = (torch.randn(4, 24), torch.randn(40, 4))
    out = torch.empty(3, 24)
    assert _C.lowrank_backward(g, None, None, (1.0,), factors, out, (None, None)) is False
    with pytest.raises(ValueError):
        _C.lowrank_backward(g, None, None, (1.0,), factors, out, (None,))


def inputs_of(out):
    return {type(node).__name__ for node, _ in out.grad_fn.next_functions if node is not None}


def test_a_frozen_linear_and_its_terms_are_one_node():
    layer = make()
    x = torch.randn(5, 24).requires_grad_()
    assert inputs_of(layer(x)) == {"AccumulateGrad"}
    compare(layer, x)
    layer.base_layer.bias.requires_grad_(True)
    assert inputs_of(layer(x)) != {"AccumulateGrad"}
    compare(layer, x)
    dropped = make(dropout=0.5).train()
    assert inputs_of(dropped(x)) != {"AccumulateGrad"}


def test_a_changed_base_weight_is_noticed():
    layer = make()
    out = layer(torch.randn(5, 24).requires_grad_())
    layer.base_layer.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_of_the_base_is_kept_without_a_gradient_for_x():
    layer, kept = make(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(5, 24))
    assert layer.base_layer.weight.data_ptr() not in {t.data_ptr() for t in kept}


def test_a_replaced_linear_is_called(monkeypatch):
    layer, plain = make(), nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, weight, bias=None: plain(x, weight, bias).exp())
    compare(layer, torch.randn(5, 24).requires_grad_(), 10)


@pytest.mark.parametrize("x_wanted", [False, True])
def test_hooks_on_what_is_kept(x_wanted):
    layer = make(dtype=torch.bfloat16, adapter_dtype=torch.float32, adapters=("a", "b"))
    x = torch.randn(5, 24, dtype=torch.bfloat16).requires_grad_(x_wanted)
    with torch.autograd.graph.save_on_cpu(), torch.autograd.detect_anomaly(check_nan=True):
        compare(layer, x, 2)


def test_hooks_on_parameters_and_output_run_once():
    layer, seen = make(), []
    for p in layer.parameters():
        if p.requires_grad:
            p.register_hook(lambda g: seen.append(g.shape) or 2 * g)
    x = torch.randn(5, 24).requires_grad_()
    out = layer(x)
    out.register_hook(lambda g: seen.append(g.shape))
    out.sum().backward()
    assert sorted(seen) == [(4, 24), (5, 40), (40, 4)]
    twice = layer.lora_A["default"].weight.grad.clone()
    layer.lora_A["default"].weight.grad = None
    layer.composed(x).sum().backward()
    close(twice, layer.lora_A["default"].weight.grad, 10)


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_large_layers(rows, dropout):
    layer = make(k=600, n=500, adapters=("a", "b"), dropout=dropout).train()
    compare(layer, torch.randn(rows, 600).requires_grad_(), 10, seed=1)


def test_the_base_layer_below_a_dropout_is_a_node_of_its_own():
    layer, x = make(k=200, n=200, dropout=0.5).train(), torch.randn(5, 200).requires_grad_()
    y = layer(x)  # torch 2.10's nodes do not outlive their tensor
    nodes = [node for node, _ in y.grad_fn.next_functions if node is not None]
    in_c = _C.info()["isa"].startswith("avx")
    assert (nodes[0].name() == "_LowRankBackward") == in_c
    x = torch.randn(5, 200)
    assert layer(x).requires_grad and inputs_of(layer(x)) == {"AccumulateGrad"}
