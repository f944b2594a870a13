"""CPI-FT and DPI by their stages, with every control: all arms have the same optimizer steps, probes included.

A task is worth `WORTH` steps, in which every arm can learn it; who probes it, measures its gradients or comes back to
it has the fewer left for the stage that learns it. The order of the groups is that of the course, unless an arm draws
it. Exploratory.

`IsolationRun` is the same in one call; a test holds the two against each other. Here a control may put another region
in the place of a core.
"""

from __future__ import annotations

import functools
import operator
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from arms import CAUSAL
from book import Row
from learn import load
from measure import Questions
from peft import PeftModel, get_peft_model
from pretrain import BASES
from protocol import BATCH, TRAINED
from stages import Course, Record, train
from torch import nn

from peft_isolate import CoreIsolationConfig, Region, core_region, fuse, group_tasks, next_stage, plan
from peft_isolate.methods.core_isolation import measure_gradients
from peft_isolate.regions.selection import Selection

# Steps of a task; of these, those of its probe (or of its gradients, a pass each), and those of coming back to it.
WORTH, PROBE, BACK = 200, 30, 50
# The paper's τ.
THRESHOLD = 0.1
# Rows of a task to come back to.
BACK_ROWS = 100
# The task that some arms have little of, and its rows: 5 %.
SCARCE, SCARCE_ROWS = "C", TRAINED // 20


@dataclass(frozen=True)
class Isolated:
    """How several tasks are trained into one model.

    Attributes:
        why: What the arm is for.
        like: The arm whose learning rate it takes; None has its own.
        core: What is kept apart of each task: the scalars that its probe moved most, or those with the largest
            gradients, or a random part of the same size, or those that the probe moved least. None: nothing is.
        percent, threshold: Of the cores and the groups.
        frozen: Whether the cores of earlier groups are frozen.
        fuse: Whether the probes are fused after the stages (CPI-FT) or not (DPI).
        elsewhere: What becomes of the rest then, outside the cores: as in `peft_isolate.fuse`.
        back: Whether a sample of every task is trained on in the end, group by group, or at once.
        drawn: Whether the order of the groups is drawn.
        joint: All tasks in one stage.
        scarce: Whether there is little of one task.
        whole: The whole model learns, without an adapter, embeddings too.
    """

    why: str
    like: str | None = None
    core: Literal["largest", "gradient", "random", "smallest"] | None = None
    percent: float = 1.0
    threshold: float | None = THRESHOLD
    frozen: bool = True
    fuse: bool = False
    elsewhere: Literal["slerp", "keep"] = "slerp"
    back: Literal["staged", "at once"] | None = None
    drawn: bool = False
    joint: bool = False
    scarce: bool = False
    whole: bool = False

    @property
    def charged(self) -> int:
        """Of a task's steps, what its core costs."""
        return PROBE * ((self.core is not None) + (self.core == "gradient" and self.fuse))

    @property
    def steps(self) -> tuple[int, int]:
        """Of a task's steps: (those of its stage, those of coming back)."""
        back = BACK if self.back else 0
        return WORTH - back - self.charged, back


_DPI = Isolated("the method without fusion", core="largest")
_CPI = Isolated("the method", core="largest", fuse=True, back="staged")
_STAGED = Isolated("one after the other: the heuristic order, from the mildest conflict to the strongest")

ARMS: dict[str, Isolated] = {
    "joint": Isolated("multi-task: all at once", joint=True),
    "full": Isolated("one after the other, embeddings too", whole=True),
    "staged": _STAGED,
    "staged, order drawn": replace(_STAGED, why="its order", like="staged", drawn=True),
    "staged, and back": replace(_STAGED, why="control: comes back as CPI-FT does", back="staged"),
    "DPI": _DPI,
    "CPI-FT": _CPI,
    "CPI-FT, order drawn": replace(_CPI, why="the paper's order", like="CPI-FT", drawn=True),
    "CPI-FT, back at once": replace(_CPI, why="a single stage of integration", like="CPI-FT", back="at once"),
    # The score of a core, and the controls of it.
    "DPI, gradient": replace(_DPI, why="the score: |gradient|", like="DPI", core="gradient"),
    "DPI, random": replace(_DPI, why="control: a random core", like="DPI", core="random"),
    "DPI, smallest": replace(_DPI, why="control: what moved least", like="DPI", core="smallest"),
    "CPI-FT, gradient": replace(_CPI, why="the score: |gradient|", like="CPI-FT", core="gradient"),
    "CPI-FT, random": replace(_CPI, why="control: a random core", like="CPI-FT", core="random"),
    "CPI-FT, smallest": replace(_CPI, why="control: what moved least", like="CPI-FT", core="smallest"),
    "CPI-FT, nothing frozen": replace(_CPI, why="control: fused, but not isolated", like="CPI-FT", frozen=False),
    # What the fusion does.
    "CPI-FT, cores fused alone": replace(
        _CPI, why="the rest stays as the stages left it", like="CPI-FT", elsewhere="keep"
    ),
    "CPI-FT, not fused": replace(_CPI, why="DPI that comes back, at CPI-FT's rate", like="CPI-FT", fuse=False),
    # Thresholds (0.1 above) and percents (1 above).
    **{f"{name}, τ = {threshold}": replace(arm, why="its threshold", like=name, threshold=threshold)
       for name, arm in (("DPI", _DPI), ("CPI-FT", _CPI)) for threshold in (None, 0.0, 0.05, 0.3)},
    **{f"{name}, p = {percent}": replace(arm, why="its percent", like=name, percent=percent)
       for name, arm in (("DPI", _DPI), ("CPI-FT", _CPI)) for percent in (0.1, 5.0)},
    # One task at 5 % of the data.
    **{f"{name}, few of {SCARCE}": replace(arm, why="a task of little data", like=name, scarce=True)
       for name, arm in (("joint", Isolated("", joint=True)), ("staged", _STAGED), ("DPI", _DPI), ("CPI-FT", _CPI))},
}  # fmt: skip
# Those that have a rate of their own, and those of the table of the CPI-FT paper, A then B and B then A.
RATED = tuple(name for name, arm in ARMS.items() if arm.like is None)
PAIRED = ("full", "staged", "staged, and back", "DPI", "CPI-FT")


class Isolation:
    """A course of one of these arms.

    Args:
        course: Which.
        bases: Folder of the bases.
    """

    def __init__(self, course: Course, bases: Path) -> None:
        self.course, self.arm = course, ARMS[course.arm]
        self.folder = bases / course.base
        model, self.tokenizer = load(self.folder, course.seed)
        self.record = Record(course, model, self.tokenizer)
        self.model: Any = model
        few = {SCARCE: SCARCE_ROWS} if self.arm.scarce else {}
        self.rows = {task: course.rows(task, few.get(task)) for task in course.tasks}
        # Tasks that are trained at once count the same: one that has no more rows is repeated, a scarce one is not.
        most = max(map(len, self.rows.values()))
        self.rows |= {task: list(islice(cycle(rows), most)) for task, rows in self.rows.items() if task not in few}
        self.stage_steps, self.back_steps = self.arm.steps

    def run(self) -> list[Row]:
        """The whole of it: a row for each stage, and one for the fusion."""
        cores = self.cores() if self.arm.core else {}
        groups, jaccard = self.groups(cores)
        more = {"groups": " | ".join("+".join(group) for group in groups), "jaccard": jaccard}
        self.charge = self.arm.charged * len(self.course.tasks)
        if not self.arm.whole:
            self.model = get_peft_model(self.model, CoreIsolationConfig(**CAUSAL))
        self.begun = False
        self.train_groups(groups, cores, self.rows, self.stage_steps, "", more)
        if self.arm.fuse:
            self.fuse(groups, cores, more)
        if self.arm.back:
            sample = {task: rows[:BACK_ROWS] for task, rows in self.rows.items()}
            again = [self.course.tasks] if self.arm.back == "at once" else groups
            self.train_groups(again, cores, sample, self.back_steps, "a sample of ", more)
        return self.record.rows

    def cores(self) -> dict[str, Region]:
        """Probe every task, and find its core."""
        self.probes = {task: self.probe(task) for task in self.course.tasks}
        return {task: self.core(task) for task in self.course.tasks}

    def probe(self, task: str) -> nn.Module:
        """θ_i: a short training on one task alone, from the base."""
        model: Any = get_peft_model(load(self.folder, self.course.seed)[0], CoreIsolationConfig(**CAUSAL))
        rate = self.course.rates[0]
        train(model, self.tokenizer, self.rows[task], PROBE, rate, self.course.seed)
        return model

    def core(self, task: str) -> Region:
        """C_i, or what stands in its place."""
        percent, probe = self.arm.percent, self.probes[task]
        if self.arm.core == "gradient":
            rows = self.rows[task][: PROBE * BATCH]
            batches = [
                Questions(rows[start : start + BATCH], self.tokenizer).batches[0]
                for start in range(0, len(rows), BATCH)
            ]
            base, _ = load(self.folder, self.course.seed)
            return core_region(self.folder, measure_gradients(base, batches), percent, score="gradient")
        if self.arm.core == "largest":
            return core_region(self.folder, probe, percent)
        everything = plan(load(self.folder, 0)[0], CoreIsolationConfig(**CAUSAL)).region
        if self.arm.core == "smallest":
            return everything - core_region(self.folder, probe, 100 - percent)
        return at_random(everything, percent, random.Random(f"core {task} {self.course.seed}"))

    def groups(self, cores: Mapping[str, Region]) -> tuple[Sequence[Sequence[str]], str]:
        """(the groups in order, the Jaccard index of each two cores)."""
        tasks = self.course.tasks
        if not cores:
            groups = [tasks] if self.arm.joint else [(task,) for task in tasks]
            if self.arm.drawn:
                random.Random(self.course.seed).shuffle(groups)
            return groups, ""
        order = None if self.arm.drawn else tasks
        found = group_tasks(cores, self.arm.threshold, order=order, seed=self.course.seed)
        pairs = [(i, j) for i in range(len(tasks)) for j in range(i + 1, len(tasks))]
        return found.groups, ", ".join(f"{tasks[i]}{tasks[j]} {found.jaccard[i, j]:.4f}" for i, j in pairs)

    def train_groups(
        self, groups: Sequence[Sequence[str]], cores: Mapping[str, Region], rows: Mapping[str, list[Any]], worth: int,
        what: str, more: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """A stage for each group, with the cores of earlier ones frozen."""
        earlier: list[Region] = []
        for group in groups:
            if self.begun and not self.arm.whole:
                next_stage(self.model, frozen=functools.reduce(operator.or_, earlier, Region()))
            self.begun = True
            examples = [row for task in group for row in rows[task]]
            steps = worth * len(group)
            train(self.model, self.tokenizer, examples, steps, self.course.rates[0], self.course.seed)
            self.record.add(self.model, what + "+".join(group), group, steps + self.charge, **more)
            self.charge = 0  # that of the probes is the first stage's
            if self.arm.frozen:
                earlier += [cores[task] for task in group if task in cores]

    def fuse(self, groups: Sequence[Sequence[str]], cores: Mapping[str, Region], more: Mapping[str, Any]) -> None:
        """Each task's core from its probe, everything else between the probes and the model so far."""
        order = [task for group in groups for task in group]
        with TemporaryDirectory() as folder:
            out = Path(folder) / "fused"
            probes = {task: self.probes[task] for task in order}
            ours = {task: cores[task] for task in order}
            fuse(self.folder, probes, ours, out, onto=self.model, elsewhere=self.arm.elsewhere)
            base, _ = load(self.folder, self.course.seed)
            self.model = PeftModel.from_pretrained(base, out, is_trainable=True)
        self.record.add(self.model, "fusion", [], 0, **more)


def at_random(everything: Region, percent: float, rng: random.Random) -> Region:
    """As many scalars as a core of so many percent has, from anywhere."""
    total = everything.count
    drawn = sorted(rng.sample(range(total), int(percent * total / 100)))
    parts, first, at = {}, 0, 0
    for name, selection in everything.items():
        end = first + selection.count
        mine = at
        while at < len(drawn) and drawn[at] < end:
            at += 1
        if at > mine:
            parts[name] = Selection.elements(selection.shape, [position - first for position in drawn[mine:at]])
        first = end
    return Region(parts)


def learn_isolated(course: Course, bases: Path = BASES) -> list[Row]:
    """Train a course of one of these arms.

    Returns:
        A row for each stage. Of the last one of a pair, `first` is what the first task has lost since its own stage,
        and `second` what the second one has gained since the base (ΔA and ΔB of the CPI-FT paper), in points.
    """
    isolation = Isolation(course, bases)
    rows = isolation.run()
    if course.experiment == "pair":
        record, (first, second) = isolation.record, course.tasks
        rows[-1]["first"] = round(rows[-1][first] - record.then[first], 2)
        rows[-1]["second"] = round(rows[-1][second] - record.start[second], 2)
    return rows
