"""What is chosen, and by what: rates by the new task's validation, everything else on one base and one task."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from arms import METHODS, Arm
from outcomes import Row, chosen_rate
from protocol import ALPHAS, ANCHORS, CHOOSING_SEEDS, DEVELOPED_ON, FAMILIES, OTHER_BASE

FROZEN = Path(__file__).parent / "frozen.yaml"
# What a run that never learned the task counts as, where the least forgetting is chosen.
NEVER = 1000.0
# In points: what is near the best of one seed is run with all of them, and what is no further apart then is tied.
CLOSE, TIED = 2.0, 0.5


def rate_of(rows: Iterable[Row], arm: str, task: str, alpha: float = 1.0, base: str = DEVELOPED_ON[0]) -> float | None:
    """The rate of an arm on a task, with the dial at α; None before it was tried with all of its rates.

    On the base of words an arm with an anchor, wherever the dial is, has that of the arm without.
    """
    if base == OTHER_BASE:
        arm, alpha = Arm.named(arm).method, 1.0
    found = tried(rows, arm, task, alpha, base)
    wanted = METHODS[Arm.named(arm).method].rates
    return chosen_rate(found) if set(wanted) <= {row["rate"] for row in found} else None


def tried(rows: Iterable[Row], arm: str, task: str, alpha: float = 1.0, base: str = DEVELOPED_ON[0]) -> list[Row]:
    """The runs by which the rate of an arm is chosen: one for each of its rates, as far as they are there."""
    wanted = METHODS[Arm.named(arm).method].rates
    key = (arm, task, base, alpha, CHOOSING_SEEDS[0], False)
    same = [r for r in rows if tuple(r[name] for name in ("arm", "task", "base", "alpha", "seed", "judged")) == key]
    return [row for row in same if row["rate"] in wanted]


def rechosen(rows: Iterable[Row], patient: Iterable[Row], arm: str, task: str) -> float | None:
    """The rate that an arm has if some runs to choose by are made again; None before all of them are there.

    Args:
        rows: Of `results/runs.csv`.
        patient: Of `results/patience.csv`.
        arm: With the dial at 1.
        task: A key of `TASKS`.
    """
    again = {row["rate"]: row for row in tried(patient, arm, task)}
    if rate_of(rows, arm, task) is None or any(row["rate"] not in again for row in failed(rows, arm, task)):
        return None
    return chosen_rate([again.get(row["rate"], row) for row in tried(rows, arm, task)])


def failed(rows: Iterable[Row], arm: str, task: str) -> list[Row]:
    """Of the runs by which the rate of an arm was chosen those that did not learn the task, and are not above it.

    All of them where none learned it; none before its rate was chosen.
    """
    rate, found = rate_of(rows, arm, task), tried(rows, arm, task)
    none_learned = not any(row["reached"] for row in found)
    return [row for row in found if rate is not None and not row["reached"] and (row["rate"] < rate or none_learned)]


def variant_of(rows: Sequence[Row], family: str) -> str | None:
    """The variant of a family that forgets least on validation at its own rate; None before all were tried.

    Of those that forget as little, to within `TIED`, the first: it is the plain one.
    """
    found: dict[str, float] = {}
    for arm in FAMILIES[family]:
        rate = rate_of(rows, arm, DEVELOPED_ON[1])
        if rate is None:
            return None
        found[arm] = statistics.fmean(_forgotten(row) for row in _developed(rows, arm, rate, 1.0))
    least = min(found.values())
    return next(arm for arm, forgotten in found.items() if forgotten <= least + TIED)


def contenders(rows: Sequence[Row], family: str) -> list[tuple[str, float]]:
    """The (anchor, α) of a family that are run with every seed to choose by: with the first, near the best."""
    found = _settings(rows, family, CHOOSING_SEEDS[:1])
    best = min(found.values(), default=NEVER)
    return [setting for setting, forgotten in found.items() if forgotten <= min(best + CLOSE, NEVER - 1)]


def setting_of(rows: Sequence[Row], family: str) -> dict[str, Any]:
    """The anchor and the place of the dial with which a family's variant forgets least on validation.

    A setting that with one seed did not learn the task is out. Among those that forget as little, to within `TIED`,
    the one without the dial is taken, and then the one that learned the task soonest.
    """
    variant, near = variant_of(rows, family), contenders(rows, family)
    all_seeds = _settings(rows, family, CHOOSING_SEEDS)
    found = {setting: all_seeds[setting] for setting in near if all_seeds.get(setting, NEVER) < NEVER}
    if variant is None or not found:
        raise SystemExit(f"error: no setting of {family!r} learned the task with every seed to choose by")

    def preferred(setting: tuple[str, float]) -> tuple[bool, float]:
        anchor, alpha = setting
        same = _developed(rows, Arm(variant, anchor).name, rate_of(rows, variant, DEVELOPED_ON[1]), alpha)
        return alpha != 1.0, statistics.fmean(row["steps"] for row in same)

    tied = [setting for setting, forgotten in found.items() if forgotten <= min(found.values()) + TIED]
    anchor, alpha = min(tied, key=preferred)
    return {"method": variant, "anchor": anchor, "alpha": alpha, "forgetting": round(found[anchor, alpha], 2)}


def _settings(rows: Sequence[Row], family: str, seeds: Sequence[int]) -> dict[tuple[str, float], float]:
    """{(anchor, α): mean forgetting}, of those that were run with all of the seeds; `NEVER` or more if one failed."""
    variant = variant_of(rows, family)
    if variant is None:
        return {}
    rate = rate_of(rows, variant, DEVELOPED_ON[1])
    found = {}
    for anchor in ANCHORS:
        for alpha in ALPHAS:
            same = [row for row in _developed(rows, Arm(variant, anchor).name, rate, alpha) if row["seed"] in seeds]
            if {row["seed"] for row in same} == set(seeds):
                worst = max(map(_forgotten, same))
                found[anchor, alpha] = statistics.fmean(map(_forgotten, same)) if worst < NEVER else NEVER
    return found


def _developed(rows: Sequence[Row], arm: str, rate: float | None, alpha: float) -> list[Row]:
    wanted = (*DEVELOPED_ON, arm, rate, alpha, False)
    return [r for r in rows if (r["base"], r["task"], r["arm"], r["rate"], r["alpha"], r["judged"]) == wanted]


def _forgotten(row: Row) -> float:
    return float(row["forgetting"]) if row["reached"] else NEVER


def frozen_arm(family: str) -> Arm:
    """A family's variant with its anchor; before anything was frozen its first one with the base's own text."""
    chosen = frozen().get(family, {})
    return Arm(chosen.get("method", FAMILIES[family][0]), chosen.get("anchor", "self 1"))


def frozen() -> dict[str, dict[str, Any]]:
    """What `frozen.yaml` says; empty before it was written."""
    return yaml.safe_load(FROZEN.read_text()) if FROZEN.exists() else {}
