"""The report of the benchmark of forgetting, on made-up runs: what is counted, compared, said, and drawn."""

from __future__ import annotations

import csv
import math
import re

import choices
import continual
import isolation
import pytest
import report
import tables
from abilities import ABILITIES, TASKS
from arms import METHODS
from claims import CLAIMS, MEASURED, VERDICT, claimed, verdict
from comparisons import (
    Judged,
    Setting,
    alike_settings,
    best_family,
    explained,
    frozen_setting,
    full_alike,
    group_forgetting,
    judged_settings,
    met,
    primary_settings,
    reference,
)
from courses import courses, difference
from inference import Estimate
from made_up_runs import FROZEN, everything, row, to_choose_by, to_judge_by
from protocol import ALPHAS, BASES, BELOW, CHOOSING_SEEDS, FAMILIES, OTHER_BASE
from protocol import JUDGING_SEEDS as SEEDS
from report import ranking_said
from tables import (
    NOT_RUN,
    Spread,
    bars,
    by_task,
    dialled,
    factorial,
    groups_of,
    markdown,
    measured,
    prices,
    ranking,
    region_beside_anchor,
    shown,
)

PAGES = [path.read_text(encoding="utf-8") for path in report.PAGES]
BLOCKS = [name for page in PAGES for name in re.findall(r"<!-- from report.py: (.+?) -->", page)]
HFT, FULL = Setting("HFT"), Setting("full")


def books(rows=(), **others):
    found = dict.fromkeys(report.WORDS, ()) | {"runs": rows} | others
    return {name: list(rows) for name, rows in found.items()}


@pytest.fixture(scope="module")
def rows():
    return everything()


@pytest.fixture(scope="module")
def judged(rows):
    return Judged(rows, FROZEN)


@pytest.fixture(scope="module")
def primary(judged):
    return {(c.setting, c.task): c for c in judged.primary()}


@pytest.fixture(scope="module")
def reported(rows, tmp_path_factory):
    """(what the blocks say, the folder with tables and figures)."""
    folder = tmp_path_factory.mktemp("report")
    return report.blocks(books(rows), FROZEN, folder), folder


def test_every_block_of_the_page_is_written(reported):
    """With what was found, once each, and twice is as once; and nothing is written that no block shows."""
    found, _ = reported
    assert sorted(BLOCKS) == sorted(found)
    once = [report.page(page, found) for page in PAGES]
    assert [report.page(page, found) for page in once] == once
    assert NOT_RUN not in found["primary"] + found["bar"] + found["measured"] + found["factorial"]


def test_the_page_is_what_the_rows_say(tmp_path):
    """`report.py` has been run since the last run of the benchmark."""
    kept = {name: report.read(report.RESULTS / f"{name}.csv", words) for name, words in report.WORDS.items()}
    found = report.blocks(kept, report.frozen(), tmp_path)
    assert [report.page(page, found) for page in PAGES] == PAGES


def test_before_any_run_everything_says_so(tmp_path):
    """No number, no figure, no table but that of the claims."""
    found = report.blocks(books(), {}, tmp_path)
    about = {"abilities", "tasks", "methods", "protocol", "status", "claims"}
    assert {name for name, text in found.items() if text != NOT_RUN} == about
    assert found["status"].startswith("0 rows")
    assert "reproduced" not in found["claims"]
    assert not list(tmp_path.glob("*.png"))
    assert all(report.page(page, found) for page in PAGES)


def test_figures_are_small(reported):
    """Each below 100 kB, and drawn again to the same bytes."""
    _, folder = reported
    figures = sorted(folder.glob("*.png"))
    assert [path.stem for path in figures] == ["divergence", "factorial", "forgetting", "rates"]
    assert max(path.stat().st_size for path in figures) < 100_000


def test_tables_are_csv_with_a_column_for_every_number(reported):
    """An estimate has three columns, a spread two; what is not known is empty."""
    with open(reported[1] / "primary.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    line = next(r for r in lines if (r["task"], r["trained"]) == ("B", "HFT"))
    assert float(line["difference, points, low"]) < float(line["difference, points"]) == pytest.approx(-15, abs=0.5)
    with open(reported[1] / "measured.csv", newline="", encoding="utf-8") as file:
        dialled_down = [r for r in csv.DictReader(file) if "α" in r["trained"]]
    assert {r["KL"] for r in dialled_down} == {""}
    assert all(float(r["forgetting, deviation"]) > 0 for r in dialled_down)


def test_the_primary_comparison_is_what_was_frozen(primary):
    """Each family alone and as frozen, and the peers; neither full fine-tuning itself nor the upper bound."""
    settings = primary_settings(FROZEN)
    assert reference(FROZEN) == FULL
    assert FULL not in settings
    assert Setting("replay") not in settings
    assert {frozen_setting(FROZEN, family) for family in FROZEN} <= set(settings)
    assert {Setting(arm) for arm in ("HFT", "LoRA r=8", "CoFiTune", "random rows", "SHiRA")} <= set(settings)
    assert len(primary) == 3 * len(settings)
    assert primary_settings({}) == []


def test_the_reference_is_the_variant_of_full_fine_tuning_that_was_tuned():
    """Not always the plain one; then the plain one is not judged."""
    other = {**FROZEN, "full": {**FROZEN["full"], "method": "full, linear decay"}}
    assert reference(other) == Setting("full, linear decay")
    assert reference({}) == FULL


def test_a_method_that_forgets_half_is_found(primary):
    """On every task, after Holm over all tests; and one that forgets alike is not."""
    for task in TASKS:
        half = primary[HFT, task]
        assert half.difference.value == pytest.approx(-15, abs=0.5)
        assert half.difference.low < half.difference.value < half.difference.high < 0
        assert half.share.value == pytest.approx(15 / 30, abs=0.06)
        assert half.p == 2 / 2**15
        assert half.adjusted == pytest.approx(len(primary) * half.p)
        assert half.p < half.adjusted < 0.05
        assert primary[Setting("SHiRA"), task].adjusted > 0.05


def test_tests_that_are_not_there_yet_count_for_holm(rows, primary):
    """Else what is run first would be judged mildly."""
    first = [r for r in rows if not r["judged"] or (r["arm"] in ("full", "HFT") and r["task"] == "A")]
    found = {(c.setting, c.task): c for c in Judged(first, FROZEN).primary()}
    assert found[HFT, "A"].adjusted == primary[HFT, "A"].adjusted
    assert math.isnan(found[HFT, "B"].adjusted)


def test_the_bar_is_about_the_setting_that_was_best_where_it_was_chosen(judged, reported):
    """On every task and base but those; a third of full fine-tuning's forgetting meets it."""
    assert best_family(FROZEN) == "HFT"
    cells = judged.bar()
    assert [(task, base) for task, base, _ in cells] == [(task, base) for task in TASKS for base in BASES]
    assert all(c.setting == frozen_setting(FROZEN, "HFT") and met(c) for _, _, c in cells)
    assert reported[0]["bar"].startswith("Met on 8 of 8 tasks and bases where nothing but rates was chosen; on 0 ")
    assert reported[0]["bar"].count("chosen here") == 1


def test_the_bar_is_not_met_by_more_than_half():
    """0.6 of it, say; and it says so."""
    rows = [*to_choose_by(), *to_judge_by({"HFT | self 1": 18.0})]
    assert [met(c) for _, _, c in Judged(rows, FROZEN).bar()] == [False] * 9


def test_the_bar_is_not_met_by_runs_that_did_not_reach(rows):
    """They count as the largest forgetting there was, whatever theirs is."""
    arm = frozen_setting(FROZEN, "HFT").arm
    failed = [r | {"reached": False, "forgetting": 0.0} if r["judged"] and r["arm"] == arm else r for r in rows]
    assert [met(c) for _, _, c in Judged(failed, FROZEN).bar()] == [False] * 9
    text = report.bar_said(report.tables.bar(Judged(failed, FROZEN)))
    assert text.startswith("Met on 0 of 8 tasks")
    assert "| 5 of 5 | 0 |" in text


def test_every_setting_is_held_against_the_bar_outside_of_where_it_was_chosen(rows, judged):
    """With the largest of its ratios, and where that is; runs that did not reach lift it."""
    there = {line["trained"]: line for line in bars(judged)}
    of_full, reached = "≤ 0.5 of full's", "learned it"
    best = frozen_setting(FROZEN, "HFT")
    assert (there[best.name][of_full], there[best.name][reached]) == ("8 of 8", "40 of 40")
    shares = {(t, b): c.share.value for t, b, c in judged.bar(best) if (t, b) != ("A", BASES[0])}
    task, base = max(shares, key=lambda place: shares[place])
    assert (there[best.name]["at most"].value, there[best.name]["there"]) == (shares[task, base], f"{task}, `{base}`")
    failed = [
        r | {"reached": False}
        if (r["judged"], r["arm"], r["task"], r["base"]) == (True, best.arm, "C", BASES[2])
        else r
        for r in rows
    ]
    [line] = [line for line in bars(Judged(failed, FROZEN)) if line["trained"] == best.name]
    assert (line[of_full], line["there"], line[reached]) == ("7 of 8", f"C, `{BASES[2]}`", "35 of 40")


def test_both_differences_stand_beside_each_other():
    """As it was and in the worst case, by hand: of two seeds one did not reach, and the most forgotten was 50."""
    rows = [row("full", 30.0), row("full", 30.0, seed=SEEDS[1]), row("SHiRA", 50.0)]
    rows += [row("HFT", 10.0), row("HFT", 2.0, seed=SEEDS[1], reached=False)]
    found = Judged(rows, {}).comparison(HFT, "A")
    assert (found.difference.value, found.worst.value) == (-24.0, 0.0)
    assert found.share.value == 1.0
    assert found.pairs.n_reached == 1


def test_partial_results_are_said_to_be_partial(rows):
    """How many pairs of how many; the bar is open, and so are the verdicts, until all are there."""
    part = [r for r in rows if not (r["judged"] and r["task"] == "B" and r["seed"] == SEEDS[-1])]
    judged = Judged(part, FROZEN)
    open_cells = [(task, base) for task, base, c in judged.bar() if met(c) is None]
    assert open_cells == [("B", base) for base in BASES]
    assert "| HFT | 12 of 15 | 12 |" in by_task(report.tables.compared(judged.primary()))
    n = len(primary_settings(FROZEN))
    assert f"{42 * n} of {45 * n} pairs of the primary comparison are there" in report.status(part, FROZEN)
    assert f"Of {3 * n} planned comparisons of forgetting with tuned full fine-tuning {2 * n} have" in report.summary(
        judged
    )


def test_rows_at_another_rate_are_not_mixed_in(rows):
    """`make evidence` may have run an arm before its rate was chosen: these rows stay, and do not count."""
    early = [row("HFT", 70.0 + i, seed=seed, rate=METHODS["HFT"].rates[4]) for i, seed in enumerate(SEEDS[:3])]
    judged = Judged([*early, *rows], FROZEN)
    assert judged.rates["HFT", "A", 1.0] == METHODS["HFT"].rates[2]
    assert len(judged.rows(HFT, "A")) == 15
    assert len(judged.rows(HFT, "A", BASES[1])) == 5


def test_before_rates_are_chosen_the_middle_one_counts():
    """As `make evidence` takes it; and without a frozen setting everything is exploratory."""
    rows = [row(arm, 10.0 + i, seed=seed) for arm in ("full", "HFT") for i, seed in enumerate(SEEDS[:3])]
    judged = Judged(rows, {})
    assert groups_of(judged) == {"primary": [], "exploratory": [FULL, HFT]}
    found = judged.comparison(HFT, "A")
    assert (len(found.pairs.bases), found.planned, found.difference.value) == (3, 15, 0.0)
    assert math.isnan(found.p)
    assert "nothing is frozen yet" in report.status(rows, {})


def test_means_and_shares_by_hand():
    """Mean ± standard deviation over runs; the share is of what full fine-tuning trains; KL only where it is."""
    rows = [row("full", x, seed=SEEDS[i]) for i, x in enumerate((10.0, 20.0))] + [row("HFT", 12.0, reached=False)]
    line, other = measured(Judged(rows, {}), [FULL, HFT])
    assert line["forgetting"] == (15.0, pytest.approx(50**0.5))
    assert (line["reached"], other["reached"]) == ("2 of 2", "0 of 1")
    assert math.isnan(other["forgetting"].deviation)
    assert other["knowledge"].value == 12.0
    files = [{"arm": "HFT", "bytes": 1_777_904.0}]
    assert [shown(line["file, kB"], 0) for line in prices(Judged(rows, {}), [FULL, HFT], files)] == ["–", "1,778"]
    masked = row("CoFiTune", 5.0, steps=100)
    assert prices(Judged([masked], {}), [Setting("CoFiTune")])[0]["steps to 95 % or the best"].value == 108
    assert [line["trained %"] for line in prices(Judged(rows, {}), [FULL, HFT])] == [
        pytest.approx(100), pytest.approx(100 * 400000 / 895968)
    ]  # fmt: skip
    mixed = row("full", 0.0) | {"copy": 9.0, "reverse": 6.0, "sort": 0.0, "facts": 4.0}
    assert [group_forgetting(mixed, g) for g in ("following instructions", "knowledge", "reasoning")] == [5, 4, 0]


def test_the_factorial_is_at_the_chosen_rate(rows):
    """Of the runs with every rate, only those with the arm's own are in it; brackets where it was not learned."""
    assert dialled(rows, "HFT")["none", 1.0]["rate"] == METHODS["HFT"].rates[2]
    line = next(r for r in factorial(rows, {"HFT": "HFT"}) if r["anchor"] == "self 1")
    assert line["α = 1"] == "20.0"
    assert line[f"α = {ALPHAS[-1]:g}"] == f"({20 * ALPHAS[-1]:.1f})"


def test_a_cell_is_short_and_says_what_is_not_known():
    """A true minus, no minus zero, infinity, a dash; a name with a bar does not end its cell."""
    assert shown(Estimate(-1.25, -2.0, math.inf), 1) == "−1.2 [−2.0, ∞]"
    assert (shown(-0.04), shown(math.nan), shown(None), shown(True)) == ("0.0", "–", "–", "yes")
    assert (shown(Spread(1234.5, 0.25)), shown(Spread(2.0, math.nan))) == ("1,234.5 ± 0.2", "2.0")
    assert markdown([{"trained": "HFT | self 1", "p": 0.0001}]).splitlines()[2] == "| HFT \\| self 1 | < 0.001 |"
    assert markdown([]) == by_task([]) == NOT_RUN
    assert (shown(-math.inf), shown(-1000.0)) == ("−∞", "−1,000.0")


def test_a_ranking_is_held_against_another_base():
    """Worked out by hand: three pairs that are apart."""
    one = {"full": 30.0, "HFT": 20.0, "replay": 1.0}
    there = {"full": 12.0, "HFT": 11.5, "replay": 11.7}
    rows = [row(arm, forgotten, base=BASES[0]) for arm, forgotten in one.items()]
    rows += [row(arm, forgotten, base=OTHER_BASE) for arm, forgotten in there.items()]
    other = Judged(rows, FROZEN, (OTHER_BASE,), SEEDS[:1])
    table = ranking(Judged(rows, FROZEN), other)
    assert [line["trained"] for line in table] == ["replay", "HFT", "full"]
    assert [line[OTHER_BASE].value for line in table] == [11.7, 11.5, 12.0]
    assert "Of 3 pairs" in ranking_said(table)
    assert "0 are in the same order on `words-0`, 3 are nearer" in ranking_said(table)
    far = ranking(
        Judged(rows, FROZEN), Judged([*rows[:-1], row("replay", 20.0, base=OTHER_BASE)], FROZEN, (OTHER_BASE,))
    )
    assert "0 are in the same order on `words-0`, 1 are nearer to each other there, and 2 are the other way" in (
        ranking_said(far)
    )


def test_a_region_is_held_against_full_fine_tuning_with_the_same_anchor():
    """And the same dial, which is run beside what is judged, on every task and base."""
    alike = Setting("full | self 1", ALPHAS[-1])
    assert full_alike(FROZEN, "HFT") == alike
    assert alike in alike_settings(FROZEN)
    assert not set(alike_settings(FROZEN)) & set(judged_settings(FROZEN))
    rows = [
        row(f"{name} | self 1", x, base=base, alpha=ALPHAS[-1])
        for name, x in (("HFT", 8.0), ("full", 10.0))
        for base in BASES
    ]
    [line] = region_beside_anchor(Judged(rows, FROZEN))
    assert (line["trained"], line["pairs"], line["difference, points"].value) == (
        "HFT | self 1 | α 0.85",
        "3 of 15",
        -2.0,
    )


def test_rows_of_another_base_are_not_among_those_that_are_judged(rows, judged):
    """Nor are the rates that were chosen there."""
    more = [*rows, row("full", 99.0, base=OTHER_BASE), row("HFT", 99.0, base=OTHER_BASE, rate=1e-4)]
    assert str(Judged(more, FROZEN).primary()) == str(judged.primary())
    assert Judged(more, FROZEN).rates == judged.rates


def test_a_straight_line_explains_what_lies_on_it():
    """R² by hand; none where there is nothing to explain."""
    assert explained([1, 2, 3], [-2, -4, -6]) == pytest.approx(1)
    assert explained([-1, 0, 1, 0], [0, 1, 0, -1]) == pytest.approx(0)
    assert math.isnan(explained([1, 2], [1, 2]))
    assert math.isnan(explained([1, 2, 3], [5, 5, 5]))
    assert explained([-2, -1, 0, 1, 2], [4, 1, 0, 1, 4]) == pytest.approx(0)
    assert explained([-2, -1, 0, 1, 2], [4, 1, 0, 1, 4], 2) == pytest.approx(1)
    assert math.isnan(explained([1, 2, 3], [1, 5, 2], 2))


def test_claims_name_methods_that_there_are():
    """And each is either compared here or says why not."""
    for claim in CLAIMS:
        known = {**METHODS, **isolation.ARMS, **continual.arms()} if claim.course else METHODS
        assert {claim.less, *claim.than} - {""} <= set(known)
        assert bool(claim.less) != bool(claim.otherwise)


def test_a_verdict_follows_its_rule(judged, primary):
    """Reproduced on every task, on some, on none; not before all runs are there; one base alone is exploratory."""
    good, bad = primary[HFT, "A"], primary[Setting("SHiRA"), "A"]
    assert verdict([good, good], tested=True) == "reproduced here"
    assert verdict([good, bad], tested=True) == "reproduced here in part"
    assert verdict([bad], tested=True) == "not reproduced here"
    assert verdict([judged.comparison(HFT, "A", base=BASES[0])], tested=False) == "reproduced here (exploratory)"
    assert verdict([], tested=True) == NOT_RUN
    weak = type(good)(**{**vars(good), "adjusted": 0.06})
    assert verdict([weak], tested=True) == "not reproduced here"
    failed = type(good)(**{**vars(good), "worst": Estimate(-1.0, -3.0, 1.0)})
    assert verdict([failed], tested=True) == "not reproduced here"
    assert verdict([type(good)(**{**vars(good), "planned": 16})], tested=True) == "runs are missing"


def test_a_claim_of_several_comparisons_names_each():
    """It has to hold for all of them: here HFT forgets less than with 0.3, and as much as with 0.7."""
    forgets = {"HFT": 10.0, "HFT, 0.3": 30.0, "HFT, 0.7": 10.0, "full": 30.0}
    rows = [row(arm, x + i, seed=seed) for arm, x in forgets.items() for i, seed in enumerate(SEEDS)]
    told = lambda rows: next(r for r in claimed(Judged(rows, {})) if "0.3 and 0.7" in r["claims"])  # noqa: E731
    measured_here, said = list(told(rows).values())[2:]
    assert measured_here == "A, to HFT, 0.3: −20.0 [−20.0, −20.0]; A, to HFT, 0.7: 0.0 [0.0, 0.0]"
    assert said == "reproduced here in part (exploratory)"
    assert told([r for r in rows if r["seed"] != SEEDS[0]])[VERDICT] == "too few runs (exploratory)"


def test_the_summary_counts_and_concludes_nothing(judged, reported):
    """One sentence of numbers."""
    n = len(primary_settings(FROZEN)) * 3
    assert reported[0]["summary"] == (
        f"Of {n} planned comparisons of forgetting with tuned full fine-tuning {n} have all of their runs; of these 6 "
        f"found less forgetting and 0 more at p < 0.05 after Holm, and {n - 6} decided nothing. Of those 6 "
        "differences 6 go the same way with every seed."
    )


def course(stage: int, **other) -> dict:
    return {
        "experiment": "pair", "base": BASES[0], "order": "A B", "arm": "staged", "rates": "0.001", "seed": 0,
        "judged": True, "stage": stage, "reached": True, "first": "", "overall": 50.0,
        **{ability.name: 10.0 for ability in ABILITIES if ability.group != "knowledge"}, "facts": 30.0, **other,
    }  # fmt: skip


def test_what_patience_changed_stands_beside_what_was_judged(judged, rows):
    """At the lower rate, and how much of full's it forgets there; what has the same rate is not there."""
    low, middle = METHODS["HFT"].rates[1:3]
    failed = {r["rate"] for r in choices.tried(rows, "HFT", "A") if not r["reached"]}
    again = [row("HFT", 1.0, task="A", rate=rate, seed=CHOOSING_SEEDS[0], judged=False, reached=rate == low)
             for rate in failed]  # fmt: skip
    again += [row("HFT", r["forgetting"] / 2, task="A", rate=low, base=r["base"], seed=r["seed"])
              for r in judged.rows(FULL, "A")]  # fmt: skip
    [line] = tables.patience(judged, again)
    assert (line["task"], line["trained"], line["rate"], line["rate then"]) == ("A", "HFT", f"{middle:g}", f"{low:g}")
    assert line["of full's then"].value == pytest.approx(0.5, abs=0.01)
    assert line["reached then"] == "15 of 15"
    assert tables.patience(judged, again[: len(failed)]) == []


def test_what_a_rate_below_the_grid_changes_is_told_of_both_sides(judged, rows):
    """The method and full fine-tuning, each there and here, on the bases and seeds that were run."""
    low = METHODS["full"].rates[0]
    lower = [row(arm, x, task="C", rate=BELOW[METHODS[arm].rates], base=BASES[0], seed=SEEDS[0])
              for arm, x in (("full", 20.0), ("HFT", 15.0))]  # fmt: skip
    full, half = tables.below(judged, lower)
    there = {r["arm"]: r["forgetting"] for arm in ("full", "HFT") for r in judged.rows(Setting(arm), "C", BASES[0])
             if r["seed"] == SEEDS[0]}  # fmt: skip
    assert (half["task"], half["trained"], full["trained"]) == ("C", "HFT", "full")
    assert (half["forgets"].value, half["forgets then"].value) == (there["HFT"], 15.0)
    assert half["than full"].value == pytest.approx(there["HFT"] - there["full"])
    assert half["than full then"].value == pytest.approx(-5.0)
    assert float(full["a rate below"]) < low
    assert tables.below(judged, []) == []


def test_of_a_course_the_last_stage_counts():
    """Of the runs to judge by, at the rates that came last; a column that none has is left out."""
    rows = [
        course(1, rates="0.0002", overall=1.0), course(1), course(2, first=-5.0, overall=60.0),
        course(2, seed=1, first=-7.0, overall=70.0, reached=False), course(2, seed=2, judged=False, overall=0.0),
    ]  # fmt: skip
    [line] = courses(rows)
    assert line["Δ first"] == (-6.0, pytest.approx(2**0.5))
    assert (line["overall performance"].value, line["reached"]) == (65.0, "1 of 2")
    assert (line["knowledge"].value, line["reasoning"].value) == (30.0, 10.0)
    text = report.courses.shown([line])
    assert text.startswith("**pair, A → B**")
    assert "backward transfer" not in text


def test_a_claim_about_several_tasks_is_of_pairs_after_the_last_stage():
    """More is better; another order pairs with itself; the first stage does not count."""
    runs = [
        [
            course(1, arm=arm, order=order, seed=seed, first=50.0),
            course(2, arm=arm, order=order, seed=seed, first=x + seed),
        ]
        for order in ("A B", "B A")
        for arm, x in (("CPI-FT", -5.0), ("full", -20.0), ("staged", -6.5))
        for seed in range(5)
    ]
    rows = [row for run in runs for row in run]
    found, n_pairs = difference(rows, "pair", "first", "CPI-FT", "full")
    assert (found, n_pairs) == (Estimate(15.0, 15.0, 15.0), 10)
    told = lambda rows: next(r for r in claimed(Judged([], {}), rows) if "A when B follows" in r["claims"])  # noqa: E731
    assert told(rows)[MEASURED] == "first, to full: 15.0 [15.0, 15.0]; first, to staged: 1.5 [1.5, 1.5]"
    assert told(rows)[VERDICT] == "reproduced here (exploratory)"
    assert told([row for row in rows if row["order"] == "B A"])[VERDICT] == NOT_RUN
    assert told([row for row in rows if row["seed"]])[VERDICT] == "too few runs (exploratory)"
    assert told([row for row in rows if row["arm"] != "staged"])[VERDICT] == "too few runs (exploratory)"
    assert told([row for row in rows if row["arm"] == "full"])[VERDICT] == NOT_RUN


@pytest.mark.parametrize(
    ("forgets", "said"), [(3.0, "reproduced"), (25.0, "not reproduced"), (16.5, "not reproduced")]
)
def test_of_forgetting_in_a_course_less_is_better(forgets, said):
    """And by a point, as everywhere."""
    rows = [
        course(2, experiment="preferences", order="A P", arm=arm, seed=seed, forgetting=forgotten)
        for arm, forgotten in (("HFT; a new half", forgets), ("full", 17.0))
        for seed in range(5)
    ]
    told = next(r for r in claimed(Judged([], {}), rows) if "in DPO" in r["claims"])
    assert told[VERDICT] == f"{said} here (exploratory)"


def test_families_have_as_many_variants_each():
    """Nobody is tried more often than another; the page says so."""
    assert {len(arms) for arms in FAMILIES.values()} == {4}
    assert {len(method.rates) for method in METHODS.values()} == {5}
