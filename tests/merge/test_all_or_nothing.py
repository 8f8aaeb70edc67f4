"""Operations on a whole model that are cut off, by a failing allocation or by Ctrl-C, leave it as it was."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads a malloc of glibc's kind")


def run(what, **environment):
    command = [sys.executable, str(HERE / "interrupted.py"), what]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@linux
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.skipif("PEFT_C_SANITIZED" in os.environ, reason="the sanitizer has an allocator of its own")
def test_failing_allocations(tmp_path):
    library = tmp_path / "failing_malloc.so"
    source = str(HERE / "failing_malloc.c")
    subprocess.run(["gcc", "-std=c11", "-O1", "-shared", "-fPIC", source, "-o", str(library)], check=True)
    assert len(run("memory", LD_PRELOAD=str(library))) == 28


def test_ctrl_c():
    assert len(run("signals")) == 28
