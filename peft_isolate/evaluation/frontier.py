"""The frontier between the new task and what the model could before, from one trained adapter: scores over α."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..deltas.about.text import table_lines
from ..deltas.scale import as_alpha
from ..deltas.terms import as_finite
from ..errors import FormatError, IsolateError
from ..regions.files import check_there, write_text
from .dial import Change, Dial, Score, as_alphas, named
from .scorers import SPECIALITY, VERSATILITY, is_number

ALPHAS = tuple(i / 10 for i in range(11))

_FORMAT, _VERSION = "peft_isolate.frontier", 1


@dataclass(frozen=True)
class Point:
    """One setting of an adapter, and how the model scored there.

    Attributes:
        alpha: α in `W0 + α·Δ`.
        changes: {name of a change: its value}, in the order in which they are applied; None where it is left out.
        speciality: Score on the new task; higher is better.
        versatility: Score on what the model could before; higher is better.
    """

    alpha: float
    changes: Mapping[str, Any]
    speciality: float
    versatility: float

    @property
    def place(self) -> str:
        """Where it is, without the scores."""
        acting = [f"{name} = {value}" for name, value in self.changes.items() if value is not None]
        return ", ".join([f"α = {self.alpha:g}", *acting])

    def __str__(self) -> str:
        return f"{self.place}: speciality {self.speciality:.4f}, versatility {self.versatility:.4f}"


@dataclass(frozen=True)
class Frontier:
    """What `frontier` measured: `print(it)`, `it.best(versatility=…)`, `it.plot(path)`.

    Attributes:
        points: In the order of measuring: α runs fastest, then the last change.
        adapter: Digest of the adapter's region and numbers.
        adapter_name: What it was called.
        functions: {name of a change: the function}; not saved.
    """

    points: tuple[Point, ...]
    adapter: str
    adapter_name: str = "default"
    functions: Mapping[str, Change] = field(default_factory=dict, compare=False, repr=False)

    def is_best_of_both(self, point: Point) -> bool:
        """Whether no other point is as good on both scores and better on one: what is worth choosing from."""
        return not any(
            other.speciality >= point.speciality
            and other.versatility >= point.versatility
            and (other.speciality, other.versatility) != (point.speciality, point.versatility)
            for other in self.points
        )

    @property
    def table(self) -> str:
        """A line a point; "*" where no other point is as good on both scores and better on one."""
        names = list(self.points[0].changes)
        rows = [
            [
                *("-" if point.changes[name] is None else str(point.changes[name]) for name in names),
                f"{point.alpha:g}",
                f"{point.speciality:.4f}",
                f"{point.versatility:.4f}",
                "*" if self.is_best_of_both(point) else "",
            ]
            for point in self.points
        ]
        return "\n".join(table_lines([*names, "alpha", SPECIALITY, VERSATILITY, ""], rows))

    def __str__(self) -> str:
        return f"{self.table}\n* no other point is as good on both scores and better on one"

    def best(self, *, speciality: float | None = None, versatility: float | None = None) -> Point:
        """The best point that stated floors allow.

        With a floor on one score it is the point with the highest other score; with both the one with the highest sum,
        so give both on one scale. Of equal ones the better on the score with the floor, then the smaller |α|, since
        nearer to the base less has changed that nobody measured; then the earlier in `points`.

        Args:
            speciality: The new task's score shall be at least this.
            versatility: The score on what the model could before shall be at least this.

        Raises:
            IsolateError: No floor is given, one is no finite number, or no point reaches them.
        """
        floors = {
            name: floor for name, floor in ((SPECIALITY, speciality), (VERSATILITY, versatility)) if floor is not None
        }
        if not floors:
            raise IsolateError(
                "best() needs a floor: speciality=0.8 asks for the most versatile point that scores at least 0.8 on "
                "the new task, versatility= the other way round"
            )
        for name, floor in floors.items():
            if (number := as_finite(floor)) is None:
                raise IsolateError(f"{name}={floor!r} is no floor: give a finite number on the scale of the scores")
            floors[name] = number
        allowed = [p for p in self.points if all(_reaches(getattr(p, name), floors[name]) for name in floors)]
        if not allowed:
            raise self._unreachable(floors)

        def rank(point: Point) -> tuple[float, ...]:
            if len(floors) == 2:
                return (point.speciality + point.versatility, -abs(point.alpha))
            scores = (point.versatility, point.speciality)
            return (*(scores if SPECIALITY in floors else reversed(scores)), -abs(point.alpha))

        return max(allowed, key=rank)  # the first of several

    def _unreachable(self, floors: Mapping[str, float]) -> IsolateError:
        """Says how far one gets."""
        asked = " and ".join(f"{name} ≥ {floor:g}" for name, floor in floors.items())
        reached = [max(self.points, key=lambda point, name=name: getattr(point, name)) for name in floors]  # type: ignore[misc]
        tops = "; ".join(f"the best {name} is at {point}" for name, point in zip(floors, reached, strict=True))
        return IsolateError(f"no point has {asked}: {tops}. Lower a floor, or measure more points")

    def apply(self, model: nn.Module, point: Point, *, adapter_name: str | None = None) -> None:
        """Put a model at a point for good: the changes, then α. (α is not saved with an adapter, see `set_scale`.)

        Args:
            model: With the adapter that was measured, unchanged.
            point: One of `points`.
            adapter_name: What the adapter is called in this model; None for `self.adapter_name`.

        Raises:
            IsolateError: It is another adapter, or another point, or a change fails; the adapter is as it was.
        """
        dial = self._dial(model, point, adapter_name)
        with dial.kept(numbers=_any_change(point.changes), on_error_only=True):
            dial.apply(point.changes)
            dial.set(point.alpha)

    def report(self, model: nn.Module, test_score: Score, point: Point, *, adapter_name: str | None = None) -> Point:
        """Score the chosen point on held-out test data: chosen on validation, reported on test.

        `test_score` is called once, at this point alone: the best of many on the data it was chosen by is too good to
        be true.

        Args:
            model: With the adapter that was measured. As before afterwards, bit for bit.
            test_score: As for `frontier`, on data that nothing was chosen by.
            point: One of `points`, most often what `best` gave.
            adapter_name: As for `apply`.

        Returns:
            The point with the test scores.

        Raises:
            IsolateError: As `apply` and `frontier` do.
        """
        dial = self._dial(model, point, adapter_name)
        with dial.kept(numbers=_any_change(point.changes)):
            dial.apply(point.changes)
            dial.set(point.alpha)
            return Point(point.alpha, point.changes, *dial.scores(test_score, point.place))

    def _dial(self, model: nn.Module, point: Point, adapter_name: str | None) -> Dial:
        if point not in self.points:
            raise IsolateError(f"{point} is no point of this frontier: take one of its points, such as best(…) gives")
        name = self.adapter_name if adapter_name is None else adapter_name
        dial = Dial(model, list(self.functions.values()), name)
        if dial.digest() != self.adapter:
            raise IsolateError(
                f"the adapter {name!r} is not the one that was measured: its region or its numbers are others. Load "
                "that adapter (in the dtype it had), or measure this one by frontier(…)"
            )
        return dial

    def to_dict(self) -> dict[str, Any]:
        """All of it but the functions, as JSON has it."""
        points = [asdict(point) for point in self.points]
        content = {"adapter": self.adapter, "adapter_name": self.adapter_name, "points": points}
        return {"format": _FORMAT, "version": _VERSION} | content

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all. Missing folders are made."""
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], changes: Iterable[Change] = ()) -> Frontier:
        """Read what `save` wrote.

        Args:
            path: The file.
            changes: The functions that the points' changes are called after, such as half_reset and prune: `apply`
                and `report` need those that a point uses.

        Raises:
            FormatError: The file is damaged, of another version, or something else.
            IsolateError: There is no such file, or the changes are no functions, each of a name of its own.
        """
        functions = named(changes)
        check_there(path, "pass the path of a saved frontier, or measure one and save it there")
        try:
            if os.path.isdir(path):
                raise ValueError("it is a folder")
            found = json.loads(Path(path).read_bytes())
            if (found["format"], found["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"it is {found['format']!r}, version {found['version']!r}")
            points = tuple(_point(point) for point in found["points"])
            if not points or any(list(point.changes) != list(points[0].changes) for point in points):
                raise ValueError("its points have different changes, or there is none")
            if len({(point.alpha, json.dumps(point.changes)) for point in points}) < len(points):
                raise ValueError("a point stands twice in it")
            if not all(isinstance(found[name], str) for name in ("adapter", "adapter_name")):
                raise ValueError("the adapter's name or digest is no text")
            return cls(points, found["adapter"], found["adapter_name"], functions)
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise FormatError(
                f"{os.fspath(path)!r} is no saved frontier, or was damaged ({type(error).__name__}: {error}); restore "
                "it, or measure again"
            ) from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw both scores over α, and versatility over speciality; see `plot_frontier`. Needs the extra `plots`."""
        from .frontier_plot import plot_frontier

        plot_frontier(self, path)


def frontier(
    model: nn.Module,
    score: Score,
    alphas: Iterable[float] = ALPHAS,
    *,
    changes: Mapping[Change, Sequence[Any]] | None = None,
    adapter_name: str = "default",
) -> Frontier:
    """Score one trained adapter at several α: how much of the new task costs how much of the old ability.

    The points are the product of the α and of every change's values. At each the changes are applied to the adapter in
    the order of the mapping, then α is set, then the model is scored, in eval mode and from the same random states.
    At α = 0 every change leaves the same model, which is scored once. Afterwards the adapter's numbers and its α are
    as they were, bit for bit, whatever was raised. That takes no memory for α alone; changes take a copy of the
    adapter's numbers.

    Choose a point by `best`, on validation data, then measure that one on test data by `report`.

    Args:
        model: With a trained adapter of this library, active and not merged. Other adapters stay as they are.
        score: Gives {"speciality": …, "versatility": …}, higher is better, as `Scores` does.
        alphas: See `set_scale`.
        changes: {function of (model, value) that writes numbers of the adapter in place: its values}, such as
            `{half_reset: (None, 0.25, 0.5), prune: (None, 10, 1)}`. The value None leaves a change out; others are
            numbers, texts or flags. A function with a parameter `adapter_name` is given it; any other must write to
            this adapter by itself.
        adapter_name: The adapter.

    Raises:
        IsolateError: There is no such adapter of this library (of LoRA it names PEFT's own way), it is merged,
            inactive or sharded, an argument is of another kind, or a score is missing, NaN or infinite: then the
            message names the point.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_isolate import HalfFTConfig
        >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), HalfFTConfig(target_modules=["0"]))
        >>> frontier(model, lambda model: {"speciality": 0.5, "versatility": 1.0}, alphas=(0, 1)).best(speciality=0.5)
        Point(alpha=0.0, changes={}, speciality=0.5, versatility=1.0)
    """
    if not callable(score):
        raise IsolateError(f"score={score!r}: pass a callable that takes the model, such as evaluation.Scores(…)")
    wanted = as_alphas(alphas)
    if not isinstance(changes, Mapping | None):
        raise IsolateError(f"changes={changes!r}: give {{function: values}}, such as {{prune: (None, 10)}}")
    given = dict(changes or {})
    dial = Dial(model, list(given), adapter_name)
    settings = dict(zip(dial.changes, map(_values, dial.changes, given.values()), strict=True))
    for alpha in wanted:
        dial.check(alpha)
    digest = dial.digest()
    points: list[Point] = []
    base: tuple[float, float] | None = None
    for values in itertools.product(*settings.values()):
        setting = dict(zip(settings, values, strict=True))
        with dial.kept(numbers=_any_change(setting)):
            dial.apply(setting)
            for alpha in wanted:
                if alpha == 0.0 and base is not None:
                    points.append(Point(alpha, setting, *base))
                    continue
                dial.set(alpha)
                scores = dial.scores(score, Point(alpha, setting, 0.0, 0.0).place)
                base = scores if alpha == 0.0 else base
                points.append(Point(alpha, setting, *scores))
    return Frontier(tuple(points), digest, adapter_name, dial.changes)


def _values(name: str, values: Any) -> tuple[Any, ...]:
    """The values of a change, each once."""
    found = () if isinstance(values, str) or not isinstance(values, Iterable) else tuple(values)
    if not found or not all(_is_plain(value) for value in found) or len({json.dumps(v) for v in found}) < len(found):
        raise IsolateError(
            f"{name}={values!r}: give its values, each once: numbers, texts, flags, or None to leave the change out"
        )
    return found


def _any_change(setting: Mapping[str, Any]) -> bool:
    return any(value is not None for value in setting.values())


def _reaches(score: float, floor: float) -> bool:
    """Up to rounding: 0.1 · 3 is 0.3 and a bit."""
    return score >= floor or math.isclose(score, floor, rel_tol=1e-9)


def _is_plain(value: Any) -> bool:
    """Whether JSON gives it back as it is."""
    return value is None or isinstance(value, str | bool) or is_number(value)


def _point(content: Mapping[str, Any]) -> Point:
    point = Point(**content)
    changes = point.changes
    if not isinstance(changes, dict) or not all(map(_is_plain, changes.values())):
        raise ValueError(f"the changes {changes!r} of a point are of another kind")
    if not all(map(is_number, (point.alpha, point.speciality, point.versatility))):
        raise ValueError(f"a number of the point {content!r} is none")
    return Point(as_alpha(point.alpha), changes, float(point.speciality), float(point.versatility))
