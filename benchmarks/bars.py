"""Does it keep to what was asked of it? All bars in one table: what, bar, measured, met.

The bars of the other scripts of this folder, measured now, on the CPU, in under ten minutes on two cores; a table of
its own for each is in their results. A bar that is not met is a finding, no error: the exit code is 0.
"""

from __future__ import annotations

import argparse
import importlib
import time
import warnings

import torch
from common import report

SCRIPTS = ["step", "layers", "memory", "loading", "generation", "wrapping", "region_size", "model_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    rows = []
    begin = time.perf_counter()
    for script in args.scripts:
        start = time.perf_counter()
        for bar in importlib.import_module(script).bars():
            rows.append({**bar._asdict(), "met": "yes" if bar.met else "no", "script": f"{script}.py"})
        print(f"{script}.py: {time.perf_counter() - start:.0f} s", flush=True)
    print()
    report("bars", rows)
    n_met = sum(row["met"] == "yes" for row in rows)
    print(f"\n{n_met} of {len(rows)} bars met, in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
