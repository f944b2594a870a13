"""Lists of whole numbers, most of them small, as bytes: within a few hundredths of the entropy, by array operations.

**A list**, to the byte: m >= 1 numbers of S bytes each (1, 2, 4 or 8), m and S being known from elsewhere. Integers
are little-endian. It is written as one to eight *levels*, of which the first is of all m numbers. A level of numbers
z, of s bytes each, is

- one byte `16 p + w`: p from 0 to s, w one of 0, 1, 2 and 8; w MUST be 0 where p is s, and on the eighth level;
- p sections, the *planes*: the lowest byte of every z, then the next higher one of every z, and so on. What remains
  of a number is `h = z >> 8 p`, of s - p bytes;
- where w is 0, every h is 0 and the list ends. Otherwise one section, the *symbols* `min(h, 2^w - 1)`, w bits each,
  8/w a byte, the first in its lowest bits, the last byte filled up with zeros. The numbers whose symbol is 2^w - 1 go
  on: the next level is of their `h - (2^w - 1)`, in their order. Where there are none, the list ends.

**A section** of L >= 1 bytes, L being known, is one byte that says how they are written, and then

- 0: the bytes themselves;
- 1: the size of a zstd frame, 4 bytes, and the frame, which MUST state L and hold L bytes;
- 2, for symbols of one bit only: B, 1 byte; a count, 4 bytes; a size, 4 bytes; and of that size the code, `gapB` of
  `regions/codes.py`, of the positions of the symbols 1.

A reader MUST refuse what ends early. Which p, w and way each takes is the writer's choice: this one estimates, on a
sample of the numbers, what Huffman's code takes, which is what zstd has for bytes that do not repeat.

Why so: Huffman's code spends at least a bit on a byte and whole bits on every one, so numbers that carry less than
some two bits are put together, four or eight in a byte, and rare ones become positions; the low bytes of large numbers
are noise, and kept as they are.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import zstandard

from ..errors import FormatError
from ..regions import codes
from ..regions.frames import compress, decompress

LEVELS = 8
WIDTHS = (1, 2, 8)
# Numbers on which a level's choice is made.
SAMPLE = 2**12
# For what does repeat, such as whole rows without a change, this one finds as much as higher ones do.
ZSTD_LEVEL = 1
NO_SEARCH = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6, write_content_size=True)
RAW, ZSTD, GAPS = 0, 1, 2

Numbers = np.ndarray[Any, np.dtype[Any]]
"""Of dtype uint8, uint16, uint32 or uint64."""


class Reader:
    """Bytes from a stranger, taken from the front.

    Args:
        data: All of them.
    """

    def __init__(self, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not yet taken."""
        return self._data.size - self._at

    def take(self, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The next bytes, a view.

        Raises:
            FormatError: There are fewer.
        """
        if size > self.left:
            raise FormatError(f"it ends at byte {self._data.size:,}, {size - self.left:,} before something does")
        self._at += size
        return self._data[self._at - size : self._at]

    def unpack(self, format: str) -> tuple[Any, ...]:
        """The next fields, as `struct` names them."""
        return struct.unpack(format, self.take(struct.calcsize(format)).tobytes())


def write_list(out: bytearray, numbers: Numbers) -> None:
    """Append a list.

    Args:
        out: What is appended to.
        numbers: (m,), at least one, uint8 to uint64.
    """
    for level in range(LEVELS):
        n_planes, width = _choose(numbers) if level < LEVELS - 1 else (_bytes_of(int(numbers.max())), 0)
        out.append(16 * n_planes + width)
        for i in range(n_planes):
            _write_section(out, _plane(numbers, i))
        if not width:
            return
        rest, going_on = _step(numbers, n_planes, width)
        symbols = np.minimum(rest, 2**width - 1).astype(np.uint8)
        _write_section(out, _pack(symbols, width), symbols if width == 1 else None)
        numbers = going_on
        if not numbers.size:
            return


def read_list(source: Reader, count: int, dtype: np.dtype[Any]) -> Numbers:
    """Take a list. What it allocates is bounded by a few times the list's size in memory.

    Args:
        source: Stands at the list, and behind it afterwards.
        count: Numbers, at least one.
        dtype: uint8 to uint64.

    Returns:
        The numbers, (count,).

    Raises:
        FormatError: There is no such list.
    """
    return _read_level(source, count, dtype, dtype.itemsize, LEVELS)


def _read_level(source: Reader, count: int, dtype: np.dtype[Any], size: int, levels: int) -> Numbers:
    (head,) = source.unpack("<B")
    n_planes, width = divmod(head, 16)
    if n_planes > size or (width and (width not in WIDTHS or n_planes == size or levels == 1)):
        raise FormatError(f"a level of numbers of {size} bytes begins with {head}, which none does")
    numbers = np.zeros(count, dtype)
    for i in range(n_planes):
        numbers |= _read_section(source, count).astype(dtype) << dtype.type(8 * i)
    if width:
        high = _read_section(source, count, width).astype(dtype)
        going_on = np.flatnonzero(high == 2**width - 1)
        if going_on.size:
            high[going_on] += _read_level(source, going_on.size, dtype, size - n_planes, levels - 1)
        numbers |= high << dtype.type(8 * n_planes)
    return numbers


def _choose(numbers: Numbers) -> tuple[int, int]:
    """The planes and the width for a level: those of the least estimated cost."""
    most = _bytes_of(int(numbers.max()))
    if not most:
        return 0, 0
    # An odd step, so as not to fall into the same columns of a matrix again and again.
    sample = numbers[:: numbers.size // SAMPLE | 1]
    scale = numbers.size / sample.size
    usual = _bytes_of(int(np.partition(sample, sample.size * 9 // 10)[sample.size * 9 // 10]))
    planes = [_bits(_plane(sample, i), scale) for i in range(most)]
    choices = []
    for n_planes in {max(0, usual - 1), usual}:
        low = sum(planes[:n_planes])
        if n_planes == most:
            choices.append((low, n_planes, 0))
            continue
        for width in WIDTHS:
            rest, going_on = _step(sample, n_planes, width)
            symbols = np.minimum(rest, 2**width - 1).astype(np.uint8)
            cost = _bits(_pack(symbols, width), scale)
            if width == 1:
                # Gap codes: within 1.08 of the entropy.
                share = going_on.size / sample.size
                cost = min(cost, 1.08 * numbers.size * _entropy(share))
            if going_on.size:
                cost += sum(_bits(_plane(going_on, i), scale) for i in range(_bytes_of(int(going_on.max()))))
            choices.append((low + cost, n_planes, width))
    _, n_planes, width = min(choices)
    return n_planes, width


def _bits(data: np.ndarray, scale: float) -> float:
    """An estimate of what a section of `scale` times as many bytes as these takes, of the same distribution."""
    return 8 * len(_huffman(data)) * scale


def _entropy(share: float) -> float:
    """Of one yes or no, in bits."""
    if not 0 < share < 1:
        return 0.0
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def _bytes_of(number: int) -> int:
    return -(-number.bit_length() // 8)


def _plane(numbers: Numbers, i: int) -> np.ndarray:
    return (numbers >> numbers.dtype.type(8 * i)).astype(np.uint8)


def _step(numbers: Numbers, n_planes: int, width: int) -> tuple[Numbers, Numbers]:
    """(what remains of every number beside its planes, what the next level is of)."""
    last = numbers.dtype.type(2**width - 1)
    rest = numbers >> numbers.dtype.type(8 * n_planes)
    return rest, rest[rest >= last] - last


def _pack(symbols: np.ndarray, width: int) -> np.ndarray:
    """uint8 array (m,) of symbols of 1, 2 or 8 bits -> uint8 array (ceil(m width / 8),)."""
    if width == 8:
        return symbols
    if width == 1:
        return np.packbits(symbols, bitorder="little")
    four = np.concatenate([symbols, np.zeros(-symbols.size % 4, np.uint8)]).view("<u4")
    return (four | four >> np.uint32(6) | four >> np.uint32(12) | four >> np.uint32(18)).astype(np.uint8)


def _unpack(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """The inverse of `_pack`."""
    if width == 8:
        return packed
    if width == 1:
        return np.unpackbits(packed, count=count, bitorder="little")
    four = packed.astype("<u4")
    four |= four << np.uint32(6) | four << np.uint32(12) | four << np.uint32(18)
    four &= np.uint32(0x03030303)
    return four.view(np.uint8)[:count]


def _huffman(data: np.ndarray) -> bytes:
    """A zstd frame of Huffman's code, in which next to no repetitions are looked for.

    In bytes that are drawn at random there are always some that repeat by chance; zstd takes them, at a loss of up to
    15 %, and takes its time.
    """
    return zstandard.ZstdCompressor(compression_params=NO_SEARCH).compress(np.ascontiguousarray(data).data)


def _write_section(out: bytearray, data: np.ndarray, bits: np.ndarray | None = None) -> None:
    """Append a section: `data`, or where it is given and shorter so, the positions of 1 in `bits`."""
    body = min(_huffman(data), compress(data, ZSTD_LEVEL), key=len)
    written = struct.pack("<BI", ZSTD, len(body)) + body
    if len(written) > data.size:
        written = bytes([RAW]) + data.tobytes()
    if bits is not None:
        positions = np.flatnonzero(bits)
        if 0 < positions.size < bits.size // 4:
            code, format = codes.encode(positions, bits.size)
            fields = struct.pack("<BBII", GAPS, codes.FORMATS[format], positions.size, code.size)
            written = min(written, fields + code.tobytes(), key=len)
    out += written


def _read_section(source: Reader, count: int, width: int = 8) -> np.ndarray:
    """Take a section of `count` symbols of `width` bits, or of bytes: uint8 array (count,)."""
    (kind,) = source.unpack("<B")
    size = -(-count * width // 8)
    if kind == RAW:
        return _unpack(source.take(size), width, count)
    if kind == ZSTD:
        return _unpack(decompress(source.take(*source.unpack("<I")), size), width, count)
    if kind != GAPS or width > 1:
        raise FormatError(f"a section of {size:,} bytes is written in the unknown way {kind}")
    gap_bits, n_positions, code_bytes = source.unpack("<BII")
    symbols = np.zeros(count, np.uint8)
    symbols[codes.decode(source.take(code_bytes), f"gap{gap_bits}", n_positions, count)] = 1
    return symbols
