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
        `trained` scalars, `bytes`, `seconds`.
    """
    start = result["points"][0]
    rows = []
    for alpha in run["alphas"]:
        points = [point for point in result["points"] if point["alpha"] == alpha]
        validation = [point["validation"] for point in points]
        found = crossing(validation, ENOUGH)
        place = float(validation.index(max(validation))) if math.isnan(found) else found
        at = {name: interpolated([point[name] for point in points], place) for name in points[0] if name != "alpha"}
        row: Row = {name: run[name] for name in ("base", "task", "arm", "rate", "seed", "judged")}
        row |= {"alpha": alpha, "reached": not math.isnan(found), "steps": round(at["step"], 1)}
        row |= {"forgetting": round(100 * (start["old"] - at["old"]), 2), "new": round(100 * at["new"], 2)}
        row |= {"best": round(100 * max(validation), 2)}
        row |= {"kl": round(at["kl"], 4), "rise": round(at["general"] - start["general"], 4)}
        row |= {ability.name: round(100 * (start[ability.name] - at[ability.name]), 2) for ability in ABILITIES}
        if alpha != 1.0 and run["alphas"][0] == 1.0:
            whole = [point["old"] for point in result["points"] if point["alpha"] == 1.0]
            row["undialled"] = round(100 * (start["old"] - interpolated(whole, place)), 2)
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


def crossing(xs: Sequence[float], level: float) -> float:
    """Where a curve first reaches a level: 2.5 is half-way between its third and its fourth number; NaN if nowhere."""
    for i, x in enumerate(xs):
        if x >= level:
            return float(i) if i == 0 else i - 1 + (level - xs[i - 1]) / (x - xs[i - 1])
    return math.nan


def interpolated(ys: Sequence[float], place: float) -> float:
    """A curve at a place between two evaluations; NaN at NaN."""
    if math.isnan(place):
        return math.nan
    low = min(int(place), len(ys) - 1)
    high = min(low + 1, len(ys) - 1)
    return ys[low] + (place - low) * (ys[high] - ys[low])
