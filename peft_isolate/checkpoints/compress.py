"""An adapter as small as it can be shared, for inference; and back, to train on."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..deltas.about.card import PICTURE
from ..deltas.compose import compose
from ..deltas.delta import HELD, TRAINED, Delta
from ..deltas.packed import VALUES, Packing, pack, unpack
from ..deltas.packed_delta import PackedDelta
from ..errors import IsolateError
from ..regions.files import write_folder
from ..regions.region import check_shape
from ..regions.stored import Place, StoredSelection, storable
from .adapter import CONFIG, WEIGHTS, Adapter, Alone
from .inspect import add_card
from .memory import Checkpoint

logger = logging.getLogger(__name__)

# What lies beside an adapter and is none of it: states of a training, pickles, what is hidden.
LEFT_BEHIND = (
    ".*", "checkpoint-*", "runs", "global_step*", "events.*", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt",
    "*.pkl", CONFIG, PICTURE,
)  # fmt: skip
PARTS = (("region", TRAINED), ("held", HELD))


@dataclasses.dataclass(frozen=True)
class Compressed:
    """What `compress` did.

    Attributes:
        values: What the numbers became.
        scalars: Of the adapter, trained and held.
        before, after: Bytes of its file of tensors.
        carried: Bytes of both that are no deltas: modules_to_save, embeddings.
        largest_error, mean_error: Of the effective weights' difference to the base, before it is rounded to the
            base's dtype; a soft mask's factor is in them.
        changed: Of the effective weights in the base's dtype, those that are others than before; None without a base.
        moved: Of them, those that are others than the base's.
        compared: Of how many.
    """

    values: str
    scalars: int
    before: int
    after: int
    carried: int
    largest_error: float
    mean_error: float
    changed: int | None = None
    moved: int | None = None
    compared: int | None = None

    @property
    def bytes_a_scalar(self) -> float:
        """All that the file has for the deltas, by scalars."""
        return (self.after - self.carried) / max(self.scalars, 1)

    def __str__(self) -> str:
        lines = [
            f"before {self.before:,} bytes → after {self.after:,} bytes: {self.bytes_a_scalar:.3f} bytes a scalar in "
            f"{self.values}, of {self.scalars:,} scalars",
            f"error of the effective weights: at most {self.largest_error:.3g}, {self.mean_error:.3g} in the mean",
        ]
        if self.compared is not None:
            share = (self.changed or 0) / max(self.compared, 1)
            lines.append(
                f"in the base's dtype {self.changed:,} of {self.compared:,} effective weights change by it "
                f"({share:.2%}); {self.moved:,} are others than the base's at all"
            )
        return "\n".join(lines)


def compress(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    values: str = "bf16",
    zstd: bool = True,
    base: str | os.PathLike[str] | Mapping[str, torch.Tensor] | None = None,
) -> Compressed:
    """Write an adapter as small as it can be shared. It loads like any other, for inference; see `decompress`.

    What lies beside it in the folder is copied, but for states of a training and pickles.

    Args:
        adapter: A folder or a Hub id.
        out: The folder to write; it must not exist, or be empty.
        values: "bf16" and "fp16" round the numbers; "int8" has a scale for each row; "exact" keeps every bit.
        zstd: Compress what becomes shorter by it.
        base: The base model, a folder or a Hub id, to count in its dtype which effective weights change; or
            {parameter: its numbers}. None: the one that the adapter's config names, where that is a folder.

    Returns:
        What it cost and brought.

    Raises:
        IsolateError: See the message; nothing was written.

    Example:
        >>> print(compress("adapter", "adapter-int8", values="int8"))  # doctest: +SKIP
        before 8,012,344 bytes → after 2,790,112 bytes: 1.742 bytes a scalar in int8, of 1,601,536 scalars
        error of the effective weights: at most 1.92e-06, 4.31e-07 in the mean
    """
    if values not in VALUES:
        raise IsolateError(f"values={values!r} is unknown: take one of {VALUES}")
    source = Alone(adapter)
    if source.config.packed is not None:
        raise IsolateError(
            f"{source.name!r} is packed as {source.config.packed!r} already: compress the adapter it was made from, "
            "or decompress it first (what was rounded stays so)"
        )
    resolved = source.recorded()
    numbers_of = _numbers_of(base, source)
    described = _Described(source, values)
    tensors = source.carried()
    carried = sum(tensor.nbytes for tensor in tensors.values())
    error = _Error()
    for parameter in source.parameters:
        delta = source.delta(parameter)
        numbers = {name: delta.zero_holes(name, delta.numbers(name).detach()) for name in delta.places}
        places = {name: _with_codes(delta, name) for name in delta.places}
        buffer, places = pack(numbers, places, values, zstd)
        described.add(parameter, places, buffer.numel())
        packed = PackedDelta(
            places.get(TRAINED), places.get(HELD), torch.empty(0), Packing.of(values, buffer.numel(), places),
            resolved.masks.get(parameter),
        )  # fmt: skip
        state = {name: tensor for name, tensor in delta.state.items() if not name.endswith("_codes")}
        for name, tensor in (state | {"packed": buffer}).items():
            packed.register_buffer(name, tensor)
            tensors[source.key(parameter, name)] = tensor
        error.add(parameter, delta, packed, numbers_of)
    found = Compressed(
        values, error.scalars, source.n_bytes, 0, carried, error.largest, error.total / max(error.scalars, 1),
        *((None, None, None) if numbers_of is None else (error.changed, error.moved, error.scalars)),
    )  # fmt: skip

    with _written(source, out, tensors, described) as folder:
        found = dataclasses.replace(found, after=(folder / WEIGHTS).stat().st_size)
        add_card(folder, base if isinstance(base, str | os.PathLike) else None, str(found).splitlines())
    return found


def decompress(adapter: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write a packed adapter as one of plain tensors, which can be trained on.

    From values="exact" it is the adapter that was compressed, bit for bit; from the others the same numbers as the
    packed one has, in float32.

    Args:
        adapter: A folder or a Hub id.
        out: The folder to write; it must not exist, or be empty.

    Raises:
        IsolateError: See the message; nothing was written.
    """
    source = Alone(adapter)
    if source.config.packed is None:
        raise IsolateError(f"{source.name!r} is not packed: it can be trained on as it is")
    packings = source.config.packings(source.recorded())
    described = _Described(source, None)
    tensors = source.carried()
    for parameter in source.parameters:
        delta = source.delta(parameter)
        content = unpack(delta.state["packed"], packings[parameter])
        tensors |= {source.key(parameter, name): t for name, t in delta.state.items() if name != "packed"}
        places = {}
        for name in delta.places:
            exact = source.config.packed == "exact"
            tensors[source.key(parameter, name)] = content[name] if exact else content[name].float()
            places[name] = storable(delta.selection(name))
            if isinstance(place := places[name], StoredSelection):
                assert place.data is not None
                tensors[source.key(parameter, f"{name}_codes")] = place.data
        described.add(parameter, places)
    with _written(source, out, tensors, described) as folder:
        add_card(folder)


def _numbers_of(base: Any, source: Adapter) -> Mapping[str, torch.Tensor] | None:
    """The base's numbers, which are the adapter's own base's as far as its fingerprint can tell."""
    if base is None:
        named = source.config.base_model_name_or_path
        if not named or not os.path.isdir(named):
            return None
        try:
            checkpoint = Checkpoint(named, source.class_name)
            source.check_base(checkpoint)
            source.config.recorded({name: tuple(checkpoint.parameters[name].shape) for name in checkpoint})
        except IsolateError as error:
            logger.warning("which effective weights change was not counted: %s", error)
            return None
        return checkpoint
    if isinstance(base, Mapping):
        return base
    checkpoint = Checkpoint(base, source.class_name)
    source.check_base(checkpoint)
    return checkpoint


class _Described:
    """The config to be written: as it was, but for how its deltas are stored."""

    def __init__(self, source: Adapter, packed: str | None) -> None:
        self.text: dict[str, Any] = json.loads((source.folder / CONFIG).read_text(encoding="utf-8"))
        self.text["packed"] = packed
        self.text["resolved"].pop("packed", None)
        if packed is not None:
            self.text["resolved"]["packed"] = {}

    def add(self, parameter: str, places: Mapping[str, Place], n_bytes: int | None = None) -> None:
        """A delta, and the bytes it is packed in."""
        for part, name in PARTS:
            if name in places:
                self.text["resolved"][part][parameter] = places[name].to_dict()
        if n_bytes is not None:
            self.text["resolved"]["packed"][parameter] = n_bytes


class _Error:
    """How far the effective weights of packed deltas are from those of the deltas they were packed from."""

    def __init__(self) -> None:
        self.largest, self.total = 0.0, 0.0
        self.scalars = self.changed = self.moved = 0

    @torch.no_grad()
    def add(self, parameter: str, delta: Delta, packed: Delta, base: Mapping[str, torch.Tensor] | None) -> None:
        """One parameter's."""
        names, pairs = list(delta.places), zip(delta.parts(), packed.parts(), strict=True)
        for name, (old, new) in zip(names, pairs, strict=True):
            error = (new.numbers - old.numbers).abs_()
            if old.damped:
                error = error * old.factor
            error = delta.zero_holes(name, error)
            if error.numel():
                self.largest = max(self.largest, error.max().item())
                self.total += error.sum(dtype=torch.float64).item()
            self.scalars += delta.selection(name).count
        if base is not None:
            if parameter not in base:
                raise IsolateError(f"the base has no {parameter!r}, which the adapter changes: is it another model?")
            w0 = base[parameter]
            check_shape(parameter, delta.shape, {parameter: tuple(w0.shape)})
            effective = compose(w0, packed.terms())
            self.changed += int((compose(w0, delta.terms()) != effective).sum())
            self.moved += int((effective != w0).sum())


def _with_codes(delta: Delta, name: str) -> Place:
    """A place of a delta that was loaded, with its positions."""
    place = delta.places[name]
    if isinstance(place, StoredSelection):
        return dataclasses.replace(place, data=delta.state[f"{name}_codes"])
    return place


def _beside(folder: Path) -> list[Path]:
    """The files of an adapter's folder that go along, relative: no other adapter's, nor what a link leads out to."""
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        left = any(fnmatch(part, pattern) for part in relative.parts for pattern in LEFT_BEHIND)
        if left or not path.is_file() or (path.parent != folder and (path.parent / CONFIG).exists()):
            continue
        target = path.resolve()
        # In the Hub's cache every file is a link to a blob.
        if target.is_relative_to(folder) or (path.is_symlink() and target.parent.name == "blobs"):
            found.append(relative)
    return found


@contextmanager
def _written(
    source: Adapter, out: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], described: _Described
) -> Iterator[Path]:
    """The new folder, with everything but its card."""
    with write_folder(out) as folder:
        for relative in _beside(source.folder.resolve()):
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / relative, folder / relative)
        save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(described.text, indent=2, sort_keys=True), encoding="utf-8")
        yield folder
