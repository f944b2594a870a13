"""Everything that a run needs, checked: what can be known to fail is found before anything is trained."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from peft import PeftConfig
from torch import nn

from ....checkpoints.architecture import folder_of, meta_model
from ....checkpoints.difference import difference_of
from ....checkpoints.weights import Weights, weights_of
from ....deltas.about.text import size_text
from ....errors import IsolateError, RegionError
from ....evaluation.rows import flag
from ....regions.fingerprint import fingerprint
from ....regions.region import base_bytes, shapes_of
from ....regions.top import share_of
from ....regions.tree import head_of
from ..config import CoreIsolationConfig
from ..fusion import check_options as check_fusion
from ..fusion import omegas_of
from ..grouping import check_options as check_grouping
from ..scope import scope
from .layout import Layout
from .processes import main_does
from .scores import Judges
from .settings import check_same, folder_digest, plain
from .tasks import Task, check_sizes, read_tasks, sample_size
from .train import Recipe

if TYPE_CHECKING:
    from .run import IsolationRun

# A balanced sample below this is worth a word.
_FEW = 50
_SCOPES, _SCORES, _STAGE_DATA = ("global", "tensor"), ("update", "gradient"), ("full", "sample")


@dataclass(frozen=True)
class Work:
    """A run, checked.

    Attributes:
        run: What was asked for.
        base: Folder or Hub id.
        tasks: With their rows, in the order given.
        layout: Where everything lies.
        recipe, probe_recipe: How stages and probes are trained.
        probes: {task: folder} of those that were trained elsewhere.
        sample: Rows of each task in the balanced sample.
        total: Scalars in scope.
        judges: The scorers.
        settings: What run.json holds.
        notes: What else there is to know before training starts.
    """

    run: IsolationRun
    base: str
    tasks: tuple[Task, ...]
    layout: Layout
    recipe: Recipe
    probe_recipe: Recipe
    probes: dict[str, Path]
    sample: int
    total: int
    judges: Judges
    settings: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks."""
        return tuple(task.name for task in self.tasks)


def examine(run: IsolationRun) -> Work:
    """Check all of it, cheap things first. Nothing is written.

    Raises:
        IsolateError: See the message.
        ImportError: TRL is not installed.
    """
    _check_choices(run)
    if not isinstance(run.base, str | os.PathLike):
        raise IsolateError(
            f"base is a {type(run.base).__name__}: every stage loads the base afresh; save it and pass its folder"
        )
    base = os.fspath(run.base)
    if not isinstance(run.output_dir, str | os.PathLike) or Path(run.output_dir).is_file():
        raise IsolateError(f"output_dir={run.output_dir!r}: give a folder")
    layout = Layout(run.output_dir)
    recipe = Recipe(base, run.sft, progress=run.progress)
    probe_recipe = Recipe(base, run.sft, run.probe_sft, progress=run.progress)
    if recipe.init != probe_recipe.init:
        raise IsolateError("probe_sft has other model_init_kwargs than sft: a run has one base; set them in sft")
    tasks = read_tasks(run.tasks, run.seed, together=run.threshold is not None)
    names = [task.name for task in tasks]
    check_grouping(names, run.threshold, run.order, run.seed)
    if run.fuse:
        check_fusion(dict.fromkeys(names), dict.fromkeys(names), run.elsewhere, run.slerp_on, run.epsilon)
        omegas_of(run.omega, len(names), run.elsewhere)
    sample = sample_size(tasks, run.sample)
    model = meta_model(base, revision=recipe.init.get("revision"))
    total = _check_percent(run, model)
    _check_trainable(run, model)
    probes = _probe_folders(run, names)
    judges = Judges(tasks, recipe, run.exact_match)
    weights = weights_of(base, recipe.init.get("revision"))
    for task, folder in probes.items():
        _check_probe(weights, task, folder)
    settings = _settings(run, tasks, recipe, probe_recipe, weights, probes)

    def compare() -> list[str]:
        layout.check_owner()
        return check_same(layout.settings, settings)

    # The main one's alone: it may have begun to write where others still look.
    notes = [*main_does(compare), *_notes(run, model, len(names), len(names) - len(probes), total)]
    if run.fuse and sample < _FEW:
        smallest = min(tasks, key=lambda task: len(task.train))
        notes.append(
            f"the stages after fusion train on {sample:,} rows of each task, since {smallest.name!r} has "
            f"{len(smallest.train):,}: sample= takes another number"
        )
    return Work(run, base, tasks, layout, recipe, probe_recipe, probes, sample, total, judges, settings, tuple(notes))


def _check_choices(run: IsolationRun) -> None:
    for name, allowed in (("scope", _SCOPES), ("score", _SCORES), ("stage_data", _STAGE_DATA)):
        if getattr(run, name) not in allowed:
            raise IsolateError(f"{name}={getattr(run, name)!r} is unknown: use one of {allowed}")
    for name in ("include_embeddings", "fuse", "freeze_all_cores", "exact_match", "merge", "progress"):
        flag(name, getattr(run, name))
    if not isinstance(run.seed, int) or isinstance(run.seed, bool):
        raise IsolateError(f"seed={run.seed!r}: use a whole number")
    check_sizes(run.probe_rows, run.sample)
    CoreIsolationConfig(save_dtype=run.save_dtype)
    if run.probe_config is not None and not isinstance(run.probe_config, PeftConfig):
        raise IsolateError(
            f"probe_config is a {type(run.probe_config).__name__}: pass a config of PEFT, such as LoraConfig(), or "
            "leave it out"
        )
    if getattr(run.probe_config, "is_prompt_learning", False):
        raise IsolateError(
            f"probe_config is a {type(run.probe_config).__name__}, which trains a prompt and moves no weight: a core "
            "region is what moves; use LoraConfig(), for example, or leave it out"
        )
    if run.freeze_all_cores and not run.fuse:
        raise IsolateError("freeze_all_cores=True is for the stages after fusion, which fuse=False leaves out")


def _check_percent(run: IsolationRun, model: nn.Module) -> int:
    """Scalars in scope, of which `percent` is at least one."""
    share = share_of(run.percent)
    if share == 1 and (run.threshold is None or run.freeze_all_cores):
        raise IsolateError(
            "percent=100 makes everything every task's core, and stages that freeze cores could train nothing: take "
            "less, 1 as in the paper"
        )
    shapes = shapes_of(model)
    counts = [math.prod(shapes[name]) for name in scope(model, run.include_embeddings)]
    if not counts:
        raise RegionError(f"no parameter of {os.fspath(run.base)!r} is in scope: no module has a known role")
    largest = sum(counts) if run.scope == "global" else max(counts)
    if math.floor(share * largest) < 1:
        where = "in scope" if run.scope == "global" else "of the largest tensor"
        raise RegionError(
            f"percent={run.percent} of {largest:,} scalars {where} rounds to nothing: use at least {100 / largest:.3g}"
        )
    return sum(counts)


def _check_trainable(run: IsolationRun, model: nn.Module) -> None:
    """Refuse a scope that no stage could be trained on."""
    region = CoreIsolationConfig(include_embeddings=run.include_embeddings).resolve(model).region
    head = head_of(model)
    if head is not None and any(model.get_parameter(name) is head.weight for name in region):
        raise IsolateError(
            "include_embeddings=True puts the head in scope, and TRL trains no adapter on it: leave it False"
        )


def _probe_folders(run: IsolationRun, names: list[str]) -> dict[str, Path]:
    given = run.probes or {}
    if not isinstance(given, Mapping):
        raise IsolateError(f"probes is a {type(given).__name__}: pass {{task: folder}}")
    for task, folder in given.items():
        if task not in names:
            raise IsolateError(f"probes has {task!r}, which is none of the tasks {names}")
        if not isinstance(folder, str | os.PathLike):
            raise IsolateError(
                f"the probe of {task!r} is a {type(folder).__name__}: save it, and pass its folder, which a run that "
                "is started again finds"
            )
    if run.score == "gradient" and run.fuse and (missing := [name for name in names if name not in given]):
        raise IsolateError(
            f"score='gradient' trains no probes, and fusion needs one of {missing[0]!r}: pass probes=, or fuse=False"
        )
    return {task: folder_of(given[task]) for task in names if task in given}


def _check_probe(weights: Weights, task: str, folder: Path) -> None:
    try:
        difference_of(weights, folder)
    except IsolateError as error:
        raise type(error)(f"the probe of {task!r}: {error}") from error


def _settings(
    run: IsolationRun,
    tasks: tuple[Task, ...],
    recipe: Recipe,
    probe_recipe: Recipe,
    weights: Weights,
    probes: Mapping[str, Path],
) -> dict[str, Any]:
    """What decides the numbers of a run. Where the base and the probes lie does not."""
    names = (
        "percent", "scope", "score", "include_embeddings", "threshold", "order", "seed", "fuse", "stage_data",
        "sample", "probe_rows", "freeze_all_cores", "probe_config", "save_dtype", "exact_match", "elsewhere",
        "slerp_on", "omega", "epsilon",
    )  # fmt: skip
    sft, probe_sft = (
        {name: plain(f"sft, {name}", value) for name, value in sorted(each.told.items())}
        for each in (recipe, probe_recipe)
    )
    return {
        "base": sha256(fingerprint(weights.items()).encode()).hexdigest()[:16],
        "model_init_kwargs": {str(name): str(value) for name, value in sorted(recipe.init.items())},
        "tasks": {
            task.name: {"train": len(task.train), "test": len(task.test), "data": task.digest} for task in tasks
        },
        "task order": [task.name for task in tasks],
        "probes": {task: folder_digest(folder) for task, folder in probes.items()},
        "sft": sft,
        "probe_sft": probe_sft,
        "processes": PartialState().num_processes,
        **{name: plain(name, getattr(run, name)) for name in names},
    }


def _notes(run: IsolationRun, model: nn.Module, n_tasks: int, n_probes: int, total: int) -> list[str]:
    """How large what is written becomes."""
    own, half = 4 * total, run.save_dtype in ("bfloat16", "float16")
    n_stages = 2 * n_tasks + 1 if run.fuse else n_tasks
    n_kept = n_stages + (n_probes if run.probe_config is None and run.score == "update" else 0)
    advice = "" if half or run.save_dtype else "; save_dtype='bfloat16' halves it"
    return [
        f"the final adapter is dense: {size_text(own // 2 if half else own)} for {total:,} scalars, over a base of "
        f"{size_text(base_bytes(model))}{advice}",
        f"on the way, up to {n_kept} adapters of {size_text(own)} are kept: {size_text(n_kept * own)}",
    ]
