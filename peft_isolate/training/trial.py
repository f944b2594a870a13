"""One short supervised fine-tuning as a function of a config: what a search trains again and again."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

import torch
from peft import PeftConfig, PeftModel

from ..errors import IsolateError
from ..evaluation.rows import KINDS, flag, positive, read_rows

# What a trial decides by itself: it keeps nothing on disk.
_OWN = ("output_dir", "push_to_hub", "resume_from_checkpoint", "save_strategy")
# What TRL takes at any value, and every training then stumbles over or passes by.
_COUNTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length")


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
        self._rows()

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
            # TRL seeds before it loads the base: what a base lacks is drawn the same way each time, too.
            trainer = SFTTrainer(
                model=self.base,
                args=self._arguments(folder),
                train_dataset=Dataset.from_list([dict(row) for row in self._rows()]),
                peft_config=config,
            )
            if not self._logs:
                trainer.remove_callback(PrinterCallback)
            trainer.train()
            return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)

    @property
    def _logs(self) -> bool:
        return "logging_steps" in self.args or "logging_strategy" in self.args

    def _rows(self) -> list[Mapping[str, Any]]:
        rows = read_rows(self.data)
        kinds = ({"prompt", "completion"}, {"text"}, {"messages"})
        fields = next((kind for kind in kinds if kind <= set(rows[0])), None)
        if fields is None:
            raise IsolateError(f"{self.data}: its rows have the fields {sorted(rows[0])}: to train, they need {KINDS}")
        for number, row in enumerate(rows):
            if not fields <= set(row):
                raise IsolateError(
                    f"{self.data}: row {number} has the fields {sorted(row)}, row 0 {sorted(rows[0])}: make them alike"
                )
            for name in sorted(fields):
                if not isinstance(row[name], str | list):
                    raise IsolateError(
                        f"{self.data}, row {number}: {row[name]!r} is neither text nor a list of messages"
                    )
        return rows

    def _arguments(self, folder: str | os.PathLike[str]) -> Any:
        """The `SFTConfig`."""
        try:
            from trl import SFTConfig
        except ImportError as error:
            raise ImportError(f"training needs TRL ({error}): pip install 'peft_isolate[trl]'") from error
        known = {option.name for option in dataclasses.fields(SFTConfig) if option.init}
        hints = get_type_hints(SFTConfig)
        for name, value in self.args.items():
            if name in _OWN:
                raise IsolateError(f"training argument {name!r}: a trial keeps nothing on disk; leave it out")
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=3)
                raise IsolateError(
                    f"training argument {name!r} is unknown to trl.SFTConfig"
                    + (f"; did you mean one of {close}?" if close else "; its documentation lists what it knows")
                )
            _check_value(name, value, hints[name])
        on_cpu = not torch.accelerator.is_available()
        defaults: dict[str, Any] = {"report_to": "none", "disable_tqdm": True}
        defaults |= {} if self._logs else {"logging_strategy": "no"}
        defaults |= {"use_cpu": True, "bf16": False} if on_cpu else {}
        given = defaults | dict(self.args) | {"output_dir": str(folder), "save_strategy": "no"}
        try:
            with warnings.catch_warnings():
                # Of TRL's own default: the user has nothing to mend.
                warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated", FutureWarning)
                return SFTConfig(**given)
        except (ValueError, TypeError) as error:
            raise IsolateError(f"training arguments {dict(self.args)}: {error}") from error


def _check_value(name: str, value: Any, hint: Any) -> None:
    """Refuse what is of another kind than a field of numbers or flags: `SFTConfig` itself takes anything."""
    kinds = set(get_args(hint) or [hint])
    if not kinds <= {int, float, bool, type(None)} or (value is None and type(None) in kinds):
        return
    what = f"training argument {name}"
    if bool in kinds:
        return flag(what, value)
    if isinstance(value, str):
        raise IsolateError(f"{what}={value!r} is text: write {_as_number(value)}")
    wanted, called = (Real, "finite") if float in kinds else (Integral, "whole")
    if not isinstance(value, wanted) or isinstance(value, bool) or not math.isfinite(value):
        raise IsolateError(f"{what}={value!r}: use a {called} number")
    if name in _COUNTS:
        positive(what, value, optional=type(None) in kinds)
    if name == "learning_rate" and value < 0:
        raise IsolateError(f"{what}={value!r}: use a number from 0 on")


def _as_number(text: str) -> str:
    """How YAML wants a number: with a point, and a sign behind the e."""
    try:
        float(text)
    except ValueError:
        return "a number"
    mantissa, e, exponent = text.strip().lower().partition("e")
    if not e:
        return f"{mantissa}, without quotes"
    return f"{mantissa}{'' if '.' in mantissa else '.0'}e{'' if exponent[0] in '+-' else '+'}{exponent}"
