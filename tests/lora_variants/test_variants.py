"""Every variant against PEFT's: start, output and gradients in training and evaluation, merging and its undoing."""

import pytest
import torch
from variant_cases import adapted, assert_same_state

import peft_c


def _config(name, **options):
    return lambda package: getattr(__import__(f"{package.__name__}.tuners.lora", fromlist=[name]), name)(**options)


def _velora(**options):
    return {"velora_config": _config("VeloraConfig", **options)}


VARIANTS = {
    "dora": ("linear", {"use_dora": True}),
    "dora_rslora": ("linear", {"use_dora": True, "use_rslora": True}),
    "dora_conv1d": ("conv1d", {"use_dora": True, "fan_in_fan_out": True}),
    "dora_embedding": ("embedding", {"use_dora": True}),
    "dora_conv_1": ("conv_1", {"use_dora": True}),
    "dora_conv_2": ("conv_2", {"use_dora": True}),
    "dora_conv_3": ("conv_3", {"use_dora": True}),
    "velora": ("linear", _velora(num_groups=3)),
    "velora_once": (
        "linear",
        {"velora_config": _config("VeloraConfig", num_groups=4, init_type="batch_average_once")},
    ),
    "velora_random": (
        "linear",
        {"velora_config": _config("VeloraConfig", num_groups=8, init_type="random", scale=2.0)},
    ),
    "bdlora": (
        "linear",
        {"use_bdlora": _config("BdLoraConfig", target_modules_bd_a=["up"], target_modules_bd_b=["down"], nblocks=2)},
    ),
    "monteclora": ("linear", {"monteclora_config": _config("MontecloraConfig", num_samples=3, buffer_size=2)}),
    "mica": ("linear", {"init_lora_weights": "mica"}),
    "mica_embedding": ("embedding", {"init_lora_weights": "mica"}),
    "kasa": ("linear", {"kasa_config": _config("KasaConfig")}),
}
NAMES = list(VARIANTS)


def _pair(peft, name, random_values=True, **more):
    kind, options = VARIANTS[name]
    mine, x = adapted(peft_c, kind, random_values=random_values, **options, **more)
    theirs, _ = adapted(peft, kind, random_values=random_values, **options, **more)
    return mine, theirs, x


@pytest.mark.parametrize("name", NAMES)
def test_start(peft, name):
    mine, theirs, x = _pair(peft, name, random_values=False)
    assert_same_state(mine, theirs)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)
    kinds = [
        {
            n: type(m.lora_variant.get("default")).__name__
            for n, m in model.named_modules()
            if hasattr(m, "lora_variant")
        }
        for model in (mine, theirs)
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_training_step(peft, name, dropout):
    mine, theirs, x = _pair(peft, name, lora_dropout=dropout)
    gradients = []
    for model in (mine, theirs):
        model.train()
        outputs = []
        for step in range(3):
            torch.manual_seed(step)
            outputs.append(model(x))
        sum(out.square().mean() for out in outputs).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        model.outputs = outputs
    for left, right in zip(mine.outputs, theirs.outputs, strict=True):
        torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-4)
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[1].items():
        if value is None:
            assert gradients[0][key] is None, key
        else:
            torch.testing.assert_close(
                gradients[0][key], value, atol=2e-5, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_merge(peft, name, safe):
    mine, theirs, x = _pair(peft, name)
    mine.eval(), theirs.eval()
    before = {key: value.clone() for key, value in mine.state_dict().items()}
    expected = mine(x)
    for model in (mine, theirs):
        model.merge_adapter(safe_merge=safe)
    assert_same_state(mine, theirs)
    torch.testing.assert_close(mine(x), expected, atol=1e-4, rtol=1e-4)
    mine.unmerge_adapter()
    for key, value in mine.state_dict().items():
        torch.testing.assert_close(value, before[key], atol=1e-5, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(mine(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dora", "dora_embedding", "dora_conv_2", "bdlora", "mica", "velora"])
def test_two_adapters(peft, name):
    """The output with both active, and merging both."""
    mine, theirs, x = _pair(peft, name)
    kind, options = VARIANTS[name]
    for package, model in ((peft_c, mine), (peft, theirs)):
        other, _ = adapted(package, kind, **options)
        torch.manual_seed(9)
        model.add_adapter("second", other.peft_config["default"])
        for key, param in model.named_parameters():
            if "second" in key:
                param.data += 0.2 * torch.sin(torch.arange(param.numel()).view(param.shape).float())
        model.base_model.set_adapter(["default", "second"])
        model.eval()
    torch.testing.assert_close(mine(x), theirs(x), atol=2e-5, rtol=1e-4)
    expected = mine(x)
    mine.merge_adapter()
    theirs.merge_adapter()
    assert_same_state(mine, theirs, tolerance=5e-5)
    torch.testing.assert_close(mine(x), expected, atol=1e-4, rtol=1e-4)
    mine.unmerge_adapter()
    torch.testing.assert_close(mine(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["dora", "bdlora", "kasa", "velora", "mica"])
def test_bfloat16_base(peft, name):
    mine, theirs, x = _pair(peft, name, random_values=False)
    outputs = []
    for model in (mine, theirs):
        model.to(torch.bfloat16).eval()
        outputs.append(model(x.to(torch.bfloat16)))
    torch.testing.assert_close(*outputs, atol=3e-2, rtol=3e-2)


def test_conversion_is_refused_for_kasa():
    mine, _ = adapted(peft_c, *VARIANTS["kasa"][:1], **VARIANTS["kasa"][1])
    with pytest.raises(TypeError, match="LoRA conversion"):
        peft_c.convert_to_lora(mine, rank=4)


def test_a_variant_of_the_user():
    """Static methods, as PEFT documents them, on a subclass of a layer."""
    from peft_c.tuners.lora.layer import Linear, LoraVariant

    class Doubled(LoraVariant):
        @staticmethod
        def init(module, adapter_name, **kwargs):
            module.started = adapter_name

        @staticmethod
        def merge_safe(module, active_adapter, orig_weight):
            return orig_weight + 2 * module.get_delta_weight(active_adapter)

        @staticmethod
        def merge_unsafe(module, active_adapter, orig_weight):
            orig_weight.data += 2 * module.get_delta_weight(active_adapter)

        @staticmethod
        def unmerge(module, active_adapter, orig_weight):
            return orig_weight - 2 * module.get_delta_weight(active_adapter)

        @staticmethod
        def forward(module, active_adapter, x, result, **kwargs):
            update = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
            return result + 2 * update * module.scaling[active_adapter]

    class DoubledLinear(Linear):
        @property
        def lora_variants(self):
            return {(): Doubled}

    base = torch.nn.Linear(6, 5)
    original = base.weight.detach().clone()
    layer = DoubledLinear(base, "default", peft_c.LoraConfig(init_lora_weights=False), r=2, lora_alpha=2)
    x = torch.randn(3, 6)
    assert layer.started == "default"
    expected = layer(x)
    for safe in (False, True):
        layer.merge(safe_merge=safe)
        torch.testing.assert_close(layer(x), expected)
        layer.unmerge()
        torch.testing.assert_close(base.weight, original)


@pytest.mark.parametrize("safe", [False, True])
def test_alora_refuses_to_merge(safe):
    model, _ = adapted(peft_c, "linear", alora_invocation_tokens=[1, 2], task_type="FEATURE_EXTRACTION")
    with pytest.raises(NotImplementedError, match="aLoRA does not support"):
        model.merge_adapter(safe_merge=safe)
    assert not any(getattr(module, "merged", False) for module in model.modules())


def test_alora_offsets(peft):
    from peft.tuners.lora import variants as theirs

    from peft_c.tuners.lora import variants as mine

    ids = torch.tensor([[1, 2, 3, 1, 2, 9], [2, 1, 4, 4, 4, 4], [9, 9, 9, 9, 1, 2], [1, 2, 1, 2, 1, 1]])
    configs = {"a": peft_c.LoraConfig(alora_invocation_tokens=[1, 2]), "b": peft_c.LoraConfig()}
    configs["c"] = peft_c.LoraConfig(alora_invocation_tokens=[4] * 9)
    for names in (None, ["a", "a", "__base__", "b"], ["c", "c", "a", "a"]):
        arguments = (configs, "a", ids, names)
        assert mine.calculate_alora_offsets(*arguments) == theirs.calculate_alora_offsets(*arguments)
    assert mine.calculate_alora_offsets(configs, "a", ids) == [3, None, 2, 4]
    with pytest.warns(UserWarning, match="unknown"):
        assert mine.calculate_alora_offsets(configs, "unknown", ids[:1]) == [None]


def test_alora_forward(peft):
    outputs = []
    for package in (peft_c, peft):
        model, x = adapted(package, "linear", random_values=True, alora_invocation_tokens=[1])
        layer = model.base_model.model.up
        outputs.append([layer(x, alora_offsets=offsets) for offsets in ([2, None], [9, 1], None)])
        for offsets in ([1, 2], None):
            model.zero_grad()
            layer(x, alora_offsets=offsets).sum().backward()
            outputs[-1].append(layer.lora_B["default"].weight.grad.clone())
    for left, right in zip(*outputs, strict=True):
        torch.testing.assert_close(left, right)
    assert outputs[0][-1].abs().max() == 0


def test_kasa_truncates_late_on_meta(peft, tmp_path):
    """Loaded onto the meta device, the base weight is truncated at the first forward or merge."""
    model, x = adapted(peft_c, "linear", random_values=True, **VARIANTS["kasa"][1])
    model.save_pretrained(tmp_path)
    expected = model.eval()(x)
    from variant_cases import build

    for merge_first in (False, True):
        loaded = peft_c.PeftModel.from_pretrained(build("linear")[0], tmp_path, low_cpu_mem_usage=True).eval()
        if merge_first:
            loaded.merge_adapter()
        for _ in range(2):
            torch.testing.assert_close(loaded(x), expected, atol=1e-4, rtol=1e-4)


def test_bdlora_refusals():
    from peft_c.tuners.lora.config import BdLoraConfig

    for options, text in (
        ({"target_modules_bd_a": ["up"], "target_modules_bd_b": ["do"], "nblocks": 3}, "not divisible by 3"),
        ({"target_modules_bd_a": ["up"]}, "matches neither"),
        ({"target_modules_bd_a": ["up", "down"], "target_modules_bd_b": ["dow"]}, "matches both"),
    ):
        with pytest.raises(ValueError, match=text):
            adapted(peft_c, "linear", use_bdlora=BdLoraConfig(**options))


def test_block_diagonal_matrix():
    from peft_c.tuners.lora.variants import BlockDiagonalLinear

    layer = BlockDiagonalLinear(6, 4, nblocks=2)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(x), x @ layer.weight_as_blockdiagonal_matrix().T)
    assert layer.weight_as_blockdiagonal_matrix()[:2, 3:].abs().max() == 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "monteclora"])
def test_compiles_in_one_graph(name, training):
    kind, options = VARIANTS[name]
    model, x = adapted(peft_c, kind, random_values=True, **options)
    model.train(training)
    expected = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
