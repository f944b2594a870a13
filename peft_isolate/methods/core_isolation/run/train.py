"""One training of a run by TRL's SFTTrainer: a fresh base, a fresh optimizer, one seed for all."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from logging import LogRecord
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn

from ....checkpoints.architecture import auto_class, models_config
from ....deltas import tuner
from ....deltas.gradient import by_rule
from ....errors import IsolateError
from ....training.arguments import given_arguments, logs, sft_config

_NOT_OURS = "every step of a run is saved whole when it ends, to a folder of its own"
_OWN = {
    "output_dir": _NOT_OURS,
    "save_strategy": _NOT_OURS,
    "resume_from_checkpoint": "a run that is started again goes on by itself",
    "load_best_model_at_end": _NOT_OURS,
    "push_to_hub": "the final adapter is yours to push",
    "eval_strategy": "a run scores every task after every step by itself",
    "do_eval": "a run scores every task after every step by itself",
    "chat_template_path": "it could add tokens to the base; save the base's tokenizer with the template",
}
_DECIDE_NOTHING = (
    "disable_tqdm",
    "ddp_timeout",
    "include_num_input_tokens_seen",
    "save_",
    "log",
    "report_to",
    "run_name",
)
# Fusion and scores are the main process's alone, and the others wait for it.
_PATIENCE = 24 * 3600


class Recipe:
    """How a run trains: the base, and the arguments of TRL's `SFTConfig`.

    Args:
        base: Folder or Hub id.
        sft: An `SFTConfig`, or a mapping of its arguments.
        changes: Arguments that replace some of them.
        progress: Show Trainer's bar.

    Attributes:
        args: The arguments, without what the base is loaded with.
        init: What the base is loaded with, `model_init_kwargs`.
        told: What of the arguments decides the numbers and is not TRL's default, however it was said.

    Raises:
        IsolateError: An argument is unknown, decided already, or has no sense.
        ImportError: TRL is not installed.
    """

    def __init__(self, base: str, sft: Any, changes: Any = None, progress: bool = True) -> None:
        args = given_arguments(sft, "sft") | given_arguments(changes, "probe_sft")
        init = args.pop("model_init_kwargs", None) or {}
        if not isinstance(init, Mapping):
            raise IsolateError(f"training argument model_init_kwargs={init!r} is no mapping")
        self.base, self.args, self.init, self.progress = base, args, dict(init), progress
        with tempfile.TemporaryDirectory() as folder:
            made = self.arguments(folder)
        self.told = {
            name: value for name, value in given_arguments(made, "sft").items() if not name.startswith(_DECIDE_NOTHING)
        }
        self.seed: int = made.seed
        self.max_length: int | None = made.max_length
        self.batch_size: int = made.per_device_train_batch_size
        self.eval_batch_size: int = made.per_device_eval_batch_size
        self.completion_only: bool = made.completion_only_loss is not False

    def arguments(self, folder: str | os.PathLike[str]) -> Any:
        """The `SFTConfig`."""
        defaults = {"disable_tqdm": not self.progress, "ddp_timeout": _PATIENCE}
        return sft_config(self.args, folder, _OWN, **defaults, include_num_input_tokens_seen="non_padding")

    def load_tokenizer(self) -> Any:
        """The base's, fresh: trainers change it."""
        from transformers import AutoTokenizer

        revision = self.init.get("revision")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.base, revision=revision)
        except (ValueError, KeyError, OSError) as error:
            raise IsolateError(f"no tokenizer can be loaded from {self.base!r}: {error}") from error
        if eos := self.args.get("eos_token"):
            tokenizer.eos_token = eos
        return tokenizer

    def load_base(self) -> nn.Module:
        """The base, in the dtype of its file where `model_init_kwargs` names none."""
        from transformers import set_seed

        set_seed(self.seed)  # what the base's file lacks is drawn
        made = auto_class(models_config(self.base, self.init.get("revision")))
        with quiet():
            model: nn.Module = made.from_pretrained(self.base, **({"dtype": "auto"} | self.init))
        return model

    def load(self, folder: Path | None, trainable: bool = False) -> nn.Module:
        """The base with the adapter in a folder, or the model that is there; without a folder the base."""
        if folder is None:
            return self.load_base()
        if (folder / "adapter_config.json").is_file():
            with quiet():
                return PeftModel.from_pretrained(self.load_base(), folder, is_trainable=trainable)
        with quiet():
            made: nn.Module = auto_class(models_config(folder)).from_pretrained(folder, dtype="auto")
        return made

    def train(self, model: nn.Module, rows: Sequence[Mapping[str, Any]], config: PeftConfig | None) -> Trained:
        """Train an adapter.

        Args:
            model: The base, or a PeftModel whose adapter learns.
            rows: As TRL reads them.
            config: Of the adapter, for a base; it is not changed.
        """
        from datasets import Dataset
        from transformers import PrinterCallback, ProgressCallback
        from trl import SFTTrainer

        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="peft-isolate-run-") as folder, quiet():
            # TRL seeds before it makes the adapter, and so every step starts alike, whatever ran before it.
            trainer = SFTTrainer(
                model=model,
                args=self.arguments(folder),
                train_dataset=Dataset.from_list([dict(row) for row in rows]),
                processing_class=self.load_tokenizer(),
                peft_config=copy.deepcopy(config),
            )
            trainer.remove_callback(PrinterCallback)
            if self.progress and not logs(self.args):
                trainer.remove_callback(ProgressCallback)
                trainer.add_callback(_bar())
            with by_rule():  # a run that was stopped and goes on gives the same bits
                result = trainer.train()
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        state = trainer.accelerator.get_state_dict(trainer.model) if sharded else None
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        record = {
            "rows": len(rows),
            "steps": trainer.state.global_step,
            "tokens": int(trainer.state.num_input_tokens_seen),
            "loss": result.training_loss,
            "losses": losses,
            "seconds": round(time.monotonic() - started, 3),
        }
        return Trained(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), state, record)


class Trained:
    """A trained adapter that is still in memory.

    Attributes:
        model: The PeftModel.
        state: Its whole state, where each process has a part of the model only.
        record: What the training took: rows, steps, tokens, mean loss, logged losses, seconds.
    """

    def __init__(self, model: Any, state: Mapping[str, torch.Tensor] | None, record: dict[str, Any]) -> None:
        self.model, self.state, self.record = model, state, record

    def save(self, folder: Path) -> None:
        """Write the adapter alone."""
        more = {} if self.state is None else {"state_dict": dict(self.state)}
        self.model.save_pretrained(folder, **more)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars of loading and tokenising, and without warnings of what a run says of itself: it is dense."""
    import datasets
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    tuner.logger.addFilter(_is_news)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*of its base's bytes.*", UserWarning)
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.*deprecated", FutureWarning)
            yield
    finally:
        tuner.logger.removeFilter(_is_news)
        if bars[0]:
            logging.enable_progress_bar()
        if not bars[1]:
            datasets.enable_progress_bars()


def _is_news(record: LogRecord) -> bool:
    return "nothing is frozen" not in record.getMessage()


def _bar() -> Any:
    """Trainer's progress bar, without the numbers that it prints at the end of a training."""
    from transformers import ProgressCallback

    class Bar(ProgressCallback):
        """Writes nothing beside itself."""

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            """Nothing."""

    return Bar()


def release() -> None:
    """Let go of a model that a trainer held: the two know each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
