"""The C forward equals the composed path: dtypes, shapes, strides, adapters, and what it may write into."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_layer import ToyLayer, close, make

from peft_c import _C

PAIRS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
]


def both(layer, x, *args, **kwargs):
    actual = _C.lowrank_forward(layer, x, args, kwargs)
    assert actual is not NotImplemented
    return actual, layer.composed(x, *args, **kwargs)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0]}+{p[1]}".replace("torch.", ""))
@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (2, 3, 2), (2, 1, 2, 2)], ids=str)
@torch.no_grad()
def test_dtypes_and_leading_dims(pair, lead):
    layer = make(dtype=pair[0], adapter_dtype=pair[1])
    actual, expected = both(layer, torch.randn(*lead, 24, dtype=pair[0]))
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if pair == (torch.float32, torch.bfloat16):  # composed rounds x and the term to bfloat16, C does not
        actual, expected = actual.bfloat16(), expected.bfloat16()
    close(actual, expected)


@pytest.mark.parametrize("rows", [9, 300])
@torch.no_grad()
def test_mixed_precision_rounds_once(rows):
    layer = make(k=200, n=200, dtype=torch.bfloat16, adapter_dtype=torch.float32, adapters=("a", "b", "c"))
    x, base = torch.randn(rows, 200, dtype=torch.bfloat16), layer.base_layer
    isa = _C.info()["isa"]
    whole = isa == "avx2" or (rows == 9 and isa == "avx512bf16")  # the base layer's output is not rounded by itself
    exact = F.linear(x.double(), base.weight.double(), base.bias.double()) if whole else base(x).double()
    for name in "abc":
        exact = (
            exact
            + (x.double() @ layer.lora_A[name].weight.double().T)
            @ layer.lora_B[name].weight.double().T
            * (layer.scaling[name])
        )
    actual = _C.lowrank_forward(layer, x)
    assert (actual != exact.bfloat16()).float().mean() < 0.02  # at most a rounding tie apart


@pytest.mark.parametrize("k", [1, 3, 24, 65])
@pytest.mark.parametrize("r", [1, 2, 5, 33])
@torch.no_grad()
def test_odd_sizes(k, r):
    layer = make(k=k, n=2 * k + 1, r=r)
    actual, expected = both(layer, torch.randn(6, k))
    close(actual, expected)


@torch.no_grad()
def test_empty_batches_and_no_features():
    actual, expected = both(make(), torch.zeros(0, 24))
    assert actual.shape == expected.shape == (0, 40)
    actual, expected = both(make(), torch.zeros(2, 0, 24))
    assert actual.shape == expected.shape


@torch.no_grad()
def test_large_enough_for_threads():
    layer = make(k=300, n=500, r=8)
    actual, expected = both(layer, torch.randn(130, 300))
    close(actual, expected, 10)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _C.lowrank_forward(layer, torch.ones(130, 300))
    finally:
        torch.set_num_threads(threads)
    close(alone, _C.lowrank_forward(layer, torch.ones(130, 300)))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[..., :24],
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x.permute(2, 1, 0)[:24].permute(1, 2, 0),
        lambda x: x[0, 0].expand(5, -1),
    ],
)
@torch.no_grad()
def test_strided_inputs(view):
    x = view(torch.randn(4, 6, 48))[..., :24]
    actual, expected = both(make(), x)
    close(actual, expected)


@torch.no_grad()
def test_several_adapters():
    layer = make(adapters=("a", "b", "c"))
    for active in (["a", "b", "c"], ["c", "a"], ["b"], ["b", "absent"], ("a", "b"), ["a", "a"]):
        layer._active_adapter = active
        actual, expected = both(layer, torch.randn(5, 24))
        close(actual, expected)


@torch.no_grad()
def test_live_objects_at_each_call():
    layer, x = make(), torch.randn(3, 24)
    first = layer(x)
    layer.scaling["default"] *= 2
    close(layer(x), layer.composed(x))
    layer.lora_A["default"].weight.data = torch.randn(4, 24)
    close(layer(x), layer.composed(x))
    layer.lora_B["default"].weight = nn.Parameter(torch.randn(48, 40)[:4].T)
    close(layer(x), layer.composed(x))
    layer.base_layer = nn.Linear(24, 40)
    close(layer(x), layer.composed(x))
    assert not torch.equal(first, layer(x))


class TwoArguments(nn.Linear):
    def forward(self, x, scale=1.0, *, shift=0.0):
        return super().forward(x) * scale + shift


@torch.no_grad()
def test_arguments_reach_the_base():
    layer = ToyLayer(TwoArguments(24, 40))
    actual, expected = both(layer, torch.randn(3, 24), 2.0, shift=1.0)
    close(actual, expected)
    with pytest.raises(TypeError, match="wrong"):
        layer(torch.randn(3, 24), wrong=1)


def test_wrong_calls():
    layer = make()
    for arguments in [
        (),
        (layer,),
        (layer, torch.zeros(24), []),
        (layer, torch.zeros(24), (), ()),
        (layer, 1, (), {}, 1),
    ]:
        with pytest.raises(TypeError):
            _C.lowrank_forward(*arguments)


def test_errors_of_the_base_pass_through():
    class Broken(nn.Linear):
        def forward(self, x):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _C.lowrank_forward(ToyLayer(Broken(24, 40)), torch.zeros(3, 24))


class Keeps(nn.Linear):
    """A base that keeps what it returns."""

    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.in_features, self.out_features = function, 24, 24

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("grad", [False, True])
def test_outputs_that_others_hold_are_not_written_to(grad):
    with torch.set_grad_enabled(grad):
        layer = ToyLayer(Keeps(24, 40))
        x = torch.randn(3, 24)
        result = layer(x)
        close(layer.base_layer.kept.detach(), layer.base_layer(x).detach())
        close(result.detach(), layer.composed(x).detach())

        hooked, held = make(), []
        hooked.base_layer.register_forward_hook(lambda m, args, out: held.append(out))
        result = hooked(x)
        close(held[0], nn.functional.linear(x, hooked.base_layer.weight, hooked.base_layer.bias))

        layer = ToyLayer(Returns(lambda v: v))
        before = x.clone()
        close(layer(x).detach(), layer.composed(x).detach())
        assert torch.equal(x, before)

        store = torch.zeros(6, 24)
        layer = ToyLayer(Returns(lambda v: store[::2]))
        assert layer(x).abs().sum() > 0 and store.abs().sum() == 0
        layer = ToyLayer(Returns(lambda v: store[:1].expand(3, 24)))
        assert layer(x).shape == (3, 24) and store.abs().sum() == 0


class Sub(torch.Tensor):
    pass


@pytest.mark.parametrize("grad", [False, True])
def test_outputs_that_c_cannot_use_are_composed(grad):
    with torch.set_grad_enabled(grad):
        x = torch.randn(3, 24)
        for function in (
            lambda v: v.as_subclass(Sub),
            lambda v: v[0],
            lambda v: torch._neg_view(v),
            lambda v: v.double().float().unsqueeze(0),
        ):
            layer = ToyLayer(Returns(function))
            actual, expected = both(layer, x)
            close(actual.detach().as_subclass(torch.Tensor), expected.detach().as_subclass(torch.Tensor))
            assert type(actual) is type(expected)
        layer = ToyLayer(Returns(lambda v: v.t().contiguous().t()))
        actual, expected = both(layer, x)
        close(actual.detach(), expected.detach())


@torch.no_grad()
def test_base_that_removes_the_adapter_while_running():
    def sabotage(v):
        layer.lora_A["default"].weight.data = torch.zeros(4, 7)
        return v

    layer = ToyLayer(Returns(sabotage))
    with pytest.raises(RuntimeError, match="shapes"):
        layer(torch.randn(3, 24))

    def drop(v):
        layer.lora_A.clear()
        layer.lora_B.clear()
        return v * 1

    layer = ToyLayer(Returns(drop))
    assert layer(torch.randn(3, 24)).shape == (3, 24)


@torch.inference_mode()
def test_inference_mode():
    layer = make()
    x = torch.randn(3, 24)
    actual, expected = both(layer, x)
    close(actual, expected)
    assert actual.is_inference()


def test_apply_checks_its_operands():
    x, y = torch.randn(3, 24), torch.zeros(3, 40)
    factors = (torch.randn(4, 24), torch.randn(40, 4))
    _C.lowrank_apply(y, x, None, (2.0,), factors)
    close(y, 2 * x @ factors[0].T @ factors[1].T)
    for bad in [
        (y[0].expand(3, 40), x, None, (1.0,), factors),
        (y, x[:2], None, (1.0,), factors),
        (y, x, None, (1.0,), factors[::-1]),
        (y, x, None, (1.0, 2.0), factors),
        (y, x, torch.zeros(3, 5), (1.0,), factors),
        (torch.zeros(()), x, None, (1.0,), factors),
    ]:
        before = y.clone()
        with pytest.raises(ValueError):
            _C.lowrank_apply(*bad)
        assert torch.equal(y, before)
    with pytest.raises(TypeError):
        _C.lowrank_apply(y, x, None, ("a",), factors)
    with pytest.raises(TypeError):
        _C.lowrank_apply(y.long(), x, None, (1.0,), factors)


@torch.no_grad()
def test_threads():
    from concurrent.futures import ThreadPoolExecutor

    layer = make(k=64, n=64)
    x = torch.randn(16, 64)
    expected = layer.composed(x)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: layer(x), range(400)):
            close(result, expected)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0]}+{p[1]}".replace("torch.", ""))
def test_terms_given_at_the_call(pair):
    layer = make(dtype=pair[0], adapter_dtype=pair[1], adapters=("a", "b")).requires_grad_(False)
    terms = [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in "ab"]
    x = torch.randn(5, 24, dtype=pair[0])
    assert torch.equal(_C.lowrank_terms(layer, x, terms, (), {}), _C.lowrank_forward(layer, x))
    A, B, scale = terms[0]
    refused = ((A[:, 1:].clone(), B, scale), (A, B.int(), scale))
    assert all(_C.lowrank_terms(layer, x, [term], (), {}) is NotImplemented for term in refused)
    assert _C.lowrank_terms(layer, x, terms * 9, (), {}) is NotImplemented
    with torch.autocast("cpu"):
        assert _C.lowrank_terms(layer, x, terms, (), {}) is NotImplemented
    for wrong in (terms[0], [terms[0][:2]], [(A, B, "x")], [3]):
        with pytest.raises(TypeError):
            _C.lowrank_terms(layer, x, wrong, (), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_given_at_the_call_in_a_graph(dtype):
    """One node with the base layer, whose fp32 bits stay torch's."""
    layer = make(k=256, n=192, dtype=dtype).requires_grad_(False)
    x = torch.randn(2, 20, 256, dtype=dtype, requires_grad=True)
    A, B = ((torch.randn(size) / 16).to(dtype).requires_grad_() for size in ((4, 256), (192, 4)))
    results = []
    for y in (_C.lowrank_terms(layer, x, [(A, B, 0.5)], (), {}), layer.base_layer(x) + x @ A.T @ B.T * 0.5):
        results.append((y, *torch.autograd.grad(y.float().mean(), (x, A, B))))
    assert results[0][0].grad_fn.name() == "_LowRankBackward"
    for one, other in zip(*results, strict=True):
        close(one, other)
    with torch.no_grad():
        B.zero_()
    unchanged = _C.lowrank_terms(layer, x, [(A, B, 0.5)], (), {})
    assert dtype != torch.float32 or torch.equal(unchanged, layer.base_layer(x))


@pytest.mark.parametrize("rows", [1, 7, 64, 65])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_layer_and_terms_for_few_and_many_rows(rows, bias, dtype):
    layer = make(k=300, n=170, bias=bias, dtype=dtype, adapters=("a", "b"))
    for x in (torch.randn(rows, 300), torch.randn(300, rows).t(), torch.randn(1, rows, 600)[..., ::2]):
        with torch.no_grad():
            close(*both(layer, x.to(dtype)), 2)
    layer.base_layer.weight = nn.Parameter(torch.randn(300, 170, dtype=dtype).t() / 10, requires_grad=False)
    with torch.no_grad():
        close(*both(layer, torch.randn(rows, 300, dtype=dtype)), 2)
    with torch.inference_mode():
        assert layer(torch.randn(rows, 300, dtype=dtype)).is_inference()
    with pytest.raises(RuntimeError), torch.no_grad():  # as F.linear has it
        layer(torch.randn(rows, 300, dtype=torch.bfloat16 if dtype == torch.float32 else torch.float32))


@pytest.mark.parametrize("rows", [1, 8])
def test_small_layers_keep_the_bits_of_torch(rows):
    layer, x = make(k=100, n=70), torch.randn(rows, 100)
    nn.init.zeros_(layer.lora_B["default"].weight)
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base_layer(x))


def test_linear_grad_is_the_product():
    for rows in (2, 8, 16):
        g, weight = torch.randn(rows, 600), torch.randn(600, 500)
        A, B, u = torch.randn(7, 500), torch.randn(600, 7), torch.empty(rows, 7)
        found = _C.linear_grad(g, weight)
        assert (found is not None) == _C.info()["isa"].startswith("avx")
        if found is not None:
            close(found, g @ weight, 30)
            close(_C.linear_grad(g.view(2, -1, 600), weight), found.view(2, -1, 500), 30)
            close(_C.linear_grad(g.t().contiguous().t(), weight), found)
            close(_C.linear_grad(g, weight, u, (0.5,), (A, B)), g @ weight + 0.5 * (g @ B) @ A, 60)
            close(u, g @ B, 30)
    assert _C.linear_grad(torch.randn(8, 600), weight.t()[:500, :600]) is None
    assert _C.linear_grad(torch.randn(8, 5), torch.randn(5, 5)) is None
    assert _C.linear_grad(g, weight, None, (0.5,), (A, B[:500])) is None
    assert _C.linear_grad(torch.randn(8, 600, device="meta"), weight) is None
    with pytest.raises(ValueError):
        _C.lowrank_linear(g.to("meta"), weight.t(), None, None, (), ())
