"""What lies in an adapter's folder, found without loading the model; and the model card that says so."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..deltas.about.card import PICTURE, card, front_matter, is_hub_name
from ..deltas.about.measure import summarise
from ..deltas.about.readme import README, read_readme, write_readme
from ..deltas.about.summary import Summary
from ..deltas.about.text import size_text
from ..deltas.delta import Delta
from ..errors import FormatError, IsolateError
from .adapter import WEIGHTS, Alone
from .architecture import folder_of, meta_model
from .exact import FILE, is_exact, open_exact
from .shards import read_header

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"
# A long training logs some MB; what is larger is none.
LARGEST_STATE = 2**28


@dataclass(frozen=True)
class Training:
    """What a trainer's state says of the run that an adapter is of.

    Attributes:
        steps: Optimizer steps.
        epochs: Passes over the data; None where it does not say.
        loss: The last training loss that was logged, and at which step.
        evaluations: (step, {metric: value}) of each evaluation.
        best_metric: Of the best checkpoint, by what the trainer was told to compare.
    """

    steps: int
    epochs: float | None
    loss: tuple[int, float] | None
    evaluations: tuple[tuple[int, dict[str, float]], ...]
    best_metric: float | None

    def lines(self) -> list[str]:
        """Each of them in a sentence."""
        found = [f"trained for {self.steps:,} steps" + ("" if self.epochs is None else f", {self.epochs:.3g} epochs")]
        if self.loss is not None:
            found.append(f"training loss {self.loss[1]:.4g}, logged last, at step {self.loss[0]:,}")
        losses = [(step, metrics["eval_loss"]) for step, metrics in self.evaluations if "eval_loss" in metrics]
        if losses:
            first, last = losses[0], losses[-1]
            before = f"{first[1]:.4g} at step {first[0]:,}, " if len(losses) > 1 else ""
            found.append(f"evaluation loss {before}{last[1]:.4g} at step {last[0]:,}")
        if self.best_metric is not None:
            found.append(f"best metric {self.best_metric:.4g}, of the checkpoint that the trainer called its best")
        return found

    def as_plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        plain = vars(self) | {"evaluations": [{"step": step} | metrics for step, metrics in self.evaluations]}
        return {name: _finite(value) for name, value in plain.items()}


@dataclass(frozen=True)
class Inspection:
    """An adapter's folder: `print(inspect("adapter"))`.

    Attributes:
        summary: Of the adapter.
        training: Of the run, where the folder has a trainer's state.
        carried: {tensor in the adapter's file: bytes} of what is no delta: modules_to_save, embeddings, token rows.
        files: {file of the folder: bytes}.
    """

    summary: Summary
    training: Training | None
    carried: dict[str, int]
    files: dict[str, int]

    def __str__(self) -> str:
        lines = [str(self.summary), *_file_lines(self.files)]
        if self.carried:
            lines.append(f"carried   {len(self.carried)} tensors, {size_text(sum(self.carried.values()))}, no deltas")
        lines += [f"training  {line}" for line in (self.training.lines() if self.training else ())]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw how far the region moved, layers × roles: see `Summary.plot`."""
        self.summary.plot(path)

    def as_plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        training = None if self.training is None else self.training.as_plain()
        beside = {"training": training, "carried": self.carried, "files": self.files}
        return {"kind": "adapter"} | self.summary.as_plain() | beside


@dataclass(frozen=True)
class ExactInspection:
    """The folder of an exact difference, whose tensors have the names of the disk.

    Attributes:
        base: What the base was called.
        changed: {tensor: bytes of its code}.
        carried: {tensor that the base does not have like this: bytes}.
        files: {file of the folder: bytes}.
        rebuilt: Names of the files that `merge` writes.
    """

    base: str
    changed: dict[str, int]
    carried: dict[str, int]
    files: dict[str, int]
    rebuilt: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"exact     difference of two checkpoints: with the base it gives back {len(self.rebuilt)} files, to the "
            "byte",
            f"changed   {len(self.changed)} tensors, {size_text(sum(self.changed.values()))} of code",
            f"carried   {len(self.carried)} tensors, {size_text(sum(self.carried.values()))}",
            f"base      {self.base or 'unknown'}, with a fingerprint",
        ]
        return "\n".join([*lines, *_file_lines(self.files)])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """There is nothing to draw: raises `IsolateError`."""
        raise IsolateError(
            "an exact difference is in steps of each tensor's own grid, which say nothing of magnitudes: extract with "
            "mode='region', and draw that"
        )

    def as_plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"kind": "exact"} | vars(self) | {"rebuilt": list(self.rebuilt)}

    def card(self) -> str:
        """The body of its model card."""
        changed, carried = size_text(sum(self.changed.values())), size_text(sum(self.carried.values()))
        return (
            f"# Exact difference to `{_in_code(self.base)}`\n\n"
            "With the base it gives back the fine-tuned checkpoint, to the byte; alone it is no model.\n\n"
            f"- {len(self.changed)} tensors differ: {changed} of code\n"
            f"- {len(self.carried)} tensors are carried whole: {carried}\n\n"
            "```sh\npeft-isolate merge BASE . --out ../tuned\n```\n\n"
            "It carries a fingerprint of the base, and checksums of all it gives back: another base is refused."
        )


def inspect(
    adapter: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, revision: str | None = None
) -> Inspection | ExactInspection:
    """What an adapter, or an exact difference, is. No weight of the base is read, and of it nothing but its config.

    Args:
        adapter: Folder or Hub id.
        base: Folder or Hub id, for roles. None: the one that the adapter's config names, where that is there and fits;
            else layer and role are what the parameters' names tell.
        revision: Of the base on the Hub; None for the one that the config names.

    Raises:
        IsolateError: There is no adapter of this library, or no model at the base that was given.
        RegionError: The adapter is not of that base.
        FormatError: A file is damaged.
    """
    folder = folder_of(adapter)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    if is_exact(folder):
        return _inspect_exact(folder, files)
    source, remarks = Alone(adapter), []
    source.recorded()
    model = None
    try:
        model = _base_of(source, base, revision)
    except (IsolateError, OSError, ImportError) as error:
        if base is not None:
            raise
        remarks.append(f"layers and roles are by name, since no base was at hand: {error}")
    entries = read_header(source.folder / WEIGHTS)
    sizes = {key: entry.n_bytes for key, entry in entries.items()}
    carried = {key: size for key, size in sizes.items() if f".{source.prefix}" not in key}
    try:
        training = read_training(folder)
    except FormatError as error:
        training = None
        remarks.append(str(error))
    summary = summarise(
        source.config, _deltas(source), model, n_bytes=sum(sizes.values()) - sum(carried.values()),
        remarks=remarks,
    )  # fmt: skip
    return Inspection(summary, training, carried, files)


def add_card(
    folder: Path, base: str | os.PathLike[str] | None = None, measured: Sequence[str] = (), picture: bool = True
) -> None:
    """`write_card` for what was just computed, of which no card's failure may lose anything: that is logged."""
    try:
        write_card(folder, base, picture, measured)
    except (ValueError, OSError) as error:
        logger.warning("the model card was not written: %s: %s", type(error).__name__, error)


def write_card(
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    picture: bool = True,
    measured: Sequence[str] = (),
) -> bool:
    """Write README.md, the model card, and `delta.png` into the folder of an adapter or an exact difference.

    A README.md that a person wrote stays; what is written above or below the marks of our own card, too.

    Args:
        folder: A folder.
        base: See `inspect`.
        picture: Draw `delta.png`, where matplotlib is installed.
        measured: Lines to be said beside what the folder tells.

    Returns:
        Whether a card was written.

    Raises:
        IsolateError: It is no folder; or as `inspect` does.
    """
    path = Path(folder)
    if not path.is_dir():
        raise IsolateError(
            f"there is no folder {os.fspath(folder)!r} to write a card into: download the adapter first"
        )
    if read_readme(path) is None:
        logger.warning("%s was written by a person, and is left as it is", path / README)
        return False
    found = inspect(path, base)
    if isinstance(found, ExactInspection):
        return write_readme(path, found.card(), functools.partial(_exact_front_matter, found.base))
    drawn = picture and _draw(found.summary, path / PICTURE)
    lines = [
        *measured,
        *(f"{file}: {size_text(size)}" for file, size in found.files.items() if file == WEIGHTS),
        *(found.training.lines() if found.training else ()),
    ]
    body = card(found.summary, measured=lines, picture=PICTURE if drawn else None)
    return write_readme(path, body, functools.partial(front_matter, found.summary))


def read_training(folder: Path) -> Training | None:
    """What the trainer's state in a folder says; None without one.

    Raises:
        FormatError: It is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > LARGEST_STATE:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        state = json.loads(path.read_text(encoding="utf-8"))
        log = [entry for entry in state.get("log_history", []) if isinstance(entry, dict)]
        losses = [(int(e["step"]), float(e["loss"])) for e in log if _are_numbers(e.get("step"), e.get("loss"))]
        evaluations = []
        for entry in log:
            metrics = {str(k): float(v) for k, v in entry.items() if str(k).startswith("eval_") and _are_numbers(v)}
            if metrics and _are_numbers(entry.get("step")):
                evaluations.append((int(entry["step"]), metrics))
        epochs, best = (state.get(key) for key in ("epoch", "best_metric"))
        return Training(
            steps=int(state["global_step"]),
            epochs=float(epochs) if _are_numbers(epochs) else None,
            loss=losses[-1] if losses else None,
            evaluations=tuple(evaluations),
            best_metric=float(best) if _are_numbers(best) else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(
            f"{str(path)!r} is no trainer's state ({type(error).__name__}: {error}): the training is not shown"
        ) from error


def _base_of(source: Alone, base: str | os.PathLike[str] | None, revision: str | None) -> nn.Module:
    """The base on the meta device. Raises `IsolateError` where there is none, or it is not the adapter's."""
    if base is None:
        base, revision = source.config.base_model_name_or_path, revision or source.config.revision
    if not base:
        raise IsolateError("the config names none")
    model = meta_model(base, source.class_name, revision)
    source.resolve(model)
    return model


def _deltas(source: Alone) -> Iterator[tuple[str, Delta, Mapping[str, torch.Tensor]]]:
    return ((parameter, source.delta(parameter), {}) for parameter in source.parameters)


def _inspect_exact(folder: Path, files: dict[str, int]) -> ExactInspection:
    _, about = open_exact(folder)
    sizes = {key: entry.n_bytes for key, entry in read_header(folder / FILE).items()}
    changed, carried = (
        {key.removeprefix(part): size for key, size in sizes.items() if key.startswith(part)}
        for part in ("code/", "tensor/")
    )
    rebuilt = (*about["headers"], *about["files"])
    return ExactInspection(str(about.get("base_name") or ""), changed, carried, files, rebuilt)


def _exact_front_matter(base: str, known: Mapping[str, Any]) -> dict[str, Any]:
    tags = known.get("tags")
    found = dict(known) | {"tags": list(dict.fromkeys([*(tags if isinstance(tags, list) else []), "peft_isolate"]))}
    return found | ({"base_model": base} if is_hub_name(base) else {})


def _draw(summary: Summary, path: Path) -> bool:
    """Whether the picture was drawn: matplotlib is an extra."""
    try:
        summary.plot(path)
    except ImportError:
        logger.info("%s was not drawn: matplotlib is not installed", path)
        return False
    return True


def _file_lines(files: Mapping[str, int]) -> list[str]:
    return [f"file      {name}, {size_text(size)}" for name, size in files.items()]


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _finite(value: Any) -> Any:
    """NaN, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _in_code(text: str) -> str:
    return " ".join(text.replace("`", "").split()) or "its base"
