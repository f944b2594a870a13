"""The support of a delta inside its tensor: how the scalars of a `Selection` are reached with the fewest copies."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..regions.selection import Kind, Selection, matrix_shape, to_strides

ROWS, COLUMNS, WHOLE, ELEMENTS, ALL_BUT = range(5)


class Support(NamedTuple):
    """A selection as plain integers that an operator's schema can carry.

    Where the integers do not say all, an *index* tensor stands beside them: irregular rows or columns, the flat
    positions of elements, or the flat positions of the holes.

    Attributes:
        axis: `ROWS`, `COLUMNS`, `WHOLE`, `ELEMENTS` or `ALL_BUT`.
        start, length, step, blocks: The `strided` units on that axis, which are a view of the tensor. `blocks` is
            0 where the units lie irregularly, and where there are none.
    """

    axis: int
    start: int = 0
    length: int = 0
    step: int = 0
    blocks: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether the delta has the tensor's own shape."""
        return self.axis in (WHOLE, ALL_BUT)

    @classmethod
    def of(cls, selection: Selection) -> tuple[Support, torch.Tensor]:
        """The support of a selection, and its index: int64 (units,), empty where the support is regular or whole."""
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        if selection.kind == "whole":
            return cls(WHOLE), none
        if selection.kind in ("elements", "all_but"):
            return cls(ELEMENTS if selection.kind == "elements" else ALL_BUT), selection.indices
        axis = ROWS if selection.kind == "rows" else COLUMNS
        strides = to_strides(selection.indices)
        return (cls(axis, *strides[0]), none) if len(strides) == 1 else (cls(axis), selection.indices.clone())


def delta_shape(kind: Kind, shape: tuple[int, ...], n_indices: int) -> tuple[int, ...]:
    """Shape of the tensor that holds one number for each selected scalar, in the order of their positions.

    Args:
        kind: The selection's kind. For "all_but" the tensor is dense, and what it has at the holes is inert.
        shape: Of the tensor that is selected from.
        n_indices: Of the selection: rows, columns or elements.
    """
    n_rows, _ = matrix_shape(shape)
    if kind == "rows":
        return (n_indices, matrix_shape(shape)[1])
    if kind == "columns":
        return (n_indices,) if len(shape) == 1 else (n_rows, n_indices)
    return (n_indices,) if kind == "elements" else shape


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
    """The scalars of `tensor` on the support, as a tensor of the delta's `shape`; a view or a copy.

    What a dense delta has at holes comes along; see `without_holes`.
    """
    if support.is_dense:
        return tensor
    if support.axis == ELEMENTS:
        return tensor.reshape(-1).index_select(0, index)
    matrix = as_matrix(tensor)
    if support.blocks:
        return view(matrix, support).reshape(shape)
    return matrix.index_select(support.axis, index).reshape(shape)


def write(tensor: torch.Tensor, support: Support, index: torch.Tensor, values: torch.Tensor) -> None:
    """Put the delta-shaped `values` in the place of the scalars of the contiguous `tensor` on the support."""
    if support.axis == WHOLE:
        tensor.copy_(values)
    elif support.axis == ALL_BUT:
        at_holes = tensor.reshape(-1).index_select(0, index)
        tensor.copy_(values)
        put(tensor, index, at_holes)
    elif support.axis == ELEMENTS:
        put(tensor, index, values)
    elif support.blocks:
        part = view(as_matrix(tensor), support)
        part.copy_(values.reshape(part.shape))
    else:
        matrix = as_matrix(tensor)
        values = values.reshape(as_matrix(values).shape)
        matrix.index_copy_(support.axis, index, values.to(matrix))


def copy_selected(tensor: torch.Tensor, source: torch.Tensor, selection: Selection) -> None:
    """Put the selected scalars of `source` in the place of those of the contiguous `tensor`."""
    support, index = Support.of(selection)
    index = index.to(tensor.device)
    shape = delta_shape(selection.kind, selection.shape, selection.indices.numel())
    write(tensor, support, index, read(source.to(tensor), support, index, shape))


def put(tensor: torch.Tensor, positions: torch.Tensor, values: torch.Tensor | float) -> None:
    """Set the scalars of the contiguous `tensor` at these flat positions (any integer dtype), in place."""
    flat = tensor.view(-1)
    if isinstance(values, torch.Tensor):
        # On the CPU three times as fast as `index_copy_`, which has a deterministic kernel on a GPU.
        put_ = flat.scatter_ if flat.device.type == "cpu" else flat.index_copy_
        put_(0, positions.long(), values.to(flat.dtype))
    else:
        flat.index_fill_(0, positions.long(), values)


def add_(tensor: torch.Tensor, support: Support, index: torch.Tensor, values: torch.Tensor) -> None:
    """Add the delta-shaped `values` to the scalars of the contiguous `tensor` on the support, in place."""
    if support.axis == WHOLE:
        tensor.add_(values)
    elif support.axis == ELEMENTS and values.dtype == tensor.dtype:
        tensor.view(-1).index_add_(0, index, values)
    else:
        write(tensor, support, index, read(tensor, support, index, values.shape) + values)


def without_holes(values: torch.Tensor, support: Support, index: torch.Tensor) -> torch.Tensor:
    """Delta-shaped values as they count: zero at the holes, whatever stands there. A copy where there are any."""
    if support.axis != ALL_BUT or not index.numel():
        return values
    values = values.clone(memory_format=torch.contiguous_format)
    put(values, index, 0.0)
    return values


def take(matrix: torch.Tensor, support: Support, index: torch.Tensor) -> torch.Tensor:
    """The columns of `matrix` (n, features) that a support of rows or columns names, whatever axis they are on."""
    if support.blocks == 1:
        return matrix.narrow(1, support.start, support.length)
    if support.blocks:
        return view(matrix, support._replace(axis=COLUMNS)).reshape(matrix.shape[0], -1)
    return matrix.index_select(1, index)
