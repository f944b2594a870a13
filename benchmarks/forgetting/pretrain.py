"""Pretrain the first base: a Llama of 0.9 M parameters that can do six things, in a quarter of an hour on a core.

    python benchmarks/forgetting/pretrain.py --seed 0

The folder `bases/characters-<seed>/` then has the model and its tokenizer, as any Hub model has them. Rows are drawn
anew for every step, but for the questions that are kept to choose by and to judge by. The loss is on all of a row,
since the base has to know what prompts look like, too; the tokens of a prompt, most of them random, weigh a fifth of
those of an answer. It is an error if an ability stays below 96 % exact match.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from abilities import ABILITIES, BOS, EOS, PAD, VOCABULARY, Row, mixture
from bases import BASES, rendered
from measure import Questions
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RATE, BATCH, WARMUP, PROMPT_WEIGHT = 2e-3, 128, 200, 0.2
ENOUGH = 0.96


def config() -> LlamaConfig:
    """The shape: 895,968 parameters, 3.6 MB in fp32."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=96, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for every character; every row begins with `<s>`."""
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=PAD))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def loss_of_rows(model: torch.nn.Module, rows: Sequence[Row], tokens: Any) -> torch.Tensor:
    """Mean over the tokens of rows, where those of a prompt weigh less."""
    [batch] = Questions(rows, tokens).batches
    ids, real, answers = batch["input_ids"], batch["attention_mask"], batch["labels"] != -100
    weights = torch.where(answers, 1.0, PROMPT_WEIGHT * real)[:, 1:].flatten()
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights).sum() / weights.sum()


def fit(
    model: LlamaForCausalLM, loss: Callable[[int], torch.Tensor], steps: int, show: Callable[[], str], kept: Path
) -> None:
    """Train with AdamW, warm-up and a straight line to a hundredth of the rate.

    Args:
        model: In fp32.
        loss: Of a step, counted from 1.
        steps: In all.
        show: What the model can do, printed every 250 steps.
        kept: What is needed to go on is kept in this file as often, and taken from it.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / WARMUP) * max(0.01, 1 - s / steps))
    parts = {"model": model, "optimizer": optimizer, "rate": rate}
    first = 1
    if kept.exists():
        found = torch.load(kept, weights_only=True)
        first = found.pop("step") + 1
        for name, state in found.items():
            parts[name].load_state_dict(state)
    start = time.perf_counter()
    for step in range(first, steps + 1):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 250 == 0 or step == steps:
            print(f"{step:5d} {time.perf_counter() - start:5.0f} s  loss {value.item():.3f}  {show()}", flush=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step}, f"{kept}.part")
            Path(f"{kept}.part").replace(kept)


def scores(model: torch.nn.Module, base: str, tokens: Any) -> dict[str, float]:
    """{ability: share of questions answered without a mistake}, on questions that no training saw, facts apart."""
    return {a.name: Questions(rendered(base, a.rows("test", 200)), tokens).exact_match(model) for a in ABILITIES}


def shown(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in found.items())


def save(model: LlamaForCausalLM, tokens: Any, base: str, folder: Path) -> None:
    """Write the base, if it can do everything."""
    if missed := {name: share for name, share in scores(model, base, tokens).items() if share < ENOUGH}:
        raise SystemExit(f"error: below {ENOUGH:.0%} exact match: {shown(missed)}; train for more steps")
    beside = folder.with_name(f"{folder.name}.part")  # a folder that is there is a whole base
    model.save_pretrained(beside)
    tokens.save_pretrained(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)
    print(f"saved to {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the rows")
    parser.add_argument("--steps", type=int, default=3000, help=f"of {BATCH} rows")
    parser.add_argument("--output", type=Path, default=BASES, help="folder of the bases")
    args = parser.parse_args()
    base = f"characters-{args.seed}"
    torch.manual_seed(args.seed)
    model, tokens = LlamaForCausalLM(config()), tokenizer()
    fit(
        model,
        lambda step: loss_of_rows(model, mixture("train", BATCH, seed=args.seed * 1_000_000 + step), tokens),
        args.steps,
        lambda: shown(scores(model, base, tokens)),
        Path("outputs") / "forgetting" / "pretraining" / f"{base}-{args.steps}.pt",
    )
    save(model, tokens, base, args.output / base)


if __name__ == "__main__":
    main()
