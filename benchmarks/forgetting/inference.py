"""What can be said about a difference of a few dozen runs: intervals, tests, and what a run counts as that failed.

A method is compared with full fine-tuning in *pairs*: runs of the same base and the same seed, and so with the same
rows in the same order. What all runs on one base share, and what all of one seed do (the order of the rows, the region
that is drawn), resampling runs one by one would take for certain. So the bootstrap is crossed: it resamples bases, and
seeds for all of them alike; every base counts the same. With three bases such an interval is rough, and more often too
short than too long: no cleverer resampling makes more bases. The p-value flips the sign of each pair and so takes
pairs of one seed for independent: with flips of three bases, none could be below 0.25, and with those of five seeds
none below 0.06.

**A run that does not reach** the level has forgotten at its best validation what it has, but has learned less for it.
It is never dropped. Two differences stand beside each other: *as it was*, with the value at the best validation; and
the *worst case*, in which a run of the method counts as the largest forgetting of what is judged everywhere (full
fine-tuning, the primary comparison, replay; and its own) on that base and task, and one of full fine-tuning as it was.
What is said of a method has to hold in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

# Of some runs, the (base, seed) of each.
Cells = tuple[tuple[str, float], ...]
RESAMPLES, FLIPS, SEED = 10_000, 100_000, 0
# Of so many pairs all flips are tried; of more, `FLIPS` drawn ones.
EXACT = 16


class Estimate(NamedTuple):
    """A number with its 95 % interval; NaN where it cannot be known."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Pairs:
    """Runs of a method beside those of full fine-tuning with the same base and seed.

    Attributes:
        runs: (base, seed) of each pair, (n,).
        method: Forgetting at 95 % or at the best validation, points, (n,) fp64.
        full: Likewise.
        method_reached: Whether 95 % was reached, (n,) bool.
        full_reached: Likewise.
        largest: Of what is judged everywhere, and of both, on the same base and task, points, (n,) fp64.
    """

    runs: Cells
    method: np.ndarray
    full: np.ndarray
    method_reached: np.ndarray
    full_reached: np.ndarray
    largest: np.ndarray

    @property
    def bases(self) -> tuple[str, ...]:
        """Of each pair, (n,)."""
        return tuple(base for base, _ in self.runs)

    @property
    def n_reached(self) -> int:
        """Pairs of which both runs reached 95 %."""
        return int((self.method_reached & self.full_reached).sum())

    @property
    def worst(self) -> np.ndarray:
        """The method's forgetting in the worst case, (n,) fp64."""
        return np.where(self.method_reached, self.method, np.maximum(self.method, self.largest))


def paired(
    method: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]], seen: Sequence[Mapping[str, Any]]
) -> Pairs:
    """Pair runs on one task by base and seed.

    Args:
        method: Rows of `results/runs.csv`: of one arm, place of the dial, and task.
        full: Those of full fine-tuning.
        seen: What is judged everywhere, on the task: among it the worst is looked for.

    Returns:
        The pairs, in the order of bases and seeds; a run without a partner is in none.

    Raises:
        ValueError: Two rows are of the same base and seed: they are not of one arm.
    """
    one, other = _by_run(method), _by_run(full)
    both = sorted(one.keys() & other.keys())
    largest = {base: max(float(row["forgetting"]) for row in [*seen, *method, *full] if row["base"] == base)
               for base, _ in both}  # fmt: skip
    numbers = lambda rows: np.array([float(rows[run]["forgetting"]) for run in both])  # noqa: E731
    reached = lambda rows: np.array([bool(rows[run]["reached"]) for run in both], dtype=bool)  # noqa: E731
    return Pairs(
        tuple(both), numbers(one), numbers(other), reached(one), reached(other),
        np.array([largest[base] for base, _ in both]),
    )  # fmt: skip


def _by_run(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    found = {(str(row["base"]), int(row["seed"])): row for row in rows}
    if len(found) < len(rows):
        raise ValueError(f"{len(rows)} rows of {len(found)} bases and seeds: give the rows of one arm, α and rate")
    return found


def shares(bases: Sequence[str]) -> np.ndarray:
    """How much each run counts, (n,) fp64, sum 1: every base the same, and every run of a base the same."""
    return np.array([1 / (len(set(bases)) * list(bases).count(base)) for base in bases])


@lru_cache(maxsize=64)
def resampled(runs: Cells, count: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """How much each run counts in each resample.

    As many bases are drawn as there are, with replacement, and as many seeds, the same for all of them; a run counts
    as often as its base times as often as its seed. Every drawn base counts the same, whichever of its runs are there.

    Args:
        runs: (base, seed) of each, (n,).
        count: Of resamples.
        seed: Of the draws.

    Returns:
        (count, n) fp64, each row sums to 1: its product with n numbers is their mean in each resample.
    """
    rng = np.random.default_rng(seed)
    bases, base_of = np.unique([base for base, _ in runs], return_inverse=True)
    seeds, seed_of = np.unique([number for _, number in runs], return_inverse=True)
    drawn_bases, drawn_seeds = (
        (rng.integers(size, size=(count, size))[..., None] == np.arange(size)).sum(1)
        for size in (len(bases), len(seeds))
    )  # how often each was, (count, bases) and (count, seeds)
    weights = np.zeros((count, len(runs)))
    for base in range(len(bases)):
        its = np.flatnonzero(base_of == base)
        often = drawn_seeds[:, seed_of[its]].astype(np.float64)
        often[often.sum(1) == 0] = 1.0  # none of its runs has a seed that was drawn
        weights[:, its] = drawn_bases[:, [base]] * often / often.sum(1, keepdims=True)
    return weights / len(bases)


def interval(numbers: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of resampled numbers, (count,), perhaps infinite; between two the outer one."""
    ordered = np.sort(numbers)
    last = len(ordered) - 1
    return float(ordered[math.floor(0.025 * last)]), float(ordered[math.ceil(0.975 * last)])


def mean(numbers: np.ndarray, runs: Cells) -> Estimate:
    """The mean of the bases' means of some numbers, (n,)."""
    if not runs:
        return Estimate(math.nan, math.nan, math.nan)
    return Estimate(float(shares([base for base, _ in runs]) @ numbers), *interval(resampled(runs) @ numbers))


def ratio(method: np.ndarray, full: np.ndarray, runs: Cells) -> Estimate:
    """Of mean forgetting to full fine-tuning's, (n,) each, resampled together.

    It is not known (NaN) where full fine-tuning forgot nothing; a resample in which it forgot nothing counts as
    infinite, the worst.
    """
    counts = shares([base for base, _ in runs])
    if not runs or (below := float(counts @ full)) <= 0:
        return Estimate(math.nan, math.nan, math.nan)
    weights = resampled(runs)
    above, under = weights @ method, weights @ full
    found = np.divide(above, under, out=np.full_like(above, math.inf), where=under > 0)
    return Estimate(float(counts @ method) / below, *interval(found))


def flip_p(differences: np.ndarray, bases: Sequence[str], flips: int = FLIPS, seed: int = SEED) -> float:
    """Two-sided p-value that paired differences are as likely of the one sign as of the other.

    The share of flips of the signs under which the mean is at least as far from 0: of all of them up to `EXACT` pairs,
    otherwise of those drawn and the one observed.

    Args:
        differences: Points, (n,).
        bases: Of each pair, (n,).
        flips: Drawn, where not all are tried.
        seed: Of these.

    Returns:
        From above 0 to 1; NaN without pairs.
    """
    terms = shares(bases) * differences
    if not len(terms):
        return math.nan
    # Sums in another order differ in their last digits: what is equal on paper has to count as equal.
    level = abs(terms.sum()) - 1e-9 * np.abs(terms).sum()
    if len(terms) <= EXACT:
        return float((np.abs(_all_signs(len(terms)) @ terms) >= level).mean())
    signs = np.random.default_rng(seed).choice((1.0, -1.0), size=(flips, len(terms)))
    return float((1 + (np.abs(signs @ terms) >= level).sum()) / (1 + flips))


@lru_cache(maxsize=4)
def _all_signs(n: int) -> np.ndarray:
    """Every way to give n numbers a sign, (2ⁿ, n) fp64."""
    return np.where(np.arange(2**n)[:, None] >> np.arange(n) & 1, 1.0, -1.0)


def decided(pairs: Pairs) -> float:
    """The p-value for a difference that holds as it was and in the worst case: the larger one.

    Where the two are of different signs nothing is decided: 1.
    """
    plain, worst = pairs.method - pairs.full, pairs.worst - pairs.full
    if not len(plain):
        return math.nan
    weights = shares(pairs.bases)
    if (weights @ plain) * (weights @ worst) < 0:
        return 1.0
    return max(flip_p(plain, pairs.bases), flip_p(worst, pairs.bases))


def same_sign(pairs: Pairs) -> bool:
    """Whether the difference, as it was and in the worst case, goes the same way with every seed: means over bases."""
    bases, seeds = (np.array(names) for names in zip(*pairs.runs, strict=True))
    signs = set()
    for seed in set(seeds.tolist()):
        its = seeds == seed
        counts = shares(bases[its].tolist())
        signs |= {float(np.sign(counts @ (numbers - pairs.full)[its])) for numbers in (pairs.method, pairs.worst)}
    return signs in ({1.0}, {-1.0})


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted by Holm: call those up to α significant, and the chance that any is so wrongly is at most α.

    Args:
        p_values: Of all comparisons that were planned. NaN: not there yet; it counts as one, and stays NaN.

    Returns:
        In the same order: the i-th smallest (from 0) of m times m − i, at least the one before, at most 1.
    """
    known = [1.0 if math.isnan(p) else p for p in p_values]
    adjusted = [math.nan] * len(known)
    before = 0.0
    for rank, i in enumerate(sorted(range(len(known)), key=known.__getitem__)):
        before = max(before, min(1.0, (len(known) - rank) * known[i]))
        if not math.isnan(p_values[i]):
            adjusted[i] = before
    return adjusted
