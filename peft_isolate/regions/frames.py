"""Bytes in a zstd frame, and out of a stranger's: never more than what they are known to be."""

from __future__ import annotations

import numpy as np
import zstandard

from ..errors import FormatError

# Nothing here is larger than a tensor's chunk or a plane of it; above this the gain is in the third digit.
LEVEL = 9
# Of memory that a frame may ask for to be read, beside what it holds.
LARGEST_WINDOW = 2**27


def compress(data: np.ndarray | bytes, level: int = LEVEL) -> bytes:
    """One zstd frame that states its content's size; no bytes at all for no content.

    Args:
        data: Bytes, or a contiguous array of any dtype, whose bytes are taken.
        level: Of zstd, 1 to 22.
    """
    raw = data if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    if not len(raw):
        return b""
    return zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True).compress(raw)


def decompress(frame: np.ndarray | bytes, size: int) -> np.ndarray:
    """The content of one zstd frame, which must be of this size.

    What is allocated is bounded by `size`, whatever the frame says of itself: one that states another size, or none,
    is refused before anything is decompressed.

    Args:
        frame: Its bytes, all of them and no more.
        size: Bytes of its content, known from elsewhere.

    Returns:
        uint8 array (size,), read-only.

    Raises:
        FormatError: It is no such frame.
    """
    data = frame if isinstance(frame, bytes) else frame.tobytes()
    if not size and not data:
        return np.zeros(0, np.uint8)
    try:
        stated = zstandard.get_frame_parameters(data)
        if stated.content_size != size or not size:
            raise FormatError(f"a zstd frame states {stated.content_size:,} bytes where {size:,} belong")
        if stated.window_size > max(LARGEST_WINDOW, size):
            raise FormatError(f"a zstd frame asks for a window of {stated.window_size:,} bytes")
        # Into one buffer of that size: a frame that holds more than it states ends there.
        decompressor = zstandard.ZstdDecompressor(max_window_size=max(LARGEST_WINDOW, size))
        content = decompressor.decompress(data, max_output_size=size, allow_extra_data=False)
        if len(content) != size:
            raise FormatError(f"a zstd frame holds {len(content):,} bytes where {size:,} belong")
    except zstandard.ZstdError as error:
        raise FormatError(f"a zstd frame is damaged ({error})") from error
    return np.frombuffer(content, np.uint8)
