"""What importing peft_c costs and says, each in a fresh interpreter."""

import subprocess
import sys

HEAVY = "transformers accelerate datasets huggingface_hub safetensors tqdm diffusers scipy matplotlib pandas".split()


def python(code: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run code, or a module and its arguments, in a fresh interpreter."""
    command = [sys.executable, *(arguments or ("-c", code))]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 or not check, done.stderr
    return done


def test_nothing_heavy_is_imported():
    code = f"""
import sys, torch
before = set(sys.modules)
import peft_c
from peft_c import LoraConfig, get_peft_model
print(" ".join(sorted((set(sys.modules) - before) & set({HEAVY!r}))))
"""
    assert python(code).stdout.split() == []


def test_lora_trains_without_transformers_and_accelerate():
    code = """
import sys
for name in ("transformers", "accelerate"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
from peft_c import LoraConfig, get_peft_model
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
model(torch.ones(2, 4)).sum().backward()
model.merge_adapter()
model.unmerge_adapter()
print(model.merge_and_unload())
"""
    assert "Linear" in python(code).stdout


def test_without_torch_the_error_names_it():
    done = python("import sys; sys.modules['torch'] = None; import peft_c", check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "ImportError" in last or "ModuleNotFoundError" in last
    assert "torch" in last


def test_import_peft_under_the_runner(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys
import peft
import peft.tuners.lora.layer as layer
from peft.tuners.tuners_utils import BaseTunerLayer
import peft_c, peft_c.tuners.lora.layer
assert peft is peft_c and layer is sys.modules["peft_c.tuners.lora.layer"]
assert issubclass(layer.Linear, BaseTunerLayer) and __name__ == "__main__"
print(sys.argv[1:], __file__)
"""
    )
    done = python("", "-m", "peft_c", str(script), "--steps", "3")
    assert done.stdout.strip() == f"['--steps', '3'] {script}"


def test_install_as_peft_refuses_when_another_is_imported():
    code = """
import sys, types
import peft_c
sys.modules["peft"] = types.ModuleType("peft")
try:
    peft_c.install_as_peft()
except Exception as error:
    print(type(error).__name__, error)
"""
    said = python(code).stdout
    assert "peft" in said and said.strip(), "install_as_peft() replaced a peft that was already imported"


def test_install_as_peft():
    code = """
import peft_c
peft_c.install_as_peft()
peft_c.install_as_peft()
import peft
from peft.utils import TaskType
import peft_c.utils
assert peft is peft_c and TaskType is peft_c.utils.TaskType
print("same")
"""
    assert python(code).stdout.strip() == "same"


def test_every_module_imports():
    code = """
import importlib, pkgutil, peft_c
for module in pkgutil.walk_packages(peft_c.__path__, "peft_c."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in peft_c.__all__:
    getattr(peft_c, name)
"""
    python(code)
