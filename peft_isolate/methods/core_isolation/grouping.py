"""CPI-FT's steps 3 and 4: which tasks share a stage, since their core regions overlap, and which stage comes when."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...deltas.about.text import table_lines
from ...errors import FormatError, IsolateError, RegionError
from ...regions.files import check_there, write_text
from ...regions.overlap import Counts, overlaps, shapes_of_all
from ...regions.region import Region

FORMAT = "peft_isolate.groups/1"

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class Grouping:
    """Which tasks are trained together.

    Attributes:
        tasks: Their names.
        groups: The same names in groups, in the order in which these are trained.
        jaccard: float64 (n, n), symmetric, read-only: |C_i ∩ C_j| / |C_i ∪ C_j| of the tasks' core regions C.
        threshold: From which on two tasks are linked; None where each stands alone.
        chance: What `jaccard` would be for random regions of these sizes, on average of the pairs; 0 for one task.
        sizes: Scalars of each task's core region.
    """

    tasks: tuple[str, ...]
    groups: Groups
    jaccard: np.ndarray[Any, np.dtype[np.float64]]
    threshold: float | None
    chance: float
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        own = np.array(self.jaccard, np.float64)
        own.flags.writeable = False
        object.__setattr__(self, "jaccard", own)

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, Grouping) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.tasks, self.groups))

    def __str__(self) -> str:
        """A line a task: its group, and its Jaccard with the tasks of the columns, which are called by number."""
        group_of = {task: number for number, group in enumerate(self.groups, 1) for task in group}
        header = ["", "group", "task", "core", *(str(number) for number in range(1, len(self.tasks) + 1))]
        rows = [
            [str(i + 1), str(group_of[task]), task, f"{size:,}", *(f"{value:.4f}" for value in self.jaccard[i])]
            for i, (task, size) in enumerate(zip(self.tasks, self.sizes, strict=True))
        ]
        linked = "each alone" if self.threshold is None else f"linked from a Jaccard of {self.threshold:g} on"
        lines = table_lines(header, rows)
        lines.append(f"groups    {len(self.groups)}, {linked}: {'; '.join(', '.join(g) for g in self.groups)}")
        if len(self.tasks) > 1:
            lines.append(f"chance    {self.chance:.4f}, the Jaccard of random regions of these sizes")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "format": FORMAT,
            "tasks": list(self.tasks),
            "groups": [list(group) for group in self.groups],
            "threshold": self.threshold,
            "chance": self.chance,
            "sizes": list(self.sizes),
            "jaccard": self.jaccard.tolist(),
        }

    @classmethod
    def from_dict(cls, described: Any) -> Grouping:
        """The inverse of `to_dict`.

        Raises:
            FormatError: It is something else.
        """
        try:
            return cls._of(described)
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            raise FormatError(
                f"this is no grouping of tasks ({type(error).__name__}: {error}): restore it, or group the tasks again"
            ) from error

    @classmethod
    def _of(cls, described: Any) -> Grouping:
        if described["format"] != FORMAT:
            raise ValueError(f"its format is {described['format']!r}, not {FORMAT!r}")
        tasks, groups = _names(described["tasks"]), tuple(_names(group) for group in described["groups"])
        sizes, jaccard = described["sizes"], described["jaccard"]
        if not tasks or sorted(task for group in groups for task in group) != sorted(tasks) or () in groups:
            raise ValueError("the groups are not made of the tasks, each once")
        n = len(tasks)
        if len(sizes) != n or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"sizes {sizes!r} are not one for each task")
        if len(jaccard) != n or not all(len(row) == n and all(map(_is_share, row)) for row in jaccard):
            raise ValueError("the Jaccard indices are not shares of each task with each")
        if any(jaccard[i][j] != jaccard[j][i] for i in range(n) for j in range(i)):
            raise ValueError("the Jaccard indices are not symmetric")
        threshold, chance = described["threshold"], described["chance"]
        if not _is_share(chance) or not (threshold is None or _is_share(threshold)):
            raise ValueError(f"threshold {threshold!r} or chance {chance!r} is no share")
        return cls(tasks, groups, np.array(jaccard, np.float64), threshold, chance, tuple(sizes))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it as JSON, whole or not at all. Missing folders are made."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        write_text(path, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Grouping:
        """Read what `save` wrote.

        Raises:
            IsolateError: There is no such file.
            FormatError: The file is damaged, of another version, or something else.
        """
        check_there(path, "pass the path of a saved grouping, or save one there first")
        content = Path(path).read_bytes()
        try:
            return cls.from_dict(json.loads(content))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{os.fspath(path)!r} is no readable file of groups: {error}") from error

    def plot(self, path: str | os.PathLike[str], title: str = "Jaccard of core regions") -> None:
        """Draw the tasks × tasks matrix, group by group, each group outlined. See `plot_similarity`."""
        from ...regions.plots import plot_similarity

        order = [self.tasks.index(task) for group in self.groups for task in group]
        plot_similarity(
            self.jaccard[np.ix_(order, order)].tolist(),
            [self.tasks[i] for i in order],
            path,
            title,
            blocks=[len(group) for group in self.groups],
            marks={"chance": self.chance} | ({} if self.threshold is None else {"linked": self.threshold}),
        )


def group_tasks(
    regions: Mapping[str, Region | str | os.PathLike[str]],
    threshold: float | None = 0.1,
    *,
    order: Sequence[str] | None = None,
    seed: int = 0,
    total: int | None = None,
) -> Grouping:
    """Group tasks whose core regions overlap: the connected components of the graph with an edge where S_ij ≥ τ.

    A core region that is packed, or comes from a file, takes about a byte a scalar.

    Args:
        regions: {task: its core region, or the file of one}, all of one model.
        threshold: τ, from 0 to 1: the Jaccard index S_ij from which on two tasks are linked; the paper's is 0.1. 0
            links all tasks to one group; None leaves each alone, which is the paper's "no grouping" (called τ = 0).
        order: Every task once: groups come as their first task does in it, and so do the tasks within a group. None
            for the paper's random order of groups, with the tasks of a group in the order of `regions`.
        seed: Of the random order, and of nothing else.
        total: Scalars that a core is chosen among (D), for the chance level. None for all of the tensors that any
            region touches.

    Raises:
        RegionError: A region is empty, or of another model than an earlier one: the parameter, both tasks and shapes.
        IsolateError: There is no region, or no file of one; or threshold, order, seed or total is none that can be.
        FormatError: A file is no region.

    Example:
        >>> from peft_isolate.regions import Selection
        >>> cores = {
        ...     task: Region({"w": Selection.elements((40, 40), range(start, start + 100))})
        ...     for task, start in {"maths": 0, "chat": 1000, "code": 50}.items()
        ... }
        >>> group_tasks(cores, order=["chat", "code", "maths"]).groups
        (('chat',), ('code', 'maths'))
    """
    if not regions:
        raise IsolateError("there is no region to group: pass one for each task, {task: region}")
    given = tuple(regions)
    threshold, order = check_options(given, threshold, order, seed)
    opened = {task: _region(task, regions[task]) for task in given}
    shapes = shapes_of_all({f"the region of {task!r}": region for task, region in opened.items()})
    counts = overlaps(list(opened.values()))
    jaccard = _jaccard(counts)
    scalars = _checked_total(total, sum(map(math.prod, shapes.values())), counts)

    ordered = given if order is None else order
    indices = {task: i for i, task in enumerate(given)}
    groups = [
        tuple(ordered[i] for i in group)
        for group in _components(jaccard[np.ix_(*[[indices[task] for task in ordered]] * 2)], threshold)
    ]
    if order is None:
        random.Random(seed).shuffle(groups)
    sizes = tuple(counts.diagonal().tolist())
    return Grouping(given, tuple(groups), jaccard, threshold, _chance(sizes, scalars), sizes)


def check_options(
    tasks: Sequence[str], threshold: Any, order: Any, seed: Any
) -> tuple[float | None, tuple[str, ...] | None]:
    """(threshold, order) of `group_tasks` in their normal form, without a look at any region. Raises as it does."""
    return _checked_threshold(threshold), _checked_order(tasks, order, seed)


def _checked_threshold(threshold: Any) -> float | None:
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise IsolateError(
            f"threshold={threshold!r}: give a Jaccard index from 0 (one group) to 1 (equal regions alone), or None "
            "for each task alone"
        )
    return float(threshold)


def check_tasks(tasks: Iterable[Any]) -> None:
    """Raise `IsolateError` unless all of these are names of tasks."""
    for task in tasks:
        if not isinstance(task, str) or not task:
            raise IsolateError(f"{task!r} is no name of a task: give a text that is not empty")


def _checked_order(tasks: Sequence[str], order: Any, seed: Any) -> tuple[str, ...] | None:
    check_tasks(tasks)
    if type(seed) is not int:
        raise IsolateError(f"seed={seed!r}: give a whole number")
    if order is None:
        return None
    names = tuple(order) if isinstance(order, Iterable) and not isinstance(order, str) else (order,)
    if isinstance(order, str) or sorted(names, key=repr) != sorted(tasks, key=repr):
        raise IsolateError(f"order={order!r} must be a list that names every task once: {', '.join(map(repr, tasks))}")
    return names


def _region(task: str, region: Any) -> Region:
    if isinstance(region, str | os.PathLike):
        check_there(region, "core_region(…).save(path) writes one", f"regions[{task!r}]=")
        region = Region.load(region)
    if not isinstance(region, Region):
        raise IsolateError(f"{task!r}: {type(region).__name__} is no region; give a Region or the path of its file")
    if not region.count:
        raise RegionError(
            f"the region of {task!r} is empty, so it overlaps with none: leave the task out, or choose its core "
            "region anew from a probe that moved"
        )
    return region


def _jaccard(counts: Counts) -> np.ndarray[Any, np.dtype[np.float64]]:
    sizes = counts.diagonal()
    return counts / (sizes[:, None] + sizes[None, :] - counts)


def _checked_total(total: Any, touched: int, counts: Counts) -> int:
    if total is None:
        return touched
    sizes = counts.diagonal()
    union = int((sizes[:, None] + sizes[None, :] - counts).max())
    if type(total) is not int or total < union:
        raise IsolateError(
            f"total={total!r}: give the number of scalars that the regions were chosen among; two of them select "
            f"{union:,} already"
        )
    return total


def _components(jaccard: np.ndarray[Any, Any], threshold: float | None) -> list[list[int]]:
    """Connected components, by their first members; members ascending."""
    n = len(jaccard)
    linked = np.eye(n, dtype=bool) if threshold is None else jaccard >= threshold
    seen: set[int] = set()
    components = []
    for start in range(n):
        if start in seen:
            continue
        component, frontier = {start}, [start]
        while frontier:
            reached = set(np.flatnonzero(linked[frontier.pop()]).tolist()) - component
            component |= reached
            frontier += reached
        seen |= component
        components.append(sorted(component))
    return components


def _chance(sizes: Sequence[int], total: int) -> float:
    """Mean of a·b/N / (a + b − a·b/N) over the pairs of sizes; p / (200 − p) where all are p % of N."""
    common = [(a, b, a * b / total) for i, a in enumerate(sizes) for b in sizes[:i]]
    return math.fsum(both / (a + b - both) for a, b, both in common) / len(common) if common else 0.0


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{values!r} is no list of names")
    if len(set(values)) != len(values):
        raise ValueError(f"{values!r} names one twice")
    return tuple(values)
