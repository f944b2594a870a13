"""Pretrain the first base: a Llama of 0.9 M parameters that can do six things, in a quarter of an hour on a core.

    python benchmarks/forgetting/pretrain.py --seed 0

The folder `bases/characters-<seed>/` then has the model and its tokenizer, as any Hub model has them. Rows are drawn
anew for every step, but for the questions that are kept to choose by and to judge by. The loss is on all of a row,
since the base has to know what prompts look like, too; the tokens of a prompt, most of them random, weigh a fifth of
those of an answer. It is an error if an ability stays below 96 % exact match.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from abilities import ABILITIES, BOS, EOS, PAD, VOCABULARY, Row, mixture
from measure import Questions
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BASES = Path(__file__).parent / "bases"
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


def batch(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids (rows, length) int64, padded on the right; what each weighs as a target (rows, length) fp32)."""
    index = {token: i for i, token in enumerate(VOCABULARY)}
    ids = [[1, *(index[c] for c in row["prompt"] + row["completion"]), 2] for row in rows]
    length = max(map(len, ids))
    weights = torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        prompt = 1 + len(row["prompt"])
        weights[i, 1:prompt], weights[i, prompt : len(ids[i])] = PROMPT_WEIGHT, 1.0
    return torch.tensor([row + [0] * (length - len(row)) for row in ids]), weights


def pretrain(seed: int, steps: int, every: int = 500) -> LlamaForCausalLM:
    """Train from scratch; prints what the model can do every so many steps."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / WARMUP) * max(0.01, 1 - s / steps))
    start = time.perf_counter()
    for step in range(1, steps + 1):
        ids, weights = batch(mixture("train", BATCH, seed=seed * 1_000_000 + step))
        logits = model(ids).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % every == 0 or step == steps:
            shown = ", ".join(f"{name} {share:.1%}" for name, share in scores(model).items())
            print(f"{step:5d} {time.perf_counter() - start:5.0f} s  loss {loss.item():.3f}  {shown}", flush=True)
    return model


def scores(model: torch.nn.Module) -> dict[str, float]:
    """{ability: share of questions answered without a mistake}, on questions that no training saw, facts apart."""
    tokens = tokenizer()
    return {ability.name: Questions(ability.rows("test", 200), tokens).exact_match(model) for ability in ABILITIES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the rows")
    parser.add_argument("--steps", type=int, default=3000, help=f"of {BATCH} rows")
    parser.add_argument("--output", type=Path, default=BASES, help="folder of the bases")
    args = parser.parse_args()
    model = pretrain(args.seed, args.steps)
    if missed := {name: share for name, share in scores(model).items() if share < ENOUGH}:
        raise SystemExit(f"error: below {ENOUGH:.0%} exact match: {missed}; train for more steps")
    folder = args.output / f"characters-{args.seed}"
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    print(f"saved to {folder}")


if __name__ == "__main__":
    main()
