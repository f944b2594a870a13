"""From the rows of all runs to what is compared: which arms, on which runs, and what was fixed before.

The *primary comparison* is of every family's variant, alone and with the anchor and the place of the dial that were
frozen for it, and of the peers, with tuned full fine-tuning, on each task over all bases and seeds. All of its tests,
those of the three tasks together, are one family for Holm. Everything else is exploratory and has no p-values.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from abilities import ABILITIES, TASKS
from arms import METHODS, Arm
from choices import rate_of
from inference import Estimate, Pairs, decided, holm, mean, paired, ratio
from outcomes import Row
from protocol import BASES, DEVELOPED_ON, JUDGING_SEEDS, PEERS, UPPER_BOUND

# The family whose variant all others are compared with, and what the bar is of its forgetting.
FULL, BAR = "full", 0.5
# Enough to speak of, in points: seeds differ by tenths of a point, and enough of them make any of these certain.
LEAST = 1.0
# As `frozen.yaml` has it: {family: {"method", "anchor", "alpha", "forgetting"}}.
Frozen = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, order=True)
class Setting:
    """An arm at a place of the dial."""

    arm: str
    alpha: float = 1.0

    @property
    def name(self) -> str:
        """As tables have it."""
        return self.arm if self.alpha == 1.0 else f"{self.arm} | α {self.alpha:g}"


@dataclass(frozen=True)
class Comparison:
    """One setting beside another on one task.

    Attributes:
        setting: What is compared.
        task: A key of `TASKS`.
        planned: Pairs that there will be.
        pairs: Those that there are.
        difference: In points of forgetting, negative where it forgets less; as it was.
        worst: Likewise, in the worst case.
        share: Of the other's mean forgetting, in the worst case.
        p: Of both differences; NaN where no test was planned, or no pair is there.
        adjusted: By Holm over the primary comparison.
    """

    setting: Setting
    task: str
    planned: int
    pairs: Pairs
    difference: Estimate
    worst: Estimate
    share: Estimate
    p: float = math.nan
    adjusted: float = math.nan


def reference(frozen: Frozen) -> Setting:
    """Tuned full fine-tuning: without an anchor, the whole difference."""
    return Setting(str(frozen[FULL]["method"]) if FULL in frozen else "full")


def frozen_setting(frozen: Frozen, family: str) -> Setting:
    """A family's variant with its anchor and its place of the dial."""
    chosen = frozen[family]
    return Setting(Arm(str(chosen["method"]), str(chosen["anchor"])).name, float(chosen["alpha"]))


def best_family(frozen: Frozen) -> str:
    """Whose frozen setting forgot least where it was chosen: the one that the bar is about."""
    return min(frozen, key=lambda family: float(frozen[family]["forgetting"]))


def primary_settings(frozen: Frozen) -> list[Setting]:
    """What is tested against full fine-tuning; empty before `frozen.yaml` was written."""
    if not frozen:
        return []
    alone = [Setting(str(chosen["method"])) for chosen in frozen.values()]
    found = [*alone, *(frozen_setting(frozen, family) for family in frozen), *map(Setting, PEERS)]
    return [setting for setting in dict.fromkeys(found) if setting != reference(frozen)]


def judged_settings(frozen: Frozen) -> list[Setting]:
    """Full fine-tuning, what is tested against it, and replay; empty before `frozen.yaml` was written."""
    return [reference(frozen), *primary_settings(frozen), Setting(UPPER_BOUND)] if frozen else []


def full_alike(frozen: Frozen, family: str) -> Setting:
    """Full fine-tuning with the anchor and the place of the dial that were frozen for a family."""
    chosen = frozen[family]
    return Setting(Arm(reference(frozen).arm, str(chosen["anchor"])).name, float(chosen["alpha"]))


def alike_settings(frozen: Frozen) -> list[Setting]:
    """Full fine-tuning with every family's anchor and dial, where that is not judged anyway."""
    found = dict.fromkeys(full_alike(frozen, family) for family in frozen)
    return [setting for setting in found if setting not in judged_settings(frozen)]


def settings_everywhere(frozen: Frozen) -> list[Setting]:
    """What is run on all bases."""
    return [*judged_settings(frozen), *alike_settings(frozen)]


class Judged:
    """The rows to judge by: of every arm and task those with the rate that was chosen there.

    Args:
        rows: All of `results/runs.csv`.
        frozen: What was chosen.
        bases: Those that are looked at; rates were chosen on the first.
        seeds: That there will be of each.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        frozen: Frozen,
        bases: Sequence[str] = BASES,
        seeds: Sequence[int] = JUDGING_SEEDS,
    ) -> None:
        self.all, self.frozen = [row for row in rows if row["base"] in bases], frozen
        self.bases, self.n_seeds = tuple(bases), len(seeds)
        # Run on all bases; before anything was frozen nothing is known of it.
        self.everywhere = settings_everywhere(frozen)
        found: dict[tuple[str, str, float], list[Row]] = {}
        for row in self.all:
            if row["judged"] and row["seed"] in seeds:
                found.setdefault((str(row["arm"]), str(row["task"]), float(row["alpha"])), []).append(row)
        self.rates = {key: self._rate(*key) for key in found}
        self._rows = {key: [row for row in same if row["rate"] == self.rates[key]] for key, same in found.items()}

    def _rate(self, arm: str, task: str, alpha: float) -> float:
        """The chosen one; before it is, the middle one."""
        return rate_of(self.all, arm, task, alpha, self.bases[0]) or METHODS[Arm.named(arm).method].rates[2]

    def rows(self, setting: Setting, task: str, base: str | None = None) -> list[Row]:
        """Of a setting on a task, of one base or all of them."""
        same = self._rows.get((setting.arm, task, setting.alpha), [])
        return [row for row in same if base in (None, row["base"])]

    def forgetting(self, setting: Setting, task: str) -> Estimate:
        """As it was, points: the mean over bases and seeds; NaN without runs."""
        rows = self.rows(setting, task)
        runs = tuple((str(row["base"]), row["seed"]) for row in rows)
        return mean(np.array([float(row["forgetting"]) for row in rows]), runs)

    def seen(self, task: str) -> list[Row]:
        """Of what is judged on a task; before anything was frozen, of everything."""
        return [row for setting in judged_settings(self.frozen) or self.settings() for row in self.rows(setting, task)]

    def settings(self) -> list[Setting]:
        """What has a row, in the order of METHODS, without an anchor first."""
        order = {name: i for i, name in enumerate(METHODS)}
        found = {Setting(arm, alpha) for (arm, _, alpha), rows in self._rows.items() if rows}
        key = lambda s: (order[Arm.named(s.arm).method], Arm.named(s.arm).anchor != "none", s.arm, -s.alpha)  # noqa: E731
        return sorted(found, key=key)

    def comparison(
        self, setting: Setting, task: str, to: Setting | None = None, base: str | None = None
    ) -> Comparison:
        """Beside another setting, or else full fine-tuning; without a test."""
        to = to or reference(self.frozen)
        pairs = paired(self.rows(setting, task, base), self.rows(to, task, base), self.seen(task))
        on_all = base is None and (not self.everywhere or setting in self.everywhere)
        planned = self.n_seeds * (len(self.bases) if on_all else 1)
        return Comparison(
            setting, task, planned, pairs, mean(pairs.method - pairs.full, pairs.runs),
            mean(pairs.worst - pairs.full, pairs.runs), ratio(pairs.worst, pairs.full, pairs.runs),
        )  # fmt: skip

    def primary(self) -> list[Comparison]:
        """Every test that was planned, those without runs, too."""
        settings = primary_settings(self.frozen)
        found = [self.comparison(setting, task) for task in TASKS for setting in settings]
        p_values = [decided(comparison.pairs) for comparison in found]
        return [
            Comparison(**{**vars(comparison), "p": p, "adjusted": adjusted})
            for comparison, p, adjusted in zip(found, p_values, holm(p_values), strict=True)
        ]

    def bar(self, setting: Setting | None = None) -> list[tuple[str, str, Comparison]]:
        """(task, base, a setting beside full fine-tuning) of every task and base; None is the one the bar is about."""
        if not self.frozen:
            return []
        setting = setting or frozen_setting(self.frozen, best_family(self.frozen))
        return [(task, base, self.comparison(setting, task, base=base)) for task in TASKS for base in self.bases]


def met(comparison: Comparison) -> bool | None:
    """Whether the bar is: None while pairs are missing, or where full fine-tuning forgot nothing."""
    if len(comparison.pairs.bases) < comparison.planned or math.isnan(comparison.share.value):
        return None
    return comparison.share.value <= BAR


def developed(task: str, base: str) -> bool:
    """Whether something else than a rate was chosen there."""
    return (base, task) == DEVELOPED_ON


def group_forgetting(row: Row, group: str) -> float:
    """The mean over a group's abilities, points."""
    return statistics.fmean(float(row[ability.name]) for ability in ABILITIES if ability.group == group)


def explained(xs: Sequence[float], ys: Sequence[float], degree: int = 1) -> float:
    """R² of the polynomial that fits best; NaN where one of them varies too little, or of too few."""
    if len(xs) < degree + 2 or len(set(xs)) <= degree or len(set(ys)) == 1:
        return math.nan
    left = np.array(ys) - np.polyval(np.polyfit(xs, ys, degree), xs)
    return float(1 - left @ left / np.square(ys - np.mean(ys)).sum())
