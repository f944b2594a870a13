"""Spherical interpolation of two tensors, a piece at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch

# Linear where |cos| is above 1 − EPSILON (our choice: the paper says "where the angle is small").
EPSILON = 5e-4
# Where float64 tells no angle any more.
ROUNDED = 1e-12
# Scalars that are in float64 at a time.
PIECE = 2**20

Kind = Literal["slerp", "linear"]
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class Mix(NamedTuple):
    """How two vectors are put together: `a`·first + `b`·second.

    Attributes:
        kind: "slerp", or "linear", where the angle is too small, or a vector is zero.
        a, b: The coefficients. Of "linear" ones the sum is 1.
    """

    kind: Kind
    a: float
    b: float


def slerp(
    a: torch.Tensor,
    b: torch.Tensor,
    omega: float,
    epsilon: float = EPSILON,
    where: torch.Tensor | None = None,
    *,
    origin: torch.Tensor | None = None,
    linear: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Kind]:
    """Go the share `omega` of the way from `a` to `b`, along the arc between them.

    With Ω the angle between the two as vectors: `sin((1 − ω)Ω)/sin Ω · a + sin(ωΩ)/sin Ω · b`. At ω = 0 the result is
    `a`, at ω = 1 it is `b`, to the bit (but for the sign of zeros). Where |cos Ω| > 1 − ε, or one of the two is zero,
    it is `(1 − ω)·a + ω·b`. Sums are taken in float64, a piece at a time, and rounded once.

    Args:
        a, b: Tensors of one shape, fp32 or float64, contiguous.
        omega: ω, from 0 to 1.
        epsilon: ε, from 0 to 1.
        where: bool tensor of their shape: the scalars that are the vectors, angle and all; elsewhere the result is
            `a`. None: all of them.
        origin: A tensor of their shape, in any floating dtype, from which they are measured: the vectors are
            `origin + a` and `origin + b`, and the result, too, is a difference from it. None: zero.
        linear: Always interpolate linearly.
        out: Takes the result; may be `a`. None: a new tensor.

    Returns:
        (the result in the dtype of `a`, how it was made).

    Example:
        >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
        (tensor([0.7071, 0.7071]), 'slerp')
    """
    mix = Mix("linear", 1.0 - omega, omega) if linear else mix_of(a, b, omega, epsilon, where, origin=origin)
    out = torch.empty_like(a) if out is None else out
    # What the coefficients leave of the origin; (1 − ω) + ω is 1 exactly, however 1 − ω is rounded.
    rest = mix.a + mix.b - 1.0
    results = out.view(-1).split(PIECE)
    for result, (first, second, among, zero) in zip(results, _parts(a, b, where, origin), strict=True):
        mixed = first.double().mul(mix.a).add_(second.double(), alpha=mix.b)
        if zero is not None and rest:
            mixed.add_(zero.double(), alpha=rest)
        result.copy_(mixed if among is None else torch.where(among, mixed, first.double()))
    return out, mix.kind


def mix_of(
    a: torch.Tensor,
    b: torch.Tensor,
    omega: float,
    epsilon: float = EPSILON,
    where: torch.Tensor | None = None,
    *,
    origin: torch.Tensor | None = None,
) -> Mix:
    """The coefficients of `slerp`, of the same arguments."""
    aa = bb = ab = 0.0
    for first, second, among, zero in _parts(a, b, where, origin):
        x, y = first.double(), second.double()
        if zero is not None:
            x, y = x + zero.double(), y + zero.double()
        if among is not None:
            x, y = x * among, y * among
        aa, bb, ab = aa + float(x.dot(x)), bb + float(y.dot(y)), ab + float(x.dot(y))
    length = math.sqrt(aa) * math.sqrt(bb)
    if not length or not abs(ab) <= (1.0 - max(epsilon, ROUNDED)) * length:  # also where they hold NaN
        return Mix("linear", 1.0 - omega, omega)
    angle = math.acos(ab / length)
    sine = math.sin(angle)
    return Mix("slerp", math.sin((1.0 - omega) * angle) / sine, math.sin(omega * angle) / sine)


def _parts(
    a: torch.Tensor, b: torch.Tensor, where: torch.Tensor | None, origin: torch.Tensor | None
) -> Iterator[Parts]:
    """The four of them, flat, a piece at a time."""
    firsts, seconds = (tensor.reshape(-1).split(PIECE) for tensor in (a, b))
    among, zeros = (
        itertools.repeat(None) if tensor is None else tensor.reshape(-1).split(PIECE) for tensor in (where, origin)
    )
    return zip(firsts, seconds, among, zeros, strict=False)
