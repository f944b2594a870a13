"""Did the limit of the choosing decide, or the grid's end? Exploratory: thought of afterwards.

    python benchmarks/forgetting/patience.py

An arm has the lowest of its rates that learns the task, or the one that comes nearest, and while choosing it has
`STEPS` for that. Here the rates that failed, and are below the one that was taken, or all where none learned, are
tried again with `JUDGED_STEPS`: of what is judged at α = 1 without old rows, on the first base. Where another rate
would have been taken so, the arm is judged at that one. And an arm without an anchor that has the lowest rate of its
grid, since it learned with all, is judged a step of the grid below (`BELOW`). Rows go to `results/patience.csv`, with
the columns of `results/runs.csv`.
"""

from __future__ import annotations

from dataclasses import replace

import evidence
from abilities import TASKS
from arms import METHODS, Arm
from bases import is_made
from book import RESULTS, Stage, command
from choices import failed, frozen, rate_of, rechosen
from comparisons import judged_settings
from learn import Run
from outcomes import Row
from protocol import BASES, BELOW, BELOW_ON, BELOW_SEEDS, CHOOSING_SEEDS, JUDGING_SEEDS

BOOK = replace(evidence.BOOK, path=RESULTS / "patience.csv")
# Judged with three seeds; where there are more, they had begun so.
BASE, SEEDS = BASES[0], JUDGING_SEEDS[:3]


def arms() -> list[str]:
    """What is judged at α = 1, first without an anchor; but replay."""
    found = [setting.arm for setting in judged_settings(frozen()) if setting.alpha == 1.0]
    return [arm for arm in found if not METHODS[Arm.named(arm).method].replayed]


def patient_rates(rows: list[Row]) -> list[Run]:
    """The rates that failed, once more."""
    runs = evidence.BOOK.rows()
    return [
        Run(BASE, task, arm, row["rate"], CHOOSING_SEEDS[0], patient=True)
        for arm in arms()
        for task in TASKS
        for row in failed(runs, arm, task)
    ]


def judge_patiently(rows: list[Row]) -> list[Run]:
    """What has another rate so, on every base."""
    runs = evidence.BOOK.rows()
    changed = [
        (task, arm, rate)
        for arm in arms()
        for task in TASKS
        if (rate := rechosen(runs, rows, arm, task)) not in (None, rate_of(runs, arm, task))
    ]
    return [
        Run(base, task, arm, rate, seed, judged=True)
        for seed in SEEDS
        for task, arm, rate in changed
        for base in BASES
    ]


def judge_below(rows: list[Row]) -> list[Run]:
    """What has the lowest of its rates, at one below; on the base of words, too, where that was made."""
    runs = evidence.BOOK.rows()
    alone = [arm for arm in arms() if Arm.named(arm).anchor == "none"]
    return [
        Run(base, task, arm, BELOW[METHODS[arm].rates], seed, judged=True)
        for task, bases in BELOW_ON
        if is_made(bases[0])
        for seed in BELOW_SEEDS
        for base in bases
        for arm in alone
        if rate_of(runs, arm, task, base=bases[0]) == min(METHODS[arm].rates)
    ]


STAGES: tuple[Stage, ...] = (patient_rates, judge_below, judge_patiently)


if __name__ == "__main__":
    command(__doc__, BOOK, STAGES)
