"""`export`: what an adapter changes, as plain safetensors, for programs that do not have this library.

Both formats hold new values, not differences, under the names and in the shapes and dtypes that the base's own files
have; so whatever loads the base can take them, in whatever order it loads its tensors. Only what differs from the base
in a bit is in them. There is no config beside them: neither is a model.

**`state-dict`**: every tensor of which a scalar changed, whole. Metadata `{"format": "pt"}`, as transformers has it.
Files `model.safetensors`, or `model-00001-of-0000N.safetensors` and `model.safetensors.index.json`.

**`indexed`**, format `peft_isolate.indexed/1`: of every such tensor `<name>` two tensors of n ≥ 1 scalars each,

- `<name>.indices`: the flat positions that changed, row after row, ascending and each once; int32, or int64 where the
  tensor has 2^31 scalars or more;
- `<name>.values`: what stands there now, in the tensor's dtype.

Metadata: `format`, and `tensors`, JSON: `{name: {"shape": [...], "dtype": "bfloat16"}}` of all in that file, dtypes as
torch names them. Files `indexed.safetensors`, or `indexed-00001-of-0000N.safetensors` and
`indexed.safetensors.index.json`; both tensors of a name stand in one file. To apply one:

    with safe_open("indexed.safetensors", framework="pt") as file:
        for name in json.loads(file.metadata()["tensors"]):
            flat = state_dict[name].view(-1)  # of the base, contiguous
            flat[file.get_tensor(f"{name}.indices").long()] = file.get_tensor(f"{name}.values")

It takes 4 bytes and a value for each scalar that changed: where more than a third of a bf16 tensor (half of an fp32
one) changed, the whole tensor is smaller.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..deltas.terms import as_finite
from ..errors import IsolateError
from ..regions.files import write_folder
from .adapter import Adapter
from .architecture import folder_of
from .exact import check_base, count_different, is_exact, open_exact, tensors_of
from .grid import bits
from .memory import Checkpoint
from .merge import Plan
from .progress import progress
from .shards import Shards, Spool
from .verify import CHUNK

FORMATS = ("state-dict", "indexed")
INDEXED = "peft_isolate.indexed/1"
STEMS = {"state-dict": "model", "indexed": "indexed"}
LARGEST_FILE = 5 * 10**9


class Exported(NamedTuple):
    """What `export` wrote.

    Attributes:
        folder: Where.
        format: One of `FORMATS`.
        tensors: Tensors of the disk that changed.
        scalars: Scalars of these that changed.
        n_bytes: Of the tensors written.
    """

    folder: Path
    format: str
    tensors: int
    scalars: int
    n_bytes: int

    def __str__(self) -> str:
        return (
            f"exported {self.scalars:,} changed scalars of {self.tensors} tensors as {self.format}, "
            f"{self.n_bytes / 1e6:,.1f} MB: {self.folder}"
        )


class Change(NamedTuple):
    """A tensor as the disk names it; `before` is None where the base does not have it like this."""

    name: str
    before: torch.Tensor | None
    after: torch.Tensor


def export(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str = "state-dict",
    scale: float = 1.0,
    revision: str | None = None,
    largest_file: int = LARGEST_FILE,
) -> Exported:
    """Write the tensors that merging would change, or the scalars of them, as plain safetensors.

    The values are those that `merge` writes. One tensor is in memory at a time, in up to four copies, and with
    "indexed" the indices of what changed of it.

    Args:
        base: Folder or Hub id, in safetensors files.
        adapter: An adapter or an exact difference, likewise. Of an exact difference tensors that the tuned checkpoint
            lacks stay the base's, and files beside the weights are not exported: `merge` gives them.
        out: A new folder. It appears when it is complete.
        format: "state-dict" or "indexed", see the module.
        scale: α.
        revision: Of the base on the Hub.
        largest_file: Bytes of tensors above which another file is begun.

    Raises:
        BaseMismatchError: The base is another one than the adapter's.
        IsolateError: `out` is there already, or see the message. Nothing was written.
        FormatError: A file is damaged. Nothing was written.

    Example:
        >>> print(export("base", "adapter", "changed", format="indexed"))  # doctest: +SKIP
        exported 3,238,002 changed scalars of 112 tensors as indexed, 19.4 MB: changed
    """
    if format not in FORMATS:
        raise IsolateError(f"format={format!r} is unknown: take one of {FORMATS}")
    if (alpha := as_finite(scale)) is None:
        raise IsolateError(f"scale={scale!r}: give one finite number")
    if is_exact(folder_of(adapter)):
        changes = _of_exact(base, adapter, format, alpha, revision)
    else:
        changes = _of_adapter(base, adapter, alpha, revision)
    n_tensors = n_scalars = 0
    with write_folder(out) as folder:
        files = _Files(folder, STEMS[format], largest_file, _metadata if format == "indexed" else lambda _: PLAIN)
        for name, before, after in changes:
            changed = after.numel() if before is None else count_different(before, after)
            if not changed and before is not None:
                continue
            n_tensors, n_scalars = n_tensors + 1, n_scalars + changed
            if format == "indexed":
                assert before is not None
                indices, values = _indexed(before, after, changed)
                files.add(name, after, {f"{name}.indices": indices, f"{name}.values": values})
            else:
                files.add(name, after, {name: after})
        n_bytes = files.close()
    return Exported(Path(out), format, n_tensors, n_scalars, n_bytes)


def _of_adapter(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str], scale: float, revision: str | None
) -> Iterator[Change]:
    """What can be refused is refused before the first of them."""
    opened = Adapter(adapter)
    checkpoint = Checkpoint(base, opened.class_name, revision)
    plan = Plan(checkpoint, [opened], [scale])
    opened.check_base(checkpoint)
    return _merged(plan)


def _merged(plan: Plan) -> Iterator[Change]:
    # Merging writes to what was mapped, but not to what is mapped a second time.
    before = Shards(plan.checkpoint.folder)
    for group in progress(plan.groups, "export"):
        for name, after in plan.checkpoint.to_disk(group, plan.merged(group)).items():
            yield Change(name, before.read(name), after)


def _of_exact(
    base: str | os.PathLike[str], exact: str | os.PathLike[str], format: str, scale: float, revision: str | None
) -> Iterator[Change]:
    """Likewise."""
    if scale != 1.0:
        raise IsolateError(f"scale={scale!r}: an exact difference gives back one checkpoint, so leave it at 1")
    shards = Shards(folder_of(base, revision))
    file, about = open_exact(exact)
    check_base(shards, about)
    whole = {key.removeprefix("tensor/") for key in file.keys() if key.startswith("tensor/")}  # noqa: SIM118
    if whole and format == "indexed":
        name = min(whole)
        there = str(shards[name].shape) if name in shards else "no such tensor"
        raise IsolateError(
            f"{name!r} has shape {tuple(file.get_tensor(f'tensor/{name}').shape)}, the base has {there} in its "
            "dtype: it has no indices there; take the format 'state-dict'"
        )
    return (
        Change(name, None if name in whole else shards.read(name), tensor)
        for name, tensor in tensors_of(shards, file, about)
    )


def _indexed(before: torch.Tensor, after: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, values) of the `count` scalars of which a bit differs."""
    old, new = bits(before), bits(after)
    indices = torch.empty(count, dtype=torch.int32 if new.numel() < 2**31 else torch.int64)
    values = torch.empty(count, dtype=new.dtype)
    at = 0
    for start in range(0, new.numel(), CHUNK):
        chunk = new[start : start + CHUNK]
        found = (old[start : start + CHUNK] != chunk).nonzero().squeeze(1)
        part = slice(at, at + found.numel())
        indices[part], values[part] = found + start, chunk[found]
        at = part.stop
    return indices, values.view(after.dtype)


PLAIN = {"format": "pt"}
Kind = dict[str, object]


def _metadata(kinds: Mapping[str, Kind]) -> dict[str, str]:
    return {"format": INDEXED, "tensors": json.dumps(kinds)}


class _Files:
    """Safetensors files of a bounded size in a new folder, named as transformers names them when all are there."""

    def __init__(
        self, folder: Path, stem: str, largest: int, metadata: Callable[[Mapping[str, Kind]], Mapping[str, str]]
    ) -> None:
        self._folder, self._stem, self._largest, self._metadata = folder, stem, largest, metadata
        self._parts: list[list[str]] = []
        self._size = self._total = 0
        self._begin()

    def add(self, name: str, tensor: torch.Tensor, stored: Mapping[str, torch.Tensor]) -> None:
        """Take what is stored of a tensor, all into one file."""
        size = sum(each.nbytes for each in stored.values())
        if self._size and self._size + size > self._largest:
            self._spool.close(self._metadata(self._kinds))
            self._begin()
        for key, each in stored.items():
            self._spool.add(key, each)
            self._parts[-1].append(key)
        self._kinds[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        self._size, self._total = self._size + size, self._total + size

    def close(self) -> int:
        """Name the files; returns the bytes of their tensors."""
        self._spool.close(self._metadata(self._kinds))
        n = len(self._parts)
        names = [
            f"{self._stem}-{i:05}-of-{n:05}.safetensors" if n > 1 else f"{self._stem}.safetensors"
            for i in range(1, n + 1)
        ]
        for i, name in enumerate(names):
            os.replace(self._path(i), self._folder / name)
        if n > 1:
            weight_map = {key: name for name, keys in zip(names, self._parts, strict=True) for key in keys}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._folder / f"{self._stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
        return self._total

    def _begin(self) -> None:
        self._parts.append([])
        self._spool, self._size = Spool(self._path(len(self._parts) - 1)), 0
        self._kinds: dict[str, Kind] = {}

    def _path(self, i: int) -> Path:
        return self._folder / f"{i}.part"
