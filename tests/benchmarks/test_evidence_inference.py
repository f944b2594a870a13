"""The statistics of the benchmark of forgetting, each beside an obvious twin or a number worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import inference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference import Pairs, decided, flip_p, holm, interval, mean, paired, ratio, resampled, shares

BALANCED = ("a",) * 5 + ("b",) * 5 + ("c",) * 5
RAGGED = ("b", "a", "b", "b", "c", "a")
POINTS = st.floats(-50, 50).map(lambda x: round(x, 2))


def run(base: str, seed: int, forgetting: float, reached: bool = True) -> dict:
    return {"base": base, "seed": seed, "forgetting": forgetting, "reached": reached}


def pairs(method, full, method_reached=None, full_reached=None, largest=60.0, bases=None) -> Pairs:
    n = len(method)
    return Pairs(
        cells(bases or BALANCED[:n]), np.array(method, dtype=float), np.array(full, dtype=float),
        np.array(method_reached or [True] * n), np.array(full_reached or [True] * n), np.full(n, largest),
    )  # fmt: skip


def cells(bases: Sequence[str]) -> inference.Cells:
    """The runs of some bases: of each, its first is of seed 0, its second of seed 1."""
    return tuple((base, float(list(bases[:i]).count(base))) for i, base in enumerate(bases))


def slowly_resampled(runs, numbers, count, seed):
    """Means of resamples, run by run, by the same draws: a grid of drawn bases and drawn seeds."""
    bases, seeds = (sorted(set(names)) for names in zip(*runs, strict=True))
    rng = np.random.default_rng(seed)
    drawn_bases, drawn_seeds = (rng.integers(len(names), size=(count, len(names))) for names in (bases, seeds))
    number = dict(zip(runs, numbers, strict=True))
    means = []
    for resample in range(count):
        of_bases = []
        for i in drawn_bases[resample]:
            there = [number[bases[i], seeds[j]] for j in drawn_seeds[resample] if (bases[i], seeds[j]) in number]
            there = there or [x for (base, _), x in number.items() if base == bases[i]]
            of_bases.append(sum(there) / len(there))
        means.append(sum(of_bases) / len(of_bases))
    return means


@pytest.mark.parametrize("bases", [BALANCED, RAGGED, ("a",) * 3, ("a",)], ids=["balanced", "ragged", "one", "single"])
def test_resamples_are_those_of_the_slow_twin(bases):
    """Vectorised, but the same: bases with replacement, and seeds for all of them."""
    numbers = np.random.default_rng(1).normal(size=len(bases))
    weights = resampled(cells(bases), 200, 7)
    np.testing.assert_allclose(weights.sum(1), 1.0)
    np.testing.assert_allclose(weights @ numbers, slowly_resampled(cells(bases), numbers, 200, 7), atol=1e-12)


def test_an_interval_is_as_wide_as_the_bases_differ():
    """Where bases differ and seeds do not, more seeds make no narrower interval: a base is the unit."""
    for seeds in (2, 9):
        found = mean(np.repeat([0.0, 10.0, 20.0], seeds), cells("a" * seeds + "b" * seeds + "c" * seeds))
        assert found == pytest.approx((10.0, 0.0, 20.0), abs=1e-9)


def test_an_interval_is_as_wide_as_the_seeds_differ():
    """Where seeds differ and bases do not, more bases make no narrower interval: a seed draws the same on each."""
    for bases in ("ab", "abcdefgh"):
        runs = tuple((base, seed) for base in bases for seed in (0.0, 1.0, 2.0))
        found = mean(np.array([10.0 * seed for _, seed in runs]), runs)
        assert found == pytest.approx((10.0, 0.0, 20.0), abs=1e-9)


def test_every_base_counts_the_same():
    """Also one with fewer runs, in the mean and on average in the resamples."""
    numbers = np.array([6.0, 0.0, 6.0, 6.0, 3.0, 0.0])
    assert shares(RAGGED).sum() == pytest.approx(1)
    assert mean(numbers, cells(RAGGED)).value == pytest.approx(3.0)
    assert (resampled(cells(RAGGED)) @ numbers).mean() == pytest.approx(3.0, abs=0.1)


def test_whether_every_seed_goes_the_same_way_is_asked_of_its_mean_over_the_bases():
    """And in the worst case, too: one run that did not reach can turn its seed."""
    assert inference.same_sign(pairs([1.0] * 6 + [9.0] + [1.0] * 8, [5.0] * 15))
    assert not inference.same_sign(pairs(([1.0] * 4 + [9.0]) * 3, [5.0] * 15))
    assert not inference.same_sign(pairs([1.0] * 15, [5.0] * 15, method_reached=[False] + [True] * 14))


def test_an_interval_of_95_percent_leaves_out_a_fortieth_on_each_side():
    """And takes the outer one of two numbers, also beside infinity."""
    assert interval(np.arange(1001.0)[::-1]) == (25, 975)
    assert interval(np.arange(100.0)) == (2, 97)
    assert interval(np.array([1.0] * 60 + [math.inf] * 40)) == (1.0, math.inf)
    assert len(resampled(cells(BALANCED))) == 10_000


def test_a_ratio_is_of_means_and_resampled_together():
    """A method that always forgets half as much has exactly a half, however much the runs differ."""
    full = np.random.default_rng(0).uniform(10, 50, size=15)
    assert ratio(full / 2, full, cells(BALANCED)) == (pytest.approx(0.5),) * 3
    assert ratio(np.array([1.0, 3.0]), np.array([8.0, 2.0]), cells("ab")).value == pytest.approx(0.4)


def test_a_ratio_to_nothing_is_not_known():
    """Full fine-tuning that forgot nothing is nothing to divide by; in a resample it counts as the worst."""
    assert all(map(math.isnan, ratio(np.array([1.0, 2.0]), np.array([-1.0, 1.0]), cells("ab"))))
    found = ratio(np.array([1.0, 1.0]), np.array([-1.0, 3.0]), cells("ab"))
    assert found.value == 1.0
    assert found.high == math.inf


@settings(max_examples=30, deadline=None)
@given(st.lists(POINTS, min_size=1, max_size=7))
def test_a_p_value_is_the_share_of_flips_that_go_as_far(differences):
    """Exactly, over all of them; and neither their sign nor their size matters."""
    bases, whole = ("a",) * len(differences), [round(100 * x) for x in differences]
    flips = itertools.product((1, -1), repeat=len(whole))
    far = [abs(sum(s * x for s, x in zip(signs, whole, strict=True))) >= abs(sum(whole)) for signs in flips]
    assert flip_p(np.array(differences), bases) == sum(far) / len(far)
    assert flip_p(-7 * np.array(differences), bases) == sum(far) / len(far)


def test_p_values_by_hand():
    """Five pairs of one sign: 2 of 32 flips; one pair says nothing, nor do zeros; without pairs there is none."""
    assert flip_p(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), ("a",) * 5) == 2 / 32
    assert flip_p(np.array([3.0]), ("a",)) == 1.0
    assert flip_p(np.zeros(4), ("a",) * 4) == 1.0
    assert math.isnan(flip_p(np.array([]), ()))


def test_a_p_value_of_drawn_flips_is_near_the_exact_one(monkeypatch):
    """Where there are too many to try them all, it is an estimate that can never be 0."""
    differences = np.random.default_rng(3).normal(0.5, 1, size=12)
    exact = flip_p(differences, ("a",) * 12)
    monkeypatch.setattr(inference, "EXACT", 4)
    assert flip_p(differences, ("a",) * 12) == pytest.approx(exact, abs=0.006)
    assert flip_p(differences, ("a",) * 12) == flip_p(differences, ("a",) * 12)
    assert flip_p(np.full(40, 1.0), ("a",) * 40, flips=999) == 1 / 1000


def test_holm_by_hand():
    """The example of statsmodels' documentation, and one that is not in order."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_counts_what_is_not_there_yet():
    """A planned comparison without runs makes the others no easier."""
    assert holm([0.02, math.nan, math.nan])[0] == holm([0.02, 1.0, 1.0])[0] == pytest.approx(0.06)
    assert math.isnan(holm([0.02, math.nan])[1])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 1).map(lambda p: round(p, 3)), min_size=1, max_size=8), st.sampled_from([0.01, 0.05, 0.2])
)
def test_holm_rejects_what_its_definition_does(p_values, level):
    """Step down: the i-th smallest of m is rejected if it and all smaller ones are at most α / (m − i)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = holm(p_values)
    rejecting = True
    for rank, i in enumerate(order):
        rejecting = rejecting and p_values[i] * (len(p_values) - rank) <= level
        assert (adjusted[i] <= level) == rejecting


def test_runs_are_paired_by_base_and_seed():
    """In whatever order they come; a run without a partner is in none, and the worst is looked for on its base."""
    method = [run("b", 1, 20), run("a", 0, 10, reached=False), run("a", 7, 11)]
    full = [run("a", 0, 30), run("b", 1, 40, reached=False)]
    found = paired(method, full, [run("a", 3, 55), run("b", 3, 15), run("c", 0, 99)])
    assert found.bases == ("a", "b")
    assert (found.method.tolist(), found.full.tolist()) == ([10, 20], [30, 40])
    assert (found.method_reached.tolist(), found.full_reached.tolist()) == ([False, True], [True, False])
    assert found.largest.tolist() == [55, 40]
    assert found.n_reached == 0
    assert found.worst.tolist() == [55, 20]


def test_two_rows_of_one_run_are_refused():
    """Rows of two rates, say, or two places of the dial: silently, one would have been left out."""
    with pytest.raises(ValueError, match="2 rows of 1 bases and seeds: give the rows of one arm"):
        paired([run("a", 0, 1), run("a", 0, 2)], [run("a", 0, 3)], [])


def test_what_never_learned_is_never_said_to_forget_less():
    """A method that forgets nothing because it learns nothing: plainly less, in the worst case more, so undecided."""
    forgot_little = pairs([1.0] * 10, [30.0] * 10, method_reached=[False] * 10)
    assert flip_p(forgot_little.method - forgot_little.full, forgot_little.bases) < 0.01
    assert decided(forgot_little) == 1.0
    assert decided(pairs([1.0] * 10, [30.0] * 10)) < 0.01


def test_one_run_that_did_not_reach_makes_a_claim_harder():
    """Nine clear pairs of ten: the p-value is that of the worst case, the larger one."""
    found = pairs([10.0] * 10, [30.0] * 10, method_reached=[False] + [True] * 9)
    plain, worst = found.method - found.full, found.worst - found.full
    assert worst.tolist() == [30.0] + [-20.0] * 9
    assert decided(found) == flip_p(worst, found.bases) > flip_p(plain, found.bases)


def test_more_forgetting_is_not_said_because_of_runs_that_failed():
    """In the worst case they count as the largest forgetting; what is called more has to be so as it was, too."""
    found = pairs([29.0, 31.0] * 5, [30.0, 30.5] * 5, method_reached=[False] * 10)
    assert flip_p(found.worst - found.full, found.bases) < 0.01
    assert decided(found) == 1.0 or decided(found) == flip_p(found.method - found.full, found.bases) > 0.05


def test_full_fine_tuning_that_did_not_reach_counts_as_it_was():
    """The worst case is the method's: a larger number for what it is compared with would help it."""
    found = pairs([10.0], [5.0], full_reached=[False])
    assert (found.worst - found.full).tolist() == [5.0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(POINTS, POINTS, st.booleans()), min_size=1, max_size=8))
def test_the_worst_case_is_never_better(made):
    """Whatever reached: at least as much forgetting as it was, and equal where all did."""
    method, full, reached = zip(*made, strict=True)
    found = pairs(method, full, method_reached=list(reached), largest=max(*method, *full))
    assert (found.worst >= found.method).all()
    assert (found.worst == found.method)[np.array(reached)].all()
    assert decided(found) >= flip_p(found.method - found.full, found.bases)
