"""What is chosen by which rows, on made-up ones, and what is planned from it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import choices
import evidence
import patience
import pytest
import yaml
from abilities import TASKS
from arms import METHODS, Arm
from comparisons import alike_settings, judged_settings
from made_up_runs import FROZEN, row
from protocol import BASES, BELOW_SEEDS, CHOOSING_SEEDS, FAMILIES, JUDGING_SEEDS, OTHER_BASE, UPPER_BOUND

FIRST, *OTHERS = CHOOSING_SEEDS
ARM = "full"
RATES = METHODS[ARM].rates


def tried(arm: str, forgetting: float, seed: int = FIRST, **other: Any) -> dict[str, Any]:
    return row(arm, forgetting, seed=seed, judged=False, **other)


def at_all_rates(arm: str, forgetting: float, lowest: int = 2, **other: Any) -> list[dict[str, Any]]:
    """One seed; rates from the lowest-th on learn the task, and there the arm forgets so much."""
    rates = METHODS[Arm.named(arm).method].rates
    return [
        tried(arm, forgetting + 5 * (i - lowest), rate=rate, reached=i >= lowest, best=50.0 + i, **other)
        for i, rate in enumerate(rates)
    ]


def test_the_rate_is_the_lowest_that_learns_the_task():
    """Of those to choose by on the first base, with the dial where it stands, once all were tried."""
    rows = at_all_rates(ARM, 20.0)
    assert choices.rate_of(rows, ARM, "A") == RATES[2]
    assert choices.rate_of(rows[1:], ARM, "A") is None
    assert choices.rate_of(at_all_rates(ARM, 20.0, lowest=5), ARM, "A") == RATES[4]  # that comes nearest
    strangers = [
        tried(ARM, 0.0, rate=RATES[0], **other)
        for other in ({"base": BASES[1]}, {"task": "B"}, {"alpha": 0.85}, {"seed": OTHERS[0]})
    ]
    strangers += [row(ARM, 0.0, rate=RATES[0], seed=FIRST), tried(ARM, 0.0, rate=1e-9)]
    assert choices.rate_of(rows + strangers, ARM, "A") == RATES[2]


def test_another_base_has_rates_of_its_own():
    """There an anchor and the dial change nothing of it."""
    rows = [*at_all_rates(ARM, 20.0), *at_all_rates(ARM, 20.0, lowest=3, base=OTHER_BASE)]
    assert choices.rate_of(rows, ARM, "A") == RATES[2]
    assert choices.rate_of(rows, ARM, "A", base=OTHER_BASE) == RATES[3]
    assert choices.rate_of(rows, f"{ARM} | self 1", "A", 0.85, OTHER_BASE) == RATES[3]
    assert choices.rate_of(rows, f"{ARM} | self 1", "A", 0.85) is None


def test_on_the_base_of_words_every_setting_is_judged_at_a_rate_of_its_own_method(was_frozen, monkeypatch):
    """Which are tried once each; nothing without the base."""
    was_frozen.write_text(yaml.safe_dump(FROZEN))
    monkeypatch.setattr(evidence, "is_made", lambda base: False)
    assert evidence.rates_on_words([]) == []
    monkeypatch.setattr(evidence, "is_made", lambda base: base == OTHER_BASE)
    planned = evidence.rates_on_words([])
    methods = {Arm.named(setting.arm).method for setting in judged_settings(FROZEN)}
    assert Counter(run.arm for run in planned) == dict.fromkeys(methods, 5)
    rows = [made for arm in methods for made in at_all_rates(arm, 1.0, base=OTHER_BASE)]
    judged = evidence.judge_on_words(rows)
    everywhere = [*judged_settings(FROZEN), *alike_settings(FROZEN)]
    assert {(run.arm, *run.alphas) for run in judged} == {(s.arm, s.alpha) for s in everywhere}
    assert all(METHODS[Arm.named(run.arm).method].rates.index(run.rate) == 2 for run in judged)


@pytest.mark.parametrize(
    ("forgets", "wanted"),
    [((20.0, 30.0, 30.0, 19.6), 0), ((20.0, 30.0, 30.0, 19.4), 3), ((20.0, 10.3, 10.0, 10.4), 1)],
)
def test_of_variants_that_are_tied_the_first_is_taken(forgets, wanted):
    """Within half a point of the least."""
    arms = FAMILIES["full"]
    rows = [made for arm, x in zip(arms, forgets, strict=True) for made in at_all_rates(arm, x)]
    assert choices.variant_of(rows, "full") == arms[wanted]
    assert choices.variant_of(rows[:-1], "full") is None


def a_family(settings: dict[tuple[str, float], Any]) -> list[dict[str, Any]]:
    """Of "full": its plain variant is best, and of each (anchor, α) the forgetting and steps with each seed."""
    rows = [made for i, arm in enumerate(FAMILIES["full"]) for made in at_all_rates(arm, 20.0 + 10 * i)]
    for (anchor, alpha), runs in settings.items():
        rows += [
            tried(Arm(ARM, anchor).name, forgetting, seed, alpha=alpha, steps=steps, reached=forgetting < 90)
            for seed, (forgetting, steps) in zip(CHOOSING_SEEDS, runs, strict=False)
        ]
    return rows


def test_what_is_near_the_best_with_one_seed_is_run_with_all():
    """Within two points; what did not learn the task is not near."""
    rows = a_family({("self 1", 1.0): [(5.0, 50)], ("self 3", 1.0): [(6.9, 50)], ("random 1", 1.0): [(7.1, 50)],
                     ("self 1", 0.85): [(99.0, 50)]})  # fmt: skip
    assert choices.contenders(rows, "full") == [("self 1", 1.0), ("self 3", 1.0)]
    runs = [(run.arm, run.seed) for run in evidence.contenders(rows)]
    assert runs == [("full | self 1", OTHERS[0]), ("full | self 1", OTHERS[1]), ("full | self 3", OTHERS[0]),
                    ("full | self 3", OTHERS[1])]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        # The least, by the mean of all seeds.
        ({("self 1", 1.0): [(1.0, 9)] * 3, ("self 3", 1.0): [(0.9, 9), (2.0, 9), (2.0, 9)]}, ("self 1", 1.0)),
        # One that failed with any seed is out.
        ({("self 1", 1.0): [(1.0, 9)] * 3, ("self 3", 1.0): [(0.0, 9), (0.0, 9), (99.0, 9)]}, ("self 1", 1.0)),
        # Of what is tied the one without the dial ...
        ({("self 1", 1.0): [(0.4, 99)] * 3, ("self 1", 0.85): [(0.0, 9)] * 3}, ("self 1", 1.0)),
        # ... and then the quickest.
        ({("self 1", 1.0): [(0.4, 50)] * 3, ("self 3", 1.0): [(0.0, 60)] * 3}, ("self 1", 1.0)),
        ({("self 1", 1.0): [(0.6, 50)] * 3, ("self 3", 1.0): [(0.0, 60)] * 3}, ("self 3", 1.0)),
        # One that was not run with all seeds is not known yet.
        ({("self 1", 1.0): [(0.6, 50)] * 3, ("self 3", 1.0): [(0.0, 60)] * 2}, ("self 1", 1.0)),
    ],
)
def test_the_setting_that_forgets_least_is_frozen(settings, wanted):
    found = choices.setting_of(a_family(settings), "full")
    assert (found["method"], found["anchor"], found["alpha"]) == (ARM, *wanted)


def test_where_nothing_learned_nothing_is_frozen():
    with pytest.raises(SystemExit, match="no setting of 'full' learned the task"):
        choices.setting_of(a_family({("self 1", 1.0): [(1.0, 9), (1.0, 9), (99.0, 9)]}), "full")


@pytest.fixture
def was_frozen(monkeypatch, tmp_path):
    """Where `frozen.yaml` is written."""
    path = tmp_path / "frozen.yaml"
    for module in (choices, evidence):
        monkeypatch.setattr(module, "FROZEN", path)
    return path


def test_nothing_is_frozen_while_runs_are_missing(was_frozen):
    with pytest.raises(SystemExit, match="before rates_of_families is whole"):
        evidence.freeze([])
    assert not was_frozen.exists()


def test_what_was_frozen_stays(was_frozen):
    was_frozen.write_text("full: {}\n")
    evidence.freeze([])
    assert was_frozen.read_text() == "full: {}\n"


def test_what_is_judged_is_every_setting_on_every_task_base_and_seed(was_frozen):
    """At the rate of the task, with the dial where it was frozen; nothing before its rate is known."""
    was_frozen.write_text(yaml.safe_dump(FROZEN))
    settings = judged_settings(FROZEN)
    planned = evidence.rates_of_judged([])
    assert len(planned) == len(settings) * len(TASKS) * 5
    assert {(run.base, run.seed, run.judged) for run in planned} == {(BASES[0], FIRST, False)}
    assert evidence.judge([]) == []
    rows = [
        made
        for task, lowest in zip(TASKS, (0, 1, 2), strict=True)
        for setting in settings
        for made in at_all_rates(setting.arm, 1.0, lowest, task=task, alpha=setting.alpha)
    ]
    runs = evidence.judge(rows)
    assert len({run.name for run in runs}) == len(runs) == len(settings) * len(TASKS) * len(BASES) * len(JUDGING_SEEDS)
    assert all(run.judged and run.seed in JUDGING_SEEDS for run in runs)
    assert {(run.arm, *run.alphas) for run in runs} == {(setting.arm, setting.alpha) for setting in settings}
    assert {(run.task, METHODS[Arm.named(run.arm).method].rates.index(run.rate)) for run in runs} == {
        ("A", 0), ("B", 1), ("C", 2)
    }  # fmt: skip
    assert Counter(run.seed for run in runs[: len(runs) // 5]) == {JUDGING_SEEDS[0]: len(runs) // 5}


def test_what_is_not_judged_is_explored(was_frozen):
    """Every other method, once."""
    was_frozen.write_text(yaml.safe_dump(FROZEN))
    arms = Counter(run.arm for run in evidence.explored([]))
    assert arms.keys() | {setting.arm for setting in judged_settings(FROZEN)} >= set(METHODS)
    assert not arms.keys() & {setting.arm for setting in judged_settings(FROZEN)}
    assert set(arms.values()) == {5}


@pytest.fixture
def kept_rows(was_frozen, monkeypatch):
    """Of every arm the two lowest rates failed on A and B, and all on C, where the middle one came nearest."""
    was_frozen.write_text(yaml.safe_dump(FROZEN))
    lowest = {"A": 2, "B": 2, "C": 9}
    rows = [
        made for task, i in lowest.items() for arm in patience.arms() for made in at_all_rates(arm, 1.0, i, task=task)
    ]
    for made in rows:
        if made["task"] == "C" and made["rate"] == METHODS[Arm.named(made["arm"]).method].rates[2]:
            made["best"] = 90.0
    book = dataclasses.replace(evidence.BOOK, path=was_frozen.with_name("runs.csv"))
    book.add([], rows)
    monkeypatch.setattr(evidence, "BOOK", book)


def test_patience_tries_again_what_failed_up_to_the_rate_that_was_taken(kept_rows):
    """Or all, where none learned; of what is judged at α = 1, with or without an anchor, but replay."""
    arms = {setting.arm for setting in judged_settings(FROZEN) if setting.alpha == 1.0} - {UPPER_BOUND}
    assert any("|" in arm for arm in arms)
    again = patience.patient_rates([])
    assert {run.arm for run in again} == set(patience.arms()) == arms
    assert all(run.patient and not run.judged and (run.base, run.seed) == (BASES[0], FIRST) for run in again)
    for arm in arms:
        rates = METHODS[Arm.named(arm).method].rates
        found = {(run.task, rates.index(run.rate)) for run in again if run.arm == arm}
        assert found == {("A", 0), ("A", 1), ("B", 0), ("B", 1), *(("C", i) for i in range(5))}


def test_what_has_another_rate_by_patience_is_judged_at_it(kept_rows):
    """Where nothing changes nothing is judged again, and nothing before all rates were tried."""
    rate = METHODS["HFT"].rates[1]
    made = []
    for run in patience.patient_rates([]):
        nearest = run.rate == METHODS[Arm.named(run.arm).method].rates[2]
        learned = (run.arm, run.task, run.rate) == ("HFT", "A", rate)
        made.append(tried(run.arm, 1.0, task=run.task, rate=run.rate, reached=learned, best=90.0 if nearest else 50.0))
    judged = patience.judge_patiently(made)
    assert {(run.arm, run.task, run.rate, run.judged) for run in judged} == {("HFT", "A", rate, True)}
    assert {(run.base, run.seed) for run in judged} == {(base, seed) for base in BASES for seed in patience.SEEDS}
    assert Counter(run.seed for run in judged[: len(BASES)]) == {JUDGING_SEEDS[0]: len(BASES)}
    lacking = next(i for i, row in enumerate(made) if (row["arm"], row["task"]) == ("HFT", "A"))
    assert patience.judge_patiently(made[:lacking] + made[lacking + 1 :]) == []


def test_what_has_the_lowest_of_its_rates_is_judged_below_it(was_frozen, monkeypatch):
    """Without an anchor; neither what has a higher rate nor where the lower one was tried while choosing."""
    was_frozen.write_text(yaml.safe_dump(FROZEN))
    rows = [made for task in TASKS for arm in ("full", "HFT", "full | self 1")
            for made in at_all_rates(arm, 1.0, int(arm == "HFT" and task == "B"), task=task)]  # fmt: skip
    rows += at_all_rates("HFT", 1.0, 0, base=OTHER_BASE)
    book = dataclasses.replace(evidence.BOOK, path=was_frozen.with_name("runs.csv"))
    book.add([], rows)
    monkeypatch.setattr(evidence, "BOOK", book)
    monkeypatch.setattr(patience, "is_made", lambda base: base in BASES)
    runs = patience.judge_below([])
    assert {(run.arm, run.task) for run in runs} == {("full", "B"), ("full", "C"), ("HFT", "C")}
    assert all(run.judged and run.rate < min(METHODS[run.arm].rates) for run in runs)
    assert len(runs) == 3 * len(BASES) * len(BELOW_SEEDS)
    monkeypatch.setattr(patience, "is_made", lambda base: True)
    there = {(run.base, run.arm, run.task) for run in patience.judge_below([])}
    assert there - {(run.base, run.arm, run.task) for run in runs} == {(OTHER_BASE, "HFT", "A")}
