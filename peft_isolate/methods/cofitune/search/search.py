"""The search for the region of another model: coarse to fine through a tree of short trainings (section 3.1)."""

from __future__ import annotations

import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from ....errors import IsolateError
from ....evaluation.scorers import as_number, is_number
from ..coarse import Fractions, as_fractions, as_roles
from ..config import CoFiTuneConfig
from .journal import SCORES, Journal, Record, config_of, key_of, plain_fields
from .levels import PAPER_LEVELS, WHOLE, Level
from .result import Choice, SearchResult, Trial, is_eligible
from .trial import Score, Train, run_all


class Executor(Protocol):
    """What `search_region` needs of an executor: those of `concurrent.futures`, Dask, mpi4py and submitit have it."""

    def submit(self, fn: Any, /, *args: Any) -> Any:
        """Run `fn(*args)` somewhere; returns its future."""


def search_region(
    train: Train,
    score: Score,
    *,
    output: str | os.PathLike[str] | None = None,
    config: CoFiTuneConfig | None = None,
    levels: Iterable[Level] | Level | None = None,
    metric: str | Callable[[Mapping[str, float]], float] = "unified",
    min_speciality: float | None = None,
    full_speciality: float | None = None,
    executor: Executor | None = None,
    retry_failed: bool = False,
    progress: bool = True,
) -> SearchResult:
    """Find the layers and modules to train, as CoFiTune's coarse search does: about 12 short trainings.

    Broad ranges (bottom, middle, top) × {MHA, FFN}; the best range's two quarters × {MHA, FFN}; inside the best
    quarter also up and down alone. Each level keeps the range of its best trial, the last one its best trial; of equal
    ones the first. No trial runs twice. The paper then measures importance and trains `.best` with the soft mask on.

    Each trial is to be a pure function of its config: `train` starts from the same model each time. The random states
    start the same in every trial, and as they are the process's, threads of one process run their trials one after the
    other: they gain nothing, processes do. Results do not depend on the order in which trials finish.

    Args:
        train: `train(config) -> model`: wraps a fresh copy of the aligned model (`get_peft_model`) and trains it.
        score: `score(model) -> {"speciality": …, "versatility": …}`, higher is better: the task, and the mean of what
            the model could before. Further numbers are recorded, too.
        output: Where finished trials are recorded as they come, one line of JSON each: a file that ends in ".jsonl",
            or a folder, for "trials.jsonl" in it. Called again with it, a search that was stopped or killed goes on.
            One output for one pair of `train` and `score`: records are told apart by config alone. None: no records.
        config: The other fields of every trial; its range and modules are replaced. `measure_importance` comes later.
        levels: The tree, or its only level. None: `PAPER_LEVELS`.
        metric: What is maximised: "unified" (speciality + versatility), "speciality", "versatility", or a function of
            the scores. Another metric on the same output trains nothing again.
        min_speciality: The share of full fine-tuning's speciality that a trial must reach to be chosen (a choice of
            ours: the paper names no tolerance).
        full_speciality: Full fine-tuning's speciality; both or neither.
        executor: Any `concurrent.futures.Executor` runs the trials of a level side by side: a ProcessPoolExecutor,
            Dask's `client.get_executor()`, mpi4py's MPIPoolExecutor; also submitit's. `train` and `score` must be
            picklable, defined in a module. None: in this process, one after another. Of a worker that dies nothing is
            recorded, and no level chooses without it: started again, the search runs what is missing.
        retry_failed: Run again what the records say failed.
        progress: Show a bar with the best so far.

    Returns:
        The trials, the path through them, and the best config.

    Raises:
        IsolateError: Arguments that contradict each other; a level whose trials all failed, with their reasons; a
            level where none reaches `min_speciality`; a metric that is no number; an executor that did not run all
            trials of a level. The records are kept.
        FormatError: The records are damaged.
    """
    floor, wanted = floor_of(min_speciality, full_speciality), _levels(levels)
    search = _Search(train, score, _base(config), *_metric(metric), floor, executor, not progress)
    with Journal(output) as journal:
        return search.run(journal, wanted, retry_failed)


@dataclass
class _Search:
    train: Train
    score: Score
    base: dict[str, Any]
    metric: str
    value: Callable[[Mapping[str, float]], float]
    floor: float | None
    executor: Executor | None
    quiet: bool

    def run(self, journal: Journal, levels: Sequence[Level], retry_failed: bool) -> SearchResult:
        from tqdm.auto import tqdm

        self._warn_of_others(journal)
        self.journal, self.trials = journal, dict[str, Trial]()
        # What counts as done. A failure of this run does, also where it repeats one of an earlier run.
        self.done = {key: r for key, r in journal.records.items() if r.error is None or not retry_failed}
        self.highest = -math.inf
        best, path = WHOLE, list[Choice]()
        with tqdm(total=0, unit="trial", disable=self.quiet) as self.bar:
            for number, level in enumerate(levels, start=1):
                self.bar.set_description(f"level {number} of {len(levels)}: {level.name}")
                path.append(self._compare(level, best))
                best = list(self.trials.values())[path[-1].chosen].layer_range
        winner = list(self.trials)[path[-1].chosen]
        config = config_of(self.done[winner].fields)
        return SearchResult(tuple(self.trials.values()), tuple(path), config, self.metric, self.floor)

    def _compare(self, level: Level, best: Fractions) -> Choice:
        asked = {key_of(fields): fields for fields in map(self._fields, level.regions(best))}
        missing = {key: config_of(fields) for key, fields in asked.items() if key not in self.done}
        self.bar.total += sum(key not in self.trials for key in asked)
        for key in asked:
            if key in self.done and key not in self.trials:
                self._show(self._trial(level.name, self.done[key]))

        def record(key: str, outcome: dict[str, Any]) -> None:
            self.done[key] = Record(level.name, asked[key], **outcome)
            self.journal.append(self.done[key])
            self._show(self._trial(level.name, self.done[key]))

        if lost := run_all(self.train, self.score, missing, record, self.executor):
            self._give_up(level, asked, lost)
        for key in asked:
            self.trials.setdefault(key, self._trial(level.name, self.done[key]))
        compared = [self.trials[key] for key in asked]
        order = list(self.trials)
        chosen = self._best_of(level, compared)
        return Choice(level.name, tuple(map(order.index, asked)), list(self.trials.values()).index(chosen))

    def _give_up(self, level: Level, asked: Mapping[str, Any], lost: Mapping[str, BaseException]) -> NoReturn:
        cause = next(iter(lost.values()))
        what = "a worker died, or its executor was stopped"
        hint = "if workers die again, they lack memory (use fewer), or cannot import train and score"
        # Pools say so in errors of many types.
        if isinstance(cause, pickle.PicklingError) or "pickle" in str(cause).lower():
            what, hint = "a trial cannot be sent to a worker", "define train and score at the top level of a module"
        path = self.journal.path
        kept = f"recorded in {path}" if path else "done; nothing is kept without output="
        again = "start the search again with the same output to go on" if path else "search again"
        raise IsolateError(
            f"{what} ({type(cause).__name__}: {cause}): {len(asked) - len(lost)} of {len(asked)} trials of level "
            f"{level.name!r} are {kept}; {again} ({hint})"
        ) from cause

    def _fields(self, region: tuple[Fractions, tuple[str, ...]]) -> dict[str, Any]:
        return self.base | {"layer_range": list(region[0]), "modules": list(region[1])}

    def _trial(self, level: str, record: Record) -> Trial:
        config, scores, value = config_of(record.fields), record.scores or {}, None
        if record.scores is not None:
            value = as_number(self.value(scores))
            if not is_number(value):
                raise IsolateError(
                    f"the metric {self.metric} of {scores} is {value!r}, which is no finite number; what was trained "
                    "is kept in the records, if output was given: correct the metric and search again"
                )
        return Trial(
            level=level,
            layer_range=as_fractions(config.layer_range),
            modules=as_roles(config.modules),
            speciality=scores.get("speciality"),
            versatility=scores.get("versatility"),
            metric=value,
            scores=scores,
            seconds=record.seconds,
            error=f"{record.error['type']}: {record.error['message']}" if record.error else None,
        )

    def _best_of(self, level: Level, compared: Sequence[Trial]) -> Trial:
        names = [f"{trial.modules_name} in {trial.range_name}" for trial in compared]
        path = self.journal.path
        kept = f"the records are in {path}" if path else "nothing is kept without output="
        if all(trial.error for trial in compared):
            reasons = "\n".join(f"  {name}: {trial.error}" for name, trial in zip(names, compared, strict=True))
            again = "search again with the same output and retry_failed=True" if path else "search again"
            raise IsolateError(
                f"all trials of level {level.name!r} failed ({kept}):\n{reasons}\nRemove the cause and {again}"
            )
        eligible = [trial for trial in compared if is_eligible(trial, self.floor)]
        if not eligible:
            trial = max((t for t in compared if t.speciality is not None), key=lambda t: t.speciality or -math.inf)
            raise IsolateError(
                f"no trial of level {level.name!r} reaches speciality {self.floor:.4g} (min_speciality · "
                f"full_speciality); the best has {trial.speciality:.4g}: {trial.modules_name} in {trial.range_name}. "
                f"Lower min_speciality and search again ({kept})"
            )
        return max(eligible, key=lambda trial: -math.inf if trial.metric is None else trial.metric)

    def _show(self, trial: Trial) -> None:
        self.bar.update()
        if trial.metric is not None and is_eligible(trial, self.floor) and trial.metric > self.highest:
            self.highest = trial.metric
            self.bar.set_postfix_str(f"best {trial.modules_name} in {trial.range_name}: {trial.metric:.4g}")

    def _warn_of_others(self, journal: Journal) -> None:
        chosen = {"layer_range": None, "modules": None}
        others = [record for record in journal.records.values() if record.fields | chosen != self.base | chosen]
        if others:
            names = self.base.keys() | others[0].fields.keys()
            differ = sorted(n for n in names - chosen.keys() if self.base.get(n) != others[0].fields.get(n))
            warnings.warn(
                f"{journal.path}: {len(others)} of the {len(journal.records)} trials recorded there have another "
                f"config ({', '.join(differ)} differs) and are left alone",
                UserWarning,
                stacklevel=4,
            )


def _base(config: CoFiTuneConfig | None) -> dict[str, Any]:
    config = CoFiTuneConfig() if config is None else config
    if not isinstance(config, CoFiTuneConfig):
        raise IsolateError(f"config is a {type(config).__name__}: the search is of a CoFiTuneConfig")
    if config.resolved is not None:
        raise IsolateError(
            "config was used to wrap a model, which fixed its region: pass a new one, or dataclasses.replace(config, "
            "resolved=None)"
        )
    fixed = [
        n for n in ("target_modules", "target_parameters", "layers_to_transform") if getattr(config, n) is not None
    ]
    if fixed:
        raise IsolateError(
            f"{' and '.join(fixed)} of the config says where to train, which is what the search is to find: leave it "
            "out, or say it by levels; exclude_modules may stay"
        )
    return plain_fields(config)


def _levels(levels: Any) -> tuple[Level, ...]:
    if levels is None:
        return PAPER_LEVELS
    given = (levels,) if isinstance(levels, Level) else tuple(levels) if isinstance(levels, Iterable) else ()
    if not given or not all(isinstance(level, Level) for level in given):
        raise IsolateError(f"levels={levels!r}: give at least one Level(name, ranges, modules), or None")
    return given


def floor_of(min_speciality: float | None, full_speciality: float | None) -> float | None:
    """The speciality that a trial must reach to be chosen, or None.

    Raises:
        IsolateError: One is given without the other, or one is no positive number.
    """
    if min_speciality is None and full_speciality is None:
        return None
    if not is_number(min_speciality) or not is_number(full_speciality):
        raise IsolateError(
            f"min_speciality={min_speciality!r}, full_speciality={full_speciality!r}: the one is a share of the "
            "other, so give both as finite numbers, or neither"
        )
    share, full = float(min_speciality or 0), float(full_speciality or 0)
    if share <= 0 or full <= 0:
        raise IsolateError(
            f"min_speciality={share} of full_speciality={full}: a share of a score means something for positive "
            "numbers only; turn a loss into a score, such as exp(-loss)"
        )
    return share * full


def _metric(metric: Any) -> tuple[str, Callable[[Mapping[str, float]], float]]:
    if callable(metric):
        name = getattr(metric, "__name__", "metric")
        # The name of a column: no other column's.
        taken = {"unified", *SCORES, "level", "layer_range", "modules", "seconds", "note"}
        return (name if name.isidentifier() and name not in taken else "metric"), metric
    if metric == "unified":
        return metric, lambda scores: sum(scores[name] for name in SCORES)
    if metric in SCORES:
        return metric, lambda scores: scores[metric]
    raise IsolateError(f"metric={metric!r}: use 'unified', {SCORES}, or a function of the scores to a number")
