"""What a search found: its trials, the path it took through them, and the config at the end."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ....errors import FormatError
from ....evaluation.scorers import is_number
from ....regions.files import check_there, write_text
from ..coarse import MODULE_GROUPS, Fractions, as_fractions, as_roles
from ..config import CoFiTuneConfig
from .journal import config_of, plain_fields

_FORMAT, _VERSION = "peft_isolate.search", 1


@dataclass(frozen=True)
class Trial:
    """One trained and scored config.

    Attributes:
        level: The level that asked for it first.
        layer_range: `(a, b]`, fractions of the depth.
        modules: Roles.
        speciality: Score on the new task; None where the trial failed.
        versatility: Score on what the model could before; None where the trial failed.
        metric: What the search maximised; None where the trial failed.
        scores: All finite numbers that the scorer returned.
        seconds: Training and scoring.
        error: "Type: message" of a failed trial.
    """

    level: str
    layer_range: Fractions
    modules: tuple[str, ...]
    speciality: float | None
    versatility: float | None
    metric: float | None
    scores: dict[str, float]
    seconds: float
    error: str | None = None

    @property
    def unified(self) -> float | None:
        """Speciality + versatility; None where the trial failed."""
        return None if self.speciality is None or self.versatility is None else self.speciality + self.versatility

    @property
    def range_name(self) -> str:
        """The range as the paper writes it."""
        return f"({self.layer_range[0]:.4g}, {self.layer_range[1]:.4g}]"

    @property
    def modules_name(self) -> str:
        """The group's name, or the roles."""
        return modules_name(self.modules)


def modules_name(modules: tuple[str, ...]) -> str:
    """The group's name, or the roles."""
    return next((name for name, roles in MODULE_GROUPS.items() if roles == modules), "+".join(modules))


@dataclass(frozen=True)
class Choice:
    """What one level compared and which it kept, as positions in the result's `trials`.

    Attributes:
        level: Its name.
        compared: The trials, those that an earlier level had run among them.
        chosen: The best of them.
    """

    level: str
    compared: tuple[int, ...]
    chosen: int


@dataclass(frozen=True)
class SearchResult:
    """What `search_region` found: `print(result)`, `result.best`.

    Attributes:
        trials: Every trial once, in the order in which the levels ask for them.
        path: What each level chose.
        best: The config of the last choice; train it on the whole data, with the soft mask on.
        metric: Name of what was maximised.
        floor: The speciality that a trial had to reach to be chosen; None without `min_speciality`.
    """

    trials: tuple[Trial, ...]
    path: tuple[Choice, ...]
    best: CoFiTuneConfig
    metric: str = "unified"
    floor: float | None = None

    def __post_init__(self) -> None:
        # Wrapping a model uses a config up, and a user may set an importance on it: what was found is kept as it is.
        object.__setattr__(self, "_best", plain_fields(self.best))

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row a trial, ready for `pandas.DataFrame`: what `Trial` has, "unified", "note", and "metric" by its name.

        The note says which levels chose it, or why none could.
        """
        return [
            {
                "level": trial.level,
                "layer_range": trial.layer_range,
                "modules": trial.modules,
                "speciality": trial.speciality,
                "versatility": trial.versatility,
                "unified": trial.unified,
                self.metric: trial.metric,
                "seconds": trial.seconds,
                "note": self._note(index),
            }
            for index, trial in enumerate(self.trials)
        ]

    def is_eligible(self, trial: Trial) -> bool:
        """Whether the trial may be chosen: it did not fail, and its speciality reaches the floor."""
        return is_eligible(trial, self.floor)

    def _note(self, index: int) -> str:
        trial = self.trials[index]
        if trial.error is not None:
            return f"failed: {trial.error.splitlines()[0][:80]}"
        if not self.is_eligible(trial):
            return f"speciality below {self.floor:.4g}"
        levels = [choice.level for choice in self.path if choice.chosen == index]
        return f"best of {', '.join(levels)}" if levels else ""

    def __str__(self) -> str:
        extra = [] if self.metric in ("unified", "speciality", "versatility") else [self.metric]
        header = ["level", "layers", "modules", "speciality", "versatility", "unified", *extra, "seconds", ""]
        lines = [header]
        for row, trial in zip(self.table, self.trials, strict=True):
            numbers = [row[name] for name in header[3:-2]]
            cells = ["-" if number is None else f"{number:.4f}" for number in numbers]
            names = [trial.level, trial.range_name, trial.modules_name]
            lines.append([*names, *cells, f"{trial.seconds:.1f}", row["note"]])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
        winner = self.trials[self.path[-1].chosen]
        text.append(f"best      {winner.modules_name} in {winner.range_name}, {self.metric} {winner.metric:.4f}")
        # The search keeps what is best at each level, as the paper's; a wider region may have scored higher.
        rivals = [trial for trial in self.trials if self.is_eligible(trial)]
        top = max(rivals, key=lambda trial: -math.inf if trial.metric is None else trial.metric)
        if top.metric is not None and winner.metric is not None and top.metric > winner.metric:
            text.append(f"(higher at an earlier level: {top.modules_name} in {top.range_name}, {top.metric:.4f})")
        return "\n".join(text)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it as JSON, whole or not at all. Missing folders are made."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "metric": self.metric,
            "floor": self.floor,
            "best": self._best,  # type: ignore[attr-defined]
            "path": [asdict(choice) for choice in self.path],
            "trials": [asdict(trial) for trial in self.trials],
        }
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SearchResult:
        """Read what `save` wrote.

        Raises:
            FormatError: The file is damaged, of another version, or something else.
        """
        check_there(path, "pass the path of a saved result, or search and save one there")
        content = Path(path).read_bytes()
        try:
            return cls._of(json.loads(content))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
            raise FormatError(
                f"{path} is no result of a search, or was damaged ({type(error).__name__}: {error}); restore it, or "
                "search again with the same output: what its records hold is not trained again"
            ) from error

    @classmethod
    def _of(cls, content: Mapping[str, Any]) -> SearchResult:
        if (content["format"], content["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"it is {content['format']!r}, version {content['version']!r}")
        trials = tuple(_trial(trial) for trial in content["trials"])
        path = tuple(
            Choice(choice["level"], tuple(choice["compared"]), choice["chosen"]) for choice in content["path"]
        )
        best, metric, floor = config_of(content["best"]), content["metric"], content["floor"]
        if not isinstance(metric, str) or not (floor is None or is_number(floor)) or not path:
            raise ValueError("metric, floor or path is of another kind")
        for choice in path:
            known = all(type(index) is int and 0 <= index < len(trials) for index in choice.compared)
            if (
                not isinstance(choice.level, str)
                or not known
                or choice.chosen not in choice.compared
                or not is_eligible(trials[choice.chosen], floor)
            ):
                raise ValueError(f"level {choice.level!r} chose what it did not compare, or what failed")
        winner = trials[path[-1].chosen]
        if (winner.layer_range, winner.modules) != (as_fractions(best.layer_range), as_roles(best.modules)):
            raise ValueError("the best config is not that of the last choice")
        return cls(trials, path, best, metric, floor)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the tree of trials with the path taken, and both scores by range and modules; see `plot_search`.

        Any reading of how information flows through the layers is the paper's speculation, which a search does not
        show: it shows which trained regions scored well, once each.
        """
        from .plot import plot_search

        plot_search(self, path)


def is_eligible(trial: Trial, floor: float | None) -> bool:
    """Whether a trial may be chosen: it did not fail, and its speciality reaches the floor."""
    if trial.speciality is None:
        return False
    # 0.1 · 3 is 0.3 and a bit.
    return floor is None or trial.speciality >= floor or math.isclose(trial.speciality, floor, rel_tol=1e-9)


def _trial(content: Mapping[str, Any]) -> Trial:
    trial = Trial(
        **{**content, "layer_range": as_fractions(content["layer_range"]), "modules": as_roles(content["modules"])}
    )
    numbers = [trial.speciality, trial.versatility, trial.metric, *trial.scores.values()]
    failed = trial.error is not None
    if not all(number is None if failed else is_number(number) for number in numbers) or not is_number(trial.seconds):
        raise ValueError(f"the numbers of the trial {trial.modules_name} in {trial.range_name} are incomplete")
    if not isinstance(trial.level, str) or not isinstance(trial.error, str | None):
        raise ValueError("level or error of a trial is no text")
    return trial


def _aligned(cells: list[str], widths: list[int]) -> list[str]:
    """Names to the left, numbers to the right."""
    numbers = range(3, len(cells) - 1)
    return [
        cell.rjust(width) if i in numbers else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
