"""Does it forget less? Every run of the benchmark, stage by stage; what is there already is not run again.

    python benchmarks/forgetting/evidence.py            # seven arms on task A, three seeds: `make evidence`
    python benchmarks/forgetting/evidence.py --full     # every stage of `STAGES`, in order: `make evidence-full`

The last two stages need the base of words, which `pretrain_words.py` makes, and are left out without it.
After them come `sequences.py`, `patience.py` and `self_samples.py`. A run takes a few minutes at most and adds its
rows to `results/runs.csv` (of the seven arms: to `outputs/forgetting/quick.csv`), with the commit that made them. Stop
it at any time: the same command goes on. Two runs at a time, one thread each; `--workers` says otherwise.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import choices
import yaml
from abilities import TASKS
from arms import METHODS, Arm
from bases import is_made
from book import RESULTS, Book, Stage, parser, run_all, run_stages
from choices import FROZEN, frozen, rate_of, setting_of, variant_of
from comparisons import Setting, alike_settings, judged_settings, settings_everywhere
from learn import Run, learn
from outcomes import Row, outcomes
from protocol import (
    ALPHAS,
    ALSO_EXPLORED,
    ANCHORS,
    BASES,
    CHOOSING_SEEDS,
    DEVELOPED_ON,
    FAMILIES,
    GRANULARITIES,
    JUDGING_SEEDS,
    OTHER_BASE,
    OTHER_SEEDS,
    PEERS,
    QUICK,
    QUICK_SEEDS,
    UPPER_BOUND,
)

RUNS = RESULTS / "runs.csv"
CURVES = Path("outputs") / "forgetting"
BASE, TASK = DEVELOPED_ON


def rates(arms: Sequence[str], task: str, alpha: float = 1.0, base: str = BASE) -> list[Run]:
    """Each arm with each of its rates, on a base and a seed to choose by."""
    return [
        Run(base, task, arm, rate, CHOOSING_SEEDS[0], alphas=(alpha,))
        for arm in arms
        for rate in METHODS[Arm.named(arm).method].rates
    ]


def rates_of_families(rows: list[Row]) -> list[Run]:
    """Every variant of every family, and the peers, on task A."""
    return rates([*(arm for family in FAMILIES.values() for arm in family), *PEERS, UPPER_BOUND], TASK)


def variants(rows: list[Row]) -> list[Run]:
    """Every variant at its rate, with the other seeds to choose by."""
    arms = [arm for family in FAMILIES.values() for arm in family]
    chosen = {arm: rate for arm in arms if (rate := rate_of(rows, arm, TASK)) is not None}
    return [Run(BASE, TASK, arm, rate, seed) for arm, rate in chosen.items() for seed in CHOOSING_SEEDS[1:]]


def chosen_variants(rows: list[Row]) -> dict[str, tuple[str, float]]:
    """{family: (its variant, the rate of that)}, where both are known."""
    variant = {family: found for family in FAMILIES if (found := variant_of(rows, family)) is not None}
    rate = {family: rate_of(rows, found, TASK) for family, found in variant.items()}
    return {family: (variant[family], found) for family, found in rate.items() if found is not None}


def factorial(rows: list[Row]) -> list[Run]:
    """Region × anchor × dial, on task A: each family's variant with each anchor, evaluated at each α."""
    return [
        Run(BASE, TASK, Arm(variant, anchor).name, rate, CHOOSING_SEEDS[0], alphas=ALPHAS)
        for variant, rate in chosen_variants(rows).values()
        for anchor in ANCHORS
    ]


def contenders(rows: list[Row]) -> list[Run]:
    """The best settings of the factorial, with the other seeds to choose by."""
    runs = []
    for family, (variant, rate) in chosen_variants(rows).items():
        near: dict[str, list[float]] = {}
        for anchor, alpha in choices.contenders(rows, family):
            near.setdefault(anchor, []).append(alpha)
        for anchor, alphas in near.items():
            arm = Arm(variant, anchor).name
            runs += [Run(BASE, TASK, arm, rate, seed, alphas=tuple(alphas)) for seed in CHOOSING_SEEDS[1:]]
    return runs


def rates_of_judged(rows: list[Row]) -> list[Run]:
    """The rates of what is judged, on the tasks where they are not known yet; no choice but the rate is made here."""
    return _rates_of(judged_settings(frozen()))


def judge(rows: list[Row]) -> list[Run]:
    """What is judged: every frozen setting on every task, base and seed."""
    return _judging(rows, judged_settings(frozen()))


def rates_beside_anchor(rows: list[Row]) -> list[Run]:
    """The rates of full fine-tuning with the other families' anchors and dials."""
    return _rates_of(alike_settings(frozen()))


def judge_beside_anchor(rows: list[Row]) -> list[Run]:
    """Does a region add anything beside the anchor? Exploratory, on every task, base and seed."""
    return _judging(rows, alike_settings(frozen()))


def _rates_of(settings: Sequence[Setting], tasks: Iterable[str] = TASKS, base: str = BASE) -> list[Run]:
    return [run for task in tasks for setting in settings for run in rates([setting.arm], task, setting.alpha, base)]


def _judging(
    rows: list[Row],
    settings: Sequence[Setting],
    tasks: Iterable[str] = TASKS,
    bases: Sequence[str] = BASES,
    seeds: Sequence[int] = JUDGING_SEEDS,
) -> list[Run]:
    """At the rates that were chosen on the first of the bases; nothing where there is none yet."""
    at = {(task, s): rate_of(rows, s.arm, task, s.alpha, bases[0]) for task in tasks for s in settings}
    return [
        Run(base, task, setting.arm, rate, seed, judged=True, alphas=(setting.alpha,))
        for seed in seeds
        for base in bases
        for (task, setting), rate in at.items()
        if rate is not None
    ]


def rates_of_granularities(rows: list[Row]) -> list[Run]:
    """For the sequences: the rates of HFT's other halves on every task."""
    return [run for task in TASKS for run in rates(GRANULARITIES, task)]


def rates_on_words(rows: list[Row]) -> list[Run]:
    """The rates of what is judged, on task A with the base of words; none before that was made.

    An arm with an anchor has that of the arm without.
    """
    alone = dict.fromkeys(Setting(Arm.named(setting.arm).method) for setting in judged_settings(frozen()))
    return _rates_of(list(alone), [TASK], OTHER_BASE) if is_made(OTHER_BASE) else []


def judge_on_words(rows: list[Row]) -> list[Run]:
    """Does the ranking hold with subwords and real text? Nothing before its rates are known."""
    settings = settings_everywhere(frozen()) if is_made(OTHER_BASE) else []
    return _judging(rows, settings, [TASK], [OTHER_BASE], OTHER_SEEDS)


def others() -> list[str]:
    """Every method that is not judged, and what else is explored."""
    theirs = {setting.arm for setting in judged_settings(frozen())}
    return [*(arm for arm in METHODS if arm not in theirs), *ALSO_EXPLORED]


def explored(rows: list[Row]) -> list[Run]:
    """The rates of every other method, on task A."""
    return rates(others(), TASK)


def exploratory(rows: list[Row]) -> list[Run]:
    """Every other method at its rate, on task A and the first base: exploratory."""
    return _judging(rows, list(map(Setting, others())), [TASK], [BASE])


def quick(rows: list[Row]) -> list[Run]:
    """Seven arms on task A at the rates that were chosen; with an anchor, at that of the arm without it."""
    kept = BOOK.rows()
    runs = []
    for seed in QUICK_SEEDS:
        for arm in QUICK:
            method = Arm.named(arm).method
            rate = rate_of(kept, arm, TASK) or rate_of(kept, method, TASK) or METHODS[method].rates[2]
            runs.append(Run(BASE, TASK, arm, rate, seed, judged=True))
    return runs


# `freeze` writes down what was chosen between them, once.
STAGES: tuple[Stage, ...] = (
    rates_of_families, variants, factorial, contenders, rates_of_judged, judge, rates_beside_anchor,
    judge_beside_anchor, explored, exploratory, rates_of_granularities, rates_on_words, judge_on_words,
)  # fmt: skip


def freeze(rows: list[Row]) -> None:
    """Write `frozen.yaml`: of each family the variant, the anchor and the α that forget least on validation."""
    if FROZEN.exists():
        return
    for stage in STAGES[: STAGES.index(rates_of_judged)]:
        if missing := BOOK.pending(stage(rows), rows):
            raise SystemExit(
                f"error: nothing can be frozen before {stage.__name__} is whole, and {len(missing)} of its runs are "
                "missing: run the same command again"
            )
    chosen = {family: setting_of(rows, family) for family in FAMILIES}
    head = "# Chosen on task A with the first base, by what is forgotten of the validation split; judged unchanged.\n"
    FROZEN.write_text(head + yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True))


def make(run: Run) -> list[Row]:
    """The rows of a run; its curve is kept as JSON beside them."""
    result = learn(run)
    CURVES.mkdir(parents=True, exist_ok=True)
    (CURVES / f"{run.name}.json").write_text(json.dumps(asdict(run) | result))
    return outcomes(asdict(run), result)


def keys(run: Run) -> list[dict[str, Any]]:
    """A row for each place of the dial."""
    return [asdict(run) | {"alpha": alpha} for alpha in run.alphas]


def shown(rows: list[Row]) -> str:
    """What is printed of a run."""
    forgotten = ", ".join(f"α = {row['alpha']:g}: {row['forgetting']}" for row in rows)
    return f"{'reached' if rows[0]['reached'] else 'not reached'}, {forgotten}"


KEY = ("base", "task", "arm", "rate", "seed", "judged", "alpha")
BOOK = Book(RUNS, KEY, ("base", "task", "arm", "commit"), keys, make, shown)
# `make evidence` makes its runs anew, whatever the repository has of them.
QUICKLY = replace(BOOK, path=CURVES / "quick.csv")


def summary(rows: list[Row]) -> str:
    """Of each arm, over the seeds: forgetting in points (the smallest and the largest), the new task, KL, steps."""
    lines = ["arm | forgetting | new task % | KL | steps", "---|---|---|---|---"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        same = [row for row in rows if row["arm"] == arm]
        mean = {name: statistics.fmean(row[name] for row in same) for name in ("forgetting", "new", "kl", "steps")}
        low, high = (choose(row["forgetting"] for row in same) for choose in (min, max))
        forgotten = f"{mean['forgetting']:.1f} ({low:.1f} to {high:.1f})"
        missed = "" if all(row["reached"] for row in same) else ", not always reached"
        lines.append(f"{arm} | {forgotten}{missed} | {mean['new']:.1f} | {mean['kl']:.2f} | {mean['steps']:.0f}")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, STAGES)
    options.add_argument("--full", action="store_true", help="every stage rather than the seven arms")
    args = options.parse_args()
    until = time.time() + 60 * args.minutes
    if not args.full and not args.stage:
        rows = QUICKLY.rows()
        whole = run_all(QUICKLY, quick, rows, args.workers, until)
        print(f"\n{summary(rows)}\n\nin {QUICKLY.path}" if rows else "no run was made")
        sys.exit(0 if whole else 1)
    rows = BOOK.rows()
    for stage in [stage for stage in STAGES if args.stage in (None, stage.__name__)]:
        if stage is rates_of_judged:
            freeze(rows)
        if not run_all(BOOK, stage, rows, args.workers, until):
            sys.exit(1)
    if args.full and not args.stage:
        import patience  # these read the rows above
        import self_samples
        import sequences

        if not all(run_stages(m.BOOK, m.STAGES, args.workers, until) for m in (sequences, patience)):
            sys.exit(1)
        self_samples.ask()


if __name__ == "__main__":
    main()
