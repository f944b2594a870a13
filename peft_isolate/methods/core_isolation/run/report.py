"""report.md and report.json: what was run, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ....checkpoints.adapter import WEIGHTS
from ....checkpoints.weights import Weights, weights_of
from ....deltas.about.text import size_text
from ....errors import FormatError
from ....regions.region import Region
from ..grouping import Grouping
from ..probe import core_report
from .examine import Work
from .result import BASE, END, FORMAT, FUSION, PROBE, IsolationResult, shown
from .scores import LOSS, MATCH, TaskScores, load_scores
from .settings import save_json, save_text
from .tasks import HELD_OUT_AT_MOST, HELD_OUT_SHARE

SCORES, TRAINING, FUSED = "scores.json", "training.json", "fusion.json"


def write_report(work: Work) -> dict[str, Any]:
    """Write both files anew.

    Returns:
        What report.json holds.
    """
    layout, n_stages = work.layout, len(list((work.layout.folder / "stages").glob("[0-9]*")))
    grouping = Grouping.load(layout.groups)
    weights = weights_of(work.base, work.recipe.init.get("revision"))
    content = {
        "format": FORMAT,
        "method": "CPI-FT" if work.run.fuse else "DPI",
        "base": work.base,
        "settings": work.settings,
        "tasks": list(work.names),
        "rows": {task.name: _rows(work, task.name) for task in work.tasks},
        "groups": [list(group) for group in grouping.groups],
        "jaccard": grouping.to_dict(),
        "scores": _scores(work, n_stages),
        "training": _training(work, n_stages),
        "fusion": _json(layout.fused / FUSED) if work.run.fuse else None,
        "cores": {name: _core(work, weights, name) for name in work.names},
        "bytes": _bytes(work, n_stages),
    }
    result = IsolationResult.of(layout.folder, content)
    content["forgetting"] = result.forgetting
    save_text(layout.report, "\n".join(_lines(work, content, grouping, result)) + "\n")
    save_json(layout.numbers, content)
    return content


def _scores(work: Work, n_stages: int) -> dict[str, TaskScores]:
    layout = work.layout
    found = {BASE: load_scores(layout.base_scores)}
    probes: TaskScores = {}
    for name in work.names:
        if (path := layout.probe(name) / SCORES).is_file():
            probes |= load_scores(path)
    found |= {PROBE: probes} if probes else {}
    for number in range(1, n_stages + 1):
        found[f"stage {number}"] = load_scores(layout.stage(number) / SCORES)
        if work.run.fuse and number == n_stages // 2:
            found[FUSION] = load_scores(layout.fused / SCORES)
    return found | {END: load_scores(layout.final / SCORES)}


def _training(work: Work, n_stages: int) -> dict[str, dict[str, Any]]:
    """{step: what its training took}; a probe that was given took what is not known here."""
    layout = work.layout
    folders = {f"probe of {name}": layout.probe(name) for name in work.names if name not in work.probes}
    folders |= {f"stage {number}": layout.stage(number) for number in range(1, n_stages + 1)}
    return {step: _json(folder / TRAINING) for step, folder in folders.items() if (folder / TRAINING).is_file()}


def _core(work: Work, weights: Weights, name: str) -> list[dict[str, Any]]:
    """The shares of the roles."""
    report = core_report(Region.load(work.layout.region(name)), weights, work.run.include_embeddings)
    found: list[dict[str, Any]] = report.to_dict()["roles"]
    return found


def _rows(work: Work, name: str) -> dict[str, Any]:
    task = next(task for task in work.tasks if task.name == name)
    return {"train": len(task.train), "test": len(task.test), "held_out": task.held_out}


def _bytes(work: Work, n_stages: int) -> dict[str, int]:
    """{what: bytes of its files}."""
    layout = work.layout
    paths = {f"probes/{name}": layout.probe(name) for name in work.names if name not in work.probes}
    paths |= {f"regions/{name}": layout.region(name) for name in work.names}
    paths |= {f"stages/{number}": layout.stage(number) for number in range(1, n_stages + 1)}
    paths |= {path.name: path for path in (layout.fused, layout.final, layout.merged)}
    return {name: _size(path) for name, path in paths.items() if path.exists()}


def _size(path: Path) -> int:
    inside = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in inside if each.is_file())


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content)
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{path} is damaged ({error}): remove its folder, and the step is done again") from error


def _lines(work: Work, content: dict[str, Any], grouping: Grouping, result: IsolationResult) -> Iterable[str]:
    run = work.run
    yield f"# {content['method']} of {work.base}"
    yield ""
    steps = "groups in stages over a frozen base, with the core regions of earlier groups frozen"
    yield (
        f"{len(work.tasks)} tasks: {steps}"
        + ("; the probes fused; the groups again on a sample of each task." if run.fuse else ".")
    )
    yield from _section("Tasks")
    header = ["task", "train", "held out" if all(task.held_out for task in work.tasks) else "test", "core region"]
    sizes = dict(zip(grouping.tasks, grouping.sizes, strict=True))
    yield from _table(
        header,
        [
            [
                task.name,
                f"{len(task.train):,}",
                f"{len(task.test):,}" + ("" if header[2] == "held out" or not task.held_out else " (held out)"),
                f"{sizes[task.name]:,} of {work.total:,} scalars ({sizes[task.name] / work.total:.2%})",
            ]
            for task in work.tasks
        ],
    )
    if any(task.held_out for task in work.tasks):
        yield ""
        yield (
            f"Where no test part was given, {HELD_OUT_SHARE:.0%} of the rows are held out to score on: at least one, "
            f"at most {HELD_OUT_AT_MOST}."
        )
    yield from _section("Groups")
    yield from ("```", str(grouping), "```")
    for kind, title in ((LOSS, "Loss, nats a token of the held-out rows"), (MATCH, "Exact match, share of prompts")):
        if any(kind in scores for of_step in result.scores.values() for scores in of_step.values()):
            yield from _section(title)
            yield from _table(
                ["step", *work.names],
                [
                    [_titled(step, grouping), *(shown(s.get(name, {}).get(kind)) for name in work.names)]
                    for step, s in result.scores.items()
                ],
            )
    yield from _section("Forgetting")
    yield "The loss at the end less the task's lowest along the run (base included, its probe not), in nats a token."
    yield ""
    yield from _table(["task", "forgetting"], [[name, f"{n:+.4f}"] for name, n in result.forgetting.items()])
    yield from _section("Core regions by role")
    yield from _roles(content["cores"])
    if content["fusion"]:
        yield from _section("Fusion")
        yield from _fusion(content["fusion"])
    yield from _section("Compute")
    yield from _compute(content["training"], work, grouping)
    yield from _section("Files")
    yield from _table(["what", "size"], [[name, size_text(size)] for name, size in content["bytes"].items()])
    yield ""
    yield f"The final adapter, over the original base, is {size_text(_size(work.layout.final / WEIGHTS))}."
    yield "To teach it another task, call `next_stage` with the regions of all tasks so far as `frozen`: without it"
    yield "the core of the last group learns on."
    yield from _section("Settings")
    yield from ("```json", json.dumps(content["settings"], indent=1, ensure_ascii=False), "```")


def _fusion(fused: dict[str, Any]) -> Iterable[str]:
    rows = [
        [task, f"{omega:.3g}", f"{fused['transplanted'][task]:,}", f"{fused['won'][task]:,}"]
        for task, omega in zip(fused["tasks"], fused["omegas"], strict=True)
    ]
    yield from _table(["task", "ω", "transplanted", "of these in several cores"], rows)
    yield ""
    yield (
        f"{fused['conflicts']:,} scalars are in several cores. Outside of the cores each probe was folded "
        f"into each tensor: {fused['slerped']:,} times along the arc, {fused['linear']:,} linearly, "
        f"{fused['kept']:,} not at all."
    )


def _titled(step: str, grouping: Grouping) -> str:
    """A stage with the tasks that it trained; other steps as they are."""
    kind, _, number = step.partition(" ")
    if kind != "stage":
        return step
    return f"{step}: {', '.join(grouping.groups[(int(number) - 1) % len(grouping.groups)])}"


def _compute(training: dict[str, dict[str, Any]], work: Work, grouping: Grouping) -> Iterable[str]:
    header = ["step", "rows", "steps", "tokens", "mean loss", "seconds"]
    rows = [
        [
            _titled(step, grouping),
            f"{t['rows']:,}",
            f"{t['steps']:,}",
            f"{t['tokens']:,}",
            f"{t['loss']:.4f}",
            f"{t['seconds']:.1f}",
        ]
        for step, t in training.items()
    ]
    yield from _table(header, rows)
    probes = [record for step, record in training.items() if step.startswith("probe of ")]
    whole = sum(record["tokens"] for record in training.values())
    yield ""
    if probes:
        tokens = sum(record["tokens"] for record in probes)
        yield (
            f"The probes took {sum(record['steps'] for record in probes):,} steps and {tokens:,} tokens"
            + (f", {tokens / whole:.0%} of all." if whole else ".")
        )
    if work.probes:
        yield f"Trained elsewhere, at a cost that is not known here: the probes of {', '.join(work.probes)}."
    if work.run.score == "gradient":
        yield "The core regions are of gradients at the base: one pass over the rows of a probe, without a training."


def _roles(cores: dict[str, list[dict[str, Any]]]) -> Iterable[str]:
    """Roles × tasks: the share of the role's scalars that is core."""
    shares = {task: {row["name"]: row["share"] for row in roles} for task, roles in cores.items()}
    named = list(dict.fromkeys(role for of_task in shares.values() for role in of_task))
    yield "Share of each role's scalars that is in the task's core."
    yield ""
    yield from _table(
        ["role", *shares],
        [[role, *(f"{of_task.get(role, 0.0):.2%}" for of_task in shares.values())] for role in named],
    )


def _section(title: str) -> tuple[str, ...]:
    return "", f"## {title}", ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    """A table in Markdown."""
    for row in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
