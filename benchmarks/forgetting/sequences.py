"""More than one task: sequences, CPI-FT and DPI, preferences. Exploratory throughout; nothing here is primary.

    python benchmarks/forgetting/sequences.py                     # every stage of `STAGES`, in order
    python benchmarks/forgetting/sequences.py --stage pairs       # one of them

| experiment | what is trained | arms |
|---|---|---|
| sequence | A, B and C, one after the other in three orders, each to 95 % | `continual.arms()` |
| isolation | {A, B, C}, each task worth the same steps in every arm | `isolation.ARMS` |
| pair | A then B, and B then A, likewise: the table of the CPI-FT paper | `isolation.PAIRED` |
| preferences | A to 95 %, then P by DPO until 95 % prefer the chosen answer | `preferences.arms()` |

Rows go to `results/sequences.csv`, one for each stage of a course, with:

* `experiment`, `base`, `order`, `arm`, `seed`, `judged` (scored on the test split); `rates`, one for each task in its
  order, and `rates_by`: "chosen" from `results/runs.csv`, "middle" of the method's where there is no choice yet,
  "tried", or "best" of those tried;
* `stage` and what it `trained`; `steps`, and `total_steps` so far, those of probes and gradients included; `reached`,
  whether the validation of the tasks that are here for the first time is at 95 %, empty where none is;
* after the stage: exact match in percent of tasks `A`, `B`, `C`, the mean `validation` of the course's tasks;
  `overall` performance and backward `transfer` (TRACE's, see `stages.py`), in percent and points; `forgetting`, the
  loss of the abilities' mean exact match in points, and that of each; `kl` from the base on the tasks, and the `rise`
  of the general loss, in nats; the `share` of the base's scalars that it trained, in percent, and the `kilobytes`
  of what would be saved after it, an adapter or all weights;
* isolation and pairs: `groups` in their order, `jaccard` of each two cores, "BC 0.0069, …"; pairs: `first` and
  `second`, ΔA and ΔB of the CPI-FT paper; preferences: `preferred`, the share of prompts whose chosen answer is the
  likelier, and `chosen`, its exact match, in percent;
* `seconds` since the course began, and the `commit`.
"""

from __future__ import annotations

from collections.abc import Sequence

import continual
import isolation
import preferences
from arms import METHODS, Arm
from book import RESULTS, Book, Row, Stage, command
from choices import rate_of
from claims import CLAIMS
from evidence import BOOK as RUNS
from outcomes import chosen_rate
from protocol import BASES, CHOOSING_SEEDS, FULL_RATES, JUDGING_SEEDS
from stages import Course, said, trained_as

BASE, CHOOSING, SEEDS = BASES[0], CHOOSING_SEEDS[0], JUDGING_SEEDS[:3]
# Of each experiment, the arms that a claim is about. In one order alone three seeds are too few for a verdict.
CLAIMED = {(claim.course[0], arm) for claim in CLAIMS if claim.course for arm in (claim.less, *claim.than)}
# The order of {A, B, C} where one is given: from the mildest conflict with what is old to the strongest.
GIVEN = "B C A"


def rates(runs: list[Row], arm: str, tasks: Sequence[str]) -> tuple[tuple[float, ...], str]:
    """(an arm's rate for each task, where they are from); where its anchor was not tried with all, those without."""
    method = Arm.named(trained_as(arm)).method
    chosen = [rate_of(runs, trained_as(arm), task) or rate_of(runs, method, task) for task in tasks]
    if None in chosen:
        return (METHODS[method].rates[2],) * len(tasks), "middle"
    return tuple(rate for rate in chosen if rate is not None), "chosen"


def sequences(rows: list[Row]) -> list[Course]:
    """Each arm in each order."""
    runs = RUNS.rows()
    return [
        Course("sequence", BASE, order, arm, *rates(runs, arm, order.split()), seed, judged=True)
        for seed in SEEDS
        for order in continual.ORDERS
        for arm in continual.arms()
    ]


def isolation_rates(rows: list[Row]) -> list[Course]:
    """The rates of the arms that have their own."""
    return [
        Course("isolation", BASE, GIVEN, arm, (rate,), "tried", CHOOSING)
        for arm in isolation.RATED
        for rate in FULL_RATES
    ]


def isolations(rows: list[Row]) -> list[Course]:
    """Every arm of the usual τ, at its rate or that of the arm that it varies."""
    return [
        _isolation(arm, seed, rate)
        for seed in JUDGING_SEEDS
        for arm, is_ in isolation.ARMS.items()
        if is_.threshold == isolation.THRESHOLD and seed in seeds_of("isolation", arm)
        if (rate := best_rate(rows, arm)) is not None
    ]


def thresholds(rows: list[Row]) -> list[Course]:
    """Every arm of another τ, where that links other tasks; elsewhere the course is that of the usual τ."""
    overlaps = {
        (row["arm"], row["seed"]): [float(pair.split()[1]) for pair in row["jaccard"].split(", ")]
        for row in rows
        if row["judged"] and row["experiment"] == "isolation" and row["jaccard"]
    }
    return [
        _isolation(arm, seed, rate)
        for arm, is_ in isolation.ARMS.items()
        for seed in seeds_of("isolation", arm)
        if (usual := overlaps.get((is_.like, seed))) is not None and (rate := best_rate(rows, arm)) is not None
        if linked(usual, is_.threshold) != linked(usual, isolation.THRESHOLD)
    ]


def linked(overlaps: Sequence[float], threshold: float | None) -> list[bool]:
    """Of each two tasks, by the Jaccard index of their cores, whether τ links them."""
    return [threshold is not None and overlap >= threshold for overlap in overlaps]


def _isolation(arm: str, seed: int, rate: float) -> Course:
    return Course("isolation", BASE, GIVEN, arm, (rate,), "best", seed, judged=True)


def seeds_of(experiment: str, arm: str) -> tuple[int, ...]:
    """Those to judge an arm by where each order stands by itself."""
    return JUDGING_SEEDS if (experiment, arm) in CLAIMED else SEEDS


def pairs(rows: list[Row]) -> list[Course]:
    """A then B, and B then A."""
    return [
        Course("pair", BASE, order, arm, (rate,), "best", seed, judged=True)
        for seed in JUDGING_SEEDS
        for order in ("A B", "B A")
        for arm in isolation.PAIRED
        if seed in seeds_of("pair", arm) and (rate := best_rate(rows, arm)) is not None
    ]


def best_rate(rows: list[Row], arm: str) -> float | None:
    """With which an arm does the tasks best in the end, on validation; None before it was tried with all."""
    kin = isolation.ARMS[arm].like or arm
    last = {row["rates"]: row for row in rows if _is(row, "isolation", kin, False)}  # the last stage comes last
    if not {said([rate]) for rate in FULL_RATES} <= last.keys():
        return None
    return float(max(last.values(), key=lambda row: (row["validation"], -float(row["rates"])))["rates"])


def preference_rates(rows: list[Row]) -> list[Course]:
    """The rates of DPO."""
    runs = RUNS.rows()
    return [
        Course("preferences", BASE, "A P", arm, (*sft, rate), by, CHOOSING)
        for arm in preferences.arms()
        for sft, by in [sft_rate(runs, arm)]
        for rate in preferences.rates_of(arm)
    ]


def sft_rate(runs: list[Row], arm: str) -> tuple[tuple[float, ...], str]:
    """With which A is learned, without an anchor."""
    return rates(runs, Arm.named(trained_as(arm)).method, ["A"])


def preferred(rows: list[Row]) -> list[Course]:
    """Every arm at its rate of DPO: the lowest that reaches, as everywhere."""
    courses = []
    for arm in preferences.arms():
        sft, by = sft_rate(RUNS.rows(), arm)
        tried = [row for row in rows if _is(row, "preferences", arm, False) and row["trained"] == "P"]
        tried = [row | dict(zip(("sft", "rate"), map(float, row["rates"].split()), strict=True)) for row in tried]
        tried = [row | {"best": row["validation"]} for row in tried if said([row["sft"]]) == said(sft)]
        if set(map(said, zip(preferences.rates_of(arm)))) <= {said([row["rate"]]) for row in tried}:
            both = (*sft, chosen_rate(tried))
            seeds = seeds_of("preferences", arm)
            courses += [Course("preferences", BASE, "A P", arm, both, by, seed, judged=True) for seed in seeds]
    return courses


def _is(row: Row, experiment: str, arm: str, judged: bool) -> bool:
    return (row["experiment"], row["arm"], row["judged"], row["base"]) == (experiment, arm, judged, BASE)


def make(course: Course) -> list[Row]:
    """A course's rows."""
    made_by = {"sequence": continual.learn_sequence, "preferences": preferences.learn_preferences}
    return made_by.get(course.experiment, isolation.learn_isolated)(course)


def shown(rows: list[Row]) -> str:
    """What is printed of a course."""
    last = rows[-1]
    new = f"preferred {last['preferred']}" if "preferred" in last else f"overall {last['overall']}"
    return f"{new}, forgetting {last['forgetting']}, {last['total_steps']} steps, {last['seconds']} s"


KEY = ("experiment", "base", "order", "arm", "rates", "seed", "judged")
WORDS = ("experiment", "base", "order", "arm", "rates", "rates_by", "trained", "groups", "jaccard", "commit")
BOOK = Book(RESULTS / "sequences.csv", KEY, WORDS, lambda course: [course.columns()], make, shown)
STAGES: tuple[Stage, ...] = (
    sequences, isolation_rates, pairs, preference_rates, preferred, isolations, thresholds
)  # fmt: skip


if __name__ == "__main__":
    command(__doc__, BOOK, STAGES)
