"""Does a model of your own forget less? It learns your task in each way, and is asked what it could do before.

    python benchmarks/forgetting/real.py --model Qwen/Qwen3-0.6B --tasks arc_easy,hellaswag --data task.jsonl \\
        --arm full 1e-5 2e-5 --arm HFT 2e-5 5e-5 --arm "HFT | self 1" 5e-5 --level 0.8
    python benchmarks/forgetting/real.py --config benchmarks/forgetting/configs/metamathqa-llama-3.2-3b.yaml

Every run adds its rows to `results/real.csv`. Stop it at any time: the same command goes on with the runs that have
none. A setting is a flag or a key of the YAML file of --config; flags win.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":  # `book` would keep its workers to one thread, and off the Hub
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    os.environ.setdefault("HF_HUB_OFFLINE", "0")

import torch
from book import RESULTS, Book, Row, commit
from real_data import Exam
from real_learn import Run, ask_base, device, key, learn
from real_settings import Setting, read_config, setting_of

from peft_isolate.errors import IsolateError
from peft_isolate.evaluation.rows import as_tokenizer

KEY = ("model", "data", "settings", "arm", "rate", "seed", "alpha")
WORDS = ("model", "data", "settings", "arm", "score", "dtype", "device", "commit")


class Parser(argparse.ArgumentParser):
    """A wrong flag gets one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise IsolateError(f"{message}; --help lists the options")


def parsed(argv: Sequence[str] | None) -> tuple[Setting, Path]:
    """The setting, and where its rows go."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of settings")
    parser.add_argument("--results", default=str(RESULTS / "real.csv"), help="CSV file that rows are added to")
    parser.add_argument(
        "--arm", nargs="+", action="append", metavar=("NAME", "RATE"),
        help='a method of arms.py, or with an anchor "NAME | self 1", and its learning rates; again for each arm',
    )  # fmt: skip
    for each in fields(Setting):
        if each.name not in ("arms", "rename"):
            default = "" if each.default in (None, "", ()) else f" (by default {_typed(each.default)})"
            parser.add_argument(f"--{each.name.replace('_', '-')}", help=each.metadata["help"] + default)
    flags = vars(parser.parse_args(argv))
    config, results, arms = (flags.pop(name) for name in ("config", "results", "arm"))
    given = read_config(config) if config is not None else {}
    given |= {name: value for name, value in flags.items() if value is not None}
    if arms is not None:
        given["arms"] = {name: rates for name, *rates in arms}
    return setting_of(given), Path(results)


def _typed(default: Any) -> str:
    """A default as one would type it."""
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def main(argv: Sequence[str] | None = None) -> None:
    try:
        setting, results = parsed(argv)
        failed = run_all(setting, results)
    except (IsolateError, ImportError, OSError) as error:
        raise SystemExit("error: " + " ".join(str(error).split())) from error
    if failed:
        raise SystemExit(f"error: {failed} runs failed, see above: the same command tries them again")


def run_all(setting: Setting, results: Path) -> int:
    """Make the runs that have no row yet, one at a time.

    Returns:
        How many failed.
    """
    book = Book(
        results, KEY, WORDS, keys=lambda run: [key(run, alpha) for alpha in setting.alphas], make=lambda run: [],
        shown=shown,
    )  # fmt: skip
    rows = book.rows()
    runs = [
        Run(setting, arm, rate, seed) for seed in setting.seeds for arm in setting.arms for rate in setting.rates(arm)
    ]
    waiting = book.pending(runs, rows)
    print(f"{len(runs)} runs, {len(waiting)} of them to be made", flush=True)
    if not waiting:
        return 0
    exam = Exam(setting, as_tokenizer(setting.model))
    start = ask_base(exam)
    made_with = {"score": setting.score, "dtype": setting.dtype, "device": _device_name(setting), "commit": commit()}
    failed = 0
    for run in waiting:
        try:
            found = [row | made_with for row in learn(run, exam, start)]
            book.add(rows, found)
            print(f"{run.name}: {book.shown(found)}", flush=True)
        except Exception:  # out of memory, say: the others may still go
            failed += 1
            print(f"{run.name} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    return failed


def shown(rows: list[Row]) -> str:
    """What is printed of a run."""
    names = ("test", "forgetting", "rise")
    return ", ".join(
        f"α = {row['alpha']:g}: " + " ".join(f"{name} {row[name]}" for name in names if row[name] is not None)
        for row in rows
    )


def _device_name(setting: Setting) -> str:
    return torch.cuda.get_device_name(0) if device(setting) == "cuda" else "cpu"


if __name__ == "__main__":
    main()
