"""The support of a delta inside its tensor: how the scalars of a `Selection` are reached with the fewest copies."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..errors import RegionError
from ..regions.selection import Selection, to_strides

ROWS, COLUMNS, WHOLE = 0, 1, 2


class Support(NamedTuple):
    """A selection of rows, columns or everything, as plain integers that an operator's schema can carry.

    Attributes:
        axis: `ROWS`, `COLUMNS` or `WHOLE`.
        start, length, step, blocks: The `strided` units on that axis, which are a view of the tensor. `blocks` is
            0 where the units lie irregularly: then an index tensor stands beside the support.
    """

    axis: int
    start: int = 0
    length: int = 0
    step: int = 0
    blocks: int = 0

    @classmethod
    def of(cls, selection: Selection) -> tuple[Support, torch.Tensor]:
        """The support of a selection, and its index: int64 (units,), empty where the block is regular or whole."""
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        if selection.kind == "whole":
            return cls(WHOLE), none
        if selection.kind not in ("rows", "columns"):
            raise RegionError(
                f"{selection!r} goes by single elements, which this version does not train: "
                "select whole parameters, rows or columns"
            )
        axis = ROWS if selection.kind == "rows" else COLUMNS
        strides = to_strides(selection.indices)
        return (cls(axis, *strides[0]), none) if len(strides) == 1 else (cls(axis), selection.indices.clone())


def delta_shape(selection: Selection) -> tuple[int, ...]:
    """Shape of the tensor that holds one number for each selected scalar, in the order of their positions."""
    n_rows, n_columns = selection.matrix_shape
    n = selection.indices.numel()
    if selection.kind == "rows":
        return (n, n_columns)
    if selection.kind == "columns":
        return (n,) if len(selection.shape) == 1 else (n_rows, n)
    return selection.shape


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """(leading dimensions flattened, last dimension); a view wherever the strides allow one."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(-1, tensor.shape[-1])


def view(matrix: torch.Tensor, support: Support) -> torch.Tensor:
    """A regular support as a view of the matrix: (blocks, length, columns) or (rows, blocks, length)."""
    n_rows, n_columns = matrix.shape
    row, column = matrix.stride()
    if support.axis == ROWS:
        size: tuple[int, ...] = (support.blocks, support.length, n_columns)
        stride: tuple[int, ...] = (support.step * row, row, column)
        offset = support.start * row
    else:
        size, stride = (n_rows, support.blocks, support.length), (row, support.step * column, column)
        offset = support.start * column
    return matrix.as_strided(size, stride, matrix.storage_offset() + offset)


def read(tensor: torch.Tensor, support: Support, index: torch.Tensor, shape: torch.Size | tuple[int, ...]):
    """The scalars of `tensor` on the support, as a tensor of the delta's `shape`; a view or a copy."""
    if support.axis == WHOLE:
        return tensor
    matrix = as_matrix(tensor)
    if support.blocks:
        return view(matrix, support).reshape(shape)
    return matrix.index_select(support.axis, index).reshape(shape)


def write(tensor: torch.Tensor, support: Support, index: torch.Tensor, values: torch.Tensor) -> None:
    """Put the delta-shaped `values` in the place of the scalars of the contiguous `tensor` on the support."""
    if support.axis == WHOLE:
        tensor.copy_(values)
        return
    matrix = as_matrix(tensor)
    if support.blocks:
        part = view(matrix, support)
        part.copy_(values.reshape(part.shape))
    else:
        values = values.reshape(as_matrix(values).shape)
        matrix.index_copy_(support.axis, index, values.to(matrix))


def add_(tensor: torch.Tensor, support: Support, index: torch.Tensor, values: torch.Tensor) -> None:
    """Add the delta-shaped `values` to the scalars of the contiguous `tensor` on the support, in place."""
    if support.axis == WHOLE:
        tensor.add_(values)
    else:
        write(tensor, support, index, read(tensor, support, index, values.shape) + values)


def take(matrix: torch.Tensor, support: Support, index: torch.Tensor) -> torch.Tensor:
    """The columns of `matrix` (n, features) that a support's units name, whatever axis they are on elsewhere."""
    if support.axis == WHOLE:
        return matrix
    if support.blocks == 1:
        return matrix.narrow(1, support.start, support.length)
    if support.blocks:
        return view(matrix, support._replace(axis=COLUMNS)).reshape(matrix.shape[0], -1)
    return matrix.index_select(1, index)
