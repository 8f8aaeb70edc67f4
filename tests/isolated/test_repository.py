"""The repository itself: what may include what, how long files are, nothing that belongs to one machine."""

import ast
import importlib.util
import re
import statistics
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".c", ".h", ".inc"))
PYTHON = sorted((ROOT / "peft_c").rglob("*.py"))

# A unit includes its own level's headers and those below; kernels stand apart and include nothing but their own.
LEVELS = {
    **dict.fromkeys(("torch_abi", "kernels"), 0),
    **dict.fromkeys(("torch_shim",), 1),
    **dict.fromkeys(("state",), 2),
    **dict.fromkeys(("view", "gate"), 3),
    **dict.fromkeys(("law", "merge", "forward"), 4),
    **dict.fromkeys(("layer", "walk", "mixed"), 5),
    **dict.fromkeys(("module",), 6),
}
OTHERS = 5  # units that are not in the table: helpers of layer and walk


def tracked() -> list[Path]:
    """The files under version control, or all but the ignored folders where there is no git."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    return [p for p in ROOT.rglob("*") if p.is_file() and not {".git", ".venv", "build", "out"} & set(p.parts)]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def included(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+"([^"]+)"', text_of(path), flags=re.M)


def test_kernels_include_nothing_of_python_or_torch():
    for path in CSRC:
        if "kernels" not in path.parts:
            continue
        assert not re.search(r"Python\.h|numpy|torch_|dlpack|state\.h", "\n".join(included(path))), path
        system = re.findall(r"#\s*include\s+<([^>]+)>", text_of(path))
        assert not [name for name in system if "Python" in name or "numpy" in name], path
        assert not [name for name in included(path) if name.startswith("..")], path


def level(name: str) -> int:
    """The level of the unit that a file in csrc belongs to: view_numpy.h belongs to view."""
    unit = "kernels" if name.startswith("kernels/") else Path(name).stem
    return next(
        (LEVELS[u] for u in sorted(LEVELS, key=len, reverse=True) if unit == u or unit.startswith(u + "_")), OTHERS
    )


@pytest.mark.parametrize("path", [p for p in CSRC if p.parent.name == "csrc"], ids=lambda p: p.name)
def test_the_include_law(path):
    for name in included(path):
        assert level(name) <= level(path.name), f"{path.name} includes {name}, which stands above it"


def test_no_include_goes_in_a_circle():
    graph = {path.name: [Path(name).name for name in included(path)] for path in CSRC if path.suffix == ".h"}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", CSRC, ids=lambda p: p.name)
def test_c_files_stay_short(path):
    assert len(text_of(path).splitlines()) < 450


def test_nothing_of_one_machine():
    words = r"/(?:home|root|Users|work)/\w+|/tmp/\w+|[\w.]+@[\w-]+\.(?:com|org)|pypi\.org|pythonhosted|files\.python"
    allowed = {Path(__file__).name}
    found = []
    for path in tracked():
        if path.suffix in (".png", ".so") or path.name in allowed:
            continue
        for number, line in enumerate(text_of(path).splitlines(), 1):
            if re.search(words, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_no_unfinished_business():
    found = []
    for path in [*CSRC, *PYTHON]:
        for number, line in enumerate(text_of(path).splitlines(), 1):
            if re.search(r"\b(TODO|FIXME|XXX)\b", line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


# imported by transformers, or when something is asked for that derives from its classes
WITH_TRANSFORMERS = {"transformers_weight_conversion.py", "adamss_callback.py", "shadow_models.py"}


def test_no_heavy_imports_at_module_level():
    heavy = {"transformers", "accelerate", "datasets", "huggingface_hub", "safetensors", "tqdm", "diffusers", "scipy"}
    found = []
    for path in PYTHON:
        if path.name in WITH_TRANSFORMERS:
            continue
        for node in ast.parse(text_of(path)).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found += [f"{path.relative_to(ROOT)}: {name}" for name in names if name.split(".")[0] in heavy]
    assert not found, "\n".join(found)


def test_every_module_says_what_it_is():
    silent = [str(p.relative_to(ROOT)) for p in PYTHON if not ast.get_docstring(ast.parse(text_of(p)))]
    assert not silent, f"no docstring: {', '.join(silent)}"


def rooms() -> dict[str, list[Path]]:
    """The files of each method that is written as a room."""
    tuners = ROOT / "peft_c" / "tuners"
    prompts = "from .prompt_learning import"
    names = [path.stem for path in tuners.glob("*.py") if re.search(r"^register\(", text_of(path), flags=re.M)]
    names = [name for name in names if prompts not in text_of(tuners / f"{name}.py")]
    return {name: [tuners / f"{name}.py", *sorted(tuners.glob(f"{name}_*.py"))] for name in names}


def test_rooms_are_small():
    lengths = {name: len(text_of(files[0]).splitlines()) for name, files in rooms().items()}
    assert len(lengths) >= 36
    assert statistics.median(lengths.values()) <= 120
    long = [path.name for files in rooms().values() for path in files if len(text_of(path).splitlines()) > 250]
    assert not long


# modules that only rooms use, and PEFT's of that name where it has one
HELPERS = ("block_dropout", "lycoris_utils", "shared_room", "sparse_room", "wavelets")


def lines(*paths: Path) -> int:
    return sum(len(text_of(path).splitlines()) for path in paths)


def test_rooms_are_a_fifth_of_peft():
    spec = importlib.util.find_spec("peft")
    if spec is None:
        pytest.skip("peft is not installed")
    theirs = Path(spec.origin).parent / "tuners"
    methods = rooms()
    own = lines(*(path for files in methods.values() for path in files))
    own += lines(*(ROOT / "peft_c" / "tuners" / f"{name}.py" for name in HELPERS))
    peft = lines(*(path for name in (*methods, *HELPERS) for path in (theirs / name).glob("*.py")))
    peft += lines(*(path for name in HELPERS if (path := theirs / f"{name}.py").exists()))
    assert own < 0.2 * peft, f"{own} lines, {own / peft:.3f} of PEFT's {peft}"
