"""What other projects do with the inside of peft works on peft_c in the same way."""

import contextlib
import functools
import importlib
import inspect
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path

import dill
import pytest
import torch
from torch import nn

import peft_c
import peft_c.tuners.lora

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def modules_with_linear_layers():
    """(module, name) as unsloth looks for them, where the library of the module is installed."""
    for info in pkgutil.iter_modules(peft_c.tuners.lora.__path__, "peft_c.tuners.lora."):
        try:
            module = importlib.import_module(info.name)
        except ImportError:
            continue
        for name in dir(module):
            if name.startswith("Linear") or name.endswith("Linear"):
                yield module, name


def test_forward_made_anew_from_its_source():
    """unsloth executes `inspect.getsource(forward)` with the names of the module that has the class."""
    found = list(modules_with_linear_layers())
    assert ("peft_c.tuners.lora.layer", "Linear") in [(module.__name__, name) for module, name in found]
    layer = peft_c.tuners.lora.Linear(nn.Linear(4, 6), "default", peft_c.LoraConfig(init_lora_weights=False), r=2)
    x = torch.randn(3, 4)
    for module, name in found:
        forward = getattr(module, name).forward
        names = {other: getattr(module, other) for other in dir(module)} | {"torch": torch}
        names["VARIANT_KWARG_KEYS"] = peft_c.tuners.lora.layer.VARIANT_KWARG_KEYS
        unknown = {n for n in forward.__code__.co_names if n in forward.__globals__} - names.keys()
        assert not unknown, (module.__name__, name)
        if forward is peft_c.tuners.lora.Linear.forward:
            exec(textwrap.dedent(inspect.getsource(forward)), names)
            for fast in (True, False):
                with peft_c.fast_paths(fast):
                    assert torch.equal(names["forward"](layer, x), layer(x))


@pytest.mark.parametrize("case", ["fan_in_fan_out", "other factors", "other weight", "experts"])
def test_delta_of_factors_that_do_not_fit(case):
    """axolotl puts a checkpoint's factors into layers of its own and looks at the shape of `get_delta_weight`."""
    deltas = []
    for package in (peft_c, peft):
        torch.manual_seed(0)
        config = package.LoraConfig(r=4, fan_in_fan_out=case == "fan_in_fan_out", init_lora_weights=False)
        kwargs = {"r": 4, "lora_alpha": 8, "config": config}
        if case == "experts":
            base = nn.Module()
            base.weight = nn.Parameter(torch.randn(2, 12, 16))
            layer = package.tuners.lora.layer.ParamWrapper(base, "default", "weight", **kwargs)
        else:
            layer = package.tuners.lora.Linear(nn.Linear(16, 8), "default", **kwargs)
        if case == "other weight":
            layer.get_base_layer().weight.data = torch.randn(3, 8, 16)
        elif case != "fan_in_fan_out":
            sizes = {"experts": ((8, 12), (16, 8)), "other factors": ((4, 8), (16, 4))}[case]
            for factor, size in zip((layer.lora_A, layer.lora_B), sizes, strict=True):
                factor["default"].weight.data = torch.randn(size)
        deltas.append(layer.get_delta_weight("default"))
        if package is peft_c or case != "other weight":  # there PEFT adds the delta to all of the weight's matrices
            with pytest.raises((RuntimeError, ValueError)):
                layer.merge()
    assert deltas[0].shape == deltas[1].shape
    torch.testing.assert_close(*deltas)


def test_adalora_scores():
    """ms-swift allots AdaLoRA's ranks itself, from the scores of elements and their sum for each direction."""
    found = []
    for package in (peft_c, peft):
        torch.manual_seed(0)
        config = package.AdaLoraConfig(target_modules=["0"], init_r=4, target_r=2, total_step=10)
        model = package.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
        model(torch.randn(3, 6)).square().sum().backward()
        allocator = model.base_model.rankallocator
        allocator.update_ipt(model.base_model.model)
        budgets = allocator.init_bgt, allocator.target_bgt, allocator.name_set
        allocator._set_budget_scheduler(model.base_model.model)
        assert budgets == (allocator.init_bgt, allocator.target_bgt, allocator.name_set)
        E, A, B = (allocator._element_score(f"0.lora_{kind}.default") for kind in "EAB")
        found.append((*budgets, allocator._combine_ipt(E, torch.stack([A.mean(1), B.mean(0)], 1)), A, B))

        def all_but_one(self, model, budget):
            return {"left": self.init_bgt - 1}

        allocator.mask_to_budget = all_but_one.__get__(allocator)
        assert allocator.update_and_allocate(model.base_model.model, 5, force_mask=True)[1] == {"left": 3}
    assert found[0][:3] == found[1][:3]
    torch.testing.assert_close(found[0][3:], found[1][3:])


@pytest.mark.parametrize("package", ["utils", "tuners"])
def test_modules_are_attributes_after_the_import_of_the_package(package):
    """axolotl says `import peft` and then `peft.utils.other`, as one may with PEFT, which imports them all."""
    path = getattr(peft, package).__path__
    names = sorted(info.name for info in pkgutil.iter_modules(path))
    code = f"import peft_c\nfor name in {names}:\n    assert getattr(peft_c.{package}, name).__name__.endswith(name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_modules_are_pickled_with_what_they_hold():
    """dill, with which datasets sends functions to its processes, pickles the modules they name with all values."""
    for info in pkgutil.walk_packages(peft_c.__path__, "peft_c."):
        if not info.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # of a library that is not installed
                importlib.import_module(info.name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft_c"]:
        module = sys.modules[name]
        dill.dumps(lambda module=module: module, recurse=True)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.lin = nn.Embedding(7, 6), nn.Conv2d(1, 4, 3), nn.Linear(6, 5)

    def forward(self, ids):
        return self.lin(self.embed(ids)).sum() + self.conv(torch.ones(1, 1, 4, 4)).sum()


@pytest.mark.parametrize("name", ["embed", "conv", "lin"])
@pytest.mark.parametrize("kind", ["linear", "ties", "svd", "magnitude_prune_svd"])
def test_combination_of_single_layers(name, kind):
    """Merging methods with weights of their own for each layer call what PEFT calls for each of them."""
    found = []
    for package in (peft_c, peft):
        torch.manual_seed(0)
        config = package.LoraConfig(r=3, target_modules=[name], init_lora_weights=False)
        model = package.get_peft_model(Body(), config)
        model.add_adapter("b", config)
        tuner, layer = model.base_model, model.get_submodule(f"base_model.model.{name}")
        first = [f["default"] for f in (layer.lora_embedding_A, layer.lora_embedding_B)] if name == "embed" else None
        A, B = first or [f["default"].weight for f in (layer.lora_A, layer.lora_B)]
        arguments = kind, ["default", "b"], [0.7, -0.4]
        if kind.endswith("svd"):
            method = tuner._svd_generalized_task_arithmetic_weighted_adapter
            A, B = method(*arguments, 3, layer, A, B, 0.5, "total")
            found.append((A.shape, B.shape, torch.mm(B.flatten(1), A.flatten(1))))
        else:
            A, B = tuner._generalized_task_arithmetic_weighted_adapter(*arguments, layer, 0.5, "total")
            found.append((A, B))
    assert found[0][0].shape == found[1][0].shape if kind in ("linear", "ties") else found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][-1], found[1][-1])


def test_hook_for_mixed_batches():
    """unsloth's tests give layers their `adapter_names` by PEFT's own hook."""
    results = []
    for package in (peft_c, peft):
        hook = importlib.import_module(f"{package.__name__}.tuners.lora.model")._adapter_names_pre_forward_hook
        torch.manual_seed(0)
        config = package.LoraConfig(init_lora_weights=False)
        layer = package.tuners.lora.Linear(nn.Linear(4, 6), "default", config, r=2, lora_alpha=2).eval()
        hook = functools.partial(hook, adapter_names=["default", "__base__"])
        layer.register_forward_pre_hook(hook, with_kwargs=True)
        results.append(layer(torch.ones(2, 4)))
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0][0], results[0][1])


def test_helpers_of_own_configs_and_loaders():
    """Packages with methods of their own take these from PEFT's modules."""
    results = []
    for package in (peft_c, peft):
        config = importlib.import_module(f"{package.__name__}.config")
        saving = importlib.import_module(f"{package.__name__}.utils.save_and_load")
        known = config._check_and_remove_unused_kwargs(package.LoraConfig, {"r": 3, "nonsense": 1})
        entries = [{"weight": torch.zeros(4, 3), "bias": torch.zeros(3), "other": torch.zeros(1)} for _ in range(2)]
        kept = saving._find_mismatched_keys(nn.Linear(3, 5), entries[0])
        taken = saving._find_mismatched_keys(nn.Linear(3, 4), entries[1], ignore_mismatched_sizes=True)
        assert kept[0] is entries[0] and taken[0] is entries[1]
        results.append((known, list(kept[0]), kept[1], list(taken[0]), taken[1]))
    assert results[0] == results[1]


def test_overridden_load_adapter_need_not_know_of_offloading(tmp_path):
    arguments = []
    for package in (peft_c, peft):

        class Own(package.PeftModel):
            def load_adapter(self, *args, **kwargs):
                arguments.append((len(args), set(kwargs)))
                return super().load_adapter(*args, **kwargs)

        config = package.LoraConfig(target_modules=["lin"])
        package.get_peft_model(Body(), config).save_pretrained(tmp_path)
        Own.from_pretrained(Body(), tmp_path)
    assert arguments[0] == arguments[1]
    model = peft_c.PeftModel.from_pretrained(Body(), tmp_path, ephemeral_gpu_offload=True)
    assert model.peft_config["default"].runtime_config.ephemeral_gpu_offload


@pytest.mark.parametrize("where", ["BaseTuner", "LoraModel", "function"])
def test_rule_of_targets_that_is_replaced(where, monkeypatch):
    """axolotl and others put a rule of their own into BaseTuner."""
    found = []
    for package in (peft_c, peft):
        utils = package.tuners.tuners_utils
        rule = utils.check_target_module_exists

        def but_conv(config, key, rule=rule):
            return "conv" not in key and rule(config, key)

        if where == "function":
            monkeypatch.setattr(utils, "check_target_module_exists", but_conv)
        else:
            owner = utils.BaseTuner if where == "BaseTuner" else package.LoraModel
            monkeypatch.setattr(owner, "_check_target_module_exists", staticmethod(but_conv))
        model = package.get_peft_model(Body(), package.LoraConfig(target_modules=["conv", "lin"]))
        found.append(model.targeted_module_names)
    assert found == [["lin"], ["lin"]]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("AdaLora", {"total_step": 9}),
        ("BOFT", {"boft_block_size": 2}),
        ("FourierFT", {"n_frequency": 9}),
        ("HRA", {"r": 2}),
        ("IA3", {"feedforward_modules": []}),
        ("LoHa", {"r": 2}),
        ("Miss", {"r": 2}),
        ("OFT", {"oft_block_size": 2}),
    ],
)
def test_layers_that_a_subclass_makes(method, options):
    """AutoGPTQ's models make some layers themselves and leave others to the function of PEFT's class, without self."""
    found = []
    for package in (peft_c, peft):
        torch.manual_seed(0)
        base = getattr(package.tuners, f"{method}Model")

        class Own(base):
            @staticmethod
            def _create_new_module(config, adapter_name, target, base=base, **kwargs):
                layer = base._create_new_module(config, adapter_name, target, **kwargs)
                layer.own = True
                return layer

        config = getattr(package, f"{method}Config")(target_modules=["0"], **options)
        model = Own(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {"default": config}, "default")
        own = [name for name, module in model.named_modules() if hasattr(module, "own")]
        found.append(
            (own, sorted(name for name, p in model.named_parameters() if p.requires_grad), model(torch.ones(1, 8)))
        )
    assert found[0][0] == found[1][0] == ["model.0"]
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][2], found[1][2])


@pytest.mark.parametrize("name", ["disable_adapter_layers", "enable_adapter_layers", "_enable_adapter_layers"])
def test_switches_that_are_replaced(name, monkeypatch):
    """A program that notes, or locks, when adapters are switched gets to know of those in contexts as well."""
    calls = []
    for package in (peft_c, peft):
        found = []
        method = getattr(package.tuners.tuners_utils.BaseTuner, name)

        def noted(self, *args, found=found, method=method, **kwargs):
            found.append((args, kwargs))
            return method(self, *args, **kwargs)

        monkeypatch.setattr(package.tuners.tuners_utils.BaseTuner, name, noted)
        model = package.get_peft_model(Body(), package.LoraConfig(target_modules=["lin"], init_lora_weights=False))
        ids = torch.arange(3)
        adapted = model(ids)
        with model.disable_adapter():
            assert not torch.equal(model(ids), adapted)
        assert torch.equal(model(ids), adapted)
        calls.append(len(found))
    assert calls[0] == calls[1] > 0


@pytest.mark.parametrize(
    "name", ["active_adapters", "active_adapter", "disable_adapters", "merged", "_cast_input_dtype"]
)
def test_state_that_a_subclass_says_itself(name):
    """petals takes the active adapter from a context, ms-swift that of each thread, by properties of own layers."""
    outputs = []
    own = {
        "active_adapters": property(lambda self: ["b"]),
        "active_adapter": property(lambda self: "b"),
        "disable_adapters": property(lambda self: True),
        "merged": property(lambda self: True),
        "_cast_input_dtype": lambda self, x, dtype: 2 * x,
    }
    x = torch.ones(2, 4)
    for package in (peft_c, peft):
        torch.manual_seed(0)
        Linear = package.tuners.lora.Linear
        config = package.LoraConfig(init_lora_weights=False)
        layer = Linear(nn.Linear(4, 6), "a", config, r=2, lora_alpha=2)
        layer.update_layer("b", 3, lora_alpha=9, config=config)
        plain = layer(x)
        layer.__class__ = type("Own", (Linear,), {name: own[name]})
        outputs.append(layer(x))
        assert not torch.equal(outputs[-1], plain)
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("method", ["LoHaConfig", "LoKrConfig", "FourierFTConfig", "LoraConfig"])
def test_decorated_delta(method, monkeypatch):
    """A wrapper that `functools.wraps` made look like the method is what merging calls."""
    found = []
    for package in (peft_c, peft):
        torch.manual_seed(0)
        start = {"LoraConfig": "init_lora_weights", "FourierFTConfig": None}.get(method, "init_weights")
        options = {"n_frequency": 5} if start is None else {"r": 2, start: False}
        model = package.get_peft_model(Body(), getattr(package, method)(target_modules=["lin"], **options))
        layer = model.base_model.model.lin
        plain = type(layer).get_delta_weight
        before = layer.get_base_layer().weight.clone()

        @functools.wraps(plain)
        def doubled(self, *args, plain=plain, **kwargs):
            return 2 * plain(self, *args, **kwargs)

        monkeypatch.setattr(type(layer), "get_delta_weight", doubled)
        model.merge_adapter()
        found.append(layer.get_base_layer().weight - before)
        torch.testing.assert_close(found[-1], 2 * plain(layer, "default"))
        model.unmerge_adapter()
        torch.testing.assert_close(layer.get_base_layer().weight, before)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "config",
    [
        peft_c.OFTConfig(target_modules=["0"], oft_block_size=4, init_weights=False),
        peft_c.RandLoraConfig(target_modules=["0"], r=2),
        peft_c.VBLoRAConfig(target_modules=["0"], r=2, num_vectors=4, vector_length=4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_traced_for_onnx(config):
    """torch's exporter of traced modules does not know `Tensor.mT`."""
    model = peft_c.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).base_model.model.eval()
    graph = torch.jit.trace(model, torch.randn(2, 8), check_trace=False).inlined_graph
    assert "aten::matmul" in str(graph) or "aten::bmm" in str(graph) or "aten::linear" in str(graph)
    assert "aten::mT" not in str(graph)
