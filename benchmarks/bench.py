"""peft_c, peft, plain torch and the floor, measured side by side in one run (`make bench`).

Times are minima of interleaved rounds: every contender runs once in each round, in turning order, so that what else
the machine does meets all of them alike. `torch` is the best plain-torch code for the row (`W.addmm_`, F.linear and
addmm_); the floor is the same work without what is measured: torch's base model without an adapter, or reading and
writing the weights once.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import bookkeeping
import files
import forward
import memory
import merging
import methods
import report
import torch
import training
from timing import environment, matching, measure

THEMES = {
    "bookkeeping": bookkeeping,
    "forward": forward,
    "training": training,
    "merging": merging,
    "methods": methods,
    "files": files,
    "memory": memory,
}


def main() -> None:
    """Run what the command line asks for, print it as it comes, write out/bench.json and out/bench.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds, about two minutes")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="a regular expression on 'theme case', see --list"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "out")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")

    about, rows, start = environment(), [], time.perf_counter()
    if not options.list:
        print(" | ".join(f"{key} {value}" for key, value in about.items()))
    for theme, module in THEMES.items():
        cases = matching(module.cases(options.quick), theme, options.only)
        if options.list:
            print("\n".join(f"{theme} {case.name}" for case in cases))
        elif cases:
            print(report.header(theme), flush=True)
        for case in () if options.list else cases:
            for row in measure(theme, case, options.quick):
                rows.append(row)
                print(report.line(row), flush=True)
    if rows:
        print("\n" + "\n".join(report.summary(rows)))
        options.out.mkdir(parents=True, exist_ok=True)
        report.write_json(rows, about, options.out / "bench.json")
        report.plot(rows, about, options.out / "bench.png")
        print(f"{options.out.name}/bench.json and bench.png written; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
