"""Does CoFiTune's importance matter, or only that it slows the training down?

On the demo's model and task the paper's best region is trained at several rates: without a mask, with the importance
of its units as the soft mask, and with that importance shuffled among the units of each layer, which damps as much,
but the wrong ones. If only the slowing mattered, a lower rate without a mask and the shuffled ones would do as well.

    python benchmarks/soft_mask.py
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import datasets
import torch
import transformers

from peft_isolate import CoFiTuneConfig, measure_importance
from peft_isolate.evaluation import forgetting, token_loss
from peft_isolate.methods.cofitune import Importance

sys.path.append(str(Path(__file__).parent.parent / "examples" / "demo"))
from common import report
from task import Task

# (times full fine-tuning's rate, mask)
RUNS = [
    (3, "none"), (5, "none"), (10, "none"),
    (3, "importance"), (10, "importance"), (30, "importance"),
    (10, "shuffled 0"), (10, "shuffled 1"), (10, "shuffled 2"),
]  # fmt: skip


def shuffled(importance: Importance, seed: int) -> Importance:
    """The same values in each layer, on other units."""
    generator = torch.Generator().manual_seed(seed)
    units = {key: v[torch.randperm(len(v), generator=generator)] for key, v in importance.units.items()}
    return Importance(units, importance.method, importance.batches, importance.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    task = Task(output=Path("outputs/benchmark"))
    importance = measure_importance(task.base, task.batches(8), heads=False)
    rows = []
    for factor, mask in RUNS:
        kind, _, seed = mask.partition(" ")
        given = {"none": None, "importance": importance, "shuffled": shuffled(importance, int(seed or 0))}[kind]
        trainer, _ = task.sft(
            f"{mask} × {factor}",
            factor * task.rate,
            args.steps,
            CoFiTuneConfig(importance=given, soft_mask=given and "update"),
            disable_tqdm=True,
            logging_strategy="no",
        )
        lost = forgetting(trainer.model, task.base_loss, task.general)
        loss = token_loss(trainer.model, task.task)
        numbers = {"new_task_loss": f"{loss:.4f}", "forgetting": f"{lost:+.4f}"}
        rows.append({"times_the_rate": factor, "mask": mask, **numbers})
    report("soft_mask", rows)


if __name__ == "__main__":
    main()
