"""Composing in place: on the support alone, or some rows at a time where a second large tensor has no room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .compose import check_here, compose, compose_into
from .scratch import scratch_like
from .support import WHOLE, Support, as_matrix, read
from .terms import Part, Terms

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
        rows = matrix[start:stop]
        cut = [part.rows(start, stop, n_columns) for part in parts]
        rows.copy_(compose(rows, Part.terms(cut, list(scales), disjoint=disjoint)))


class Change(NamedTuple):
    """What `support.write` has to put where.

    Attributes:
        support, at: As of a `Part`.
        before: W0 there: a copy, but a view of a whole tensor's.
        after: The effective weight there. Of a whole tensor it may stand in the scratch buffer, until anything else is
            composed.
    """

    support: Support
    at: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


@torch.no_grad()
def changes(parameter: torch.Tensor, w0: torch.Tensor, terms: Terms) -> list[Change]:
    """What makes a parameter the effective weight, bit for bit what `compose` gives. Nothing is changed here.

    Where no two terms share a scalar and none is dense, these are their supports alone. (Of 1 % of the scalars that
    takes a quarter of the whole's time.)

    Args:
        parameter: What is to be written, W0 outside the terms' supports.
        w0: Of its shape and dtype.
        terms: What is added to it.
    """
    check_here(w0, terms.deltas)
    parts = terms.parts()
    apart = terms.disjoint or len(parts) == 1
    contiguous = parameter.is_contiguous() and w0.is_contiguous()
    if not apart or not contiguous or any(part.support.is_dense for part, _ in parts):
        none = torch.empty(0, dtype=torch.int64, device=w0.device)
        return [Change(Support(WHOLE), none, w0, compose_into(scratch_like(w0), w0, terms))]
    wide = torch.promote_types(w0.dtype, torch.float32)
    found = []
    for part, scale in parts:
        before = read(w0, part.support, part.at, part.numbers.shape)
        before = before.clone() if part.support.blocks else before  # regular ones are a view of W0
        found.append(Change(part.support, part.at, before, before.to(wide) + part.values(scale, wide)))
    return found
