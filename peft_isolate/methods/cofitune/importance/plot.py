"""The picture of an importance: layers × units, each layer's units sorted, one panel a kind."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from ....regions.plots import colour_map, picture_format, save_figure
from .sites import KINDS, number

if TYPE_CHECKING:
    from .importance import Importance

# Columns of a row: more units than that are averaged, fewer are drawn as steps.
_COLUMNS = 512
_TITLES = {"up": "up: output units", "down": "down: output units", "heads": "attention heads"}
# Blocks of a kind that has several.
_SHOWN = {"feed-forward": "", "attention": "", "expert": "experts"}


def plot_importance(importance: Importance, path: str | os.PathLike[str]) -> None:
    """Draw which share of every layer's units matters how much.

    A row is a layer; where a model has several stacks or blocks of a kind, each of their layers has a row of its own.
    A layer's experts are drawn together. Each row is sorted, the most important units left.

    Args:
        importance: What to draw.
        path: The picture; its ending chooses the format (png, svg, pdf). Missing folders are made. An existing file is
            replaced only by a finished picture.

    Raises:
        ImportError: Without matplotlib.
        IsolateError: The ending is of no format that matplotlib writes.
    """
    picture_format(path)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    panels = {kind: rows for kind in KINDS if (rows := _rows(importance, kind))}
    most = max(len(rows) for rows in panels.values())
    shades = colour_map()
    colours = ScalarMappable(Normalize(0.0, 1.0), shades)
    cell = min(0.3, max(0.1, 13.0 / most))
    # Inches: the labels of each panel left of it, titles above, the colour bar right.
    lefts = [0.5 + 0.075 * max(len(label) for label, _ in rows) for rows in panels.values()]
    above, below, right, width = 0.85, 0.5, 0.95, 2.6
    total_height = above + most * cell + below
    total_width = sum(lefts) + len(panels) * width + right
    figure = Figure(figsize=(total_width, total_height), dpi=150, facecolor="white")
    for i, (kind, rows) in enumerate(panels.items()):
        x, height = sum(lefts[: i + 1]) + i * width, len(rows) * cell
        axes = figure.add_axes(
            (x / total_width, 1 - (above + height) / total_height, width / total_width, height / total_height)
        )
        picture = np.stack([_columns(values) for _, values in rows])
        axes.imshow(
            picture,
            cmap=shades,
            norm=Normalize(0.0, 1.0),
            extent=(0, 1, len(rows), 0),
            aspect="auto",
            interpolation="none",
        )
        _name(axes, [label for label, _ in rows], _TITLES[kind], first=i == 0)
    measured = f"{number(importance.batches, 'batch', 'es')}, {number(importance.tokens, 'token')}"
    title = f"Importance ({importance.method}; {measured})"
    figure.text(lefts[0] / total_width, 1 - 0.28 / total_height, title, fontsize=11, weight="bold", va="center")
    bar_height = min(most * cell, 2.6)
    bar = figure.colorbar(
        colours,
        cax=figure.add_axes(
            (
                (total_width - right + 0.25) / total_width,
                1 - (above + bar_height) / total_height,
                0.14 / total_width,
                bar_height / total_height,
            )
        ),
    )
    bar.set_ticks([0.0, 0.5, 1.0], labels=["0", "0.5", "1"])
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    save_figure(figure, path)


def _rows(importance: Importance, kind: str) -> list[tuple[str, np.ndarray]]:
    """(label, values (n,), the largest first) of every layer, top to bottom."""
    places = [(key, *key.rsplit(".", 3)) for key in importance.units if key.endswith(f".{kind}")]
    stacks, blocks = (list(dict.fromkeys(place[i] for place in places)) for i in (1, 3))
    places.sort(key=lambda place: (stacks.index(place[1]), blocks.index(place[3]), int(place[2])))
    # Only what tells the stacks apart: "encoder.block" and "decoder.block" are "encoder" and "decoder".
    names = {
        stack: next((p for p in stack.split(".") if any(p not in s.split(".") for s in stacks)), "")
        for stack in stacks
    }
    rows = []
    for key, stack, layer, block, _ in places:
        shown = [names[stack], _SHOWN.get(block, block) if len(blocks) > 1 else "", layer]
        rows.append((" ".join(part for part in shown if part), np.sort(importance.units[key].flatten().numpy())[::-1]))
    return rows


def _columns(values: np.ndarray) -> np.ndarray:
    """`_COLUMNS` values: means of neighbours where there are more, and steps where there are fewer."""
    if len(values) >= _COLUMNS:
        return np.array([part.mean() for part in np.array_split(values, _COLUMNS)])
    return values[np.arange(_COLUMNS) * len(values) // _COLUMNS]


def _name(axes: Any, labels: list[str], title: str, first: bool) -> None:
    """Name a panel's rows and axes."""
    step = 1 if len(labels) <= 40 else 4 if len(labels) <= 100 else 10
    axes.set_yticks([i + 0.5 for i in range(0, len(labels), step)], labels[::step], fontsize=8)
    axes.set_xticks([0.0, 0.5, 1.0], ["0", "50 %", "100 %"], fontsize=8)
    axes.set_xlabel("units, sorted", fontsize=8, color="#444444")
    axes.set_title(title, fontsize=9, pad=6)
    if first:
        axes.set_ylabel("layer", fontsize=9, color="#444444")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
