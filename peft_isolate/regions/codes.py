"""Positions of single scalars as bytes: *gap codes*, within a tenth of the entropy and decoded in a few nanoseconds.

**Format `gapB`**, B from 1 to 32, to the byte. A code writes `count` positions `0 <= p_0 < p_1 < … < numel`, the flat
positions of scalars in a tensor of `numel`, as a sequence of *units*, whole numbers of B bits:

- Each position is written as its step `s_i = p_i - p_(i-1) >= 1` from the one before (`p_(-1) = -1`): as
  `(s_i - 1) // (2^B - 1)` units 0, each of which steps over `2^B - 1` scalars, and then one unit
  `1 + (s_i - 1) % (2^B - 1)`, which is never 0, steps that far and *ends* the position.
- Units 0, at most seven, are appended until their number U is a multiple of eight: the padding. So a code of no
  positions is empty, any other has an end among its last eight units, and `code_bytes = U / 8 * B`.
- The units are written as *planes*, one after the other, without anything between. A plane holds some of the bits of
  every unit, as many as 8, 4, 2 or 1: B is written as a sum of these, the largest first (`14 = 8 + 4 + 2`), and the
  first plane holds the lowest bits of the units, each next plane the next higher.
- A plane of w bits holds 8/w units a byte, the first in the lowest bits.

Every sequence of positions has exactly one code in each format, and bytes are a code in at most one way: `decode`
MUST refuse all others. A buffer of zeros, such as a placeholder into which nothing was loaded, has no end and is
never a code. Which format is used is the writer's choice: `encode` takes the B with the least expected cost
`B / (1 - (1 - d)^(2^B - 1))` bits a position for positions drawn at random with density `d = count / numel`. That is
at most 1.10 times the entropy for d between 1e-8 and 0.6; for denser ones `gap1`, which is a bitmap cut after the last
position, costs 1/d bits.

Why so: zero as the unit that does not end lets an encoder write the ends into zeroed memory, and planes of a power of
two bits are taken apart by operations on whole arrays, several scalars an instruction. There is no position that a
damaged code could put out of order, so only its ends and its total need a check.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..errors import FormatError, RegionError

FORMATS: dict[str, int] = {f"gap{width}": width for width in range(1, 33)}
"""The bits of a unit, by the format's name."""

CHUNK = 2**16
"""Positions and units worked on at once, a multiple of eight: what is made of them stays in a core's cache."""

RELOAD = "the positions were never loaded or the file was altered: load the adapter again from where it came"


@dataclass(frozen=True)
class Codes:
    """What must be known of a code besides its bytes; kept in the adapter's config.

    Attributes:
        count: Positions.
        code_bytes: Bytes of the code.
        format: A key of `FORMATS`.
    """

    count: int
    code_bytes: int
    format: str

    def to_dict(self) -> dict[str, Any]:
        """The description as it stands in JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, described: Any) -> Codes:
        """The inverse of `to_dict`.

        Raises:
            FormatError: The description is not one that `to_dict` writes. Whether it fits a tensor, `check_size` says.
        """
        try:
            codes = cls(**described)
        except TypeError as error:
            raise FormatError(
                f"{described!r} describes no codes, which have count, code_bytes and format: the adapter's config was "
                "altered or is of another version; restore it"
            ) from error
        for name, value in (("count", codes.count), ("code_bytes", codes.code_bytes)):
            if type(value) is not int or value < 0:
                raise FormatError(
                    f"{name} {value!r} of codes is not a whole number from 0 on: the adapter's config was altered; "
                    "restore it"
                )
        _width(codes.format)
        return codes

    def check_size(self, numel: int) -> None:
        """Refuse a size that no code of `count` positions below `numel` has.

        To be called before a placeholder of `code_bytes` is made: it bounds what a stranger's config can allocate.

        Raises:
            FormatError: There is no such code.
        """
        width = _width(self.format)
        blocks, rest = divmod(self.code_bytes, width)
        fewest, most = self.count, _most_units(self.count, numel, width)
        if self.count > numel or rest or not -(-fewest // 8) <= blocks <= -(-most // 8):
            raise FormatError(
                f"{self.code_bytes:,} bytes cannot be the {self.format} code of {self.count:,} positions in a tensor "
                f"of {numel:,} scalars: {RELOAD}"
            )


def encode(
    positions: np.ndarray | torch.Tensor, numel: int, format: str | None = None
) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], str]:
    """The code of sorted, unique positions.

    Args:
        positions: int32 or int64 array or CPU tensor (count,), sorted and unique, from 0 to `numel - 1`.
        numel: Scalars of the tensor.
        format: A key of `FORMATS`; None for the one with the least expected cost at this density.

    Returns:
        uint8 array (code_bytes,), a new one, and its format.

    Raises:
        RegionError: The positions are out of range, unsorted, repeated or no list of int32 or int64.
        FormatError: The format is unknown.

    Example:
        >>> code, format = encode(np.array([0, 1, 3, 11]), numel=16)
        >>> code.tolist(), format
        ([37, 8], 'gap2')
        >>> decode(code, format, count=4, numel=16).tolist()
        [0, 1, 3, 11]
    """
    flat = _as_list(positions)
    count = flat.size
    if format is None:
        format = _cheapest(count, numel)
    width = _width(format)
    if count == 0:
        return np.zeros(0, np.uint8), format
    # Of the others, being sorted says enough.
    for position in (int(flat[0]), int(flat[-1])):
        if not 0 <= position < numel:
            raise RegionError(
                f"position {position} is out of range, there are {numel:,} scalars: the positions belong to another "
                "tensor, or are unsorted"
            )
    escape = 2**width - 1
    # int32 does twice the work an instruction, and every position and every step fits wherever `numel` does.
    work = np.int32 if numel < 2**31 and escape < 2**31 else np.int64

    # The number of units is known only at the end. Planes of the greatest number that end at the last position cost
    # little more: what is never written never becomes memory, and the width was chosen so that escapes are few.
    final = int(flat[-1])
    most = -(-_most_units(count, max(count, final + 1), width) // 8) * 8
    planes = [(np.zeros(most // 8 * bits, np.uint8), shift, bits) for shift, bits in _planes(width)]
    window = np.zeros(min(CHUNK, most), _unit_dtype(width))
    at = 0  # the unit at which the window stands, a multiple of CHUNK
    n_units = 0
    last = -1
    for start in range(0, count, CHUNK):
        chunk = flat[start : start + CHUNK]
        if chunk[0] <= last or chunk[-1] > final or not (chunk[1:] > chunk[:-1]).all():
            raise _unsorted(flat)
        steps = np.empty(chunk.size, work)
        steps[0] = int(chunk[0]) - last
        chunk_in_work = chunk.astype(work, copy=False)
        np.subtract(chunk_in_work[1:], chunk_in_work[:-1], out=steps[1:])
        last = int(chunk[-1])
        steps -= 1
        escapes = steps // escape
        values = (steps - escapes * escape + 1).astype(window.dtype)
        ends = np.cumsum(escapes, dtype=np.int64)
        ends += np.arange(n_units, n_units + chunk.size)
        n_units = int(ends[-1]) + 1
        # The units are filled window by window, not chunk by chunk, since one long gap may be millions of units: the
        # windows in which nothing ends are left as the zeros they are.
        done = 0
        while done < chunk.size:
            home = int(ends[done]) // CHUNK * CHUNK
            if home != at:
                _write(window, planes, at)
                window[:] = 0
                at = home
            stop = int(np.searchsorted(ends, home + CHUNK))
            window[ends[done:stop] - home] = values[done:stop]
            done = stop
    _write(window, planes, at)
    blocks = -(-n_units // 8)
    return np.concatenate([plane[: blocks * bits] for plane, _, bits in planes]), format


def decode(codes: np.ndarray, format: str, count: int, numel: int) -> np.ndarray:
    """The positions that a code was made of. What it allocates is bounded by the size of the code.

    Args:
        codes: uint8 array (code_bytes,).
        format: As `encode` returned it.
        count: Positions.
        numel: Scalars of the tensor.

    Returns:
        Array (count,), sorted and unique, from 0 to `numel - 1`: int32 where `numel < 2**31`, else int64.

    Raises:
        FormatError: The bytes are not the code of `count` positions below `numel`.
    """
    width = _check_facts(codes, format, count, numel)
    escape = 2**width - 1
    # Sums within a chunk must not overflow, whatever the bytes are.
    sums_dtype = np.int32 if CHUNK * escape < 2**31 else np.int64
    positions = np.empty(count, np.int32 if numel < 2**31 else np.int64)
    done = total = 0
    for units in _units(codes, width):
        is_escape = units == 0
        # 0 - 1 is all ones: taking the comparison's 1 away turns an escape into the 2^B - 1 that it steps.
        steps = units - is_escape.view(np.uint8)
        if width != 8 * steps.itemsize:
            steps &= steps.dtype.type(escape)
        sums = np.cumsum(steps, dtype=sums_dtype)
        ends = np.flatnonzero(~is_escape)
        stop, start, total = done + ends.size, total, total + int(sums[-1])
        if stop > count or total > numel:
            raise _not_a_code(codes, format, count, numel)
        found = positions[done:stop]
        found[:] = sums.take(ends, mode="clip")  # "clip" is faster than "raise", and every end is in range
        found += start - 1
        done = stop
    if done != count:
        raise _not_a_code(codes, format, count, numel)
    return positions


def check(codes: np.ndarray, format: str, count: int, numel: int) -> None:
    """Raise as `decode` does, in a fraction of its time: no position is built.

    Args:
        codes: uint8 array (code_bytes,).
        format: As `encode` returned it.
        count: Positions.
        numel: Scalars of the tensor.

    Raises:
        FormatError: The bytes are not the code of `count` positions below `numel`.
    """
    width = _check_facts(codes, format, count, numel)
    done = total = 0
    for units in _units(codes, width):
        ends = int(np.count_nonzero(units))
        done += ends
        total += int(units.sum(dtype=np.int64)) + (units.size - ends) * (2**width - 1)
    if done != count or total > numel:
        raise _not_a_code(codes, format, count, numel)


def _width(format: Any) -> int:
    width = FORMATS.get(format) if isinstance(format, str) else None
    if width is None:
        raise FormatError(
            f"format {format!r} of codes is unknown, this version reads gap1 to gap32: the adapter is of a newer "
            "version or was altered; update peft_isolate, or load the adapter again from where it came"
        )
    return width


def _cheapest(count: int, numel: int) -> str:
    """The format with the least expected cost for `count` positions drawn at random."""
    if not 0 < count < numel:
        return "gap1"
    log_rest = math.log1p(-count / numel)
    # expm1 keeps what 1 - (1 - d)^(2^B - 1) would round away at small densities.
    return min(FORMATS, key=lambda name: FORMATS[name] / -math.expm1(log_rest * (2 ** FORMATS[name] - 1)))


def _most_units(count: int, numel: int, width: int) -> int:
    """Units, padding aside, that a code of `count` positions below `numel` can have at most."""
    return count + (numel - count) // (2**width - 1) if count else 0


def _unit_dtype(width: int) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if width <= 8 else np.uint16 if width <= 16 else np.uint32


def _planes(width: int) -> list[tuple[int, int]]:
    """(lowest bit, bits) of every plane, in the order in which they are written."""
    planes = []
    shift = 0
    while shift < width:
        bits = next(bits for bits in (8, 4, 2, 1) if bits <= width - shift)
        planes.append((shift, bits))
        shift += bits
    return planes


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 array (8 n,) of values of 8, 4, 2 or 1 bits -> uint8 array (n * bits,)."""
    while bits < 8:
        # Two neighbours at once, as one number: the upper moves down beside the lower.
        pairs = values.view("<u2")
        values = (pairs | (pairs >> np.uint16(8 - bits))).astype(np.uint8)
        bits *= 2
    return values


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `_pack`. Of 8 bits it returns the argument itself."""
    values, have = packed, 8
    while have > bits:
        have //= 2
        pairs = values.astype("<u2")
        pairs |= pairs << np.uint16(8 - have)
        pairs &= np.uint16(0x0101 * (2**have - 1))
        values = pairs.view(np.uint8)
    return values


def _write(window: np.ndarray, planes: list[tuple[np.ndarray, int, int]], at: int) -> None:
    """Put a window of units, which begins at unit `at`, into the planes `(plane, lowest bit, bits)`."""
    for plane, shift, bits in planes:
        values = window
        if len(planes) > 1:
            values = ((window >> window.dtype.type(shift)) & window.dtype.type(2**bits - 1)).astype(np.uint8)
        target = plane[at // 8 * bits : (at + window.size) // 8 * bits]
        target[:] = _pack(values, bits)[: target.size]


def _units(codes: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """The units of a code without its padding, chunk by chunk: uint8, uint16 or uint32 arrays, none of them empty.

    The arrays may be views of `codes`. Trailing escapes are left away as far as they can be padding, so the last
    array ends in an end, unless the code has eight escapes or more there.
    """
    n_units = codes.size // width * 8
    for start in range(0, n_units, CHUNK):
        stop = min(start + CHUNK, n_units)
        parts = []
        for shift, bits in _planes(width):
            plane = n_units // 8 * shift
            parts.append((shift, _unpack(codes[plane + start // 8 * bits : plane + stop // 8 * bits], bits)))
        units = parts[0][1]
        if len(parts) > 1:
            units = units.astype(_unit_dtype(width))
            for shift, part in parts[1:]:
                units |= part.astype(units.dtype) << units.dtype.type(shift)
        if stop == n_units:
            ends = np.flatnonzero(units[-8:])
            if ends.size:
                units = units[: units.size - 7 + int(ends[-1])]
        yield units


def _check_facts(codes: np.ndarray, format: str, count: int, numel: int) -> int:
    """Check all that takes no look at the units but the last eight; returns the width."""
    if codes.dtype != np.uint8 or codes.ndim != 1:
        raise FormatError(f"codes of dtype {codes.dtype} and shape {codes.shape} are not one list of bytes: {RELOAD}")
    facts = Codes.from_dict({"count": count, "code_bytes": codes.size, "format": format})
    facts.check_size(numel)
    width = FORMATS[format]
    n_blocks = codes.size // width
    if n_blocks and not any(
        codes[n_blocks * shift + (n_blocks - 1) * bits : n_blocks * shift + n_blocks * bits].any()
        for shift, bits in _planes(width)
    ):
        raise _not_a_code(codes, format, count, numel)
    return width


def _as_list(positions: np.ndarray | torch.Tensor) -> np.ndarray:
    right_kind = positions.dtype in (torch.int32, torch.int64, np.int32, np.int64)
    if not right_kind or positions.ndim != 1:
        raise RegionError(
            f"positions of dtype {positions.dtype} and shape {tuple(positions.shape)} cannot be encoded: pass one "
            "list of int32 or int64"
        )
    return positions.numpy() if isinstance(positions, torch.Tensor) else positions


def _unsorted(flat: np.ndarray) -> RegionError:
    at = int(np.flatnonzero(flat[1:] <= flat[:-1])[0])
    return RegionError(
        f"positions must be sorted and unique, but {int(flat[at])} comes before {int(flat[at + 1])}: "
        "pass torch.unique(positions)"
    )


def _not_a_code(codes: np.ndarray, format: str, count: int, numel: int) -> FormatError:
    """The error, which may take its time to say what the bytes are instead."""
    ends = sum(int(np.count_nonzero(units)) for units in _units(codes, FORMATS[format]))
    if ends == 0:
        held = "are nothing but zeros"
    elif ends != count:
        held = f"hold {ends:,} positions"
    else:
        held = "reach beyond its last scalar or go on after the last position"
    return FormatError(
        f"{codes.size:,} bytes are not the {format} code of {count:,} positions in a tensor of {numel:,} scalars, "
        f"they {held}: {RELOAD}"
    )
