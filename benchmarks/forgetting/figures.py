"""The figures of the report, each one question; a hollow mark is a run, or has one, that never learned enough.

Needs matplotlib. A figure that has nothing to show yet is not drawn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from abilities import TASKS
from arms import Arm
from comparisons import Judged, Setting, reference
from outcomes import Row
from protocol import ALPHAS, ANCHORS, FAMILIES, PEERS, UPPER_BOUND
from tables import developing, dialled

FORGETTING = "forgetting at 95 %, points"
COLOURS = {**{family: f"C{i}" for i, family in enumerate(FAMILIES)}, "peers": "C5", UPPER_BOUND: "C7", "other": "0.6"}


def family_of(arm: str) -> str:
    """Which colour an arm has."""
    method = Arm.named(arm).method
    kind = {"peers": PEERS, UPPER_BOUND: (UPPER_BOUND,)}
    return next((name for name, arms in {**FAMILIES, **kind}.items() if method in arms), "other")


def _panels(count: int, width: float, height: float) -> tuple[Any, Sequence[Any]]:
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), squeeze=False, sharey=True)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> None:
    """Beside and renamed; without what would differ from one time to the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    beside = path.with_suffix(".part")
    figure.savefig(beside, dpi=80, format="png", metadata={"Software": None})
    plt.close(figure)
    os.replace(beside, path)


def _marks(axis: Any, xs: Sequence[float], ys: Sequence[float], rows: Sequence[Row], colour: str) -> None:
    """A mark a row, hollow where the task was not learned."""
    for whole in (True, False):
        places = [(x, y) for x, y, row in zip(xs, ys, rows, strict=True) if bool(row["reached"]) == whole]
        if places:
            axis.plot(*zip(*places, strict=True), "o", color=colour, ms=4, mfc=colour if whole else "white")


def _legend(axis: Any, names: Sequence[str]) -> None:
    for name in names:
        axis.plot([], [], "o", color=COLOURS[name], label=name)
    axis.legend(fontsize=7, frameon=False)


def by_arm(judged: Judged, settings: Sequence[Setting], path: Path) -> bool:
    """Forgetting of every setting on each task, with 95 % intervals over bases and seeds."""
    tasks = [task for task in TASKS if any(judged.rows(setting, task) for setting in settings)]
    if not tasks:
        return False
    figure, axes = _panels(len(tasks), 3.4, 0.8 + 0.24 * len(settings))
    for task, axis in zip(tasks, axes, strict=True):
        for place, setting in enumerate(settings):
            rows = judged.rows(setting, task)
            if not rows:
                continue
            colour = COLOURS[family_of(setting.arm)]
            found = judged.forgetting(setting, task)
            axis.plot([found.low, found.high], [place, place], color=colour)
            whole = all(row["reached"] for row in rows)
            axis.plot(found.value, place, "o", color=colour, markerfacecolor=colour if whole else "white")
            if setting == reference(judged.frozen):
                axis.axvline(found.value, color="0.8", linewidth=0.8, zorder=0)
                axis.axvline(found.value / 2, color="0.8", linewidth=0.8, linestyle=":", zorder=0)
        axis.set(title=f"task {task}", xlabel=FORGETTING)
    axes[0].set_yticks(range(len(settings)), [setting.name for setting in settings], fontsize=8)
    axes[0].invert_yaxis()
    _save(figure, path)
    return True


def by_rate(rows: Sequence[Row], path: Path) -> bool:
    """Forgetting against the learning rate: one panel a family, a line a variant, one seed to choose by."""
    tried = [row for row in developing(rows) if row["alpha"] == 1.0]
    shown = {family: {arm: sorted((r for r in tried if r["arm"] == arm), key=lambda r: float(r["rate"]))
                      for arm in arms} for family, arms in {**FAMILIES, "peers": PEERS}.items()}  # fmt: skip
    shown = {family: arms for family, arms in shown.items() if any(arms.values())}
    if not shown:
        return False
    figure, axes = _panels(len(shown), 2.3, 2.9)
    for (family, arms), axis in zip(shown.items(), axes, strict=True):
        for i, (arm, line) in enumerate(arms.items()):
            if line:
                xs, ys = ([float(row[name]) for row in line] for name in ("rate", "forgetting"))
                axis.plot(xs, ys, color=f"C{i}", linewidth=0.8, label=arm)
                _marks(axis, xs, ys, line, f"C{i}")
        axis.set(title=family, xscale="log", xlabel="learning rate")
        axis.set_xticks([], minor=True)
        axis.legend(fontsize=6, frameon=False)
    axes[0].set_ylabel(FORGETTING)
    _save(figure, path)
    return True


def by_dial(rows: Sequence[Row], variants: Mapping[str, str], path: Path) -> bool:
    """Region × anchor × dial: one panel a family, a line an anchor, along α."""
    lines: dict[str, dict[str, list[Row]]] = {}
    for family, variant in variants.items():
        found = dialled(rows, variant)
        for anchor in ANCHORS:
            line = [found[anchor, alpha] for alpha in ALPHAS if (anchor, alpha) in found]
            if len(line) > 1:
                lines.setdefault(family, {})[anchor] = line
    if not lines:
        return False
    figure, axes = _panels(len(lines), 2.3, 2.9)
    for (family, anchors), axis in zip(lines.items(), axes, strict=True):
        for anchor, line in anchors.items():
            colour = f"C{ANCHORS.index(anchor)}"
            xs, ys = ([float(row[name]) for row in line] for name in ("alpha", "forgetting"))
            axis.plot(xs, ys, color=colour, linewidth=0.8, label=anchor)
            _marks(axis, xs, ys, line, colour)
        axis.set(title=f"{family}: {variants[family]}" if family != variants[family] else family, xlabel="α")
        axis.title.set_size(8)
    axes[0].set_ylabel(FORGETTING)
    axes[-1].legend(fontsize=6, frameon=False)
    _save(figure, path)
    return True


def by_divergence(judged: Judged, path: Path) -> bool:
    """Forgetting against KL from the base on the new task: a mark a judged run."""
    rows = {task: [r for r in judged.seen(task) if r["alpha"] == 1.0 and r["kl"] != ""] for task in TASKS}
    rows = {task: same for task, same in rows.items() if same}
    if not rows:
        return False
    figure, axes = _panels(len(rows), 3.2, 3.0)
    for (task, same), axis in zip(rows.items(), axes, strict=True):
        for family, colour in COLOURS.items():
            alike = [row for row in same if family_of(str(row["arm"])) == family]
            xs, ys = ([float(row[name]) for row in alike] for name in ("kl", "forgetting"))
            _marks(axis, xs, ys, alike, colour)
        axis.set(title=f"task {task}", xlabel="KL on the new task, nats")
    axes[0].set_ylabel(FORGETTING)
    _legend(
        axes[-1], [name for name in COLOURS if any(family_of(str(r["arm"])) == name for s in rows.values() for r in s)]
    )
    _save(figure, path)
    return True
