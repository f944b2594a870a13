"""Two processes that watch a training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.training import distributed_worker
from tests.training.distributed_worker import sft


class _Keeps(TrainerCallback):
    """What this process has logged when training ends."""

    def on_train_end(self, args, state, control, **rest):
        self.history = [entry for entry in state.log_history if "loss" not in entry and "train_loss" not in entry]
        self.steps = state.global_step


def watched(folder: Path, callback: TrainerCallback | None, **arguments: Any) -> dict[str, Any]:
    """`sft` under a callback.

    Returns:
        `losses` that were logged, what `else` was, and the `steps` that were made.
    """
    keeps = _Keeps()
    losses = sft(folder, callbacks=[keeps] if callback is None else [callback, keeps], **arguments)
    return {"losses": losses, "else": keeps.history, "steps": keeps.steps}


if __name__ == "__main__":
    from tests.training import watch_worker

    distributed_worker.main(Path(sys.argv[1]), vars(watch_worker))
