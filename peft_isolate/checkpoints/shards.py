"""A model's checkpoint as it lies on the disk: safetensors files, read one tensor at a time, copied, and written to in
any order.

No tensor is held that was not asked for, so a checkpoint may be larger than the memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..errors import FormatError, IsolateError
from ..regions.fingerprint import as_bytes
from ..regions.selection import whole_numbers

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Other formats' weights: a folder may hold the same model in several of them.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".onnx", ".tflite", ".npz")
# What a repository says of itself, which is not true of a copy that was changed; and an adapter that lies in it, which
# transformers would put upon the copy.
NOT_COPIED = (
    "README.md", INDEX, "pytorch_model.bin.index.json", ".gitattributes", ".gitignore", "adapter_config.json",
)  # fmt: skip
# Bytes read of a mapped file before it is mapped anew.
MAPPED = 2**26

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class Entry(NamedTuple):
    """Where a tensor stands.

    Attributes:
        file: Name of the file in the checkpoint's folder.
        dtype: As safetensors spells it, "BF16" for example.
        shape: Its shape.
        start: Offset of its first byte in the file.
        n_bytes: Its bytes.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


class TensorFile:
    """A safetensors file, read one tensor at a time.

    What was looked at of a mapped file counts as the process's memory until the mapping and all its tensors are gone.
    So it is mapped anew from time to time: a file may be larger than the memory.

    Attributes:
        path: Where it lies.
        entries: {name: where it stands}, in the order of the bytes.

    Raises:
        FormatError: It is truncated, altered or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = read_header(path)
        self._open: Any = None
        self._mapped = 0

    def keys(self) -> list[str]:
        """The tensors' names."""
        return list(self.entries)

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor, mapped: its bytes are read when they are looked at. Do not write to it."""
        if self._open is None:
            self._open = safe_open(self.path, framework="pt")
        tensor: torch.Tensor = self._open.get_tensor(name)
        self._mapped += self.entries[name].n_bytes
        # At once, not before the next: a large tensor is gone when its reader is done with it.
        if self._mapped > MAPPED:
            self.let_go()
        return tensor

    def let_go(self) -> None:
        """Hold no mapping any longer; tensors that were given out hold theirs."""
        self._open, self._mapped = None, 0


class Shards(Mapping[str, Entry]):
    """The safetensors files of a checkpoint: `{name on the disk: Entry}`, file by file in the order of the bytes.

    Args:
        folder: Of a model, with `model.safetensors` or `model.safetensors.index.json`.

    Raises:
        IsolateError: There is no such file, or a tensor stands in two.
        FormatError: A file is truncated or altered, or the index names one outside the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.files = _files(self.folder)
        self._entries: dict[str, Entry] = {}
        self._of_file: dict[str, TensorFile] = {}
        for file in self.files:
            self._of_file[file] = TensorFile(self.folder / file)
            for name, entry in self._of_file[file].entries.items():
                if name in self._entries:
                    raise IsolateError(
                        f"{name!r} stands in {self._entries[name].file!r} and in {file!r} of {str(self.folder)!r}: "
                        "remove what is left of an older save"
                    )
                self._entries[name] = entry
        self._last: TensorFile | None = None

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.n_bytes for entry in self._entries.values())

    def read(self, name: str) -> torch.Tensor:
        """A tensor, mapped from its file: its bytes are read when they are looked at. Do not write to it."""
        file = self._of_file[self._entries[name].file]
        if self._last is not file:
            self.let_go()
        self._last = file
        return file.get_tensor(name)

    def let_go(self) -> None:
        """Hold no mapping of a file any longer."""
        if self._last is not None:
            self._last.let_go()

    def others(self) -> list[Path]:
        """Files that go with the weights wherever these go: config, generation config, tokenizer, code, and the index
        where there are several files; relative.
        """
        found = [] if self.files == [SINGLE] else [Path(INDEX)]
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            if path.is_file() and not hidden and path.suffix not in WEIGHTS and path.name not in NOT_COPIED:
                found.append(relative)
        return found


class Patch:
    """A copy of a safetensors file whose tensors are overwritten one by one.

    Args:
        source: The file.
        out: The copy, which has the same header: the same names, dtypes, shapes, metadata and order.
    """

    def __init__(self, source: Path, out: Path) -> None:
        self._entries = read_header(source)
        shutil.copyfile(source, out)
        self._file = open(out, "rb+")  # noqa: SIM115  # closed by close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in the place of the one of this name, dtype and shape."""
        entry = self._entries[name]
        if (DTYPES[entry.dtype], entry.shape) != (tensor.dtype, tuple(tensor.shape)):
            raise IsolateError(
                f"{name!r} is {entry.dtype} {entry.shape} in the file, and {tensor.dtype} {tuple(tensor.shape)} was "
                "to be written"
            )
        self._file.seek(entry.start)
        self._file.write(as_bytes(tensor))

    def close(self) -> None:
        """Bring everything to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class Spool:
    """A safetensors file whose tensors come one after the other, and whose header is written last.

    Args:
        path: The file. What comes in lies beside it, under a hidden name, until `close`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._beside = path.with_name(f".{path.name}.spool")
        self._file = open(self._beside, "wb")  # noqa: SIM115  # closed by close()
        self._entries: list[tuple[str, str, list[int], int, int]] = []
        self._at = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor, whose bytes may be let go of then."""
        spelled = next(text for text, dtype in DTYPES.items() if dtype == tensor.dtype)
        data = as_bytes(tensor)
        self._file.write(data)
        self._entries.append((name, spelled, list(tensor.shape), self._at, len(data)))
        self._at += len(data)

    def close(self, metadata: Mapping[str, str]) -> None:
        """Write the file. Wide dtypes come first, so that every tensor lies aligned."""
        self._file.close()
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        ordered = sorted(self._entries, key=lambda entry: -DTYPES[entry[1]].itemsize)
        at = 0
        for name, spelled, shape, _, size in ordered:
            header[name] = {"dtype": spelled, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(self._beside, "rb") as source, open(self.path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, _, _, start, size in ordered:
                source.seek(start)
                copy_bytes(source, file, size)
            file.flush()
            os.fsync(file.fileno())
        self._beside.unlink()


class Digested:
    """An open file, and the SHA-256 of what was written to it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        """As of a file."""
        self.sha256.update(data)
        self._file.write(data)


def copy_bytes(source: Any, file: Any, size: int) -> None:
    """Copy that many bytes from one open file to another, a few MiB at a time."""
    while size:
        chunk = source.read(min(size, 2**22))
        if not chunk:
            raise FormatError("the file ended before its tensors did")
        file.write(chunk)
        size -= len(chunk)


def read_header(path: Path) -> dict[str, Entry]:
    """{name: where it stands} of a safetensors file, in the order of the bytes.

    Raises:
        FormatError: The file is truncated, altered or of another format.
    """
    try:
        with safe_open(path, framework="pt"):  # checks every length and offset against the file's size
            text = read_header_text(path)
    except SafetensorError as error:
        raise FormatError(
            f"{str(path)!r} is no readable safetensors file ({error}): it was cut short or altered, get it again"
        ) from error
    return entries_of(text, path.name)


def read_header_text(path: Path) -> bytes:
    """The header of a safetensors file, to the byte, without its length."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return file.read(size)


def entries_of(text: bytes, file: str) -> dict[str, Entry]:
    """{name: where it stands} by the header of a safetensors file, in the order of the bytes.

    Args:
        text: The header, without its length.
        file: The file's name.

    Raises:
        FormatError: It is no header, its tensors do not follow one another, or torch lacks a dtype.
    """
    found: dict[str, Entry] = {}
    at = data = 8 + len(text)
    try:
        described = json.loads(text)
        described.pop("__metadata__", None)
        for name, one in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = one["data_offsets"]
            shape = whole_numbers(one["shape"])
            if one["dtype"] not in DTYPES:
                raise FormatError(f"{name!r} has dtype {one['dtype']!r}, which torch does not have")
            size = math.prod(shape) * DTYPES[one["dtype"]].itemsize
            if (data + start, data + stop) != (at, at + size):
                raise FormatError(f"{name!r} of {size:,} bytes lies at {start} to {stop}")
            found[name] = Entry(file, one["dtype"], shape, at, size)
            at += size
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"the header of {file!r} is damaged ({type(error).__name__}: {error}): get it again"
        ) from error
    return found


def _files(folder: Path) -> list[str]:
    """The names of a checkpoint's files. Like transformers, of a single file and an index it takes the file."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"{str(folder / INDEX)!r} names no files ({type(error).__name__}: {error}): get it again"
            ) from error
        there = set(os.listdir(folder))  # a name that no file can have is looked for, never opened
        for file in files:
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                raise FormatError(f"{str(folder / INDEX)!r} names {file!r}, which is no file of its folder")
            if file not in there or not (folder / file).is_file():
                raise FormatError(f"{str(folder)!r} lacks {file!r}, which its index names: the download is incomplete")
        return files
    if not folder.is_dir():
        raise IsolateError(f"there is no folder {str(folder)!r}")
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    raise IsolateError(
        f"{str(folder)!r} has neither {SINGLE!r} nor {INDEX!r}"
        + (
            f", only {pickled[0]!r}, a format that can run code when it is read: load the model with transformers, "
            "and save it with save_pretrained"
            if pickled
            else ": it is no model's checkpoint"
        )
    )
