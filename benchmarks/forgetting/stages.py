"""What courses are made of: a stage of training by TRL's trainers, and a record of what the model can do after it.

A *course* trains one model in several stages. After each it is asked everything: every task, every ability.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abilities import ABILITIES, TASKS
from abilities import Row as Example
from arms import METHODS, Method
from book import Row
from datasets import Dataset
from learn import Exam, arguments, taught
from measure import file_size
from peft import PeftModel
from protocol import ENOUGH, EVERY, TRAINED
from torch import nn
from transformers import TrainerCallback
from trl import SFTConfig

from peft_isolate import AnchorConfig
from peft_isolate.deltas.reference import Reference


@dataclass(frozen=True)
class Course:
    """One model, trained in several stages.

    Attributes:
        experiment: "sequence", "isolation", "pair" or "preferences": see `sequences.py`.
        base: A folder of `bases/`.
        order: Its tasks, "A B C".
        arm: A name of the experiment's arms.
        rates: The learning rate of each task, in this order.
        rates_by: How they were come by: "chosen" by what `choices.rate_of` says, "middle" of those that the method is
            tried with, "tried" here, or "best" of those tried here.
        seed: Of the data's order and of what is drawn.
        judged: Scored on the test split; otherwise on the one to choose by.
    """

    experiment: str
    base: str
    order: str
    arm: str
    rates: tuple[float, ...]
    rates_by: str
    seed: int
    judged: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.order.split())

    @property
    def name(self) -> str:
        return f"{self.experiment} {self.order}, {self.arm}, {self.base}, {said(self.rates)}, {self.seed}" + (
            ", test" if self.judged else ", validation"
        )

    def columns(self) -> Row:
        """What its rows say of it."""
        return {
            "experiment": self.experiment, "base": self.base, "order": self.order, "arm": self.arm,
            "rates": said(self.rates), "rates_by": self.rates_by, "seed": self.seed, "judged": self.judged,
        }  # fmt: skip

    def rows(self, task: str, count: int | None = None) -> list[Example]:
        """What the model learns of a task; None is all."""
        return TASKS[task].rows("train", TRAINED if count is None else count, seed=self.seed)


def said(rates: Iterable[float]) -> str:
    """Rates as their column has them: "0.0005 0.001"."""
    return " ".join(f"{rate:g}" for rate in rates)


def trained_as(arm: str) -> str:
    """The arm of `arms.py`, without what is done between stages: "HFT" of "HFT; a new half"."""
    return arm.partition("; ")[0]


class Until(TrainerCallback):
    """Stops a training once some questions are answered well enough, looked at every few steps."""

    def __init__(self, answered: Any, every: int = EVERY) -> None:
        self.answered, self.every = answered, every
        self.reached = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.reached = self.answered(kwargs["model"]) >= ENOUGH
            control.should_training_stop = control.should_training_stop or self.reached


def train(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Example],
    steps: int,
    rate: float,
    seed: int,
    method: Method = METHODS["full"],
    anchor: AnchorConfig | None = None,
    until: Until | None = None,
) -> int:
    """A stage: a fresh trainer and optimizer, on a model that goes on from where it is.

    Args:
        model: With its adapter, if any; changed in place.
        tokenizer: Its tokenizer.
        rows: To train on.
        steps: At most.
        rate: Learning rate.
        seed: Of the order of the rows.
        method: Says the schedule, and how many rows a step has.
        anchor: To what the model is held, as it is now.
        until: Stops earlier.

    Returns:
        Steps that were made.
    """
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {
            "model": model, "args": SFTConfig(**arguments(folder, rate, seed, method), max_steps=steps),
            "train_dataset": Dataset.from_list(list(rows)), "processing_class": tokenizer,
            "callbacks": [until] if until else [],
        }  # fmt: skip
        return int(taught(given, anchor).state.global_step)


def overall_performance(now: Mapping[str, float], learned: Iterable[str]) -> float:
    """TRACE's OP_t = 1/t · Σ_{i ≤ t} R_{t,i}: the mean score, after stage t, of the t tasks learned by then.

    Args:
        now: R_{t,i}, {task: score after stage t}.
        learned: Those that stages have trained on.
    """
    return statistics.fmean(now[task] for task in learned)


def backward_transfer(now: Mapping[str, float], then: Mapping[str, float]) -> float:
    """TRACE's BWT_t = 1/t · Σ_{i ≤ t} (R_{t,i} − R_{i,i}): what later stages changed of the tasks before them.

    Below 0 is forgetting. The term of i = t is 0; who divides by t − 1 has t / (t − 1) times as much.

    Args:
        now: R_{t,i}, {task: score after stage t}.
        then: R_{i,i}, {task: score after the stage that taught it}, of those that stages have trained on.
    """
    return statistics.fmean(now[task] - score for task, score in then.items())


class Record:
    """Asks a model everything after each stage, and keeps a row of it.

    Args:
        course: What is trained.
        model: The base, before anything was trained.
        tokenizer: Its tokenizer.
    """

    def __init__(self, course: Course, model: nn.Module, tokenizer: Any) -> None:
        self.course, self.began = course, time.perf_counter()
        self.exam = Exam(course.base, TASKS, course.judged, tokenizer)
        self.base = Reference.now(model)
        self.scalars = sum(p.numel() for p in model.parameters())
        self.start = self.scores(model)
        self.then: dict[str, float] = {}  # R_{i,i}
        self.rows: list[Row] = []
        self.steps = 0

    def scores(self, model: nn.Module) -> Row:
        """Exact match of every task and ability, in percent; the general loss, in nats."""
        scores = self.exam(model)
        return {name: score if name == "general" else 100 * score for name, score in scores.items()}

    def add(self, model: nn.Module, what: str, tasks: Sequence[str], steps: int, **more: Any) -> None:
        """A stage has ended.

        Args:
            model: As it is now.
            what: The stage, in words.
            tasks: What it trained on: of one that is here for the first time this is its R_{i,i}. Empty where it did
                not train.
            steps: Optimizer steps that it took, or that are charged to it.
            more: Other columns.
        """
        now = self.scores(model)
        self.steps += steps
        new = [task for task in tasks if task not in self.then]
        self.then |= {task: now[task] for task in new}
        adapter = isinstance(model, PeftModel)
        base = Reference.base(model) if adapter else self.base
        learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
        asked = {task: self.exam.validation[task] for task in self.course.tasks if task in TASKS}
        validation = {task: questions.exact_match(model) for task, questions in asked.items()}
        kl = [questions.divergence(model, base) for questions in asked.values()]
        row = {
            **self.course.columns(), "stage": len(self.rows) + 1, "trained": what, "steps": steps,
            "total_steps": self.steps, "reached": all(validation[task] >= ENOUGH for task in new) if new else "",
            **{task: round(now[task], 2) for task in TASKS},
            "validation": round(100 * statistics.fmean(validation.values()), 2),
            "overall": round(overall_performance(now, self.then), 2),
            "transfer": round(backward_transfer(now, self.then), 2),
            "forgetting": round(self.start["old"] - now["old"], 2),
            **{ability.name: round(self.start[ability.name] - now[ability.name], 2) for ability in ABILITIES},
            "kl": round(statistics.fmean(kl), 4), "rise": round(now["general"] - self.start["general"], 4),
            "share": round(100 * learns / self.scalars, 2), "kilobytes": round(file_size(model, adapter) / 1000, 1),
        }  # fmt: skip
        self.rows.append(row | more | {"seconds": round(time.perf_counter() - self.began, 1)})
