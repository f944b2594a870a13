"""Tables of what `sequences.py` and `self_samples.py` measured: several tasks, preferences, and anchor text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from book import Row
from comparisons import group_forgetting
from inference import Estimate, mean
from tables import GROUPS, NOT_RUN, Spread, Table, markdown

KIND = ("experiment", "order", "arm")
# What an arm takes: shown apart.
PRICES = ("steps", "seconds", "trained %", "file, kB")
# {as tables have it: column}; a table leaves out what none of its rows has.
NUMBERS = {
    "overall performance": "overall", "backward transfer": "transfer", "Δ first": "first", "Δ second": "second",
    "A %": "A", "B %": "B", "C %": "C", "prefer the chosen %": "preferred", "write the chosen %": "chosen",
    "forgetting": "forgetting", **{group: group for group in GROUPS}, "KL": "kl", "rise of general loss": "rise",
    "steps": "total_steps", "seconds": "seconds", "trained %": "share", "file, kB": "kilobytes",
}  # fmt: skip


def courses(rows: Sequence[Row]) -> Table:
    """What is left after the last stage of the courses that are judged.

    Args:
        rows: Of `results/sequences.csv`. Where an arm was run at several rates, those that came last count.

    Returns:
        A row for each experiment, order and arm: `reached`, the courses all of whose stages learned their tasks, and
        means and standard deviations over the runs. Experiments, orders and arms are in the order in which they first
        came, each.
    """
    table: Table = []
    for kind, runs in _judged(rows).items():
        last = [_with_groups(_last(run)) for run in runs.values()]
        n_reached = sum(all(row["reached"] for row in run if row["reached"] != "") for run in runs.values())
        cells = {name: Spread.of(row.get(column, "") for row in last) for name, column in NUMBERS.items()}
        table.append({**dict(zip(KIND, kind, strict=True)), "reached": f"{n_reached} of {len(runs)}", **cells})
    first = {name: list(dict.fromkeys(row[name] for row in table)) for name in KIND}
    return sorted(table, key=lambda row: tuple(first[name].index(row[name]) for name in KIND))


def difference(rows: Sequence[Row], experiment: str, column: str, arm: str, than: str) -> tuple[Estimate, int]:
    """(mean difference of two arms after the last stage, pairs that there are of the same order, base and seed).

    Its interval resamples orders and seeds: there is one base.
    """
    runs = _judged(rows)
    found: list[float] = []
    cells: list[tuple[str, float]] = []
    for (named, order, other), one in runs.items():
        if (named, other) == (experiment, arm):
            theirs = runs.get((experiment, order, than), {})
            for base, seed in sorted(one.keys() & theirs.keys()):
                run, twin = _last(one[base, seed]), _last(theirs[base, seed])
                found.append(float(run[column]) - float(twin[column]))
                cells.append((f"{base}, {order}", seed))
    return mean(np.array(found), tuple(cells)), len(found)


def _judged(rows: Sequence[Row]) -> dict[tuple[Any, ...], dict[tuple[str, float], list[Row]]]:
    """{(experiment, order, arm): {(base, seed): its stages}}; of several rates those that came last count."""
    rates = {tuple(row[name] for name in KIND): row["rates"] for row in rows if row["judged"]}
    stages: dict[tuple[Any, ...], dict[tuple[str, float], list[Row]]] = {}
    for row in rows:
        kind = tuple(row[name] for name in KIND)
        if row["judged"] and row["rates"] == rates[kind]:
            stages.setdefault(kind, {}).setdefault((row["base"], row["seed"]), []).append(row)
    return stages


def _last(run: Sequence[Row]) -> Row:
    return max(run, key=lambda row: float(row["stage"]))


def _with_groups(row: Row) -> Row:
    return row | {group: group_forgetting(row, group) for group in GROUPS}


def shown(table: Table) -> str:
    """Two tables each for the experiments and orders: what is left, and what it took."""
    if not table:
        return NOT_RUN
    parts: dict[str, Table] = {}
    for row in table:
        name = f"{row['experiment']}, {row['order'].replace(' ', ' → ')}"
        left = {column: value for column, value in row.items() if column not in (*KIND[:2], *PRICES)}
        parts.setdefault(name, []).append(left)
        took = {column: row[column] for column in ("arm", *PRICES)}
        parts.setdefault(f"{name}: what it took", []).append(took)
    return "\n\n".join(f"**{name}**\n\n{markdown(_filled(part))}" for name, part in parts.items())


def _filled(part: Table) -> Table:
    """Without the columns that none of the rows has."""
    known = [n for n in part[0] if not all(isinstance(r[n], Spread) and math.isnan(r[n].value) for r in part)]
    return [{name: row[name] for name in known} for row in part]


def samples(rows: Sequence[Row]) -> Table:
    """How much of what the bases write is old prompts, of `results/self_samples.csv`."""
    return [
        {"base": row["base"], "temperature": f"{row['temperature']:g}", "samples": f"{row['samples']:g}",
         "valid old prompts %": float(row["valid"]), "and the right answer %": float(row["right"]),
         "different %": float(row["distinct"])}
        for row in rows
        if row["ability"] == "all"
    ]  # fmt: skip
