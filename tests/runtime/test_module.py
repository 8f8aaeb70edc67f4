"""The extension itself: its import, its stub, fork, subprocesses, the limited API."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_c import _C

PACKAGE = Path(_C.__file__).parent


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=300
    )


LOAD = """
import importlib.util, sys
def load():
    spec = importlib.util.spec_from_file_location("peft_c._C", {path!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""


def load_after(code, **env):
    done = run(LOAD.format(path=_C.__file__) + code, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_torch():
    out = load_after("""
sys.modules["torch"] = None
try: load()
except ImportError as error: print(error)
""")
    assert "peft_c needs torch >= 2.10" in out and "pip install torch" in out


def test_torch_without_the_exchange_api():
    out = load_after("""
import torch
del torch.Tensor.__dlpack_c_exchange_api__
torch.__version__ = "2.9.1"
try: load()
except ImportError as error: print(error)
""")
    assert "torch >= 2.10" in out and "2.9.1 lacks torch.Tensor.__dlpack_c_exchange_api__" in out


def test_torch_without_a_symbol():
    out = load_after("""
import torch
del torch._C._len_torch_function_stack
try: load()
except ImportError as error: print(error)
""")
    assert f"the installed torch {torch.__version__} lacks torch._C._len_torch_function_stack" in out


def test_torch_without_its_library():
    """A stand-in for torch, in a process where libtorch_cpu is not loaded."""
    out = load_after("""
import ctypes, types
class Table(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p),
                ("entries", ctypes.c_void_p * 5)]
table = Table(1, 3, None, (ctypes.c_void_p * 5)(1, 1, 1, 1, 1))
new = ctypes.pythonapi.PyCapsule_New
new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
torch = types.ModuleType("torch")
torch.__version__ = "2.99"
torch.Tensor = type("Tensor", (), {
    "__dlpack_c_exchange_api__": new(ctypes.addressof(table), b"dlpack_exchange_api", None)})
sys.modules["torch"] = torch
try: load()
except ImportError as error: print(error)
""")
    assert "the installed torch 2.99 lacks the library" in out


def test_instruction_set():
    info = _C.info()
    assert info["isa"] in info["isas"] and info["isas"][-1] == "generic"
    assert info["threads"] == torch.get_num_threads()
    assert "generic" in load_after("import torch; print(load().info()['isa'])", PEFT_C_ISA="generic")
    out = load_after(
        """
import torch
try: load()
except ImportError as error: print(error)
""",
        PEFT_C_ISA="abacus",
    )
    assert "PEFT_C_ISA=abacus" in out


def test_switch_from_the_environment():
    code = "import torch; print(load().is_fast())"
    assert load_after(code, PEFT_C_FAST="0").strip() == "False"
    assert load_after(code, PEFT_C_FAST="1").strip() == "True"


def test_numpy_is_not_needed():
    out = load_after("""
import torch
for name in [n for n in sys.modules if n.split(".")[0] == "numpy"]:
    del sys.modules[name]
C = load()
print(C.describe(torch.zeros(3))["shape"], "numpy" in sys.modules)
try: C.describe([1])
except TypeError as error: print(error)
""")
    assert out.startswith("(3,) False") and "no tensor or array" in out


def test_two_modules_in_one_process():
    """Each module object has its own state."""
    out = load_after("""
import torch
a, b = load(), load()
a.set_fast(False)
print(a is b, a.is_fast(), b.is_fast())
del a
import gc; gc.collect()
print(b.describe(torch.zeros(2))["shape"])
""")
    assert out.splitlines() == ["False False True", "(2,)"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork():
    """One thread: torch's own pools do not survive a fork."""
    folder = str(Path(__file__).parent)
    done = run(f"""
import os, sys, torch
sys.path.insert(0, {folder!r})
from toy_layer import make
torch.set_num_threads(1)
layer, x, big = make(k=64, n=64).eval(), torch.randn(3, 64), torch.randn(200, 64)
with torch.no_grad():
    expected = layer(x), layer(big)
    child = os.fork()
    if child == 0:
        os._exit(0 if all(map(torch.equal, (layer(x), layer(big)), expected)) else 2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert done.stdout.strip() == "0", done.stderr


def test_the_stub_is_complete():
    tree = ast.parse((PACKAGE / "_C.pyi").read_text(encoding="utf-8"))
    stub = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    public = {name for name in dir(_C) if not name.startswith("_")}
    assert public == {name for name in stub if not name.startswith("_")}
    for name in public:
        if isinstance(stub[name], ast.ClassDef):
            methods = {node.name for node in stub[name].body if isinstance(node, ast.FunctionDef)}
            assert methods == {m for m in vars(getattr(_C, name)) if not m.startswith("__")}
        else:
            assert getattr(_C, name).__doc__, f"{name} has no docstring"
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF with nm")
def test_the_library_is_abi3_and_not_linked_to_torch():
    assert ".abi3." in _C.__file__
    try:
        needed = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
        symbols = subprocess.run(["nm", "-D", _C.__file__], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no binutils")
    assert "torch" not in needed
    defined = [line.split()[-1] for line in symbols.splitlines() if " T " in line]
    assert [name for name in defined if not name.startswith("_")] == ["PyInit__C"]
