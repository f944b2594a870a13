"""The difference of two tensors of one dtype, stored exactly: in units of the dtype's own *grid*, given the base.

**Format `grid/1`**, to the byte. The base and the tuned tensor have the same dtype and shape, and are taken as flat
arrays, row after row. Integers are little-endian; a scalar's *pattern* is its bits as an unsigned integer of n bits. A
complex scalar is two of the floats it is made of.

- A scalar's *place* on the grid is its pattern. Only for the dtypes of `EXPONENT_BITS` it is the pattern with its sign
  bit flipped where that is 0, and with all bits flipped where it is 1: places are in the order of the numbers, and
  neighbours differ by 1. -0.0 lies just below 0.0, NaNs beyond the infinities.
- The *move* of a scalar is `d = place(tuned) - place(base)` mod 2^n, its *number* 0, 1, 2, 3, 4, … for the moves
  0, -1, 1, -2, 2, …
- A code is the six bytes `grid/1`, then one block after the other, each of 2^20 scalars and the last of what remains,
  and at the end the CRC-32 of the tuned tensor's bytes, 4 bytes. Nothing follows it.
- A block is one byte, 0 where nothing in it has changed, and then it ends. Otherwise the byte MUST be `1 + 2 f + 4 g`,
  f and g being 0 or 1, and g 0 for a dtype that is not in `EXPONENT_BITS`.
- If f is 1, a list (`small_numbers.py` has it to the byte) of one-byte numbers follows, one for every scalar of the
  block: 1 where it has changed, 0 where not. There MUST be a 1, and no other number. From here on the block means only
  its scalars that have changed, otherwise all.
- If g is 0, one list of the numbers of these scalars follows. If it is 1, they are taken apart into *groups*: in the
  order of the base's exponents (`EXPONENT_BITS` bits of the pattern below the sign bit), from 0 on, those of an
  exponent join the group, and a group that has 1024 or more then is complete. A list follows for every group, of its
  scalars in their order. In all these lists each number is one less if f is 1.

Equal tensors have no code. What a writer chooses is f, g and how lists are written. A reader MUST refuse all else, and
a tuned tensor of another CRC-32: then the code was altered, or the base is another one.

Why so: Adam moves all scalars of a matrix by amounts of the same size, so how many units of its grid a scalar moves
depends on its own exponent, which the reader sees in the base. Within a group the numbers are alike, and each list is
written to its own measure.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import torch

from ..errors import FormatError, IsolateError
from .small_numbers import Numbers, Reader, read_list, write_list

FORMAT = "grid/1"
BLOCK = 2**20
MAGIC = FORMAT.encode()
LEAST_GROUP = 2**10
# Where a larger share has changed, what has not is no list of its own.
MANY = 0.75

EXPONENT_BITS: dict[torch.dtype, int] = {
    torch.float64: 11,
    torch.float32: 8,
    torch.bfloat16: 8,
    torch.float16: 5,
    torch.float8_e5m2: 5,
    torch.float8_e4m3fn: 4,
}
"""The dtypes whose order is that of sign and magnitude."""

REMEDY = "it was altered, or belongs to another base: get it again from where it came, and the base that it names"
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a contiguous CPU tensor as integers (numel,), a view: unlike ==, these tell −0 from 0."""
    return tensor.detach().contiguous().reshape(-1).view(SIGNED[tensor.element_size()])


def encode(base: torch.Tensor, tuned: torch.Tensor) -> bytes | None:
    """The code of the tuned tensor, given the base.

    Args:
        base: Of any shape and any dtype of safetensors.
        tuned: Of the same shape and dtype.

    Returns:
        The code; None where all bits are the same.

    Raises:
        IsolateError: They differ in shape or dtype.

    Example:
        >>> base = torch.tensor([1.0, 2.0, 3.0])
        >>> code = encode(base, base + 1)
        >>> decode(code, base)
        tensor([2., 3., 4.])
        >>> encode(base, base) is None
        True
    """
    if (base.dtype, base.shape) != (tuned.dtype, tuned.shape):
        raise IsolateError(
            f"a tensor of {tuned.dtype} and shape {tuple(tuned.shape)} is not on the grid of the base's {base.dtype} "
            f"and shape {tuple(base.shape)}: store it whole"
        )
    old, new = _patterns(base), _patterns(tuned)
    exponent_bits = _exponent_bits(base.dtype)
    out = bytearray(MAGIC)
    changed = False
    for start in range(0, old.size, BLOCK):
        block = _block(old[start : start + BLOCK], new[start : start + BLOCK], exponent_bits)
        changed = changed or len(block) > 1
        out += block
    if not changed:
        return None
    out += struct.pack("<I", _checksum(new))
    return bytes(out)


def decode(code: bytes | np.ndarray, base: torch.Tensor) -> torch.Tensor:
    """The tuned tensor, bit for bit. Beside it, memory for a block is taken, whatever the code is.

    Args:
        code: As `encode` returned it, also as a uint8 array.
        base: As it was given to `encode`.

    Returns:
        A new tensor of the base's dtype and shape, on the CPU.

    Raises:
        FormatError: The code is not one for this base.
    """
    data = np.frombuffer(code, np.uint8)
    begins = data[: len(MAGIC)].tobytes()
    if begins != MAGIC:
        raise FormatError(
            f"a code begins with {begins!r}, not with {MAGIC!r}: it is of a newer version or was altered; update "
            "peft_isolate, or get it again from where it came"
        )
    exponent_bits = _exponent_bits(base.dtype)
    old = _patterns(base)
    new = np.empty_like(old)
    source = Reader(data[len(MAGIC) :])
    try:
        for start in range(0, old.size, BLOCK):
            new[start : start + BLOCK] = _read_block(source, old[start : start + BLOCK], exponent_bits)
        (checksum,) = source.unpack("<I")
        if source.left:
            raise FormatError(f"{source.left:,} bytes follow its end")
        if checksum != _checksum(new):
            raise FormatError(f"it gives a tensor of CRC-32 {_checksum(new):08x}, not of {checksum:08x}")
    except FormatError as error:
        raise FormatError(
            f"{data.size:,} bytes are no code of a tensor tuned from this one of {old.size:,} scalars of {base.dtype} "
            f"({error}): {REMEDY}"
        ) from error
    signed = torch.from_numpy(new.view(f"i{new.itemsize}"))
    return signed.view(base.dtype).reshape(base.shape)


def _block(old: Numbers, new: Numbers, exponent_bits: int) -> bytes:
    """Of two blocks of patterns, the block of the code."""
    numbers = _zigzag(_places(new) - _places(old) if exponent_bits else new - old)
    n_changed = np.count_nonzero(numbers)
    if not n_changed:
        return bytes(1)
    grouped = exponent_bits > 0
    written = [bytearray([1 + 4 * grouped])]
    _write_groups(written[0], old, numbers, exponent_bits)
    if n_changed <= MANY * old.size:
        changed = numbers != 0
        written.append(bytearray([3 + 4 * grouped]))
        write_list(written[1], changed.view(np.uint8))
        _write_groups(written[1], old[changed], numbers[changed] - numbers.dtype.type(1), exponent_bits)
    return bytes(min(written, key=len))


def _write_groups(out: bytearray, old: Numbers, numbers: Numbers, exponent_bits: int) -> None:
    """Append the lists of all groups: with no bits of an exponent one list."""
    if not exponent_bits:
        return write_list(out, numbers)
    order, sizes = _groups(old, exponent_bits)
    numbers = numbers[order]
    for group in np.split(numbers, np.cumsum(sizes)[:-1]):
        write_list(out, group)


def _read_block(source: Reader, old: Numbers, exponent_bits: int) -> Numbers:
    """The inverse of `_block`."""
    (head,) = source.unpack("<B")
    if not head:
        return old
    if head not in ((1, 3, 5, 7) if exponent_bits else (1, 3)):
        raise FormatError(f"a block begins with {head}, which none does")
    grouped_by = exponent_bits if head & 4 else 0
    if head & 2:
        changed = read_list(source, old.size, np.dtype(np.uint8))
        if changed.max() != 1:
            raise FormatError(f"the list of what has changed goes up to {changed.max()}, not to 1")
        where = np.flatnonzero(changed)
        numbers = np.zeros_like(old)
        numbers[where] = _read_groups(source, old[where], grouped_by) + old.dtype.type(1)
    else:
        numbers = _read_groups(source, old, grouped_by)
    moves = _zagzig(numbers)
    return _patterns_at(_places(old) + moves) if exponent_bits else old + moves


def _read_groups(source: Reader, old: Numbers, exponent_bits: int) -> Numbers:
    """The inverse of `_write_groups`."""
    if not exponent_bits:
        return read_list(source, old.size, old.dtype)
    order, sizes = _groups(old, exponent_bits)
    numbers = np.empty_like(old)
    start = 0
    for size in sizes.tolist():
        numbers[order[start : start + size]] = read_list(source, size, old.dtype)
        start += size
    return numbers


def _groups(old: Numbers, exponent_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The scalars in the order of their groups, and the sizes of the groups."""
    shift = old.dtype.type(8 * old.itemsize - 1 - exponent_bits)
    exponents = (old >> shift & old.dtype.type(2**exponent_bits - 1)).astype(np.uint16)
    counts = np.bincount(exponents)
    group_of = np.zeros(counts.size, np.uint16)
    sizes = [0]
    for exponent in np.flatnonzero(counts):
        if sizes[-1] >= LEAST_GROUP:
            sizes.append(0)
        group_of[exponent] = len(sizes) - 1
        sizes[-1] += int(counts[exponent])
    return np.argsort(group_of[exponents], kind="stable"), np.array(sizes)


def _places(patterns: Numbers) -> Numbers:
    """The patterns of floats -> their places on the grid."""
    sign = patterns >> patterns.dtype.type(8 * patterns.itemsize - 1)
    return patterns ^ (-sign | _top(patterns))


def _patterns_at(places: Numbers) -> Numbers:
    """The inverse of `_places`."""
    sign = places >> places.dtype.type(8 * places.itemsize - 1)
    return places ^ ((sign - places.dtype.type(1)) | _top(places))


def _top(patterns: Numbers) -> Any:
    return patterns.dtype.type(1 << (8 * patterns.itemsize - 1))


def _zigzag(moves: Numbers) -> Numbers:
    """Moves mod 2^n -> numbers, small for small moves of either sign."""
    return (moves << moves.dtype.type(1)) ^ -(moves >> moves.dtype.type(8 * moves.itemsize - 1))


def _zagzig(numbers: Numbers) -> Numbers:
    """The inverse of `_zigzag`."""
    return (numbers >> numbers.dtype.type(1)) ^ -(numbers & numbers.dtype.type(1))


def _exponent_bits(dtype: torch.dtype) -> int:
    """Of a float, or of the floats that a complex scalar is made of; 0 for what has a plain grid."""
    return EXPONENT_BITS.get(dtype.to_real() if dtype.is_complex else dtype, 0)


def _patterns(tensor: torch.Tensor) -> Numbers:
    """The bits of a tensor as a flat array of unsigned integers; a view where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    size = flat.element_size()
    return flat.view(SIGNED[size]).numpy().view(f"u{size}")


def _checksum(patterns: Numbers) -> int:
    return zlib.crc32(patterns.view(np.uint8).data)
