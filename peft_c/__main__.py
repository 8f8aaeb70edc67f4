"""`python -m peft_c`: run a program with `import peft` meaning peft_c, or show the environment."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import runpy
import sys
from types import ModuleType

from . import _C, __version__

_HELP = """\
Run a program that says `import peft` with peft_c in its place:

  python -m peft_c SCRIPT.py [ARGUMENTS]     run a script
  python -m peft_c -m MODULE [ARGUMENTS]     run a module, such as trl.scripts.sft
  python -m peft_c -c CODE [ARGUMENTS]       run a piece of code; with - in place of -c CODE, what comes from stdin

Within the program, `import peft` and `import peft.x.y` give peft_c's modules, the same objects under both names, and
the version of "peft" reads {version}; the real peft need not be installed. Processes that the program starts afresh
(such as the workers of `spawn`) import what they find: start each of them in the same way.

  python -m peft_c env                       show versions, processor, threads, symbols found in torch
  python -m peft_c --version                 show the version
  python -m peft_c --help                    show this

In a notebook: `import peft_c; peft_c.install_as_peft()` in the first cell.
Environment: PEFT_C_FAST=0 switches the C paths off, PEFT_C_ISA=avx2 (generic, ...) chooses kernels,
PEFT_C_EXACT=0 merges without records for exact unmerging, PEFT_C_KEPT=0 (MiB; 256) bounds the adapted weights that are
kept between forwards in evaluation.
"""

_SWITCHES = ("PEFT_C_FAST", "PEFT_C_ISA", "PEFT_C_EXACT", "PEFT_C_KEPT")

_LIBRARIES = (
    "torch",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "transformers",
    "accelerate",
    "diffusers",
    "peft",
)


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, str]:
    """What matters for a bug report, as label -> text."""
    import torch

    core = _C.info()
    symbols = core.get("symbols", "all that are needed were found")
    facts = {
        "peft_c": f"{_installed('peft_c')} (API and files of PEFT {__version__})",
        "extension": os.path.basename(_C.__file__),
        "kernels": f"{core['isa']}, of {', '.join(core['isas'])} on this {platform.machine()} processor",
        "threads": f"{core['threads']} (torch.get_num_threads), {os.cpu_count()} CPUs",
        "C paths": "on" if _C.is_fast() else "off",
        "torch symbols": symbols if isinstance(symbols, str) else ", ".join(symbols),
        "python": f"{platform.python_version()} ({platform.python_implementation()}), {platform.platform()}",
    }
    facts.update({name: os.environ[name] for name in _SWITCHES if name in os.environ})
    facts.update({name: _installed(name) for name in _LIBRARIES})
    facts["torch"] = f"{torch.__version__} (CUDA {torch.version.cuda or 'not built in'})"
    return facts


def _show_environment() -> None:
    facts = environment()
    width = max(map(len, facts))
    for label, text in facts.items():
        print(f"{label:<{width}}  {text}")


def main(arguments: list[str]) -> int:
    """Returns the exit status; a program that is run ends the process as it would on its own."""
    first, rest = (arguments or ["--help"])[0], arguments[1:]
    if first in ("-h", "--help"):
        print(_HELP.format(version=__version__), end="")
        return 0 if arguments else 2
    if first == "--version":
        print(f"peft_c {_installed('peft_c')} (API and files of PEFT {__version__})")
        return 0
    if first == "env" and not rest:
        _show_environment()
        return 0
    if first in ("-m", "-c") and not rest:
        print(f"{first} needs an argument; see python -m peft_c --help", file=sys.stderr)
        return 2
    if first.startswith("-") and first not in ("-m", "-c", "-"):
        print(f"unknown option {first}; see python -m peft_c --help", file=sys.stderr)
        return 2
    if first not in ("-m", "-c", "-") and not os.path.exists(first):
        print(f"no such file: {first}; see python -m peft_c --help", file=sys.stderr)
        return 2

    from .alias import install_as_peft

    install_as_peft()
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first in ("-c", "-"):
        name, code, *rest = ("<stdin>", sys.stdin.read(), *rest) if first == "-" else ("<string>", *rest)
        sys.argv, sys.path[0] = [first, *rest], ""
        program = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(code, name, "exec"), program.__dict__)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
