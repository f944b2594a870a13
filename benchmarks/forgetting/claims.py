"""What the papers claim, beside what the runs here say of it, by one rule that was fixed before them.

A claim that something forgets less than something else is *reproduced here* where the 95 % interval of the paired
difference lies below 0 and its mean at −1 point or below, as it was and in the worst case, on every task that it was
run on; on some of them, *in part*; otherwise it is *not reproduced here*. Where the claim is part of the primary
comparison, the p-value after Holm has to be below 0.05, too. Below five pairs nothing is said. A claim that was run on
one task and one base is marked as exploratory; so is one about several tasks, where more of what is named is better,
but of forgetting less, and where there is no worst case: whether an arm learned its tasks is told by its row among the
courses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from abilities import TASKS
from book import Row
from comparisons import LEAST, Comparison, Judged, Setting, primary_settings, reference
from courses import difference
from inference import Estimate, same_sign
from tables import NOT_RUN, Table, divergence, shown

LEVEL = 0.05
# With three the interval of a mean is from the smallest to the largest, with four nearly so.
ENOUGH_PAIRS = 5
MEASURED, VERDICT = "measured here: difference in points, of forgetting if nothing else is named", "which is"


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        paper: Whose.
        says: In its own terms, with its numbers.
        less: Method that forgets less by it; "" where that is not what it is about.
        than: Methods that forget more, each of them; none stands for tuned full fine-tuning.
        course: Of `results/sequences.csv` the experiment, and the column of which `less` has more, as its name there;
            of "forgetting" less.
        order: Of that course; "" for all that there are.
        otherwise: What is to be said where nothing is compared here.
    """

    paper: str
    says: str
    less: str = ""
    than: tuple[str, ...] = ()
    course: tuple[str, str] | None = None
    order: str = ""
    otherwise: str = ""


NO_GPU = "not testable here: "
CLAIMS = (
    Claim("HFT", "forgets less than full fine-tuning (Llama-2-7B: knowledge 18.1 against 14.7)", "HFT"),
    Claim("HFT", "halves of each category beat whole layers (on one task)", "HFT", ("HFT, layers",)),
    Claim("HFT", "halves of each category beat any half of the matrices (on one task)", "HFT", ("HFT, model",)),
    Claim("HFT", "likewise in a sequence (TRACE, 7B: overall 51.3 against 47.9 and 46.9)", "HFT; a new half",
          ("HFT, layers; a new half", "HFT, model; a new half"), ("sequence", "overall")),
    Claim("HFT", "in a sequence beats full fine-tuning (TRACE, 7B: overall 51.3 against 45.7)", "HFT; a new half",
          ("full",), ("sequence", "overall")),
    Claim("HFT", "a fraction of one half is better than 0.3 and 0.7", "HFT", ("HFT, 0.3", "HFT, 0.7")),
    Claim("HFT", "to freeze the embeddings hurts", "HFT, embeddings", ("HFT",)),
    Claim("HFT", "is more stable than half-reset of a fully tuned model (which here learned the task only at the "
          "highest rate, 20 times HFT's, in 4 of 5 runs)", "HFT", ("full, half reset",)),
    Claim("HFT", "our control: the same beside a half-reset every 20 steps", "HFT", ("full, reset every 20",)),
    Claim("HFT", "forgets less in DPO (7B: knowledge 12.5 against 10.7)", "HFT; a new half", ("full",),
          ("preferences", "forgetting")),
    Claim("HFT", "backward transfer −5.6 against −10.2 on TRACE, 7B", "HFT; a new half", ("full",),
          ("sequence", "transfer")),
    Claim("HFT", "with replay 57.4 against 54.7 on TRACE, 13B", otherwise=NO_GPU + "13B"),
    Claim("HFT", "13B: 50.1 against 47.2", otherwise=NO_GPU + "13B"),
    Claim("HFT", "takes about 30 % less time", otherwise=NO_GPU + "on GPUs"),
    Claim("CoFiTune", "+14 % versatility over full fine-tuning on 13B; 95 % of the base's versatility and "
          "90 % of full fine-tuning's speciality", otherwise=NO_GPU + "13B, +14 %"),
    Claim("CoFiTune", "its region forgets less than full fine-tuning", "CoFiTune, no mask"),
    Claim("CoFiTune", "the range (¼, ½] beats the other quarters", "CoFiTune, no mask",
          ("CoFiTune, (0, ¼]", "CoFiTune, (½, ¾]", "CoFiTune, (¾, 1]")),
    Claim("CoFiTune", "up and down beat the attention's matrices", "CoFiTune, no mask", ("CoFiTune, MHA",)),
    Claim("CoFiTune", "the soft mask keeps more (on the update)", "CoFiTune", ("CoFiTune, no mask",)),
    Claim("CoFiTune", "likewise (on the gradient, as published)", "CoFiTune, gradient", ("CoFiTune, no mask",)),
    Claim("CPI-FT", "forgets less of A when B follows: −5.7 against −24.5 by full SFT and −16.2 staged", "CPI-FT",
          ("full", "staged"), ("pair", "first"), "A B"),
    Claim("CPI-FT", "forgets less of B when A follows: −4.8 against −16.7 by full SFT and −12.3 staged", "CPI-FT",
          ("full", "staged"), ("pair", "first"), "B A"),
    Claim("CPI-FT", "our control: the same in both orders, beside stages that come back as it does", "CPI-FT",
          ("staged, and back",), ("pair", "first")),
    Claim("CPI-FT", "is better than staged and than joint training on five tasks, 7B to 9B", "CPI-FT",
          ("staged", "joint"), ("isolation", "overall")),
    Claim("CPI-FT", "our control: the same beside stages that come back to every task as it does", "CPI-FT",
          ("staged, and back",), ("isolation", "overall")),
    Claim("CPI-FT", "groups at τ = 0.1 are better than one group", "CPI-FT", ("CPI-FT, τ = 0.0",),
          ("isolation", "overall")),
    Claim("SSU", "HFT degrades less than full fine-tuning (7B: −8.0 % against −20.3 %)", "HFT"),
    Claim("SSU", "structured selections keep more than single scalars", "random rows", ("random elements",)),
)  # fmt: skip


def claimed(judged: Judged, courses: Sequence[Row] = ()) -> Table:
    """Every claim beside what was measured, and whether it is reproduced.

    Args:
        judged: The runs of single tasks.
        courses: Rows of `results/sequences.csv`.
    """
    primary = {(c.setting, c.task): c for c in judged.primary()}
    table = [_of_courses(claim, courses) if claim.course else _row(claim, judged, primary) for claim in CLAIMS]
    return [*table, _razor(judged)]


def _row(claim: Claim, judged: Judged, primary: dict[tuple[Setting, str], Comparison]) -> dict[str, Any]:
    row = {"paper": claim.paper, "claims": claim.says}
    if not claim.less:
        return row | {MEASURED: "–", VERDICT: claim.otherwise}
    one = Setting(claim.less)
    others = [Setting(than) for than in claim.than] or [reference(judged.frozen)]
    tested = not claim.than and one in primary_settings(judged.frozen)
    found = {
        f"{task}, to {other.name}" if len(others) > 1 else task:
        primary[one, task] if tested else judged.comparison(one, task, to=other)
        for other in others
        for task in TASKS
    }  # fmt: skip
    there = {label: c for label, c in found.items() if c.pairs.bases}
    words = "; ".join(f"{label}: {shown(c.difference)}" for label, c in there.items()) or "–"
    return row | {MEASURED: words, VERDICT: verdict(list(there.values()), tested)}


def _of_courses(claim: Claim, rows: Sequence[Row]) -> dict[str, Any]:
    assert claim.course is not None
    experiment, column = claim.course
    ours = [row for row in rows if claim.order in ("", row["order"])]
    found = {than: difference(ours, experiment, column, claim.less, than) for than in claim.than}
    there = {than: estimate for than, (estimate, pairs) in found.items() if pairs}
    words = "; ".join(f"{column}, to {than}: {shown(estimate)}" for than, estimate in there.items())
    held = [_less(estimate) if column == "forgetting" else _more(estimate) for estimate in there.values()]
    word = _said(held, min(pairs for _, pairs in found.values())) + " (exploratory)"
    return {"paper": claim.paper, "claims": claim.says, MEASURED: words or "–", VERDICT: word if there else NOT_RUN}


def _said(held: Sequence[bool], pairs: int) -> str:
    """What is said of comparisons with so many pairs at least, by whether the claim held in each."""
    if pairs < ENOUGH_PAIRS:
        return "too few runs"
    return "reproduced here" if all(held) else "reproduced here in part" if any(held) else "not reproduced here"


def verdict(found: list[Comparison], tested: bool) -> str:
    """By the rule above.

    Args:
        found: On the tasks that have runs.
        tested: Part of the primary comparison.
    """
    if not found:
        return NOT_RUN
    if tested and any(len(c.pairs.bases) < c.planned for c in found):
        return "runs are missing"
    held = [below(c) and (not tested or c.adjusted < LEVEL) for c in found]
    return _said(held, min(len(c.pairs.bases) for c in found)) + ("" if tested else " (exploratory)")


def below(comparison: Comparison) -> bool:
    """Whether it forgets less, as it was and in the worst case, and by enough to speak of."""
    return all(map(_less, (comparison.difference, comparison.worst)))


def _less(difference: Estimate) -> bool:
    return difference.high < 0 and difference.value <= -LEAST


def _more(difference: Estimate) -> bool:
    return difference.low > 0 and difference.value >= LEAST


def _razor(judged: Judged) -> dict[str, Any]:
    """RL's Razor: that forgetting follows KL on the new task."""
    found: dict[str, list[str]] = {}
    for row in divergence(judged):
        if row["base"] != "all" and not math.isnan(row["R², parabola"]):
            found.setdefault(row["task"], []).append(f"{row['R², parabola']:.2f}")
    return {
        "paper": "RL's Razor", "claims": "forgetting follows KL from the base on the new task (LLMs: R² 0.71)",
        MEASURED: "; ".join(f"R² on {task}, of each base: {', '.join(of)}" for task, of in found.items()) or "–",
        VERDICT: "R² is all that is said here (exploratory)" if found else NOT_RUN,
    }  # fmt: skip


def summary(judged: Judged) -> str:
    """One neutral sentence on what the primary comparison says so far."""
    found = judged.primary()
    there = [c for c in found if c.pairs.bases]
    if not there:
        return NOT_RUN
    complete = [c for c in found if len(c.pairs.bases) == c.planned]
    decided = [c for c in complete if c.adjusted < LEVEL]
    count: Callable[[bool], int] = lambda less: sum((c.difference.value < 0) == less for c in decided)  # noqa: E731
    alike = sum(same_sign(c.pairs) for c in decided)
    return (
        f"Of {len(found)} planned comparisons of forgetting with tuned full fine-tuning {len(complete)} have all of "
        f"their runs; of these {count(True)} found less forgetting and {count(False)} more at p < {LEVEL:g} after "
        f"Holm, and {len(complete) - len(decided)} decided nothing. Of those {len(decided)} differences {alike} go "
        "the same way with every seed."
    )
