"""Every layer type against the installed peft: the same numbers drawn, the same outputs, gradients, merges, scales."""

import copy
import warnings

import pytest
import torch
from layer_cases import CASES, GROUPED, build, layer_of
from torch import nn

import peft_c

peft = pytest.importorskip("peft")

ALL = CASES | GROUPED
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def both(case, **options):
    (ours, x), (theirs, _) = (build(package, case, **options) for package in (peft_c, peft))
    return ours, theirs, x


def assert_equal_states(ours, theirs, exact=True):
    mine, other = ours.state_dict(), theirs.state_dict()
    assert sorted(mine) == sorted(other)  # PEFT moves the weights of a MultiheadAttention to the end
    for key in other:
        if exact:
            assert torch.equal(mine[key], other[key]), key
        else:
            torch.testing.assert_close(mine[key], other[key], **TOLERANCE)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("name", ALL)
def test_state_dict_and_random_numbers(name, init):
    if init == "gaussian" and "lora_bias" in name:
        return  # the config refuses
    ours, theirs, _ = both(ALL[name], init=init)
    assert_equal_states(ours, theirs)
    ours, theirs, _ = both(ALL[name], init=init, adapters=("default", "other"))
    assert_equal_states(ours, theirs)


@pytest.mark.parametrize("name", ["linear", "linear_3d", "linear_rslora", "linear_dora", "conv1d_transformers"])
@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
def test_init_schemes_keep_the_output(name, init):
    if init == "olora" and "transformers" in name:
        return  # PEFT decomposes the transposed weight
    ours, theirs, x = both(ALL[name], init=init)
    torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)


@pytest.mark.parametrize("name", ALL)
def test_forward_and_gradients(name):
    # in an attention layer of PEFT only the last of several adapters gets gradients
    adapters = ("default",) if "mha" in name else ("default", "other")
    ours, theirs, x = both(ALL[name], adapters=adapters)
    for model in (ours, theirs):
        model.base_model.set_adapter(list(adapters))
    outputs = []
    for model in (ours, theirs):
        model.train()
        inputs = x.clone().requires_grad_(x.is_floating_point())
        y = model(inputs)
        y.square().sum().backward()
        outputs.append((y, inputs.grad))
    torch.testing.assert_close(outputs[0], outputs[1], **TOLERANCE)
    grads = {key: p.grad for key, p in theirs.named_parameters() if p.requires_grad}
    mine = {key: p.grad for key, p in ours.named_parameters() if p.requires_grad}
    assert mine.keys() == grads.keys() and grads
    for key, grad in grads.items():
        torch.testing.assert_close(mine[key], grad, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", [name for name in CASES if "dora" not in name])
def test_forward_in_other_dtypes(name, dtype):
    ours, theirs, x = both(CASES[name], dtype=dtype)
    got, expected = ours(x), theirs(x)
    assert got.dtype == expected.dtype == dtype
    atol = {torch.bfloat16: 6e-2, torch.float16: 8e-3, torch.float64: 1e-9}[dtype] * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_merge_and_unmerge(name, safe_merge):
    ours, theirs, x = both(CASES[name])
    before = ours(x)
    deltas = [layer_of(model).get_delta_weight("default") for model in (ours, theirs)]
    torch.testing.assert_close(*deltas, **TOLERANCE)
    for model in (ours, theirs):
        model.base_model.merge_adapter(safe_merge=safe_merge)
    assert layer_of(ours).merged_adapters == layer_of(theirs).merged_adapters == ["default"]
    assert_equal_states(ours, theirs, exact=False)
    torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)
    torch.testing.assert_close(ours(x), before, rtol=1e-3, atol=1e-4)
    for model in (ours, theirs):
        model.base_model.unmerge_adapter()
    assert layer_of(ours).merged_adapters == []
    assert_equal_states(ours, theirs, exact=False)
    torch.testing.assert_close(ours(x), before)


@pytest.mark.parametrize("name", CASES)
def test_merge_and_unload(name):
    ours, theirs, x = both(CASES[name])
    ours, theirs = ours.merge_and_unload(), theirs.merge_and_unload()
    assert type(ours.layer) is type(theirs.layer)
    assert_equal_states(ours, theirs, exact=False)
    torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_convolutions_do_not_merge(name):
    ours, _ = build(peft_c, GROUPED[name])
    weight = layer_of(ours).base_layer.weight.clone()
    with pytest.raises(NotImplementedError, match="groups > 1"):
        layer_of(ours).merge()
    assert torch.equal(layer_of(ours).base_layer.weight, weight) and not layer_of(ours).merged


@pytest.mark.parametrize("name", [name for name in CASES if "embedding" not in name])
def test_scales(name):
    ours, theirs, x = both(CASES[name], adapters=("default", "other"))
    for call in (
        lambda layer: layer.set_scale("default", 0.5),
        lambda layer: layer.set_scale("missing", 0.5),
        lambda layer: layer.scale_layer(3.0),
        lambda layer: layer.unscale_layer(2),
        lambda layer: layer.unscale_layer(),
    ):
        call(layer_of(ours)), call(layer_of(theirs))
        assert layer_of(ours).scaling == layer_of(theirs).scaling
        torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)


def test_scale_layer_reaches_embeddings():
    model, x = build(peft_c, CASES["embedding"])
    base = layer_of(model).base_layer(x)
    term = model(x) - base
    layer_of(model).scale_layer(3.0)
    torch.testing.assert_close(model(x) - base, 3 * term, **TOLERANCE)
    layer_of(model).unscale_layer()
    torch.testing.assert_close(model(x) - base, term, **TOLERANCE)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("embedding", "conv")) and "dora" not in n])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_for_each_row(name, dtype):
    """Also under autograd, and with one of another scale."""
    ours, theirs, x = both(CASES[name], adapters=("default", "other", "third"))
    x = x.to(dtype) if x.is_floating_point() else x
    for model in (ours, theirs):
        layer_of(model).base_layer.to(dtype)
    names = (["default", "third", "other"] * 3)[: len(x)]
    tolerance = {"atol": 5e-2, "rtol": 5e-2} if dtype == torch.bfloat16 else TOLERANCE
    for scale in (1.0, 2.0):
        layer_of(ours).set_scale("other", scale), layer_of(theirs).set_scale("other", scale)
        actual, expected = ours.eval()(x, adapter_names=names), theirs.eval()(x, adapter_names=names)
        assert actual.dtype == expected.dtype == dtype
        torch.testing.assert_close(actual, expected, **tolerance)
        for model, output in ((ours, actual), (theirs, expected)):
            model.zero_grad()
            output.float().square().mean().backward()
        grads = [dict(model.named_parameters()) for model in (ours, theirs)]
        for key, parameter in grads[0].items():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, grads[1][key].grad, **tolerance)


@pytest.mark.parametrize("name", [n for n in CASES if "dora" not in n and "mha" not in n and "parameter" not in n])
def test_mixed_batch(name):
    ours, theirs, x = both(CASES[name], adapters=("default", "other"))
    names = (["default", "__base__", "other", "default"] * 2)[: len(x)]
    with torch.no_grad():
        mixed = ours(x, adapter_names=names)
        torch.testing.assert_close(mixed, theirs(x, adapter_names=names), **TOLERANCE)
        rows = {}
        for adapter in ("default", "other"):
            ours.set_adapter(adapter)
            rows[adapter] = ours(x)
        with ours.disable_adapter():
            rows["__base__"] = ours(x)
    for i, adapter in enumerate(names):
        torch.testing.assert_close(mixed[i], rows[adapter][i], **TOLERANCE)


def test_mixed_batch_errors():
    model, x = build(peft_c, CASES["linear"])
    layer = layer_of(model)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(x, adapter_names=["default"])
    layer.merge()
    with pytest.raises(ValueError, match="merged adapters"):
        layer(x, adapter_names=["default"] * 4)
    model, x = build(peft_c, CASES["linear_dora"])
    with pytest.raises(ValueError, match="DoRA"):
        layer_of(model)(x, adapter_names=["default"] * 4)
    model, x = build(peft_c, CASES["mha"])
    with pytest.raises(TypeError, match="does not support mixed adapter batches"):
        layer_of(model)(x, x, x, adapter_names=["default"] * 4)


def test_mixed_batch_leaves_a_held_output_alone():
    model, x = build(peft_c, CASES["linear"])
    held = []
    layer_of(model).base_layer.register_forward_hook(lambda module, args, output: held.append(output))
    with torch.no_grad():
        base = nn.functional.linear(x, layer_of(model).weight, layer_of(model).bias)
        layer_of(model)(x, adapter_names=["default"] * 4)
    torch.testing.assert_close(held[0], base)


@pytest.mark.parametrize("name", CASES)
def test_attributes_and_repr(name):
    ours, theirs, _ = both(CASES[name])
    mine, other = layer_of(ours), layer_of(theirs)
    public = {key for key in vars(other) if not key.startswith("_")}
    assert public <= set(vars(mine))
    for key in ("r", "lora_alpha", "scaling", "use_dora", "use_rslora", "lora_bias", "in_features", "out_features"):
        assert getattr(mine, key) == getattr(other, key), key
    assert repr(mine) == repr(other).replace("lora.dora.lora.dora.", "lora.dora.")


def test_names_of_the_module():
    import peft.tuners.lora.layer as theirs

    import peft_c.tuners.lora.layer as ours

    names = {n for n, v in vars(theirs).items() if getattr(v, "__module__", "") == theirs.__name__}
    assert names | {"VARIANT_KWARG_KEYS"} <= set(vars(ours))
    for name in names:
        mine, other = getattr(ours, name), getattr(theirs, name)
        if isinstance(other, type):
            public = {key for key in vars(other) if not key.startswith("__")} - {"named_modules", "state_dict"}
            missing = [key for key in public if not hasattr(mine, key)]
            assert not missing, (name, missing)


def test_mha_forward_does_not_touch_the_weights():
    model, x = build(peft_c, CASES["mha"])
    layer = layer_of(model)
    base = layer.base_layer
    before = {key: (p, p.data_ptr(), p._version, p.clone()) for key, p in base.named_parameters()}
    keys = list(model.state_dict())
    model(x).sum().backward()
    for key, p in base.named_parameters():
        same, pointer, version, values = before[key]
        assert p is same and p.data_ptr() == pointer and p._version == version and torch.equal(p, values)
    assert list(model.state_dict()) == keys


def test_mha_gives_all_active_adapters_gradients():
    model, x = build(peft_c, CASES["mha"], adapters=("default", "other"))
    model.base_model.set_adapter(["default", "other"])
    model(x).sum().backward()
    grads = [p.grad for key, p in layer_of(model).named_parameters() if p.requires_grad]
    assert len(grads) == 8 and all(grad is not None and grad.any() for grad in grads)


def test_mha_raises_when_only_its_projection_is_merged():
    model, x = build(peft_c, CASES["mha"])
    layer_of(model).base_layer.out_proj.merge()
    with pytest.raises(ValueError, match="merged layers"):
        model(x)


def test_mha_keeps_the_base_after_an_exception():
    model, x = build(peft_c, CASES["mha"])
    base = layer_of(model).base_layer
    with pytest.raises(TypeError):
        layer_of(model)(x, x[:1], x, bad=1)
    assert "in_proj_weight" not in base.__dict__ and isinstance(base.in_proj_weight, nn.Parameter)


@pytest.mark.parametrize("name", ["parameter_experts", "parameter_2d"])
def test_parameter_forward_keeps_the_order_of_parameters(name):
    model, x = build(peft_c, CASES[name])
    order = [key for key, _ in model.named_parameters()]
    model(x)
    assert [key for key, _ in model.named_parameters()] == order
    assert type(layer_of(model).get_base_layer()).__name__ in ("Linear", "Experts")  # not left parametrized


def test_experts_with_an_own_parametrization():
    class Plus(nn.Module):
        def forward(self, x):
            return x + 1

    make, make_x, config = CASES["parameter_experts"]

    def parametrized():
        model = make()
        nn.utils.parametrize.register_parametrization(model.layer, "weight", Plus())
        return model

    model, x = build(peft_c, (parametrized, make_x, config))
    layer = layer_of(model)
    bare = layer.get_param().clone()
    expected = torch.einsum("bk,enk->ebn", x, bare + layer.get_delta_weight("default"))
    for _ in range(2):
        torch.testing.assert_close(model(x), expected, **TOLERANCE)
    torch.testing.assert_close(layer.get_param(), bare)
    with pytest.raises(ValueError, match="parametrized"):
        layer.merge()


def test_a_failed_adapter_leaves_no_trace():
    model, x = build(peft_c, CASES["linear"])
    layer = layer_of(model)
    before, keys = model(x), list(layer.state_dict())
    for options, error in (({"r": 0}, ValueError), ({"r": 3, "init_lora_weights": "orthogonal"}, ValueError)):
        r = options.pop("r")
        with pytest.raises(error):
            layer.update_layer("bad", r, lora_alpha=1, config=peft_c.LoraConfig(**options))
        assert "bad" not in layer.r and list(layer.state_dict()) == keys and "bad" not in layer.scaling
    assert torch.equal(model(x), before)


def test_dropout_draws_the_same_numbers():
    ours, theirs, x = both(CASES["linear"], lora_dropout=0.5)
    outputs = []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(1)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, **TOLERANCE)


def test_variant_selection_errors():
    model, _ = build(peft_c, CASES["conv2d"])
    with pytest.raises(ValueError, match="variant combination"):
        layer_of(model).resolve_lora_variant(config=peft_c.LoraConfig(init_lora_weights="mica"))
    model, _ = build(peft_c, CASES["linear"])
    layer = layer_of(model)
    kind = type("Odd", (type(layer),), {"lora_variants": property(lambda self: {("b", "a"): None})})
    layer.__class__ = kind
    with pytest.raises(ValueError, match="sorted tuples"):
        layer.resolve_lora_variant(config=peft_c.LoraConfig())


def test_deepcopy_shares_nothing():
    for name, case in CASES.items():
        model, x = build(peft_c, case)
        other = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other.base_model.merge_adapter()
        assert not layer_of(model).merged, name
        torch.testing.assert_close(model(x), other(x), rtol=1e-3, atol=1e-4)
