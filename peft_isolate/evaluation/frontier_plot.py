"""The picture of a frontier. matplotlib is an extra: it is imported when a picture is drawn, not before."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..regions.plots import picture_format, save_figure
from .frontier import Frontier, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart in print and by the colour-blind (Okabe and Ito); with more settings they come again, with other marks.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P")
_INK = "#333333"


def plot_frontier(frontier: Frontier, path: str | os.PathLike[str]) -> None:
    """Draw both scores over α, and beside it versatility over speciality, with a line for each setting of the changes.

    Solid is speciality, dashed versatility. On the right the ends of each line carry their α, and a ring marks the
    points of which no other is as good on both scores and better on one.

    Args:
        frontier: What to draw.
        path: The picture, in the format of its ending, written whole or not at all: see `save_figure`.

    Raises:
        ImportError, IsolateError: As `picture_format` does, before anything is drawn.
    """
    picture_format(path)
    from matplotlib.figure import Figure

    lines = _lines(frontier)
    # The legend stands below: a line each, three beside one another.
    below = 0.28 * (1 + (len(lines) - 1) // 3) if len(lines) > 1 else 0.0
    # A Figure of its own: pyplot keeps a global list of figures and picks a backend for the whole process.
    figure = Figure(figsize=(9.6, 4.2 + below), dpi=150, facecolor="white", layout="constrained")
    over_alpha, over_speciality = figure.subplots(1, 2)
    labelled: list[tuple[float, float]] = []
    handles: list[Any] = []
    for i, points in enumerate(lines.values()):
        style = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKS[i // len(_COLOURS) % len(_MARKS)]}
        alphas, special, versatile = zip(*((p.alpha, p.speciality, p.versatility) for p in points), strict=True)
        handles += over_alpha.plot(alphas, special, markersize=4, **style)
        over_alpha.plot(alphas, versatile, linestyle="--", markersize=4, **style)
        over_speciality.plot(special, versatile, markersize=4, linewidth=1.0, **style)
        for end in (points[0], points[-1]):
            if (at := (end.speciality, end.versatility)) not in labelled:
                labelled.append(at)
                over_speciality.annotate(
                    f"α = {end.alpha:g}", at, xytext=(5, 5), textcoords="offset points", fontsize=7.5, color=_INK
                )
        chosen = [(p.speciality, p.versatility) for p in points if frontier.is_best_of_both(p)]
        if chosen:
            over_speciality.plot(
                *zip(*chosen, strict=True), "o", markersize=9, markerfacecolor="none", markeredgecolor=style["color"]
            )
    _name(over_alpha, "Solid: speciality (new task). Dashed: versatility (old ability)", "α", "score")
    _name(over_speciality, "Ringed: no point is better on both", "speciality", "versatility")
    if len(lines) > 1:
        # matplotlib may leave out a label that begins with "_", and reads one with two "$" as a formula.
        legend = figure.legend(
            handles, ["setting"] * len(lines), loc="outside lower center", ncols=min(3, len(lines)), fontsize=8,
            frameon=False,
        )  # fmt: skip
        for text, name in zip(legend.get_texts(), lines, strict=True):
            text.set_parse_math(False)
            text.set_text(name)
    save_figure(figure, path)


def _lines(frontier: Frontier) -> dict[str, list[Point]]:
    """{setting of the changes: its points, by α}."""
    found: dict[str, list[Point]] = {}
    for point in frontier.points:
        acting = [f"{name} {value}" for name, value in point.changes.items() if value is not None]
        found.setdefault(", ".join(acting) or "unchanged", []).append(point)
    return {name: sorted(points, key=lambda point: point.alpha) for name, points in found.items()}


def _name(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9, loc="left", color=_INK)
    axes.set_xlabel(x, fontsize=9, color=_INK)
    axes.set_ylabel(y, fontsize=9, color=_INK)
    axes.tick_params(labelsize=8, length=0)
    axes.grid(color="#e6e8eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(0.08)
    for spine in axes.spines.values():
        spine.set_visible(False)
