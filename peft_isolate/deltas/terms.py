"""What acts on one parameter, as plain tensors and numbers that an operator's schema can carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch

from ..regions.selection import strided
from .support import ELEMENTS, ROWS, Support, as_matrix


class Terms(NamedTuple):
    """The numbers that act on one parameter, in the order their adapters were added.

    Attributes:
        deltas: The trained or held numbers, each of its support's `delta_shape`, any floating dtype.
        scales: α of each.
        supports: Where each acts.
        indices: Integer tensors beside the supports that need one, empty beside the others.
        factors: 1 − I of a soft mask, of a shape that multiplies the delta unit by unit; empty where there is none.
        damped: Whether that factor is on the delta, and so on its gradient, too. Else it is on the gradient alone.
        disjoint: No two supports share a scalar, as with a single adapter. Then each is added to its part of W0, and
            no wide copy of the whole is needed.
    """

    deltas: list[torch.Tensor]
    scales: list[float]
    supports: list[Support]
    indices: list[torch.Tensor]
    factors: list[torch.Tensor]
    damped: list[bool]
    disjoint: bool = False

    def flat_supports(self) -> list[int]:
        """The supports as the one list of integers that an operator's schema can carry."""
        return [number for support in self.supports for number in support]

    @classmethod
    def from_flat(
        cls,
        deltas: Sequence[torch.Tensor],
        scales: Sequence[float],
        supports: Sequence[int],
        indices: Sequence[torch.Tensor],
        factors: Sequence[torch.Tensor],
        damped: Sequence[bool],
        disjoint: bool,
    ) -> Terms:
        """The inverse of `flat_supports`, with the rest."""
        width = len(Support._fields)
        unflat = [Support(*supports[i : i + width]) for i in range(0, len(supports), width)]
        return cls(list(deltas), list(scales), unflat, list(indices), list(factors), list(damped), disjoint)

    def parts(self) -> list[tuple[Part, float]]:
        """(part, its α) of what is added: α = 0 leaves the term out."""
        columns = zip(self.deltas, self.supports, self.indices, self.factors, self.damped, self.scales, strict=True)
        return [(Part(*column), scale) for *column, scale in columns if scale != 0.0]


class Part(NamedTuple):
    """One of a delta's tensors: a column of `Terms`, which says what each field is."""

    numbers: torch.Tensor
    support: Support
    at: torch.Tensor
    factor: torch.Tensor
    damped: bool

    @staticmethod
    def terms(parts: Sequence[Part], scales: Sequence[float], *, disjoint: bool) -> Terms:
        """Several of them, each with its α."""
        numbers, supports, indices, factors, damped = (list(column) for column in zip(*parts, strict=True))
        return Terms(numbers, list(scales), supports, indices, factors, damped, disjoint)

    def values(self, scale: float, wide: torch.dtype) -> torch.Tensor:
        """α · (1 − I) · Δ, where the factor is on the delta; α = 1 multiplies nothing."""
        numbers = self.numbers
        if self.damped and self.factor.numel():
            numbers = numbers.to(wide) * self.factor
        return numbers if scale == 1.0 else numbers.to(wide) * scale

    def rows(self, start: int, stop: int, n_columns: int) -> Part:
        """What it has for these rows of the tensor seen as a matrix, as a part of a tensor of these rows alone."""
        numbers, support, index, factor, _ = self
        low, high = start, stop
        if support.axis == ELEMENTS or (support.is_dense and index.numel()):
            first, last = _bounds(index, start * n_columns, stop * n_columns)
            index = index[first:last] - start * n_columns
            if support.axis == ELEMENTS:
                return self._replace(numbers=numbers[first:last], at=index)
        elif support.axis == ROWS:
            units = strided(support.start, support.length, support.step, support.blocks) if support.blocks else index
            low, high = _bounds(units, start, stop)
            support, index = Support(ROWS), (units[low:high] - start).to(numbers.device)
        if factor.ndim > 1:
            factor = factor.reshape(-1, 1)[low:high]
        return self._replace(numbers=as_matrix(numbers)[low:high], support=support, at=index, factor=factor)


def _bounds(sorted_numbers: torch.Tensor, start: int, stop: int) -> tuple[int, int]:
    """Which of them lie in [start, stop)."""
    ends = torch.tensor([start, stop], dtype=sorted_numbers.dtype, device=sorted_numbers.device)
    first, last = torch.searchsorted(sorted_numbers, ends).tolist()
    return first, last


def as_finite(value: Any) -> float | None:
    """A finite real number, NumPy's too, as Python's own float; None of anything else, True and text among it."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
