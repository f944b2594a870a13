"""The forgetting table of the CPI-FT paper on the demo's model: task A then B, and B then A, with every control.

`python examples/isolation_forgetting.py` trains, for three seeds and in both orders, multi-task joint, staged (an
order drawn by the seed), staged in the order given, DPI and CPI-FT, and prints what each lost on the first task and
gained on the second. (CPI-FT comes back to the first task after fusion; "staged, twice around" does so without any
isolation, as its control.) Every method takes the same optimizer steps in all: those of the probes are charged to the
methods that need them, which train the fewer in their stages. All train the same scope, everything but the embeddings,
at one rate.

*Lost* is the loss on the held-out rows of the first task at the end, less that of a model trained on it alone for as
many steps as a stage of staged training has; *gained* is the fall of the loss on the second task from the base. In
nats per token.
"""

from __future__ import annotations

import argparse
import csv
import functools
import logging
import random
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer

from peft_isolate import CoreIsolationConfig, IsolationRun, next_stage
from peft_isolate.evaluation import HeldOutLoss

if __package__:  # python -m examples.isolation_forgetting
    from .demo.data import documents, three_tasks
    from .demo.task import BASE, TOY_RATE, run_quietly, table
else:
    sys.path.append(str(Path(__file__).parent / "demo"))
    from data import documents, three_tasks
    from task import BASE, TOY_RATE, run_quietly, table

A, B = "summary", "arguments"
METHODS = ("multi-task joint", "staged, order drawn", "staged, order given", "staged, twice around", "DPI", "CPI-FT")
# Of the steps in all, what one probe takes.
PROBE_SHARE = 1 / 6
HEADER = ["method", "steps: probes + stages", "A then B: A lost", "B gained", "B then A: B lost", "A gained"]


class Experiment:
    """One seed: every method in both orders, scored on both tasks."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        tasks = three_tasks(documents(), seed=seed)
        self.tasks = {name: tasks[name] for name in (A, B)}
        for task in self.tasks.values():
            task["test"] = task["test"][: args.rows]
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        self.scorers = {name: HeldOutLoss(task["test"], tokenizer, name=name) for name, task in self.tasks.items()}
        self.base = self.losses(self.model())
        stage = args.steps // 2
        self.alone = {name: self.losses(self.train(self.model(), rows["train"], stage))[name] for name, rows in
                      self.tasks.items()}  # fmt: skip

    def model(self) -> Any:
        """The base."""
        return AutoModelForCausalLM.from_pretrained(BASE)

    def losses(self, model: Any) -> dict[str, float]:
        """Nats per token of each task's held-out completions."""
        return {name: -scorer(model) for name, scorer in self.scorers.items()}

    def sft(self, steps: int) -> SFTConfig:
        """What every training shares."""
        return SFTConfig(
            str(self.args.output / "trainer"), learning_rate=self.args.learning_rate, max_steps=steps, seed=self.seed,
            lr_scheduler_type="constant_with_warmup", warmup_steps=max(1, steps // 20), max_length=256,
            per_device_train_batch_size=16, per_device_eval_batch_size=64, use_cpu=not torch.cuda.is_available(),
            bf16=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip

    def train(self, model: Any, rows: Sequence[dict[str, str]], steps: int) -> Any:
        """Train on: what was learned stays, the optimizer is new."""
        if not isinstance(model, PeftModel):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the adapter will take", UserWarning)
                model = get_peft_model(model, CoreIsolationConfig(task_type="CAUSAL_LM"))
        else:
            next_stage(model, frozen=[])
        trainer = SFTTrainer(model, self.sft(steps), train_dataset=Dataset.from_list(list(rows)))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.model

    @functools.cached_property
    def joint(self) -> dict[str, float]:
        """Both tasks at once, whatever the order."""
        rows = [row for task in self.tasks.values() for row in task["train"]]
        return self.losses(self.train(self.model(), rows, self.args.steps))

    @functools.cache  # noqa: B019  # an experiment lives as long as its results
    def staged(self, *order: str) -> dict[str, float]:
        """One after the other."""
        model = self.model()
        for name in order:
            model = self.train(model, self.tasks[name]["train"], self.args.steps // len(order))
        return self.losses(model)

    def isolated(self, first: str, second: str, fuse: bool) -> dict[str, float]:
        """DPI, or CPI-FT, each task a group of its own."""
        probe, stage = self.steps("CPI-FT" if fuse else "DPI")
        name = f"{'cpi' if fuse else 'dpi'}-{first}-{second}-{self.seed}"
        result = IsolationRun(
            BASE, self.tasks, self.args.output / name, sft=self.sft(stage), probe_sft={"max_steps": probe},
            threshold=None, order=[first, second], fuse=fuse, seed=self.seed,
            exact_match=False, progress=False,
        ).run()  # fmt: skip
        return self.losses(PeftModel.from_pretrained(self.model(), result.final))

    def steps(self, method: str) -> tuple[int, int]:
        """Optimizer steps of (a probe, a stage); two probes, and two or four stages."""
        if method not in ("DPI", "CPI-FT"):
            return 0, self.args.steps // 2
        probe = int(PROBE_SHARE * self.args.steps)
        return probe, (self.args.steps - 2 * probe) // (4 if method == "CPI-FT" else 2)

    def run(self, method: str, first: str, second: str) -> tuple[float, float]:
        """(what was lost on the first task, what was gained on the second)."""
        if method == "multi-task joint":
            found = self.joint
        elif method == "staged, order drawn":
            drawn = random.Random(self.seed).sample([A, B], 2)
            found = self.staged(*drawn)
        elif method == "staged, order given":
            found = self.staged(first, second)
        elif method == "staged, twice around":
            found = self.staged(first, second, first, second)
        else:
            found = self.isolated(first, second, fuse=method == "CPI-FT")
        return found[first] - self.alone[first], self.base[second] - found[second]


def run(args: argparse.Namespace) -> None:
    """Every method, every seed, both orders."""
    logging.getLogger("peft_isolate").setLevel(logging.ERROR)  # that nothing is frozen in a control is meant
    found: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for seed in range(args.seeds):
        experiment = Experiment(args, seed)
        print(f"seed {seed}: base {experiment.base}, each task alone {experiment.alone}", flush=True)
        for method in METHODS:
            numbers = [*experiment.run(method, A, B), *experiment.run(method, B, A)]
            found[method].append(numbers)
            print(f"seed {seed}: {method}: {', '.join(f'{number:+.4f}' for number in numbers)}", flush=True)
    rows = []
    for method, numbers in found.items():
        probe, stage = experiment.steps(method)
        stages = {METHODS[0]: 1, "staged, twice around": 4, "CPI-FT": 4}.get(method, 2)
        steps = f"2 × {probe} + {stages} × {stage}" if probe else f"0 + {stages} × {stage * 2 // stages}"
        columns = list(zip(*numbers, strict=True))
        rows.append([method, steps, *(_mean(column) for column in columns)])
    text = table(HEADER, rows)
    (args.output / "results.md").write_text(text + "\n", encoding="utf-8")
    with open(args.output / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "ab_a_lost", "ab_b_gained", "ba_b_lost", "ba_a_gained"])
        writer.writerows([method, seed, *one] for method, each in found.items() for seed, one in enumerate(each))
    print(
        f"\nA = {A}, B = {B}; nats per token, mean ± standard deviation over {args.seeds} seeds of one base.\n\n{text}"
    )
    print(f"\nA toy model of one base: no claim about larger ones. Saved under {args.output}.")


def _mean(numbers: Sequence[float]) -> str:
    spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.fmean(numbers):+.3f} ± {spread:.3f}"


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/isolation-forgetting"), help="where to save")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each method, probes included")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--rows", type=int, default=103, help="held-out rows of each task to score on")
    parser.add_argument("--learning-rate", type=float, default=TOY_RATE, help="of all trainings")
    args = parser.parse_args()
    run_quietly(run, args)


if __name__ == "__main__":
    main()
