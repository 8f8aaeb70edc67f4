"""Merging and unmerging: the same bits back, whatever happens in between; nothing changed by a failure."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from layer_cases import CASES, MODULE, OWN, One, base_weights, build, layer_of
from torch import nn

import peft_c
from peft_c.tuners import law, undo
from peft_c.utils.warning import PeftWarning

ALL = CASES | OWN
PLAIN = {name: case for name, case in ALL.items() if "dora" not in name}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    return tensor.detach().clone().contiguous().view(BITS[tensor.element_size()])


def snapshot(layer):
    return {name: bits(weight) for name, weight in base_weights(layer).items()}


def assert_restored(layer, before):
    for name, old in before.items():
        assert torch.equal(bits(base_weights(layer)[name]), old), name


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_round_trip(name, dtype):
    model, x = build(peft_c, ALL[name], dtype=dtype)
    layer = layer_of(model)
    before, pointers = snapshot(layer), {n: w.data_ptr() for n, w in base_weights(layer).items()}
    versions = {n: w._version for n, w in base_weights(layer).items()}
    unmerged = model(x)
    for _ in range(3):
        layer.merge()
        assert layer.merged_adapters == ["default"]
        assert any(not torch.equal(bits(w), before[n]) for n, w in base_weights(layer).items())
        torch.testing.assert_close(model(x), unmerged, rtol=0.1, atol=0.1 * unmerged.abs().max().item())
        layer.unmerge()
        assert not layer.merged and not law.records(layer)
        assert_restored(layer, before)
    after = base_weights(layer)
    assert {n: w.data_ptr() for n, w in after.items()} == pointers  # never rebound
    assert any(w._version > versions[n] for n, w in after.items())  # autograd knows
    assert torch.equal(model(x), unmerged)


@pytest.mark.parametrize("name", OWN)
def test_merged_output_where_peft_has_none(name):
    model, x = build(peft_c, OWN[name], dtype=torch.float64)
    unmerged = model(x)
    layer_of(model).merge()
    torch.testing.assert_close(model(x), unmerged)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hundred_cycles_bf16_with_fp32_adapters(dtype):
    model, _ = build(peft_c, PLAIN["linear"], dtype=dtype)
    layer = layer_of(model)
    layer.lora_A.float(), layer.lora_B.float()
    before = snapshot(layer)
    for _ in range(100):
        layer.merge()
        layer.unmerge()
    assert_restored(layer, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_several_adapters_in_one_merge_and_one_after_the_other(name, dtype):
    model, x = build(peft_c, ALL[name], dtype=dtype, adapters=("default", "second", "third"))
    layer = layer_of(model)
    before = snapshot(layer)
    model.base_model.set_adapter(["default", "second", "third"])
    unmerged = model(x)
    layer.merge()
    assert layer.merged_adapters == ["default", "second", "third"]
    torch.testing.assert_close(model(x), unmerged, rtol=0.1, atol=0.1 * unmerged.abs().max().item())
    layer.unmerge()
    assert_restored(layer, before)
    layer.merge(adapter_names=["second"])
    with pytest.warns(UserWarning, match="additionally merging third"):
        layer.merge(adapter_names=["second", "third"])
    assert layer.merged_adapters == ["second", "third"]
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        layer.merge(adapter_names=["third"])
    layer.unmerge()
    assert_restored(layer, before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLAIN)
def test_the_adapter_may_change_while_merged(name, dtype):
    model, _ = build(peft_c, ALL[name], dtype=dtype, adapters=("default", "second"))
    layer = layer_of(model)
    before = snapshot(layer)
    layer.merge(adapter_names=["default", "second"])
    layer.set_scale("default", 5.0)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    layer.delete_adapter("second")
    layer.unmerge()
    assert_restored(layer, before)
    assert layer.merged_adapters == []


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ALL)
def test_copies_of_a_merged_layer(name, how):
    model, _ = build(peft_c, ALL[name], dtype=torch.bfloat16)
    layer = layer_of(model)
    before = snapshot(layer)
    layer.merge()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif "experts" in name or how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    merged = snapshot(layer)
    other.unmerge()
    assert_restored(other, before)
    assert_restored(layer, merged)
    layer.unmerge()
    assert_restored(layer, before)


def test_the_state_dict_has_no_records():
    model, _ = build(peft_c, CASES["linear"])
    keys = list(model.state_dict())
    layer_of(model).merge()
    assert list(model.state_dict()) == keys
    assert undo.record_bytes(layer_of(model)) > 0


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "parameter_experts", "linear_dora", "mha"])
def test_a_write_to_the_merged_weight(name):
    model, _ = build(peft_c, ALL[name])
    layer = layer_of(model)
    layer.merge()
    weight = next(iter(base_weights(layer).values()))
    old = next(iter(snapshot_of_unmerged(name).values())).view(torch.float32)
    weight.data.flatten()[0] += 1.0
    with pytest.warns(PeftWarning, match="was written to"):
        layer.unmerge()
    difference = (weight.detach() - old).flatten()
    if name != "linear_dora":  # DoRA's factors scale the write as well
        torch.testing.assert_close(difference[0].item(), 1.0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(difference[1:], torch.zeros_like(difference[1:]), rtol=0, atol=1e-4)
    assert not layer.merged


def snapshot_of_unmerged(name):
    return snapshot(layer_of(build(peft_c, ALL[name])[0]))


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.to(torch.float64), lambda m: m.half().float()]
)
@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "parameter_experts"])
def test_a_cast_while_merged(name, cast):
    model, _ = build(peft_c, ALL[name])
    layer = layer_of(model)
    old = {key: value.detach().clone() for key, value in base_weights(layer).items()}
    layer.merge()
    cast(layer)
    with pytest.warns(PeftWarning, match="was cast|was written to"):
        layer.unmerge()
    for key, weight in base_weights(layer).items():
        torch.testing.assert_close(weight.detach().float(), old[key], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("bad", ["A", "B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", PLAIN)
def test_safe_merge_of_a_broken_adapter(name, bad, value):
    model, _ = build(peft_c, ALL[name], adapters=("default", "broken"))
    layer = layer_of(model)
    factors = [p for key, p in layer.named_parameters() if f"_{bad}.broken" in key and not key.endswith("bias")]
    with torch.no_grad():
        factors[-1].flatten()[-1] = value
    before = snapshot(layer)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter broken seems to be broken"):
        layer.merge(safe_merge=True, adapter_names=["default", "broken"])
    assert_restored(layer, before)
    assert layer.merged_adapters == [] and not law.records(layer)
    layer.merge(safe_merge=True, adapter_names=["default"])
    layer.unmerge()
    assert_restored(layer, before)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("where", ["weight", "overflow"])
def test_safe_merge_of_finite_factors(where, exact):
    model, _ = build(peft_c, PLAIN["linear"], dtype=torch.float16)
    layer = layer_of(model)
    with torch.no_grad():
        if where == "weight":
            layer.base_layer.weight[3, 4] = float("inf")
        else:
            layer.scaling["default"] = 1e6
    before = snapshot(layer)
    with law.exact_unmerge(exact), pytest.raises(ValueError, match="The adapter default seems to be broken"):
        layer.merge(safe_merge=True)
    assert_restored(layer, before)
    assert not layer.merged


@pytest.mark.parametrize("name", PLAIN)
def test_safe_merge_gives_the_bits_of_merge(name):
    results = []
    for safe_merge in (False, True):
        layer = layer_of(build(peft_c, ALL[name], dtype=torch.bfloat16)[0])
        layer.merge(safe_merge=safe_merge)
        results.append(snapshot(layer))
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key])


def test_a_merge_is_rounded_once():
    model, _ = build(peft_c, PLAIN["linear"], dtype=torch.bfloat16)
    layer = layer_of(model)
    layer.lora_A.float(), layer.lora_B.float()
    weight = layer.base_layer.weight.detach().double()
    expected = weight + (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()) * 1.5
    layer.merge()
    assert torch.equal(layer.base_layer.weight, expected.float().to(torch.bfloat16))


def test_lora_bias_without_a_base_bias():
    make, make_x, config = CASES["linear_no_bias"]
    model, _ = build(peft_c, (make, make_x, config | {"lora_bias": True}))
    layer = layer_of(model)
    before = snapshot(layer)
    for safe_merge in (False, True):
        with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
            layer.merge(safe_merge=safe_merge)
    assert_restored(layer, before)


def test_a_meta_weight_is_refused():
    model, _ = build(peft_c, CASES["linear"])
    layer = layer_of(model)
    layer.base_layer.to("meta")
    with pytest.raises(ValueError, match="meta"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("case", ["linear", "linear-dora", "embedding", "loha", "ia3"])
def test_adapters_on_the_meta_device_are_refused(case, safe_merge):
    configs = {"loha": peft_c.LoHaConfig, "ia3": lambda **names: peft_c.IA3Config(feedforward_modules=[], **names)}
    if case in configs:
        config = configs[case](target_modules=["0"])
    else:
        config = peft_c.LoraConfig(target_modules=["0"], use_dora=case.endswith("dora"))
    base = nn.Embedding(5, 4) if case == "embedding" else nn.Linear(4, 4)
    model = peft_c.get_peft_model(nn.Sequential(base), config)
    layer, before = model.base_model.model[0], bits(base.weight)
    warnings.filterwarnings("ignore", "Already following")
    model.add_adapter("empty", config, low_cpu_mem_usage=True)
    layer.merge(adapter_names=["default"])
    merged = bits(base.weight)
    for act in (layer.merge, layer.switch):
        with pytest.raises(ValueError, match="the adapter empty is on the meta device"):
            act(safe_merge=safe_merge, adapter_names=["empty"])
        assert layer.merged_adapters == ["default"] and torch.equal(bits(base.weight), merged)
    layer.unmerge()
    assert torch.equal(bits(base.weight), before)


def test_adapter_names_must_be_a_list_and_unknown_ones_are_left_out():
    layer = layer_of(build(peft_c, CASES["linear"])[0])
    before = snapshot(layer)
    with pytest.raises(TypeError, match="should be a list"):
        layer.merge(adapter_names="default")
    layer.merge(adapter_names=["nobody"])
    assert layer.merged_adapters == []
    assert_restored(layer, before)
    layer.merge(adapter_names=["default", "default"])
    assert layer.merged_adapters == ["default"]


@pytest.mark.parametrize("name", PLAIN)
def test_without_records(name):
    model, x = build(peft_c, ALL[name])
    layer = layer_of(model)
    before = {key: value.detach().clone() for key, value in base_weights(layer).items()}
    with law.exact_unmerge(False):
        layer.merge()
        factors = sum(p.nbytes for p in layer.parameters() if p.requires_grad)
        assert undo.record_bytes(layer) <= 2 * factors
        layer.set_scale("default", 3.0)
        layer.unmerge()
    for key, weight in base_weights(layer).items():
        torch.testing.assert_close(weight.detach(), before[key], rtol=1e-5, atol=1e-5)
    assert law.exact_unmerge.enabled


def test_disabled_while_merged():
    for name, case in ALL.items():
        model, x = build(peft_c, case)
        layer = layer_of(model)
        before = snapshot(layer)
        adapted = model(x)
        with model.disable_adapter():
            base = model(x)
        layer.merge()
        merged = snapshot(layer)
        with model.disable_adapter():
            assert torch.equal(model(x), base), name
            assert torch.equal(model(x), base), name
            assert_restored(layer, before)
            assert layer.merged_adapters == ["default"]
        torch.testing.assert_close(model(x), adapted, rtol=1e-3, atol=1e-4)
        assert_restored(layer, merged)
        with model.disable_adapter():
            model(x)
        layer.unmerge()  # was taken out already
        assert_restored(layer, before)
        assert not layer.merged
        torch.testing.assert_close(model(x), adapted)


def test_disabled_while_merged_then_merged_again():
    model, x = build(peft_c, CASES["linear"], adapters=("default", "second"))
    layer = layer_of(model)
    layer.merge()
    with model.disable_adapter():
        model(x)
    with pytest.warns(UserWarning, match="additionally"):
        layer.merge(adapter_names=["second"])
    expected = layer_of(build(peft_c, CASES["linear"], adapters=("default", "second"))[0])
    expected.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally"):
        expected.merge(adapter_names=["second"])
    assert_restored(layer, snapshot(expected))


def test_strided_and_shared_weights():
    torch.manual_seed(0)
    storage = torch.randn(40, 30)
    kinds = {
        "slice": storage[3:15, 5:15],
        "step": storage[::3, ::3][:12, :10],
        "transposed": storage.T[2:14, 7:17],
        "offset": torch.randn(121)[1:].view(12, 10),
    }
    for name, view in kinds.items():
        around = storage.clone()
        linear = nn.Linear(10, 12)
        linear.weight = nn.Parameter(view)
        layer = layer_of(build(peft_c, (lambda m=linear: One(m), CASES["linear"][1], MODULE))[0])
        before = bits(view)
        expected = view + layer.get_delta_weight("default").detach()
        layer.merge()
        torch.testing.assert_close(view, expected)
        layer.unmerge()
        assert torch.equal(bits(view), before), name
        assert torch.equal(storage, around), name


def test_channels_last_convolution():
    case = CASES["conv2d"]
    model, x = build(peft_c, (lambda: case[0]().to(memory_format=torch.channels_last), *case[1:]))
    layer = layer_of(model)
    before, unmerged = snapshot(layer), model(x)
    layer.merge()
    torch.testing.assert_close(model(x), unmerged, rtol=1e-3, atol=1e-4)
    layer.unmerge()
    assert_restored(layer, before)


def two_layers_on_one_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    config = peft_c.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    model = peft_c.get_peft_model(model, config)
    return model.base_model.model[0], model.base_model.model[1]


def test_two_layers_that_share_a_weight():
    first, second = two_layers_on_one_weight()
    before = snapshot(first)["weight"]
    delta = first.get_delta_weight("default") + second.get_delta_weight("default")
    first.merge()
    second.merge()
    torch.testing.assert_close(first.weight, before.view(torch.float32) + delta)
    second.unmerge()
    first.unmerge()
    assert torch.equal(snapshot(first)["weight"], before)
    first.merge()
    second.merge()
    for layer in (first, second):  # in the order of merging: by subtraction
        with pytest.warns(PeftWarning, match="was written to"):
            layer.unmerge()
    torch.testing.assert_close(first.weight.detach(), before.view(torch.float32))


def test_trainable_and_inference_weights():
    model, _ = build(peft_c, CASES["linear"])
    layer = layer_of(model)
    layer.base_layer.weight.requires_grad_(True)
    before = snapshot(layer)
    layer.merge()
    assert layer.base_layer.weight.requires_grad and layer.base_layer.weight.is_leaf
    layer.unmerge()
    assert_restored(layer, before)
    with torch.inference_mode():
        layer.merge()
        layer.unmerge()
        model, x = build(peft_c, CASES["linear"])
    assert_restored(layer, before)
    layer = layer_of(model)
    before = snapshot(layer)
    layer.merge()
    layer.unmerge()
    assert_restored(layer, before)


def test_a_stale_saved_tensor_is_noticed():
    model, x = build(peft_c, CASES["linear"])
    y = model(x.requires_grad_())
    layer_of(model).merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_own_delta_weight_is_used():
    model, x = build(peft_c, CASES["linear"])
    layer = layer_of(model)

    class Half(type(layer)):
        def get_delta_weight(self, adapter):
            return 0.5 * super().get_delta_weight(adapter)

    layer.__class__ = Half
    before = snapshot(layer)
    expected = layer.weight + layer.get_delta_weight("default")
    layer.merge()
    torch.testing.assert_close(layer.weight, expected)
    layer.unmerge()
    assert_restored(layer, before)


@pytest.mark.parametrize("config", ["LoraConfig", "VeraConfig", "LoHaConfig"])
def test_a_delta_weight_set_on_a_layer_is_used(config):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 6))
    layer = peft_c.get_peft_model(base, getattr(peft_c, config)(r=2, target_modules=["0"])).base_model.model[0]
    before, delta = snapshot(layer), torch.randn(6, 8)
    expected = layer.get_base_layer().weight + delta
    layer.get_delta_weight = lambda adapter: delta
    layer.merge()
    torch.testing.assert_close(layer.get_base_layer().weight, expected)
    layer.unmerge()
    assert_restored(layer, before)


@pytest.mark.parametrize("size", [8, 300])
def test_large_own_deltas_keep_a_copy(size):
    case = (lambda: One(nn.Linear(size, size)), lambda: torch.randn(2, size), MODULE)
    layer = layer_of(build(peft_c, case)[0])
    layer.__class__ = type("Own", (type(layer),), {"get_delta_weight": lambda self, name: self.delta})
    layer.delta = torch.randn(size, size)
    before = snapshot(layer)
    layer.merge(safe_merge=True)
    layer.delta = torch.zeros(size, size)
    layer.unmerge()
    assert_restored(layer, before)
    layer.delta = torch.full((size, size), float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert_restored(layer, before)


def test_replacing_a_weight():
    layer = layer_of(build(peft_c, CASES["linear"], adapters=("default", "second"))[0])

    def doubled(targets):
        return {"weight": targets["weight"].tensor * 2, "bias": targets["bias"].tensor + 1}

    layer._merge_changes = lambda name: dict.fromkeys(("weight", "bias"), law.Replace(doubled))
    before = snapshot(layer)
    old = layer.weight.detach().clone()
    with law.exact_unmerge(False):  # the copies are kept all the same
        layer.merge(adapter_names=["default", "second"])
    assert torch.equal(layer.weight, old * 4)
    layer.unmerge()
    assert_restored(layer, before)
    with torch.no_grad():
        layer.merge(adapter_names=["default"])
        layer.weight[0, 0] = 7.0
    with pytest.warns(PeftWarning, match="was written to"):
        layer.unmerge()
    assert_restored(layer, before)
    with torch.no_grad():
        layer.base_layer.bias[0] = float("inf")
    before = snapshot(layer)
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert_restored(layer, before)


@pytest.mark.parametrize("enabled", [True, False])
def test_merging_leaves_the_grad_mode_as_it_was(enabled):
    layer = layer_of(build(peft_c, (lambda: One(nn.Linear(6, 5)), lambda: torch.randn(2, 6), MODULE))[0])
    with torch.set_grad_enabled(enabled):
        layer.merge()
        assert torch.is_grad_enabled() is enabled
        layer.unmerge()
        layer.lora_A["default"].weight.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaN"):
            layer.merge(safe_merge=True)
        assert torch.is_grad_enabled() is enabled
