"""The tasks of a run: their rows, what is held out of them, and the samples that probes and later stages train on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ....errors import IsolateError
from ....evaluation.rows import Rows, positive
from ....training.arguments import trainable_rows
from .layout import check_names

Row = Mapping[str, Any]
# The paper's sizes, where its text names none a choice of ours: docs/core_isolation.md.
SHARE, AT_MOST = 0.1, 1000
HELD_OUT_SHARE, HELD_OUT_AT_MOST = 0.05, 500
# What TRL reads of a row beside the text itself.
_BESIDE = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: Also of its folders.
        train: Rows to train on.
        test: Rows to score on.
        held_out: Whether the test rows were taken from what was given to train on.
        fields: What rows are trained by: "prompt" and "completion", "text", or "messages".
        digest: Of all the rows, as they were given.
    """

    name: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]
    held_out: bool
    fields: tuple[str, ...]
    digest: str


def read_tasks(given: Any, seed: int, together: bool = True) -> tuple[Task, ...]:
    """The tasks, with their rows in memory.

    Args:
        given: {name: rows, a JSONL file, or {"train": …, "test": …} of either}; or pairs of these.
        seed: Of what is held out.
        together: Whether tasks may share a group, and so a training.

    Raises:
        IsolateError: There are none, or one alone; names clash; a task has no rows, or some that cannot be trained on.
        FormatError: A line of a file is no JSON object.
    """
    pairs = _pairs(given)
    names = check_names(name for name, _ in pairs)
    if not names:
        raise IsolateError("tasks is empty: name at least two, each with its rows")
    if len(names) == 1:
        raise IsolateError(
            f"one task, {names[0]!r}: there is nothing to group, to fuse or to keep apart; train it with "
            "CoreIsolationConfig() alone"
        )
    tasks = tuple(_task(name, data, seed) for name, data in pairs)
    kinds = {task.name: _kind(task) for task in tasks}
    first = tasks[0].name
    for name, kind in kinds.items():
        if together and kind != kinds[first]:
            raise IsolateError(
                f"the rows of task {first!r} are {kinds[first]}, those of {name!r} {kind}: tasks that come to share a "
                "group are trained together; write all alike, or keep each alone (threshold=None)"
            )
    return tasks


def probe_rows(task: Task, seed: int, n_rows: int | None) -> list[Row]:
    """What a probe trains on: a tenth of the rows or 1,000, the larger; at most all.

    Args:
        task: Of which.
        seed: Of the draw.
        n_rows: Another number.
    """
    wanted = max(round(SHARE * len(task.train)), AT_MOST) if n_rows is None else n_rows
    return _drawn(task, wanted, f"{seed}, {task.name}, probe")


def sample_size(tasks: Iterable[Task], n_rows: int | None) -> int:
    """Rows of each task in a balanced sample: a tenth of the smallest task or 1,000, the smaller; at least one.

    Raises:
        IsolateError: `n_rows` are more than a task has.
    """
    smallest = min(tasks, key=lambda task: len(task.train))
    if n_rows is None:
        return min(max(1, round(SHARE * len(smallest.train))), AT_MOST)
    if n_rows > len(smallest.train):
        raise IsolateError(
            f"sample={n_rows} rows of each task, but {smallest.name!r} has {len(smallest.train)} to train on: use at "
            "most these, so that the sample is balanced"
        )
    return n_rows


def sample_rows(task: Task, seed: int, n_rows: int) -> list[Row]:
    """A task's part of the balanced sample."""
    return _drawn(task, n_rows, f"{seed}, {task.name}, sample")


def for_training(rows: Iterable[Row], fields: Iterable[str]) -> list[dict[str, Any]]:
    """The rows with what TRL reads of them, and nothing that differs from task to task."""
    wanted = (*fields, *_BESIDE)
    return [{name: row[name] for name in wanted if name in row} for row in rows]


def check_sizes(probe: Any, sample: Any) -> None:
    """Refuse numbers of rows that are none."""
    positive("probe_rows", probe, optional=True)
    positive("sample", sample, optional=True)


def _pairs(given: Any) -> list[tuple[Any, Any]]:
    if isinstance(given, Mapping):
        return list(given.items())
    try:
        return [(name, data) for name, data in given]
    except (TypeError, ValueError) as error:
        raise IsolateError(f"tasks is a {type(given).__name__}: pass {{name: rows}}") from error


def _task(name: str, data: Any, seed: int) -> Task:
    where = f"task {name!r}"
    if not isinstance(data, Mapping):
        rows, fields = _rows(data, where)
        return Task(name, *_split(rows, name, seed), True, fields, _digest(rows))
    if unknown := sorted(str(key) for key in data if key not in ("train", "test")):
        raise IsolateError(f"{where} has the parts {unknown}: name them 'train' and 'test'")
    if "train" not in data:
        raise IsolateError(f"{where} has the parts {sorted(data)}: 'train' must be among them")
    rows, fields = _rows(data["train"], f"{where}, train")
    if data.get("test") is None:
        return Task(name, *_split(rows, name, seed), True, fields, _digest(rows))
    test, test_fields = _rows(data["test"], f"{where}, test")
    if test_fields != fields:
        raise IsolateError(f"{where} has {list(fields)} in its train part, {list(test_fields)} in its test part")
    return Task(name, tuple(rows), tuple(test), False, fields, _digest(rows, test))


def _digest(*parts: Iterable[Row]) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        for row in part:
            hashed.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        hashed.update(b"\0")
    return hashed.hexdigest()[:16]


def _rows(data: Rows, where: str) -> tuple[list[Row], tuple[str, ...]]:
    try:
        rows, fields = trainable_rows(data, where)
    except IsolateError as error:
        said = str(error)
        raise type(error)(said if said.startswith(where) else f"{where}: {said}") from error
    return rows, fields


def _split(rows: list[Row], name: str, seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(what is trained on, what is held out): a twentieth, at least one row, at most 500."""
    if len(rows) < 2:
        raise IsolateError(
            f"task {name!r} has one row, none of which could be held out to score on: give more, or a 'test' part"
        )
    n_held = min(max(1, round(HELD_OUT_SHARE * len(rows))), HELD_OUT_AT_MOST)
    held = set(random.Random(f"{seed}, {name}, test").sample(range(len(rows)), n_held))
    return (
        tuple(row for i, row in enumerate(rows) if i not in held),
        tuple(row for i, row in enumerate(rows) if i in held),
    )


def _drawn(task: Task, n_rows: int, seed: str) -> list[Row]:
    """Some of a task's rows, in their order."""
    if n_rows >= len(task.train):
        return list(task.train)
    return [task.train[i] for i in sorted(random.Random(seed).sample(range(len(task.train)), n_rows))]


def _kind(task: Task) -> str:
    """How its rows are written: the fields, and whether they are text or messages."""
    kinds = {type(row[field]).__name__ for row in (*task.train, *task.test) for field in task.fields}
    if len(kinds) > 1:
        raise IsolateError(f"task {task.name!r} has text in some rows and messages in others: make them alike")
    return f"{' and '.join(task.fields)} as {'text' if kinds == {'str'} else 'messages'}"
