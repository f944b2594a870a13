"""One short supervised fine-tuning as a function of a config: what a search trains again and again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftModel

from .arguments import logs, sft_config, trainable_rows

# What a trial decides by itself.
_OWN = dict.fromkeys(
    ("output_dir", "push_to_hub", "resume_from_checkpoint", "save_strategy"), "a trial keeps nothing on disk"
)


@dataclass(frozen=True)
class SFTTrial:
    """`trial(config)` trains a fresh copy of the base with TRL's `SFTTrainer` and returns the PeftModel.

    A pure function of the config: base, data, arguments and seed are the same each time. It can be pickled and holds
    no model, so that it runs in other processes, too. Nothing is left on disk.

    Args:
        base: Folder or Hub id.
        data: A JSONL file with "text", "prompt" and "completion", or "messages".
        args: Arguments of TRL's `SFTConfig`, such as learning_rate, max_steps, per_device_train_batch_size and
            max_length. TRL's defaults hold for the others, except that nothing is logged, saved or reported, and that
            without a GPU training is on the CPU, in fp32.

    Example:
        >>> SFTTrial("Qwen/Qwen3-0.6B", "train.jsonl", {"learning_rate": 2e-5, "max_steps": 100}).base
        'Qwen/Qwen3-0.6B'
    """

    base: str
    data: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Find a mistake before the first training.

        Raises:
            IsolateError: An argument is unknown or has no sense, or the data has no row that could be trained on.
            ImportError: TRL is not installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._arguments(folder)
        trainable_rows(self.data, self.data)

    def __call__(self, config: PeftConfig) -> PeftModel:
        """Train.

        Args:
            config: The adapter's.

        Returns:
            The adapted model, in training mode, on the device it was trained on.
        """
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import SFTTrainer

        with tempfile.TemporaryDirectory(prefix="peft-isolate-trial-") as folder:
            rows, _ = trainable_rows(self.data, self.data)
            # TRL seeds before it loads the base: what a base lacks is drawn the same way each time, too.
            trainer = SFTTrainer(
                model=self.base,
                args=self._arguments(folder),
                train_dataset=Dataset.from_list([dict(row) for row in rows]),
                peft_config=config,
            )
            if not logs(self.args):
                trainer.remove_callback(PrinterCallback)
            trainer.train()
            return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)

    def _arguments(self, folder: str | os.PathLike[str]) -> Any:
        """The `SFTConfig`."""
        return sft_config(self.args, folder, _OWN, disable_tqdm=True)
