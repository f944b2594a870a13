"""What a run found: how well every task is done after every step, and where everything lies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....deltas.about.text import table_lines
from ....errors import FormatError
from ....regions.files import check_there
from .scores import LOSS, MATCH, TaskScores

# Steps that are no stages, as `IsolationResult.scores` calls them.
BASE, PROBE, FUSION, END = "base", "probe", "fusion", "end"
FORMAT = "peft_isolate.isolation/1"


@dataclass(frozen=True)
class IsolationResult:
    """What `IsolationRun.run` returns: `print(result)`, `result.final`.

    Attributes:
        folder: The run's.
        tasks: Their names, in the order given.
        groups: G_1 … G_K.
        scores: {step: {task: {"loss": mean nats a token of its held-out rows, "exact_match": share of its prompts that
            are answered exactly}}}, the latter where rows have prompt and completion as text. Steps are "base",
            "probe" (each task's own), "stage 1" and so on, "fusion" and "end", in their order.
    """

    folder: Path
    tasks: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    scores: dict[str, TaskScores]

    @property
    def final(self) -> Path:
        """The final adapter, over the original base."""
        return self.folder / "final"

    @property
    def merged(self) -> Path | None:
        """The merged model; None where none was wanted."""
        path = self.folder / "merged"
        return path if path.exists() else None

    @property
    def forgetting(self) -> dict[str, float]:
        """{task: by how much its loss at the end is above its lowest along the run}, in nats; probes do not count."""
        along = [scores for step, scores in self.scores.items() if step != PROBE]
        return {
            task: self.scores[END][task][LOSS] - min(scores[task][LOSS] for scores in along) for task in self.tasks
        }

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row a task, ready for `pandas.DataFrame`: its group, loss and score at each of four steps, forgetting.

        None where there is no such number.
        """
        forgotten = self.forgetting
        rows = []
        for task in self.tasks:
            row: dict[str, Any] = {"task": task}
            row["group"] = next(i for i, group in enumerate(self.groups, 1) if task in group)
            for kind in (LOSS, MATCH):
                for step in (BASE, PROBE, FUSION, END):
                    row[f"{kind} {step}"] = self.scores.get(step, {}).get(task, {}).get(kind)
            rows.append(row | {"forgetting": forgotten[task]})
        return rows

    def __str__(self) -> str:
        rows = self.table
        names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
        return "\n".join(table_lines(names, [[shown(row[name]) for name in names] for row in rows]))

    @classmethod
    def load(cls, folder: str | Path) -> IsolationResult:
        """Read the result of a finished run from its folder.

        Raises:
            FormatError: The file is damaged, of another version, or something else.
        """
        path = Path(folder) / "report.json"
        check_there(path, "pass the folder of a finished run; one that was stopped is started again")
        content = path.read_bytes()
        try:
            return cls.of(Path(folder), json.loads(content))
        except (ValueError, TypeError, KeyError, AttributeError, StopIteration, RecursionError) as error:
            raise FormatError(
                f"{path} is no result of a run, or was damaged ({type(error).__name__}: {error}): delete it, and "
                "start the run again, which writes it anew"
            ) from error

    @classmethod
    def of(cls, folder: Path, content: Mapping[str, Any]) -> IsolationResult:
        """The inverse of what report.json holds. Raises a `ValueError` or the like where it does not hold it."""
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        scores = {
            str(step): {task: {kind: float(n) for kind, n in of_task.items()} for task, of_task in of_step.items()}
            for step, of_step in content["scores"].items()
        }
        found = cls(folder, tuple(content["tasks"]), tuple(map(tuple, content["groups"])), scores)
        _ = found.table  # what is missing shows now
        return found


def shown(value: Any) -> str:
    """A cell of a table."""
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
