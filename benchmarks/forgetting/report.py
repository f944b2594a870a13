"""From `results/runs.csv` to tables, figures and the page: `python benchmarks/forgetting/report.py`, in seconds.

It copes with what is there so far, and says how much that is. Written are `results/*.csv`, `results/*.png`, and in
`docs/evidence.md` and the README what stands between `<!-- from report.py: NAME -->` and `<!-- end -->`. No sentence
of its own draws a conclusion; the rules by which the tables say "met" or "reproduced" were fixed before the runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import courses
import protocol
import tables
from abilities import TASKS
from arms import METHODS
from book import RESULTS, Row, read
from choices import frozen, variant_of
from claims import claimed, summary
from comparisons import LEAST, Frozen, Judged
from figures import by_arm, by_dial, by_divergence, by_rate
from protocol import FAMILIES
from tables import NOT_RUN, Table, by_task, markdown

sys.path.append(str(Path(__file__).parents[2] / "docs"))
from blocks import filled

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "docs" / "evidence.md", ROOT / "README.md")
# {book: its columns of text}
WORDS = {
    "runs": ("base", "task", "arm", "commit"),
    "patience": ("base", "task", "arm", "commit"),
    "sequences": (
        "experiment", "base", "order", "arm", "rates", "rates_by", "trained", "groups", "jaccard", "commit"
    ),
    "self_samples": ("base", "ability", "commit"),
    "sizes": ("base", "arm", "commit"),
    "search": ("level", "layers", "modules", "commit"),
}  # fmt: skip
FIGURES = {
    "forgetting": "Forgetting at 95 % of the new task, a row an arm, with 95 % intervals",
    "rates": "Forgetting against the learning rate, a panel a family of methods",
    "factorial": "Forgetting along the dial, a panel a region, a line an anchor",
    "divergence": "Forgetting against KL from the base on the new task",
}


def fixed() -> Table:
    """The constants of `protocol.py`, in words."""
    others: dict[tuple[float, ...], list[str]] = {}
    for name, method in METHODS.items():
        if method.rates != protocol.FULL_RATES:
            others.setdefault(method.rates, []).append(name)
    said = lambda rates: ", ".join(f"{rate:g}" for rate in rates)  # noqa: E731
    numbers = {
        "the new task is learned at": f"{protocol.ENOUGH:.0%} exact match on its validation rows",
        "evaluated": f"every {protocol.EVERY} steps, with {protocol.EVALUATED} rows of every kind"
        f"{_fewer('validation', protocol.EVALUATED)}, up to step {protocol.STEPS}, and to {protocol.JUDGED_STEPS} "
        "where it is judged",
        "a step": f"{protocol.BATCH} rows of {protocol.TRAINED:,}{_fewer('train', protocol.TRAINED)}; the rate is "
        f"warmed up for {protocol.WARMUP} steps",
        "learning rates tried": said(protocol.FULL_RATES),
        **{f"by {'; '.join(names)}": said(rates) for rates, names in others.items()},
        "anchors tried (source and β)": ", ".join(protocol.ANCHORS),
        "places of the dial tried (α)": said(protocol.ALPHAS),
        "seeds to choose by": said(protocol.CHOOSING_SEEDS),
        "seeds to judge by": said(protocol.JUDGING_SEEDS),
        "bases": ", ".join(f"`{base}`" for base in protocol.BASES),
    }
    families = {f"variants of {family}": "; ".join(arms) for family, arms in FAMILIES.items()}
    return [{"": name, "fixed": text} for name, text in {**numbers, **families}.items()]


def _fewer(split: str, wanted: int) -> str:
    """Tasks that have not as many rows."""
    there = {task: len(ability.rows(split, wanted)) for task, ability in TASKS.items()}
    return "".join(f" (of {task} {count})" for task, count in there.items() if count < wanted)


def status(rows: Sequence[Row], chosen: Frozen) -> str:
    """How much there is, and which commits made it."""
    n_judged = sum(bool(row["judged"]) and row["seed"] in protocol.JUDGING_SEEDS for row in rows)
    n_choosing = sum(not row["judged"] for row in rows)
    judged = Judged(rows, chosen)
    primary = [(len(c.pairs.bases), c.planned) for c in judged.primary()]
    pairs = (
        f"{sum(there for there, _ in primary)} of {sum(planned for _, planned in primary)} pairs of the primary "
        "comparison are there"
        if primary
        else "nothing is frozen yet, so that nothing of this is the primary comparison"
    )
    commits = ", ".join(f"`{name}`" for name in dict.fromkeys(str(row["commit"]) for row in rows if row.get("commit")))
    said = (
        f"{len(rows):,} rows of `results/runs.csv`: {n_choosing:,} to choose by, {n_judged:,} to judge by, "
        f"{len(rows) - n_choosing - n_judged:,} with earlier seeds, which are not counted; "
    )
    return f"{said}{pairs}." + (f" Made by commit {commits}." if commits else "")


def bar_said(table: Table) -> str:
    """How often the bar is met where nothing was chosen."""
    cells = [row[f"≤ {tables.BAR:g}"] for row in table]
    outside = [cell for cell in cells if cell != "chosen here"]
    if not outside:
        return NOT_RUN
    missing = sum(cell is None for cell in outside)
    n_met = sum(cell is True for cell in outside)
    return (
        f"Met on {n_met} of {len(outside)} tasks and bases where nothing but rates was chosen; on {missing} it cannot "
        f"be said yet.\n\n{by_task(table)}"
    )


def ranking_said(table: Table) -> str:
    """How much of one ranking is found in the other."""
    if len(table) < 2:
        return NOT_RUN
    _, one, other, *_ = table[0]
    pairs = [(b[one].value - a[one].value, b[other].value - a[other].value) for a, b in combinations(table, 2)]
    there = [less for apart, less in pairs if apart >= LEAST]
    same, tied = sum(less >= LEAST for less in there), sum(abs(less) < LEAST for less in there)
    return (
        f"Of {len(there)} pairs of settings that are {LEAST:g} point or more apart on the bases of {one}, {same} are "
        f"in the same order on `{other}`, {tied} are nearer to each other there, and {len(there) - same - tied} are "
        f"the other way round.\n\n{markdown(table)}"
    )


def write_figures(rows: Sequence[Row], judged: Judged, variants: dict[str, str], folder: Path) -> dict[str, bool]:
    """{figure: whether it is there}."""
    settings = tables.groups_of(judged)
    path = lambda name: folder / f"{name}.png"  # noqa: E731
    drawn = {
        "forgetting": by_arm(judged, tables.first_look(judged) or settings["exploratory"], path("forgetting")),
        "rates": by_rate(rows, path("rates")),
        "factorial": by_dial(rows, variants, path("factorial")),
        "divergence": by_divergence(judged, path("divergence")),
    }
    for name in FIGURES:
        if not drawn[name]:
            path(name).unlink(missing_ok=True)
    return drawn


def blocks(books: Mapping[str, Sequence[Row]], chosen: Frozen, folder: Path) -> dict[str, str]:
    """Write tables and figures.

    Args:
        books: {key of `WORDS`: rows}.
        chosen: Of `frozen.yaml`; empty before it was written.
        folder: Of the tables and figures.

    Returns:
        {block of the page: what it says}.
    """
    rows = books["runs"]
    judged = Judged(rows, chosen)
    words = Judged(rows, chosen, (protocol.OTHER_BASE,), protocol.OTHER_SEEDS)
    settings = tables.groups_of(judged)
    variants = {family: str(setting["method"]) for family, setting in chosen.items()}
    variants = variants or {f: variant for f in FAMILIES if (variant := variant_of(rows, f)) is not None}
    written = {
        "primary": tables.compared(judged.primary()),
        "short": tables.short(judged),
        "bar": tables.bar(judged),
        "bars": tables.bars(judged),
        "beside_anchor": tables.region_beside_anchor(judged),
        "measured": tables.measured(judged, settings["primary"]),
        "prices": tables.prices(judged, settings["primary"], books["sizes"]),
        "explored": tables.compared(
            [judged.comparison(setting, task) for task in TASKS for setting in settings["exploratory"]]
        ),
        "explored_measured": tables.measured(judged, settings["exploratory"]),
        "explored_prices": tables.prices(judged, settings["exploratory"], books["sizes"]),
        "rates": tables.rates(rows),
        "factorial": tables.factorial(rows, variants),
        "divergence": tables.divergence(judged),
        "rechosen": tables.patience(judged, books["patience"]),
        "below": [*tables.below(judged, books["patience"]), *tables.below(words, books["patience"])],
        "ranking": tables.ranking(judged, words),
        "claims": claimed(judged, books["sequences"]),
        "courses": courses.courses(books["sequences"]),
        "samples": courses.samples(books["self_samples"]),
    }
    for name, table in written.items():
        tables.write(table, folder / f"{name}.csv")
    drawn = write_figures(rows, judged, variants, folder)
    plain = ("short", "bars", "divergence", "claims", "factorial", "samples", "rechosen", "below")
    return {
        "abilities": markdown(tables.abilities()),
        "tasks": markdown(tables.new_tasks()),
        "methods": markdown(tables.methods()),
        "protocol": markdown(fixed()),
        "status": status(rows, chosen),
        "summary": summary(judged),
        "frozen": markdown(tables.frozen_table(chosen)),
        **{name: markdown(table) if name in plain else by_task(table) for name, table in written.items()
           if name not in ("bar", "rates", "courses", "ranking")},
        "bar": bar_said(written["bar"]),
        "searched": markdown(tables.searched(books["search"])),
        "ranking": ranking_said(written["ranking"]),
        "courses": courses.shown(written["courses"]),
        **{f"figure {name}": f"![{says}](../benchmarks/forgetting/results/{name}.png)" if drawn[name] else NOT_RUN
           for name, says in FIGURES.items()},
    }  # fmt: skip


def page(text: str, found: dict[str, str]) -> str:
    """A page with all of its blocks.

    Raises:
        KeyError: A block has a name that nothing here answers to.
    """
    return filled(text, lambda name: found[name.removeprefix("report.py: ")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="with runs.csv; tables and figures go there")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, help="whose blocks are written")
    args = parser.parse_args()
    books = {name: read(args.results / f"{name}.csv", words) for name, words in WORDS.items()}
    found = blocks(books, frozen(), args.results)
    for path in args.pages:
        path.write_text(page(path.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"{found['status']}\n{found['summary']}")
    sizes = [path.stat().st_size / 1000 for path in args.results.glob("*.png")]
    if sizes:
        print(f"{len(sizes)} figures, {statistics.fmean(sizes):.0f} kB on average, {max(sizes):.0f} kB at most")


if __name__ == "__main__":
    main()
