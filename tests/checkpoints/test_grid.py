"""Differences on the grid: exact for all bits, near the entropy, read by a slow twin, and nothing else accepted."""

import doctest
import math
import random
import struct
import tracemalloc
import zlib
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_isolate.checkpoints import grid, small_numbers
from peft_isolate.checkpoints.grid import EXPONENT_BITS, decode, encode
from peft_isolate.errors import FormatError, IsolateError
from peft_isolate.regions import codes

DTYPES = sorted(set(safetensors.torch._TYPES.values()), key=str)
FLOATS = sorted(EXPONENT_BITS, key=str)
GAPS, ZSTD, RAW = 2, 1, 0


def patterns(tensor):
    """The bits, as Python's integers."""
    flat = tensor.contiguous().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if tensor.is_complex() else flat
    size = flat.element_size()
    return np.frombuffer(flat.view(torch.uint8).numpy().tobytes(), f"<u{size}").tolist() if len(flat) else []


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def of_patterns(numbers, dtype):
    """A tensor of these bits."""
    size = dtype.itemsize // (2 if dtype.is_complex else 1)
    data = bytearray(b"".join(number.to_bytes(size, "little") for number in numbers))
    return (torch.frombuffer(data, dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)).view(dtype)


def assert_exact(code, base, tuned):
    """The code gives the tuned tensor, bit for bit."""
    found = decode(code, base)
    assert (found.dtype, found.shape) == (tuned.dtype, tuned.shape)
    assert patterns(found) == patterns(tuned)


def small(block=256, group=16):
    """Blocks and groups so small that a short tensor crosses their borders."""
    return mock.patch.multiple(grid, BLOCK=block, LEAST_GROUP=group)


def moved(base, by, seed=0):
    """The base after an update of about this size everywhere, as after Adam."""
    generator = torch.Generator().manual_seed(seed)
    return (base.float() + by * torch.randn(base.shape, generator=generator)).to(base.dtype)


def weights(shape, dtype=torch.bfloat16, seed=1):
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


class Slow:
    """A reader written from the specification, a scalar at a time."""

    def __init__(self, code):
        self.code, self.at = code, 0

    def integer(self, size):
        return int.from_bytes(self.bytes(size), "little")

    def bytes(self, size):
        assert self.at + size <= len(self.code)
        self.at += size
        return self.code[self.at - size : self.at]

    def tuned(self, base, bits, exponent_bits, block_size, least_group):
        """The tuned tensor's patterns, of the base's."""
        assert self.bytes(6) == b"grid/1"
        result = []
        for start in range(0, len(base), block_size):
            result += self.block(base[start : start + block_size], bits, exponent_bits, least_group)
        checksum = self.integer(4)
        assert checksum == zlib.crc32(b"".join(p.to_bytes(bits // 8, "little") for p in result))
        assert self.at == len(self.code)
        return result

    def block(self, base, bits, exponent_bits, least_group):
        head = self.integer(1)
        if head == 0:
            return base
        assert head in (1, 3, 5, 7)
        assert exponent_bits or head < 4
        meant, less = list(range(len(base))), 0
        if head & 2:
            changed = self.list(len(base), 1)
            assert set(changed) <= {0, 1}
            meant, less = [i for i, c in enumerate(changed) if c], 1
        groups = [meant]
        if head & 4:
            groups = [[]]
            exponents = {i: base[i] >> (bits - 1 - exponent_bits) & (2**exponent_bits - 1) for i in meant}
            for exponent in sorted(set(exponents.values())):
                if len(groups[-1]) >= least_group:
                    groups.append([])
                groups[-1] += [i for i in meant if exponents[i] == exponent]
            # In their order, and not that of their exponents.
            groups = [sorted(group) for group in groups]
        result = list(base)
        for group in groups:
            for i, number in zip(group, self.list(len(group), bits // 8), strict=True):
                number += less
                move = -(number + 1) // 2 if number % 2 else number // 2
                place = (slow_place(base[i], bits, exponent_bits) + move) % 2**bits
                result[i] = slow_pattern(place, bits, exponent_bits)
        return result

    def list(self, count, size, level=1):
        assert level <= 8
        planes, width = divmod(self.integer(1), 16)
        assert planes <= size
        numbers = [0] * count
        for i in range(planes):
            numbers = [n + (byte << 8 * i) for n, byte in zip(numbers, self.section(count), strict=True)]
        if width:
            assert width in (1, 2, 8)
            assert planes < size
            assert level < 8
            symbols = self.symbols(count, width)
            rest = iter(())
            if 2**width - 1 in symbols:
                rest = iter(self.list(symbols.count(2**width - 1), size - planes, level + 1))
            numbers = [
                n + ((s + (next(rest) if s == 2**width - 1 else 0)) << 8 * planes)
                for n, s in zip(numbers, symbols, strict=True)
            ]
        return numbers

    def section(self, size):
        kind = self.integer(1)
        if kind == RAW:
            return self.bytes(size)
        assert kind == ZSTD
        content = zstandard.ZstdDecompressor().decompress(self.bytes(self.integer(4)))
        assert len(content) == size
        return content

    def symbols(self, count, width):
        if self.code[self.at] == GAPS:
            assert width == 1
            _, gap_bits, n_positions, size = self.integer(1), self.integer(1), self.integer(4), self.integer(4)
            code = np.frombuffer(self.bytes(size), np.uint8)
            ones = set(codes.decode(code, f"gap{gap_bits}", n_positions, count).tolist())
            return [int(i in ones) for i in range(count)]
        data = self.section(-(-count * width // 8))
        return [data[i * width // 8] >> (i * width % 8) & (2**width - 1) for i in range(count)]


def slow_place(pattern, bits, exponent_bits):
    """The place on the grid."""
    if not exponent_bits:
        return pattern
    negative = pattern >> (bits - 1)
    return 2**bits - 1 - pattern if negative else pattern + 2 ** (bits - 1)


def slow_pattern(place, bits, exponent_bits):
    """The inverse."""
    if not exponent_bits:
        return place
    return place - 2 ** (bits - 1) if place >> (bits - 1) else 2**bits - 1 - place


def exponent_bits_of(dtype):
    return EXPONENT_BITS.get(dtype.to_real() if dtype.is_complex else dtype, 0)


@st.composite
def pairs(draw):
    """(base, tuned): bits of every kind, moved nowhere, a little, much, or anywhere."""
    dtype = draw(st.sampled_from(DTYPES))
    bits = 8 * dtype.itemsize // (2 if dtype.is_complex else 1)
    n = draw(st.integers(0, 700))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = random.Random(seed)
    exponent_bits = exponent_bits_of(dtype)
    mantissa = bits - 1 - exponent_bits
    infinity = (2**exponent_bits - 1) << mantissa
    special = [0, 1, 2 ** (bits - 1), 2 ** (bits - 1) + 1, 2**bits - 1, 2 ** (bits - 1) - 1, infinity, infinity + 1]
    usual = 1 if dtype == torch.bool else 2**bits - 1
    count = 2 * n if dtype.is_complex else n
    base = [rng.choice(special) % 2**bits if rng.random() < 0.2 else rng.randint(0, usual) for _ in range(count)]
    if draw(st.booleans()):  # weights: of few exponents
        base = [p & ~infinity | (rng.choice([0, 1, 5, 6]) << mantissa) & infinity for p in base]
    share = draw(st.sampled_from([0.0, 0.01, 0.1, 0.6, 1.0]))
    largest = draw(st.sampled_from([1, 3, 40, 2**12, 2**bits]))
    tuned = [(p + rng.randint(-largest, largest)) % 2**bits if rng.random() < share else p for p in base]
    return of_patterns(base, dtype), of_patterns(tuned, dtype)


@given(pairs(), st.sampled_from([(64, 8), (256, 16), (2**20, 2**10)]))
@settings(max_examples=150, deadline=None)
def test_what_is_encoded_comes_back_bit_for_bit(pair, sizes):
    """Of every dtype, whatever the bits are: NaNs, zeros of both signs, infinities, denormals; and None for no change.

    The slow reader finds the same in the code.
    """
    base, tuned = pair
    with small(*sizes):
        code = encode(base, tuned)
        assert (code is None) == (patterns(base) == patterns(tuned))
        if code is not None:
            assert_exact(code, base, tuned)
            bits = 8 * base.dtype.itemsize // (2 if base.is_complex() else 1)
            slow = Slow(code).tuned(patterns(base), bits, exponent_bits_of(base.dtype), *sizes)
            assert slow == patterns(tuned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("by", [1e-6, 1e-5, 3e-4, 1e-2])
def test_the_slow_reader_reads_what_training_makes(dtype, by):
    """Each way that a section is written, each width, several levels: an update of this size on weights."""
    base = weights(5000, dtype)
    tuned = moved(base, by).to(dtype)
    with small(2048, 128):
        code = encode(base, tuned)
    slow = Slow(code).tuned(patterns(base), 8 * dtype.itemsize, EXPONENT_BITS[dtype], 2048, 128)
    assert slow == patterns(tuned)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.complex64, torch.bool])
def test_shapes(shape, dtype):
    """A scalar, an empty tensor and one of many dimensions."""
    base = torch.zeros(shape, dtype=dtype)
    tuned = torch.ones(shape, dtype=dtype)
    code = encode(base, tuned)
    assert (code is None) == (base.numel() == 0)
    if code is not None:
        assert_exact(code, base, tuned)
        assert_exact(np.frombuffer(code, np.uint8), base, tuned)


def test_strides_do_not_matter():
    """Transposed and stepped tensors are their numbers, row after row, and neither argument is changed."""
    whole = weights((40, 60), torch.float32)
    base, tuned = whole.T[::2], moved(whole, 1e-4).T[::2]
    before = base.clone(), tuned.clone()
    code = encode(base, tuned)
    assert code == encode(base.contiguous(), tuned.contiguous())
    assert_exact(code, base, tuned)
    assert torch.equal(base, before[0])
    assert torch.equal(tuned, before[1])
    row, tuned_row = whole[0, ::3], moved(whole, 1e-4)[0, ::3]
    assert_exact(encode(row, tuned_row), row, tuned_row)


@pytest.mark.parametrize("dtype", [d for d in FLOATS if d.itemsize <= 2], ids=str)
def test_places_are_in_the_order_of_the_numbers(dtype):
    """All patterns: another place each, -0.0 just below 0.0, numbers ascending, NaNs at both ends, and back again."""
    bits = 8 * dtype.itemsize
    everything = of_patterns(range(2**bits), dtype)
    places = grid._places(grid._patterns(everything))
    assert places.tolist() == [slow_place(p, bits, EXPONENT_BITS[dtype]) for p in range(2**bits)]
    assert grid._patterns_at(places).tolist() == list(range(2**bits))
    in_order = everything.double()[np.argsort(places)]
    numbers = in_order[~in_order.isnan()]
    assert (numbers.diff() >= 0).all()
    assert int((numbers.diff() == 0).sum()) == 1  # of the zeros
    at = int(places[0])
    assert slow_pattern(at - 1, bits, EXPONENT_BITS[dtype]) == 2 ** (bits - 1)
    first, last = (np.flatnonzero(~in_order.isnan().numpy())[i] for i in (0, -1))
    assert last - first + 1 == len(numbers)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_exponents_have_their_bits(dtype):
    """All but the sign's and those that `eps` has below 1."""
    assert EXPONENT_BITS[dtype] == 8 * dtype.itemsize - 1 + math.log2(torch.finfo(dtype).eps)


def test_small_moves_are_small_numbers():
    """0, -1, 1, -2, 2 are 0, 1, 2, 3, 4; and the largest moves the largest numbers."""
    moves = np.array([0, -1, 1, -2, 2, 127, -128], np.int8).view(np.uint8)
    assert grid._zigzag(moves).tolist() == [0, 1, 2, 3, 4, 254, 255]
    assert np.array_equal(grid._zagzig(grid._zigzag(moves)), moves)


def test_the_bytes_are_those_of_the_format():
    """A code that is in somebody's file stays readable: written down here."""
    base = torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.bfloat16)
    tuned = of_patterns([0x3F81, 0xC000, 0x8000, 0x4040], torch.bfloat16)
    stored = bytes.fromhex("677269642f3101080002000100") + struct.pack("<I", zlib.crc32(as_bytes(tuned)))
    assert_exact(stored, base, tuned)


def test_what_did_not_change_costs_a_byte_a_block():
    """One scalar in the third of four blocks."""
    base = weights(1000)
    tuned = base.clone()
    tuned[600] += 1
    with small(block=256):
        code = encode(base, tuned)
        assert code[6:8] == bytes(2)
        assert code[-5:-4] == bytes(1)
        assert_exact(code, base, tuned)
    assert encode(base, base.clone()) is None


def entropy(base, tuned):
    """Bytes that an ideal code takes which knows how the moves of every exponent are distributed."""
    old, new = grid._patterns(base), grid._patterns(tuned)
    moves = grid._places(new) - grid._places(old)
    exponents = old >> old.dtype.type(8 * old.itemsize - 1 - EXPONENT_BITS[base.dtype]) & old.dtype.type(255)
    bits = 0.0
    for exponent in np.unique(exponents):
        counts = np.unique(moves[exponents == exponent], return_counts=True)[1]
        bits += counts.sum() * math.log2(counts.sum()) - float(counts @ np.log2(counts))
    return bits / 8


@pytest.mark.parametrize(
    ("by", "at_most"), [(1e-5, 1.1), (3e-5, 1.06), (1e-4, 1.04), (3e-4, 1.035), (1e-3, 1.035), (1e-2, 1.035)]
)
def test_size_is_near_the_entropy(by, at_most):
    """An update of about one size everywhere, from one that few scalars notice to one that all do."""
    base = weights(2**18)
    tuned = moved(base, by)
    code = encode(base, tuned)
    assert len(code) < at_most * entropy(base, tuned)
    assert_exact(code, base, tuned)


def test_the_base_is_what_makes_it_small():
    """Smaller by a tenth than an ideal code that does not look at the base's exponents."""
    base = weights(2**18)
    tuned = moved(base, 3e-4)
    moves = grid._places(grid._patterns(tuned)) - grid._places(grid._patterns(base))
    counts = np.unique(moves, return_counts=True)[1]
    blind = (moves.size * math.log2(moves.size) - float(counts @ np.log2(counts))) / 8
    assert len(encode(base, tuned)) < 0.9 * blind


def test_noise_stays_noise_and_costs_no_more():
    """Unrelated bits of every width: the tensor's own size, and a few bytes a plane."""
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        rng = np.random.default_rng(0)
        size = dtype.itemsize
        base, tuned = (torch.from_numpy(rng.integers(0, 256, 2**16 * size).astype(np.uint8)).view(dtype) for _ in "ab")
        assert len(encode(base, tuned)) <= base.nbytes + 32


def test_few_changes_cost_what_their_positions_cost():
    """A scalar in a thousand, anywhere: 1.7 bytes each at its entropy of 1.43 for the place and 0.25 for the sign."""
    base = torch.zeros(2**20, dtype=torch.bfloat16)
    at = np.random.default_rng(0).choice(2**20, 1000, replace=False)
    tuned = base.clone()
    tuned[at] = of_patterns([1] * 500 + [0x8001] * 500, torch.bfloat16)
    code = encode(base, tuned)
    assert len(code) < 1900
    assert_exact(code, base, tuned)


def test_one_in_a_hundred_costs_little_more_than_its_entropy():
    """Scalars anywhere, each a few hundredths larger."""
    base = weights(2**18)
    tuned = torch.where(torch.from_numpy(np.random.default_rng(0).random(2**18) < 0.01), 1.05 * base, base)
    assert len(encode(base, tuned)) < 1.15 * entropy(base, tuned)


def test_changed_rows_cost_little_beside_what_changed():
    """Of an embedding, the rows of the tokens that occurred: which they are is nearly free."""
    base = weights((256, 1024))
    tuned = base.clone()
    tuned[::4] = moved(base, 3e-4)[::4]
    assert len(encode(base, tuned)) < 1.06 * len(encode(base[::4], tuned[::4]))


def test_what_repeats_costs_once():
    """A pattern of moves that comes back again and again."""
    moves = torch.from_numpy(np.random.default_rng(0).integers(0, 200, 20_000, dtype=np.int32)).repeat(5)
    base = torch.zeros_like(moves)
    assert len(encode(base, moves)) < 1.1 * len(encode(base[:20_000], moves[:20_000]))


def test_a_rare_large_move_costs_a_few_bytes():
    """One scalar of 2^16 that goes to another end of the world beside others that hardly move."""
    base = weights(2**16, torch.float32)
    tuned = of_patterns([p + 1 for p in patterns(base)], torch.float32)
    usual = len(encode(base, tuned))
    tuned[7] = -torch.inf
    code = encode(base, tuned)
    assert len(code) < usual + 600
    assert_exact(code, base, tuned)


def test_other_tensors_are_refused():
    """There is no difference between two shapes, or two dtypes."""
    base = torch.zeros(2, 3)
    for other in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises(IsolateError, match="store it whole"):
            encode(base, other)


def test_another_base_is_noticed():
    """By the sizes of its groups or by the checksum, also where one bit of one scalar differs."""
    base = weights(5000)
    code = encode(base, moved(base, 1e-3))
    for other in (
        weights(5000, seed=2),
        of_patterns([p ^ (i == 77) for i, p in enumerate(patterns(base))], base.dtype),
    ):
        with pytest.raises(FormatError, match="belongs to another base"):
            decode(code, other)
    for n in (4999, 5001):
        with pytest.raises(FormatError, match="belongs to another base"):
            decode(code, weights(n))


def some_pairs():
    """(base, tuned) of many kinds."""
    found = []
    for dtype, by in ((torch.bfloat16, 1e-5), (torch.bfloat16, 1e-3), (torch.float32, 1e-4), (torch.float16, 1e-5)):
        base = weights(3000, dtype)
        found.append((base, moved(base, by)))
    sparse = weights(3000)
    found.append((sparse, torch.where(torch.arange(3000) % 100 == 7, 2 * sparse, sparse)))
    integers = torch.arange(2000)
    found.append((integers, integers.flip(0)))
    found.append((torch.zeros(3000, dtype=torch.bool), torch.arange(3000) % 9 == 0))
    found.append((torch.zeros(3), torch.tensor([-0.0, 1, torch.nan])))
    return found


def altered(code, rng):
    """The code with something flipped, cut, inserted, exchanged or overwritten."""
    data = bytearray(code)
    for _ in range(rng.choice([1, 1, 1, 3])):
        at, to = rng.randrange(len(data)), rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.choice([1, 2, 4, 50]))
        elif kind == 3:
            data[at], data[to] = data[to], data[at]
        elif kind == 4:
            data[at : at + 4] = rng.choice([bytes(4), b"\xff" * 4, b"\xff\xff\xff\x7f", struct.pack("<I", 3000)])
        else:
            del data[at : at + rng.randrange(1, 9)]
        if not data:
            break
    return bytes(data)


def test_altered_codes_are_refused_within_bounded_memory():
    """Thousands of them: a clear error or, by luck, the right tensor; never another error, nor more memory."""
    rng = random.Random(0)
    tracemalloc.start()
    for base, tuned in some_pairs():
        with small(1024, 64):
            code = encode(base, tuned)
            for _ in range(400):
                bad = altered(code, rng)
                try:
                    found = decode(bad, base)
                except FormatError:
                    continue
                assert patterns(found) == patterns(tuned), bad.hex()
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_what_is_altered_behind_the_checksum_never_breaks_the_reader():
    """With a checksum that always fits: a tensor or the error, and no other one, whatever the lists say."""
    rng = random.Random(1)
    for base, tuned in some_pairs():
        with small(1024, 64), mock.patch.object(grid, "_checksum", return_value=0):
            code = encode(base, tuned)
            for _ in range(500):
                bad = bytearray(altered(code[:-4], rng))
                bad[:6] = b"grid/1"
                try:
                    found = decode(bytes(bad) + bytes(4), base)
                except FormatError:
                    continue
                assert found.shape == base.shape


def test_every_cut_is_refused():
    """After each of its bytes."""
    base = weights(300)
    code = encode(base, moved(base, 1e-4))
    for size in range(len(code)):
        with pytest.raises(FormatError):
            decode(code[:size], base)
    with pytest.raises(FormatError, match="1 bytes follow its end"):
        decode(code + b"0", base)


def crafted(base, tuned, *parts):
    """A code with the right frame around these bytes."""
    return b"grid/1" + b"".join(parts) + struct.pack("<I", zlib.crc32(as_bytes(tuned)))


BASE = torch.zeros(8, dtype=torch.int16)
TUNED = torch.full((8,), 1, dtype=torch.int16)  # every number is 2
TWOS = bytes([0x08, RAW]) + bytes([2] * 8)


def test_a_crafted_code_that_is_right_is_read():
    """So that those below are refused for what is wrong with them."""
    for parts in (
        (b"\1", TWOS),
        (b"\1", bytes([0x10, RAW]) + bytes([2] * 8)),  # a plane, and nothing more
        (b"\1", bytes([0x02, RAW]) + b"\xaa\xaa"),  # symbols of two bits
        (b"\1", bytes([0x01, RAW, 0xFF]) + bytes([0x08, RAW]) + bytes([1] * 8)),  # two levels
        (b"\3", bytes([0x01, RAW, 0xFF, 0x00]), bytes([0x08, RAW]) + bytes([1] * 8)),  # those that have changed
        (b"\3", bytes([0x01, GAPS, 1, 8, 0, 0, 0, 1, 0, 0, 0, 0xFF, 0x00]), bytes([0x08, RAW]) + bytes([1] * 8)),
    ):
        assert_exact(crafted(BASE, TUNED, *parts), BASE, TUNED)


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ((b"\2", TWOS), "begins with 2"),
        ((b"\5", TWOS), "begins with 5"),  # groups, of integers
        ((b"\x09", TWOS), "begins with 9"),
        ((b"\xff", TWOS), "begins with 255"),
        ((b"\0",), "CRC-32"),
        ((b"\1", bytes([0x03, RAW]) + bytes([2] * 8)), "begins with 3"),  # no such width
        ((b"\1", bytes([0x30, RAW]) + bytes([2] * 8)), "begins with 48"),  # more planes than bytes
        ((b"\1", bytes([0x28, RAW]) + bytes([2] * 8)), "begins with 40"),  # symbols of no byte
        ((b"\1", bytes([0x01, RAW, 0xFF] * 7 + [0x08, RAW] + [2] * 8)), "begins with 8"),  # a ninth level could follow
        ((b"\1", bytes([0x08, 3]) + bytes([2] * 8)), "unknown way 3"),
        ((b"\1", bytes([0x08, GAPS, 1, 8, 0, 0, 0, 1, 0, 0, 0, 0xFF])), "unknown way 2"),
        ((b"\1", bytes([0x01, GAPS, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0xFF])), "gap0"),
        ((b"\1", bytes([0x01, GAPS, 1, 9, 0, 0, 0, 1, 0, 0, 0, 0xFF])), "9 positions"),
        ((b"\1", bytes([0x01, GAPS, 1, 8, 0, 0, 0, 255, 255, 255, 255, 0xFF])), "it ends at byte"),
        ((b"\1", bytes([0x08, ZSTD, 255, 255, 255, 255, 0xFF])), "it ends at byte"),
        ((b"\3", bytes([0x00]), TWOS), "goes up to 0"),  # nothing has changed
        ((b"\3", bytes([0x08, RAW]) + bytes([2] * 8), TWOS), "goes up to 2"),
        ((b"\1", TWOS, b"\0"), "1 bytes follow"),
    ],
)
def test_a_lie_is_refused_for_what_it_is(parts, match):
    """Each rule of the format that a stranger can break."""
    with pytest.raises(FormatError, match=match):
        decode(crafted(BASE, TUNED, *parts), BASE)


@pytest.mark.parametrize("code", [b"", b"grid/", b"grid/2" + bytes(20), bytes(100)])
def test_another_format_is_refused_by_its_name(code):
    """A placeholder into which nothing was loaded, or a later version's."""
    with pytest.raises(FormatError, match="update peft_isolate"):
        decode(code, BASE)


def test_a_bomb_is_refused():
    """A zstd frame of more than what belongs there costs nothing."""
    bomb = zstandard.ZstdCompressor().compress(bytes(2**26))
    code = crafted(BASE, TUNED, bytes([1, 0x08, ZSTD]) + struct.pack("<I", len(bomb)) + bomb)
    tracemalloc.start()
    with pytest.raises(FormatError, match="states 67,108,864 bytes where 8 belong"):
        decode(code, BASE)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(("dtype", "mib"), [(torch.bfloat16, 40), (torch.float64, 90)])
def test_memory_is_the_result_and_a_block(dtype, mib):
    """Three blocks: reading and writing take scratch for one, beside what they return."""
    base = weights(3 * 2**20, dtype)
    tuned = moved(base, 1e-3)
    tracemalloc.start()
    code = encode(base, tuned)
    assert tracemalloc.get_traced_memory()[1] < 2 * len(code) + mib * 2**20
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    found = decode(code, base)
    assert tracemalloc.get_traced_memory()[1] - before < base.nbytes + mib * 2**20
    tracemalloc.stop()
    assert torch.equal(found, tuned)


@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 5), min_size=1, max_size=300))
@settings(deadline=None)
def test_a_list_of_any_numbers_comes_back(numbers):
    """Whatever they are, and whatever follows them."""
    out = bytearray()
    small_numbers.write_list(out, np.array(numbers, np.uint32))
    source = small_numbers.Reader(np.frombuffer(bytes(out) + b"next", np.uint8))
    assert small_numbers.read_list(source, len(numbers), np.dtype(np.uint32)).tolist() == numbers
    assert source.take(4).tobytes() == b"next"


def test_numbers_of_every_size_at_once_come_back():
    """Ever rarer, ever larger: more levels than there are would help, so the last is of planes."""
    sizes = np.random.default_rng(0).geometric(0.5, 2**14) * 4
    numbers = np.array([2 ** min(63, int(size)) + 3 for size in sizes], np.uint64)
    out = bytearray()
    small_numbers.write_list(out, numbers)
    source = small_numbers.Reader(np.frombuffer(out, np.uint8))
    assert np.array_equal(small_numbers.read_list(source, numbers.size, numbers.dtype), numbers)
    assert not source.left


@pytest.mark.parametrize("choice", [(0, 1), (0, 2), (0, 8)])
def test_a_writer_of_other_choices_is_read(choice):
    """The same width on every level that may have one: numbers that still go on at the eighth are planes there."""
    numbers = np.arange(2**12, dtype=np.uint16)
    with mock.patch.object(small_numbers, "_choose", return_value=choice):
        out = bytearray()
        small_numbers.write_list(out, numbers)
    source = small_numbers.Reader(np.frombuffer(out, np.uint8))
    assert np.array_equal(small_numbers.read_list(source, numbers.size, numbers.dtype), numbers)


def test_the_examples_run():
    """Those of the docstrings."""
    assert doctest.testmod(grid).failed == 0
