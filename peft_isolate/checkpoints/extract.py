"""`extract`: what a fine-tuning changed, from any two checkpoints, as an adapter or as an exact difference."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..deltas.about.text import size_text
from ..deltas.delta import Delta, all_finite
from ..deltas.extracted import ExtractedConfig
from ..deltas.in_place import compose_in_place
from ..deltas.support import Support, read
from ..deltas.targets import tied_names
from ..errors import IsolateError, RegionError
from ..regions.files import check_free, write_folder
from ..regions.fingerprint import fingerprint
from ..regions.region import Region
from ..regions.roles import roles
from ..regions.selection import Selection
from ..regions.top import top
from .adapter_writer import AdapterWriter, address, check_wrappable
from .architecture import folder_of
from .difference import PIECE, Whole, difference
from .exact import count_different, write_exact
from .inspect import add_card
from .memory import Checkpoint
from .progress import progress
from .shards import Shards
from .weights import of_checkpoint

Mode = Literal["region", "top", "exact"]
MODES: tuple[Mode, ...] = get_args(Mode)
# Single elements cost an index each, and time in training: they must save half of what rows, columns or all would be.
ELEMENTS_PAY_BELOW = 0.5


@dataclass(frozen=True)
class Extracted:
    """What `extract` found and wrote.

    Attributes:
        folder: Where.
        mode: As it was asked for.
        tensors: Tensors that the result changes.
        scalars: Scalars that it has a number for; of an exact difference, those that differ.
        total: Scalars that were compared.
        n_bytes: Of the result's file.
        tuned_bytes: Of the tuned checkpoint's tensors.
        unequal: Scalars of the region that, merged, are not the tuned checkpoint's bits in the base's dtype.
        kept: Share of ‖Δ‖² that lies in the region, from 0 to 1.
        left_out: What differs and is not in the result: parameters out of scope and buffers (of an adapter), programs
            and the like beside the weights (of an exact difference).
        carried: Tensors that the base does not have like this, of an exact difference.
    """

    folder: Path
    mode: Mode
    tensors: int
    scalars: int
    total: int
    n_bytes: int
    tuned_bytes: int
    unequal: int = 0
    kept: float = 1.0
    left_out: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"{self.folder}:", *self.lines()])

    def lines(self) -> list[str]:
        """What was found, in words and counts."""
        share = self.n_bytes / self.tuned_bytes if self.tuned_bytes else 0.0
        lines = [
            f"{size_text(self.tuned_bytes)} → {size_text(self.n_bytes)} ({share:.1%})",
            f"{self.scalars:,} of {self.total:,} scalars in {self.tensors} tensors",
        ]
        if self.mode == "exact":
            lines.append("merged, it gives back the tuned checkpoint bit for bit")
        else:
            lines.append(f"merged, {self.unequal:,} of them are not the tuned model's number to the bit")
        if self.kept < 1.0:
            lines.append(f"{self.kept:.1%} of ‖Δ‖² is kept")
        if self.carried:
            lines.append(f"carried whole, being new or of another dtype or shape: {_some(self.carried)}")
        if share > 0.5 and self.mode != "exact":
            lines.append("deltas are fp32: compress makes them smaller for inference, and mode='exact' a difference")
        if self.left_out:
            lines.append(f"left out, though different: {_some(self.left_out)}")
        return lines


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    mode: Mode = "region",
    *,
    percent: float = 1.0,
    include_embeddings: bool | None = None,
    revision: str | None = None,
    tuned_revision: str | None = None,
) -> Extracted:
    """Write what turns one checkpoint into another, a tensor in memory at a time.

    Args:
        base: Folder or Hub id, in safetensors files.
        tuned: Likewise: a model that was fine-tuned from it, anyhow.
        out: A new folder.
        mode: "region": an adapter on all that changed, each tensor by the selection that describes it best: nothing of
            frozen layers, rows or columns where only these moved. "top": a sparse adapter of the `percent` % of the
            scalars that moved most, over the whole model, ties by position. "exact": no adapter but the difference
            itself, from which `merge` gives back the tuned checkpoint to the byte.
        percent: For "top": above 0, at most 100.
        include_embeddings: Whether embeddings, head and what is tied to another parameter are in scope. By default for
            "region" they are, and for "top" they are not, as in CPI-FT. Of an exact difference everything is part.
        revision, tuned_revision: Of the Hub.

    Raises:
        RegionError: For an adapter a tensor is new, missing or resized; a changed tensor is tied, or PEFT could not
            wrap it; a number is NaN or infinite; nothing changed, or too little for `percent`.
        IsolateError: See the message. Nothing was written.
        FormatError: A file is damaged. Nothing was written.
    """
    check_free(out)
    if mode not in MODES:
        raise IsolateError(f"mode={mode!r} is unknown: use one of {MODES}")
    if mode == "exact":
        return _extract_exact(base, tuned, out, revision, tuned_revision)
    pair = _Pair(base, tuned, revision, tuned_revision)
    whole_scope = mode == "region" if include_embeddings is None else include_embeddings
    scope = pair.names if whole_scope else [name for name in pair.names if name not in pair.embeddings]
    region = _changed(pair, scope) if mode == "region" else _top(pair, scope, percent)
    if not region:
        raise RegionError(
            f"{pair.tuned.name!r} does not differ from {pair.base.name!r} in scope: there is nothing to save"
        )
    if tied := tied_names(pair.base.model, region):
        name, others = next(iter(tied.items()))
        raise RegionError(
            f"{name!r} changed and is tied to {others}, where a delta would be missed: pass include_embeddings=False "
            "to leave it as it is, or mode='exact'"
        )
    check_wrappable(region, "mode='exact' carries all")
    return _write_adapter(pair, region, scope, mode, percent, Path(out))


class _Pair:
    """Two checkpoints of one architecture, by the names of their parameters in memory."""

    def __init__(self, base: Any, tuned: Any, revision: str | None, tuned_revision: str | None) -> None:
        self.base, self.revision = Checkpoint(base, revision=revision), revision
        self.tuned = Checkpoint(tuned, type(self.base.model).__name__, tuned_revision)
        self.names = list(self.base)
        self.embeddings = {
            role.parameter
            for role in roles(self.base.model)
            if role.layer is None and role.name in ("embedding", "head")
        } | tied_names(self.base.model, self.names).keys()
        remedy = "an adapter is a difference of tensors that both have; mode='exact' carries it"
        self.difference = Whole(of_checkpoint(self.base), of_checkpoint(self.tuned), remedy)
        self.read, self.pairs = self.difference.pair, self.difference.pairs

    def buffers(self) -> list[str]:
        """What both have beside parameters, by its name on the disk, where it differs: no adapter changes it."""
        ours, theirs = self.base.shards, self.tuned.shards
        both = [name for name in self.base.unused if name in theirs]
        return [name for name in both if not _same(ours, theirs, name)]


def _changed(pair: _Pair, scope: list[str]) -> Region:
    """Per tensor the selection that describes best what differs."""
    return Region({name: _moved(pair, name) for name in progress(scope, "compare")})


def _moved(pair: _Pair, name: str) -> Selection:
    delta = difference(*pair.read(name))
    if not all_finite(delta):
        raise RegionError(
            f"{name!r} holds NaN or infinity in the base or the tuned checkpoint: the training diverged, or a file is "
            "damaged"
        )
    return tightest(delta != 0)


def _top(pair: _Pair, scope: list[str], percent: float) -> Region:
    found = top(pair.pairs(scope), percent)
    found.check(percent, "take a smaller percent, or mode='region' for all that moved")
    return found.region


def tightest(changed: torch.Tensor) -> Selection:
    """The selection that covers what changed of one tensor with the fewest bytes.

    Single elements are taken where they save half of what rows, columns or everything would be: they are slower to
    train, and cost an index each.

    Args:
        changed: bool tensor of the parameter's shape.
    """
    shape = tuple(changed.shape)
    if not changed.numel():
        return Selection.whole(shape)
    matrix = changed.reshape(1, -1) if changed.ndim < 2 else changed.reshape(-1, shape[-1])
    rows, columns = (matrix.any(axis).nonzero().flatten() for axis in (1, 0))
    count = int(torch.count_nonzero(matrix))
    numel = changed.numel()
    bytes_of = {
        "whole": 4.0 * numel,
        "rows": 4.0 * rows.numel() * matrix.shape[1],
        "columns": 4.0 * columns.numel() * matrix.shape[0],
    }
    best = min(bytes_of, key=lambda kind: bytes_of[kind])
    if 4 * count + _code_bytes(count, numel) < ELEMENTS_PAY_BELOW * bytes_of[best]:
        return Selection.elements(shape, matrix.reshape(-1).nonzero().flatten())
    if best == "whole":
        return Selection.whole(shape)
    return Selection.rows(shape, rows) if best == "rows" else Selection.columns(shape, columns)


def _code_bytes(count: int, numel: int) -> float:
    """About what the positions cost: the entropy of a random subset."""
    d = count / numel if numel else 0.0
    return 0.0 if d in (0.0, 1.0) else -numel * (d * math.log2(d) + (1 - d) * math.log2(1 - d)) / 8


def _write_adapter(pair: _Pair, region: Region, scope: list[str], mode: Mode, percent: float, out: Path) -> Extracted:
    model = pair.base.model
    config = ExtractedConfig(mode=mode, percent=percent if mode == "top" else None, inference_mode=True)
    config.record(region, model, fingerprint((name, pair.base.read(name)) for name in pair.names))
    address(config, model, pair.base.name, pair.revision)
    config.resolve(model)  # what could not be loaded is refused now
    with write_folder(out) as folder:
        writer = _Writer(pair, region, set(scope), AdapterWriter(folder, config))
        for name in progress(pair.names, "extract"):
            writer.write(name, with_share=mode == "top")
        found = Extracted(
            folder=out, mode=mode, tensors=len(region), scalars=region.count,
            total=sum(pair.base.parameters[name].numel() for name in scope),
            n_bytes=writer.file.close(), tuned_bytes=pair.tuned.shards.n_bytes, unequal=writer.unequal,
            kept=writer.kept / writer.everything if writer.everything else 1.0,
            left_out=(*writer.left_out, *pair.buffers()),
        )  # fmt: skip
        add_card(folder, pair.base.folder, found.lines())
    return found


class _Writer:
    """Puts the deltas of a region into an adapter's file, and counts. Of one tensor nothing is held at the next."""

    def __init__(self, pair: _Pair, region: Region, scope: set[str], file: AdapterWriter) -> None:
        self.pair, self.region, self.scope, self.file = pair, region, scope, file
        self.unequal, self.kept, self.everything = 0, 0.0, 0.0
        self.left_out: list[str] = []

    def write(self, name: str, with_share: bool) -> None:
        """One parameter, in the region or not; `with_share` also sums what share of ‖Δ‖² the region has."""
        if name not in self.scope:
            if bool((difference(*self.pair.read(name)) != 0).any()):
                self.left_out.append(name)
            return
        if name not in self.region and not with_share:
            return
        base, tuned = self.pair.read(name)
        delta = difference(base, tuned)
        if with_share:
            self.everything += _square(delta)
        if name in self.region:
            _, numbers = self.file.add(name, self.region[name], delta)
            del delta
            if with_share:
                self.kept += _square(numbers)
            self.unequal += _unequal(base, tuned, self.region[name], numbers)


def _same(ours: Shards, theirs: Shards, name: str) -> bool:
    alike = ours[name][1:3] == theirs[name][1:3]
    return alike and not count_different(ours.read(name), theirs.read(name))


def _unequal(base: torch.Tensor, tuned: torch.Tensor, selection: Selection, numbers: torch.Tensor) -> int:
    """Scalars of the selection that are not the tuned ones when they are merged, in the base's dtype."""
    delta = Delta(selection, None, torch.empty(0, dtype=numbers.dtype, device="meta"))
    delta.delta = nn.Parameter(numbers, requires_grad=False)
    merged = base.clone(memory_format=torch.contiguous_format)
    compose_in_place(merged, list(delta.parts()), [1.0], disjoint=True)
    wanted = tuned.to(base.dtype)
    support, index = Support.of(selection)
    return count_different(*(read(tensor, support, index, numbers.shape) for tensor in (merged, wanted)))


def _square(numbers: torch.Tensor) -> float:
    """‖numbers‖², summed in float64 a few at a time: torch makes a copy in it."""
    return sum(float(piece.double().square().sum()) for piece in numbers.reshape(-1).split(PIECE))


def _extract_exact(base: Any, tuned: Any, out: Any, revision: str | None, tuned_revision: str | None) -> Extracted:
    ours, theirs = Shards(folder_of(base, revision)), Shards(folder_of(tuned, tuned_revision))
    with write_folder(out) as folder:
        found = write_exact(ours, theirs, os.fspath(base), folder)
        add_card(folder)
    return Extracted(
        folder=Path(out), mode="exact", tensors=len(found.changed) + len(found.carried), scalars=found.n_changed,
        total=sum(math.prod(entry.shape) for entry in theirs.values()), n_bytes=found.n_bytes,
        tuned_bytes=found.tuned_bytes, left_out=tuple(found.left_out), carried=tuple(found.carried),
    )  # fmt: skip


def _some(names: tuple[str, ...]) -> str:
    """A few of them, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
