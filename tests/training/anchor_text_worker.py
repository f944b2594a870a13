"""What the two processes of `test_anchor_text` do: each makes the anchor text of its own model."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from peft_isolate.training.anchor.config import AnchorConfig
from peft_isolate.training.anchor.text import anchor_text
from tests.models import tiny
from tests.training import distributed_worker


def written(folder: Path, config: dict, broken: int | None = None) -> tuple[str, list[dict[str, torch.Tensor]]]:
    """(digest, the first batches) of text that the model writes; another model on each process.

    Args:
        folder: Not used.
        config: Of the anchor.
        broken: The process whose model gives no finite numbers.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = tiny(seed=rank)
    if rank == broken:
        with torch.no_grad():
            model.lm_head.weight.fill_(torch.nan)
    text = anchor_text(AnchorConfig(**config), model)
    return text.digest(), [text.batch(step, rank, 2) for step in range(3)]


if __name__ == "__main__":
    distributed_worker.main(Path(sys.argv[1]), globals())
