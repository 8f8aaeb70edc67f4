"""`import peft` answered by peft_c, in processes of their own."""

import os
import subprocess
import sys
import textwrap

import pytest


def run(*arguments, code=None, check=True, stdin=None):
    """Runs `python -m peft_c arguments`, or plain Python with `code`, and returns what it printed."""
    command = [sys.executable, *(("-c", textwrap.dedent(code)) if code else ("-m", "peft_c", *arguments))]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, input=stdin)
    if check:
        assert done.returncode == 0, done.stderr
    return done


SCRIPT = """
import sys
import peft.tuners.lora.layer as theirs, peft
from peft import LoraConfig, get_peft_model
import peft_c, peft_c.tuners.lora.layer as ours
from peft_c.utils import other
import peft.utils.other

assert peft is peft_c and theirs is ours and peft.utils.other is other
for name, module in list(sys.modules.items()):
    if name.split(".")[0] == "peft":
        assert module is sys.modules["peft_c" + name[4:]], name
        assert module.__spec__.name.split(".")[0] == "peft_c", name
import importlib.metadata
assert importlib.metadata.version("peft") == peft_c.__version__ == "0.21.2"
try:
    import peft.nothing
except ModuleNotFoundError as exc:
    assert exc.name == "peft.nothing"
else:
    raise AssertionError("found peft.nothing")
print("ran", __name__, sys.argv[1:], LoraConfig.__module__)
"""


def test_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "\nimport beside\nprint(beside.x)\n")
    (tmp_path / "beside.py").write_text("x = 'imported from the folder of the script'")
    out = run(str(script), "--flag", "value").stdout
    assert "ran __main__ ['--flag', 'value'] peft.tuners.lora.config" in out
    assert "imported from the folder of the script" in out


def test_module_code_and_exit_status(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "as_module.py").write_text("import peft, sys; print(peft.__name__, sys.argv[1:])")
    assert run("-m", "as_module", "a").stdout == "peft_c ['a']\n"
    assert run("-c", "import peft, sys; print(peft.__name__, sys.argv)", "b").stdout == "peft_c ['-c', 'b']\n"
    assert run("-", "b", stdin="import peft, sys; print(peft.__name__, sys.argv)").stdout == "peft_c ['-', 'b']\n"
    assert run("-c", "import sys; sys.exit(7)", check=False).returncode == 7
    failed = run("-c", "raise ValueError('mine')", check=False)
    assert failed.returncode == 1 and "ValueError: mine" in failed.stderr


def test_transformers_uses_it(tmp_path):
    pytest.importorskip("transformers")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys, torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils import is_peft_available
        assert is_peft_available()
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
        model = LlamaForCausalLM(LlamaConfig(**sizes))
        from peft import LoraConfig
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        layer = model.model.layers[0].self_attn.q_proj
        import peft_c.tuners.lora.layer
        assert type(layer) is peft_c.tuners.lora.layer.Linear
        ids = torch.arange(4)[None]
        adapted = model(input_ids=ids).logits
        model.disable_adapters()
        assert not torch.equal(adapted, model(input_ids=ids).logits)
        model.enable_adapters()
        model.save_pretrained(sys.argv[1])
        model = LlamaForCausalLM(LlamaConfig(**sizes))
        model.load_adapter(sys.argv[1])
        assert not any(getattr(m, "__file__", None) and "site-packages/peft/" in m.__file__
                       for m in list(sys.modules.values()))
        print("done")
        """)
    )
    assert run(str(script), str(tmp_path / "saved")).stdout.endswith("done\n")
    assert (tmp_path / "saved" / "adapter_config.json").is_file()


def test_in_a_notebook():
    code = """
    import peft_c
    peft_c.install_as_peft()
    peft_c.install_as_peft()
    import peft
    assert peft is peft_c
    from peft.tuners.tuners_utils import BaseTunerLayer
    import peft_c.tuners.tuners_utils as ours
    assert BaseTunerLayer is ours.BaseTunerLayer
    """
    run(code=code)


def test_classes_are_named_after_peft(tmp_path):
    """Some programs know PEFT's classes by `__module__`; pickles, and torch's list of what they may hold, do too."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    torch.save({"config": peft.LoraConfig(r=3)}, tmp_path / "saved.pt")
    code = f"""
    import inspect, pickle, sys, torch
    import peft_c.tuners.oft
    peft_c.install_as_peft()
    import peft
    for name in dir(peft):
        value = getattr(peft, name)
        if isinstance(value, type) and value.__module__ != "typing":
            assert value.__module__.startswith("peft."), (name, value.__module__)
            assert pickle.loads(pickle.dumps(value)) is value and inspect.getsource(value), name
    for method, module in ((peft.OFTConfig, "peft.tuners.oft"), (peft.LoraConfig, "peft.tuners.lora.layer")):
        config = method(target_modules=["0"])
        model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 32)), config)
        assert type(model.base_model.model[0]).__module__ == module
        assert repr(pickle.loads(pickle.dumps(model))) == repr(model)
    torch.serialization.add_safe_globals([peft.LoraConfig, peft.LoraRuntimeConfig, peft.PeftType, set])
    assert torch.load({str(tmp_path / "saved.pt")!r}, weights_only=True)["config"] == peft.LoraConfig(r=3)
    """
    run(code=code)


def test_refuses_when_the_real_peft_is_there(tmp_path):
    (tmp_path / "peft.py").write_text("")
    code = f"""
    import sys
    sys.path.insert(0, {str(tmp_path)!r})
    import peft, peft_c
    try:
        peft_c.install_as_peft()
    except RuntimeError as exc:
        assert "already imported" in str(exc) and "peft.py" in str(exc) and "python -m peft_c" in str(exc)
    else:
        raise AssertionError
    assert sys.modules["peft"] is peft and peft is not peft_c
    """
    run(code=code)


def test_command_line():
    assert "python -m peft_c SCRIPT.py" in run("--help").stdout
    assert "0.21.2" in run("--version").stdout
    facts = dict(line.split(None, 1) for line in run("env").stdout.splitlines())
    assert {"kernels", "threads", "python", "torch", "transformers"} <= facts.keys()
    for wrong in (("no_such_file.py",), ("--nonsense",), ("-m",)):
        done = run(*wrong, check=False)
        assert done.returncode == 2 and "--help" in done.stderr and "Traceback" not in done.stderr
