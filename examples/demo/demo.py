"""HFT, anchored too, and CoFiTune against full fine-tuning and LoRA: SFT, DPO on a new half, and one table.

Run `python examples/demo/demo.py`: it needs no network and takes two minutes on two cores. The base is the toy model
beside this file, the new task is to summarise a function of Python's standard library from its signature, and
forgetting is the rise of the loss on held-out source text. `--model`, `--dataset` and `--steps` point the same job at
anything else.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from peft_isolate import AnchorConfig, CoFiTuneConfig, HalfFTConfig, measure_importance, next_round, plan
from peft_isolate.evaluation import token_loss
from peft_isolate.regions import base_parameters

if __package__:  # python -m examples.demo.demo
    from .task import (
        BASE,
        HEADER,
        TOY_RATE,
        USUAL_RATE,
        Row,
        StepTimer,
        Task,
        first_line,
        positive,
        save_adapter,
        table,
    )
else:
    from task import (
        BASE,
        HEADER,
        TOY_RATE,
        USUAL_RATE,
        Row,
        StepTimer,
        Task,
        first_line,
        positive,
        save_adapter,
        table,
    )

# LoRA's product of two small matrices wants a larger rate than the weights themselves: of 6e-4, 1.5e-3 and 3e-3 the
# middle one gave its lowest new-task loss on the toy, a hair below the first.
LORA_FACTOR = 5
# A lower rate alone forgets less, so full fine-tuning also runs at one until it has learned as much as HFT has.
LOW_FACTOR = 0.25
# It may take this many times as many steps.
LOW_STEPS = 2
# DPO's rate as a part of SFT's. TRL's defaults have a twentieth (1e-6 to 2e-5), for many more steps than a demo takes.
DPO_FACTOR = 0.2
# CoFiTune trains a small, damped region, which wants a larger rate: of 1, 3, 10 and 30 times full fine-tuning's, ten
# gave its lowest new-task loss on the toy.
COFITUNE_FACTOR = 10
# Tokens of a row of anchor text, of which there are eight a step.
ANCHOR_LENGTH = 64
# Batches of the training data that CoFiTune's importance is measured on.
IMPORTANCE_BATCHES = 8

CAPTION = (
    "Losses in nats per token; forgetting is the rise over the base on held-out general text.\n"
    "One seed{toy}: the table shows how the methods are used, it supports no claim about them."
)


class StopAtLoss(TrainerCallback):
    """Stop the training once the new-task loss is down to a target."""

    def __init__(self, target: float, every: int, batches: Sequence[dict[str, torch.Tensor]]) -> None:
        self.target, self.every, self.batches = target, every, batches
        self.reached_at: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and token_loss(model, self.batches) <= self.target:
            self.reached_at = state.global_step
            control.should_training_stop = True


class Demo(Task):
    """The rows of the table, one method each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        super().__init__(
            model=args.model,
            dataset=args.dataset,
            output=args.output,
            learning_rate=args.learning_rate,
            batch_size=args.batch_size,
            max_length=args.max_length,
            validation=args.validation,
            general_blocks=args.general_blocks,
            preferences=args.dpo_steps * args.batch_size,
            seed=args.seed,
        )

    def full(self) -> Row:
        """Full fine-tuning."""
        trainer, timer = self.sft("full", self.rate, self.args.steps)
        return self.score("full", trainer.model, self.total, bytes_of(trainer.model), timer.median)

    def full_low(self, target: float) -> Row:
        """Full fine-tuning at a lower rate until it has learned what HFT has."""
        steps = LOW_STEPS * self.args.steps
        stop = StopAtLoss(target, max(1, self.args.steps // 10), self.task)
        trainer, timer = self.sft("full-low", LOW_FACTOR * self.rate, steps, callbacks=[stop])
        reached = f"{stop.reached_at} steps" if stop.reached_at else f"not reached in {steps} steps"
        name = f"full at ¼ of the rate, to HFT's loss: {reached}"
        return self.score(name, trainer.model, self.total, bytes_of(trainer.model), timer.median)

    def lora(self) -> Row:
        """LoRA on every linear layer."""
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer, timer = self.sft("lora", LORA_FACTOR * self.rate, self.args.steps, config)
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        saved = save_adapter(trainer.model, self.output / "lora-adapter")
        return self.score("LoRA, r = 8", trainer.model, trained, saved, timer.median)

    def cofitune(self) -> Row:
        """CoFiTune: the paper's best region, its units damped by their importance on the training data."""
        importance = measure_importance(self.base, self.batches(IMPORTANCE_BATCHES), heads=False)
        importance.plot(self.output / "importance.png")
        config = CoFiTuneConfig(importance=importance)
        trained = plan(self.base, config).trained
        trainer, timer = self.sft("cofitune", COFITUNE_FACTOR * self.rate, self.args.steps, config)
        saved = save_adapter(trainer.model, self.output / "cofitune-adapter")
        return self.score("CoFiTune", trainer.model, trained, saved, timer.median)

    def hft(self) -> tuple[Row, Any]:
        """HFT; return its row and the model with its adapter."""
        config = HalfFTConfig(seed=0)
        trainer, timer = self.sft("hft", self.rate, self.args.steps, config)
        self.sft_plan = plan(self.base, HalfFTConfig(seed=0))
        self.sft_plan.plot(self.output / "trained.png")
        saved = save_adapter(trainer.model, self.output / "sft-adapter")
        row = self.score("HFT", trainer.model, self.sft_plan.trained, saved, timer.median)
        trainer.model.merge_adapter()
        moved = self.moved(trainer.model)
        outside = sorted(set(moved).difference(self.sft_plan.region))
        trainer.model.unmerge_adapter()
        left = self.moved(trainer.model)
        print(
            f"merged: {len(moved)} of {len(base_parameters(self.base))} tensors differ from the base, {len(outside)} "
            f"outside the half; unmerged: {len(left)}"
        )
        if outside or left:
            raise RuntimeError(f"{(outside + left)[0]} changed and should not have: this is a bug, please report")
        return row, trainer.model

    def moved(self, model: Any) -> list[str]:
        """The base's tensors inside a model that are not the base's bits any more."""
        original = base_parameters(self.base)
        return [n for n, p in base_parameters(model).items() if not torch.equal(p.cpu(), original[n].cpu())]

    def anchored(self) -> Row:
        """HFT once more, held to the base on random tokens meanwhile."""
        config, anchor = HalfFTConfig(seed=0), AnchorConfig("random", max_length=ANCHOR_LENGTH)
        trainer, timer = self.sft("hft-anchored", self.rate, self.args.steps, config, anchor=anchor)
        saved = save_adapter(trainer.model, self.output / "anchored-adapter")
        return self.score("HFT, anchored on random tokens", trainer.model, self.sft_plan.trained, saved, timer.median)

    def dpo(self, model: Any) -> tuple[Row, list[str]]:
        """Another round: hold what SFT learned, align a new half by DPO; return the row and what to print about it."""
        next_round(model)
        dpo_plan = plan(model, model.peft_config["default"])
        print(f"\nhft-dpo: {self.args.dpo_steps} steps at {DPO_FACTOR * self.rate:g}")
        transformers.set_seed(self.seed)
        timer = StepTimer()
        trainer = DPOTrainer(
            model,
            args=DPOConfig(**self.common(DPO_FACTOR * self.rate, self.args.dpo_steps), logging_first_step=True),
            train_dataset=Dataset.from_list(self.preferences),
            eval_dataset=Dataset.from_list(self.validation_preferences),
            processing_class=self.tokenizer,
            callbacks=[timer],
        )
        before = trainer.evaluate()
        trainer.train()
        first_loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        after = trainer.evaluate()
        if abs(first_loss - math.log(2)) > 1e-3:
            raise RuntimeError(
                f"the first DPO loss is {first_loss:.4f}, not ln 2 = 0.6931: policy and reference differ"
            )
        # TRL's reference, a copy of the adapter as DPO found it.
        trainer.model.delete_adapter("ref")
        saved = save_adapter(trainer.model, self.output / "dpo-adapter")
        touched = (dpo_plan.region | dpo_plan.held).count
        row = self.score("HFT + DPO, two halves", trainer.model, touched, saved, timer.median)
        folder = self.output / "merged"
        trainer.model.merge_and_unload().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        lines = [f"Never touched in two rounds: {dpo_plan.untouched:.1%} of the model."]
        lines += [f"DPO on a new half: first loss {first_loss:.4f} (ln 2 = {math.log(2):.4f})."]
        for when, metrics in (("before (policy = reference, so 0 by definition)", before), ("after", after)):
            accuracy, margin = metrics["eval_rewards/accuracies"], metrics["eval_rewards/margins"]
            lines.append(f"Validation, {when}: reward accuracy {accuracy:.3f}, margin {margin:+.4f}.")
        return row, lines


def bytes_of(model: torch.nn.Module) -> int:
    """Bytes of the model's parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def write_results(output: Path, rows: Sequence[Row], text: str) -> None:
    """Write the table for programs and for people."""
    with open(output / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(vars(rows[0])))
        writer.writeheader()
        writer.writerows(vars(row) for row in rows)
    (output / "results.md").write_text(text + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def rate(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a learning rate above 0")
        return value

    parser.add_argument("--model", default=str(BASE), help="folder or Hub id of a causal language model")
    parser.add_argument("--dataset", help="folder, file or Hub id with columns prompt and completion, or messages")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="where to save")
    parser.add_argument("--steps", type=positive, default=100, help="optimizer steps of each SFT row")
    parser.add_argument("--dpo-steps", type=positive, default=30, help="optimizer steps of DPO")
    parser.add_argument("--batch-size", type=positive, default=16, help="examples in a step")
    parser.add_argument("--max-length", type=positive, default=256, help="longest example, in tokens")
    parser.add_argument(
        "--learning-rate",
        type=rate,
        help=f"of full fine-tuning, HFT and CoFiTune; {TOY_RATE:g} for the toy, else {USUAL_RATE:g}",
    )
    parser.add_argument("--validation", type=positive, default=96, help="validation examples of the task, at most")
    parser.add_argument("--general-blocks", type=positive, default=128, help="blocks of general text, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data and LoRA's initial weights")
    return parser.parse_args()


def main() -> None:
    """Train every row, score it, print and write the table."""
    start = time.perf_counter()
    args = arguments()
    # The trainers' own bars stay on; those for a second of loading and tokenizing would only hide the lines between.
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # TRL sets this field itself, whatever a user does, so the advice helps nobody.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated", category=FutureWarning)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        demo = Demo(args)
        overview = str(plan(demo.base, HalfFTConfig(seed=0)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {first_line(error)}") from None
    print(f"{demo.total:,} parameters, {len(demo.training):,} training examples, {torch.get_num_threads()} threads")
    print(overview)

    rows = [Row("base", demo.base_task_loss, 0.0, 0.0, 0, 0.0), demo.full()]
    hft, model = demo.hft()
    rows += [demo.full_low(hft.new_task_loss), demo.lora(), demo.cofitune(), hft, demo.anchored()]
    aligned, lines = demo.dpo(model)
    rows.append(aligned)
    caption = CAPTION.format(toy=" and a toy model" if demo.toy else "")
    text = "\n\n".join([table(HEADER, [row.cells() for row in rows]), caption, "\n".join(lines)])
    write_results(args.output, rows, text)
    print(f"\n{text}\n\nSaved under {args.output}; {time.perf_counter() - start:.0f} seconds in all.")


if __name__ == "__main__":
    main()
