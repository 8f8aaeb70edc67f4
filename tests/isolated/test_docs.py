"""The documentation: its links lead somewhere and its Python blocks run."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(page: Path) -> list[str]:
    """The page's ```python blocks; one that starts with `# not run` is left out."""
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [block for block in found if not block.startswith("# not run")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path):
    code = "\n\n".join(blocks(page))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, f"{page.name}:\n{done.stderr[-3000:]}"


def test_the_pages_are_there():
    names = {page.name for page in PAGES}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "DEVELOPERS.md"} <= names
    assert {"architecture.md", "adding_a_tuner.md", "numerics.md", "migrating.md", "performance.md"} <= names


def test_methods_is_what_its_script_writes():
    spec = importlib.util.spec_from_file_location("methods", ROOT / "docs" / "methods.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    files = [ROOT / "docs" / "methods.md", *(ROOT / "docs" / "methods").iterdir()]
    written = {path.relative_to(ROOT / "docs").as_posix(): path.read_text(encoding="utf-8") for path in files}
    assert script.pages() == written, "run `python docs/methods.py`"
