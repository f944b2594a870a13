"""What the benchmarks share: interleaved timing, and a table that is printed and kept."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"


class Bar(NamedTuple):
    """One line of the table that `bars.py` prints.

    Attributes:
        what: What was measured, with its dtype where that matters.
        bar: What it should keep to.
        measured: What it was.
        met: Whether it keeps to it.
    """

    what: str
    bar: str
    measured: str
    met: bool

    @classmethod
    def ratio(cls, what: str, peer: str, limit: float, measured: float) -> Bar:
        """A bar of the kind "at most `limit` times the peer"."""
        return cls(what, f"≤ {limit:.2f} × {peer}", f"{measured:.3f} ×", measured <= limit)


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2, before: Callable[[], object] | None = None
) -> dict[str, float]:
    """Median seconds of each run; one of each in turn, `rounds` times. `before` begins a round, outside the time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warmup + rounds):
        if before is not None:
            before()
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


def device_name(device: str) -> str:
    """What a table says of the device that it was measured on."""
    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


def results_name(name: str, device: str) -> str:
    """Under which name `report` keeps what was measured on a device."""
    return name if device == "cpu" else f"{name}_{device.partition(':')[0]}"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
