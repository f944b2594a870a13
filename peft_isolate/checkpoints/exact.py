"""An exact difference: from the base's files and it, the tuned checkpoint's files come back, to the byte.

Unlike an adapter it is no delta that a model could add: it holds each changed tensor's steps on the grid of its own
dtype (see `grid`), and speaks of tensors as they are named on the disk. What did not change costs its name.

**Format** `peft_isolate.exact/1`: one file `exact_delta.safetensors`, whose metadata are `format`, `about`, JSON:
`{"base": the fingerprint of the base's floating tensors as they lie on the disk, "base_name", "headers": {file:
bytes}, "digests": {file: the SHA-256 of the whole safetensors file}, "files": {relative path: {"bytes", "sha256"}},
"checksums": {tensor: the CRC-32 of its bytes}}`, and `checksum`, the CRC-32 of `about`'s UTF-8, in decimal. Its
tensors, by the beginning of their names:

- `header/<file>`: the zstd frame of the header of each of the tuned checkpoint's safetensors files (without its
  length), of the stated number of bytes. Its tensors, in the order of the data, MUST follow one another without gaps.
- `code/<name>`: the code (`grid.encode`) of a tensor that the base has in this dtype and shape, and that differs.
- `tensor/<name>`: a tensor that the base does not have, or has in another dtype or shape, as it is.
- `file/<relative path>`: the zstd frame of a file beside the weights that the base does not have, or has otherwise.

A tensor of a header that has neither code nor tensor is the base's own, and a file of `files` that has no frame is. A
reader MUST refuse a path that leaves the folder, a frame of a program (`NOT_CARRIED`) or of other weights, a tensor
that has no checksum or nothing to be used for, and whatever is not of its checksum or SHA-256: of a base that differs
where the tuning changed nothing, only that of the whole file tells.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import BaseMismatchError, FormatError
from ..regions.files import read_tensors, write_folder
from ..regions.fingerprint import DTYPES as FINGERPRINTED
from ..regions.fingerprint import as_bytes, compare, fingerprint
from ..regions.frames import compress, decompress
from . import grid
from .architecture import folder_of
from .progress import progress
from .shards import (
    DTYPES,
    WEIGHTS,
    Digested,
    Entry,
    Shards,
    Spool,
    TensorFile,
    copy_bytes,
    entries_of,
    read_header_text,
)  # fmt: skip

FORMAT = "peft_isolate.exact/1"
FILE = "exact_delta.safetensors"
LARGEST_HEADER = 100_000_000  # safetensors reads no larger one
# Code is not carried: a difference is numbers, and nobody who takes one expects it to bring programs.
NOT_CARRIED = (
    ".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1", ".pkl", ".pickle",
    ".joblib",
)  # fmt: skip
# Of what a file can be called everywhere, in bytes; and how long a path may be inside a folder.
LONGEST_NAME, LONGEST_PATH = 255, 1000


class Exact(NamedTuple):
    """What `write_exact` found.

    Attributes:
        changed: Names of tensors that differ.
        carried: Names of tensors that the base does not have like this.
        gone: Names of the base's tensors that the tuned checkpoint lacks.
        n_changed: Scalars that differ, of the tensors that both have.
        n_bytes: Of the difference.
        tuned_bytes: Of the tuned checkpoint's tensors.
        left_out: Files that are not carried.
    """

    changed: list[str]
    carried: list[str]
    gone: list[str]
    n_changed: int
    n_bytes: int
    tuned_bytes: int
    left_out: list[str]


def is_exact(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder, or a repository on the Hub, holds an exact difference."""
    return (folder_of(folder) / FILE).is_file()


def write_exact(base: Shards, tuned: Shards, base_name: str, folder: Path) -> Exact:
    """Write the exact difference of two checkpoints into a folder, a tensor at a time."""
    spool = Spool(folder / FILE)
    about: dict[str, Any] = {
        "base": _fingerprint(base),
        "base_name": base_name,
        "headers": {},
        "digests": {},
        "files": {},
        "checksums": {},
    }
    changed, carried, n_changed = [], [], 0
    digests: dict[str, Any] = {}

    def add(name: str, tensor: torch.Tensor) -> None:
        about["checksums"][name] = _checksum(tensor)
        spool.add(name, tensor)

    for file in tuned.files:
        text = read_header_text(tuned.folder / file)
        about["headers"][file] = len(text)
        digests[file] = hashlib.sha256(struct.pack("<Q", len(text)) + text)
        add(f"header/{file}", _uint8(compress(text)))
    for name in progress(list(tuned), "extract"):
        theirs = tuned.read(name)
        digests[tuned[name].file].update(as_bytes(theirs))  # in the order of the bytes, as `Shards` has them
        if not _alike(base, name, tuned[name]):
            carried.append(name)
            add(f"tensor/{name}", theirs)
            continue
        ours = base.read(name)
        code = grid.encode(ours, theirs)
        if code is not None:
            changed.append(name)
            n_changed += count_different(ours, theirs)
            add(f"code/{name}", _uint8(code))
    about["digests"] = {file: digest.hexdigest() for file, digest in digests.items()}
    left_out = []
    for relative in tuned.others():
        data = (tuned.folder / relative).read_bytes()
        twin = base.folder / relative
        same = twin.is_file() and twin.read_bytes() == data
        if (relative.suffix.lower() in NOT_CARRIED and not same) or not _is_path(relative.as_posix()):
            left_out.append(relative.as_posix())
            continue
        about["files"][relative.as_posix()] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if not same:
            add(f"file/{relative.as_posix()}", _uint8(compress(data)))
    said = json.dumps(about)
    spool.close({"format": FORMAT, "about": said, "checksum": str(zlib.crc32(said.encode()))})
    gone = [name for name in base if name not in tuned]
    size = (folder / FILE).stat().st_size
    return Exact(changed, carried, gone, n_changed, size, tuned.n_bytes, left_out)


def rebuild(
    base: str | os.PathLike[str],
    exact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    revision: str | None = None,
) -> tuple[Path, int, int, int]:
    """Write the tuned checkpoint that an exact difference was made of.

    Returns:
        (the folder, tensors changed, scalars of these, bytes of all tensors).

    Raises:
        BaseMismatchError: The base is not the one that it was made with.
        FormatError: It is damaged. Nothing was written.
    """
    shards = Shards(folder_of(base, revision))
    file, about = open_exact(exact)
    check_base(shards, about)
    names = set(file.keys())
    with write_folder(out) as folder:
        scalars = total = 0
        for shard in about["headers"]:
            entries, text = header_of(file, about, shard)
            with open(folder / shard, "wb") as opened:
                target = Digested(opened)
                target.write(struct.pack("<Q", len(text)) + text)
                for name in progress(list(entries), f"merge {shard}"):
                    write_tensor(shards, file, names, name, entries[name], target)
            if target.sha256.hexdigest() != about["digests"][shard]:
                raise BaseMismatchError(
                    f"{shard!r} comes out otherwise than it was: this base is another one than the difference's, in a "
                    "tensor that the tuning left alone"
                )
            total += sum(entry.n_bytes for entry in entries.values())
            scalars += sum(torch.Size(e.shape).numel() for n, e in entries.items() if f"code/{n}" in names)
        for relative, said in about["files"].items():
            data = file_of(shards, file, names, relative, said)
            target_path = folder / relative
            target_path.parent.mkdir(parents=True, exist_ok=True)
            target_path.write_bytes(data)
    return Path(out), sum(name.startswith("code/") for name in names), scalars, total


def tensors_of(base: Shards, file: Any, about: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name on the disk, tensor) of all that an exact difference changes or carries."""
    names = set(file.keys())
    for shard in about["headers"]:
        entries, _ = header_of(file, about, shard)
        for name, entry in entries.items():
            if names & {f"code/{name}", f"tensor/{name}"}:
                yield name, _tensor(base, file, names, name, entry)


def open_exact(exact: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """(the open file, what it says of itself), checked as far as it can be without the base.

    Raises:
        FormatError: It is damaged, or a path in it leaves the folder.
    """
    path = folder_of(exact) / FILE
    with read_tensors(path, FORMAT, "exact difference") as (file, metadata):
        about = _about(metadata)
        if missing := [shard for shard in about["headers"] if f"header/{shard}" not in file.keys()]:  # noqa: SIM118
            raise FormatError(f"the header of {missing[0]!r} is missing")
        if different := sorted(about["checksums"].keys() ^ set(file.keys())):
            raise FormatError(f"of {different[0]!r} it has a checksum or a tensor, not both")
        checked = _Checked(file, about["checksums"])
        there = {name for shard in about["headers"] for name in header_of(checked, about, shard)[0]}
        for name in about["checksums"]:
            kind, _, of = name.partition("/")
            known: Collection[str] = {"header": about["headers"], "file": about["files"]}.get(kind, there)
            if kind not in ("header", "file", "code", "tensor") or of not in known:
                raise FormatError(f"{name!r} is for nothing in it")
    # Again, outside: what is found wrong from now on is not all the file's fault.
    return _Checked(TensorFile(path), about["checksums"]), about


class _Checked:
    """The tensors of an exact difference, none of which is given out unless its checksum is right."""

    def __init__(self, file: Any, checksums: Mapping[str, int]) -> None:
        self._file, self._checksums = file, checksums

    def keys(self) -> list[str]:
        """The tensors' names."""
        return list(self._checksums)

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor, which may be mapped: do not write to it."""
        tensor: torch.Tensor = self._file.get_tensor(name)
        if _checksum(tensor) != self._checksums[name]:
            raise FormatError(f"{name!r} of an exact difference has another checksum: it was altered, get it again")
        return tensor


def check_base(base: Shards, about: dict[str, Any]) -> int:
    """Compare the base with the fingerprint. Returns the tensors compared; raises `BaseMismatchError`."""
    return compare(about["base"], _floating(base))


def write_tensor(base: Shards, file: Any, names: set[str], name: str, entry: Entry, target: Any) -> None:
    """Put the bytes of one tensor of the tuned checkpoint into an open file."""
    if names & {f"code/{name}", f"tensor/{name}"}:
        target.write(as_bytes(_tensor(base, file, names, name, entry)))
        return
    ours = bases_entry(base, name, entry)
    with open(base.folder / ours.file, "rb") as source:
        source.seek(ours.start)
        copy_bytes(source, target, ours.n_bytes)


def _tensor(base: Shards, file: Any, names: set[str], name: str, entry: Entry) -> torch.Tensor:
    if f"tensor/{name}" in names:
        tensor: torch.Tensor = file.get_tensor(f"tensor/{name}")
        if (tensor.dtype, tuple(tensor.shape)) != (DTYPES[entry.dtype], entry.shape):
            raise FormatError(f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}, its header says {entry[1:3]}")
        return tensor
    bases_entry(base, name, entry)
    code = file.get_tensor(f"code/{name}")
    try:
        return grid.decode(code.numpy(), base.read(name))
    except FormatError as error:
        raise FormatError(f"{name!r}: {error}") from error


def bases_entry(base: Shards, name: str, entry: Entry) -> Entry:
    if not _alike(base, name, entry):
        there = base[name][1:3] if name in base else "no such tensor"
        raise BaseMismatchError(
            f"{name!r} shall be the base's, of {entry[1:3]}, and this base has {there}: it is another one than the "
            "difference's"
        )
    return base[name]


def file_of(base: Shards, file: Any, names: set[str], relative: str, said: dict[str, Any]) -> bytes:
    if f"file/{relative}" in names:
        frame = file.get_tensor(f"file/{relative}").numpy()
        data = _unframed(frame, said["bytes"], relative)
    elif (base.folder / relative).is_file():
        data = (base.folder / relative).read_bytes()
    else:
        raise FormatError(f"{relative!r} shall be the base's, which does not have it")
    if hashlib.sha256(data).hexdigest() != said["sha256"]:
        raise FormatError(f"{relative!r} is not what it was: its SHA-256 is another")
    return data


def _about(metadata: dict[str, str]) -> dict[str, Any]:
    text = metadata["about"]
    if metadata["checksum"] != str(zlib.crc32(text.encode())):
        raise FormatError("what it says of itself has another checksum")
    about = json.loads(text)
    if not all(type(checksum) is int for checksum in about["checksums"].values()):
        raise FormatError("its checksums are no numbers")
    if not isinstance(about["base"], str) or not isinstance(about["headers"], dict):
        raise FormatError("it does not say what it is a difference to")
    for shard, size in about["headers"].items():
        _check_path(shard)
        if PurePosixPath(shard).name != shard or not shard.endswith(".safetensors"):
            raise FormatError(f"{shard!r} is no name of a safetensors file")
        if type(size) is not int or not 0 < size <= LARGEST_HEADER:
            raise FormatError(f"the header of {shard!r} has {size!r} bytes")
    for relative, said in about["files"].items():
        _check_path(relative)
        suffix = PurePosixPath(relative).suffix.lower()
        # A program that is the base's own goes with it.
        if suffix in WEIGHTS or (suffix in NOT_CARRIED and f"file/{relative}" in about["checksums"]):
            raise FormatError(f"{relative!r} is no file that is carried beside weights")
        if type(said["bytes"]) is not int or said["bytes"] < 0 or not isinstance(said["sha256"], str):
            raise FormatError(f"{relative!r} is described by {said!r}")
    if about["digests"].keys() != about["headers"].keys():
        raise FormatError("it does not say what the weights' files are")
    paths = {*about["headers"], *about["files"]}
    for path in paths:
        if inside := [str(folder) for folder in PurePosixPath(path).parents if str(folder) in paths]:
            raise FormatError(f"{inside[0]!r} is a file and the folder of {path!r}")
    return dict(about)


def _check_path(relative: Any) -> None:
    """Refuse what would leave the folder it is written to, on any system."""
    parts = PurePosixPath(relative).parts if isinstance(relative, str) else ()
    bad = not parts or relative.startswith("/") or any(sign in relative for sign in ("\\", ":", "\0"))
    if bad or any(part.startswith(".") for part in parts):
        raise FormatError(f"the path {relative!r} leaves the folder, or is hidden in it")
    if relative != "/".join(parts) or max(map(_name_bytes, parts)) > LONGEST_NAME or len(relative) > LONGEST_PATH:
        raise FormatError(f"no file has the path {relative[:100]!r}")


def _is_path(relative: str) -> bool:
    """Whether a reader would take it."""
    try:
        _check_path(relative)
    except ValueError:  # also of a name that is no UTF-8
        return False
    return True


def header_of(file: Any, about: dict[str, Any], shard: str) -> tuple[dict[str, Entry], bytes]:
    text = _unframed(file.get_tensor(f"header/{shard}").numpy(), about["headers"][shard], shard)
    return entries_of(text, shard), text


def _unframed(frame: np.ndarray, size: int, of: str) -> bytes:
    if size > max(2**20, 2**12 * frame.size):
        raise FormatError(f"{of!r} claims {size:,} bytes of a frame of {frame.size:,}")
    return decompress(frame, size).tobytes()


def _name_bytes(name: str) -> int:
    return len(name.encode())


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(as_bytes(tensor))


def _alike(base: Shards, name: str, entry: Entry) -> bool:
    return name in base and base[name][1:3] == entry[1:3]


def _floating(base: Shards) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, base.read(name)) for name in base if DTYPES[base[name].dtype] in FINGERPRINTED)


def _fingerprint(base: Shards) -> str:
    return fingerprint(_floating(base))


def count_different(left: torch.Tensor, right: torch.Tensor) -> int:
    """Scalars whose bits differ, a few at a time: NaN equals itself, and 0 is not −0."""
    a, b = (grid.bits(tensor).split(2**22) for tensor in (left, right))
    return sum(int((x != y).sum()) for x, y in zip(a, b, strict=True))


def _uint8(data: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if len(data) else torch.zeros(0, dtype=torch.uint8)
