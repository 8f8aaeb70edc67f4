"""The shared layer of the quantised backends, on a made-up 8 bit one, and the dispatchers without their packages."""

import importlib
import sys
import types

import pytest
import torch
from torch import nn

import peft_c
from peft_c.tuners.lora._quantized import QuantizedLinear


class Int8Linear(nn.Module):
    """A linear layer with one scale per output."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False)
        self.quantize(torch.randn(out_features, in_features))

    def quantize(self, weight):
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def dequantize(self):
        return self.weight * self.scale

    def forward(self, x):
        return x @ self.dequantize().T + self.bias


class Int8Lora(QuantizedLinear):
    refused = ("velora_config",)
    variants = {"use_dora": "DoraLinearVariant", "alora_invocation_tokens": "ALoraLinearVariant"}
    merge_notice = "{} of 8 bit weights rounds."

    def _dequantize(self):
        return self.get_base_layer().dequantize()

    def _requantize(self, weight):
        self.get_base_layer().quantize(weight)


class Unmergeable(QuantizedLinear):
    merge_error = AttributeError
    mixed_batches = False
    keeps_alias = True


def layer_of(cls=Int8Lora, **options):
    torch.manual_seed(1)
    options = {"init_lora_weights": False, **options}
    layer = cls(Int8Linear(16, 12), "default", peft_c.LoraConfig(**options), r=4, lora_alpha=8)
    return layer, torch.randn(3, 5, 16)


def test_forward_and_mixed_batch():
    layer, x = layer_of()
    layer.update_layer("other", 2, lora_alpha=2, config=peft_c.LoraConfig(init_lora_weights=False))
    base = layer.base_layer(x)
    expected = {"__base__": base}
    for name in ("default", "other"):
        layer.set_adapter(name)
        expected[name] = base + layer.get_delta_weight(name).matmul(x.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(layer(x), expected[name])
    names = ["other", "__base__", "default"]
    mixed = layer(x, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row])
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), base)


@pytest.mark.parametrize("lora_bias", [False, True])
def test_merge(lora_bias):
    layer, x = layer_of(lora_bias=lora_bias)
    expected, bias = layer(x), layer.base_layer.bias.clone()
    with pytest.warns(UserWarning, match="Merge of 8 bit"):
        layer.merge(safe_merge=True)
    torch.testing.assert_close(layer(x), expected, atol=0.2, rtol=0.05)
    assert layer.base_layer.weight.dtype == torch.int8 and layer.merged_adapters == ["default"]
    with pytest.warns(UserWarning, match="Unmerge of 8 bit"):
        layer.unmerge()
    torch.testing.assert_close(layer(x), expected, atol=0.2, rtol=0.05)
    torch.testing.assert_close(layer.base_layer.bias, bias)


@pytest.mark.filterwarnings("ignore")
def test_safe_merge_changes_nothing():
    layer, _ = layer_of()
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    weight = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight) and not layer.merged


def test_autocast_and_half():
    layer, x = layer_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), layer(x).float())
    layer.lora_A.to(torch.bfloat16), layer.lora_B.to(torch.bfloat16)
    assert layer(x).dtype == torch.float32


def test_refusals():
    with pytest.raises(ValueError, match="velora_config"):
        layer_of(velora_config=peft_c.tuners.lora.VeloraConfig())
    with pytest.raises(ValueError, match="use_dora"):
        layer_of(Unmergeable, use_dora=True)
    with pytest.raises(ValueError, match="Invalid or unsupported variant"):
        layer_of(kasa_config=peft_c.tuners.lora.KasaConfig())
    layer, x = layer_of(Unmergeable)
    assert layer.quant_linear_module is layer.base_layer
    for call in (layer.merge, layer.unmerge):
        with pytest.raises(AttributeError, match="not supported for Unmergeable"):
            call()
    with pytest.raises(ValueError, match="mixed_batch_forward"):
        layer(x, adapter_names=["default"] * 3)


class Half(torch.Tensor):
    """Half of a weight; as torchao's, it has to be dequantised before it is added to."""

    __module__ = "torchao.made_up"

    def dequantize(self):
        return 2 * self.as_subclass(torch.Tensor)


class HalfLinear(nn.Linear):
    def quantize(self):
        self.weight = nn.Parameter((self.weight.detach() / 2).as_subclass(Half), requires_grad=False)
        return self

    def forward(self, x):
        return x @ self.weight.dequantize().T + self.bias


def test_merge_of_dora_on_torchao(monkeypatch):
    quantization = types.ModuleType("torchao.quantization")
    quantization.Int4Tensor = type("Int4Tensor", (), {})
    torchao = types.ModuleType("torchao")
    torchao.quantize_ = lambda module, config: config(module)
    monkeypatch.setitem(sys.modules, "torchao", torchao)
    monkeypatch.setitem(sys.modules, "torchao.quantization", quantization)

    torch.manual_seed(0)
    base, x = HalfLinear(16, 12).quantize(), torch.randn(3, 16)
    plain = base(x)
    config = peft_c.LoraConfig(use_dora=True, init_lora_weights=False)
    options = {"config": config, "lora_alpha": 8, "get_apply_tensor_subclass": lambda: HalfLinear.quantize}
    layer = importlib.import_module("peft_c.tuners.lora.torchao").TorchaoLoraLinear(base, "default", r=4, **options)
    adapted = layer(x)
    assert not torch.allclose(adapted, plain)
    layer.merge()
    torch.testing.assert_close(layer(x), adapted)
    layer.unmerge()
    torch.testing.assert_close(base(x), plain)
    layer.update_layer("b", 2, lora_alpha=4, config=config)
    layer.set_adapter(["default", "b"])
    layer.merge()
    assert layer.merged_adapters == ["default", "b"]
    layer.unmerge()
    torch.testing.assert_close(base(x), plain)


DISPATCHERS = {
    "aqlm": ["dispatch_aqlm"],
    "awq": ["dispatch_awq"],
    "bnb": ["dispatch_bnb_8bit", "dispatch_bnb_4bit"],
    "eetq": ["dispatch_eetq"],
    "gptq": ["dispatch_gptq"],
    "hqq": ["dispatch_hqq"],
    "inc": ["dispatch_inc"],
    "te": ["dispatch_transformer_engine"],
    "torchao": ["dispatch_torchao"],
    "tp_layer": ["dispatch_megatron"],
}


@pytest.mark.parametrize("backend", DISPATCHERS)
def test_dispatchers_pass_over_ordinary_layers(backend):
    module = importlib.import_module(f"peft_c.tuners.lora.{backend}")
    for name in DISPATCHERS[backend]:
        assert getattr(module, name)(nn.Linear(2, 2), "default", config=peft_c.LoraConfig(), r=2) is None


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("split", ["RowParallelLinear", "ColumnParallelLinear"])
def test_megatron(split, monkeypatch):
    """With a stand-in for Megatron whose parallel layers have one rank and return (output, bias)."""

    class Parallel(nn.Linear):
        def __init__(self, input_size, output_size, config=None, init_method=None, **kwargs):
            super().__init__(input_size, output_size, bias=False)
            self.options = kwargs
            self.input_is_parallel = self.gather_output = True

        def forward(self, x):
            return super().forward(x), None

    parallel = types.SimpleNamespace(
        RowParallelLinear=type("RowParallelLinear", (Parallel,), {}),
        ColumnParallelLinear=type("ColumnParallelLinear", (Parallel,), {}),
    )
    core = types.ModuleType("megatron.core")
    core.tensor_parallel = parallel
    core.transformer = types.SimpleNamespace(
        transformer_config=types.SimpleNamespace(TransformerConfig=types.SimpleNamespace)
    )
    monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core", core)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = getattr(parallel, split)(8, 6)

        def forward(self, x):
            return self.fc(x)

    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 8)
    base = net(x)[0]
    config = peft_c.LoraConfig(target_modules=["fc"], r=2, megatron_config={"a": 1}, fan_in_fan_out=True)
    model = peft_c.get_peft_model(net, config)
    layer = model.base_model.model.fc
    assert type(layer).__name__ == "LoraParallelLinear" and layer.is_parallel_a == (split == "RowParallelLinear")
    torch.testing.assert_close(model(x)[0], base)
    nn.init.normal_(layer.lora_B["default"].weight)
    expected = model(x)[0]
    assert not torch.allclose(expected, base)
    model.merge_adapter()
    torch.testing.assert_close(model(x)[0], expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x)[0], base)
    torch.testing.assert_close(model(x)[0], expected)
    model.unmerge_adapter()
    model.add_adapter("second", peft_c.LoraConfig(target_modules=["fc"], r=3, megatron_config={"a": 1}))
    model.set_adapter("second")
    torch.testing.assert_close(model(x)[0], base)
    with pytest.raises(ValueError, match="valid prefix"):
        config = peft_c.LoraConfig(target_modules=["fc"], megatron_config={"a": 1}, megatron_core="os.path")
        peft_c.get_peft_model(Net(), config)
