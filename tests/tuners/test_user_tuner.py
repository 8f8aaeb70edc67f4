"""A tuner as a user writes it from the documentation of PEFT, with nothing of peft_c but the documented names."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft_c import PeftConfig
from peft_c.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge


@dataclass
class ScaleConfig(PeftConfig):
    target_modules: list | str | None = field(default=None)
    factor: float = 1.0


class ScaleLayer(BaseTunerLayer):
    adapter_layer_names = ("scale_v",)
    other_param_names = ("factor",)

    def __init__(self, base_layer, **kwargs):
        self.base_layer = base_layer
        self.scale_v = nn.ParameterDict()
        self.factor = {}
        self._disable_adapters = False
        self.merged_adapters = []

    def update_layer(self, adapter_name, factor, inference_mode=False):
        self.factor[adapter_name] = factor
        self.scale_v[adapter_name] = nn.Parameter(torch.ones(self.get_base_layer().out_features))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)


class Linear(nn.Module, ScaleLayer):
    def __init__(self, base_layer, adapter_name, factor):
        super().__init__()
        ScaleLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, factor)

    def scale(self, adapter):
        return 1 + self.factor[adapter] * (self.scale_v[adapter] - 1)

    def merge(self, safe_merge=False, adapter_names=None):
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.scale_v:
                continue
            weight = self.get_base_layer().weight.data * self.scale(adapter)[:, None]
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            self.get_base_layer().weight.data = weight
            self.merged_adapters.append(adapter)

    def unmerge(self):
        while self.merged_adapters:
            self.get_base_layer().weight.data /= self.scale(self.merged_adapters.pop())[:, None]

    def forward(self, x, *args, **kwargs):
        y = nn.functional.linear(x, self.get_base_layer().weight)
        if not (self.disable_adapters or self.merged):
            for adapter in self.active_adapters:
                if adapter in self.scale_v:
                    y = y * self.scale(adapter)
        return y + self.get_base_layer().bias


class ScaleModel(BaseTuner):
    prefix = "scale_"
    tuner_layer_cls = ScaleLayer
    target_module_mapping = {"toy": ["fc1"]}
    fail_at = None

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, parameter_name=None):
        if current_key == self.fail_at:
            raise RuntimeError("no luck")
        if isinstance(target, ScaleLayer):
            target.update_layer(adapter_name, config.factor, config.inference_mode)
        else:
            new_module = Linear(target, adapter_name, config.factor)
            if adapter_name not in self.active_adapters:
                new_module.requires_grad_(False)
            self._replace_module(parent, target_name, new_module, target)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"model_type": "toy"}
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def config(*targets, **kwargs):
    return ScaleConfig(peft_type="SCALE", target_modules=list(targets) or None, **kwargs)


def snapshot(model):
    return (
        {n: (type(m), sorted(m.__dict__)) for n, m in model.named_modules()},
        {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()},
        {n: list(m.merged_adapters) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)},
    )


def assert_same(a, b):
    assert a[0] == b[0] and a[2] == b[2] and list(a[1]) == list(b[1])
    for name, (flag, tensor) in a[1].items():
        assert flag == b[1][name][0] and torch.equal(tensor, b[1][name][1]), name


def randomize(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scale_" in name:
                parameter.uniform_(0.5, 2)


def test_life_of_an_adapter():
    x, net = torch.randn(2, 4), Net()
    y = net(x)
    model = ScaleModel(net, config("fc1", "fc3"), "a")
    assert isinstance(net.fc1, Linear) and type(net.fc2) is nn.Linear
    assert model.targeted_module_names == ["fc1", "fc3"]
    assert torch.equal(model(x), y)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {"fc1.scale_v.a", "fc3.scale_v.a"}
    model.peft_config["b"] = config("fc2", factor=0.5)
    model.inject_adapter(net, "b")
    randomize(net)
    assert model.active_adapters == ["a"] and not net.fc2.scale_v["b"].requires_grad
    with_a = model(x)
    model.set_adapter("b")
    with_b = model(x)
    assert net.fc2.scale_v["b"].requires_grad and not net.fc1.scale_v["a"].requires_grad
    model.disable_adapter_layers()
    assert torch.equal(model(x), y)
    model.enable_adapter_layers()
    model.merge_adapter()
    assert torch.allclose(model(x), with_b, atol=1e-6)
    model.unmerge_adapter()
    model.set_adapter(["a", "b"])
    assert all(p.requires_grad for n, p in net.named_parameters() if "scale_" in n)
    model.delete_adapter("b")
    assert model.active_adapters == ["a"] and torch.allclose(model(x), with_a, atol=1e-6)
    plain = model.merge_and_unload(safe_merge=True)
    assert plain is net and type(net.fc1) is nn.Linear and torch.allclose(net(x), with_a, atol=1e-6)


def test_default_targets():
    assert ScaleModel(Net(), config(), "a").targeted_module_names == ["fc1"]
    net = Net()
    net.config = SimpleNamespace(to_dict=lambda: {"model_type": "other"})
    with pytest.raises(ValueError, match="target_modules"):
        ScaleModel(net, config(), "a")


def test_a_rule_of_ones_own_for_targets():
    class Odd(ScaleModel):
        @staticmethod
        def _check_target_module_exists(config, key):
            return key.endswith("2")

    assert Odd(Net(), config("fc1"), "a").targeted_module_names == ["fc2"]


def test_a_first_injection_that_fails_leaves_the_model_as_it_was():
    class Failing(ScaleModel):
        fail_at = "fc3"

    net = Net()
    before, targets = snapshot(net), config("fc1", "fc2", "fc3", factor=3.0)
    with pytest.raises(RuntimeError, match="no luck"):
        Failing(net, targets, "a")
    assert_same(before, snapshot(net))
    with pytest.raises(ValueError, match="not found in the base model"):
        ScaleModel(net, config("fc9"), "a")
    assert_same(before, snapshot(net))
    assert ScaleModel(net, targets, "a").targeted_module_names == ["fc1", "fc2", "fc3"]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("fail", ["create", "housekeeping", "nothing found"])
def test_a_further_injection_that_fails_leaves_the_model_as_it_was(fail, frozen):
    net = Net()
    model = ScaleModel(net, config("fc1", "fc2"), "a")
    randomize(net)
    if frozen:
        model.set_adapter("a", inference_mode=True)
    before, names = snapshot(net), list(model.targeted_module_names)
    model.peft_config["b"] = config("fc8") if fail == "nothing found" else config("fc1", "fc2", "fc3")
    if fail == "create":
        model.fail_at = "fc3"
    elif fail == "housekeeping":

        def broken(model):
            raise RuntimeError

        model._mark_only_adapters_as_trainable = broken
    with pytest.raises((RuntimeError, ValueError)):
        model.inject_adapter(net, "b")
    assert_same(before, snapshot(net))
    assert model.targeted_module_names == names and model.active_adapters == ["a"]
    model.set_adapter("a")
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {"fc1.scale_v.a", "fc2.scale_v.a"}


def test_unknown_adapters_change_nothing():
    net = Net()
    model = ScaleModel(net, config("fc1"), "a")
    before = snapshot(net)
    for call in (lambda: model.set_adapter("nope"), lambda: model.set_adapter(["a", "nope"])):
        with pytest.raises(ValueError, match=r"'nope' not found.*\['a'\]"):
            call()
    with pytest.raises(ValueError, match="Adapter nope does not exist"):
        model.delete_adapter("nope")
    assert_same(before, snapshot(net))
    assert model.active_adapters == ["a"]


@pytest.mark.parametrize("unload", [False, True])
def test_merging_is_all_or_nothing(unload):
    net, x = Net(), torch.randn(2, 4)
    model = ScaleModel(net, config("fc1", "fc2", "fc3"), "a")
    for name in "fc1", "fc2", "fc3":  # powers of two: undoing is exact for this method too
        net.get_submodule(name).scale_v["a"].data.copy_(torch.tensor([2.0, 4, 0.5, 1]))
    net.fc3.scale_v["a"].data[1] = torch.nan
    before, y = snapshot(net), model(x)
    merge = model.merge_and_unload if unload else model.merge_adapter
    with pytest.raises(ValueError, match="NaNs detected"):
        merge(safe_merge=True)
    after = snapshot(net)
    net.fc3.scale_v["a"].data[1] = before[1]["fc3.scale_v.a"][1][1] = after[1]["fc3.scale_v.a"][1][1] = 1.0
    assert_same(before, after)
    assert y.shape == merge(safe_merge=True)(x).shape if unload else merge(safe_merge=True) is None


def test_an_interrupt_takes_back_what_was_merged():
    net = Net()
    model = ScaleModel(net, config("fc1", "fc2"), "a")
    net.fc1.scale_v["a"].data.fill_(2)
    before = snapshot(net)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    net.fc2.merge = interrupt
    with pytest.raises(KeyboardInterrupt):
        model.merge_adapter()
    del net.fc2.merge
    assert_same(before, snapshot(net))


def test_shared_base_weights_are_merged_one_by_one():
    net, x = Net(), torch.randn(2, 4)
    net.fc3.weight = net.fc1.weight
    model = ScaleModel(net, config("fc1", "fc3"), "a")
    net.fc1.scale_v["a"].data.fill_(2)
    net.fc3.scale_v["a"].data.fill_(4)
    y, weight = model(x), net.fc1.base_layer.weight.clone()
    with pytest.warns(UserWarning, match="untied"):
        model.merge_adapter()
    assert torch.allclose(model(x), y, atol=1e-6)
    model.unmerge_adapter()
    assert net.fc3.base_layer.weight is net.fc1.base_layer.weight and torch.equal(weight, net.fc1.base_layer.weight)
    with pytest.warns(UserWarning, match="untied"):
        assert torch.allclose(model.merge_and_unload()(x), y, atol=1e-6)


def test_deleting_agrees_on_one_new_adapter():
    net = Net()
    model = ScaleModel(net, config("fc1"), "z")
    for name, target in (("c", "fc1"), ("b", "fc2")):
        model.peft_config[name] = config(target)
        model.inject_adapter(net, name)
    with pytest.warns(UserWarning, match="Setting active adapter"):
        model.delete_adapter("z")
    assert model.active_adapters == ["b"] == net.fc1.active_adapters == net.fc2.active_adapters
    model.delete_adapter("b")
    model.delete_adapter("c")
    assert model.active_adapters == [] and torch.isfinite(model(torch.ones(1, 4))).all()


def test_merged_adapters_cannot_be_deleted():
    model = ScaleModel(Net(), config("fc1"), "a")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['a'\] while they are merged"):
        model.delete_adapter("a")
    assert "a" in model.peft_config


def test_the_layer_says_what_a_model_asks_for():
    layer = ScaleModel(Net(), config("fc1"), "a").model.fc1
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    assert layer.get_base_weight().data_ptr() == layer.weight.data_ptr()
    layer.set_base_weight(torch.zeros(4, 4))
    assert not layer.weight.any()
    assert layer._get_available_adapters() == {"a"} and layer._all_available_adapter_names() == ["a"]
    assert not layer.supports_lora_conversion() and layer._cast_input_dtype(None, torch.float16) is None
    x = torch.ones(1)
    assert layer._cast_input_dtype(x, torch.float16).dtype == torch.float16
    layer.cast_input_dtype_enabled = False
    assert layer._cast_input_dtype(x, torch.float16) is x
