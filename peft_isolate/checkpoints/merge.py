"""`merge`: base and adapters to a model's checkpoint, a tensor at a time, with the bits of `merge_and_unload`."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..deltas.delta import all_finite
from ..deltas.in_place import compose_in_place
from ..deltas.targets import tied_names
from ..deltas.terms import Part, as_finite
from ..errors import FormatError, IsolateError, RegionError
from ..regions.files import check_free, write_folder
from .adapter import Adapter
from .memory import Checkpoint, Group
from .progress import progress
from .shards import Patch

logger = logging.getLogger(__name__)


class Merged(NamedTuple):
    """What `merge` wrote.

    Attributes:
        folder: Where.
        tensors: Parameters that were changed.
        scalars: Scalars of the adapters' supports.
        n_bytes: Of the checkpoint's tensors.
    """

    folder: Path
    tensors: int
    scalars: int
    n_bytes: int

    def __str__(self) -> str:
        return (
            f"merged {self.scalars:,} scalars of {self.tensors} tensors into {self.n_bytes / 1e6:,.1f} MB: "
            f"{self.folder}"
        )


def merge(
    base: str | os.PathLike[str],
    *adapters: str | os.PathLike[str],
    out: str | os.PathLike[str],
    scale: float | Sequence[float] = 1.0,
    revision: str | None = None,
) -> Merged:
    """Write the model that a base and its adapters are together, laid out as the base.

    All adapters compose in one expression, `W0 + Σ α·Δ`, summed in the order they are given and rounded once. The
    bits are those of `merge_and_unload` on a model that was loaded in the dtype of its files. One tensor is in memory
    at a time; the others are copied from file to file.

    Args:
        base: Folder or Hub id, in safetensors files.
        *adapters: Folders or Hub ids, one or several; of one model class. An exact difference (`extract` with
            `mode="exact"`) stands alone.
        out: A new folder. It appears when it is complete.
        scale: α, one for all adapters or one for each. 0 leaves an adapter out.
        revision: Of the base on the Hub.

    Raises:
        BaseMismatchError: The base is not the one that an adapter was trained on.
        RegionError: An adapter is another model's.
        IsolateError: `out` is there already, or see the message. Nothing was written.
        FormatError: A file is damaged. Nothing was written.
    """
    if not adapters:
        raise IsolateError("there is nothing to merge: name one adapter or several")
    check_free(out)
    given = scale if isinstance(scale, list | tuple) else [scale] * len(adapters)
    scales = [alpha for alpha in map(as_finite, given) if alpha is not None]
    if len(scales) != len(given) or len(scales) != len(adapters):
        raise IsolateError(f"scale={scale!r}: give one finite number, or one for each of {len(adapters)} adapters")
    from .exact import is_exact, rebuild

    if any(is_exact(adapter) for adapter in adapters):
        if scales != [1.0]:
            raise IsolateError(
                "an exact difference gives back one checkpoint, bit for bit: it goes with no other adapter and no "
                "scale"
            )
        return Merged(*rebuild(base, adapters[0], out, revision))
    opened = [Adapter(adapter) for adapter in adapters]
    classes = sorted({adapter.class_name for adapter in opened if adapter.class_name})
    if len(classes) > 1:
        raise IsolateError(f"the adapters were trained on models of different classes, {classes}: merge them apart")
    checkpoint = Checkpoint(base, classes[0] if classes else None, revision)
    plan = Plan(checkpoint, opened, scales)
    for adapter in opened:
        adapter.check_base(checkpoint)
    with write_folder(out) as folder:
        _copy_others(checkpoint, folder)
        patches = {file: Patch(checkpoint.folder / file, folder / file) for file in checkpoint.shards.files}
        try:
            for group in progress(plan.groups, "merge"):
                _write(patches, checkpoint, checkpoint.to_disk(group, plan.merged(group)))
        finally:
            for patch in patches.values():
                patch.close()
    return Merged(Path(out), len(plan.touched), plan.scalars, checkpoint.shards.n_bytes)


class Plan:
    """Which adapter changes which tensors; all that can be refused is refused when it is made."""

    def __init__(
        self, checkpoint: Checkpoint, adapters: list[Adapter], scales: list[float], *, to_write: bool = True
    ) -> None:
        """`to_write`: what the base's files have no place for is refused; else it is left out."""
        self.checkpoint, self.to_write = checkpoint, to_write
        # α = 0 leaves the term out.
        self.adapters = [(a, alpha) for a, alpha in zip(adapters, scales, strict=True) if alpha]
        self.supports: list[set[str]] = []
        self.replaced: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, tuple[list[int], torch.Tensor]] = {}
        self.scalars = 0
        for adapter, alpha in self.adapters:
            trained, held, *_ = adapter.resolve(checkpoint.model)
            self.supports.append({*trained, *held})
            self.scalars += sum(place.count for places in (trained, held) for place in places.values())
            self._take_beside(adapter, alpha)
        tied = tied_names(checkpoint.model, [*self.replaced, *self.tokens])
        if both := sorted(set(self.replaced) & tied.keys()):
            raise IsolateError(
                f"an adapter carries {both[0]!r} whole, which the base ties to {tied[both[0]]}: in memory the two are "
                "others then, and the base's files have one. Load both with PEFT, and save merge_and_unload()"
            )
        self.touched = list(dict.fromkeys([*(n for s in self.supports for n in s), *self.replaced, *self.tokens]))
        for name in self.touched:
            checkpoint.check_plain(name)
            if twins := [twin for twin in tied.get(name, ()) if twin in checkpoint.twins]:
                raise IsolateError(
                    f"{name!r} is tied to {twins[0]!r}, and {checkpoint.name!r} has both: merged, they would be two. "
                    "Load the base with transformers, save it with save_pretrained, and merge into that"
                )
        groups = {id(group): group for group in map(checkpoint.group_of, self.touched)}
        self.groups: list[Group] = sorted(groups.values(), key=lambda group: checkpoint.shards[group.disk[0]][::3])

    def _take_beside(self, adapter: Adapter, alpha: float) -> None:
        """What was trained and saved whole: there is no sum of two, nor half of one."""
        whole, tokens = adapter.beside(self.checkpoint.model), adapter.tokens(self.checkpoint.model)
        names = {*whole, *tokens}
        if names and alpha != 1.0:
            raise IsolateError(
                f"{adapter.name!r} carries {sorted(names)[0]!r} whole (modules_to_save, trained tokens), which has no "
                f"scale {alpha}: merge it with scale 1"
            )
        if twice := sorted(names & {*self.replaced, *self.tokens}):
            raise IsolateError(f"two adapters carry {twice[0]!r} whole: merge one of them, train the other on that")
        for name, tensor in whole.items():
            known = self.checkpoint.parameters.get(name)
            if known is None or name not in self.checkpoint or tuple(known.shape) != tuple(tensor.shape):
                if not self.to_write:
                    continue
                there = "no such tensor" if known is None or name not in self.checkpoint else tuple(known.shape)
                raise RegionError(
                    f"{adapter.name!r} carries {name!r} of shape {tuple(tensor.shape)}, and the base has {there}: "
                    "load both with PEFT, and save merge_and_unload()"
                )
            self.replaced[name] = tensor
        for name, (rows, numbers) in tokens.items():
            _check_rows(name, tuple(self.checkpoint.parameters[name].shape), rows, numbers)
        self.tokens |= tokens

    def merged(self, group: Group) -> dict[str, torch.Tensor]:
        """{parameter: effective weight} of a group."""
        tensors = {name: _own(tensor) for name, tensor in self.checkpoint.read_group(group).items()}
        for name in self.touched:
            stored = self.checkpoint.stored_name(name)
            if stored not in tensors:
                continue
            self._apply(name, tensors[stored])
            if not all_finite(tensors[stored]):
                raise IsolateError(
                    f"merging makes {name!r} NaN or infinite: the adapter's numbers do not fit into "
                    f"{tensors[stored].dtype}, or the base's are damaged"
                )
        return tensors

    def _apply(self, name: str, w0: torch.Tensor) -> None:
        if name in self.replaced:
            w0.copy_(self.replaced[name])
        if name in self.tokens:
            rows, numbers = self.tokens[name]
            w0.index_copy_(0, torch.tensor(rows), numbers.to(w0.dtype))
        acting = [
            (adapter.delta(name), alpha)
            for (adapter, alpha), support in zip(self.adapters, self.supports, strict=True)
            if name in support
        ]
        parts: list[tuple[Part, float]] = [(part, alpha) for delta, alpha in acting for part in delta.parts()]
        if parts:
            compose_in_place(w0, [part for part, _ in parts], [alpha for _, alpha in parts], disjoint=len(acting) == 1)


def _write(patches: Mapping[str, Patch], checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors in their places. A function of its own: nothing of one group is held when the next is read."""
    for name, tensor in tensors.items():
        patches[checkpoint.shards[name].file].write(name, tensor)


def _check_rows(name: str, shape: tuple[int, ...], rows: list[int], numbers: torch.Tensor) -> None:
    """Raise `FormatError` unless what `trainable_token_indices` trained can be put into its embedding."""
    whole = all(type(row) is int and 0 <= row < shape[0] for row in rows)
    if not whole or len(set(rows)) != len(rows) or tuple(numbers.shape) != (len(rows), *shape[1:]):
        raise FormatError(
            f"rows {rows} of {name!r} {shape} with numbers of shape {tuple(numbers.shape)}: the adapter's config or "
            "its file was altered; get both again from where they came"
        )
    if not numbers.is_floating_point() or not all_finite(numbers):
        raise FormatError(f"the trained rows of {name!r} hold NaN, infinity or no floating-point numbers")


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, to be written to. What is mapped from a file is this process's copy, page by page, once written."""
    return tensor.contiguous()


def _copy_others(checkpoint: Checkpoint, folder: Path) -> None:
    """The files beside the weights: config, tokenizer, generation config, the index."""
    for relative in checkpoint.shards.others():
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.folder / relative, target)
