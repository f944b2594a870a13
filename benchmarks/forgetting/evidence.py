"""Does it forget less? Every run of the benchmark, stage by stage; what is there already is not run again.

    python benchmarks/forgetting/evidence.py            # seven arms on task A, three seeds: `make evidence`
    python benchmarks/forgetting/evidence.py --full     # every stage of `STAGES`, in order: `make evidence-full`

Behind them come the stages of `sequences.py`, and `self_samples.py`. A run takes a few minutes at most and adds its
rows to `results/runs.csv`, with the commit that made them. Stop it at any time: the same command goes on. Two runs at
a time, one thread each; `--workers` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from arms import METHODS, Arm
from book import RESULTS, Book, Stage, run_all
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

RUNS = RESULTS / "runs.csv"
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


# `freeze` writes down what was chosen between them, once.
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


def make(run: Run) -> list[Row]:
    """The rows of a run; its curve is kept as JSON beside them."""
    result = learn(run)
    CURVES.mkdir(parents=True, exist_ok=True)
    (CURVES / f"{run.name}.json").write_text(json.dumps(asdict(run) | result))
    return outcomes(asdict(run), result)


def keys(run: Run) -> list[dict[str, Any]]:
    """A row for each place of the dial."""
    return [asdict(run) | {"alpha": alpha} for alpha in run.alphas]


def shown(rows: list[Row]) -> str:
    """What is printed of a run."""
    forgotten = ", ".join(f"α = {row['alpha']:g}: {row['forgetting']}" for row in rows)
    return f"{'reached' if rows[0]['reached'] else 'not reached'}, {forgotten}"


KEY = ("base", "task", "arm", "rate", "seed", "judged", "alpha")
BOOK = Book(RUNS, KEY, ("base", "task", "arm", "commit"), keys, make, shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every stage rather than the seven arms")
    parser.add_argument("--stage", choices=[stage.__name__ for stage in STAGES], help="this stage alone")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    args = parser.parse_args()
    rows, until = BOOK.rows(), time.time() + 60 * args.minutes
    stages = STAGES if args.full else (quick,)
    if args.stage:
        stages = tuple(stage for stage in STAGES if stage.__name__ == args.stage)
    for stage in stages:
        if stage is rates_of_judged:
            if BOOK.pending(factorial(rows), rows):
                raise SystemExit(
                    "error: nothing can be frozen before the factorial is whole: run the same command again"
                )
            freeze(rows)
        if not run_all(BOOK, stage, rows, args.workers, until):
            return
    if args.full and not args.stage:
        import self_samples
        import sequences  # which reads the rows above

        if sequences.run_stages(sequences.STAGES, args.workers, until):
            self_samples.ask()


if __name__ == "__main__":
    main()
