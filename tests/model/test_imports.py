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
