"""How far each output unit moves, against its importance: `python docs/soft_mask.py [picture.png]`, under a minute.

The same 40 steps on the demo's task three times over, under AdamW and under SGD: without a mask, with the mask on the
gradient (the paper's), with the mask on the update (our default). What is compared is the norm of the row of ΔW of
each unit of up, over the norm it has without a mask.
"""

import sys
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from peft_isolate import CoFiTuneConfig, measure_importance
from peft_isolate.deltas.adapters import parameter_deltas

sys.path.append(str(Path(__file__).parent.parent / "examples" / "demo"))
from data import documents, instruction_pairs

BASE = Path(__file__).parent.parent / "examples" / "demo" / "base"
STEPS, BATCH, BINS = 40, 16, ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))
OPTIMIZERS = {"AdamW": (torch.optim.AdamW, 3e-4), "SGD": (torch.optim.SGD, 0.1)}


def batches(tokenizer) -> list[dict[str, torch.Tensor]]:
    """The first prompts with their completions, loss on both."""
    pairs, _ = instruction_pairs(documents())
    rows = [tokenizer(pair["prompt"] + pair["completion"], truncation=True, max_length=128) for pair in pairs]
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows[: STEPS * BATCH]]
    collate = DataCollatorForSeq2Seq(tokenizer)
    return [collate(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]


def row_norms(data, importance, soft_mask, optimizer, lr) -> dict[str, torch.Tensor]:
    """{parameter of up: ‖ΔW‖ of each row} after training."""
    transformers.set_seed(0)
    config = CoFiTuneConfig(importance=importance if soft_mask else None, soft_mask=soft_mask)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
    learns = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in data:
        learns.zero_grad()
        model(**batch).loss.backward()
        learns.step()
    deltas = parameter_deltas(model, "default")
    return {name: delta.dense().norm(dim=1) for name, delta in deltas.items() if "up_proj" in name}


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    data = batches(tokenizer)
    importance = measure_importance(AutoModelForCausalLM.from_pretrained(BASE), data[:8], heads=False, progress=False)
    points = {}
    print("| mask | optimizer | " + " | ".join(f"I {low:.1f}–{high:.1f}" for low, high in BINS) + " | correlation |")
    print("|---|---|" + "---|" * (len(BINS) + 1))
    for name, (optimizer, lr) in OPTIMIZERS.items():
        free = row_norms(data, importance, None, optimizer, lr)
        for soft_mask in ("gradient", "update"):
            moved = row_norms(data, importance, soft_mask, optimizer, lr)
            units = torch.cat([importance.units[f"model.layers.{n.split('.')[2]}.feed-forward.up"] for n in moved])
            share = torch.cat([moved[n] / free[n] for n in moved])
            points[soft_mask, name] = units, share
            means = [share[(units >= low) & (units <= high)].mean().item() for low, high in BINS]
            correlation = torch.corrcoef(torch.stack([units, share]))[0, 1].item()
            cells = " | ".join(f"{mean:.2f}" for mean in means)
            print(f"| {soft_mask} | {name} | {cells} | {correlation:+.2f} |")
    if len(sys.argv) > 1:
        draw(points, Path(sys.argv[1]))


def draw(points: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]], path: Path) -> None:
    """A panel for each mask and optimizer: a point a unit, and the line 1 − I."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.4), dpi=110, layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for axis, ((soft_mask, optimizer), (units, share)) in zip(axes.flat, points.items(), strict=True):
        axis.plot([0, 1], [1, 0], color="0.7", linewidth=1)
        axis.plot(units, share, ".", markersize=3, color="tab:blue", alpha=0.6)
        axis.set(title=f"{optimizer}, mask on the {soft_mask}", ylim=(0, 1.6))
    figure.supxlabel("importance I of the unit")
    figure.supylabel("‖ΔW‖ of its row, over that without a mask")
    figure.savefig(path)


if __name__ == "__main__":
    main()
