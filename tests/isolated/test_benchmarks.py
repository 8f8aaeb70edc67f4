"""The benchmark program runs: its list of cases, and one of them from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "benchmarks" / "bench.py"


def bench(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_list():
    listed = bench("--list").splitlines()
    for words in (
        "import",
        "inject",
        "add_adapter",
        "set_adapter",
        "merge unmerge",
        "training step",
        "memory",
        "save",
        "methods",
    ):
        assert any(words in line for line in listed), words


def test_one_case(tmp_path):
    pytest.importorskip("matplotlib")
    bench("--quick", "--only", "forward layer M=1 fp32", "--out", str(tmp_path))
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert len(rows) == 1
    assert {"peft_c", "torch", "floor"} <= set(rows[0]["best"])
    assert all(value > 0 for value in rows[0]["best"].values())
    assert (tmp_path / "bench.png").stat().st_size > 1000
