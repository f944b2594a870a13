"""zstd frames: what goes in comes out; what lies is refused before it costs memory."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_isolate.errors import FormatError
from peft_isolate.regions.frames import compress, decompress


@given(st.binary(max_size=3000))
def test_what_goes_in_comes_out(data):
    """Of bytes and of arrays."""
    assert decompress(compress(data), len(data)).tobytes() == data
    assert decompress(compress(np.frombuffer(data, np.uint8)), len(data)).tobytes() == data


def test_an_array_is_its_bytes():
    """Whatever its dtype and strides."""
    array = np.arange(1000, dtype=np.int32).reshape(20, 50).T
    found = decompress(compress(array), 4000).view(np.int32)
    assert np.array_equal(found, np.ascontiguousarray(array).ravel())


@pytest.mark.parametrize("wrong", ["longer", "twice", "shorter", "nothing", "no frame", "another size", "empty"])
def test_anything_else_is_refused(wrong):
    """A tail, a second frame, a cut, other bytes, a size that is not the one that is known."""
    frame = compress(bytes(range(200)))
    data, size = {
        "longer": (frame + b"1", 200),
        "twice": (frame * 2, 200),
        "shorter": (frame[:-3], 200),
        "nothing": (b"", 200),
        "no frame": (b"abcdefgh", 200),
        "another size": (frame, 201),
        "empty": (frame, 0),
    }[wrong]
    with pytest.raises(FormatError, match="a zstd frame"):
        decompress(data, size)


def test_a_bomb_is_refused_by_its_declared_size_and_one_that_lies_by_what_is_known():
    """A gigabyte of zeros in a few KiB: neither what it states nor what it holds is ever allocated."""
    bomb = bytearray(compress(np.zeros(2**27, np.uint8)))
    tracemalloc.start()
    with pytest.raises(FormatError, match="states 134,217,728 bytes where 1,000 belong"):
        decompress(bytes(bomb), 1000)
    at = bomb.index(struct.pack("<I", 2**27))
    struct.pack_into("<I", bomb, at, 1000)
    with pytest.raises(FormatError, match="too small"):
        decompress(bytes(bomb), 1000)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
