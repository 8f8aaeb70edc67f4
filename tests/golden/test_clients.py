"""What other projects do with the inside of peft works on peft_c in the same way."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path

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


def test_modules_are_attributes_after_the_import_of_the_package():
    """axolotl says `import peft` and then `peft.utils.other`, as one may with PEFT, which imports them all."""
    names = sorted(info.name for info in pkgutil.iter_modules(peft.utils.__path__))
    code = f"import peft_c\nfor name in {names}:\n    assert getattr(peft_c.utils, name).__name__.endswith(name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
