"""One task after another: a sequence of stages, and what each way of training has kept of all before.

A stage ends when its task's validation has reached 95 %, or after `JUDGED_STEPS`. Exploratory.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from abilities import Row as Example
from arms import METHODS, Arm, old_rows
from book import Row
from choices import frozen_arm
from learn import load, wrapped
from peft import PeftModel
from pretrain import BASES
from protocol import BATCH, GRANULARITIES, JUDGED_STEPS
from stages import Course, Record, Until, train
from torch import nn

from peft_isolate import half_reset, next_round

ORDERS = ("A B C", "B C A", "C A B")

# What is done after a stage, (model, base, seed), and before the next one. An arm is one of `arms.py` and the name of
# what is done: "HFT; a new half".
AFTER: dict[str, Callable[[nn.Module, nn.Module, int], object]] = {
    "half reset": lambda model, base, seed: half_reset(
        model, seed=seed, base=None if isinstance(model, PeftModel) else base
    ),
}
BETWEEN: dict[str, Callable[[nn.Module], object]] = {"a new half": next_round}


def arms() -> dict[str, str]:
    """{arm: what it is for}; of a family the variant and the anchor that were frozen, or its first; the dial at 1."""
    full, lora, hft, cofitune = (frozen_arm(family) for family in ("full", "LoRA", "HFT", "CoFiTune"))
    return {
        full.method: "what people do today",
        lora.method: "what people do today, too: one adapter goes on",
        f"{hft.method}; a new half": "HFT as in the paper: each task has its own half",
        hft.method: "HFT, the same half throughout",
        **{f"{method}; a new half": "the paper's other granularities" for method in GRANULARITIES},
        f"{full.method}; half reset": "the pilot of HFT's paper, after each task",
        cofitune.method: "one range throughout; importance is measured on the first task",
        full.name: "full fine-tuning held to what it was before the stage",
        Arm(full.method, hft.anchor).name: "full fine-tuning held by HFT's anchor",
        f"{hft.name}; a new half": "HFT as in the paper, held to what it was before the stage",
        "replay": "with old data: beside each row one of what was learned before, pretraining included",
    }


def learn_sequence(course: Course, bases: Path = BASES, steps: int = JUDGED_STEPS) -> list[Row]:
    """Train a sequence: a row for each stage."""
    name, _, change = course.arm.partition("; ")
    arm = Arm.named(name)
    method = METHODS[arm.method]
    base, _ = load(bases / course.base, course.seed)
    model, tokenizer = load(bases / course.base, course.seed)
    record = Record(course, model, tokenizer)
    model = wrapped(model, method, course.seed, course.rows(course.tasks[0]), tokenizer)
    for number, (task, rate) in enumerate(zip(course.tasks, course.rates, strict=True)):
        if number and change in BETWEEN:
            BETWEEN[change](model)
        rows = replayed(course, number, steps) if method.replayed else course.rows(task)
        seed = 10 * course.seed + number
        taken = train(
            model, tokenizer, rows, steps, rate, seed, method, arm.config(seed),
            Until(record.exam.validation[task].exact_match),
        )  # fmt: skip
        if change in AFTER:
            AFTER[change](model, base, seed)
        record.add(model, task, [task], taken)
    return record.rows


def replayed(course: Course, number: int, steps: int) -> list[Example]:
    """Rows of a stage with as many of before: of the pretraining and of each earlier task in equal parts."""
    task, *before = (*course.tasks[number::-1],)
    rows = course.rows(task)
    rows = rows * max(1, steps * BATCH // len(rows))
    sources = [old_rows(len(rows), course.seed), *(course.rows(earlier) for earlier in before)]
    rng = random.Random(f"replay {course.seed} {number}")
    old = [rng.choice(sources[i % len(sources)]) for i in range(len(rows))]
    return rows + old
