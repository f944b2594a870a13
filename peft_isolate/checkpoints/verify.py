"""`verify`: what can be told of an adapter before it is used, and of a checkpoint that claims to be base and adapter.

**What is noticed.** Another base, as far as its fingerprint can tell. NaN and infinity. A file that holds another
region than its config. Positions out of range, twice, or both in what learns and in what is held. Any damaged byte of
a packed delta, by its CRC-32; of an exact difference and of its base, by the SHA-256 of each file that comes of both.

**What is not.** A number of a plain adapter that was altered to another finite one, and positions that were altered to
as many other ones: nothing stands there to tell them by. Nor does a checksum stop who alters it too, for it is no
signature.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..deltas.base import SKIP_BASE_CHECK
from ..deltas.delta import HELD, TRAINED, Delta, all_finite
from ..deltas.support import write
from ..errors import BaseMismatchError, FormatError, IsolateError, RegionError
from ..regions.fingerprint import DTYPES as FLOATING
from ..regions.fingerprint import as_bytes
from ..regions.stored import StoredSelection
from .adapter import PREFIX, TOKENS, Adapter
from .architecture import folder_of
from .exact import bases_entry, check_base, file_of, header_of, is_exact, open_exact, tensors_of
from .grid import bits
from .memory import Checkpoint, Group
from .merge import Plan
from .progress import progress
from .shards import DTYPES, INDEX, Entry, Shards

# Scalars compared at a time.
CHUNK = 2**22
ALTERED = "it was altered, get it again from where it came"


class Check(NamedTuple):
    """Something that was looked at, and is as it should be.

    Attributes:
        name: What was asked: "base", "file", "numbers", "indices", "unaltered", "outside", "inside", …
        found: What was looked at, with counts.
    """

    name: str
    found: str

    def __str__(self) -> str:
        return f"{self.name}: {self.found}"


class Verified(NamedTuple):
    """What `verify` looked at; `str()` prints a line each.

    Attributes:
        checks: In the order of the lines.
    """

    checks: tuple[Check, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


def verify(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    merged: str | os.PathLike[str] | None = None,
    revision: str | None = None,
) -> Verified:
    """Check an adapter: right base? finite? indices sound? unaltered? The module says what cannot be told.

    With `merged`, a checkpoint that claims to be the base with this adapter: it must have the base's parameters and
    buffers in their dtypes and shapes and no others, the base's bits wherever the adapter does not act, and what
    `merge` gives wherever it does. Files beside the weights are not compared. Of an exact difference it must have the
    tuned checkpoint's tensors, bit for bit, and the files beside them that the difference knows.

    One tensor is in memory at a time, in up to four copies.

    Args:
        base: Folder or Hub id.
        adapter: An adapter or an exact difference, likewise.
        merged: Likewise.
        revision: Of the base on the Hub.

    Raises:
        BaseMismatchError: The base is another one.
        RegionError: The adapter is another model's; or `merged` has another bit than the base outside the region.
        FormatError: A file is damaged, was altered, or holds NaN or infinity.
        IsolateError: `merged` is not what merging gives: the message names the first tensor, position and both values.

    Example:
        >>> print(verify("base", "adapter"))  # doctest: +SKIP
        base: 291 of 291 tensors have the samples of the adapter's fingerprint
        file: the 112 deltas of the config's region, and nothing else
        numbers: 3,238,002,688 of the deltas, finite
        indices: 112 selections sorted, in range and without repeats; 0 of them codes of single positions
        unaltered: nothing in the file tells of a number that was altered to another finite one
    """
    if is_exact(folder_of(adapter)):
        return Verified(tuple(_of_exact(base, adapter, merged, revision)))
    opened = Adapter(adapter)
    checkpoint = Checkpoint(base, opened.class_name, revision)
    plan = Plan(checkpoint, [opened], [1.0], to_write=merged is not None)
    checks = [_right_base(opened, checkpoint), _whole_file(opened, plan), *_sound(opened, plan)]
    if merged is not None:
        checks += _merged(plan, Checkpoint(merged, opened.class_name))
    return Verified(tuple(checks))


def first_difference(left: torch.Tensor, right: torch.Tensor, where: torch.Tensor | None = None) -> int | None:
    """The first flat position at which two tensors of one dtype and shape differ in a bit; None if at none.

    Args:
        left: Any dtype and shape.
        right: Likewise.
        where: bool, of this shape: the others are not compared.
    """
    a, b = bits(left), bits(right)
    among = None if where is None else where.reshape(-1)
    for start in range(0, a.numel(), CHUNK):
        chunk = slice(start, start + CHUNK)
        differs = a[chunk] != b[chunk]
        if among is not None:
            differs &= among[chunk]
        if differs.any():
            return start + int(differs.view(torch.uint8).argmax())
    return None


def _right_base(adapter: Adapter, checkpoint: Checkpoint) -> Check:
    compared = adapter.check_base(checkpoint)
    total = sum(1 for _ in checkpoint)
    if compared is None:
        return Check("base", f"not compared: no fingerprint in the adapter's config, or {SKIP_BASE_CHECK} is set")
    _check_any(compared, total, checkpoint.name)
    return Check("base", f"{compared} of {total} tensors have the samples of the adapter's fingerprint")


def _check_any(compared: int, total: int, base: str) -> None:
    if total and not compared:
        raise BaseMismatchError(
            f"of the {total} tensors of {base!r} the adapter's fingerprint has none: it was made with another model, "
            "or its config was altered; take the base that it names"
        )


def _whole_file(adapter: Adapter, plan: Plan) -> Check:
    """What `Plan` did not refuse is the region, and what was trained beside it; of the latter, whatever is left."""
    named = {f"{PREFIX}{name.removesuffix('.weight')}{TOKENS}" for name in plan.tokens}
    if stray := sorted(key for key in adapter.keys if key.endswith(TOKENS) and key not in named):
        raise FormatError(
            f"the file of {adapter.name!r} holds {stray[0]!r}, which its config does not name: one of the two was "
            "altered"
        )
    beside = len(plan.replaced) + len(plan.tokens)
    more = f"{beside} tensors trained beside it, and nothing else" if beside else "and nothing else"
    return Check("file", f"the {len(plan.supports[0])} deltas of the config's region, {more}")


def _sound(adapter: Adapter, plan: Plan) -> Iterator[Check]:
    """Every delta, one at a time."""
    numbers = selections = codes = positions = 0
    for name in progress(sorted(plan.supports[0]), "verify"):
        delta = _delta(adapter, name)
        for place in delta.places.values():
            numbers += place.count
            selections += 1
            if isinstance(place, StoredSelection):
                codes, positions = codes + 1, positions + place.codes.count
        if both := (delta.selection(TRAINED) & delta.selection(HELD)).count:
            raise FormatError(
                f"{both:,} scalars of {name!r} are in what {adapter.name!r} trained and in what it held, where the "
                "two share none: its config or its file was altered; get both again from where they came"
            )
    beside = sum(tensor.numel() for tensor in (*plan.replaced.values(), *(t for _, t in plan.tokens.values())))
    more = f", and {beside:,} beside them" if beside else ""
    yield Check("numbers", f"{numbers:,} of the deltas{more}, finite")
    yield Check(
        "indices",
        f"{selections} selections sorted, in range and without repeats; {codes} of them codes of single positions"
        + (f", {positions:,} in all" if codes else ""),
    )
    if adapter.config.packed is not None:
        yield Check("unaltered", f"{len(plan.supports[0])} packed deltas have their CRC-32")
    else:
        yield Check("unaltered", "nothing in the file tells of a number that was altered to another finite one")


def _delta(adapter: Adapter, name: str) -> Delta:
    try:
        return adapter.delta(name)
    except FormatError as error:
        raise FormatError(f"{name!r} of {adapter.name!r}: {error}") from error


def _merged(plan: Plan, theirs: Checkpoint) -> Iterator[Check]:
    """The merged checkpoint against the base, and against what `merge` would write."""
    ours, merged = plan.checkpoint, theirs.name
    _same_names([*ours, *ours.unused], [*theirs, *theirs.unused], merged)
    groups: dict[int, tuple[Group, list[str]]] = {}
    for name in ours:
        group = ours.group_of(name)
        groups.setdefault(id(group), (group, []))[1].append(name)
    touched = {id(group) for group in plan.groups}
    outside, inside, wrong_inside = 0, 0, ""  # what is wrong outside is said first, wherever it is
    for key, (group, names) in progress(groups.items(), "compare"):
        before = wanted = ours.read_group(group)
        if key in touched:
            # Merging writes to what was read.
            before = {name: tensor.clone() for name, tensor in before.items()}
            wanted = plan.merged(group)
        for name in names:
            stored, found = ours.stored_name(name), theirs.read(name)
            _same_kind(name, found, before[stored], merged)
            support = _support(plan, stored, before[stored].shape) if key in touched else None
            _same_bits(name, found, before[stored], merged, None if support is None else ~support)
            if support is not None and (at := first_difference(found, wanted[stored], support)) is not None:
                message = _differs(name, at, found, wanted[stored], merged, "merging the adapter gives")
                wrong_inside = wrong_inside or message
            here = 0 if support is None else int(support.count_nonzero())
            inside, outside = inside + here, outside + found.numel() - here
    for name in ours.unused:
        found, tensor = theirs.shards.read(name), ours.shards.read(name)
        _same_kind(name, found, tensor, merged)
        _same_bits(name, found, tensor, merged)
        outside += tensor.numel()
    if wrong_inside:
        raise IsolateError(wrong_inside)
    n_tensors = sum(len(names) for _, names in groups.values()) + len(ours.unused)
    yield Check("outside", f"{outside:,} scalars of {n_tensors} tensors have the base's bits")
    yield Check("inside", f"{inside:,} scalars of {len(plan.touched)} tensors have the bits that merging gives")


def _support(plan: Plan, stored: str, shape: torch.Size) -> torch.Tensor:
    """bool, of the shape of a parameter by the name that the disk has of it: where the adapter acts."""
    inside = torch.zeros(shape, dtype=torch.bool)
    for name in plan.touched:
        if plan.checkpoint.stored_name(name) != stored:
            continue
        if name in plan.replaced:
            inside.fill_(True)
        if name in plan.tokens:
            inside[plan.tokens[name][0]] = True
        for (adapter, _), support in zip(plan.adapters, plan.supports, strict=True):
            for part in adapter.delta(name).parts() if name in support else ():
                write(inside, part.support, part.at, torch.ones((), dtype=torch.bool).expand(part.numbers.shape))
    return inside


def _same_names(ours: list[str], theirs: list[str], merged: str) -> None:
    there = set(theirs)
    if lacking := [name for name in ours if name not in there]:
        raise IsolateError(f"{merged!r} lacks {lacking[0]!r}: it is another model, or its download is incomplete")
    wanted = set(ours)
    if more := [name for name in theirs if name not in wanted]:
        raise IsolateError(f"{merged!r} has {more[0]!r}, which it should not: it is another model, or was altered")


def _same_kind(name: str, found: torch.Tensor, wanted: torch.Tensor, merged: str) -> None:
    kinds = [(tensor.dtype, tuple(tensor.shape)) for tensor in (found, wanted)]
    if kinds[0] != kinds[1]:
        raise IsolateError(
            f"{name!r} of {merged!r} is {kinds[0][0]} {kinds[0][1]} and should be {kinds[1][0]} {kinds[1][1]}: merge "
            "in the base's dtype"
        )


def _same_bits(
    name: str, found: torch.Tensor, base: torch.Tensor, merged: str, where: torch.Tensor | None = None
) -> None:
    if (at := first_difference(found, base, where)) is not None:
        raise RegionError(_differs(name, at, found, base, merged, "outside the adapter's region the base has"))


def _differs(name: str, at: int, found: torch.Tensor, wanted: torch.Tensor, merged: str, who: str) -> str:
    return (
        f"{name!r} of {merged!r} has {_shown(found, at)} at flat position {at:,}, where {who} "
        f"{_shown(wanted, at)}: it was made of another base or adapter, or was altered; merge anew"
    )


def _shown(tensor: torch.Tensor, at: int) -> str:
    """A scalar and its bits, which tell NaN from NaN."""
    size = tensor.element_size()
    pattern = int(bits(tensor)[at]) % 2 ** (8 * size)
    return f"{tensor.reshape(-1)[at].item()!r} (0x{pattern:0{2 * size}x})"


def _of_exact(
    base: str | os.PathLike[str],
    exact: str | os.PathLike[str],
    merged: str | os.PathLike[str] | None,
    revision: str | None,
) -> Iterator[Check]:
    """The checks of an exact difference, which speaks of tensors as the disk names them."""
    ours = Shards(folder_of(base, revision))
    file, about = open_exact(exact)
    compared, total = check_base(ours, about), sum(DTYPES[entry.dtype] in FLOATING for entry in ours.values())
    _check_any(compared, total, os.fspath(base))
    yield Check("base", f"{compared} of {total} tensors have the samples of the difference's fingerprint")
    entries, changed, codes = _exact_tensors(ours, file, about)
    whole = len(changed) - codes
    yield Check("file", f"{len(entries)} tensors, of which {codes} as codes and {whole} whole, and nothing else")
    infinite = []
    for shard in about["headers"]:
        text = header_of(file, about, shard)[1]
        digest = hashlib.sha256(struct.pack("<Q", len(text)) + text)
        for name, tensor in _tuned(ours, file, about, shard, changed):
            digest.update(as_bytes(tensor))
            if name in changed and tensor.dtype in FLOATING and not all_finite(tensor):
                infinite.append(name)
        if digest.hexdigest() != about["digests"][shard]:
            raise BaseMismatchError(
                f"{shard!r} comes out otherwise than it was: {os.fspath(base)!r} is another base than the "
                "difference's, in a tensor that the tuning left alone"
            )
    some = f"all but {len(infinite)}, {infinite[0]!r} the first, as they were tuned" if infinite else "all"
    yield Check("numbers", f"of the {len(changed)} tensors that are not the base's {some} finite")
    beside = {name: file_of(ours, file, set(file.keys()), name, said) for name, said in about["files"].items()}
    yield Check(
        "unaltered",
        f"{len(file.keys())} stored tensors have their CRC-32, {len(about['headers'])} files of weights and "
        f"{len(beside)} beside them come out with their SHA-256",
    )
    if merged is None:
        return
    theirs = Shards(folder_of(merged))
    _same_names(list(entries), list(theirs), str(theirs.folder))
    for shard in about["headers"]:
        for name, tensor in _tuned(ours, file, about, shard, changed):
            found = theirs.read(name)
            _same_kind(name, found, tensor, str(theirs.folder))
            if (at := first_difference(found, tensor)) is not None:
                raise IsolateError(_differs(name, at, found, tensor, str(theirs.folder), "the difference gives"))
    for relative, data in beside.items():
        path = theirs.folder / relative
        if relative != INDEX and not (path.is_file() and path.read_bytes() == data):
            raise IsolateError(f"{relative!r} of {str(theirs.folder)!r} is not what the difference gives: merge anew")
    yield Check("merged", f"{len(entries)} tensors are the tuned checkpoint's, bit for bit, and the files beside them")


def _tuned(
    ours: Shards, file: Any, about: dict[str, Any], shard: str, changed: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of one of the tuned checkpoint's files, in the order of its bytes."""
    given = tensors_of(ours, file, {"headers": {shard: about["headers"][shard]}})
    for name in progress(list(header_of(file, about, shard)[0]), "verify"):
        yield next(given) if name in changed else (name, ours.read(name))


def _exact_tensors(ours: Shards, file: Any, about: dict[str, Any]) -> tuple[dict[str, Entry], set[str], int]:
    """({name: what it shall be}, names of those that are not the base's, codes among these)."""
    entries: dict[str, Entry] = {}
    for shard in about["headers"]:
        for name, entry in header_of(file, about, shard)[0].items():
            if name in entries:
                raise FormatError(f"{name!r} stands in {entries[name].file!r} and in {shard!r}: {ALTERED}")
            entries[name] = entry
    keys = set(file.keys())
    known = {f"header/{shard}" for shard in about["headers"]} | {f"file/{relative}" for relative in about["files"]}
    codes = {name for name in entries if f"code/{name}" in keys}
    whole = {name for name in entries if f"tensor/{name}" in keys}
    known |= {f"code/{name}" for name in codes} | {f"tensor/{name}" for name in whole}
    if stray := sorted(keys - known):
        raise FormatError(f"the difference holds {stray[0]!r}, which belongs to no tensor and no file: {ALTERED}")
    if both := sorted(codes & whole):
        raise FormatError(f"the difference has {both[0]!r} both as a code and whole: {ALTERED}")
    for name in entries.keys() - codes - whole:
        bases_entry(ours, name, entries[name])
    return entries, codes | whole, len(codes)
