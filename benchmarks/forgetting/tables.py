"""The tables of the report: each is a list of rows of numbers, written as CSV and shown as Markdown alike."""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from abilities import ABILITIES, MIXTURE, TASKS, Ability
from arms import METHODS, Arm
from choices import rate_of, rechosen, tried
from comparisons import (
    BAR,
    FULL,
    Comparison,
    Frozen,
    Judged,
    Setting,
    alike_settings,
    best_family,
    developed,
    explained,
    frozen_setting,
    full_alike,
    group_forgetting,
    judged_settings,
    met,
    reference,
)
from inference import Estimate, mean, paired, ratio
from outcomes import Row
from protocol import ALPHAS, ANCHORS, BASES, BELOW, CHOOSING_SEEDS, DEVELOPED_ON, FAMILIES, UPPER_BOUND

Table = list[dict[str, Any]]
NOT_RUN = "*not run yet*"
GROUPS = tuple(dict.fromkeys(ability.group for ability in ABILITIES))
# Of numbers that are no points.
DIGITS = {
    "of full's": 2,
    "at most": 2,
    "of full's then": 2,
    "R², line": 2,
    "R², parabola": 2,
    "steps": 0,
    "KL": 3,
    "rise of general loss": 3,
    "p": 3,
    "p, Holm": 3,
    "trained %": 1,
    "file, kB": 0,
}


class Spread(NamedTuple):
    """Mean and standard deviation over runs; NaN where there are too few."""

    value: float
    deviation: float

    @classmethod
    def of(cls, numbers: Iterable[Any]) -> Spread:
        known = [float(x) for x in numbers if x != ""]
        if not known:
            return cls(math.nan, math.nan)
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else math.nan)


def shown(value: Any, digits: int = 1) -> str:
    """A cell, with a minus sign that is one; an em dash for what is not known."""
    if isinstance(value, Estimate):
        within = f" [{shown(value.low, digits)}, {shown(value.high, digits)}]"
        return shown(value.value, digits) + ("" if math.isnan(value.value) else within)
    if isinstance(value, Spread):
        mean = shown(value.value, digits)
        return mean if math.isnan(value.deviation) else f"{mean} ± {shown(value.deviation, digits)}"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        text = f"{value:,.{digits}f}".replace("inf", "∞")
        return text.replace("-", "−") if text.strip("-0.,") else text.lstrip("-")
    return str(value).replace("|", "\\|")


def markdown(table: Table, digits: Mapping[str, int] = DIGITS) -> str:
    """As a page has it; a p-value too small for its digits is "< 0.001"."""
    if not table:
        return NOT_RUN
    cell = lambda name, x: (  # noqa: E731
        "< 0.001" if name.startswith("p") and isinstance(x, float) and x < 0.0005 else shown(x, digits.get(name, 1))
    )
    lines = [list(table[0]), *([cell(name, x) for name, x in row.items()] for row in table)]
    rule = "|---" * len(table[0]) + "|"
    first, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([first, rule, *rest])


def by_task(table: Table) -> str:
    """A table each for the tasks, without the column that says which."""
    if not table:
        return NOT_RUN
    parts = {task: [{k: v for k, v in row.items() if k != "task"} for row in table if row["task"] == task]
             for task in dict.fromkeys(row["task"] for row in table)}  # fmt: skip
    return "\n\n".join(f"**Task {task}**\n\n{markdown(part)}" for task, part in parts.items())


def write(table: Table, path: Path) -> None:
    """As CSV, a column for every number, beside and renamed; no file where there is no row."""
    if not table:
        path.unlink(missing_ok=True)
        return
    rows = [dict(_flat(row)) for row in table]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    with open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def _flat(row: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Estimate):
            yield from ((name, _rounded(value.value)), (f"{name}, low", _rounded(value.low)))
            yield f"{name}, high", _rounded(value.high)
        elif isinstance(value, Spread):
            yield from ((name, _rounded(value.value)), (f"{name}, deviation", _rounded(value.deviation)))
        else:
            yield name, _rounded(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return "" if value is None else value


def _reached(rows: Sequence[Row]) -> str:
    return f"{sum(bool(row['reached']) for row in rows)} of {len(rows)}"


def abilities() -> Table:
    """What a base can do, with a row of each."""
    return [
        {"ability": a.name, "stands for": a.group, "rows of the pretraining": f"{share:.0%}", "a row": _example(a)}
        for a, share in MIXTURE.items()
    ]


def new_tasks() -> Table:
    """What it is taught."""
    conflict = {"A": "strong: its first letter is copy's", "B": "mild: the tag of the old facts, other names",
                "C": "its first letter is sort's, and half of the work"}  # fmt: skip
    return [
        {"task": task, "learns": ability.name, "a row": _example(ability), "conflict": conflict[task]}
        for task, ability in TASKS.items()
    ]


def _example(ability: Ability) -> str:
    row = ability.rows("validation", 1)[0]
    return f"`{row['prompt']}{row['completion']}`"


def methods() -> Table:
    """Every method and what it is for."""
    return [{"arm": name, "what it is for": method.why} for name, method in METHODS.items()]


def compared(comparisons: Sequence[Comparison]) -> Table:
    """The primary comparison, or one like it without tests."""
    return [
        {
            "task": c.task,
            "trained": c.setting.name,
            "pairs": f"{len(c.pairs.bases)} of {c.planned}",
            "both reached": c.pairs.n_reached,
            "difference, points": c.difference,
            "worst case": c.worst,
            "of full's": c.share,
            **({} if math.isnan(c.adjusted) and math.isnan(c.p) else {"p": c.p, "p, Holm": c.adjusted}),
        }
        for c in comparisons
        if c.pairs.bases
    ]


def bar(judged: Judged) -> Table:
    """Whether the frozen data-free setting forgets at most half of what tuned full fine-tuning does."""
    table = []
    for task, base, comparison in judged.bar():
        full, found = judged.rows(reference(judged.frozen), task, base), comparison.pairs
        table.append(
            {
                "task": task,
                "base": base,
                "full forgets": Spread.of(row["forgetting"] for row in full),
                "setting forgets, as it was": Spread.of(found.method),
                "pairs": f"{len(found.bases)} of {comparison.planned}",
                "both reached": found.n_reached,
                "of full's": comparison.share,
                f"≤ {BAR:g}": "chosen here" if developed(task, base) else met(comparison),
            }
        )
    return table


def bars(judged: Judged) -> Table:
    """How often each setting of the families, and full fine-tuning with its anchor, comes below the bar."""
    table = []
    families = [frozen_setting(judged.frozen, family) for family in judged.frozen]
    for setting in [*families, *alike_settings(judged.frozen)]:
        found = [(t, b, c) for t, b, c in judged.bar(setting) if not developed(t, b) and met(c) is not None]
        if found:
            task, base, worst = max(found, key=lambda place: place[2].share.value)
            n_met = sum(bool(met(c)) for *_, c in found)
            table.append(
                {"trained": setting.name, f"≤ {BAR:g} of full's": f"{n_met} of {len(found)}",
                 "at most": worst.share, "there": f"{task}, `{base}`",
                 "learned it": _reached([row for t, b, _ in found for row in judged.rows(setting, t, b)])}
            )  # fmt: skip
    return table


def short(judged: Judged) -> Table:
    """For a first look: what is forgotten on each task, over bases and seeds."""
    table = []
    for setting in first_look(judged):
        rows = [row for task in TASKS for row in judged.rows(setting, task)]
        cells = {f"task {task}": judged.forgetting(setting, task) for task in TASKS}
        table.append({"trained": setting.name, **cells, "learned it": _reached(rows)})
    return table


def measured(judged: Judged, settings: Sequence[Setting]) -> Table:
    """What was forgotten of what, and at which price."""
    table = []
    for task in TASKS:
        for setting in settings:
            rows = judged.rows(setting, task)
            if rows:
                groups = {group: Spread.of(group_forgetting(row, group) for row in rows) for group in GROUPS}
                table.append(
                    {"task": task, "trained": setting.name, "reached": _reached(rows),
                     "forgetting": Spread.of(row["forgetting"] for row in rows), **groups,
                     "new task %": Spread.of(row["new"] for row in rows), "KL": Spread.of(row["kl"] for row in rows),
                     "rise of general loss": Spread.of(row["rise"] for row in rows)}
                )  # fmt: skip
    return table


def prices(judged: Judged, settings: Sequence[Setting], sizes: Sequence[Row] = ()) -> Table:
    """What an arm trains and takes.

    Args:
        judged: The runs.
        settings: The arms.
        sizes: Rows of `results/sizes.csv`.

    Returns:
        A row for each task and setting with runs; the trained share is of the scalars that full fine-tuning trains,
        and the rates that learned it did so while choosing.
    """
    files = {str(row["arm"]): float(row["bytes"]) for row in sizes}
    table = []
    whole = max((float(row["trained"]) for row in judged.all if row["arm"] in ("full", UPPER_BOUND)), default=math.nan)
    for task in TASKS:
        for setting in settings:
            rows = judged.rows(setting, task)
            if rows:
                rate, method = judged.rates[setting.arm, task, setting.alpha], METHODS[Arm.named(setting.arm).method]
                chosen_by = tried(judged.all, setting.arm, task, setting.alpha, judged.bases[0])
                table.append(
                    {"task": task, "trained": setting.name, "rate": f"{rate:g}",
                     "trained %": 100 * statistics.fmean(float(row["trained"]) for row in rows) / whole,
                     "file, kB": files.get(Arm.named(setting.arm).method, math.nan) / 1000,
                     "rates that learned it": _reached(chosen_by),
                     "steps to 95 % or the best": Spread.of(row["steps"] + method.charged for row in rows),
                     "seconds": Spread.of(row["seconds"] for row in rows), "reached": _reached(rows)}
                )  # fmt: skip
    return table


def groups_of(judged: Judged) -> dict[str, list[Setting]]:
    """{"primary", "exploratory": settings with rows}; the first begins with full fine-tuning, ends with replay."""
    first, there = judged_settings(judged.frozen), judged.settings()
    return {"primary": [s for s in first if s in there], "exploratory": [s for s in there if s not in first]}


def first_look(judged: Judged) -> list[Setting]:
    """What is primary, and before replay full fine-tuning with the other families' anchors, where it has rows."""
    primary, there = groups_of(judged)["primary"], judged.settings()
    alike = [setting for setting in alike_settings(judged.frozen) if setting in there]
    return [*primary[:-1], *alike, *primary[-1:]]


def _undialled(judged: Judged) -> list[Setting]:
    """What is primary, with the dial at 1."""
    return [setting for setting in groups_of(judged)["primary"] if setting.alpha == 1.0]


def _judged_at(rows: Sequence[Row], setting: Setting, task: str, rate: float | None) -> list[Row]:
    """Of `results/patience.csv`, what was judged at a rate."""
    key = (True, task, setting.arm, rate)
    return [row for row in rows if (row["judged"], row["task"], row["arm"], row["rate"]) == key]


def _kind(base: str) -> str:
    """Of "words-0" "words"."""
    return base.partition("-")[0]


def patience(judged: Judged, rows: Sequence[Row]) -> Table:
    """What the limit of the choosing decided: arms whose rate is another one with more steps to choose by.

    Args:
        judged: The runs.
        rows: Of `results/patience.csv`.

    Returns:
        A row for each such arm and task, beside full fine-tuning, which has the lowest of its rates anyway.
    """
    table = []
    full = reference(judged.frozen)
    for task in TASKS:
        for setting in _undialled(judged):
            rate = rechosen(judged.all, rows, setting.arm, task)
            again = _judged_at(rows, setting, task, rate)
            if again:
                pairs = paired(again, judged.rows(full, task), judged.seen(task))
                table.append(
                    {"task": task, "trained": setting.name,
                     "rate": f"{judged.rates[setting.arm, task, setting.alpha]:g}",
                     "of full's": judged.comparison(setting, task).share, "rate then": f"{rate:g}",
                     "of full's then": ratio(pairs.worst, pairs.full, pairs.runs), "reached then": _reached(again)}
                )  # fmt: skip
    return table


def below(judged: Judged, rows: Sequence[Row]) -> Table:
    """Arms that have the lowest rate of their grid, there and one below, each beside full fine-tuning likewise.

    Args:
        judged: The runs, of the bases that are looked at.
        rows: Of `results/patience.csv`.

    Returns:
        A row for each such arm and task, of the bases and seeds that have runs at the lower rate.
    """
    table = []
    full, here = reference(judged.frozen), [row for row in rows if row["base"] in judged.bases]
    for task in TASKS:
        lower: dict[Setting, list[Row]] = {}
        for setting in _undialled(judged):
            rate = BELOW[METHODS[Arm.named(setting.arm).method].rates]
            if same := _judged_at(here, setting, task, rate):
                lower[setting] = same
        for setting, found in lower.items():
            runs = {(row["base"], row["seed"]) for row in found}
            there = [row for row in judged.rows(setting, task) if (row["base"], row["seed"]) in runs]
            at = paired(there, judged.rows(full, task), there)
            under = paired(found, lower.get(full, []), found)
            table.append(
                {"bases": _kind(judged.bases[0]), "task": task, "trained": setting.name,
                 "rate": f"{judged.rates[setting.arm, task, 1.0]:g}",
                 "forgets": Spread.of(row["forgetting"] for row in there),
                 "than full": mean(at.method - at.full, at.runs),
                 "a rate below": f"{found[0]['rate']:g}", "forgets then": Spread.of(r["forgetting"] for r in found),
                 "than full then": mean(under.method - under.full, under.runs), "reached then": _reached(found)}
            )  # fmt: skip
    return table


def region_beside_anchor(judged: Judged) -> Table:
    """Every family's frozen setting beside full fine-tuning with the same anchor and dial."""
    return compared(
        [
            judged.comparison(frozen_setting(judged.frozen, family), task, to=full_alike(judged.frozen, family))
            for task in TASKS
            for family in judged.frozen
            if family != FULL
        ]
    )


def frozen_table(frozen: Frozen) -> Table:
    """What was chosen on task A with the first base."""
    best = best_family(frozen) if frozen else None
    return [
        {"family": family, "variant": chosen["method"], "anchor": chosen["anchor"], "α": f"{chosen['alpha']:g}",
         "forgetting of validation": float(chosen["forgetting"]), "least": family == best}
        for family, chosen in frozen.items()
    ]  # fmt: skip


def developing(rows: Sequence[Row]) -> list[Row]:
    """The rows to choose by on task A with the first base and the first seed."""
    where = (*DEVELOPED_ON, CHOOSING_SEEDS[0])
    return [row for row in rows if not row["judged"] and (row["base"], row["task"], row["seed"]) == where]


def rates(rows: Sequence[Row]) -> Table:
    """Forgetting against the rate, of every variant, with one seed to choose by."""
    table = []
    for family, arms in FAMILIES.items():
        for arm in arms:
            tried = [row for row in developing(rows) if (row["arm"], row["alpha"]) == (arm, 1.0)]
            table += [
                {"family": family, "trained": arm, "rate": f"{row['rate']:g}", "reached": bool(row["reached"]),
                 "best validation %": float(row["best"]), "steps": float(row["steps"]),
                 "forgetting": float(row["forgetting"])}
                for row in sorted(tried, key=lambda row: row["rate"])
            ]  # fmt: skip
    return table


def dialled(rows: Sequence[Row], variant: str) -> dict[tuple[str, float], Row]:
    """{(anchor, α): the row to choose by} of a variant at its rate."""
    rate = rate_of(rows, variant, DEVELOPED_ON[1])
    arms = {Arm(variant, anchor).name: anchor for anchor in ANCHORS}
    same = [row for row in developing(rows) if row["arm"] in arms and row["rate"] == rate]
    return {(arms[str(row["arm"])], float(row["alpha"])): row for row in same}


def factorial(rows: Sequence[Row], variants: Mapping[str, str]) -> Table:
    """Region × anchor × dial: forgetting of validation at each α; in brackets where 95 % was not reached there."""
    table = []
    for family, variant in variants.items():
        found = dialled(rows, variant)
        for anchor in ANCHORS:
            cells = {f"α = {alpha:g}": _forgotten(found.get((anchor, alpha))) for alpha in ALPHAS}
            dial = found.get((anchor, ALPHAS[-1]), {})
            cells[f"α = 1, at the step of α = {ALPHAS[-1]:g}"] = str(dial.get("undialled", ""))
            if any(cells.values()):
                table.append({"family": family, "region": variant, "anchor": anchor, **cells})
    return table


def _forgotten(row: Row | None) -> str:
    if row is None:
        return ""
    text = shown(float(row["forgetting"]))
    return text if row["reached"] else f"({text})"


def ranking(judged: Judged, other: Judged) -> Table:
    """What is run on all bases, on those of characters and on another one, from the least forgotten on the former."""
    task = DEVELOPED_ON[1]
    forgotten = lambda where, setting: Spread.of(row["forgetting"] for row in where.rows(setting, task))  # noqa: E731
    there = [setting for setting in judged.everywhere if judged.rows(setting, task) and other.rows(setting, task)]
    table = [
        {"trained": setting.name, _kind(BASES[0]): forgotten(judged, setting),
         other.bases[0]: forgotten(other, setting), "reached there": _reached(other.rows(setting, task)),
         "to full, there": other.comparison(setting, task).difference}
        for setting in there
    ]  # fmt: skip
    return sorted(table, key=lambda row: row[_kind(BASES[0])].value)


def searched(rows: Sequence[Row]) -> Table:
    """The trials of CoFiTune's search, of `results/search.csv`."""
    return [
        {"level": row["level"], "layers": row["layers"], "modules": row["modules"],
         "new task %": 100 * row["speciality"], "old abilities %": 100 * row["versatility"],
         "unified": 100 * row["unified"]}
        for row in rows
    ]  # fmt: skip


def divergence(judged: Judged) -> Table:
    """How much of forgetting's variance KL explains, over what is judged everywhere, at α = 1, by base."""
    table = []
    for task in TASKS:
        seen = [row for row in judged.seen(task) if row["alpha"] == 1.0 and row["kl"] != ""]
        for base in (*judged.bases, "all"):
            rows = [row for row in seen if base in ("all", row["base"])]
            if rows:
                xs, ys = ([float(row[name]) for row in rows] for name in ("kl", "forgetting"))
                table.append({"task": task, "base": base, "runs": len(rows), "KL, from": min(xs), "to": max(xs),
                              "R², line": explained(xs, ys), "R², parabola": explained(xs, ys, 2)})  # fmt: skip
    return table
