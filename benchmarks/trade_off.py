"""What does the dial buy: how much old ability comes back for how much of the new task, from one trained adapter?

On the demo's model (1.3 M parameters). The new task conflicts with what the model can do: after ordinary Python source
it is to go on in swapped case. Speciality is the mean probability (geometric) of the tokens of that continuation,
versatility that of the ordinary one, after the same prompts. Everything is trained once as a delta (full fine-tuning),
and a half by HFT, at the same rate; then every α, Half-Reset and pruning is scored on validation documents, a point is
chosen there for each floor, and reported on test documents.

    python benchmarks/trade_off.py

`results/trade_off.csv` has every point of the frontiers, `results/trade_off_chosen.csv` the chosen ones.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import transformers
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer

from peft_isolate import CoreIsolationConfig, HalfFTConfig, half_reset
from peft_isolate.deltas.prune import prune
from peft_isolate.evaluation import HeldOutLoss, Scores
from peft_isolate.evaluation.frontier import Frontier, Point, frontier

sys.path.append(str(Path(__file__).parent.parent / "examples" / "demo"))
from common import report
from data import documents
from task import BASE, TOY_RATE

METHODS = {"full": CoreIsolationConfig, "HFT": HalfFTConfig}
CHANGES = {half_reset: (None, 0.25, 0.5), prune: (None, 10, 1)}
# Of the new task's score at α = 1: the floors that a point is chosen for.
FLOORS = (0.97, 0.90)
# Characters of a prompt and of what follows it.
PROMPT, COMPLETION = 160, 80


class Rows:
    """The same prompts with both continuations, from documents that are trained on, validated on, or tested on."""

    def __init__(self, limit: int) -> None:
        self.train: list[dict[str, str]] = []
        held_out: list[list[tuple[str, str]]] = [[], []]
        n_held_out = 0
        for document in documents():
            length = PROMPT + COMPLETION
            starts = range(0, len(document.text) - length, length)
            pairs = [(document.text[i : i + PROMPT], document.text[i + PROMPT : i + length]) for i in starts]
            if document.held_out:
                # Whole documents: none is in both. Some pairs of each, that no long one is most of them.
                held_out[n_held_out % 2] += pairs[:4]
                n_held_out += 1
            else:
                self.train += [{"prompt": prompt, "completion": text.swapcase()} for prompt, text in pairs]
        self.validation, self.test = (pairs[:limit] for pairs in held_out)


def scores(pairs: list[tuple[str, str]], tokenizer: Any) -> Scores:
    """Both scores on these prompts."""
    new = [{"prompt": prompt, "completion": text.swapcase()} for prompt, text in pairs]
    old = [{"prompt": prompt, "completion": text} for prompt, text in pairs]
    options = {"tokenizer": tokenizer, "batch_size": 32, "probability": True}
    return Scores(HeldOutLoss(new, name="swapped", **options), HeldOutLoss(old, name="ordinary", **options))


def trained(config: Any, rows: list[dict[str, str]], args: argparse.Namespace, seed: int) -> Any:
    """The demo's model, trained on the new task."""
    transformers.set_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
    options = SFTConfig(
        "outputs/benchmark", learning_rate=args.learning_rate, max_steps=args.steps, seed=seed, max_length=256,
        lr_scheduler_type="constant_with_warmup", warmup_steps=args.steps // 20, per_device_train_batch_size=16,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model, options, train_dataset=Dataset.from_list(rows).shuffle(seed))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def chosen(found: Frontier, floor: float, changes: bool) -> Point:
    """The most versatile point that keeps this share of the new task at α = 1, of all points or of α alone."""
    plain = [p for p in found.points if not any(p.changes.values())]
    whole = next(p for p in plain if p.alpha == 1.0)
    among = found if changes else Frontier(tuple(plain), found.adapter)
    return among.best(speciality=floor * whole.speciality)


def measure(
    method: str, rows: list[dict[str, str]], validation: Scores, test: Scores, args: argparse.Namespace, seed: int
) -> dict[str, list[dict[str, object]]]:
    """Train once, score everywhere on validation, and the chosen points on test; the first of these is α = 1."""
    config = METHODS[method](task_type="CAUSAL_LM", **({"seed": seed} if method == "HFT" else {}))
    model = trained(config, rows, args, seed)
    found = frontier(model, validation, changes=CHANGES)
    print(f"\n{method}, seed {seed}\n{found}", flush=True)
    found.plot(args.output / f"{method}-{seed}.png")
    wanted = {("α = 1", "-"): next(point for point in found.points if point.alpha == 1.0)}
    for floor in FLOORS:
        wanted["α", f"{floor:.0%}"] = chosen(found, floor, changes=False)
        wanted["α, half_reset, prune", f"{floor:.0%}"] = chosen(found, floor, changes=True)
    run = {"method": method, "seed": seed}
    return {
        "points": [run | _columns(point) for point in found.points],
        "chosen": [
            run | {"axis": axis, "floor": floor} | _columns(found.report(model, test, point))
            for (axis, floor), point in wanted.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each training, 16 rows each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the data's order and HFT's draw")
    parser.add_argument("--rows", type=int, default=64, help="prompts to validate on, and to test on")
    parser.add_argument("--learning-rate", type=float, default=TOY_RATE, help="of both methods")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/trade-off"),
        help="what was measured is kept here, with a picture each, and not measured again",
    )  # fmt: skip
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("peft_isolate", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    tokenizer, rows = AutoTokenizer.from_pretrained(BASE), Rows(args.rows)
    validation, test = scores(rows.validation, tokenizer), scores(rows.test, tokenizer)
    base = test(AutoModelForCausalLM.from_pretrained(BASE))
    print(f"base on test: {base['speciality']:.4f} of the new task, {base['versatility']:.4f} of the old", flush=True)
    points: list[dict[str, object]] = []
    picked: list[dict[str, object]] = []
    for seed in args.seeds:
        for method in METHODS:
            kept = args.output / f"{method}-{seed}-{args.steps}.json"
            if not kept.exists():
                measured = measure(method, rows.train, validation, test, args, seed)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(measured))
            measured = json.loads(kept.read_text())
            points += measured["points"]
            for row in measured["chosen"]:
                whole = measured["chosen"][0]
                shares = {
                    "new task %": f"{100 * float(row['speciality']) / float(whole['speciality']):.1f}",
                    "old ability %": f"{100 * float(row['versatility']) / base['versatility']:.1f}",
                }
                picked.append(row | shares)
    report("trade_off", points)
    report("trade_off_chosen", picked)
    print("\n| trained | axis | floor | new task, % of α = 1 | old ability, % of the base |\n|---|---|---|---|---|")
    for method, axis, floor in dict.fromkeys((r["method"], r["axis"], r["floor"]) for r in picked):
        same = [r for r in picked if (r["method"], r["axis"], r["floor"]) == (method, axis, floor)]
        print(f"| {method} | {axis} | {floor} | {_mean(same, 'new task %')} | {_mean(same, 'old ability %')} |")


def _columns(point: Point) -> dict[str, object]:
    changes = {name: "-" if value is None else value for name, value in point.changes.items()}
    numbers = {"speciality": f"{point.speciality:.4f}", "versatility": f"{point.versatility:.4f}"}
    return {**changes, "alpha": f"{point.alpha:g}", **numbers}


def _mean(rows: list[dict[str, object]], column: str) -> str:
    """Over the seeds, with the smallest and the largest."""
    numbers = [float(str(row[column])) for row in rows]
    return f"{statistics.fmean(numbers):.1f} ({min(numbers):.1f} to {max(numbers):.1f})"


if __name__ == "__main__":
    main()
