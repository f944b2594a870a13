"""The pictures of a search. matplotlib is an extra: it is imported when a picture is drawn, not before."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ....regions.plots import colour_map, picture_format, save_figure
from .result import SearchResult, Trial, modules_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches: a node of the tree, the way from one to the next, a cell of a heat map, the margins.
_NODE, _STEP, _CELL = (1.42, 0.66), (1.6, 1.2), (0.82, 0.36)
_LEFT, _TOP, _BETWEEN, _FOOT = 1.15, 0.5, 0.5, 0.7
_PATH, _INK, _PALE = "#d9731a", "#333333", "#9aa3ad"
_NOTE = (
    "Framed: chosen. Darker: a higher metric. Dashed: below the floor of speciality. Hatched: failed, or not tried.\n"
    "One short training per node: differences within the noise of a seed say nothing. Why a region is the best one\n"
    'cannot be read off here: the paper itself offers no more than "a speculative insight into the information\n'
    'forwarding process in LLMs" (arXiv 2404.10306, abstract).'
)


def plot_search(result: SearchResult, path: str | os.PathLike[str]) -> None:
    """Draw the tree of trials with both scores at each node and the path taken marked, and below it both scores by
    range and modules.

    A darker node has a higher metric; one with a dashed edge did not reach the floor of speciality; a hatched one
    failed. Hatched fields of the maps were not tried.

    The caption quotes the abstract on how information flows through the layers: a speculation, by its own word.

    Args:
        result: What to draw.
        path: The picture; its ending chooses the format (png, svg, pdf). Missing folders are made. An existing file is
            replaced only by a finished picture.

    Raises:
        ImportError: Without matplotlib.
        IsolateError: The ending is of no format that matplotlib writes.
    """
    picture_format(path)
    from matplotlib.figure import Figure

    ranges = sorted({trial.layer_range for trial in result.trials}, key=lambda pair: (pair[0] - pair[1], pair))
    modules = list(dict.fromkeys(trial.modules for trial in result.trials))
    most = max(len(choice.compared) for choice in result.path)
    tree = most * _STEP[0], len(result.path) * _STEP[1]
    cells = len(modules) * _CELL[0], len(ranges) * _CELL[1]
    width = max(_LEFT + tree[0] + 0.2, 2 * (_LEFT + cells[0]) + 0.2, 7.0)
    height = _TOP + tree[1] + _BETWEEN + cells[1] + _FOOT
    # A Figure of its own: pyplot keeps a global list of figures and picks a backend for the whole process.
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")

    def panel(left: float, bottom: float, size: tuple[float, float]) -> Axes:
        axes = figure.add_axes((left / width, bottom / height, size[0] / width, size[1] / height), facecolor="none")
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0)
        return axes

    axes = panel(_LEFT, _FOOT + cells[1] + _BETWEEN, (width - _LEFT - 0.2, tree[1]))
    _draw_tree(axes, result, width - _LEFT - 0.2)
    for i, score in enumerate(("speciality", "versatility")):
        left = _LEFT + i * max(width / 2, _LEFT + cells[0])
        _draw_map(panel(left, _FOOT, cells), result, score, ranges, modules)
    title = f"Search by {result.metric}: speciality S and versatility V of every trial"
    figure.text(0.15 / width, 1 - 0.22 / height, title, fontsize=11, weight="bold", va="center", color=_INK)
    figure.text(0.15 / width, 0.12 / height, _NOTE, fontsize=7.5, va="bottom", color="#555555")
    save_figure(figure, path)


def _shade(value: float, among: list[float]) -> float:
    """Where a value lies among others, 0 to 1; the middle where all are equal."""
    low, high = min(among), max(among)
    return (value - low) / (high - low) if high > low else 0.5


def _draw_tree(axes: Axes, result: SearchResult, across: float) -> None:
    """Levels from the top down, in inches; the chosen node is joined to the level below it."""
    from matplotlib.patches import FancyBboxPatch

    colours, metrics = colour_map(), [t.metric for t in result.trials if t.metric is not None]
    axes.set_xlim(0, across)
    axes.set_ylim(len(result.path) * _STEP[1], 0)
    axes.set_xticks([])
    tops = [row * _STEP[1] + 0.15 for row in range(len(result.path))]
    axes.set_yticks([top + _NODE[1] / 2 for top in tops], [choice.level for choice in result.path], fontsize=9)
    parent: float | None = None
    for row, (choice, top) in enumerate(zip(result.path, tops, strict=True)):
        start = (across - len(choice.compared) * _STEP[0]) / 2
        centres = [start + (i + 0.5) * _STEP[0] for i in range(len(choice.compared))]
        for index, x in zip(choice.compared, centres, strict=True):
            trial, chosen = result.trials[index], index == choice.chosen
            if parent is not None:
                colour, width, order = (_PATH, 2.2, 1) if chosen else (_PALE, 0.9, 0)
                way = [parent, x], [tops[row - 1] + _NODE[1], top]
                axes.plot(*way, color=colour, linewidth=width, zorder=order)
            shade = None if trial.metric is None else _shade(trial.metric, metrics)
            box = FancyBboxPatch(
                (x - _NODE[0] / 2, top),
                *_NODE,
                boxstyle="round,pad=0,rounding_size=0.07",
                facecolor="white" if shade is None else colours(shade),
                edgecolor=_PATH if chosen else _PALE,
                linewidth=2.2 if chosen else 0.8,
                linestyle="-" if result.is_eligible(trial) or shade is None else "--",
                hatch="////" if shade is None else None,
                zorder=2,
            )
            axes.add_patch(box)
            axes.text(
                x, top + _NODE[1] / 2, _node_text(trial), ha="center", va="center", fontsize=8, zorder=3,
                color="white" if shade is not None and shade > 0.55 else _INK,
                weight="bold" if chosen else "normal",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1} if shade is None else None,
            )  # fmt: skip
        parent = centres[choice.compared.index(choice.chosen)]


def _node_text(trial: Trial) -> str:
    name = f"{trial.modules_name} {trial.range_name}"
    if trial.speciality is None or trial.versatility is None:
        return f"{name}\nfailed"
    return f"{name}\nS {trial.speciality:.3f}   V {trial.versatility:.3f}"


def _draw_map(axes: Axes, result: SearchResult, score: str, ranges: list[Any], modules: list[Any]) -> None:
    """One score, ranges downwards from the widest, modules to the right; the best trial is framed."""
    from matplotlib.patches import Rectangle

    colours = colour_map()
    values = {(t.layer_range, t.modules): getattr(t, score) for t in result.trials if t.speciality is not None}
    best = result.trials[result.path[-1].chosen]
    axes.add_patch(
        Rectangle((0, 0), len(modules), len(ranges), facecolor="white", edgecolor="#d5d5d5", hatch="////", linewidth=0)
    )
    for (pair, roles), value in values.items():
        corner, shade = (modules.index(roles), ranges.index(pair)), _shade(value, list(values.values()))
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=colours(shade), edgecolor="white", linewidth=1.2))
        axes.text(
            corner[0] + 0.5, corner[1] + 0.5, f"{value:.3f}", ha="center", va="center", fontsize=8,
            color="white" if shade > 0.55 else _INK,
        )  # fmt: skip
    frame = (modules.index(best.modules), ranges.index(best.layer_range))
    axes.add_patch(Rectangle(frame, 1, 1, fill=False, edgecolor=_PATH, linewidth=2.2, clip_on=False, zorder=3))
    axes.set_xlim(0, len(modules))
    axes.set_ylim(len(ranges), 0)
    axes.xaxis.tick_top()
    axes.set_xticks([i + 0.5 for i in range(len(modules))], [modules_name(roles) for roles in modules], fontsize=9)
    names = {trial.layer_range: trial.range_name for trial in result.trials}
    axes.set_yticks([i + 0.5 for i in range(len(ranges))], [names[pair] for pair in ranges], fontsize=9)
    axes.set_title(score, fontsize=10, loc="left", color=_INK)
