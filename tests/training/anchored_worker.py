"""Anchored trainings in two processes on CPU (gloo): jobs for `distributed_worker.pair`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.training import distributed_worker
from tests.training.distributed_worker import BATCH, fsdp2_plugin, reset, turn_to_fsdp

# Of anchor text in a step, however many processes share them.
ROWS = 8


def options(folder: Path, processes: int, **changes: Any) -> dict[str, Any]:
    """As the tests in one process have them."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": BATCH // processes, "max_length": 48,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "disable_tqdm": True, "learning_rate": 5e-3, "max_steps": 4,
    } | changes  # fmt: skip


def turned(trainer: Any, mode: str | None) -> Any:
    """The trainer, told by hand of FSDP2."""
    if mode == "fsdp2":
        turn_to_fsdp(trainer.accelerator.state, fsdp2_plugin())
        trainer.is_fsdp_enabled = True
    return trainer


def gradients(
    folder: Path, mode: str | None, what: str, processes: int = 2, anchor: dict | None = None, **changes: Any
) -> dict[str, Any]:
    """What each step of a training that goes nowhere was given, see `anchored_runs`.

    Args:
        folder: Where to.
        mode: "ddp", "fsdp2", or None in one process.
        what: See `adapted`.
        processes: That share the rows.
        anchor: Changes of the config.
        changes: Of the trainer's arguments.

    Returns:
        `steps`: {parameter: gradient} of each; `kl`: what was logged; `text`: its digest.
    """
    from transformers import Trainer

    from tests.training import anchored_runs

    reset()
    config = anchored_runs.config(batch_size=ROWS // processes, **(anchor or {}))
    model, given = anchored_runs.adapted(what), options(folder, processes)
    trainer = anchored_runs.trainers(Trainer, model, given, config, gradient_accumulation_steps=2, **changes)
    steps = anchored_runs.gradients(turned(trainer, mode))
    return {"steps": steps, "kl": anchored_runs.logged(trainer, "anchor/kl"), "text": trainer.anchor_text.digest()}


def sft(folder: Path, mode: str | None, processes: int = 2, resume: str | None = None, **anchor: Any) -> list[float]:
    """An SFT of Llama, its checkpoints and the adapter in `folder`: the `anchor/kl` that were logged."""
    from datasets import disable_progress_bars

    from tests.training import anchored_runs

    disable_progress_bars()
    reset()
    config = anchored_runs.config(batch_size=ROWS // processes, **anchor)
    given = options(folder, processes, **anchored_runs.SAVING)
    trainer = turned(anchored_runs.sft_trainer("llama", given, config, max_steps=4), mode)
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return anchored_runs.logged(trainer, "anchor/kl")


if __name__ == "__main__":
    from tests.training import anchored_worker

    distributed_worker.main(Path(sys.argv[1]), vars(anchored_worker))
