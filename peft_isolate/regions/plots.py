"""Pictures of what was trained, and of how far it moved. matplotlib is an extra: imported when a picture is drawn."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import IsolateError
from .files import write_whole
from .roles import ROLES

# Cells with a number written in them need height for it; pictures with more rows shrink their cells instead.
_NUMBERED_ROWS = 40
# The same of a matrix of names, whose cells are as wide as they are high.
_NUMBERED_COLUMNS = 24
# Distance between the last layer and the row of what stands outside the layers, in cells.
_GAP = 0.5


def plot_trained_share(
    shares: Mapping[tuple[int | None, str], float], path: str | os.PathLike[str], title: str = "Trained share"
) -> None:
    """Draw which share of every layer's parameters, by role, is trained.

    Args:
        shares: trained share, 0 to 1, for (layer, role); layer None for what stands outside the layers. A pair that is
            left out is drawn hatched: the model has no such parameter.
        path: the picture; its ending chooses the format (png, svg, pdf). Missing folders are made. An existing file is
            replaced only by a finished picture.
        title: written above.

    Raises:
        IsolateError: where `shares` is empty or holds something other than a share, or the ending is of no format
            that matplotlib writes.
        ImportError: without matplotlib.
    """
    if not shares:
        raise IsolateError("no shares to draw: the mapping is empty; pass at least one (layer, role): share")
    for key, share in shares.items():
        if not 0.0 <= share <= 1.0:  # also refuses NaN
            raise IsolateError(f"the share of {key} is {share}: a trained share lies between 0 and 1")
    _draw(shares, path, title, 1.0, _short)


def plot_magnitudes(
    magnitudes: Mapping[tuple[int | None, str], float],
    path: str | os.PathLike[str],
    title: str = "Root mean square of Δ",
) -> None:
    """Draw how far the scalars of every layer moved, by role: the darkest cell is the largest.

    Args:
        magnitudes: 0 or more, for (layer, role), as for `plot_trained_share`.
        path: the picture, likewise.
        title: written above.

    Raises:
        IsolateError: where `magnitudes` is empty or holds something other than a magnitude, or the ending is of no
            format that matplotlib writes.
        ImportError: without matplotlib.
    """
    if not magnitudes:
        raise IsolateError("no magnitudes to draw: the mapping is empty; pass at least one (layer, role): magnitude")
    for key, magnitude in magnitudes.items():
        if not 0.0 <= magnitude < math.inf:  # also refuses NaN
            raise IsolateError(f"the magnitude of {key} is {magnitude}: it is a finite number from 0 up")
    _draw(magnitudes, path, title, max(magnitudes.values()) or 1.0, magnitude_text)


def plot_similarity(
    similarity: Sequence[Sequence[float]],
    names: Sequence[str],
    path: str | os.PathLike[str],
    title: str,
    blocks: Sequence[int],
    marks: Mapping[str, float] | None = None,
) -> None:
    """Draw how similar things are, each with each, and outline the blocks that they form.

    The scale goes up to the largest value off the diagonal, and of `marks`; the diagonal itself is left white.

    Args:
        similarity: n × n numbers from 0 to 1, symmetric, block by block.
        names: n, of the rows and columns.
        path: the picture; its ending chooses the format (png, svg, pdf). Missing folders are made. An existing file is
            replaced only by a finished picture.
        title: written above.
        blocks: how many rows each block has, from the top; n in all.
        marks: values to be marked beside the scale, by what is written there.

    Raises:
        IsolateError: where the ending is of no format that matplotlib writes.
        ImportError: without matplotlib.
    """
    picture_format(path)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    n, marks = len(names), marks or {}
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    largest = max([similarity[i][j] for i, j in pairs] + list(marks.values()), default=0.0) or 1.0
    numbered = n <= _NUMBERED_COLUMNS
    cell = 0.55 if numbered else max(0.16, 10.0 / n)
    # Inches around the cells: title above, names left and below, the scale and its marks right.
    longest = max(map(len, names))
    side = n * cell
    above, below, left, right = 0.6, 0.3 + 0.075 * longest, 0.3 + 0.085 * longest, 1.9
    total_height, total_width = max(side, 1.5) + above + below, max(side + left + right, left + 0.1 * len(title))
    figure = Figure(figsize=(total_width, total_height), dpi=150, facecolor="white")
    bottom = total_height - above - side
    axes = figure.add_axes((left / total_width, bottom / total_height, side / total_width, side / total_height))
    shades = colour_map()
    for i, j in pairs:
        value = similarity[i][j]
        colour = shades(value / largest)
        axes.add_patch(
            Rectangle((j, i), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.2 if numbered else 0.6)
        )
        if numbered:
            ink = "white" if value / largest > 0.55 else "#333333"
            axes.text(j + 0.5, i + 0.5, _three_digits(value), ha="center", va="center", fontsize=8, color=ink)
    start = 0
    for length in blocks:
        outline = Rectangle(
            (start, start), length, length, fill=False, edgecolor="#c2410c", linewidth=2, clip_on=False
        )
        axes.add_patch(outline)
        start += length

    axes.set_xlim(0, n)
    axes.set_ylim(n, 0)
    axes.set_xticks([i + 0.5 for i in range(n)], names, fontsize=9, rotation=90)
    axes.set_yticks([i + 0.5 for i in range(n)], names, fontsize=9)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.text(left / total_width, 1 - 0.28 / total_height, title, fontsize=11, weight="bold", va="center")

    height = max(min(side, 2.6), 1.0)
    bar_axes = figure.add_axes(
        (
            (left + side + 0.25) / total_width,
            (total_height - above - height) / total_height,
            0.14 / total_width,
            height / total_height,
        )
    )
    bar = figure.colorbar(ScalarMappable(Normalize(0.0, largest), shades), cax=bar_axes)
    ticks = _apart({value: f"{value:.2g} {text}" for text, value in marks.items()}, 0.08 * largest)
    ends = [end for end in (0.0, largest) if all(abs(end - tick) > 0.08 * largest for tick in ticks)]
    bar.set_ticks([*ticks, *ends], labels=[*ticks.values(), *(f"{end:.2g}" for end in ends)])
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)
    save_figure(figure, path)


def sorted_roles(values: Mapping[tuple[int | None, str], Any]) -> list[str]:
    """The roles of (layer, role), those that are known first, in their own order."""
    present = {role for _, role in values}
    return [role for role in ROLES if role in present] + sorted(present.difference(ROLES))


def _draw(
    values: Mapping[tuple[int | None, str], float],
    path: str | os.PathLike[str],
    title: str,
    largest: float,
    text: Callable[[float], str],
) -> None:
    """Cells of layers × roles, whose colours go from 0 to `largest`, with the scale beside them."""
    picture_format(path)
    from matplotlib.figure import Figure

    layers = sorted({layer for layer, _ in values if layer is not None})
    rows: list[int | None] = [*layers, None] if any(layer is None for layer, _ in values) else [*layers]
    roles = sorted_roles(values)
    # From the top downwards; the row outside the layers is set apart.
    tops = [float(i) for i in range(len(rows))]
    if rows[-1] is None and layers:
        tops[-1] += _GAP

    numbered = len(rows) <= _NUMBERED_ROWS
    cell = 0.34 if numbered else max(0.13, 13.0 / len(rows))
    height, width = (tops[-1] + 1) * cell, len(roles) * 0.78
    # Inches around the cells: title and role names above, layer numbers left, colour bar right.
    above, below, left, right = 0.8, 0.2, 1.0, 1.0
    total_height, total_width = height + above + below, max(width + left + right, left + 0.1 * len(title))
    # A Figure of its own: pyplot keeps a global list of figures and picks a backend for the whole process.
    figure = Figure(figsize=(total_width, total_height), dpi=150, facecolor="white")
    axes = figure.add_axes(
        (left / total_width, below / total_height, width / total_width, height / total_height), facecolor="none"
    )
    colours = _draw_cells(axes, values, rows, roles, tops, largest, text if numbered else None)

    axes.set_xlim(0, len(roles))
    axes.set_ylim(tops[-1] + 1, 0)
    axes.xaxis.tick_top()
    axes.set_xticks([i + 0.5 for i in range(len(roles))], roles, fontsize=9)
    step = 1 if numbered else 4 if len(rows) <= 100 else 10
    marked = [i for i, layer in enumerate(rows) if layer is None or layer % step == 0]
    names = ["outside" if rows[i] is None else str(rows[i]) for i in marked]
    axes.set_yticks([tops[i] + 0.5 for i in marked], names, fontsize=9 if numbered else 8)
    axes.tick_params(length=0)
    if layers:
        axes.set_ylabel("layer", fontsize=9, color="#444444")
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.text(left / total_width, 1 - 0.28 / total_height, title, fontsize=11, weight="bold", va="center")

    # As tall as the cells up to a hand's height: a bar along 80 layers reads no better.
    bar_height = min(height, 2.6)
    bar_axes = figure.add_axes(
        (
            (left + width + 0.25) / total_width,
            (below + height - bar_height) / total_height,
            0.14 / total_width,
            bar_height / total_height,
        )
    )
    bar = figure.colorbar(colours, cax=bar_axes)
    ticks = [largest * part for part in ((0.0, 0.25, 0.5, 0.75, 1.0) if bar_height > 1 else (0.0, 1.0))]
    bar.set_ticks(ticks, labels=[text(tick) for tick in ticks])
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    save_figure(figure, path)


def picture_format(path: str | os.PathLike[str]) -> str:
    """The format that a picture's ending chooses, "png" without one. Asked before drawing, or before the work for it.

    Raises:
        ImportError: without matplotlib.
        IsolateError: matplotlib writes no such format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib, which is not installed: pip install 'peft_isolate[plots]'"
        ) from error
    ending = Path(path).suffix.removeprefix(".").lower() or "png"
    if ending not in Figure().canvas.get_supported_filetypes():
        raise IsolateError(f"{os.fspath(path)!r}: matplotlib writes no {ending!r}; use .png, .svg or .pdf")
    return ending


def colour_map() -> Any:
    """Of every picture here. Zero stays visible beside the white paper, and lightness alone tells the values apart:
    colour-blind and in print.
    """
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("share", ["#eef1f5", "#9cc0e0", "#3f7fbf", "#12335f"])


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure, whole or not at all, in the format of its ending. Missing folders are made."""
    picture, path = picture_format(path), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda beside: figure.savefig(beside, format=picture))


def _draw_cells(
    axes: Any,
    values: Mapping[tuple[int | None, str], float],
    rows: list[int | None],
    roles: list[str],
    tops: list[float],
    largest: float,
    text: Callable[[float], str] | None,
) -> Any:
    """Draw one rectangle for every layer and role, numbered by `text`; returns the colour scale."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    shades = colour_map()
    colours = ScalarMappable(Normalize(0.0, largest), shades)
    line = 1.2 if text else 0.6
    # The hatching lies under the cells in one piece, so that it runs through where several are missing.
    inside = sum(layer is not None for layer in rows)
    for top, height in ((0.0, inside), (tops[-1], len(rows) - inside)):
        axes.add_patch(
            Rectangle(
                (0, top),
                len(roles),
                height,
                facecolor="white",
                edgecolor="#d5d5d5",
                hatch="////",
                linewidth=0,
                zorder=0,
            )
        )
    for layer, top in zip(rows, tops, strict=True):
        for column, role in enumerate(roles):
            value = values.get((layer, role))
            if value is None:
                continue
            share = value / largest
            axes.add_patch(Rectangle((column, top), 1, 1, facecolor=shades(share), edgecolor="white", linewidth=line))
            if text:
                axes.text(
                    column + 0.5,
                    top + 0.5,
                    text(value),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if share > 0.55 else "#333333",
                )
    return colours


def _apart(ticks: Mapping[float, str], distance: float) -> dict[float, str]:
    """Ticks of which none are nearer than that: those that are share a label."""
    apart: dict[float, str] = {}
    for value, text in sorted(ticks.items()):
        near = next((other for other in apart if value - other <= distance), None)
        apart[value if near is None else near] = text if near is None else f"{apart[near]}, {text}"
    return apart


def _three_digits(share: float) -> str:
    """A share in thousandths; neither 0 nor 1 unless it is exactly that."""
    if share in (0.0, 1.0):
        return "0" if share == 0.0 else "1"
    text = f"{share:.3f}".removeprefix("0")
    return {".000": "<.001", "1.000": ">.999"}.get(text, text)


def _short(share: float) -> str:
    """A share in few letters; neither 0 nor 100 % unless it is exactly that."""
    if share in (0.0, 1.0):
        return "0" if share == 0.0 else "1"
    if share < 0.01:
        return "<.01"
    if share >= 0.995:
        return ">.99"
    return f"{math.floor(share * 100 + 0.5) / 100:.2f}".removeprefix("0")


def magnitude_text(magnitude: float) -> str:
    """A magnitude in two digits, such as "1.2e-4"; "0" only where it is that; "nan" and "inf" as they are."""
    if magnitude == 0.0 or not math.isfinite(magnitude):
        return f"{magnitude:.0f}"
    digits, _, exponent = f"{magnitude:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"
