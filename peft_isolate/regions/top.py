"""The scalars of a whole model that moved most: the exact global top p % of |Δ|, one chunk in memory at a time.

The bits of fp32 numbers that are not negative order as the numbers do, denormals included. So a first reading counts
the scalars by the upper sixteen bits of |Δ| and finds the bucket that the cut falls into; a second one takes what lies
above that bucket and lists what lies in it, of which the cut then takes its part by the lower bits. Of a bucket's
lowest value no more is listed than the cut can need: models trained in bf16 differ by few numbers, many times over,
most of them round ones.

Only where a bucket holds too many other numbers is that list given up. Then a reading counts them by their lower bits,
and a last one lists nothing but what is selected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import RegionError
from .region import Region
from .selection import Selection

Pairs = Callable[[], Iterable[tuple[str, torch.Tensor, torch.Tensor]]]

CHUNK = 2**19
"""Scalars worked on at once: what is made of them stays in a core's cache."""

CANDIDATES = 2**22
"""Scalars of the bucket that may be listed, ten bytes each, beyond what is selected; an eighth of that, if more."""

LOW_BITS = 15
"""Of the 31 bits of |Δ|, those that the first reading leaves out."""

INFINITE = 0x7F800000
"""The bits of infinity: a NaN's, the sign aside, are greater, all other numbers' less."""

NUMBERS = (int, float, Decimal, Fraction, np.integer, np.floating)

SCALARS_CHANGED = "other scalars than the first time"


@dataclass(frozen=True)
class Top:
    """The top p % of |Δ|.

    Attributes:
        region: Parameter name -> `Selection` of elements (whole, where all of a tensor), `count` scalars in all.
        count: Scalars selected: floor(percent · total / 100).
        total: Scalars looked at.
        moved: Those of them with |Δ| > 0. Where it is less than `count`, zeros are selected.
        threshold: The smallest selected |Δ|, an fp32 number; 0.0 where nothing is selected.
    """

    region: Region
    count: int
    total: int
    moved: int
    threshold: float

    def check(self, percent: float, remedy: str = "take a smaller percent") -> None:
        """Raise `RegionError` where nothing is selected, or zeros are.

        Args:
            percent: As it was asked for.
            remedy: What to do where too few scalars moved.
        """
        if not self.count:
            raise RegionError(f"{percent} % of {self.total:,} scalars is not one: take a larger percent")
        if self.moved < self.count:
            raise RegionError(
                f"only {self.moved:,} of {self.total:,} scalars moved at all, fewer than {percent} % "
                f"({self.count:,}): {remedy}; a checkpoint in bf16 has lost small updates"
            )


def top(pairs: Pairs, percent: float) -> Top:
    """The `floor(percent · total / 100)` scalars with the largest |Δ| over all tensors together, exactly.

    |Δ| = |tuned − base|, both taken to fp32 first; where one of them is float64 the difference is taken in float64 and
    then rounded to fp32. Among equal |Δ| at the cut the earlier tensor goes first, in it the lower flat position: what
    a stable descending sort of all |Δ|, one tensor after the other, begins with.

    Memory beyond the tensors goes by the scalars selected, eight bytes each, which are the positions returned. On top
    come at most eight bytes a position and some 100 MiB, however many scalars tie.

    Args:
        pairs: Yields (name, base, tuned) of each tensor, the same each time it is called: twice, or four times where
            very many |Δ| differ by less than 1 %. Base and tuned have one shape and any floating dtypes, strides and
            devices; chunks come to the CPU. Of what it yields nothing is kept.
        percent: Above 0, at most 100. Taken as the decimal number it is written as, so that 0.1 means one in 1000 and
            `count` is exact.

    Raises:
        RegionError: The percent is out of range; a name comes twice; base and tuned differ in shape, or are not of
            floating numbers; a NaN or an infinity is in base, tuned or their difference; a later call of `pairs`
            yields something else.

    Example:
        >>> base, tuned = torch.zeros(4), torch.tensor([0.0, 3.0, -2.0, 2.0])
        >>> top(lambda: [("w", base, tuned)], percent=50).region["w"].indices.tolist()
        [1, 2]
    """
    share = share_of(percent)
    shapes: dict[str, tuple[int, ...]] = {}
    scratch = torch.empty(CHUNK, dtype=torch.float32, device="cpu")
    counts, moved = _count_by_upper_bits(pairs, shapes, scratch)
    total = int(counts.sum())
    count = int(share * total)
    if count == 0:
        return Top(Region(), 0, total, moved, 0.0)

    bucket, above = _cut_at(counts, count)
    low, wanted = bucket << LOW_BITS, count - above
    at_most = count + max(CANDIDATES, count // 8)
    found = _found(pairs, shapes, scratch, _Cut(low, wanted), bucket, at_most)
    if found is not None:
        parts = [part for parts in found.values() for part in parts]
        by_lower_bits = np.zeros(2**LOW_BITS, np.int64)
        for part in parts:
            by_lower_bits += np.bincount(part.lower_bits, minlength=2**LOW_BITS)
        n_open = int(by_lower_bits.sum())
        if sum(part.at.size for part in parts) - n_open != above or n_open < wanted:
            raise _changed(SCALARS_CHANGED)
        del parts
        cut = _cut_within(by_lower_bits, wanted)
    else:
        by_lower_bits = _count_by_lower_bits(pairs, shapes, scratch, low)
        if by_lower_bits.sum() != counts[bucket]:
            raise _changed(SCALARS_CHANGED)
        cut = _cut_within(by_lower_bits, wanted)
        found = _found(pairs, shapes, scratch, _Cut(low + cut.value, cut.ties), None, count)
        if found is None or sum(part.at.size for parts in found.values() for part in parts) != count:
            raise _changed(SCALARS_CHANGED)
    region = Region({name: _selection(shape, found[name], cut) for name, shape in shapes.items()})
    return Top(region, count, total, moved, float(np.int32(low + cut.value).view(np.float32)))


class _Cut:
    """Selects what is above a value of |Δ|, and of what equals it the first so many, over all its calls together."""

    def __init__(self, value: int, ties: int) -> None:
        self.value = value
        self.ties = ties

    def select(self, bits: np.ndarray) -> np.ndarray:
        """bool array (n,) for the bits of |Δ|, or of one bucket the lower ones: integers (n,)."""
        selected = bits > self.value
        if self.ties:
            tied = np.flatnonzero(bits == self.value)[: self.ties]
            selected[tied] = True
            self.ties -= tied.size
        return selected


class _Part(NamedTuple):
    """What was found in one chunk.

    Attributes:
        start: The flat position at which the chunk begins.
        at: int32 array (n,), where in the chunk.
        open: int32 array (m,), which of `at` the cut is still to decide.
        lower_bits: uint16 array (m,), of their |Δ|.
    """

    start: int
    at: np.ndarray
    open: np.ndarray
    lower_bits: np.ndarray


def share_of(percent: Any) -> Fraction:
    """The percent as an exact part of 1. Through its text: the float 0.1 itself is a little more than a tenth.

    Raises:
        RegionError: It is no number, text and True among them, or not above 0 and at most 100.
    """
    try:
        if not isinstance(percent, NUMBERS):  # True is an int, whose text is no number
            raise ValueError(type(percent).__name__)
        share = Fraction(str(percent)) / 100
    except ValueError as error:
        raise RegionError(f"percent {percent!r} is no number: pass one above 0 and up to 100") from error
    if not 0 < share <= 1:
        raise RegionError(f"percent {percent!r} is no part of a model: pass a number above 0 and up to 100")
    return share


def _count_by_upper_bits(
    pairs: Pairs, shapes: dict[str, tuple[int, ...]], scratch: torch.Tensor
) -> tuple[np.ndarray, int]:
    """How many scalars have which upper bits, and how many are not zero. Writes down names and shapes in `shapes`."""
    counts = torch.zeros(2 ** (31 - LOW_BITS), dtype=torch.int64, device="cpu")
    moved = 0
    for name, base, tuned in pairs():
        if name in shapes:
            raise RegionError(f"{name!r} comes twice: every tensor counts once, give it one name")
        _check(name, base, tuned)
        shapes[name] = tuple(base.shape)
        for base_piece, tuned_piece in _pieces(base.detach(), tuned.detach()):
            bits = _bits(base_piece, tuned_piece, scratch)
            n_moved = int(np.count_nonzero(bits.numpy()))
            moved += n_moved
            if n_moved == 0:
                counts[0] += bits.numel()
                continue
            counts += torch.bincount(bits >> LOW_BITS, minlength=counts.numel())
            if counts[INFINITE >> LOW_BITS :].any():
                raise _not_finite(name, base_piece, tuned_piece)
    return counts.numpy(), moved


def _count_by_lower_bits(
    pairs: Pairs, shapes: dict[str, tuple[int, ...]], scratch: torch.Tensor, low: int
) -> np.ndarray:
    """How many scalars of the bucket that begins at `low` have which lower bits."""
    # What is below and above the bucket is counted too, at two places more: to pick out what is in it takes longer.
    counts = torch.zeros(2**LOW_BITS + 2, dtype=torch.int64, device="cpu")
    for _, _, bits in _again(pairs, shapes, scratch):
        places = (torch.from_numpy(bits) - low).clamp_(-1, 2**LOW_BITS).add_(1)
        counts += torch.bincount(places, minlength=counts.numel())
    return counts[1:-1].numpy()


def _found(
    pairs: Pairs,
    shapes: dict[str, tuple[int, ...]],
    scratch: torch.Tensor,
    cut: _Cut,
    open_bucket: int | None,
    most: int,
) -> dict[str, list[_Part]] | None:
    """What a cut selects in every tensor, open where it lies in `open_bucket`; None where it is more than `most`."""
    found: dict[str, list[_Part]] = {name: [] for name in shapes}
    for name, start, bits in _again(pairs, shapes, scratch):
        at = np.flatnonzero(cut.select(bits))
        most -= at.size
        if most < 0:
            return None
        if at.size:
            selected = bits[at]
            open = np.flatnonzero(selected >> LOW_BITS == (-1 if open_bucket is None else open_bucket))
            lower_bits = selected[open] & (2**LOW_BITS - 1)
            part = _Part(start, at.astype(np.int32), open.astype(np.int32), lower_bits.astype(np.uint16))
            found[name].append(part)
    return found


def _again(
    pairs: Pairs, shapes: dict[str, tuple[int, ...]], scratch: torch.Tensor
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Every chunk of a later reading: name, flat position of its first scalar, and the bits of |Δ|, until the next."""
    before = iter(shapes.items())
    for name, base, tuned in pairs():
        _check(name, base, tuned)
        if (expected := next(before, None)) != (name, tuple(base.shape)):
            raise _changed(f"{name!r} of shape {tuple(base.shape)} rather than {_named(expected)}")
        start = 0
        for base_piece, tuned_piece in _pieces(base.detach(), tuned.detach()):
            yield name, start, _bits(base_piece, tuned_piece, scratch).numpy()
            start += base_piece.numel()
    if (expected := next(before, None)) is not None:
        raise _changed(f"nothing rather than {_named(expected)}")


def _check(name: str, base: torch.Tensor, tuned: torch.Tensor) -> None:
    if base.shape != tuned.shape:
        raise RegionError(
            f"{name!r} has shape {tuple(base.shape)} in base and {tuple(tuned.shape)} in tuned, so there is no "
            "difference to take: leave it out, or compare models of one architecture"
        )
    for side, tensor in (("base", base), ("tuned", tuned)):
        if not tensor.dtype.is_floating_point or tensor.is_meta:
            what = "without numbers, on the meta device" if tensor.is_meta else f"of dtype {tensor.dtype}"
            raise RegionError(
                f"{name!r} is {what} in {side}, so there is no difference to take: leave it out, or load it as "
                "floating numbers"
            )


def _pieces(base: torch.Tensor, tuned: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both tensors flattened, piece by piece, at most `CHUNK` scalars each.

    Only pieces are copied where a tensor is not contiguous: flattened as a whole it would be there twice.
    """
    if base.is_contiguous() and tuned.is_contiguous():
        yield from zip(base.view(-1).split(CHUNK), tuned.view(-1).split(CHUNK), strict=True)
    elif (row := base[0].numel()) > CHUNK:
        for base_row, tuned_row in zip(base, tuned, strict=True):
            yield from _pieces(base_row, tuned_row)
    else:
        rows = CHUNK // row
        for base_rows, tuned_rows in zip(base.split(rows), tuned.split(rows), strict=True):
            yield base_rows.reshape(-1), tuned_rows.reshape(-1)


def _bits(base: torch.Tensor, tuned: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """The bits of |tuned − base| in fp32, int32 (n,), in the memory of `scratch`, fp32 (CHUNK,)."""
    work = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
    difference = torch.sub(tuned.to("cpu", work), base.to("cpu", work), out=scratch[: base.numel()])
    return difference.view(torch.int32).bitwise_and_(0x7FFFFFFF)


def _cut_at(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """The greatest index from which on at least `wanted` are counted, and how many are counted above it."""
    from_top = np.cumsum(counts[::-1])
    steps = int(np.searchsorted(from_top, wanted))
    return counts.size - 1 - steps, int(from_top[steps] - counts[counts.size - 1 - steps])


def _cut_within(by_lower_bits: np.ndarray, wanted: int) -> _Cut:
    """The cut through a bucket that takes the `wanted` largest of it."""
    value, above = _cut_at(by_lower_bits, wanted)
    return _Cut(value, wanted - above)


def _selection(shape: tuple[int, ...], parts: list[_Part], cut: _Cut) -> Selection:
    """Of one tensor, after all tensors before it, since the cut counts its ties. Empties `parts`."""
    selected = [(part.start, part.at if not part.open.size else _decided(part, cut)) for part in parts]
    parts.clear()  # the positions are to take their place, not to come on top
    positions = np.empty(sum(at.size for _, at in selected), np.int64)
    done = 0
    for start, at in selected:
        np.add(at, start, out=positions[done : done + at.size], dtype=np.int64)
        done += at.size
    whole = Selection.whole(shape)
    if positions.size == whole.numel:
        return whole
    # Not by `Selection.elements`, whose checks and copy take three times the memory: these are sorted and unique.
    return Selection("elements", shape, torch.from_numpy(positions))


def _decided(part: _Part, cut: _Cut) -> np.ndarray:
    """What of a part is selected."""
    selected = np.ones(part.at.size, bool)
    selected[part.open] = cut.select(part.lower_bits)
    return part.at[selected]


def _not_finite(name: str, base: torch.Tensor, tuned: torch.Tensor) -> RegionError:
    """Says on which side: `base` and `tuned` are the pieces in which it was noticed."""
    sides = [
        side
        for side, piece in (("base", base), ("tuned", tuned))
        if not piece.to("cpu", torch.float64).isfinite().all()
    ]
    where = " and ".join(sides) if sides else "the difference, which is beyond fp32,"
    return RegionError(
        f"{name!r} has NaN or infinity in {where}, so there is no largest |Δ|: repair the checkpoint, or leave this "
        "tensor out"
    )


def _changed(what: str) -> RegionError:
    return RegionError(
        f"called again, pairs yields {what}: pass a function that begins anew each time, and let "
        "nothing write to the tensors meanwhile"
    )


def _named(expected: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if expected is None else f"{expected[0]!r} of shape {expected[1]}"
