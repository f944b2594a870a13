"""Composing in place, some rows at a time: for a merge that has no room for a second copy of a large tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..regions.selection import strided
from .compose import compose
from .delta import Part
from .support import ELEMENTS, ROWS, Support, as_matrix

# Scalars composed at a time: some tens of MiB of scratch, whatever the dtypes.
SCALARS = 2**21


@torch.no_grad()
def compose_in_place(
    w0: torch.Tensor, parts: Sequence[Part], scales: Sequence[float], *, disjoint: bool, scalars: int = SCALARS
) -> None:
    """Make W0 the effective weight: bit for bit what `compose` gives.

    Args:
        w0: Contiguous, any shape and floating dtype. Overwritten.
        parts: What is added to it, in the order the adapters were added.
        scales: α of each.
        disjoint: No two parts share a scalar.
        scalars: Of W0, to be composed at a time.
    """
    matrix = as_matrix(w0)
    n_rows, n_columns = matrix.shape
    # One long row, such as a bias, is nothing to save on; nor can it be cut where its columns are selected.
    step = max(1, scalars // max(1, n_columns))
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        cut = [_rows_of(part, start, stop, n_columns) for part in parts]
        rows = matrix[start:stop]
        rows.copy_(compose(rows, Part.terms(cut, list(scales), disjoint=disjoint)))


def _rows_of(part: Part, start: int, stop: int, n_columns: int) -> Part:
    """What a part has for these rows of the tensor seen as a matrix, as a part of a tensor of these rows alone."""
    numbers, support, index, factor, damped = part
    low, high = start, stop
    if support.axis == ELEMENTS or (support.is_dense and index.numel()):
        first, last = _bounds(index, start * n_columns, stop * n_columns)
        index = index[first:last] - start * n_columns
        if support.axis == ELEMENTS:
            return part._replace(numbers=numbers[first:last], at=index)
    elif support.axis == ROWS:
        units = strided(support.start, support.length, support.step, support.blocks) if support.blocks else index
        low, high = _bounds(units, start, stop)
        support, index = Support(ROWS), units[low:high] - start
    of_rows = as_matrix(numbers)[low:high]
    if factor.ndim > 1:
        factor = factor.reshape(-1, 1)[low:high]
    return part._replace(numbers=of_rows, support=support, at=index, factor=factor, damped=damped)


def _bounds(sorted_numbers: torch.Tensor, start: int, stop: int) -> tuple[int, int]:
    """Which of them lie in [start, stop)."""
    ends = torch.tensor([start, stop], dtype=sorted_numbers.dtype)
    first, last = torch.searchsorted(sorted_numbers, ends).tolist()
    return first, last
