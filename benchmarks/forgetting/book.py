"""A book of runs: rows in a CSV file. What is there is not run again; what is made is added, with its commit."""

from __future__ import annotations

import argparse
import csv
import logging
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# For the workers, before they import torch: two runs at a time share the machine without fighting for it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# One line of a book.
Row = dict[str, Any]
# A stage plans its runs from the rows that there are.
Stage = Callable[[list[Row]], Sequence[Any]]


@dataclass(frozen=True)
class Book:
    """Rows of one kind.

    Attributes:
        path: Their file.
        key: Columns that make a row, or a few, one and the same; a run is made once for each.
        words: Columns of text, whatever it looks like; of others numbers are read as such.
        keys: Of a run, the keys of the rows that it is to give, each as {column: value}.
        make: Makes a run, in a process of its own: its rows.
        shown: Of such rows, what is printed.
    """

    path: Path
    key: tuple[str, ...]
    words: tuple[str, ...]
    keys: Callable[[Any], list[Row]]
    make: Callable[[Any], list[Row]]
    shown: Callable[[list[Row]], str]

    def rows(self) -> list[Row]:
        """What is there so far."""
        return read(self.path, self.words)

    def pending(self, runs: Sequence[Any], rows: list[Row]) -> list[Any]:
        """The runs that lack a row, each once."""
        done = {self._key(row) for row in rows}
        missing = [run for run in runs if not done.issuperset(map(self._key, self.keys(run)))]
        return list({run.name: run for run in missing}.values())

    def add(self, rows: list[Row], new: list[Row]) -> None:
        """Keep rows: the file is written beside and renamed. What was there under their keys makes way."""
        fresh = {self._key(row) for row in new}
        rows[:] = [row for row in rows if self._key(row) not in fresh] + new
        write(self.path, rows)

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key)


def read(path: Path, words: Sequence[str]) -> list[Row]:
    """Rows as they were written; none where there is no file. Columns other than `words` hold numbers and truths."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    for row in rows:
        for name, text in row.items():
            if name not in words and text != "":
                row[name] = text == "True" if text in ("True", "False") else number(text)
    return rows


def number(text: str) -> int | float:
    """What was written, as it was: a whole number stays one."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def write(path: Path, rows: Sequence[Row]) -> None:
    """All of them, beside the file, which is then replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    beside = path.with_suffix(".part")
    with open(beside, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def commit() -> str:
    """The commit that runs are made by, with a + where files differ from it."""
    git = lambda *words: subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout  # noqa: E731
    changed = git("status", "--porcelain", "--", "../../peft_isolate", ".", ":!results", ":!frozen.yaml", ":!*.md")
    return git("rev-parse", "--short=10", "HEAD").strip() + ("+" if changed.strip() else "")


def quiet() -> None:
    """In a worker, before its first run."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("peft_isolate", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def run_stages(book: Book, stages: Sequence[Stage], workers: int, until: float) -> bool:
    """Make what some stages lack, in order; False as soon as one is not whole."""
    rows = book.rows()
    return all(run_all(book, stage, rows, workers, until) for stage in stages)


def parser(doc: str | None, stages: Sequence[Stage]) -> argparse.ArgumentParser:
    """Of a script that makes these stages, or one of them."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--stage", choices=[stage.__name__ for stage in stages], help="this stage alone")
    made.add_argument("--workers", type=int, default=2, help="runs at a time")
    made.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    return made


def command(doc: str | None, book: Book, stages: Sequence[Stage]) -> None:
    """The whole of such a script; it exits with 1 where not all is there."""
    args = parser(doc, stages).parse_args()
    wanted = [stage for stage in stages if args.stage in (None, stage.__name__)]
    sys.exit(0 if run_stages(book, wanted, args.workers, time.time() + 60 * args.minutes) else 1)


def run_all(book: Book, stage: Stage, rows: list[Row], workers: int, until: float) -> bool:
    """Make the runs that a stage lacks; False where one failed, or time was over before all were begun."""
    runs = book.pending(stage(rows), rows)
    if not runs:
        return True
    made_by, failed = commit(), 0
    print(f"{stage.__name__}: {len(runs)} runs", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=quiet) as pool:
        waiting = {}
        queue = iter(runs)

        def begin() -> None:
            if time.time() < until and (run := next(queue, None)) is not None:
                waiting[pool.submit(book.make, run)] = run

        for _ in range(2 * workers):
            begin()
        while waiting:
            future = next(as_completed(waiting))
            run = waiting.pop(future)
            try:
                found = [row | {"commit": made_by} for row in future.result()]
                book.add(rows, found)
                print(f"{run.name}: {book.shown(found)}", flush=True)
            except Exception:
                failed += 1
                print(f"{run.name} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            begin()
    if failed:
        print(f"{stage.__name__}: {failed} of {len(runs)} runs failed; run the same command again", file=sys.stderr)
    return not failed and next(queue, None) is None
