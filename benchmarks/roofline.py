"""The kernels under the machine's two roofs: memory bandwidth and multiply-adds (`make roofline`).

    python benchmarks/roofline.py [--quick] [--threads N] [--out docs/roofline.png]

Both roofs are measured in the same run: bandwidth with an in-place pass over the weights (`neg_`), the peak with a
large matmul of torch in the same dtype. A merge of rank r does 2 r operations for each weight that it reads and
writes, so the rank alone decides under which roof it stands. A forward does 2 r (K + N) operations a row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import kernel_times
import klib
import torch
from report import COLOURS, GRID, INK, MUTED

SHAPE = (4096, 4096)
DTYPES = ("f32", "bf16")
RANKS = (4, 8, 16, 32, 64, 128, 256)
ROWS = (1, 4, 16, 64, 256, 1024)
MERGES = {
    "merge": ("merge", COLOURS["peft_c"], "o-"),
    "merge_exact": ("merge that keeps a record", COLOURS["peft_c"], "s--"),
    "addmm+": ("W.addmm_(B, A)", COLOURS["torch"], "o-"),
    "peft+": ("W += B @ A (PEFT)", COLOURS["peft"], "o-"),
}


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "roofline.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    library, pool = klib.load(), kernel_times.torch_parallel()
    budget = 0.2 if options.quick else 2.0
    peak = kernel_times.peak_flops(DTYPES, budget)
    merges = {
        dtype: [kernel_times.merge_case(library, pool, dtype, SHAPE, r, budget, peak) for r in RANKS]
        for dtype in DTYPES
    }
    forwards = [kernel_times.apply_case(library, pool, "f32", SHAPE, 16, m, budget / 8) for m in ROWS]
    isa = library.pk_isa_name().decode()
    about = f"{SHAPE[0]} x {SHAPE[1]}, {options.threads} threads, {isa}, torch {torch.__version__}"
    _plot(merges, forwards, peak, about, options.out)
    for dtype, rows in merges.items():
        for row in rows:
            print(kernel_times.merge_line(row))
        print(f"{dtype}: {_bandwidth(dtype, rows) / 1e9:.1f} GB/s, peak {peak[dtype] / 1e9:.0f} GFLOP/s")
    print("\n".join(map(kernel_times.apply_line, forwards)))


def _bandwidth(dtype: str, rows: list[dict]) -> float:
    """Bytes a second of the fastest in-place pass: every weight is read once and written once."""
    return 2 * rows[0]["n"] * rows[0]["k"] * kernel_times.TORCH[dtype].itemsize / min(row["floor_rw"] for row in rows)


def _plot(merges: dict, forwards: list[dict], peak: dict[str, float], about: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "font.size": 8}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), dpi=110)
        for axis, (dtype, rows) in zip(axes, merges.items(), strict=False):
            _merges(axis, dtype, rows, peak[dtype])
        _forwards(axes[2], forwards)
        axes[0].set_ylabel("GFLOP/s")
        axes[2].set_ylabel("microseconds a call")
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(color=GRID, linewidth=0.6)
            axis.set_axisbelow(True)
            axis.legend(frameon=False, fontsize=7)
        figure.supxlabel(about, fontsize=8, color=MUTED)
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)


def _merges(axis, dtype: str, rows: list[dict], peak: float) -> None:
    """GFLOP/s over the rank, under the roof of bandwidth (a slope) and of arithmetic (a level)."""
    each = [2.0 * row["n"] * row["k"] * row["r"] for row in rows]
    ranks, size = [row["r"] for row in rows], 2 * rows[0]["n"] * rows[0]["k"] * kernel_times.TORCH[dtype].itemsize
    roof = [min(peak, flops / size * _bandwidth(dtype, rows)) / 1e9 for flops in each]
    axis.plot(ranks, roof, color=COLOURS["floor"], linewidth=3, label="roof")
    for key, (label, colour, mark) in MERGES.items():
        speeds = [flops / row[key] / 1e9 for flops, row in zip(each, rows, strict=True)]
        axis.plot(ranks, speeds, mark, color=colour, label=label, markersize=4, linewidth=1)
    _axes(axis, ranks, "rank")
    axis.set_title(f"merge, {dtype}: more is better", loc="left", fontsize=9)


def _forwards(axis, rows: list[dict]) -> None:
    """Time of adding one adapter's product to a layer's output, over the rows of the batch."""
    ms = [row["m"] for row in rows]
    for key, label, colour in (("apply", "one kernel", "peft_c"), ("composed", "composed in torch", "torch")):
        axis.plot(ms, [row[key] * 1e6 for row in rows], "o-", color=COLOURS[colour], label=label, markersize=4)
    _axes(axis, ms, "rows of x")
    axis.set_title("forward, f32, r = 16: less is better", loc="left", fontsize=9)


def _axes(axis, values: list[int], label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(values, [str(value) for value in values])
    axis.set_xlabel(label)


if __name__ == "__main__":
    main()
