"""What `peft-isolate search` reads from its file, and the search."""

from __future__ import annotations

import contextlib
import inspect
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.architecture import meta_model
from ..errors import IsolateError
from ..evaluation.harness import LMEvalScorer
from ..evaluation.rows import positive
from ..evaluation.scorers import ExactMatch, HeldOutLoss, Scorer, Scores
from ..methods.cofitune import CoFiTuneConfig
from ..methods.cofitune.coarse import LAYER_RANGES, Fractions, depths, layers_in
from ..methods.cofitune.search import PAPER_LEVELS, WHOLE, Level, search_region
from ..methods.cofitune.search.journal import Record
from ..methods.cofitune.search.search import floor_of
from ..methods.plan import plan
from ..regions.files import file_digest, write_text
from ..regions.roles import roles
from ..training import SFTTrial
from .read import check_keys, load_tokenizer, make_config, read_yaml

REQUIRED = ("base", "data", "output", "speciality", "versatility")
OPTIONAL = ("training", "config", "metric", "min_speciality", "full_speciality", "levels", "workers")
SCORERS: dict[str, type] = {"held_out_loss": HeldOutLoss, "exact_match": ExactMatch, "lm_eval": LMEvalScorer}
METRICS = ("unified", "speciality", "versatility")
# What the numbers of a trial depend on, beside its config.
_DECIDES = ("base", "data", "training", "speciality", "versatility")
# Fields of the config that the search is to find, or that would leave it nothing to find.
_SEARCHED = ("layer_range", "modules", "layers_to_transform", "layers_pattern", "target_modules", "target_parameters")


@dataclass(frozen=True)
class Wanted:
    """A search as its file says, checked. The notes are what else there is to know before it starts."""

    trial: SFTTrial
    score: Scores
    output: Path
    options: dict[str, Any]
    workers: int
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()


def check_all(path: Path) -> Wanted:
    """Read the file and find every mistake that can be found before the first training.

    Raises:
        IsolateError: Of any of them.
    """
    said = read_yaml(path)
    check_keys(said, REQUIRED + OPTIONAL, str(path))
    if missing := [key for key in REQUIRED if not said.get(key)]:
        raise IsolateError(f"{path}: {missing} must be there; `peft-isolate search --help` shows a whole file")
    for key in ("base", "data", "output"):
        if not isinstance(said[key], str):
            raise IsolateError(f"{path}: {key}={said[key]!r} must be text")
    workers = said.get("workers", 1)
    positive("workers", workers)
    metric = said.get("metric", "unified")
    if metric not in METRICS:
        raise IsolateError(f"{path}: metric={metric!r}: use one of {list(METRICS)}")
    floor_of(said.get("min_speciality"), said.get("full_speciality"))
    training = said.get("training") or {}
    if not isinstance(training, dict):
        raise IsolateError(f"{path}: training={training!r} is no mapping of arguments of trl.SFTConfig")
    trial = SFTTrial(said["base"], said["data"], training)
    trial.check()
    config = make_config(CoFiTuneConfig, said.get("config") or {}, f"{path}, config", _SEARCHED)
    levels = _levels(said.get("levels"), str(path))
    model = meta_model(trial.base)
    _check_regions(model, config, levels)
    tokenizer = load_tokenizer(trial.base)
    listed = said["versatility"] if isinstance(said["versatility"], list) else [said["versatility"]]
    score = Scores(
        speciality=_scorer(said["speciality"], tokenizer, f"{path}, speciality"),
        versatility=[_scorer(one, tokenizer, f"{path}, versatility {i}") for i, one in enumerate(listed)],
    )
    output = Path(said["output"])
    settings = json.loads(json.dumps({key: said.get(key) for key in _DECIDES}, default=str))
    named = [said["data"], *(value for one in (said["speciality"], *listed) for value in one.values())]
    settings["content of its files"] = {
        name: file_digest(name) for name in named if isinstance(name, str) and Path(name).is_file()
    }
    _check_output(output, settings)
    options = {
        "config": config,
        "metric": metric,
        "levels": levels,
        "min_speciality": said.get("min_speciality"),
        "full_speciality": said.get("full_speciality"),
    }
    return Wanted(trial, score, output, options, workers, settings, _alike(depths(roles(model)), levels))


def run(wanted: Wanted, retry_failed: bool = False) -> Any:
    """Search, and write what was found.

    Returns:
        The `SearchResult`.
    """
    wanted.output.mkdir(parents=True, exist_ok=True)
    write_text(wanted.output / "settings.json", json.dumps(wanted.settings, indent=1) + "\n")
    with _executor(wanted.workers) as executor:
        result = search_region(
            wanted.trial, wanted.score, output=wanted.output, executor=executor, retry_failed=retry_failed,
            **wanted.options,
        )  # fmt: skip
    result.save(wanted.output / "result.json")
    try:
        result.plot(wanted.output / "tree.png")
    except ImportError as error:  # the trainings were the work: without matplotlib they count, too
        print(f"no tree.png: {error}", file=sys.stderr)
    return result


@contextlib.contextmanager
def _executor(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    if workers == 1:
        yield None
        return
    # A forked process may neither use the GPU nor the threads of its parent.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def _scorer(said: Any, tokenizer: Any, where: str) -> Scorer:
    if not isinstance(said, dict) or said.get("type") not in SCORERS:
        raise IsolateError(f"{where}: {said!r} is no scorer: write 'type:' and one of {list(SCORERS)}")
    kind = SCORERS[said["type"]]
    parameters = inspect.signature(kind).parameters
    fields = {key: value for key, value in said.items() if key != "type"}
    check_keys(fields, set(parameters) - {"tokenizer"}, f"{where}, {said['type']}")
    needed = [n for n, p in parameters.items() if p.default is p.empty and n != "tokenizer"]
    if missing := [name for name in needed if name not in fields]:
        raise IsolateError(f"{where}: {said['type']} needs {missing}")
    try:
        return kind(tokenizer=tokenizer, **fields)
    except IsolateError as error:
        raise type(error)(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise IsolateError(f"{where}: {fields} makes no {kind.__name__}: {error}") from error


def _levels(said: Any, where: str) -> list[Level] | None:
    if said is None:
        return None
    if not isinstance(said, list) or not said:
        raise IsolateError(f"{where}: levels={said!r} is no list of levels: write each with name, ranges and modules")
    levels = []
    for number, level in enumerate(said):
        keys = ("name", "ranges", "modules")
        check_keys(level, keys, f"{where}, level {number}")
        if missing := [key for key in keys if not level.get(key)]:
            raise IsolateError(f"{where}, level {number}: {missing} must be there")
        try:
            levels.append(Level(**level))
        except TypeError as error:
            raise IsolateError(f"{where}, level {number}: {level} makes no level: {error}") from error
    return levels


def _check_regions(model: Any, config: CoFiTuneConfig, levels: Sequence[Level] | None) -> None:
    """Refuse a base of which the first level can train nothing. A single trial may fail: the search goes on then."""
    reasons = []
    for layer_range, modules in (levels or PAPER_LEVELS)[0].regions(WHOLE):
        try:
            plan(model, replace(config, layer_range=layer_range, modules=modules))
        except IsolateError as error:
            reasons.append(error)
        else:
            return
    raise reasons[0]


def _alike(depth: dict[str, int], levels: Sequence[Level] | None) -> tuple[str, ...]:
    """At most one note: which of the ranges that the search may come to are the same layers, or none."""
    tried, bests = list[Fractions](), [WHOLE]
    for level in levels or PAPER_LEVELS:
        if len(bests) > 100:  # halves of halves: by now they are narrower than a layer
            break
        bests = list(dict.fromkeys(pair for best in bests for pair, _ in level.regions(best)))
        tried += bests
    same: dict[tuple[range, ...], list[str]] = {}
    names = {pair: f"{name} " for name, pair in LAYER_RANGES.items()}
    for pair in dict.fromkeys(tried):
        layers = tuple(layers_in(pair, n_layers) for n_layers in depth.values())
        same.setdefault(layers, []).append(f"{names.get(pair, '')}({pair[0]:.4g}, {pair[1]:.4g}]")
    said = []
    for layers, ranges in same.items():
        if not any(layers):
            said.append(f"{' and '.join(ranges)} {'have' if len(ranges) > 1 else 'has'} no layer")
        elif len(ranges) > 1:
            said.append(f"{' and '.join(ranges)} are the same layers")
    return (f"at a depth of {' + '.join(map(str, depth.values()))} " + "; ".join(said),) if said else ()


def _has_scores(path: Path) -> bool:
    """Whether there is a trial that did not fail, or a line that cannot be read."""
    if not path.is_file():
        return False
    try:
        return any(Record.of_line(line).scores is not None for line in path.read_bytes().splitlines())
    except (ValueError, ArithmeticError, RecursionError):
        return True


def _check_output(output: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder with the trials of another base, data, training or scorers: they would be taken for these."""
    if output.exists() and not output.is_dir():
        raise IsolateError(f"output {str(output)!r} is a file: give a folder")
    before = output / "settings.json"
    if not before.is_file() or not _has_scores(output / "trials.jsonl"):
        return  # trials that failed say nothing of the data: it may be mended, and they are run again when asked
    try:
        then = json.loads(before.read_text(encoding="utf-8"))
    except ValueError:
        then = None
    if then != settings:
        changed = [key for key in settings if not isinstance(then, dict) or then.get(key) != settings[key]]
        raise IsolateError(
            f"{output} holds the trials of a search with another {' and '.join(changed)}, which would be taken for "
            "this one's: use another output, or the same settings"
        )
