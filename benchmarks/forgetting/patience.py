"""Did the limit decide? Rates chosen with as many steps as a judged run may take. Exploratory: thought of afterwards.

    python benchmarks/forgetting/patience.py

An arm has the lowest of its rates that learns the task, and while choosing it has `STEPS` for that. Here rates that
failed then, and are lower than the one that was taken, are tried again with `JUDGED_STEPS`: of what is judged without
an anchor, on the first base. Where another rate would have been taken so, the arm is judged at that one. Rows go to
`results/patience.csv`, with the columns of `results/runs.csv`.
"""

from __future__ import annotations

from dataclasses import replace

import evidence
from abilities import TASKS
from arms import METHODS, Arm
from book import RESULTS, Stage, command
from choices import frozen, rate_of, rechosen, tried
from comparisons import judged_settings
from learn import Run
from outcomes import Row
from protocol import BASES, CHOOSING_SEEDS, JUDGING_SEEDS

BOOK = replace(evidence.BOOK, path=RESULTS / "patience.csv")
BASE = BASES[0]


def arms() -> list[str]:
    """What is judged without an anchor, and without old rows."""
    found = (Arm.named(setting.arm) for setting in judged_settings(frozen()))
    return [arm.name for arm in found if arm.anchor == "none" and not METHODS[arm.method].replayed]


def patient_rates(rows: list[Row]) -> list[Run]:
    """The rates that failed and are not above the one that was taken, once more."""
    runs = evidence.BOOK.rows()
    return [
        Run(BASE, task, arm, row["rate"], CHOOSING_SEEDS[0], patient=True)
        for task in TASKS
        for arm in arms()
        if (rate := rate_of(runs, arm, task)) is not None
        for row in tried(runs, arm, task)
        if not row["reached"] and row["rate"] <= rate
    ]


def judge_patiently(rows: list[Row]) -> list[Run]:
    """What has another rate so, on every base and seed."""
    runs = evidence.BOOK.rows()
    return [
        Run(base, task, arm, rate, seed, judged=True)
        for task in TASKS
        for arm in arms()
        if (rate := rechosen(runs, rows, arm, task)) not in (None, rate_of(runs, arm, task))
        for seed in JUDGING_SEEDS
        for base in BASES
    ]


STAGES: tuple[Stage, ...] = (patient_rates, judge_patiently)


if __name__ == "__main__":
    command(__doc__, BOOK, STAGES)
