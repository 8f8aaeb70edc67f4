"""What `import peft_c` brings with it, counted in modules rather than measured in time."""

import json
import subprocess
import sys

import pytest

import peft_c

HEAVY = {
    "transformers",
    "accelerate",
    "datasets",
    "diffusers",
    "huggingface_hub",
    "safetensors",
    "tqdm",
    "scipy",
    "sklearn",
    "matplotlib",
    "tokenizers",
    "bitsandbytes",
    "torchvision",
}


def imported_by(code):
    """Names of the modules that `code` imports after torch."""
    program = f"""
import json, sys
import torch
before = set(sys.modules)
{code}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "code,most",
    [
        ("import peft_c", 10),
        ("from peft_c import LoraConfig; LoraConfig(r=4)", 40),
        ("from peft_c import get_peft_model, PeftModel, LoraConfig, explain", 120),
        (
            "import peft_c; m = torch.nn.Sequential(torch.nn.Linear(3, 4)); "
            "m = peft_c.get_peft_model(m, peft_c.LoraConfig(target_modules='all-linear')); m(torch.ones(1, 3)); "
            "m.merge_adapter(); m.unmerge_adapter()",
            200,
        ),
    ],
)
def test_few_modules_and_none_of_the_heavy_ones(code, most):
    names = imported_by(code)
    assert not HEAVY & {name.partition(".")[0] for name in names}
    assert len(names) <= most, names


def test_public_names():
    assert peft_c.__version__ == "0.21.2"
    assert set(peft_c.__all__) <= set(dir(peft_c))
    for name in peft_c.__all__:
        assert getattr(peft_c, name) is not None, name
    assert peft_c.tuners.lora.layer.Linear is peft_c.tuners.lora.Linear
    for name in ("nothing", "__nothing__"):
        with pytest.raises(AttributeError, match=f"module 'peft_c' has no attribute '{name}'"):
            getattr(peft_c, name)
    with pytest.raises(ImportError):
        exec("from peft_c import nothing")


def test_reference_names_that_exist_here_are_the_same_kind():
    peft = pytest.importorskip("peft")
    for name in set(peft_c.__all__) & set(peft.__all__):
        assert type(getattr(peft_c, name)).__name__.lstrip("_") in (
            type(getattr(peft, name)).__name__,
            "Registry",
        ), name


def test_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import peft_c"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "peft_c needs PyTorch: install torch >= 2.10" in done.stderr


def test_everything_works_without_transformers_and_accelerate(tmp_path):
    program = f"""
import sys
for name in ("transformers", "accelerate", "datasets", "diffusers", "peft"):
    sys.modules[name] = None
import torch, peft_c
from torch import nn
torch.manual_seed(0)
def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(5, 3))
x = torch.arange(6)[None]
config = peft_c.LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["2"])
model = peft_c.get_peft_model(base(), config)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
for _ in range(3):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
model.eval()
expected = model(x)
model.save_pretrained({str(tmp_path)!r})
again = peft_c.PeftModel.from_pretrained(base(), {str(tmp_path)!r}, low_cpu_mem_usage=True)
torch.testing.assert_close(again(x), expected)
torch.testing.assert_close(again.merge_and_unload(safe_merge=True)(x), expected)
task = peft_c.LoraConfig(r=2, target_modules=["1"], task_type="FEATURE_EXTRACTION")
peft_c.get_peft_model(base(), task)
model._repr_html_(); model.get_model_status(); peft_c.get_peft_model_state_dict(model)
peft_c.get_peft_model(base(), peft_c.LoraConfig(target_modules=["1"]), mixed=True)(x)
from peft_c import helpers, import_utils
assert import_utils.is_transformers_ge_v5 is False and import_utils.is_transformers_dtensor_tp is False
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
