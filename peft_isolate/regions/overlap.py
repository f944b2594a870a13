"""How many scalars regions have in common, each with each: one parameter of all regions at a time, nothing kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import RegionError
from .region import Region
from .selection import matrix_shape
from .stored import BY_ELEMENTS, Place, StoredSelection

Counts = np.ndarray[Any, np.dtype[np.int64]]
Positions = np.ndarray[Any, np.dtype[Any]]

DENSE = 0.003
"""Share of a tensor, on average of its regions, from which bit masks beat sorted lists: `benchmarks/jaccard.py`."""

WINDOW = 2**20
"""Scalars that are put into a mask at once, and BLOCK words of masks compared at once: they stay in a core's cache."""
BLOCK = 2**13


def overlaps(regions: Sequence[Region]) -> Counts:
    """The numbers of scalars that are in two regions.

    Takes a bit for each region and scalar of the largest tensor, beside the regions themselves, which may be packed.

    Args:
        regions: n regions of one model.

    Returns:
        int64 (n, n), symmetric: |A_i ∩ A_j|; on the diagonal |A_i|.

    Raises:
        RegionError: A parameter has different shapes in two of them.

    Example:
        >>> from peft_isolate.regions import Selection
        >>> q = Region({"q.weight": Selection.rows((4, 8), [0, 1])})
        >>> k = Region({"q.weight": Selection.elements((4, 8), [0, 8, 16])})
        >>> overlaps([q, k]).tolist()
        [[16, 2], [2, 3]]
    """
    counts = np.zeros((len(regions), len(regions)), np.int64)
    for name in shapes_of_all({f"regions[{i}]": region for i, region in enumerate(regions)}):
        here = [i for i, region in enumerate(regions) if name in region]
        counts[np.ix_(here, here)] += _on_one_tensor([regions[i].places[name] for i in here])
    return counts


def shapes_of_all(regions: Mapping[str, Region]) -> dict[str, tuple[int, ...]]:
    """{parameter: its shape} of all that one of the regions touches.

    Args:
        regions: {what the message calls it: a region}.

    Raises:
        RegionError: A parameter has different shapes in two of them.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    first: dict[str, str] = {}
    for title, region in regions.items():
        for name, place in region.places.items():
            if shapes.setdefault(name, place.shape) != place.shape:
                raise RegionError(
                    f"{name!r} has shape {shapes[name]} in {first[name]} and {place.shape} in {title}: the regions "
                    "were made for different models; make them anew for one"
                )
            first.setdefault(name, title)
    return shapes


def _on_one_tensor(places: Sequence[Place]) -> Counts:
    """`overlaps` of selections of one tensor.

    Whatever a selection is, it is a product of rows and columns, or a list of positions, or all but such a list.
    """
    counts = np.diag([place.count for place in places]).astype(np.int64)
    numel = places[0].numel
    listed = [i for i, place in enumerate(places) if place.kind in BY_ELEMENTS]
    products = {i: _rows_and_columns(place) for i, place in enumerate(places) if place.kind not in BY_ELEMENTS}

    for (i, one), (j, other) in _pairs(list(products.items())):
        counts[i, j] = counts[j, i] = _count_products(places[i], one, other)
    lengths = np.array([_length(places[i]) for i in listed], np.int64)
    holes = np.array([places[i].kind == "all_but" for i in listed], bool)
    for k, i in enumerate(listed if products else []):
        positions = _positions(places[i])
        for j, product in products.items():
            inside = _count_inside(positions, places[i].shape, product)
            counts[i, j] = counts[j, i] = places[j].count - inside if holes[k] else inside

    if len(listed) > 1:
        lists = (_positions(places[i]) for i in listed)
        dense = int(lengths.sum()) >= DENSE * numel * len(listed)
        common = count_masked(lists, len(listed), numel) if dense else count_sorted(list(lists))
        # |A − H| = |A| − |A ∩ H|, once for each of the two that is all but its list.
        common = np.where(holes[None, :], lengths[:, None] - common, common)
        of_columns = np.where(holes, numel - lengths, lengths)
        common = np.where(holes[:, None], of_columns[None, :] - common, common)
        np.fill_diagonal(common, of_columns)
        counts[np.ix_(listed, listed)] = common
    return counts


def count_sorted(lists: Sequence[Positions]) -> Counts:
    """How many positions two lists have in common.

    Args:
        lists: n sorted lists without repetitions.

    Returns:
        int64 (n, n), symmetric; zeros on the diagonal.
    """
    counts = np.zeros((len(lists), len(lists)), np.int64)
    for (i, one), (j, other) in _pairs(list(enumerate(lists))):
        both = np.concatenate([one, other])
        both.sort(kind="stable")  # a merge of two runs: an eighth of the time that the default takes
        counts[i, j] = counts[j, i] = np.count_nonzero(both[1:] == both[:-1])
    return counts


def count_masked(lists: Iterable[Positions], n: int, numel: int) -> Counts:
    """`count_sorted` by bit masks.

    Args:
        lists: n sorted lists without repetitions, each used once.
        n: How many.
        numel: Scalars of the tensor.
    """
    masks = np.zeros((n, -(-numel // 64)), np.uint64)
    for mask, positions in zip(masks, lists, strict=True):
        _fill(mask.view(np.uint8), positions, numel)
    counts = np.zeros((n, n), np.int64)
    for start in range(0, masks.shape[1], BLOCK):
        block = masks[:, start : start + BLOCK]
        for i in range(n - 1):
            counts[i, i + 1 :] += np.bitwise_count(block[i] & block[i + 1 :]).sum(axis=1, dtype=np.int64)
    return counts + counts.T


def _fill(mask: Positions, positions: Positions, numel: int) -> None:
    """Set the bits of sorted positions in a mask of zeros: uint8 (numel / 8 or more,)."""
    window = np.empty(min(WINDOW, numel), bool)
    bounds = np.searchsorted(positions, np.arange(0, numel, WINDOW, dtype=positions.dtype)).tolist()
    for start, low, high in zip(range(0, numel, WINDOW), bounds, [*bounds[1:], positions.size], strict=True):
        window[:] = False
        window[positions[low:high] - start] = True
        packed = np.packbits(window[: numel - start], bitorder="little")
        mask[start // 8 : start // 8 + packed.size] = packed


def _positions(place: Place) -> Positions:
    """What is listed of a selection by elements, or of one by holes: int32, or int64 where the tensor is so large."""
    if isinstance(place, StoredSelection):
        return place.decode(place.loaded()).numpy()
    return place.indices.numpy().astype(np.int32 if place.numel < 2**31 else np.int64, copy=False)


def _length(place: Place) -> int:
    return place.count if place.kind == "elements" else place.numel - place.count


Product = tuple[Positions | None, Positions | None]
"""Sorted row numbers and sorted column numbers; None for all of them."""


def _rows_and_columns(place: Place) -> Product:
    assert not isinstance(place, StoredSelection)
    units = place.indices.numpy()
    return units if place.kind == "rows" else None, units if place.kind == "columns" else None


def _count_products(place: Place, one: Product, other: Product) -> int:
    result = 1
    for size, left, right in zip(matrix_shape(place.shape), one, other, strict=True):
        if left is not None and right is not None:
            result *= np.intersect1d(left, right, assume_unique=True).size
        else:
            units = right if left is None else left
            result *= size if units is None else units.size
    return result


def _count_inside(positions: Positions, shape: tuple[int, ...], product: Product) -> int:
    """How many positions lie in some rows and columns."""
    (rows, columns), n_columns = product, matrix_shape(shape)[1]
    if rows is not None:
        return int(np.count_nonzero(_among(positions // n_columns, rows)))
    return positions.size if columns is None else int(np.count_nonzero(_among(positions % n_columns, columns)))


def _among(units: Positions, chosen: Positions) -> Positions:
    """Which units are among the chosen, which are sorted and one or more. No table as long as there are units."""
    at = np.searchsorted(chosen, units)
    at[at == chosen.size] = 0
    return chosen[at] == units


def _pairs(of: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
    return ((of[i], of[j]) for i in range(len(of)) for j in range(i + 1, len(of)))
