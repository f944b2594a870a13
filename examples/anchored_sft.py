"""Fine-tuning that is held to the base: without an anchor, on random tokens, on the base's own text, on old data.

`python examples/anchored_sft.py` does it on the demo's model, offline: HFT learns to summarise a function from its
signature, four times with the same steps, rate and batches, each time with another anchor. It prints what each has
learned, what it has forgotten of the text that the base was trained on, and what a step takes. `--model` and
`--dataset` point it at anything else, `--replay` names text of yours to be anchored on. Forgetting is measured on the
standard library's source text, whatever the model. It takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from peft_isolate import AnchorConfig, HalfFTConfig
from peft_isolate.evaluation import forgetting, token_loss

if __package__:  # python -m examples.anchored_sft
    from .demo.data import documents
    from .demo.task import BASE, TOY_RATE, USUAL_RATE, Task, positive, run_quietly, table
else:
    sys.path.append(str(Path(__file__).parent / "demo"))
    from data import documents
    from task import BASE, TOY_RATE, USUAL_RATE, Task, positive, run_quietly, table

# Characters of the pieces that old documents are cut into: the demo's tokenizer makes some 200 tokens of them.
PIECE = 600
HEADER = ["anchor", "new-task loss", "forgetting", "KL at the end", "s / step"]


def old_data(count: int, seed: int) -> list[dict[str, str]]:
    """Pieces of the documents that the demo's base was trained on; none of those that forgetting is measured on."""
    pieces = [
        document.text[start : start + PIECE]
        for document in documents()
        if not document.held_out
        for start in range(0, len(document.text), PIECE)
    ]
    return [{"text": piece} for piece in random.Random(seed).sample(pieces, min(count, len(pieces)))]


class Comparison(Task):
    """The rows of the table."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        super().__init__(args.model, args.dataset, args.output, args.learning_rate, args.batch_size, seed=args.seed)

    def anchors(self) -> dict[str, AnchorConfig]:
        """{name: config}; the first is none."""
        replay = self.args.replay or old_data(self.args.rows, self.seed)
        sources = {"random": "random", "self": "self", "replay": replay}
        share = {"batch_size": self.args.anchor_batch_size, "max_length": self.args.anchor_length, "seed": self.seed}
        found = {"none": AnchorConfig(beta=0)}
        for name, source in sources.items():
            found[name] = AnchorConfig(source, self.args.beta, n_rows=self.args.rows, every=self.args.every, **share)
        return found

    def trained(self, name: str, anchor: AnchorConfig) -> list[str]:
        """One training; its line."""
        trainer, timer = self.sft(
            f"anchor: {name}", self.rate, self.args.steps, HalfFTConfig(), anchor=anchor,
            logging_steps=max(1, self.args.steps // 5), train_sampling_strategy="random",
        )  # fmt: skip
        trainer.save_model(str(self.output / name))
        kl = [entry["anchor/kl"] for entry in trainer.state.log_history if "anchor/kl" in entry]
        learned = token_loss(trainer.model, self.task)
        forgotten = forgetting(trainer.model, self.base_loss, self.general)
        last = f"{kl[-1]:.4f}" if kl else "–"
        return [name, f"{learned:.4f}", f"{forgotten:+.4f}", last, f"{timer.median:.3f}"]


def run(args: argparse.Namespace) -> None:
    """Every anchor, and the table."""
    comparison = Comparison(args)
    lines = [["the base", f"{comparison.base_task_loss:.4f}", "+0.0000", "–", "–"]]
    lines += [comparison.trained(name, anchor) for name, anchor in comparison.anchors().items()]
    text = table(HEADER, lines)
    (args.output / "results.md").write_text(text + "\n", encoding="utf-8")
    toy = " of a toy model" if comparison.toy else ""
    print(f"\nβ = {args.beta:g}; nats per token; KL on the anchor text, as a mean over the last fifth of the steps.\n")
    print(f"{text}\n\nOne seed{toy}: no claim. Adapters and table under {args.output}.")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BASE), help="folder or Hub id of a causal language model")
    parser.add_argument("--dataset", help="folder, file or Hub id with columns prompt and completion, or messages")
    parser.add_argument(
        "--replay", help="JSONL file of old text to be anchored on; default: what the demo's base read"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/anchored-sft"), help="where to save")
    parser.add_argument("--steps", type=positive, default=100, help="optimizer steps of each training")
    parser.add_argument("--batch-size", type=positive, default=16, help="examples in a step")
    parser.add_argument("--learning-rate", type=float, help=f"of HFT; {TOY_RATE:g} for the toy, else {USUAL_RATE:g}")
    parser.add_argument("--beta", type=float, default=1.0, help="how strongly the anchor holds")
    parser.add_argument("--anchor-batch-size", type=positive, default=8, help="rows of anchor text in a step")
    parser.add_argument("--anchor-length", type=positive, default=128, help="tokens in such a row, at most")
    parser.add_argument("--every", type=positive, default=1, help="anchor every so many steps")
    parser.add_argument("--rows", type=positive, default=256, help="rows that are sampled, or taken of the old data")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data, and of the anchor text")
    run_quietly(run, parser.parse_args())


if __name__ == "__main__":
    main()
