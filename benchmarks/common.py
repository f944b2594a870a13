"""What the benchmarks share: interleaved timing, and a table that is printed and kept."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each run; one of each in turn, `rounds` times."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name, run in runs.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def report(name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print the rows, and write them to `results/<name>.csv`."""
    columns = list(rows[0])
    table = [[str(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *table]) for i in range(len(columns))]
    for line in [columns, *table]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
