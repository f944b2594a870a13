"""The packed delta: what goes in comes out, rounded as it says; what lies or is damaged is refused."""

from __future__ import annotations

import copy
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_isolate.deltas.delta import Delta
from peft_isolate.deltas.packed import (
    CHUNK,
    CODE_OF,
    KINDS_OF,
    LENGTH,
    SHORTEST_ROW,
    VALUES,
    PackedPart,
    Packing,
    pack,
    unpack,
)
from peft_isolate.deltas.packed_delta import PackedDelta, make_delta
from peft_isolate.deltas.soft_mask import SoftMask
from peft_isolate.errors import FormatError, IsolateError
from peft_isolate.regions.frames import compress
from peft_isolate.regions.selection import Selection
from peft_isolate.regions.stored import storable

KINDS = ("whole", "rows", "columns", "elements", "all_but")
SAVED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def drawn(kind: str, shape: tuple[int, ...], share: float, seed: int) -> Selection:
    """A selection of any kind, at random."""
    whole = Selection.whole(shape)
    if kind == "whole":
        return whole
    size = {"rows": whole.matrix_shape[0], "columns": whole.matrix_shape[1]}.get(kind, whole.numel)
    units = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: round(share * size)]
    return getattr(Selection, kind)(shape, units.sort().values)


@st.composite
def deltas(draw):
    """({"delta": numbers, "held": …}, {"delta": place, …}): trained alone, held alone, or both."""
    shape = draw(st.sampled_from([(5,), (1, 9), (7, 4), (3, 600), (2, 3, 5), (40, 520)]))
    seed, dtype = draw(st.integers(0, 2**16)), draw(st.sampled_from(SAVED))
    size = 10.0 ** draw(st.integers(-12, 3))
    trained = drawn(draw(st.sampled_from(KINDS)), shape, draw(st.sampled_from([0.01, 0.3, 0.9])), seed)
    held = ~trained
    places = {"delta": trained, "held": held}
    if draw(st.booleans()):
        del places[draw(st.sampled_from(["delta", "held"]))]
    places = {name: storable(place) for name, place in places.items()}
    numbers = {
        name: torch.randn(PackedPart.of(name, place).shape, generator=torch.Generator().manual_seed(seed)).mul(size)
        for name, place in places.items()
    }
    return {name: tensor.to(dtype) for name, tensor in numbers.items()}, places


def selection_of(place, codes: torch.Tensor | None) -> Selection:
    return place if isinstance(place, Selection) else place.selection(codes)


@settings(deadline=None, max_examples=150)
@given(deltas(), st.sampled_from(VALUES), st.booleans())
def test_what_goes_in_comes_out_as_it_is_rounded(delta, values, zstd):
    """Positions exactly; exact numbers bit for bit; bf16 and fp16 as torch rounds; int8 to half a step of its row."""
    numbers, places = delta
    buffer, stored = pack(numbers, places, values, zstd)
    packing = Packing.of(values, buffer.numel(), stored)
    assert Packing.from_text(packing.to_text()) == packing
    found = unpack(buffer, packing)
    for name, wanted in numbers.items():
        got = found[name]
        assert selection_of(stored[name], found.get(f"{name}_codes")) == selection_of(places[name], None)
        assert got.shape == wanted.shape
        if values == "exact":
            assert got.dtype == wanted.dtype
            assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
        elif values == "int8":
            step = steps_of(wanted, places[name], zstd)
            assert got.dtype == torch.float32
            assert ((got.double() - wanted.double()).abs() <= step * 0.5 * (1 + 1e-4) + 1e-45).all()
        else:
            rounded = wanted.to({"bf16": torch.bfloat16, "fp16": torch.float16}[values])
            assert got.dtype == rounded.dtype
            assert torch.equal(got, rounded)


def steps_of(numbers: torch.Tensor, place, zstd: bool) -> torch.Tensor:
    """The slow twin: the largest of each number's row over 127; of single elements over 63, where that saves."""
    flat = numbers.double().flatten()
    by_elements = place.kind == "elements"
    row = numbers.shape[-1] if not by_elements and numbers.shape[-1] >= SHORTEST_ROW else CHUNK
    steps = torch.zeros_like(flat)
    for start in range(0, flat.numel(), row):
        steps[start : start + row] = flat[start : start + row].abs().max() / (63 if by_elements and zstd else 127)
    return steps.reshape(numbers.shape)


def test_int8_is_the_textbooks():
    """Nearest step, a tie to the even one; the largest number of a row is the largest step; zeros stay zero."""
    numbers = torch.zeros(3, SHORTEST_ROW)
    numbers[0, :6] = torch.tensor([127.0, -127.0, 0.5, 1.5, 2.5, -0.6])
    numbers[2, 0] = 1e-45  # less than any step: the smallest there is
    place = Selection.whole(numbers.shape)
    buffer, places = pack({"delta": numbers}, {"delta": place}, "int8")
    found = unpack(buffer, Packing.of("int8", buffer.numel(), places))["delta"]
    assert found[0, :6].tolist() == [127.0, -127.0, 0.0, 2.0, 2.0, -1.0]
    assert not found[1].any()
    assert found[2, 0] == numbers[2, 0]


@pytest.mark.parametrize("count", [CHUNK - 1, CHUNK, CHUNK + 1, 2**20 + 5])
def test_elements_have_a_scale_for_each_chunk(count):
    """Also where chunks are rounded in several blocks, and the last one is cut."""
    place = storable(Selection.elements((3, 2**20), torch.arange(count)))
    numbers = torch.linspace(-1, 3, count) ** 3
    buffer, places = pack({"delta": numbers}, {"delta": place}, "int8", zstd=False)
    found = unpack(buffer, Packing.of("int8", buffer.numel(), places))["delta"]
    assert ((found - numbers).abs() <= steps_of(numbers, place, zstd=False) * 0.50001).all()
    code_bytes = places["delta"].codes.code_bytes
    assert buffer.numel() == 1 + 3 * LENGTH + code_bytes + 4 * -(-count // CHUNK) + count + 4


@pytest.mark.parametrize("zstd", [True, False])
def test_a_dense_half_in_int8_takes_a_byte_a_scalar(zstd):
    """Rows of 512 and more: a hundredth for the scales and all the rest."""
    numbers = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    place = Selection.rows((512, 512), range(256))
    buffer, _ = pack({"delta": numbers}, {"delta": place}, "int8", zstd)
    assert buffer.numel() <= 1.01 * numbers.numel()


def test_elements_take_what_they_should():
    """1 % of the positions at random: in bf16 whatever the numbers, in int8 those that are the largest of many.

    The positions take 1.02 bytes each, their plain code 1.08.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2000, 2000)
    dense = torch.randn(shape, generator=generator)
    largest = dense.abs().flatten().topk(40000).indices.sort().values
    anywhere = torch.randperm(4000000, generator=generator)[:40000].sort().values
    for values, at, limit in (("bf16", anywhere, 2.5), ("bf16", largest, 2.0), ("int8", largest, 1.8)):
        place = storable(Selection.elements(shape, at))
        buffer, _ = pack({"delta": dense.flatten()[at]}, {"delta": place}, values)
        assert buffer.numel() / 40000 < limit
        bare, _ = pack({"delta": torch.zeros(40000)}, {"delta": place}, values)
        assert bare.numel() / 40000 < 1.03


def test_positions_get_the_code_that_compresses_best():
    """Of 3 % of the positions the shortest code has units of 6 bits, but those of 8 become shorter."""
    at = torch.randperm(4000000, generator=torch.Generator().manual_seed(0))[:120000].sort().values
    place = storable(Selection.elements((2000, 2000), at))
    numbers = torch.zeros(120000)
    small, places = pack({"delta": numbers}, {"delta": place}, "bf16")
    assert (place.codes.format, places["delta"].codes.format) == ("gap6", "gap8")
    assert places["delta"].selection() == place.selection()
    assert small.numel() < 0.99 * place.codes.code_bytes
    assert pack({"delta": numbers}, {"delta": place}, "bf16", zstd=False)[1]["delta"] == place


@pytest.mark.parametrize("dtype", SAVED)
def test_each_plane_is_as_short_as_either_level_makes_it(dtype):
    """The slow twin: the bits by Python's own numbers, rotated, cut into bytes, compressed one by one."""
    numbers = torch.randn(5000, generator=torch.Generator().manual_seed(0)).repeat(2).to(dtype)
    size = 8 * dtype.itemsize
    bits = [int.from_bytes(bytes(number.view(torch.uint8).tolist()), "little") for number in numbers[:, None]]
    rotated = [((one << 1) | (one >> (size - 1))) % 2**size for one in bits]
    planes = [bytes((one >> shift) % 256 for one in rotated) for shift in range(0, size, 8)]
    shortest = [min([plane, compress(plane, 1), compress(plane, 9)], key=len) for plane in planes]
    buffer, _ = pack({"delta": numbers}, {"delta": Selection.whole((10000,))}, "exact")
    body = bytes([CODE_OF[dtype]]) + b"".join(len(plane).to_bytes(8, "little") + plane for plane in shortest)
    assert bytes(buffer.tolist()) == body + zlib.crc32(body).to_bytes(4, "little")


@pytest.mark.parametrize("values", VALUES)
def test_numbers_that_cannot_be_packed_are_refused(values):
    """Not made into infinity in silence."""
    place = {"delta": Selection.whole((4,))}
    for bad in (float("nan"), float("inf")):
        with pytest.raises(FormatError, match="NaN or infinity"):
            pack({"delta": torch.tensor([0.0, 1.0, bad, 2.0])}, place, values)
    large = {"bf16": 3.4e38, "fp16": 7e4, "int8": 1e300, "exact": 1e300}[values]
    numbers = {"delta": torch.tensor([0.0, 1.0, large, 2.0], dtype=torch.float64)}
    if values == "exact":
        pack(numbers, place, values)
    else:
        with pytest.raises(IsolateError, match=r"'exact'"):
            pack(numbers, place, values)


# Damaged and hostile buffers


def sample(values: str = "bf16", zstd: bool = True):
    """(buffer, packing) of trained elements and held rest."""
    trained = drawn("elements", (40, 30), 0.2, seed=1)
    places = {"delta": storable(trained), "held": storable(~trained)}
    generator = torch.Generator().manual_seed(0)
    numbers = {
        name: torch.randn(PackedPart.of(name, p).shape, generator=generator) * 1e-3 for name, p in places.items()
    }
    buffer, places = pack(numbers, places, values, zstd)
    return buffer, Packing.of(values, buffer.numel(), places), places


def signed(data: np.ndarray) -> torch.Tensor:
    """With the checksum that belongs to it."""
    data[-4:] = np.frombuffer(zlib.crc32(data[:-4].tobytes()).to_bytes(4, "little"), np.uint8)
    return torch.from_numpy(data)


@pytest.mark.parametrize("values", VALUES)
def test_every_altered_byte_is_noticed(values):
    """Also every cut, and a placeholder into which nothing was loaded."""
    buffer, packing, _ = sample(values)
    for at in range(0, buffer.numel(), 7):
        altered = buffer.clone()
        altered[at] ^= 1 << at % 8
        with pytest.raises(FormatError, match="checksum"):
            unpack(altered, packing)
    with pytest.raises(FormatError, match="nothing but zeros: it was never loaded"):
        unpack(torch.zeros_like(buffer), packing)
    for other in (buffer[:-1], torch.cat([buffer, buffer[:1]]), buffer.float(), buffer[None]):
        with pytest.raises(FormatError, match="bytes that the adapter's config states"):
            unpack(other, packing)


@pytest.mark.parametrize("zstd", [True, False])
@pytest.mark.parametrize("values", VALUES)
def test_a_forged_buffer_is_refused_or_holds_sound_numbers(values, zstd):
    """With a checksum that fits: each is our error, or finite numbers of the right shapes; never much memory."""
    buffer, packing, places = sample(values, zstd)
    generator = np.random.default_rng(0)
    tracemalloc.start()
    for trial in range(400):
        data = buffer.numpy().copy()
        for _ in range(generator.integers(1, 4)):
            at = generator.integers(0, data.size)
            if trial % 3 == 0:
                at = min(at, 20)  # where kinds and lengths stand
            data[at] = generator.integers(0, 256)
        try:
            found = unpack(signed(data), packing)
            for name, place in places.items():
                assert found[name].shape == PackedPart.of(name, place).shape
                assert torch.isfinite(found[name]).all()
                place.check(found[f"{name}_codes"])
        except FormatError:
            pass
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_a_bomb_in_a_frame_is_refused_by_what_the_config_says():
    """A frame of a gigabyte where a thousand bytes belong."""
    places = {"delta": Selection.whole((1000,))}
    bomb = compress(np.zeros(2**28, np.uint8), 1)[:900]
    data = np.frombuffer(bytes([CODE_OF[torch.float32]]) + len(bomb).to_bytes(8, "little") + bomb, np.uint8)
    data = np.concatenate([data, np.zeros(100, np.uint8)])
    packing = Packing.of("exact", data.size, places)
    tracemalloc.start()
    with pytest.raises(FormatError, match="states 268,435,456 bytes where 1,000 belong"):
        unpack(signed(data), packing)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def forged(dtype_code: int, *sections: bytes, tail: bytes = b"") -> torch.Tensor:
    body = bytes([dtype_code]) + b"".join(len(s).to_bytes(8, "little") + s for s in sections) + tail + b"\0\0\0\0"
    return signed(np.frombuffer(body, np.uint8).copy())


def test_what_no_writer_writes_is_refused():
    """Another kind than the config's, bytes left over, sections too long, NaN, scales and steps out of range."""
    places = {"delta": Selection.whole((2,))}
    one = np.float32(1).tobytes()

    def refused(buffer: torch.Tensor, values: str, match: str) -> None:
        with pytest.raises(FormatError, match=match):
            unpack(buffer, Packing(values, buffer.numel(), Packing.of("bf16", 25, places).parts))

    assert unpack(forged(5, one, b"\1\2"), Packing.of("int8", 27, places))["delta"].tolist() == [1.0, 2.0]
    refused(forged(5, one, b"\1\2"), "bf16", "its numbers are torch.int8, its config bf16")
    refused(forged(2, b"\0\0", b"\1\2"), "bf16", "its numbers are torch.float16")
    refused(forged(9, b"\0\0", b"\1\2"), "bf16", "its numbers are None")
    refused(forged(1, b"\0\0", b"\1\2", tail=b"\0"), "bf16", "1 bytes after its end")
    refused(forged(1, b"\0\0\0", b"\1\2"), "bf16", "section of 3 bytes .* where 2 belong")
    refused(forged(1, b"\0\0"), "bf16", "section")
    refused(forged(1, b"\0\0", b"\xff\xff"), "bf16", "NaN or infinity")
    refused(forged(1, b"\0\0", b"\xff"), "bf16", "zstd frame")
    refused(forged(5, np.float32("nan").tobytes(), b"\1\2"), "int8", "scales or steps")
    refused(forged(5, np.float32(-1).tobytes(), b"\1\2"), "int8", "scales or steps")
    refused(forged(5, one, b"\1\x80"), "int8", "scales or steps")
    refused(forged(5, np.float32(3e38).tobytes(), b"\1\2"), "int8", "NaN or infinity")


@pytest.mark.parametrize("n_bytes", [None, 1.5, True, "100", -1, 0, 20, 26, 10**12])
def test_a_size_that_no_buffer_has_is_refused_before_it_is_allocated(n_bytes):
    """2 numbers of bf16: a kind, two sections and the checksum, and at most the numbers themselves."""
    places = {"delta": Selection.whole((2,))}
    with pytest.raises(FormatError, match=r"the size .* of a packed delta|cannot be, in bf16 this one has 21 to 25"):
        Packing.of("bf16", n_bytes, places)
    assert Packing.of("bf16", 25, places).n_bytes == 25


# The module


def both(kind: str, values: str, dtype: torch.dtype = torch.float32, zstd: bool = True) -> tuple[Delta, PackedDelta]:
    """(a plain delta with the numbers as they are rounded, the packed one): trained and held, damped."""
    trained = drawn(kind, (6, 8), 0.4, seed=3)
    like = torch.empty(0, dtype=dtype)
    mask = None
    if kind == "rows":
        mask = SoftMask("rows", "update", trained.indices.numel(), torch.linspace(0, 0.9, trained.indices.numel()))
    plain = make_delta(trained, ~trained, like, mask=mask)
    with torch.no_grad():
        for i, numbers in enumerate(plain.parameters()):
            numbers.copy_(torch.randn(numbers.shape, generator=torch.Generator().manual_seed(i)))
    numbers = {name: plain.numbers(name).detach() for name in plain.places}
    buffer, places = pack(numbers, plain.places, values, zstd)
    packing = Packing.of(values, buffer.numel(), places)
    packed = make_delta(places["delta"], places["held"], like, mask=mask, packing=packing)
    packed.load_state_dict(packed.state_dict() | {"packed": buffer})
    rounded = unpack(buffer, packing)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(rounded[name])
    assert isinstance(packed, PackedDelta)
    return plain, packed


def assert_equal(plain: Delta, packed: Delta) -> None:
    """Part for part, bit for bit."""
    for wanted, got in zip(plain.parts(), packed.parts(), strict=True):
        assert got.numbers.dtype == wanted.numbers.dtype
        assert torch.equal(got.numbers, wanted.numbers)
        assert torch.equal(got.at, wanted.at)
        assert torch.equal(got.factor, wanted.factor)
        assert got.support == wanted.support
    assert plain.dtype == packed.dtype
    assert plain.selection() == packed.selection()


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_packed_delta_is_the_plain_one(kind, values):
    """Numbers, positions, factors; and no parameter that an optimizer could find."""
    plain, packed = both(kind, values)
    assert not list(packed.parameters())
    assert_equal(plain, packed)
    assert torch.equal(plain.dense(), packed.dense())
    assert_equal(plain, copy.deepcopy(packed))


def test_casts_are_those_of_a_parameter():
    """Also there and back: what a parameter lost, the buffer still has."""
    plain, packed = both("elements", "exact")
    for cast in (
        lambda delta: delta.half(),
        lambda delta: delta.float(),
        lambda delta: delta.to(torch.bfloat16),
        lambda delta: delta.cast(torch.float32),
        lambda delta: delta.double(),
    ):
        cast(plain)
        cast(packed)
        assert_equal(plain, packed)
    assert packed.packed.dtype == torch.uint8


def test_a_load_forgets_what_casts_took():
    """A parameter that gets new numbers has them in its dtype, rounded once."""
    plain, packed = both("elements", "exact")
    numbers, buffer = copy.deepcopy(plain.state_dict()), packed.packed.clone()
    for delta in (plain, packed):
        delta.half().float()
    plain.load_state_dict(numbers)
    packed.load_state_dict({"packed": buffer})
    assert_equal(plain, packed)


def test_another_buffer_is_unpacked_anew():
    """Loaded, assigned, written to in place: what was unpacked before is never used again."""
    plain, packed = both("elements", "exact", zstd=False)
    first, wanted = packed.packed.clone(), plain.delta.detach().clone()
    numbers = {name: -plain.numbers(name).detach() for name in plain.places}
    other, _ = pack(numbers, {name: storable(plain.selection(name)) for name in plain.places}, "exact", zstd=False)
    for put in (
        lambda new: packed.load_state_dict({"packed": new}),
        lambda new: packed.load_state_dict({"packed": new}, assign=True),
        lambda new: setattr(packed, "packed", new),
        lambda new: packed.packed.copy_(new),
    ):
        put(other.clone())
        assert torch.equal(packed.numbers("delta"), -wanted)
        put(first.clone())
        assert torch.equal(packed.numbers("delta"), wanted)


def test_what_was_unpacked_under_inference_mode_serves_training_too():
    """Autograd keeps it for what learns beside, such as the embeddings."""
    plain, packed = both("elements", "exact")
    with torch.inference_mode():
        packed.numbers("delta")
    factor = torch.ones_like(plain.delta, requires_grad=True)
    (factor * packed.numbers("delta")).sum().backward()
    assert torch.equal(factor.grad, plain.delta)


def test_inference_tensors_have_no_version_and_are_unpacked_each_time():
    plain, packed = both("elements", "int8")
    with torch.inference_mode():
        packed.packed = packed.packed.clone()
        assert_equal(plain, packed)
    assert torch.equal(plain.dense(), packed.dense())


@pytest.mark.parametrize("first_eager", [True, False])
@pytest.mark.parametrize("kind", ["rows", "elements", "all_but"])
def test_compiled_without_a_break(kind, first_eager):
    """Whether or not it was unpacked before, and after a load."""
    torch._dynamo.reset()
    plain, packed = both(kind, "int8", torch.bfloat16)
    plain.cast(torch.bfloat16)
    packed.cast(torch.bfloat16)
    if first_eager:
        packed.dense()
    run = torch.compile(lambda delta: [part.numbers * 2 for part in delta.parts()], fullgraph=True, backend="eager")
    for _ in range(2):
        for wanted, got in zip(plain.parts(), run(packed), strict=True):
            assert torch.equal(got, wanted.numbers * 2)
        packed.load_state_dict(packed.state_dict())


@pytest.mark.parametrize("values", VALUES)
def test_the_operator_tells_a_graph_what_it_gives(values):
    _, packed = both("elements", values)
    text = packed.packing.to_text()
    for name in ("delta", "held", "delta_codes", "held_codes"):
        torch.library.opcheck(torch.ops.peft_isolate.unpacked, (packed.packed, text, name, torch.float32))


def test_a_placeholder_is_an_error_and_not_zeros():
    plain, packed = both("elements", "bf16")
    empty = make_delta(*packed.places.values(), torch.empty(0), packing=packed.packing)
    for use in (empty.dense, empty.selection, lambda: list(empty.parts()), lambda: empty.check_state(empty.state)):
        with pytest.raises(FormatError, match="never loaded"):
            use()
    empty.copy_state(packed)
    assert_equal(plain, empty)


def test_positions_that_are_none_are_refused_beside_a_right_checksum():
    """Before anything is loaded, and where nobody looked before, when they are used."""
    _, packed = both("elements", "bf16", zstd=False)
    packed.check_state(packed.state)
    data = packed.packed.numpy().copy()
    data[1 + LENGTH : 1 + LENGTH + packed.packing.parts[0].code_bytes] = 0
    forged = signed(data)
    with pytest.raises(FormatError, match="nothing but zeros"):
        packed.check_state({"packed": forged})
    packed.packed = forged
    with pytest.raises(FormatError, match="nothing but zeros"):
        packed.dense()


def test_it_is_for_inference_only():
    _, packed = both("elements", "bf16")
    for use in (lambda: packed.fill(torch.zeros(6, 8)), lambda: packed.reset(Selection.whole((6, 8)))):
        with pytest.raises(IsolateError, match="packed adapters are for inference: unpack it with"):
            use()


def test_on_the_meta_device_its_numbers_are_meta():
    """As a plain delta's: composing with them is refused by name."""
    plain, packed = both("elements", "bf16")
    plain.to("meta")
    packed.to("meta")
    assert packed.numbers("delta").is_meta
    assert packed.numbers("delta").shape == plain.delta.shape
    for use in (packed.dense, packed.selection, lambda: list(packed.parts())):
        with pytest.raises(IsolateError, match="offloaded or were never loaded"):
            use()
    like = torch.empty(0, device="meta")
    assert make_delta(*packed.places.values(), like, packing=packed.packing).packed.device.type == "cpu"


def test_every_value_says_what_it_may_be():
    assert set(KINDS_OF) == set(VALUES)
