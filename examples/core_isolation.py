"""CPI-FT from end to end: three tasks, their cores, groups, stages, fusion, and one adapter that keeps them all.

`python examples/core_isolation.py` does it on the demo's model, offline: three small tasks made of Python's standard
library, which ask for a function's summary, its arguments and its name. It prints the table of losses along the run
and writes everything under `outputs/isolation`. Started again after a stop it goes on with the next step.
`peft-isolate isolate` does the same with any model and data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trl import SFTConfig

from peft_isolate import IsolationRun

if __package__:  # python -m examples.core_isolation
    from .demo.data import documents, three_tasks
    from .demo.task import BASE, TOY_RATE, run_quietly
else:
    sys.path.append(str(Path(__file__).parent / "demo"))
    from data import documents, three_tasks
    from task import BASE, TOY_RATE, run_quietly


def run(args: argparse.Namespace) -> None:
    """The whole of CPI-FT, or of DPI."""
    tasks = three_tasks(documents())
    for task in tasks.values():
        task["test"] = task["test"][: args.rows]
    isolation = IsolationRun(
        BASE,
        tasks,
        args.output,
        sft=SFTConfig(
            learning_rate=TOY_RATE,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=max(1, args.steps // 20),
            max_steps=args.steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            max_length=256,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        percent=args.percent,
        threshold=args.threshold,
        fuse=not args.dpi,
    )
    print(isolation.run())


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/isolation"), help="where to save")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each training")
    parser.add_argument("--rows", type=int, default=48, help="held-out rows of each task to score on")
    parser.add_argument("--percent", type=float, default=1.0, help="size of a core, of the scalars in scope")
    parser.add_argument("--threshold", type=float, default=0.1, help="Jaccard from which on two tasks share a group")
    parser.add_argument("--dpi", action="store_true", help="stop before fusing")
    args = parser.parse_args()
    run_quietly(run, args)


if __name__ == "__main__":
    main()
