"""Turn examples/demo.py into examples/demo.ipynb and run it (`make notebook`)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def cells(source: str) -> list[tuple[str, str]]:
    """(kind, text) of each `# %%` part of a script; what stands before the first one is left out."""
    found = []
    for head, body in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", source, flags=re.M):
        if "[markdown]" in head:
            found.append(("markdown", re.sub(r"^# ?", "", body, flags=re.M).strip()))
        else:
            found.append(("code", re.sub(r"  # noqa: \w+", "", body).strip()))
    return found


def last_words(text: str) -> str:
    """A terminal's view of a stream: a progress bar's last state."""
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))


def tidy(notebook) -> None:
    """Join the pieces of each stream, keep what stays on the screen, and drop what changes from run to run."""
    for cell in notebook.cells:
        joined: list = []
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if joined and output.output_type == "stream" and joined[-1].get("name") == output.name:
                joined[-1].text += output.text
            else:
                joined.append(output)
        for output in joined:
            if output.output_type == "stream":
                text = re.sub(r"^\S*\.py:\d+: \w*Warning:.*\n(?:  .*\n)?", "", last_words(output.text), flags=re.M)
                output.text = text
        if cell.cell_type == "code":
            cell.outputs = [o for o in joined if o.output_type != "stream" or o.text.strip()]


def main() -> None:
    """Build, run in examples/, write."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook()
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    for number, (kind, text) in enumerate(cells((HERE / "demo.py").read_text(encoding="utf-8"))):
        cell = make[kind](text)
        cell["id"] = f"cell-{number}"
        notebook.cells.append(cell)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
    ).execute()
    tidy(notebook)
    target = HERE / "demo.ipynb"
    target.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{target.relative_to(HERE.parent)} written")


if __name__ == "__main__":
    sys.exit(main())
