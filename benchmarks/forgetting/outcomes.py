"""From the curve of a run to its outcome: what was forgotten when the new task was learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from abilities import ABILITIES
from protocol import ENOUGH

Point = Mapping[str, Any]
# One line of `results/runs.csv`.
Row = dict[str, Any]


def outcomes(run: Mapping[str, Any], result: Mapping[str, Any]) -> list[Row]:
    """One row for each place of the dial.

    Args:
        run: The fields of a `Run`.
        result: What `learn` returned.

    Returns:
        Rows of: what was run; `reached`, whether validation came to `ENOUGH`, and after how many `steps`; at that
        place between two evaluations, or at the best validation of a run that never came to it: `forgetting`, the loss
        of exact match in points over the old abilities, and of each one; `new`, the new task's exact match in percent;
        `kl` and the `rise` of the general loss, in nats; `best`, the best validation in percent;
        beside α = 1 in one run, `undialled`, what that had forgotten at the same step, since the dial takes more;
        `trained` scalars, `bytes` of these in fp32 (a file: `sizes.py`), `seconds`.
    """
    start = result["points"][0]
    rows = []
    for alpha in run["alphas"]:
        points = [point for point in result["points"] if point["alpha"] == alpha]
        validation = [point["validation"] for point in points]
        place, reached = place_of(validation), max(validation) >= ENOUGH
        at = {name: interpolated(points, name, place) for name in points[0] if name != "alpha"}
        row: Row = {name: run[name] for name in ("base", "task", "arm", "rate", "seed", "judged")}
        row |= {"alpha": alpha, "reached": reached, "steps": round(at["step"], 1)}
        row |= {"forgetting": round(100 * (start["old"] - at["old"]), 2), "new": round(100 * at["new"], 2)}
        row |= {"best": round(100 * max(validation), 2)}
        row |= {"kl": round(at["kl"], 4), "rise": round(at["general"] - start["general"], 4)}
        row |= {ability.name: round(100 * (start[ability.name] - at[ability.name]), 2) for ability in ABILITIES}
        if alpha != 1.0 and run["alphas"][0] == 1.0:
            whole = [point for point in result["points"] if point["alpha"] == 1.0]
            row["undialled"] = round(100 * (start["old"] - interpolated(whole, "old", place)), 2)
        row |= {name: result[name] for name in ("trained", "bytes")} | {"seconds": round(result["seconds"], 1)}
        rows.append(row)
    return rows


def chosen_rate(rows: Sequence[Row]) -> float:
    """Of one arm's runs on one task, by the new task's validation alone: the lowest rate that learns it.

    A lower rate alone forgets less, so each method, full fine-tuning first of all, is granted its lowest. Where none
    learns the task, the one that comes nearest.
    """
    learned = [row["rate"] for row in rows if row["reached"]]
    return min(learned) if learned else max(rows, key=lambda row: (row["best"], -row["rate"]))["rate"]


def place_of(validation: Sequence[float], level: float = ENOUGH) -> float:
    """Where a run's outcome is read: where the level is first reached, or else at its best."""
    found = crossing(validation, level)
    return float(validation.index(max(validation))) if math.isnan(found) else found


def crossing(xs: Sequence[float], level: float) -> float:
    """Where a curve first reaches a level: 2.5 is half-way between its third and its fourth number; NaN if nowhere."""
    for i, x in enumerate(xs):
        if x >= level:
            return float(i) if i == 0 else i - 1 + (level - xs[i - 1]) / (x - xs[i - 1])
    return math.nan


def around(place: float) -> tuple[int, int]:
    """The evaluations on both sides of a place; twice the same where it is one."""
    return math.floor(place), math.ceil(place)


def interpolated(points: Sequence[Point], name: str, place: float) -> float:
    """What is read of a curve at a place between two evaluations."""
    low, high = (points[i][name] for i in around(place))
    return float(low + (place - math.floor(place)) * (high - low))
