"""The numbers of one delta and where they go as one list of bytes, to share: for inference only.

**The buffer, to the byte**, little-endian throughout. It is a *part* for what learns and one for what is held, in this
order, as far as the delta has them, and then the CRC-32 (4 bytes) of all bytes before it. A part is:

1. The *kind* of its numbers, a byte: 1 bfloat16, 2 float16, 3 float32, 4 float64, 5 int8.
2. For a selection by elements, a *section* with the code of its positions, see `regions.codes`.
3. For int8 a section of float32 *scales*, one for each *row*: the last dimension of the delta, where that has
   `SHORTEST_ROW` numbers or more and they are no single elements; else `CHUNK` numbers of the delta seen as one list,
   the last row what is left. A number is its int8, from -127 to 127, times its row's scale.
4. The numbers, in the order of the delta, one section for each of their bytes, the lowest first. Those of int8 have
   one byte; of the others the bits are rotated by one to the left before, so that the sign is the lowest bit and the
   last section has the exponent's highest bits alone, up to eight: what can be compressed.

A section is the number of bytes that follow (8 bytes) and these: its content itself, if there are as many as that has,
or else one zstd frame of it, which is shorter. How large a content is follows from the adapter's config.

Readers MUST refuse a buffer that is not all used, whose checksum or kinds are others, or whose numbers are not finite.
Zeros only, such as a placeholder into which nothing was loaded, are never a buffer.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ..errors import FormatError, IsolateError
from ..regions.codes import FORMATS, Codes, encode
from ..regions.frames import compress, decompress
from ..regions.stored import Place, StoredSelection
from .delta import HELD, TRAINED, all_finite
from .support import delta_shape

VALUES = ("bf16", "fp16", "int8", "exact")

KINDS = {1: torch.bfloat16, 2: torch.float16, 3: torch.float32, 4: torch.float64, 5: torch.int8}
CODE_OF = {dtype: code for code, dtype in KINDS.items()}
KINDS_OF = {
    "bf16": (torch.bfloat16,),
    "fp16": (torch.float16,),
    "int8": (torch.int8,),
    "exact": (torch.bfloat16, torch.float16, torch.float32, torch.float64),
}
"""What the numbers of a part may be, by the config's word."""

SHORTEST_ROW = 512
CHUNK = 2**14
LARGEST = 127
# Of single elements, where zstd turns fewer steps into fewer bytes: their positions cost a byte each already, and with
# 63 steps instead of 127 a tenth of all that is left is saved (benchmarks/compress.py has the error).
LARGEST_OF_ELEMENTS = 63

LENGTH, CHECKSUM = 8, 4  # bytes
# Of zstd: what one finds more in, the other finds less in.
LEVELS = (1, 9)
# Numbers rounded at once.
BLOCK = 2**20

RELOAD = "it was never loaded or was altered: load the adapter again from where it came"


@dataclass(frozen=True)
class PackedPart:
    """What must be known of a part besides its bytes; all of it follows from the selection.

    Attributes:
        name: "delta" or "held".
        shape: Of its numbers, see `delta_shape`.
        by_elements: Whether they are of single elements.
        code_bytes: Of the positions' code; None where there is none.
    """

    name: str
    shape: tuple[int, ...]
    by_elements: bool
    code_bytes: int | None

    @classmethod
    def of(cls, name: str, place: Place) -> PackedPart:
        """Of "delta" or "held" on its selection."""
        if isinstance(place, StoredSelection):
            shape = delta_shape(place.kind, place.shape, place.codes.count)
            return cls(name, shape, place.kind == "elements", place.codes.code_bytes)
        return cls(name, delta_shape(place.kind, place.shape, place.indices.numel()), False, None)

    @property
    def count(self) -> int:
        """Numbers."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Numbers that share a scale."""
        long = not self.by_elements and self.shape and self.shape[-1] >= SHORTEST_ROW
        return self.shape[-1] if long else CHUNK

    @property
    def rows(self) -> int:
        """Scales."""
        return -(-self.count // self.row)

    def sizes(self, dtype: torch.dtype) -> list[int]:
        """Bytes of the content of each section, with numbers of this dtype."""
        codes = [] if self.code_bytes is None else [self.code_bytes]
        scales = [4 * self.rows] if dtype == torch.int8 else []
        return [*codes, *scales, *[self.count] * dtype.itemsize]


@dataclass(frozen=True)
class Packing:
    """What must be known of a buffer besides its bytes.

    Attributes:
        values: What its numbers are, one of `VALUES`.
        n_bytes: Its size, as the adapter's config states it.
        parts: In the buffer's order.
    """

    values: str
    n_bytes: int
    parts: tuple[PackedPart, ...]

    @classmethod
    def of(cls, values: str, n_bytes: object, places: Mapping[str, Place]) -> Packing:
        """Of a buffer for these selections, {"delta": …, "held": …}; to be called before a placeholder is made.

        Raises:
            FormatError: No buffer for them has this size.
        """
        parts = tuple(PackedPart.of(name, places[name]) for name in (TRAINED, HELD) if name in places)
        if type(n_bytes) is not int:
            raise FormatError(
                f"the size {n_bytes!r} of a packed delta is no whole number: the adapter's config was altered; "
                "restore it"
            )
        packing = cls(values, n_bytes, parts)
        if not (least := packing.least_bytes) <= n_bytes <= packing.most_bytes:
            raise FormatError(
                f"a packed delta of {n_bytes:,} bytes cannot be, in {values} this one has {least:,} to "
                f"{packing.most_bytes:,}: the adapter's config was altered; restore it"
            )
        return packing

    @property
    def least_bytes(self) -> int:
        """Fewer no such buffer has."""
        dtypes = KINDS_OF[self.values]
        n_sections = min(sum(len(part.sizes(dtype)) for part in self.parts) for dtype in dtypes)
        return len(self.parts) + LENGTH * n_sections + CHECKSUM

    @property
    def most_bytes(self) -> int:
        """More no such buffer has: nothing compressed."""
        return max(self._raw_bytes(dtype) for dtype in KINDS_OF[self.values])

    def _raw_bytes(self, dtype: torch.dtype) -> int:
        return CHECKSUM + sum(1 + sum(LENGTH + size for size in part.sizes(dtype)) for part in self.parts)

    def to_text(self) -> str:
        """As an operator's schema can carry it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Packing:
        """The inverse of `to_text`."""
        fields = json.loads(text)
        parts = tuple(PackedPart(**(part | {"shape": tuple(part["shape"])})) for part in fields.pop("parts"))
        return cls(**fields, parts=parts)


def inference_only(what: str) -> IsolateError:
    """The error for whoever would train or change the numbers of a packed adapter."""
    return IsolateError(
        f"{what} is packed, and packed adapters are for inference: unpack it with `peft-isolate decompress` "
        "(peft_isolate.checkpoints.decompress), and go on with that"
    )


def pack(
    numbers: Mapping[str, torch.Tensor], places: Mapping[str, Place], values: str, zstd: bool = True
) -> tuple[torch.Tensor, dict[str, Place]]:
    """The buffer of a delta.

    Args:
        numbers: {"delta": …, "held": …}, as far as there are: floating-point tensors of `delta_shape`, on the CPU.
        places: Their selections; of those by elements, with their codes.
        values: What the numbers become: "bf16" or "fp16", rounded as torch does; "int8", rounded to the nearest of
            255 steps from minus to plus the largest of their row, of 127 for single elements with `zstd`; "exact", as
            they are.
        zstd: Compress what becomes shorter by it.

    Returns:
        uint8 (bytes,), and the selections as the config shall describe them: positions may have other codes.

    Raises:
        FormatError: A number is NaN or infinite.
        IsolateError: A number is too large for `values`.

    Example:
        >>> from peft_isolate.regions import Selection
        >>> place = Selection.whole((2, 3))
        >>> buffer, places = pack({"delta": torch.ones(2, 3)}, {"delta": place}, "bf16")
        >>> unpack(buffer, Packing.of("bf16", buffer.numel(), places))["delta"]
        tensor([[1., 1., 1.],
                [1., 1., 1.]], dtype=torch.bfloat16)
    """
    written = bytearray()
    stored: dict[str, Place] = {}
    for name in (TRAINED, HELD):
        if name not in places:
            continue
        if not all_finite(numbers[name]):
            raise FormatError(
                f"a delta of {tuple(numbers[name].shape)} holds NaN or infinity: the training diverged or the file "
                "is damaged; pack a sound adapter"
            )
        place = stored[name] = _recoded(places[name], zstd)
        part = PackedPart.of(name, place)
        sections: list[np.ndarray] = []
        if isinstance(place, StoredSelection):
            assert place.data is not None
            sections.append(place.data.numpy())
        if values == "int8":
            dtype = torch.int8
            largest = LARGEST_OF_ELEMENTS if part.by_elements and zstd else LARGEST
            scales, steps = _quantised(numbers[name].detach().flatten(), part.row, largest)
            sections += [scales.astype("<f4").view(np.uint8), steps.view(np.uint8)]
        else:
            dtype = numbers[name].dtype if values == "exact" else KINDS_OF[values][0]
            rounded = numbers[name].detach().to(dtype)
            if not all_finite(rounded):
                others = "'bf16' or 'exact'" if values == "fp16" else "'exact'"
                raise IsolateError(
                    f"a delta of {tuple(rounded.shape)} has numbers beyond {torch.finfo(dtype).max:.3g}, the largest "
                    f"of {values}: take {others}"
                )
            sections += _planes(rounded)
        written.append(CODE_OF[dtype])
        for section in sections:
            body = _shortest(section) if zstd else section.tobytes()
            written += len(body).to_bytes(LENGTH, "little") + body
    written += zlib.crc32(written).to_bytes(CHECKSUM, "little")
    return torch.frombuffer(written, dtype=torch.uint8), stored


def unpack(packed: torch.Tensor, packing: Packing) -> dict[str, torch.Tensor]:
    """What a buffer holds. What it allocates is bounded by what `packing` says, whatever the bytes are.

    Args:
        packed: uint8 (bytes,), on any device.
        packing: As the config describes it.

    Returns:
        On the CPU: "delta" and "held", as far as there are, in the dtype they are packed in, int8 as the float32 that
        they stand for; "delta_codes" and "held_codes", uint8, beside selections by elements, which are yet to be
        decoded.

    Raises:
        FormatError: It is no such buffer: never loaded, truncated, altered.
    """
    if packed.dtype != torch.uint8 or packed.shape != (packing.n_bytes,):
        raise FormatError(
            f"a packed delta of dtype {packed.dtype} and shape {tuple(packed.shape)} is not the {packing.n_bytes:,} "
            f"bytes that the adapter's config states: {RELOAD}"
        )
    data = packed.detach().cpu().contiguous().numpy()
    content, stated = data[:-CHECKSUM], int.from_bytes(data[-CHECKSUM:].tobytes(), "little")
    if not data.any():
        raise FormatError(f"a packed delta of {data.size:,} bytes is nothing but zeros: {RELOAD}")
    if zlib.crc32(content.data) != stated:
        raise FormatError(
            f"the checksum of a packed delta of {data.size:,} bytes is not that of its content: {RELOAD}"
        )
    found: dict[str, torch.Tensor] = {}
    at = 0
    for part in packing.parts:
        dtype = KINDS.get(int(content[at])) if at < content.size else None
        if dtype is None or dtype not in KINDS_OF[packing.values]:
            raise FormatError(f"a packed delta says its numbers are {dtype}, its config {packing.values}: {RELOAD}")
        at += 1
        sections = []
        for size in part.sizes(dtype):
            section, at = _section(content, at, size)
            sections.append(section)
        if part.code_bytes is not None:
            found[f"{part.name}_codes"] = torch.from_numpy(sections.pop(0).copy())
        numbers = _restored(sections, part) if dtype == torch.int8 else _joined(sections, dtype)
        if not all_finite(numbers):
            raise FormatError(f"a packed delta holds NaN or infinity: {RELOAD}")
        found[part.name] = numbers.reshape(part.shape)
    if at != content.size:
        raise FormatError(f"a packed delta goes on for {content.size - at:,} bytes after its end: {RELOAD}")
    return found


def _section(content: np.ndarray, at: int, size: int) -> tuple[np.ndarray, int]:
    """(a section's content of `size` bytes, where the next one begins)."""
    start = at + LENGTH
    length = int.from_bytes(content[at:start].tobytes(), "little")
    if start + length > content.size or length > size:
        raise FormatError(f"a section of {length:,} bytes in a packed delta, where {size:,} belong: {RELOAD}")
    body = content[start : start + length]
    if length == size:
        return body, start + length
    try:
        return decompress(body, size), start + length
    except FormatError as error:
        raise FormatError(f"{error}, in a packed delta: {RELOAD}") from error


def _shortest(section: np.ndarray) -> bytes:
    frames = (compress(section, level) for level in LEVELS)
    return min(section.tobytes(), *frames, key=len)


def _recoded(place: Place, zstd: bool) -> Place:
    """The same place, with the codes that become shortest."""
    if not isinstance(place, StoredSelection) or not zstd:
        return place
    assert place.data is not None
    positions = place.decode(place.data)
    found = [encode(positions, place.numel)]
    # Units of whole bytes cost more than others, and compress to less.
    if (width := FORMATS[found[0][1]]) % 8:
        found.append(encode(positions, place.numel, f"gap{width + -width % 8}"))
    code, format = min(found, key=lambda one: len(_shortest(one[0])))
    codes = Codes(place.codes.count, code.size, format)
    return StoredSelection(place.kind, place.shape, codes, torch.from_numpy(code))


def _blocks(count: int, row: int) -> Iterator[tuple[slice, slice]]:
    """(numbers, their scales): whole rows, some `BLOCK` numbers at once."""
    rows = max(1, BLOCK // row)
    for start in range(0, -(-count // row), rows):
        yield slice(start * row, (start + rows) * row), slice(start, start + rows)


def _as_rows(flat: np.ndarray, row: int) -> np.ndarray:
    """(rows, row), the last row filled up with zeros."""
    return np.pad(flat, (0, -flat.size % row)).reshape(-1, row)


def _quantised(numbers: torch.Tensor, row: int, largest_step: int) -> tuple[np.ndarray, np.ndarray]:
    """(float32 scales (rows,), int8 (count,)) of floating-point (count,), from minus to plus the largest step."""
    scales = np.zeros(-(-numbers.numel() // row), np.float32)
    steps = np.empty(numbers.numel(), np.int8)
    for block, units in _blocks(steps.size, row):
        rows = _as_rows(numbers[block].double().numpy(), row)
        largest = np.abs(rows).max(1)
        with np.errstate(over="ignore"):
            scale = (largest / largest_step).astype(np.float32)
            # Rounded up, so that the largest number is at most the largest step.
            too_small = scale.astype(np.float64) * largest_step < largest
            scale = np.where(too_small, np.nextafter(scale, np.float32(np.inf)), scale)
            if not np.isfinite(scale * np.float32(largest_step)).all():
                raise IsolateError(f"a delta has a number {largest.max():.3g}, too large for int8: take 'exact'")
        rows /= np.where(scale == 0, 1, scale).astype(np.float64)[:, None]
        scales[units], steps[block] = scale, np.rint(rows).astype(np.int8).reshape(-1)[: steps[block].size]
    return scales, steps


def _restored(sections: list[np.ndarray], part: PackedPart) -> torch.Tensor:
    """float32 (count,) of scales and int8."""
    scales, steps = sections[0].copy().view("<f4"), sections[1].view(np.int8)
    if not (np.isfinite(scales).all() and (scales >= 0).all()) or (steps == -LARGEST - 1).any():
        raise FormatError(f"a packed delta has scales or steps that no writer writes: {RELOAD}")
    numbers = np.empty(part.count, np.float32)
    with np.errstate(over="ignore"):  # infinity is refused by the caller, by name
        for block, units in _blocks(part.count, part.row):
            rows = _as_rows(steps[block], part.row) * scales[units, None]
            numbers[block] = rows.reshape(-1)[: numbers[block].size]
    return torch.from_numpy(numbers)


def _planes(numbers: torch.Tensor) -> list[np.ndarray]:
    """The bytes of floating-point numbers, lowest first, with the sign in the lowest bit."""
    size = numbers.element_size()
    flat = numbers.flatten().contiguous().view(torch.uint8).numpy().view(f"<u{size}")
    one, rest = flat.dtype.type(1), flat.dtype.type(8 * size - 1)
    rotated = flat << one
    rotated |= flat >> rest
    as_bytes = rotated.view(np.uint8).reshape(-1, size)
    return [np.ascontiguousarray(as_bytes[:, i]) for i in range(size)]


def _joined(planes: list[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `_planes`: (count,) of this dtype."""
    size = dtype.itemsize
    as_bytes = np.empty((planes[0].size, size), np.uint8)
    for i, plane in enumerate(planes):
        as_bytes[:, i] = plane
    flat = as_bytes.reshape(-1).view(f"<u{size}")
    one, rest = flat.dtype.type(1), flat.dtype.type(8 * size - 1)
    signs = flat << rest
    flat >>= one
    flat |= signs
    return torch.from_numpy(flat.view(np.uint8)).view(dtype)
