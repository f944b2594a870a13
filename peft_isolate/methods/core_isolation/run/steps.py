"""The steps of a run. Each writes its own folder or file whole, and does nothing where that is there already."""

from __future__ import annotations

import functools
import operator
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ....checkpoints.merge import merge
from ....deltas import DeltaTuner
from ....deltas.config import DeltaConfig
from ....errors import IsolateError
from ....evaluation.rows import collate, encode, pad_id
from ....regions.files import write_folder
from ....regions.region import Region
from ..config import CoreIsolationConfig
from ..fusion import fuse
from ..gradients import measure_gradients, save_gradients
from ..grouping import Grouping, Groups, group_tasks
from ..probe import core_region
from ..stages import next_stage
from .examine import Work
from .processes import is_main, main_does
from .report import FUSED, SCORES, TRAINING, write_report
from .result import IsolationResult
from .scores import TaskScores, load_scores
from .settings import save_json, save_settings
from .tasks import Row, Task, for_training, probe_rows, sample_rows
from .train import Recipe, quiet, release


class Steps:
    """See the functions. Several processes train together; all else is the main one's, and the others wait."""

    def __init__(self, work: Work) -> None:
        self.work, self.run, self.layout = work, work.run, work.layout
        # What was given comes first: whether it can be used is known before anything is trained.
        self.tasks = sorted(work.tasks, key=lambda task: task.name not in work.probes)

    def begin(self) -> None:
        """Make the folder this run's, without what a killed one left half-written."""

        def prepare() -> None:
            save_settings(self.layout.settings, self.work.settings)
            self.layout.prepare()

        for note in self.work.notes:
            self._say(note)
        main_does(prepare)

    def score_base(self) -> None:
        """Score every task at the base."""
        self._score(self.layout.base_scores, None, self.work.names, "base")

    def probe(self, task: Task) -> None:
        """A short training on one task alone, from the base: θ_i; or what was given as that."""
        folder = self.layout.probe(task.name)
        if task.name not in self.work.probes:
            if self.run.score == "gradient":
                return
            rows = probe_rows(task, self.run.seed, self.run.probe_rows)
            recipe, config = self.work.probe_recipe, self.run.probe_config or self._fresh_config()
            self._train(folder, f"probe of {task.name}", rows, [task], recipe, recipe.load_base, config)
        else:
            main_does(lambda: folder.mkdir(parents=True, exist_ok=True))  # for its scores
        self._score(folder / SCORES, self._probe_folder(task.name), [task.name], f"probe of {task.name}")

    def core(self, task: Task) -> None:
        """The core region of a task, C_i: what its probe moved most, or what has the largest gradients."""
        path = self.layout.region(task.name)
        tuned = self._probe_folder(task.name)
        if self.run.score == "gradient":
            tuned = self.layout.gradients(task.name)
            self._once(tuned, f"gradients of {task.name}", lambda: self._measure(task, tuned))

        def find() -> None:
            try:
                region = core_region(
                    self.work.base, tuned, self.run.percent, self.run.scope, self.run.score,
                    include_embeddings=self.run.include_embeddings, revision=self.work.recipe.init.get("revision"),
                )  # fmt: skip
            except IsolateError as error:
                raise type(error)(f"the core region of {task.name!r}: {error}") from error
            region.save(path)

        self._once(path, f"core region of {task.name}", find)

    def group(self) -> Groups:
        """The groups of tasks, in the order in which they are trained: G_1 … G_K."""
        layout = self.layout

        def find() -> None:
            regions = {task: layout.region(task) for task in self.work.names}
            group_tasks(
                regions, self.run.threshold, order=self.run.order, seed=self.run.seed, total=self.work.total
            ).save(layout.groups)

        def draw() -> None:
            try:
                Grouping.load(layout.groups).plot(layout.picture)
            except ImportError as error:  # the groups were the work: without matplotlib they count, too
                self._say(f"no {layout.picture.name}: {error}")

        self._once(layout.groups, "groups", find)
        self._once(layout.picture, None, draw)
        return main_does(lambda: self._checked(Grouping.load(layout.groups)))

    def _checked(self, grouping: Grouping) -> Groups:
        """The groups, unless some stage would find everything frozen."""
        sizes = dict(zip(grouping.tasks, grouping.sizes, strict=True))
        frozen = [task for group in grouping.groups[:-1] for task in group]
        frozen = list(grouping.tasks) if self.run.freeze_all_cores else frozen
        if sum(sizes[task] for task in frozen) >= self.work.total and self._union(frozen).count >= self.work.total:
            raise IsolateError(
                f"the cores of {', '.join(frozen)} are all {self.work.total:,} scalars in scope, and a stage that "
                "freezes them could train nothing: start anew in another output_dir with a smaller percent"
            )
        return grouping.groups

    def train_groups(self, groups: Groups, after: Path | None, sampled: bool, freeze_all: bool = False) -> Path:
        """One stage for each group, in order, with the cores of earlier groups frozen.

        Args:
            groups: G_1 … G_K.
            after: The adapter that goes on; None for a new one.
            sampled: On the balanced sample, or on all rows.
            freeze_all: Freeze the cores of all tasks.

        Returns:
            The adapter after the last stage.
        """
        n_before = 0 if after is None else len(groups)
        n_stages = len(groups) * (2 if self.run.fuse else 1)
        frozen: list[str] = list(self.work.names) if freeze_all else []
        last = after
        for number, group in enumerate(groups, n_before + 1):
            what = f"stage {number} of {n_stages}: {', '.join(group)}"
            last = self._stage(number, what, group, last, frozen, sampled)
            frozen += [] if freeze_all else group
        assert last is not None
        return last

    def _stage(
        self, number: int, what: str, group: Sequence[str], after: Path | None, frozen: Sequence[str], sampled: bool
    ) -> Path:
        folder = self.layout.stage(number)
        tasks = [task for name in group for task in self.work.tasks if task.name == name]
        rows: list[Row] = []
        for task in tasks:
            rows += sample_rows(task, self.run.seed, self.work.sample) if sampled else task.train

        def prepare() -> nn.Module:
            model = self.work.recipe.load(after, trainable=True)
            if after is not None:
                with quiet():
                    next_stage(model, frozen=self._union(frozen))
            return model

        config = None if after is not None else self._fresh_config()
        self._train(folder, what, rows, tasks, self.work.recipe, prepare, config)
        self._score(folder / SCORES, folder, self.work.names, f"stage {number}")
        return folder

    def fuse(self, groups: Groups, onto: Path) -> Path:
        """Each task's core from its probe, all else between `onto` and the probes.

        Returns:
            Where the adapter is.
        """
        order = [task for group in groups for task in group]
        run, folder = self.run, self.layout.fused

        def work() -> None:
            with write_folder(folder) as beside:
                fused = fuse(
                    self.work.base, {task: self._probe_folder(task) for task in order},
                    {task: self.layout.region(task) for task in order}, beside, onto=onto, elsewhere=run.elsewhere,
                    slerp_on=run.slerp_on, omega=run.omega, epsilon=run.epsilon,
                    include_embeddings=run.include_embeddings, revision=self.work.recipe.init.get("revision"),
                )  # fmt: skip
                save_json(beside / FUSED, fused.to_dict() | {"folder": folder.name})

        self._once(folder, f"fusion of {', '.join(order)}", work)
        self._score(folder / SCORES, folder, self.work.names, "fusion")
        return folder

    def finish(self, last: Path) -> None:
        """The final adapter, over the base; and the merged model, where that is wanted."""
        layout = self.layout

        def save() -> None:
            with write_folder(layout.final) as beside:
                if self.run.save_dtype is None:
                    shutil.copytree(last, beside, dirs_exist_ok=True)
                    for name in (SCORES, TRAINING, FUSED):
                        (beside / name).unlink(missing_ok=True)
                else:
                    model: Any = self.work.recipe.load(last)
                    config: DeltaConfig = model.peft_config["default"]
                    config.save_dtype = self.run.save_dtype
                    model.save_pretrained(beside)
                self.work.recipe.load_tokenizer().save_pretrained(beside)

        self._once(layout.final, "final adapter", save)
        self._score(layout.final / SCORES, layout.final, self.work.names, "final adapter", last / SCORES)
        if self.run.merge:
            revision = self.work.recipe.init.get("revision")
            self._once(
                layout.merged,
                "merged model",
                lambda: merge(self.work.base, layout.final, out=layout.merged, revision=revision),
            )

    def report(self) -> IsolationResult:
        """Write what came of it, and say it."""
        return IsolationResult.of(self.layout.folder, main_does(lambda: write_report(self.work)))

    def _train(
        self,
        folder: Path,
        what: str,
        rows: Sequence[Row],
        tasks: Sequence[Task],
        recipe: Recipe,
        prepare: Callable[[], nn.Module],
        config: Any,
    ) -> None:
        if not main_does(folder.exists):
            self._say(f"{what} ({len(rows):,} rows)")
            self._train_now(folder, for_training(rows, tasks[0].fields), recipe, prepare, config)
            release()

    def _train_now(
        self,
        folder: Path,
        rows: Sequence[Row],
        recipe: Recipe,
        prepare: Callable[[], nn.Module],
        config: Any,
    ) -> None:
        trained = recipe.train(prepare(), rows, config)

        def save() -> None:
            with write_folder(folder) as beside:
                trained.save(beside)
                save_json(beside / TRAINING, trained.record)

        main_does(save)

    def _score(
        self, path: Path, folder: Path | None, tasks: Sequence[str], what: str, known: Path | None = None
    ) -> None:
        """Score the model in a folder, unless its scores are there; or take those of the same model, where it is."""

        def judge() -> None:
            if known is not None and self.run.save_dtype is None:
                save_json(path, load_scores(known))
                return
            from accelerate import PartialState

            model = self.work.recipe.load(folder).to(PartialState().device)
            if isinstance(model, PeftModel) and isinstance(model.base_model, DeltaTuner):
                model.merge_adapter()  # the same bits, and no weight to be composed for every token
            scores: TaskScores = self.work.judges(model, tasks, what)
            save_json(path, scores)

        self._once(path, None, judge)

    def _measure(self, task: Task, path: Path) -> None:
        """Mean |gradient| at the base, over the rows that a probe would train on."""
        from accelerate import PartialState

        recipe = self.work.probe_recipe
        rows = for_training(probe_rows(task, self.run.seed, self.run.probe_rows), task.fields)
        tokenizer = recipe.load_tokenizer()
        encoded = [row for row in encode(rows, tokenizer, recipe.max_length) if row.ids]
        pad, size = pad_id(tokenizer), recipe.batch_size
        batches = [collate(encoded[i : i + size], pad, recipe.completion_only) for i in range(0, len(encoded), size)]
        model = recipe.load_base().to(PartialState().device)
        gradients = measure_gradients(model, batches, include_embeddings=self.run.include_embeddings)
        save_gradients(path, gradients)

    def _fresh_config(self) -> CoreIsolationConfig:
        """Of an adapter that trains everything in scope."""
        return CoreIsolationConfig(include_embeddings=self.run.include_embeddings)

    def _union(self, tasks: Iterable[str]) -> Region:
        """Of the tasks' cores."""
        return functools.reduce(operator.or_, (Region.load(self.layout.region(task)) for task in tasks), Region())

    def _probe_folder(self, task: str) -> Path:
        return self.work.probes.get(task, self.layout.probe(task))

    def _once(self, path: Path, what: str | None, work: Callable[[], Any]) -> None:
        """Let the main process make this file or folder, unless it is there."""

        def make() -> None:
            if not path.exists():
                self._say(what)
                work()

        main_does(make)

    def _say(self, what: str | None) -> None:
        """A headline, in one process, where somebody wants it."""
        if what and self.run.progress and is_main():
            print(f"== {what}", file=sys.stderr, flush=True)
