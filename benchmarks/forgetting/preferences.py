"""Preferences: after task A, DPO for its first three letters rather than all five. Exploratory.

The stage on A ends when its validation has reached 95 %, that on P when for 95 % of the validation prompts the chosen
answer is likelier than the rejected one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from abilities import Row as Example
from abilities import brevity
from arms import METHODS, Arm
from book import Row
from choices import frozen_arm
from datasets import Dataset
from learn import arguments, load, wrapped
from measure import Questions
from pretrain import BASES
from protocol import ENOUGH, EVALUATED, STEPS, TRAINED
from stages import Course, Record, Until, train, trained_as
from torch import nn
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from peft_isolate import AnchorConfig, next_round
from peft_isolate.deltas.reference import Reference
from peft_isolate.training import AnchoredDPOTrainer

# Of the rates that SFT is tried with; HFT's paper and TRL's defaults have a twentieth.
SHARE = 1 / 10


def arms() -> dict[str, str]:
    """{arm: what it is for}; of a family the variant and the anchor that were frozen.

    Before "; " is how the model is trained, on A without the anchor; after it what else is done.
    """
    full, lora, hft = (frozen_arm(family) for family in ("full", "LoRA", "HFT"))
    return {
        full.method: "what people do today",
        lora.method: "what people do today, too: the adapter of A goes on",
        f"{hft.method}; the same half": "HFT, the same half for both",
        f"{hft.method}; a new half": "HFT as in the paper: a new half for the new stage",
        full.name: "full fine-tuning held to what it was after A",
        Arm(full.method, hft.anchor).name: "full fine-tuning held by HFT's anchor",
        f"{hft.name}; a new half": "HFT as in the paper, held to what it was after A",
    }


def rates_of(arm: str) -> tuple[float, ...]:
    """Learning rates of DPO that an arm is tried with."""
    return tuple(SHARE * rate for rate in METHODS[Arm.named(trained_as(arm)).method].rates)


class Preferred:
    """Pairs of answers, of which a model should think one the likelier.

    Args:
        pairs: With "prompt", "chosen" and "rejected".
        tokenizer: The model's.
    """

    def __init__(self, pairs: list[Example], tokenizer: Any) -> None:
        self.chosen, self.rejected = (
            Questions([{"prompt": pair["prompt"], "completion": pair[which]} for pair in pairs], tokenizer)
            for which in ("chosen", "rejected")
        )

    def share(self, model: nn.Module) -> float:
        """Of the prompts: where the chosen answer with its end is likelier than the rejected one with its own."""
        likelier = self.chosen.log_likelihoods(model) > self.rejected.log_likelihoods(model)
        return likelier.float().mean().item()


def learn_preferences(course: Course, bases: Path = BASES, steps: int = STEPS) -> list[Row]:
    """SFT on A, then DPO: a row for each of the two.

    Returns:
        Rows as `Record` keeps them, with: `preferred`, the share of prompts whose chosen answer is the likelier, and
        `chosen`, the exact match of that answer, both in percent. Of the second row `reached` and `validation` are of
        the preferences, and `kl` is that on their chosen answers.
    """
    name, _, change = course.arm.partition("; ")
    arm, seed = Arm.named(name), course.seed
    method = METHODS[arm.method]
    model, tokenizer = load(bases / course.base, seed)
    record = Record(course, model, tokenizer)
    rows = course.rows("A")
    model = wrapped(model, method, seed, rows, tokenizer)
    base = Reference.now(model)
    validation, pairs = (
        Preferred(brevity(split, EVALUATED), tokenizer)
        for split in ("validation", "test" if course.judged else "validation")
    )

    def asked() -> Row:
        return {
            "preferred": round(100 * pairs.share(model), 2), "chosen": round(100 * pairs.chosen.exact_match(model), 2)
        }  # fmt: skip

    until = Until(record.exam.validation["A"].exact_match)
    taken = train(model, tokenizer, rows, steps, course.rates[0], seed, method, until=until)
    record.add(model, "A", ["A"], taken, **asked())
    if change == "a new half":
        next_round(model)
    taken = prefer(model, tokenizer, course, steps, arm.config(seed), Until(validation.share))
    share = validation.share(model)
    kl = round(validation.chosen.divergence(model, base), 4)
    record.add(
        model, "P", [], taken, **asked(), reached=share >= ENOUGH, validation=round(100 * share, 2), kl=kl
    )  # fmt: skip
    return record.rows


def prefer(
    model: nn.Module, tokenizer: Any, course: Course, steps: int, anchor: AnchorConfig | None, until: Until
) -> int:
    """The stage of DPO; the reference is the model as it is now. Returns the steps that were made."""
    method = METHODS[Arm.named(trained_as(course.arm)).method]
    with tempfile.TemporaryDirectory() as folder:
        options = DPOConfig(**arguments(folder, course.rates[1], course.seed, method), max_steps=steps)
        given: dict[str, Any] = {
            "model": model, "args": options, "processing_class": tokenizer, "callbacks": [until],
            "train_dataset": Dataset.from_list(brevity("train", TRAINED, course.seed)),
        }  # fmt: skip
        trainer = DPOTrainer(**given) if anchor is None else AnchoredDPOTrainer(**given, anchor=anchor)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return int(trainer.state.global_step)
