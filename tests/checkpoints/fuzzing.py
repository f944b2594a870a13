"""The decoders of what comes from strangers, each with sound files, a way to alter them, and an oracle.

A `Target` answers one altered file: True where the decoder gave the right answer, False where it refused by an error
of this library. Everything else is a finding: an `AssertionError` where the answer is wrong, any other exception, more
than `SECONDS`, or more memory than `bounded_memory` leaves.
"""

from __future__ import annotations

import atexit
import base64
import functools
import json
import os
import resource
import shutil
import signal
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from peft_isolate import HalfFTConfig
from peft_isolate.checkpoints import grid
from peft_isolate.checkpoints.shards import entries_of
from peft_isolate.checkpoints.small_numbers import Reader, read_list, write_list
from peft_isolate.deltas import packed
from peft_isolate.deltas.packed import Packing, pack, unpack
from peft_isolate.errors import FormatError, IsolateError
from peft_isolate.regions import codes, fingerprint, frames
from peft_isolate.regions.selection import Selection
from peft_isolate.regions.stored import StoredSelection, storable
from tests.checkpoints.alterations import Script, altered, altered_json, altered_text
from tests.regions.test_codes import slow_decode

SECONDS = 5
LARGEST = 2**34  # of a tensor, where the encoder can follow
MEMORY = 2**29  # beyond what the process has: the files of these tests are of a few KiB
COUNTS: Counter[tuple[str, bool]] = Counter()
"""{(target, whether it was answered): altered files}."""


@dataclass(frozen=True)
class Target:
    """A decoder.

    Attributes:
        name: Of the decoder.
        judge: Given a script, alters one of its files, decodes that, and raises `AssertionError` where the answer is
            not the right one.
    """

    name: str
    judge: Callable[[Script], None]

    def __call__(self, script: Script) -> bool:
        """Whether an altered file was answered; not later than after `SECONDS`."""
        with _in_time():
            return self.decode(script)

    def decode(self, script: Script) -> bool:
        """Whether an altered file was answered, however long it takes."""
        try:
            self.judge(script)
            answered = True
        except IsolateError:
            answered = False
        COUNTS[self.name, answered] += 1
        return answered


@contextmanager
def _in_time() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded_memory(beyond: int = MEMORY) -> Iterator[None]:
    """Within, the process gets no more than so many bytes of address space beyond what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + beyond, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@functools.cache
def scratch() -> Path:
    """A folder for files that are rewritten all the time, in memory where there is such a place."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzzing-", dir=shared if os.access(shared, os.W_OK) else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def pick(script: Script, choices: Any) -> Any:
    """One of a list, by the script's first number."""
    return choices[(script[0][0] >> 8) % len(choices)] if script else choices[0]


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether dtype, shape and all bits are."""
    as_bytes = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(*as_bytes)


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def _codes() -> list[tuple[bytes, str, int, int]]:
    found = []
    formats = {(300, 40): None, (5000, 50): None, (64, 60): "gap1", (400, 20): "gap3", (900, 9): "gap14"}
    for seed, ((numel, count), format) in enumerate({**formats, (2**33, 30): "gap32"}.items()):
        positions = torch.randint(numel, (count,), generator=_random(seed)).unique().numpy()
        code, layout = codes.encode(positions, numel, format)
        found.append((code.tobytes(), layout, len(positions), numel))
    return found


def _judge_codes(script: Script) -> None:
    """Bytes are a code in at most one way: what decodes is what encodes to them, and what the slow twin reads."""
    code, format, count, numel = pick(script, _codes())
    facts = [format, count, numel]
    if script and script[0][2] % 4 == 3:
        facts = altered_json(facts, script[:1])
        script = script[1:]
    if not isinstance(facts, list) or len(facts) != 3 or type(facts[2]) is not int or not 0 <= facts[2] <= 2**62:
        return  # a tensor's own size is known, not read
    data = np.frombuffer(altered(code, script), np.uint8)
    try:
        positions = codes.decode(data, *facts)
    except FormatError:
        with _refused():
            codes.check(data, *facts)
        raise
    with taken():
        codes.check(data, *facts)
        assert positions.shape == (facts[1],)
        assert not positions.size or (positions[0] >= 0 and positions[-1] < facts[2])
        if facts[2] <= LARGEST:
            assert codes.encode(positions, facts[2], facts[0])[0].tobytes() == data.tobytes()
    if data.size < 64:
        assert slow_decode(data.tobytes(), codes.FORMATS[facts[0]]) == positions.tolist()


@contextmanager
def taken() -> Iterator[None]:
    """Within, this library's errors are findings: the file was taken already."""
    try:
        yield
    except IsolateError as error:
        raise AssertionError(f"what was taken is refused by another: {error}") from error


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except FormatError:
        return
    raise AssertionError("one function refuses what its twin takes")


@functools.cache
def _frames() -> list[tuple[bytes, int]]:
    noise = torch.randint(6, (3000,), generator=_random(0), dtype=torch.uint8).numpy()
    contents = [bytes(100_000), noise, b"abc" * 400, b"x", noise[:200], b""]
    return [(frames.compress(content), len(content)) for content in contents]


def _judge_frames(script: Script) -> None:
    """A frame of one's own has no checksum: what comes out has the known size, and is what zstd's stream reads."""
    frame, size = pick(script, _frames())
    data = altered(frame, script)
    found = frames.decompress(data, size)
    assert found.shape == (size,)
    stream = zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()
    assert found.tobytes() == (stream.decompress(data) if size else b"")


@functools.cache
def _lists() -> list[tuple[bytes, int, np.dtype[Any]]]:
    found = []
    tops = {(500, 3): np.uint8, (3000, 60): np.uint16, (2000, 2**20): np.uint32, (700, 2**50): np.uint64}
    for seed, ((count, top), dtype) in enumerate({**tops, (6000, 1): np.uint8}.items()):
        numbers = torch.randint(top + 1, (count,), generator=_random(seed)).numpy().astype(dtype)
        numbers[: count - count // 20] //= dtype(max(1, top // 2))
        out = bytearray()
        write_list(out, numbers)
        found.append((bytes(out), count, np.dtype(dtype)))
    return found


def _judge_lists(script: Script) -> None:
    """Lists carry no checksum: as many numbers, which can be written and read again."""
    data, count, dtype = pick(script, _lists())
    numbers = read_list(Reader(np.frombuffer(altered(data, script), np.uint8)), count, dtype)
    assert (numbers.dtype, numbers.shape) == (dtype, (count,))
    again = bytearray()
    write_list(again, numbers)
    with taken():
        assert np.array_equal(read_list(Reader(np.frombuffer(again, np.uint8)), count, dtype), numbers)


@functools.cache
def _grids() -> list[tuple[bytes, torch.Tensor, torch.Tensor]]:
    found = []
    for seed, dtype in enumerate(
        (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.int64, torch.uint8)
    ):
        for share in (0.02, 1.0):
            base = torch.randn(1500, generator=_random(seed)) * 50
            moves = 0.1 * base * torch.rand(1500, generator=_random(seed + 100))
            moves[torch.rand(1500, generator=_random(seed + 200)) > share] = 0
            base, tuned = ((t.abs() if dtype == torch.uint8 else t).to(dtype) for t in (base, base + moves))
            if (code := grid.encode(base, tuned)) is not None:
                found.append((code, base, tuned))
    return found


def _judge_grid(script: Script) -> None:
    """A code carries the checksum of what it gives: altered it gives that, or nothing."""
    code, base, tuned = pick(script, _grids())
    assert same(grid.decode(altered(code, script), base), tuned)


@functools.cache
def _packings() -> list[tuple[bytes, Packing, dict[str, torch.Tensor]]]:
    found = []
    for seed, values in enumerate(packed.VALUES * 2):
        generator = _random(seed)
        shape = (12, 600 if seed % 2 else 20)
        positions = torch.randint(shape[0] * shape[1], (50,), generator=generator).unique()
        kinds = [Selection.whole(shape), Selection.elements(shape, positions), Selection.rows(shape, [1, 2, 7])]
        trained, held = kinds[seed % 3], kinds[(seed + 1) % 3]
        places = {"delta": storable(trained)} | ({"held": storable(held)} if seed > 2 else {})
        numbers = {
            name: torch.randn(packed.PackedPart.of(name, place).shape, generator=generator)
            for name, place in places.items()
        }
        buffer, places = pack(numbers, places, values)
        packing = Packing.of(values, buffer.numel(), places)
        found.append((buffer.numpy().tobytes(), packing, unpack(buffer, packing)))
    return found


def _judge_packed(script: Script) -> None:
    """Altered by accident it is refused by its checksum; with a right one it is what its config says, and finite."""
    buffer, packing, content = pick(script, _packings())
    data, signed = altered(buffer[:-4], script), bool(script) and script[0][1] % 4 > 0
    if signed:
        data = data[: len(buffer) - 4].ljust(len(buffer) - 4, b"\0")
        data += zlib.crc32(data).to_bytes(4, "little")
    else:
        data = altered(buffer, script)
    given = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
    found = unpack(given, packing)
    if not signed:
        assert found.keys() == content.keys()
        assert all(same(found[name], content[name]) for name in found)
    for part in packing.parts:
        assert found[part.name].shape == part.shape
        assert bool(torch.isfinite(found[part.name]).all())
        assert part.code_bytes is None or found[f"{part.name}_codes"].shape == (part.code_bytes,)


@functools.cache
def _base() -> tuple[str, list[tuple[str, torch.Tensor]]]:
    tensors = [
        (f"t{i}.weight", torch.randn(5, 7, generator=_random(i)).to(dtype))
        for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16, torch.float64] * 3)
    ]
    return fingerprint.fingerprint(tensors), tensors


def _judge_fingerprint(script: Script) -> None:
    """An altered one is refused or is another base's; where it still passes, so many tensors were compared."""
    text, tensors = _base()
    if script and script[0][1] % 2:
        data = altered(zlib.decompress(base64.b85decode(text)), script)
        text = base64.b85encode(zlib.compress(data)).decode()
        assert 0 <= fingerprint.compare(text, tensors) <= len(tensors)
    else:
        text = altered(text.encode(), script).decode("latin-1")
        assert fingerprint.compare(text, tensors) == len(tensors)


SHAPES = {"a.weight": (6, 10), "b.weight": (3, 4, 5), "c.bias": (9,), "d.weight": (16, 16)}


@functools.cache
def _record() -> dict[str, Any]:
    selections = {
        "a.weight": Selection.rows((6, 10), [0, 1, 4]),
        "b.weight": Selection.columns((3, 4, 5), [1, 3]),
        "c.bias": Selection.whole((9,)),
        "d.weight": Selection.elements((16, 16), [3, 7, 200]),
    }
    region = {name: storable(selection).to_dict() for name, selection in selections.items()}
    held = {"d.weight": storable(Selection.all_but((16, 16), [3, 7, 200])).to_dict()}
    masks = {"a.weight": {"axis": "rows", "damps": "update", "count": 3}}
    return {"chosen_by": {}, "layers": "x", "base": None, "region": region, "held": held, "masks": masks}


def _judge_record(script: Script) -> None:
    """What a config may say of a region: it fits the model's shapes, and names the rows or columns it says."""
    record = altered_json(_record(), script)
    resolved = HalfFTConfig(resolved=record).recorded(SHAPES)
    for part, places in (("region", resolved.trained), ("held", resolved.held)):
        assert places.keys() == record.get(part, {}).keys()
        for name, place in places.items():
            entry = record[part][name]
            assert place.shape == SHAPES[name] == tuple(entry["shape"])
            if isinstance(place, StoredSelection):
                assert (place.kind, place.codes.count) == (entry["kind"], entry["count"])
                assert place.codes.code_bytes <= 5 * place.numel + 32
            elif entry["kind"] != "whole":
                runs = [range(a + c * k, a + c * k + b) for a, b, c, n in entry["strides"] for k in range(n)]
                units = sorted(unit for run in runs for unit in run)
                with taken():
                    assert place == getattr(Selection, entry["kind"])(place.shape, units)
    for name, mask in resolved.masks.items():
        assert mask.count == record["masks"][name]["count"] <= max(SHAPES[name])


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    "c": {"dtype": "U8", "shape": [0, 5], "data_offsets": [26, 26]},
    "d": {"dtype": "I64", "shape": [4], "data_offsets": [26, 58]},
}


def _judge_header(script: Script) -> None:
    """A header that comes out of a frame, which no library has looked at: its tensors follow one another."""
    text = altered_text(HEADER, script)
    at = 8 + len(text)
    for name, entry in entries_of(text, "x.safetensors").items():
        start, stop = json.loads(text)[name]["data_offsets"]
        assert (entry.start, entry.start + entry.n_bytes) == (8 + len(text) + start, 8 + len(text) + stop)
        assert entry.start == at
        at += entry.n_bytes


IN_MEMORY = tuple(
    Target(judge.__name__.removeprefix("_judge_"), judge)
    for judge in (
        _judge_codes, _judge_frames, _judge_lists, _judge_grid, _judge_packed, _judge_fingerprint, _judge_record,
        _judge_header,
    )
)  # fmt: skip
