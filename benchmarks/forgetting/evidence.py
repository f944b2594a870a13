"""Does it forget less? Every run of the benchmark, stage by stage; what is there already is not run again.

    python benchmarks/forgetting/evidence.py            # seven arms on task A, three seeds: `make evidence`
    python benchmarks/forgetting/evidence.py --full     # every stage of `STAGES`, in order: `make evidence-full`

A run takes a few minutes at most and adds its rows to `results/runs.csv`, with the commit that made them. Stop it at
any time: the same command goes on. Two runs at a time, one thread each; `--workers` says otherwise.
"""

from __future__ import annotations

import argparse
import csv
import json
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before torch is imported, also in the workers: two runs at a time share the machine without fighting for it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import yaml
from arms import METHODS, Arm
from choices import FROZEN, frozen, rate_of, setting_of, variant_of
from learn import Run, learn
from outcomes import Row, outcomes
from protocol import (
    ALPHAS,
    ALSO_JUDGED,
    ANCHORS,
    BASES,
    CHOOSING_SEEDS,
    DEVELOPED_ON,
    FAMILIES,
    JUDGING_SEEDS,
    QUICK,
    QUICK_SEEDS,
)

HERE = Path(__file__).parent
RUNS = HERE / "results" / "runs.csv"
CURVES = Path("outputs") / "forgetting"
BASE, TASK = DEVELOPED_ON


def rates(arms: Sequence[str], task: str) -> list[Run]:
    """Each arm with each of its rates, on the base and a seed to choose by."""
    return [
        Run(BASE, task, arm, rate, CHOOSING_SEEDS[0]) for arm in arms for rate in METHODS[Arm.named(arm).method].rates
    ]


def rates_of_families(rows: list[Row]) -> list[Run]:
    """Every variant of every family, and the peers, on task A."""
    return rates([*(arm for family in FAMILIES.values() for arm in family), *ALSO_JUDGED], TASK)


def variants(rows: list[Row]) -> list[Run]:
    """Every variant at its rate, with the other seeds to choose by."""
    arms = [arm for family in FAMILIES.values() for arm in family]
    chosen = {arm: rate for arm in arms if (rate := rate_of(rows, arm, TASK)) is not None}
    return [Run(BASE, TASK, arm, rate, seed) for arm, rate in chosen.items() for seed in CHOOSING_SEEDS[1:]]


def factorial(rows: list[Row]) -> list[Run]:
    """Region × anchor × dial, on task A: each family's variant with each anchor, evaluated at each α."""
    runs = []
    for seed in CHOOSING_SEEDS[:1]:
        for family in FAMILIES:
            variant = variant_of(rows, family)
            if variant is not None and (rate := rate_of(rows, variant, TASK)) is not None:
                for anchor in ANCHORS:
                    runs.append(Run(BASE, TASK, Arm(variant, anchor).name, rate, seed, alphas=ALPHAS))
    return runs


def judged_arms() -> dict[str, tuple[float, ...]]:
    """{arm: places of the dial}: each family's variant alone and as frozen, the peers, and the upper bound."""
    arms: dict[str, tuple[float, ...]] = {}
    for setting in frozen().values():
        arms[setting["method"]] = (1.0,)
    for setting in frozen().values():
        alphas = (1.0,) if setting["alpha"] == 1.0 else (1.0, setting["alpha"])
        name = Arm(setting["method"], setting["anchor"]).name
        arms[name] = max(arms.get(name, ()), alphas, key=len)
    return arms | dict.fromkeys(ALSO_JUDGED, (1.0,))


def rates_of_judged(rows: list[Row]) -> list[Run]:
    """The rates of what is judged, on the tasks where they are not known yet; no choice but the rate is made here."""
    return [run for task in ("A", "B", "C") for run in rates(list(judged_arms()), task)]


def judge(rows: list[Row]) -> list[Run]:
    """What is judged: every frozen arm on every task, base and seed."""
    return [
        Run(base, task, arm, rate, seed, judged=True, alphas=alphas)
        for seed in JUDGING_SEEDS
        for base in BASES
        for task in ("A", "B", "C")
        for arm, alphas in judged_arms().items()
        if (rate := rate_of(rows, arm, task)) is not None
    ]


def explored(rows: list[Row]) -> list[Run]:
    """The rates of every other method, on task A."""
    return rates([arm for arm in METHODS if arm not in judged_arms()], TASK)


def exploratory(rows: list[Row]) -> list[Run]:
    """Every other method at its rate, on task A and the first base: exploratory, three seeds."""
    chosen = {arm: rate_of(rows, arm, TASK) for arm in METHODS if arm not in judged_arms()}
    return [
        Run(BASE, TASK, arm, rate, seed, judged=True)
        for seed in JUDGING_SEEDS[:3]
        for arm, rate in chosen.items()
        if rate is not None
    ]


def quick(rows: list[Row]) -> list[Run]:
    """Seven arms on task A at the rates that were chosen, or the middle one."""
    return [
        Run(BASE, TASK, arm, rate_of(rows, arm, TASK) or METHODS[Arm.named(arm).method].rates[2], seed, judged=True)
        for seed in QUICK_SEEDS
        for arm in QUICK
    ]


# A stage plans its runs from the rows of those before; `freeze` writes down what was chosen, once.
Stage = Callable[[list[Row]], list[Run]]
STAGES: tuple[Stage, ...] = (
    rates_of_families, variants, factorial, rates_of_judged, judge, explored, exploratory
)  # fmt: skip


def freeze(rows: list[Row]) -> None:
    """Write `frozen.yaml`: of each family the variant, the anchor and the α that forget least on validation."""
    if FROZEN.exists():
        return
    chosen = {family: setting_of(rows, family, ANCHORS, ALPHAS) for family in FAMILIES}
    head = "# Chosen on task A with the first base, by what is forgotten of the validation split; judged unchanged.\n"
    FROZEN.write_text(head + yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True))


def there(path: Path = RUNS) -> list[Row]:
    """The rows so far, as they were written."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name, text in row.items():
            if name not in ("base", "task", "arm", "commit") and text != "":
                row[name] = text == "True" if text in ("True", "False") else float(text)
    return rows


def key(row: Row) -> tuple[Any, ...]:
    """What makes a row one and the same run."""
    return (
        *(row[name] for name in ("base", "task", "arm")),
        float(row["rate"]),
        int(row["seed"]),
        bool(row["judged"]),
    )


def pending(runs: Sequence[Run], rows: list[Row]) -> list[Run]:
    """The runs that lack a row, each once."""
    done = {(*key(row), float(row["alpha"])) for row in rows}
    missing = [run for run in runs if any((*key(asdict(run)), alpha) not in done for alpha in run.alphas)]
    return list({run.name: run for run in missing}.values())


def add(rows: list[Row], new: list[Row], path: Path = RUNS) -> None:
    """Keep rows: the file is written beside and renamed. A row that was there makes way."""
    fresh = {(*key(row), float(row["alpha"])) for row in new}
    rows[:] = [row for row in rows if (*key(row), float(row["alpha"])) not in fresh] + new
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
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../..", ":!*/results/*", ":!*/frozen.yaml")
    return git("rev-parse", "--short=10", "HEAD").strip() + ("+" if changed.strip() else "")


def _quiet() -> None:
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("peft_isolate", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def make(run: Run) -> dict[str, Any]:
    """In a process of its own kind: the run's curve, kept as JSON beside the rows."""
    result = learn(run)
    CURVES.mkdir(parents=True, exist_ok=True)
    (CURVES / f"{run.name}.json").write_text(json.dumps(asdict(run) | result))
    return result


def run_all(stage: Stage, rows: list[Row], workers: int, until: float) -> bool:
    """Make the runs that a stage lacks; False where time was over before all were begun."""
    runs = pending(stage(rows), rows)
    if not runs:
        return True
    made_by = commit()
    print(f"{stage.__name__}: {len(runs)} runs", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet) as pool:
        waiting = {}
        queue = iter(runs)
        for run in queue:
            waiting[pool.submit(make, run)] = run
            if len(waiting) == 2 * workers:
                break
        while waiting:
            future = next(as_completed(waiting))
            run = waiting.pop(future)
            try:
                found = [row | {"commit": made_by} for row in outcomes(asdict(run), future.result())]
                add(rows, found)
                shown = ", ".join(f"α = {row['alpha']:g}: {row['forgetting']}" for row in found)
                print(f"{run.name}: {'reached' if found[0]['reached'] else 'not reached'}, {shown}", flush=True)
            except Exception:
                print(f"{run.name} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            if time.time() < until and (run := next(queue, None)) is not None:
                waiting[pool.submit(make, run)] = run
    return time.time() < until


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every stage rather than the seven arms")
    parser.add_argument("--stage", choices=[stage.__name__ for stage in STAGES], help="this stage alone")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    args = parser.parse_args()
    rows, until = there(), time.time() + 60 * args.minutes
    stages = STAGES if args.full else (quick,)
    if args.stage:
        stages = tuple(stage for stage in STAGES if stage.__name__ == args.stage)
    for stage in stages:
        if stage is rates_of_judged:
            freeze(rows)
        if not run_all(stage, rows, args.workers, until):
            break


if __name__ == "__main__":
    main()
