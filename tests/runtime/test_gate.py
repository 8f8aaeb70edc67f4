"""The gate: every condition flips the path, and the result stays that of the composed path."""

import contextlib

import pytest
import torch
from torch import nn
from toy_layer import ToyLayer, close, make

import peft_c
from peft_c import _C, fast


def check(layer, x, path, name):
    """The gate says so, and the layer's result equals its composed path."""
    assert _C.gate(layer, x)[:2] == (path, name)
    torch.manual_seed(3)
    expected = layer.composed(x)
    torch.manual_seed(3)
    actual = layer(x)
    close(actual.detach(), expected.detach())
    assert actual.requires_grad == expected.requires_grad
    return actual


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(5, 24)


def test_plain_layer(x):
    check(make(), x, "C", "OK")
    path, name, reason = _C.gate(make())
    assert (path, name) == ("C", "OK") and reason


def test_states(x):
    layer = make(adapters=("a", "b"))
    layer._active_adapter = ["b"]
    check(layer, x, "C", "OK")
    layer._active_adapter = "a"
    assert _C.gate(layer, x)[0] == "C"
    layer._active_adapter = ["absent"]
    check(layer, x, "base", "NO_ADAPTER")
    layer._active_adapter = []
    check(layer, x, "base", "NO_ADAPTER")
    layer.merged_adapters = ["a"]
    check(layer, x, "merged", "MERGED")
    layer._disable_adapters = True
    assert _C.gate(layer, x)[:2] == ("composed", "DISABLED_MERGED")
    assert _C.lowrank_forward(layer, x, (), {}) is NotImplemented
    layer.merged_adapters = []
    check(layer, x, "disabled", "DISABLED")


def test_class_attributes_are_the_defaults(x):
    class Defaults(ToyLayer):
        merged_adapters, _disable_adapters, _active_adapter = (), False, ("default",)

    layer = Defaults(nn.Linear(24, 40))
    for name in ("merged_adapters", "_disable_adapters", "_active_adapter"):
        del layer.__dict__[name]
    check(layer, x, "C", "OK")


def test_switch(x):
    layer = make()
    assert fast.is_fast()
    with fast.fast_paths(False):
        assert not fast.is_fast()
        check(layer, x, "composed", "SWITCHED_OFF")
        with fast.fast_paths(True):
            check(layer, x, "C", "OK")
        assert not fast.is_fast()
    assert fast.is_fast()
    with pytest.raises(ZeroDivisionError), fast.fast_paths(False):
        raise ZeroDivisionError
    assert fast.is_fast()


def forward_hook(module):
    return module.register_forward_hook(lambda m, args, out: out * 3)


def pre_hook(module):
    return module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def backward_hook(module):
    return module.register_full_backward_hook(lambda m, gi, go: None)


def backward_pre_hook(module):
    return module.register_full_backward_pre_hook(lambda m, go: None)


def own_forward(module):
    module.forward = lambda x: nn.Linear.forward(module, x) + 1


@pytest.mark.parametrize("hook", [forward_hook, pre_hook, backward_hook, backward_pre_hook, own_forward])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_hooks_on_factors(x, part, hook):
    layer = make()
    handle = hook(getattr(layer, part)["default"])
    check(layer, x, "composed", "FACTOR_HOOKS")
    if handle is not None:
        handle.remove()
        check(layer, x, "C", "OK")


@pytest.mark.parametrize("hook", [forward_hook, pre_hook, own_forward])
def test_hooks_on_the_base_run_and_forbid_writing_in_place(x, hook):
    layer = make()
    if hook is own_forward:
        layer.base_layer.forward = lambda v: nn.Linear.forward(layer.base_layer, v) + 1
    else:
        hook(layer.base_layer)
    check(layer, x, "C", "OK")


def test_hooks_on_dropout(x):
    layer = make()
    forward_hook(layer.lora_dropout["default"])
    check(layer, x, "composed", "DROPOUT")


@pytest.mark.parametrize(
    "register",
    [
        lambda: nn.modules.module.register_module_forward_hook(lambda m, args, out: None),
        lambda: nn.modules.module.register_module_forward_pre_hook(lambda m, args: None),
        lambda: nn.modules.module.register_module_full_backward_hook(lambda m, gi, go: None),
    ],
)
def test_global_hooks(x, register):
    layer = make()
    handle = register()
    try:
        check(layer, x, "composed", "GLOBAL_HOOKS")
    finally:
        handle.remove()
    check(layer, x, "C", "OK")


def test_factor_types(x):
    class MyLinear(nn.Linear):
        pass

    layer = make()
    layer.lora_A["default"] = MyLinear(24, 4, bias=False)
    check(layer, x, "composed", "FACTOR_TYPE")
    layer = make()
    nn.utils.parametrizations.weight_norm(layer.lora_B["default"])
    check(layer, x, "composed", "FACTOR_TYPE")
    layer = make()
    layer.lora_B["default"] = nn.Linear(4, 40, bias=True)
    check(layer, x, "composed", "FACTOR_BIAS")
    layer = make()
    layer.lora_variant["default"] = object()
    check(layer, x, "composed", "VARIANT")
    layer = make(adapters=[f"a{i}" for i in range(17)], r=1)
    check(layer, x, "composed", "TOO_MANY")


def test_factor_weights(x):
    class Sub(nn.Parameter):
        pass

    layer = make()
    layer.lora_A["default"].weight = Sub(layer.lora_A["default"].weight.data)
    check(layer, x, "composed", "FACTOR_TENSOR")
    layer = make()
    layer.lora_A["default"].to("meta")
    path, name, reason = _C.gate(layer)
    assert (path, name) == ("composed", "FACTOR_VIEW") and "meta device" in reason
    layer = make()
    layer.lora_A["default"].double()
    assert _C.gate(layer, x)[1] == "FACTOR_DTYPE"
    layer = make()
    layer.lora_A["default"] = nn.Linear(23, 4, bias=False)
    assert _C.gate(layer, x)[1] == "FACTOR_SHAPE"
    with pytest.raises(RuntimeError):
        layer(x)
    layer = make()
    layer.lora_A["default"] = nn.Linear(24, 3, bias=False)
    assert _C.gate(layer, x)[1] == "FACTOR_SHAPE"


def test_scaling(x):
    layer = make()
    layer.scaling["default"] = 2
    check(layer, x, "C", "OK")
    layer.scaling["default"] = torch.tensor(0.25)
    check(layer, x, "composed", "SCALING")
    del layer.scaling["default"]
    assert _C.gate(layer, x)[1] == "SCALING"


def test_dropout_modules(x):
    layer = make(dropout=0.5)
    check(layer.eval(), x, "C", "OK")
    check(layer.train(), x, "C", "OK")
    layer.lora_dropout["default"] = nn.Dropout(0.5, inplace=True)
    assert _C.gate(layer, x)[1] == "DROPOUT"
    layer.lora_dropout["default"] = nn.AlphaDropout(0.5)
    check(layer, x, "composed", "DROPOUT")


def test_input_casting_off(x):
    layer = make(dtype=torch.bfloat16, adapter_dtype=torch.float32)
    layer.cast_input_dtype_enabled = True
    assert _C.gate(layer, x.bfloat16())[1] == "OK"
    layer.cast_input_dtype_enabled = False
    assert _C.gate(layer, x.bfloat16())[1] == "CAST_OFF"


def test_inputs(x):
    class Sub(torch.Tensor):
        pass

    layer = make()
    check(layer, x.as_subclass(Sub), "composed", "INPUT_TENSOR")
    assert _C.gate(layer, None)[1] == "INPUT_TENSOR"
    assert _C.gate(layer, torch.zeros(3, 24, device="meta"))[1] == "INPUT_VIEW"
    assert _C.gate(layer, x.long())[1] == "INPUT_VIEW"
    assert _C.gate(layer, torch.tensor(1.0))[1] == "FACTOR_SHAPE"
    check(layer, torch._neg_view(x), "composed", "INPUT_VIEW")
    check(layer, nn.Parameter(x), "C", "OK")


@pytest.mark.parametrize("kwargs", [{"adapter_names": ["default"]}, {"alora_offsets": [1]}])
def test_special_arguments(x, kwargs):
    assert _C.lowrank_forward(make(), x, (), kwargs) is NotImplemented


def test_replaced_linear_forward(x, monkeypatch):
    layer = make()
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, v: original(self, v) * 2)
    check(layer, x, "composed", "LINEAR_PATCHED")


class FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class DispatchMode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("ambient", "name"),
    [
        (lambda: torch.autocast("cpu", torch.bfloat16), "AUTOCAST"),
        (FunctionMode, "MODE"),
        (DispatchMode, "MODE"),
        (torch.autograd.forward_ad.dual_level, "FORWARD_AD"),
        (lambda: torch.device("cpu"), "MODE"),
    ],
    ids=["autocast", "function", "dispatch", "forward-ad", "device"],
)
def test_surroundings(x, ambient, name):
    layer = make()
    with ambient():
        assert _C.gate(layer, x)[:2] == ("composed", name)
        actual, expected = layer(x), layer.composed(x)
    assert torch.equal(actual, expected)
    check(layer, x, "C", "OK")


def test_autocast_disabled_inside_is_fine(x):
    layer = make()
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        check(layer, x, "C", "OK")


def test_functorch(x):
    layer = make()
    weight = layer.lora_A["default"].weight
    seen = []

    def loss(v):
        seen.append(_C.gate(layer, v)[1])
        return layer(v).pow(2).sum()

    expected = torch.autograd.grad(layer.composed(leaf := x.clone().requires_grad_()).pow(2).sum(), leaf)[0]
    close(torch.func.grad(loss)(x), expected, 10)
    close(torch.vmap(layer)(x), layer.composed(x))
    close(torch.func.jvp(loss, (x,), (x,))[1], (expected * x).sum(), 10)

    def functional(params):
        return torch.func.functional_call(layer, params, (x,)).sum()

    params = {"lora_A.default.weight": weight.detach() * 2}
    grads = torch.func.grad(functional)(params)
    assert grads["lora_A.default.weight"].shape == weight.shape
    assert set(seen) <= {"FUNCTORCH", "FORWARD_AD"}


def test_jit_trace(x):
    layer = make().eval()
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        close(traced(x * 2), layer(x * 2))


@pytest.mark.parametrize("training", [False, True])
def test_compile_fullgraph(x, training):
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with contextlib.nullcontext() if training else torch.no_grad():
        close(compiled(x).detach(), layer(x).detach())
    if training:
        compiled(x).sum().backward()
        assert layer.lora_B["default"].weight.grad is not None


def test_export(x):
    layer = make().eval()
    program = torch.export.export(layer, (x,))
    close(program.module()(x).detach(), layer(x).detach())


def test_other_objects_have_no_c_path(x):
    assert _C.gate(nn.Linear(2, 2))[:2] == ("composed", "NOT_LOWRANK")
    assert _C.gate(object())[:2] == ("composed", "NOT_LOWRANK")
    assert _C.lowrank_forward(nn.Linear(2, 2), x) is NotImplemented


@pytest.mark.parametrize("broken", ["lora_A", "lora_B", "base_layer", "lora_dropout"])
def test_missing_parts(x, broken):
    layer = make()
    del layer._modules[broken]
    assert _C.gate(layer, x)[0] == "composed" or broken == "lora_dropout"


def test_odd_attributes(x):
    for name, value in [("_active_adapter", 3), ("_active_adapter", [[]]), ("scaling", None), ("_modules", 7)]:
        layer = make()
        layer.__dict__[name] = value
        assert _C.gate(layer, x)[0] in ("composed", "base"), name


def test_a_compiled_or_shadowed_base_is_called_as_a_module():
    """The base's own call is left out only where it would be F.linear and nothing else."""
    model = peft_c.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), peft_c.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    ).eval()
    layer, x = model.base_model.model[0], torch.randn(70, 8)  # rows for which F.linear is what C calls, too
    base = layer.base_layer
    with torch.no_grad():
        before = layer(x)
        calls = []
        base.__dict__["_compiled_call_impl"] = lambda *args: calls.append(1) or base._call_impl(*args)
        assert torch.equal(layer(x), before) and calls == [1]
        base.__dict__["_compiled_call_impl"] = None
        base.__dict__["weight"] = torch.zeros(8, 8)  # hides the parameter
        adapted = layer(x)
        assert torch.allclose(
            adapted - base(x), before - nn.functional.linear(x, base._parameters["weight"], base.bias), atol=1e-5
        )
        del base.__dict__["weight"]
        assert torch.equal(layer(x), before)
