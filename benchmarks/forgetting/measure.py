"""What is measured of a model: exact match, the loss on general text, KL from the base; and its size on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from abilities import Row

from peft_isolate.deltas.reference import Reference
from peft_isolate.evaluation import divergence, token_loss
from peft_isolate.evaluation.forgetting import evaluating

# Rows that go through the model at once.
BATCH = 512


class Questions:
    """Rows as batches of token ids, made once: what TRL trains on, with the answer and its end to be scored.

    A row without a prompt is a piece of text, which has no end.

    Args:
        rows: With "prompt" and "completion".
        tokenizer: The model's.
        whole: Score the prompts, too, as general text.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Any, whole: bool = False) -> None:
        self.rows = list(rows)
        self.batches: list[dict[str, torch.Tensor]] = []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            prompts = [tokenizer(row["prompt"])["input_ids"] for row in part]
            texts = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in part]
            texts = [
                [*ids, tokenizer.eos_token_id] if row["prompt"] else ids for row, ids in zip(part, texts, strict=True)
            ]
            length = max(map(len, texts))
            ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in texts])
            at = torch.arange(length)
            real = at < torch.tensor([[len(row)] for row in texts])
            scored = real if whole else real & (at >= torch.tensor([[len(row)] for row in prompts]))
            batch = {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~scored, -100)}
            self.batches.append(batch)

    @torch.no_grad()
    def exact_match(self, model: torch.nn.Module) -> float:
        """Share of the answers that the model would write greedily, to their end.

        It is found without writing: greedy decoding gives the right answer exactly if, with the right answer before
        it, each of its tokens is the likeliest.
        """
        right = 0
        with evaluating(model):
            for batch in self.batches:
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                wanted = batch["labels"][:, 1:]
                right += int(((logits[:, :-1].argmax(-1) == wanted) | (wanted == -100)).all(1).sum())
        return right / len(self.rows)

    @torch.no_grad()
    def log_likelihoods(self, model: torch.nn.Module) -> torch.Tensor:
        """Of each row's scored tokens together, in nats: (rows,) fp32."""
        found = []
        with evaluating(model):
            for batch in self.batches:
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                wanted = batch["labels"][:, 1:]
                each = logits[:, :-1].log_softmax(-1).gather(-1, wanted.clamp(min=0).unsqueeze(-1)).squeeze(-1)
                found.append(each.masked_fill(wanted == -100, 0.0).sum(1))
        return torch.cat(found)

    def loss(self, model: torch.nn.Module) -> float:
        """Mean over the scored tokens, in nats."""
        return token_loss(model, self.batches)

    @torch.no_grad()
    def divergence(self, model: torch.nn.Module, base: Reference) -> float:
        """Mean over the scored tokens of KL(base ‖ model), in nats."""
        with evaluating(model):
            found = [divergence(model, batch, base) for batch in self.batches]
        return sum(total.item() for total, _ in found) / sum(tokens for _, tokens in found)


def file_size(model: Any, adapter: bool) -> int:
    """Bytes of what would be kept: the adapter as it is saved, or all weights."""
    if not adapter:
        return sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
