"""Gap codes: equal to a slow twin written from the specification, near the entropy, and nothing else is accepted."""

import doctest
import itertools
import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peft_isolate.errors import FormatError, RegionError
from peft_isolate.regions import codes
from peft_isolate.regions.codes import FORMATS, Codes, check, decode, encode


def plane_bits(width):
    """The bits of each plane: `width` as a sum of 8, 4, 2, 1, the largest first."""
    return [8] * (width // 8) + [bits for bits in (4, 2, 1) if width % 8 & bits]


def slow_encode(positions, width):
    """The specification as a loop: steps, units, padding, then every plane as a stream of bits, lowest first."""
    units, last = [], -1
    for position in positions:
        step, last = position - last, position
        while step > 2**width - 1:
            units.append(0)
            step -= 2**width - 1
        units.append(step)
    while len(units) % 8:
        units.append(0)
    stream, shift = [], 0
    for bits in plane_bits(width):
        stream += [unit >> (shift + bit) & 1 for unit in units for bit in range(bits)]
        shift += bits
    return bytes(sum(stream[i + bit] << bit for bit in range(8)) for i in range(0, len(stream), 8))


def slow_decode(code, width):
    """The positions of a code, or None where the specification has no such code."""
    if len(code) % width:
        return None
    stream = [byte >> bit & 1 for byte in code for bit in range(8)]
    n_units = len(code) // width * 8
    units, shift, at = [0] * n_units, 0, 0
    for bits in plane_bits(width):
        for i in range(n_units):
            for bit in range(bits):
                units[i] |= stream[at] << (shift + bit)
                at += 1
        shift += bits
    if n_units and not any(units[-8:]):
        return None
    positions, position = [], -1
    for unit in units:
        position += unit or 2**width - 1
        if unit:
            positions.append(position)
    return positions


def refused(code, format, count, numel):
    """Assert that both `check` and `decode` refuse; returns the message."""
    code = np.frombuffer(bytes(code), np.uint8)
    with pytest.raises(FormatError) as by_check:
        check(code, format, count, numel)
    with pytest.raises(FormatError) as by_decode:
        decode(code, format, count, numel)
    assert str(by_check.value) == str(by_decode.value)
    return str(by_check.value)


def small_chunks(chunk):
    """Chunks so small that a short list crosses their borders."""
    return mock.patch.object(codes, "CHUNK", chunk)


def drawn(density, numel, seed=0):
    return np.flatnonzero(np.random.default_rng(seed).random(numel) < density)


@st.composite
def sequences(draw):
    """(width, positions, numel), with steps on both sides of every border between units."""
    width = draw(st.integers(1, 32))
    escape = 2**width - 1
    value = st.sampled_from([1, 2, escape - 1, escape]) | st.integers(1, escape)
    steps = draw(st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, 2, 9, 40]), value.filter(lambda v: v >= 1))))
    positions = (np.cumsum([escapes * escape + value for escapes, value in steps], dtype=np.int64) - 1).tolist()
    beyond = draw(st.sampled_from([1, 2, 1000]))
    return width, positions, (positions[-1] if positions else -1) + beyond


@settings(max_examples=1000, deadline=None)
@given(sequences(), st.sampled_from([8, 16, 64, 2**16]), st.booleans(), st.booleans())
def test_equals_the_slow_twin(sequence, chunk, as_int32, as_tensor):
    width, positions, numel = sequence
    given_positions = np.array(positions, np.int32 if as_int32 and numel < 2**31 else np.int64)
    argument = torch.from_numpy(given_positions) if as_tensor else given_positions
    with small_chunks(chunk):
        code, format = encode(argument, numel, f"gap{width}")
        assert code.tobytes() == slow_encode(positions, width)
        assert code.dtype == np.uint8
        check(code, format, len(positions), numel)
        back = decode(code, format, len(positions), numel)
    assert back.tolist() == positions == slow_decode(code.tobytes(), width)
    assert back.dtype == (np.int32 if numel <= 2**31 - 1 else np.int64)


@settings(max_examples=1000, deadline=None)
@given(st.sets(st.integers(0, 2**40)) | st.sets(st.integers(0, 300)), st.integers(1, 2**40))
def test_round_trip_in_the_format_it_chooses(positions, beyond):
    positions = sorted(positions)
    numel = (positions[-1] if positions else 0) + beyond
    code, format = encode(np.array(positions, np.int64), numel)
    described = Codes(len(positions), code.size, format)
    described.check_size(numel)
    assert Codes.from_dict(json.loads(json.dumps(described.to_dict()))) == described
    check(code, format, len(positions), numel)
    assert decode(code, format, len(positions), numel).tolist() == positions


@settings(max_examples=1000, deadline=None)
@given(
    st.binary(max_size=60) | st.lists(st.sampled_from([0, 0, 0, 1, 16, 255]), max_size=60).map(bytes),
    st.integers(1, 32),
    st.sampled_from([-2, -1, 0, 0, 0, 0, 1, 8]),
    st.sampled_from([-2, -1, 0, 0, 0, 0, 1, 2**33]),
    st.sampled_from([8, 16, 2**16]),
)
def test_any_bytes_are_refused_or_a_code_of_exactly_one_list(code, width, more_count, more_numel, chunk):
    code = code[: len(code) // width * width] if len(code) >= width else code
    expected = slow_decode(code, width)
    count = len(expected or ()) + more_count
    numel = (expected[-1] + 1 if expected else 0) + more_numel
    assume(numel >= 0)
    with small_chunks(chunk):
        if expected is None or more_count or more_numel < 0:
            refused(code, f"gap{width}", count, numel)
            return
        array = np.frombuffer(code, np.uint8)  # read-only, as a mapped file is
        check(array, f"gap{width}", count, numel)
        positions = decode(array, f"gap{width}", count, numel)
        assert positions.tolist() == expected
        assert encode(positions, numel, f"gap{width}")[0].tobytes() == code


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_over_many_chunks(format):
    """Lists of several real chunks, with a gap of many windows of units in the middle."""
    width = FORMATS[format]
    escape = 2**width - 1
    rng = np.random.default_rng(width)
    steps = np.minimum(rng.geometric(1 / (1 + 0.7 * escape), 150_000), 2**40)
    steps[75_000] = 300_000 * escape
    positions = np.cumsum(steps) - 1
    numel = int(positions[-1]) + 1
    code, _ = encode(positions, numel, format)
    check(code, format, positions.size, numel)
    assert np.array_equal(decode(code, format, positions.size, numel), positions)
    assert "hold 150,000 positions" in refused(code, format, positions.size - 1, numel)
    assert "reach beyond" in refused(code, format, positions.size, numel - 1)


def test_the_specified_bytes():
    """By hand: steps 1, 1, 2, 8 in units of 2 bits are 1, 1, 2, 0 0 2 and two of padding; of 3 bits, in two planes."""
    positions = np.array([0, 1, 3, 11])
    code, format = encode(positions, 16)
    assert (code.tolist(), format) == ([0b00_10_01_01, 0b00_00_10_00], "gap2")
    # Units 1 1 2 0 1, 0 0 0: the lower two bits of all, then the upper bit of all.
    assert encode(positions, 16, "gap3")[0].tolist() == [0b00_10_01_01, 0b00_00_00_01, 0]
    # Units 1 1 2 8: of four bits, the first in the lower half of the byte.
    assert encode(positions, 16, "gap4")[0].tolist() == [0x11, 0x82, 0, 0]
    assert encode(positions, 16, "gap1")[0].tolist() == [0b0000_1011, 0b0000_1000]
    assert doctest.testmod(codes).failed == 0


@pytest.mark.parametrize(
    ("density", "format", "at_most"), [(0.001, "gap12", 1.10), (0.01, "gap8", 1.10), (0.1, "gap4", 1.10)]
)
def test_size_near_the_entropy(density, format, at_most):
    numel = 4_000_000
    positions = drawn(density, numel)
    code, chosen = encode(positions, numel)
    assert chosen == format
    assert 1 < 8 * code.size / entropy(positions.size, numel) < at_most


def test_expected_size_near_the_entropy_at_every_density():
    """The statement of the module docstring, from the formula of the cost."""
    for density in np.geomspace(1e-8, 0.6, 2000):
        numel = 10**13
        count = round(density * numel)
        width = FORMATS[codes._cheapest(count, numel)]
        bits = width / -math.expm1((2**width - 1) * math.log1p(-density))
        assert bits * count < 1.10 * entropy(count, numel)


def entropy(count, numel):
    density = count / numel
    return -numel * (density * math.log2(density) + (1 - density) * math.log2(1 - density))


@pytest.mark.parametrize(
    ("positions", "numel"),
    [
        ([], 0),
        ([], 10),
        ([0], 1),
        ([0], 2**41),
        ([2**41 - 1], 2**41),
        ([0, 2**41 - 1], 2**41),
        ([2**31 - 2], 2**31 - 1),
        ([2**31 - 1], 2**31),
        ([0, 2**32 - 2, 2**32 - 1, 2**33], 2**33 + 1),
        (range(1000), 1000),
        (range(200_000), 200_000),
        ([*range(500), *range(10**9, 10**9 + 500)], 2 * 10**9),
        ([7, 10**7 - 1], 10**7),
    ],
)
def test_corners(positions, numel):
    positions = np.array(positions, np.int64)
    code, format = encode(positions, numel)
    Codes(positions.size, code.size, format).check_size(numel)
    check(code, format, positions.size, numel)
    back = decode(code, format, positions.size, numel)
    assert np.array_equal(back, positions)
    assert back.dtype == (np.int32 if numel <= 2**31 - 1 else np.int64)
    # Clusters cost no more than the escapes over all of the tensor and the padding add.
    assert 8 * code.size <= FORMATS[format] * (positions.size + numel // (2 ** FORMATS[format] - 1) + 8)


@pytest.mark.parametrize(
    ("count", "numel"),
    [(1, 1), (1, 10), (5, 10), (10, 10), (1, 10**6), (1000, 10**6), (1, 2**40), (2, 2**40), (1000, 2**40)],
)
def test_a_placeholder_is_never_a_code(count, numel):
    """A buffer of the right size into which nothing was loaded, the first thing a forgotten `load` would leave."""
    positions = np.unique(np.linspace(0, numel - 1, count).astype(np.int64))
    code, format = encode(positions, numel)
    message = refused(torch.zeros(code.size, dtype=torch.uint8).numpy().tobytes(), format, positions.size, numel)
    assert "nothing but zeros" in message
    assert "never loaded" in message


@pytest.mark.parametrize("format", ["gap1", "gap4", "gap6", "gap8", "gap12", "gap32"])
def test_truncated_extended_and_other_sizes_are_refused(format):
    width = FORMATS[format]
    positions = drawn(0.1, 5000)
    code = encode(positions, 5000, format)[0].tobytes()
    facts = format, positions.size, 5000
    check(np.frombuffer(code, np.uint8), *facts)
    for other in (code[:-1], code[1:], code[:-width], b"", code + b"\0", code + b"\1", code + code):
        assert "load the adapter again" in refused(other, *facts)
    # A whole further block of escapes is no padding.
    longer = b"".join(
        plane_of(code, width, plane).tobytes() + bytes(bits) for plane, bits in enumerate(plane_bits(width))
    )
    refused(longer, *facts)
    refused(longer, format, positions.size, 2**40)
    for count, numel in ((positions.size - 1, 5000), (positions.size + 1, 5000), (0, 5000)):
        refused(code, format, count, numel)
    for numel in (int(positions[-1]), positions.size - 1, 1, 0):
        refused(code, format, positions.size, numel)
    check(np.frombuffer(code, np.uint8), format, positions.size, int(positions[-1]) + 1)


def plane_of(code, width, plane):
    """The bytes of one plane."""
    blocks = len(code) // width
    start = blocks * sum(plane_bits(width)[:plane])
    return np.frombuffer(code, np.uint8)[start : start + blocks * plane_bits(width)[plane]]


def test_padding_is_checked():
    """A changed padding unit is a position more; with the count raised to match it would be another, valid code."""
    code, format = encode(np.arange(0, 900, 100), 901, "gap8")
    assert code[9:].tolist() == [0] * 7
    for at in range(9, 16):
        altered = code.copy()
        altered[at] = 1
        assert "hold 10 positions" in refused(altered.tobytes(), format, 9, 10**6)


def test_wrong_facts_are_refused():
    code, format = encode(np.array([1, 2, 30]), 40)
    for unknown in ("gap0", "gap33", "gap08", "GAP8", "", None, 8, ["gap8"]):
        with pytest.raises(FormatError, match="unknown"):
            decode(code, unknown, 3, 40)
        with pytest.raises(FormatError, match="unknown"):
            Codes.from_dict({"count": 3, "code_bytes": 3, "format": unknown})
    with pytest.raises(FormatError, match="unknown"):
        encode(np.array([1]), 2, "rice")
    for count in (-1, 3.0, True, None, 2**70):
        with pytest.raises(FormatError):
            decode(code, format, count, 40)
    for bad in (code.astype(np.int8), code.reshape(1, -1)):
        with pytest.raises(FormatError, match="not one list of bytes"):
            check(bad, format, 3, 40)
    for described in (None, 5, [], {}, {"count": 1}, {"count": 1, "code_bytes": 1, "format": "gap8", "path": "/"}):
        with pytest.raises(FormatError, match="describes no codes"):
            Codes.from_dict(described)
    for count, size in ((-1, 1), (1, -1), (1.0, 1), (True, 1), ("1", 1), (1, None)):
        with pytest.raises(FormatError, match="not a whole number"):
            Codes.from_dict({"count": count, "code_bytes": size, "format": "gap8"})


@pytest.mark.parametrize(
    ("count", "code_bytes", "numel"),
    [(5, 10**15, 10**6), (0, 8, 10), (1, 0, 10), (9, 8, 300), (1, 9, 10), (3, 8, 2), (9, 8, 10**400)],
)
def test_a_size_that_no_code_has_is_refused_before_it_is_allocated(count, code_bytes, numel):
    with pytest.raises(FormatError, match="cannot be the gap8 code"):
        Codes(count, code_bytes, "gap8").check_size(numel)


def test_a_huge_count_allocates_nothing():
    """A stranger's config may claim anything; `np.empty(10**12)` would be a MemoryError."""
    with pytest.raises(FormatError, match="cannot be"):
        decode(np.ones(8, np.uint8), "gap8", 10**12, 10**13)


@pytest.mark.parametrize(
    ("positions", "numel", "message"),
    [
        (np.array([3, 2]), 10, "3 comes before 2: pass torch.unique"),
        (np.array([2, 2]), 10, "2 comes before 2"),
        (np.array([1, 10]), 10, "position 10 is out of range, there are 10"),
        (np.array([-1, 3]), 10, "position -1 is out of range"),
        (np.array([0, 2**63 - 1, -(2**63), 5]), 10, "sorted"),
        (np.array([0]), 0, "out of range"),
        (np.array([1.0]), 10, "float64"),
        (np.array([[1]]), 10, r"shape \(1, 1\)"),
        (torch.tensor([1.0], dtype=torch.bfloat16), 10, "bfloat16"),
        (torch.tensor([True]), 10, "torch.bool"),
    ],
)
def test_what_is_no_list_of_positions_is_not_encoded(positions, numel, message):
    with pytest.raises(RegionError, match=message):
        encode(positions, numel)


def test_disorder_between_chunks_is_seen():
    positions = np.arange(100)
    positions[64] = 63
    with small_chunks(64), pytest.raises(RegionError, match="63 comes before 63"):
        encode(positions, 1000)


@given(st.lists(st.integers(0, 500), min_size=2, max_size=200), st.sampled_from([1, 3, 8]))
def test_any_disorder_is_an_error(positions, width):
    """Wherever the chunks end, and whatever comes last, from which the encoder tells how much room it needs."""
    assume(any(a >= b for a, b in itertools.pairwise(positions)))
    with small_chunks(8), pytest.raises(RegionError, match="sorted and unique"):
        encode(np.array(positions), 501, f"gap{width}")


def test_a_huge_tensor_takes_no_room_where_nothing_is_selected():
    """Not even address space, where a bitmap of the whole would be 2 GiB."""
    with mock.patch("numpy.zeros", wraps=np.zeros) as zeros:
        code, _ = encode(np.array([1, 3]), 2**34, "gap1")
    assert code.tobytes() == bytes([0b1010])
    assert all(np.prod(call.args[0]) < 100 for call in zeros.call_args_list)


def test_strided_positions_and_codes():
    positions = np.arange(0, 3000, 3, dtype=np.int32)
    code, format = encode(positions[::5], 3000)
    twice = np.repeat(code, 2)
    assert np.array_equal(decode(twice[::2], format, 200, 3000), positions[::5])
