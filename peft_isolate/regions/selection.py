"""Which scalars of ONE tensor may change: a set of positions, stored by its shortest description."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ..errors import FormatError, RegionError

Kind = Literal["whole", "rows", "columns", "elements", "all_but"]
KINDS: tuple[Kind, ...] = ("whole", "rows", "columns", "elements", "all_but")

Indices = Iterable[int] | torch.Tensor | np.ndarray


def _upto(size: int) -> torch.Tensor:
    """0, 1, …, size − 1 on the CPU, also where a caller has made another device the default."""
    return torch.arange(size, device="cpu")


def strided(start: int, length: int, step: int, count: int) -> torch.Tensor:
    """`count` blocks of `length` neighbours, the k-th beginning at `start + k * step`.

    Fused weights interleave their parts like this: in GPT-NeoX the rows of q are `strided(0, d, 3 * d, heads)`.

    Returns:
        int64 tensor (count * length,), sorted when `step >= length`.

    Example:
        >>> strided(2, 2, 6, 3).tolist()
        [2, 3, 8, 9, 14, 15]
    """
    return (start + step * _upto(count)[:, None] + _upto(length)).flatten()


def to_strides(indices: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """The shortest list of `strided` arguments `(start, length, step, count)` that a left-to-right scan finds.

    Args:
        indices: int64 tensor (n,), sorted and unique.

    Example:
        >>> to_strides(strided(2, 2, 6, 3))
        [(2, 2, 6, 3)]
    """
    if indices.numel() == 0:
        return []
    breaks = torch.nonzero(torch.diff(indices) != 1).flatten() + 1
    starts = torch.cat([indices[:1], indices[breaks]]).tolist()
    bounds = [0, *breaks.tolist(), indices.numel()]
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    strides: list[tuple[int, int, int, int]] = []
    for start, length in zip(starts, lengths, strict=True):
        if strides:
            first, block, step, count = strides[-1]
            gap = start - (first + step * (count - 1))
            if length == block and (count == 1 or gap == step):
                strides[-1] = (first, block, gap, count + 1)
                continue
        strides.append((start, length, length, 1))
    return strides


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """A set of scalars of one tensor of a stated shape.

    The tensor is seen as a matrix: *rows* are all leading dimensions flattened, *columns* the last one (a vector is
    one row). Make one with `whole`, `rows`, `columns`, `elements` or `all_but`; the constructors keep a normal form:
    all rows become "whole" and no scalar at all becomes "elements" without indices. Two selections are equal when
    they select the same scalars, whatever their kinds.

    `|`, `&`, `-` and `~` are exact for every pair of kinds and never build a mask of the tensor. Where a result is
    none of the five kinds in general (rows & columns, say), it becomes "elements" or "all_but", whichever has fewer
    indices.

    Attributes:
        kind: One of "whole", "rows", "columns", "elements", "all_but".
        shape: The tensor's shape.
        indices: int64 tensor (n,), sorted and unique: row numbers, column numbers, flat positions (elements), flat
            positions of the *holes* (all_but), or empty (whole).
    """

    kind: Kind
    shape: tuple[int, ...]
    indices: torch.Tensor

    @classmethod
    def whole(cls, shape: Iterable[int]) -> Selection:
        """Every scalar."""
        return cls("whole", tuple(shape), _upto(0))

    @classmethod
    def empty(cls, shape: Iterable[int]) -> Selection:
        """No scalar."""
        return cls("elements", tuple(shape), _upto(0))

    @classmethod
    def rows(cls, shape: Iterable[int], indices: Indices) -> Selection:
        """The rows of these numbers. Raises `RegionError` where they are unsorted, repeated or out of range."""
        return cls._from_units("rows", tuple(shape), indices)

    @classmethod
    def columns(cls, shape: Iterable[int], indices: Indices) -> Selection:
        """The columns of these numbers. Raises as `rows` does."""
        return cls._from_units("columns", tuple(shape), indices)

    @classmethod
    def elements(cls, shape: Iterable[int], indices: Indices) -> Selection:
        """The scalars at these flat positions. Raises as `rows` does."""
        shape = tuple(shape)
        flat = _as_indices(indices, _numel(shape), f"elements of a tensor of shape {shape}")
        return cls.whole(shape) if 0 < flat.numel() == _numel(shape) else cls("elements", shape, flat)

    @classmethod
    def all_but(cls, shape: Iterable[int], indices: Indices) -> Selection:
        """All scalars but those at these flat positions, the holes. Raises as `rows` does."""
        shape = tuple(shape)
        holes = _as_indices(indices, _numel(shape), f"holes of a tensor of shape {shape}")
        if holes.numel() == 0:
            return cls.whole(shape)
        return cls.empty(shape) if holes.numel() == _numel(shape) else cls("all_but", shape, holes)

    @classmethod
    def _from_units(cls, kind: Literal["rows", "columns"], shape: tuple[int, ...], indices: Indices) -> Selection:
        size = matrix_shape(shape)[0 if kind == "rows" else 1]
        units = _as_indices(indices, size, f"{kind} of a tensor of shape {shape}")
        if units.numel() == size:
            return cls.whole(shape)
        return cls(kind, shape, units) if units.numel() else cls.empty(shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the tensor seen as a matrix."""
        return matrix_shape(self.shape)

    @property
    def numel(self) -> int:
        """Scalars of the tensor, selected or not."""
        return _numel(self.shape)

    @property
    def count(self) -> int:
        """Selected scalars."""
        n_rows, n_columns = self.matrix_shape
        n = self.indices.numel()
        return {
            "whole": self.numel,
            "rows": n * n_columns,
            "columns": n * n_rows,
            "elements": n,
            "all_but": self.numel - n,
        }[self.kind]

    def positions(self) -> torch.Tensor:
        """Flat positions of the selected scalars: int64 tensor (count,), sorted."""
        n_rows, n_columns = self.matrix_shape
        if self.kind == "elements":
            return self.indices
        if self.kind == "rows":
            return (self.indices[:, None] * n_columns + _upto(n_columns)).flatten()
        if self.kind == "columns":
            return (_upto(n_rows)[:, None] * n_columns + self.indices).flatten()
        every = _upto(self.numel)
        return every if self.kind == "whole" else _minus(every, self.indices)

    def mask(self) -> torch.Tensor:
        """bool tensor of `shape`, true where selected. Costs a byte a scalar of the whole tensor."""
        mask = torch.zeros(self.numel, dtype=torch.bool, device="cpu")
        mask[self.positions()] = True
        return mask.reshape(self.shape)

    def __invert__(self) -> Selection:
        if self.kind == "whole":
            return Selection.empty(self.shape)
        if self.kind == "elements":
            return Selection.all_but(self.shape, self.indices)
        if self.kind == "all_but":
            return Selection.elements(self.shape, self.indices)
        size = self.matrix_shape[0 if self.kind == "rows" else 1]
        return Selection._from_units(self.kind, self.shape, _minus(_upto(size), self.indices))

    def __and__(self, other: Selection) -> Selection:
        if self.shape != other.shape:
            raise RegionError(
                f"selections of tensors of different shapes, {self.shape} and {other.shape}, cannot be combined: "
                "they belong to different models"
            )
        # One order of the pair is enough, since & commutes: fewer cases to get right.
        first, second = sorted((self, other), key=lambda selection: KINDS.index(selection.kind))
        return _intersect(first, second)

    def __or__(self, other: Selection) -> Selection:
        return ~(~self & ~other)

    def __sub__(self, other: Selection) -> Selection:
        return self & ~other

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        if self.shape != other.shape or self.count != other.count:
            return False
        if self.count == 0:
            return True  # of a tensor without scalars, any rows are equally nothing
        if self.kind == other.kind:
            return torch.equal(self.indices, other.indices)
        return (self - other).count == 0

    def __hash__(self) -> int:
        return hash((self.shape, self.count))

    def __repr__(self) -> str:
        if self.kind == "whole":
            return f"Selection(whole {self.shape})"
        return f"Selection({self.indices.numel():,} {self.kind} of {self.shape}, {self.count:,} scalars)"

    def to_dict(self) -> dict[str, Any]:
        """A JSON description of a selection of whole rows, columns or everything.

        Row and column numbers are written as `strided` arguments, so that a block costs four numbers.

        Raises:
            RegionError: The selection goes by elements, which a text file is no place for.
        """
        if self.kind in ("elements", "all_but"):
            raise RegionError(
                f"{self!r} selects single elements, which have no short description in JSON: "
                "save the region to a file with Region.save"
            )
        described: dict[str, Any] = {"kind": self.kind, "shape": list(self.shape)}
        if self.kind != "whole":
            described["strides"] = [list(stride) for stride in to_strides(self.indices)]
        return described

    @classmethod
    def from_dict(cls, described: dict[str, Any]) -> Selection:
        """The inverse of `to_dict`.

        Raises:
            FormatError: The description is not one that `to_dict` writes.
        """
        try:
            kind, shape = described["kind"], whole_numbers(described["shape"])
            if kind == "whole":
                return cls.whole(shape)
            if kind not in ("rows", "columns"):
                raise RegionError(f"kind {kind!r} is unknown")
            size = matrix_shape(shape)[0 if kind == "rows" else 1]
            strides = [whole_numbers(stride) for stride in described["strides"]]
            # Checked before anything is allocated: the description may come from a stranger's file. No block and no
            # stride is empty, so that the sum bounds each factor too.
            if any(length < 1 or count < 1 for _, length, _, count in strides):
                raise RegionError(f"strides {strides} have empty blocks")
            if sum(length * count for _, length, _, count in strides) > size:
                raise RegionError(f"strides {strides} select more than the {size} {kind} there are")
            if any(start + step * (count - 1) + length > size for start, length, step, count in strides):
                raise RegionError(f"strides {strides} reach beyond the {size} {kind} there are")
            parts = [strided(start, length, step if count > 1 else 0, count) for start, length, step, count in strides]
            indices = torch.cat(parts) if parts else _upto(0)
            return cls._from_units(kind, shape, indices.sort().values)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{described!r} describes no selection ({error}): the adapter's config was altered or is of another "
                "version; restore it, or draw the region again with resolved=None"
            ) from error


def whole_numbers(values: Any) -> tuple[int, ...]:
    """A list of numbers from a stranger's JSON, none negative, as a tuple.

    Raises:
        FormatError: It is something else.
    """
    if not isinstance(values, list | tuple) or not all(type(value) is int and value >= 0 for value in values):
        raise FormatError(f"{values!r} is not a list of whole numbers from 0 on")
    return tuple(values)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor seen as a matrix: all leading dimensions flattened, and the last one."""
    n_columns = shape[-1] if shape else 1
    return _numel(shape[:-1]), n_columns


def _numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _as_indices(indices: Indices, size: int, what: str) -> torch.Tensor:
    if not isinstance(indices, torch.Tensor | np.ndarray):
        indices = list(indices)
    try:
        flat = torch.as_tensor(indices, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RegionError(f"{what}: need one list of whole numbers, got {_shortened(indices)}") from error
    if flat.numel() == 0:
        return _upto(0)
    if flat.ndim != 1 or flat.dtype.is_floating_point or flat.dtype.is_complex or flat.dtype == torch.bool:
        raise RegionError(
            f"{what}: need one list of whole numbers, got {flat.dtype} of shape {tuple(flat.shape)}: "
            f"{_shortened(flat.flatten()[:8].tolist())}"
        )
    flat = flat.to(torch.int64)
    low, high = int(flat.min()), int(flat.max())
    if low < 0 or high >= size:
        raise RegionError(
            f"{what}: index {low if low < 0 else high} is out of range, there are {size}; "
            "the indices belong to another tensor"
        )
    if bool((wrong := torch.diff(flat) <= 0).any()):
        at = int(wrong.nonzero()[0])
        raise RegionError(
            f"{what}: indices must be sorted and unique, but {int(flat[at])} comes before {int(flat[at + 1])}; "
            "pass torch.unique(indices)"
        )
    return flat.clone()


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _minus(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.setdiff1d(left.numpy(), right.numpy(), assume_unique=True))


def _common(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.numel() < right.numel():
        left, right = right, left
    if right.numel():
        # Both are sorted: an expert's few rows lie in a short stretch of all the selected ones.
        left = left[int(torch.searchsorted(left, right[0])) : int(torch.searchsorted(left, right[-1], right=True))]
    return torch.from_numpy(np.intersect1d(left.numpy(), right.numpy(), assume_unique=True))


def _filter(selection: Selection, flat: torch.Tensor) -> torch.Tensor:
    """Those of the flat positions that lie in a selection of rows or columns."""
    n_columns = selection.matrix_shape[1]
    units = flat // n_columns if selection.kind == "rows" else flat % n_columns
    return flat[torch.isin(units, selection.indices)]


def _intersect(a: Selection, b: Selection) -> Selection:
    """a & b, with a's kind not after b's in `KINDS`."""
    shape = a.shape
    if a.kind == "whole":
        return b
    if a.kind == b.kind != "all_but":
        common = _common(a.indices, b.indices)
        return getattr(Selection, a.kind)(shape, common)
    if a.kind == "all_but":
        return Selection.all_but(shape, torch.from_numpy(np.union1d(a.indices.numpy(), b.indices.numpy())))
    if a.kind == "elements":
        return Selection.elements(shape, _minus(a.indices, b.indices))
    if b.kind == "elements":
        return Selection.elements(shape, _filter(a, b.indices))
    if b.kind == "all_but":
        holes = _filter(a, b.indices)
        if holes.numel() == 0:
            return a
        return _shorter(
            shape,
            a.count - holes.numel(),
            lambda: _minus(a.positions(), holes),
            lambda: torch.cat([(~a).positions(), holes]).sort().values,
        )
    n_columns = a.matrix_shape[1]
    return _shorter(
        shape,
        a.indices.numel() * b.indices.numel(),
        lambda: (a.indices[:, None] * n_columns + b.indices).flatten(),
        lambda: torch.cat([(~a).positions(), _filter(a, (~b).positions())]).sort().values,
    )


def _shorter(shape: tuple[int, ...], count: int, inside: Any, outside: Any) -> Selection:
    """The selection of `count` scalars, listed by what is in it or by what is not: only the shorter list is built."""
    if 2 * count <= _numel(shape):
        return Selection.elements(shape, inside())
    return Selection.all_but(shape, outside())
