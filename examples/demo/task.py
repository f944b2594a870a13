"""The demo's job: a base model, a new task to train it on, and how much a trained model has learned and forgotten.

`demo.py` compares methods on it, `../cofitune_search.py` searches for a region, `../anchored_sft.py` compares anchors.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from peft_isolate import AnchorConfig
from peft_isolate.evaluation import forgetting, token_loss
from peft_isolate.training import AnchoredSFTTrainer

if __package__:  # python -m examples.demo.demo
    from .data import documents, general_batches, instruction_pairs, load_pairs, preference_pairs
else:
    from data import documents, general_batches, instruction_pairs, load_pairs, preference_pairs

BASE = Path(__file__).parent / "base"

# Full fine-tuning's rate, which is that of HFT and CoFiTune, too. A model of 1 M parameters wants a larger one than
# the 2e-5 that suits 1 B and more: of 1e-4, 3e-4, 5e-4, 1e-3 and 3e-3 this one gave full fine-tuning its lowest
# new-task loss on the validation split.
TOY_RATE = 3e-4
# TRL's default for SFT, for any other model.
USUAL_RATE = 2e-5


@dataclass
class Row:
    """One line of the table.

    Attributes:
        model: what was trained.
        new_task_loss: mean loss per completion token on the task's validation split, nats.
        forgetting: rise of the mean loss per token on held-out general text over the base's, nats.
        trained_share: trained scalars over the base's scalars.
        saved_bytes: the adapter's weights; for full fine-tuning the whole model's, at the same precision.
        seconds_per_step: median over the optimizer steps, without loading data and evaluating.
    """

    model: str
    new_task_loss: float
    forgetting: float
    trained_share: float
    saved_bytes: int
    seconds_per_step: float

    def cells(self) -> list[str]:
        """The row as it is printed."""
        return [
            self.model,
            f"{self.new_task_loss:.4f}",
            f"{self.forgetting:+.4f}",
            f"{self.trained_share:.1%}".replace("%", " %"),
            f"{self.saved_bytes:,}" if self.saved_bytes else "–",
            f"{self.seconds_per_step:.3f}" if self.seconds_per_step else "–",
        ]


HEADER = ["model", "new-task loss", "forgetting", "trained", "saved bytes", "s / step"]


class StepTimer(TrainerCallback):
    """Measure every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    @property
    def median(self) -> float:
        """Median seconds of a step; the first, which sets things up, is left out where there are more."""
        return statistics.median(self.seconds[1:] or self.seconds)


class Task:
    """What every training shares: the base, the data and the scores.

    Args:
        model: folder or Hub id of a causal language model.
        dataset: see `load_pairs`; None for the demo's own.
        output: where trainers may write.
        learning_rate: of full fine-tuning; None for one that suits the model.
        batch_size: examples in a step.
        max_length: longest example, in tokens.
        validation: validation examples of the task, at most.
        general_blocks: blocks of general text, at most.
        preferences: preference pairs, at most.
        seed: of the order of the data and of what the trainers draw.
    """

    def __init__(
        self,
        model: str = str(BASE),
        dataset: str | None = None,
        output: Path = Path("outputs/demo"),
        learning_rate: float | None = None,
        batch_size: int = 16,
        max_length: int = 256,
        validation: int = 96,
        general_blocks: int = 128,
        preferences: int = 480,
        seed: int = 0,
    ) -> None:
        self.model, self.output, self.seed = model, output, seed
        self.batch_size, self.max_length = batch_size, max_length
        self.toy = Path(model).resolve() == BASE.resolve()
        self.rate = learning_rate or (TOY_RATE if self.toy else USUAL_RATE)
        texts = documents()
        training, held_out = instruction_pairs(texts) if dataset is None else load_pairs(dataset)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.base = self.load()
        except Exception as error:  # whatever a damaged folder or an unknown architecture makes the loaders raise
            raise ValueError(
                f"cannot load a causal language model from {str(model)!r} ({first_line(error)}): give --model a "
                "folder that save_pretrained wrote (model and tokenizer), or a Hub id"
            ) from error
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if not isinstance(training[0]["prompt"], str) and self.tokenizer.chat_template is None:
            raise ValueError(
                f"the data is conversations, but the tokenizer of {str(model)!r} has no chat template: use an "
                "instruct model, or data with the text columns 'prompt' and 'completion'"
            )
        # Preferences before the cut: a short training still rejects completions from all of the data.
        self.preferences = preference_pairs(training)[:preferences]
        self.validation_preferences = preference_pairs(held_out[:validation])
        self.training = Dataset.from_list(training)
        self.validation = Dataset.from_list(held_out[:validation])
        self.general = general_batches(self.tokenizer, texts, blocks=general_blocks, batch_size=batch_size)
        self.total = sum(parameter.numel() for parameter in self.base.parameters())
        # TRL's own tokens and masks of the validation split, so that the new-task loss is the one it trains on.
        trainer = SFTTrainer(
            self.base,
            SFTConfig(**self.common(self.rate, 1)),
            train_dataset=self.validation,
            eval_dataset=self.validation,
            processing_class=self.tokenizer,
        )
        self.task = list(trainer.get_eval_dataloader())
        self.base_task_loss = token_loss(self.base, self.task)
        self.base_loss = token_loss(self.base, self.general)

    def load(self) -> transformers.PreTrainedModel:
        """A fresh copy of the base, computed in fp32 so that no row profits from another rounding."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)

    def common(self, rate: float, steps: int) -> dict[str, Any]:
        """The training arguments that SFT and DPO share."""
        return {
            "output_dir": str(self.output),
            "max_steps": steps,
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "learning_rate": rate,
            # Constant: the run that stops when it has learned enough cannot know its length beforehand.
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": min(10, steps // 2),
            "weight_decay": 0.0,
            "bf16": False,
            "gradient_checkpointing": False,
            "max_length": self.max_length,
            "logging_steps": 50,
            "save_strategy": "no",
            "report_to": "none",
            "dataloader_pin_memory": torch.cuda.is_available(),
            "seed": self.seed,
        }

    def sft(
        self,
        name: str,
        rate: float,
        steps: int,
        peft_config: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        anchor: AnchorConfig | None = None,
        **options: Any,
    ) -> tuple[SFTTrainer, StepTimer]:
        """Train one row from the base, anchored or not; `options` are further ones of `SFTConfig`."""
        print(f"\n{name}: at most {steps} steps at {rate:g}")
        transformers.set_seed(self.seed)
        timer = StepTimer()
        trainer_class = SFTTrainer if anchor is None else functools.partial(AnchoredSFTTrainer, anchor=anchor)
        trainer = trainer_class(
            self.load(),
            # Batches of examples of like length: half the tokens would be padding otherwise.
            SFTConfig(**(self.common(rate, steps) | {"train_sampling_strategy": "group_by_length"} | options)),
            train_dataset=self.training,
            processing_class=self.tokenizer,
            peft_config=peft_config,
            callbacks=[timer, *callbacks],
        )
        trainer.train()
        return trainer, timer

    def batches(self, count: int) -> list[dict[str, torch.Tensor]]:
        """The first batches of the training data, as the trainer makes them."""
        trainer = SFTTrainer(
            self.base,
            SFTConfig(**self.common(self.rate, 1)),
            train_dataset=self.training.select(range(min(len(self.training), count * self.batch_size))),
            processing_class=self.tokenizer,
        )
        return list(trainer.get_train_dataloader())

    def score(self, name: str, model: Any, trained: int, saved: int, seconds: float) -> Row:
        """Measure one trained model."""
        lost = forgetting(model, self.base_loss, self.general)
        return Row(name, token_loss(model, self.task), lost, trained / self.total, saved, seconds)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown, with aligned columns."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    text = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        for line in (header, *lines)
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (text[0], rule, *text[1:]))


def save_adapter(model: Any, folder: Path) -> int:
    """Save an adapter; return the bytes of its weights."""
    model.save_pretrained(folder)
    return (folder / "adapter_model.safetensors").stat().st_size


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def positive(text: str) -> int:
    """An option's whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def run_quietly(run: Callable[[Any], None], args: Any) -> None:
    """Run an example: its folder made, without bars for a second of loading; a user's mistake is one line.

    Args:
        run: takes the options.
        args: the options, `output` among them.
    """
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # TRL sets this field itself, whatever a user does, so the advice helps nobody.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated", category=FutureWarning)
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {first_line(error)}") from None
