"""What a run leaves: a table on the terminal, JSON, a picture."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from timing import NAMES, Row

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLOURS = {"peft_c": "#2563eb", "peft": "#d97706", "torch": "#059669", "floor": "#9ca3af"}


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}x" if value >= 10 else f"{value:.2f}x"


def _bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else text


def header(theme: str) -> str:
    """The title line of a theme's part of the table."""
    names = "".join(f"{name:>10}" for name in NAMES)
    return _bold(f"\n{theme:<62}{'unit':>5}{names}{'/ peft':>10}{'/ torch':>9}{'/ floor':>9}")


def line(row: Row) -> str:
    """One row: the best of each contender, and how many times faster (or smaller) peft_c is than the others."""
    cells = "".join(f"{_number(row.best.get(name)):>10}" for name in NAMES)
    ratios = f"{_ratio(row.ratio('peft')):>10}{_ratio(row.ratio('torch')):>9}{_ratio(row.ratio('floor')):>9}"
    return f"{row.name:<62}{row.unit if row.unit != 'seconds' else 's':>5}{cells}{ratios}"


def summary(rows: list[Row]) -> list[str]:
    """The geometric mean over the rows of each theme."""
    lines = []
    for theme in dict.fromkeys(row.theme for row in rows):
        parts = []
        for other in ("peft", "torch", "floor"):
            ratios = [r for row in rows if row.theme == theme and (r := row.ratio(other))]
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                parts.append(f"{other} / peft_c = {mean:.2f} ({len(ratios)} rows, lowest {min(ratios):.2f})")
        lines.append(f"{theme}: " + "; ".join(parts))
    return lines


def write_json(rows: list[Row], about: dict, path: Path) -> None:
    """Everything measured, one object a row."""
    body = [{"theme": r.theme, "row": r.name, "unit": r.unit, "best": r.best, "note": r.note} for r in rows]
    path.write_text(json.dumps({"environment": about, "rows": body}, indent=1))


def plot(rows: list[Row], about: dict, path: Path) -> None:
    """One dot a contender on a logarithmic axis, one line a row, one panel a theme."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    themes = list(dict.fromkeys((row.theme, row.unit) for row in rows))
    panels = [[row for row in rows if (row.theme, row.unit) == key] for key in themes]
    heights = [len(panel) + 2.2 for panel in panels]
    style = {"text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": INK, "font.size": 8}
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(10, 0.21 * sum(heights) + 0.6), dpi=110, height_ratios=heights, squeeze=False
        )
        for axis, (theme, unit), panel in zip(axes[:, 0], themes, panels, strict=True):
            _panel(axis, theme, unit, panel)
        handles = [plt.Line2D([], [], marker="o", linestyle="", color=COLOURS[n], label=n) for n in NAMES]
        axes[0, 0].legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False)
        figure.supxlabel(
            f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}", fontsize=8, color=MUTED
        )
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)


def _panel(axis, theme: str, unit: str, panel: list[Row]) -> None:
    """One theme: rows from top to bottom."""
    for y, row in enumerate(panel):
        values = [max(v, 1e-3) for v in row.best.values()]
        axis.plot([min(values), max(values)], [y, y], color=GRID, linewidth=1.5, zorder=1)
        for name, value in row.best.items():
            size = 34 if name == "peft_c" else 20
            axis.scatter(max(value, 1e-3), y, s=size, color=COLOURS[name], zorder=3 if name == "peft_c" else 2)
    axis.set_yticks(range(len(panel)), [row.name for row in panel])
    axis.set_ylim(len(panel) - 0.4, -0.6)
    axis.set_xscale("log")
    axis.set_title(f"{theme} ({unit}, less is better)", loc="left", color=INK, fontsize=9)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
