"""CoFiTune from end to end: search for the region, measure importance, train the best region with the soft mask on.

`python examples/cofitune_search.py` does it on the demo's model and task, offline, in some minutes: twelve
short trainings, then three longer ones. It writes the tree of the search, the picture of the importance, a table and
the final adapter under `outputs/cofitune`. Started again after a stop it goes on with the next trial; `--model` and
`--dataset` point it at anything else (give that another `--output`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_isolate import CoFiTuneConfig, measure_importance, plan, search_region
from peft_isolate.evaluation import token_loss

if __package__:  # python -m examples.cofitune_search
    from .demo.task import BASE, Task, run_quietly, save_adapter, table
else:
    sys.path.append(str(Path(__file__).parent / "demo"))
    from task import BASE, Task, run_quietly, save_adapter, table

# As a part of full fine-tuning's rate: of 1, 3, 10 and 30 this one gave the default region its lowest new-task loss.
RATE_FACTOR = 10
IMPORTANCE_BATCHES = 8
HEADER = ["model", "speciality", "versatility", "unified", "trained"]


class Search:
    """`train` and `score` as `search_region` wants them; both scores are mean probabilities of a token, 0 to 1."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.task = Task(args.model, args.dataset, args.output, args.learning_rate)

    def train(self, config: CoFiTuneConfig | None, steps: int | None = None, factor: float = RATE_FACTOR) -> Any:
        """A fresh copy of the base after a short training; None trains all of it."""
        trainer, _ = self.task.sft(
            f"{'full' if config is None else f'{config.modules} of {config.layer_range}'}",
            self.task.rate * factor,
            steps or self.args.steps,
            config,
            disable_tqdm=True,
            logging_strategy="no",
        )
        return trainer.model

    def score(self, model: Any) -> dict[str, float]:
        """The new task, and what the base could before."""
        return {
            "speciality": math.exp(-token_loss(model, self.task.task)),
            "versatility": math.exp(-token_loss(model, self.task.general)),
        }

    def row(self, name: str, model: Any, share: float) -> list[str]:
        """A line of the final table."""
        scores = self.score(model)
        numbers = [scores["speciality"], scores["versatility"], sum(scores.values())]
        return [name, *(f"{number:.4f}" for number in numbers), f"{share:.1%}"]


def check_output(args: argparse.Namespace) -> None:
    """Trials are told apart by config alone: those of another model, task or length are not these."""
    settings = {name: getattr(args, name) for name in ("model", "dataset", "steps", "learning_rate")}
    before = args.output / "settings.json"
    if before.exists() and json.loads(before.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"{args.output} holds a search with other settings, see {before}: give another --output")
    before.write_text(json.dumps(settings), encoding="utf-8")


def run(args: argparse.Namespace) -> None:
    """Search, measure, train."""
    check_output(args)
    search, output = Search(args), args.output
    result = search_region(search.train, search.score, output=output)
    print(f"\n{result}\n")
    result.save(output / "search.json")
    result.plot(output / "tree.png")

    base = search.task.base
    importance = measure_importance(base, search.task.batches(IMPORTANCE_BATCHES))
    importance.save(output / "importance.safetensors")
    importance.plot(output / "importance.png")
    best = replace(result.best, importance=importance)
    print(plan(base, best))

    share = plan(base, result.best).share
    rows = [search.row("base", base, 0.0), search.row("full", search.train(None, args.final_steps, 1), 1.0)]
    undamped = search.train(replace(result.best, soft_mask=None), args.final_steps)
    rows.append(search.row("best region", undamped, share))
    final = search.train(best, args.final_steps)
    rows.append(search.row("best region, soft mask", final, share))
    save_adapter(final, output / "adapter")
    text = table(HEADER, rows)
    (output / "results.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nOne seed: no claim about the method. Saved under {output}.")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BASE), help="folder or Hub id of a causal language model")
    parser.add_argument("--dataset", help="folder, file or Hub id with columns prompt and completion, or messages")
    parser.add_argument("--output", type=Path, default=Path("outputs/cofitune"), help="where to save")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each trial")
    parser.add_argument("--final-steps", type=int, default=100, help="optimizer steps of the trainings at the end")
    parser.add_argument("--learning-rate", type=float, help="of full fine-tuning; by default one that suits the model")
    args = parser.parse_args()
    run_quietly(run, args)


if __name__ == "__main__":
    main()
