"""Kernel figures against torch's addmm_, PEFT's expression and the floor, interleaved minima; a table and JSON.

    python benchmarks/kernel_times.py [--quick] [--only merge|apply] [--dtypes f32,bf16] [--ranks 8,64] [--out a.json]

The floor of a merge is the larger of an in-place read and write of the same weights (`neg_`) and the multiply-adds at
the peak that this run measures (a large torch matmul of the same dtype, of fp32 where that is faster).
"""

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))
import klib  # noqa: E402

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SHAPES = [(1024, 1024), (4096, 4096), (11008, 4096)]


def view(t):
    """pk_mat of a 2-d tensor."""
    code = klib.DTYPES[{torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[t.dtype]]
    return klib.Mat(t.data_ptr(), t.shape[0], t.shape[1], t.stride(0), t.stride(1), code)


def torch_parallel():
    """Address of torch's own parallel-for."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return ctypes.cast(ctypes.CDLL(str(path)).torch_parallel_for, ctypes.c_void_p)


def interleaved(calls, budget):
    """Minimum seconds of each call, taken in turns for `budget` seconds."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    end = time.perf_counter() + budget
    while time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def repeated(call, times):
    def run():
        for _ in range(times):
            call()

    return run


def peak_flops(dtypes, budget):
    """Operations a second of each dtype: a large matmul of its own, or fp32's where that is faster."""
    pairs = {name: [torch.randn(1536, 1536).to(TORCH[name]) for _ in range(2)] for name in {"f32", *dtypes}}
    best = interleaved({name: lambda a=a, b=b: a @ b for name, (a, b) in pairs.items()}, budget)
    return {name: 2 * 1536**3 / min(best[name], best["f32"]) for name in dtypes}


def merge_case(lib, par, dtype, shape, r, budget, peak):
    n, k = shape
    w = torch.randn(n, k).mul_(0.02).to(TORCH[dtype])
    a, b = torch.randn(r, k).mul_(0.02).to(w.dtype), torch.randn(n, r).mul_(0.025 / r**0.5).to(w.dtype)
    own = w.clone()  # exact merges always return it to these bits; w drifts, and drifted bits need fewer records
    m, exact, f = view(w), view(own), (klib.LowRank * 1)(klib.LowRank(view(a), view(b), 1.0))
    plus = klib.Delta(klib.LOWRANK, f, 1, klib.Mat(), 1.0)
    minus = klib.Delta(klib.LOWRANK, f, 1, klib.Mat(), -1.0)
    work = torch.empty(2 * lib.pk_merge_work(m, plus, plus), dtype=torch.uint8)
    bound = lib.pk_record_bound(m)
    memory = [torch.empty(bound, dtype=torch.uint8) for _ in range(2)]
    records = [klib.Record(t.data_ptr(), bound, 0) for t in memory]
    wp, state = work.data_ptr(), {"now": 0}

    def check(rc):
        if rc:
            raise RuntimeError(f"kernel returned {rc}")

    def merge_exact():
        check(lib.pk_merge(exact, plus, 0, records[0], wp, par))

    def unmerge_exact():
        check(lib.pk_unmerge(exact, plus, records[0], wp, par))

    def safe():
        check(lib.pk_merge(exact, plus, klib.CHECK, records[0], wp, par))

    def switch():
        i = state["now"]
        check(lib.pk_switch(exact, plus, records[i], plus, 0, records[1 - i], wp, par))
        state["now"] = 1 - i

    def peft(sign):
        delta = (b @ a) * 1.0
        w.data += sign * delta

    calls = {
        "floor_rw": w.neg_,
        "addmm+": lambda: w.addmm_(b, a, alpha=1.0),
        "addmm-": lambda: w.addmm_(b, a, alpha=-1.0),
        "merge": lambda: check(lib.pk_merge(m, plus, 0, None, wp, par)),
        "unmerge": lambda: check(lib.pk_merge(m, minus, 0, None, wp, par)),
        "merge_exact": merge_exact,
        "unmerge_exact": unmerge_exact,
        "merge_safe": safe,
        "unmerge_exact2": unmerge_exact,
    }
    if n * k <= 4096 * 4096:
        calls["peft+"], calls["peft-"] = lambda: peft(1), lambda: peft(-1)
    best = interleaved(calls, budget)
    merge_exact()
    record = records[0].size / (w.numel() * w.element_size())
    best["switch"] = interleaved({"switch": switch}, budget / 6)["switch"]
    check(lib.pk_unmerge(exact, plus, records[state["now"]], wp, par))
    flops = 2.0 * n * k * r
    floor = max(best["floor_rw"], flops / peak[dtype])
    row = {"kind": "merge", "dtype": dtype, "n": n, "k": k, "r": r, "record": record, "floor": floor}
    row.update({name: t for name, t in best.items() if name != "unmerge_exact2"})
    return row


def apply_case(lib, par, dtype, shape, r, m, budget, adapter=None):
    n, k = shape
    at = TORCH[adapter or dtype]
    x, y = torch.randn(m, k).to(TORCH[dtype]), torch.randn(m, n).to(TORCH[dtype])
    a, b = torch.randn(r, k).mul_(0.02).to(at), torch.randn(n, r).mul_(0.02).to(at)
    mx, my, f = view(x), view(y), (klib.LowRank * 1)(klib.LowRank(view(a), view(b), 0.5))
    work = torch.empty(lib.pk_lowrank_apply_work(my, mx, f, 1) + 64, dtype=torch.uint8)
    wp = work.data_ptr()

    def ours():
        lib.pk_lowrank_apply(my, mx, f, 1, None, wp, par)

    def composed():
        t = torch.nn.functional.linear(x.to(at), a)
        y.add_((torch.nn.functional.linear(t, b) * 0.5).to(y.dtype))

    times = 50 if m * n * k < 2**20 else 5
    calls = {"apply": repeated(ours, times), "composed": repeated(composed, times)}
    best = {name: t / times for name, t in interleaved(calls, budget).items()}
    name = dtype if adapter in (None, dtype) else f"{dtype}+{adapter}"
    return {"kind": "apply", "dtype": name, "m": m, "n": n, "k": k, "r": r, **best}


def merge_line(row):
    unit, name = 1e3, f"{row['dtype']:5s} {row['n']:5d}x{row['k']:<5d} r={row['r']:<4d}"
    keys = ("floor", "floor_rw", "addmm+", "merge", "unmerge", "merge_exact", "merge_safe", "unmerge_exact", "switch")
    cells = " ".join(f"{row[key] * unit:8.3f}" for key in keys)
    peft = f"{row['peft+'] * unit:8.2f}" if "peft+" in row else "       -"
    return f"{name} {cells} {peft} {row['merge'] / row['floor']:6.2f} {100 * row['record']:6.2f}%"


def apply_line(row):
    name = f"{row['dtype']:9s} {row['n']:5d}x{row['k']:<5d} r={row['r']:<3d} m={row['m']:<4d}"
    ratio = row["composed"] / row["apply"]
    return f"{name} {row['apply'] * 1e6:9.2f} torch {row['composed'] * 1e6:9.2f}  {ratio:6.1f}x"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the time")
    parser.add_argument("--only", choices=["merge", "apply"])
    parser.add_argument("--dtypes", default="f32,bf16,f16")
    parser.add_argument("--ranks", default="8,16,64,128")
    parser.add_argument("--shapes", default="1024x1024,4096x4096,11008x4096")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    parser.add_argument("--isa")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    lib, par = klib.load(), torch_parallel()
    if options.isa and lib.pk_isa_select(options.isa.encode()):
        parser.error(f"ISA {options.isa} is not one of {klib.isas(lib)}")
    budget = 0.25 if options.quick else 2.0
    peak = peak_flops(options.dtypes.split(","), budget)
    isa, peaks = lib.pk_isa_name().decode(), ", ".join(f"{name} {p / 1e9:.0f}" for name, p in peak.items())
    print(f"isa {isa}, {options.threads} threads, torch {torch.__version__}, GFLOP/s at most: {peaks}; ms")
    ranks = [int(r) for r in options.ranks.split(",")]
    shapes = [tuple(map(int, s.split("x"))) for s in options.shapes.split(",")]
    rows = []
    if options.only != "apply":
        names = ("floor", "in-place", "addmm_", "merge", "unmerge", "exact", "safe", "exact un", "switch", "PEFT")
        print(" " * 25 + " ".join(f"{name:>8s}" for name in names) + " /floor record")
        for dtype in options.dtypes.split(","):
            for shape in shapes:
                for r in ranks:
                    rows.append(merge_case(lib, par, dtype, shape, r, budget, peak))
                    print(merge_line(rows[-1]), flush=True)
    if options.only != "merge":
        print("\nforward, us: y += s (x A^T) B^T")
        for dtype in options.dtypes.split(","):
            for adapter in dict.fromkeys([dtype, "f32"]):
                for shape, r in [((256, 256), 16), ((1024, 1024), 16), ((4096, 4096), 16), ((4096, 4096), 64)]:
                    for m in (1, 4, 8, 64, 512):
                        row = apply_case(lib, par, dtype, shape, r, m, budget / 8, adapter)
                        rows.append(row)
                        print(apply_line(row), flush=True)
    if options.out:
        record = {"isa": isa, "threads": options.threads, "torch": torch.__version__, "peak": peak, "rows": rows}
        Path(options.out).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
