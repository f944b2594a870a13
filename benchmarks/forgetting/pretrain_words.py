"""Pretrain the second base: 5 M parameters, subwords, real text beside the abilities; 35 minutes on two cores.

    python benchmarks/forgetting/pretrain_words.py

A third of the tokens are the source of Python's standard library (as in the demo: one document in twenty is held out),
two thirds are rows of the six abilities, spelled in words of that source. Stopped, it goes on where it was. The folder
`outputs/forgetting/bases/words-0/` is too large for the repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from abilities import mixture
from bases import MADE, WORDS, of_the_demo, rendered
from pretrain import fit, loss_of_rows, save, scores, shown
from protocol import OTHER_BASE as BASE
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
ROWS, BLOCKS, LENGTH = 128, 8, 128


def config(vocabulary: int = VOCABULARY) -> LlamaConfig:
    """The shape: 5.1 M parameters."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip


def tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training documents, in which every word of a row is one token; begins a text itself."""
    tokens = of_the_demo("pretrain").train_tokenizer(of_the_demo("data").documents(), vocabulary)
    begin = tokens.bos_token
    tokens.backend_tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False),
         processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, tokens.bos_token_id)])]
    )  # fmt: skip
    if split := [
        word for word in WORDS.values() if len(tokens(f" {word}", add_special_tokens=False)["input_ids"]) > 1
    ]:
        raise SystemExit(f"error: {split} are more than one token each: take other words in bases.py")
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help=f"of {ROWS} rows and {BLOCKS} blocks of text")
    parser.add_argument("--output", type=Path, default=MADE, help="folder of the bases")
    args = parser.parse_args()
    data, tokens = of_the_demo("data"), tokenizer()
    read, held_out = (
        data.token_blocks(tokens, [d for d in data.documents() if d.held_out is out], LENGTH) for out in (False, True)
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {read.numel():,} tokens of text", flush=True)

    def loss(step: int) -> torch.Tensor:
        rows = rendered(BASE, mixture("train", ROWS, seed=step))
        drawn = torch.randint(len(read), (BLOCKS,), generator=torch.Generator().manual_seed(step))
        text = model(input_ids=read[drawn], labels=read[drawn]).loss
        return loss_of_rows(model, rows, tokens) + text

    def show() -> str:
        return f"text {of_text(model, held_out):.3f} nats, {shown(scores(model, BASE, tokens))}"

    fit(model, loss, args.steps, show, Path("outputs") / "forgetting" / "pretraining" / f"{BASE}-{args.steps}.pt")
    save(model, tokens, BASE, args.output / BASE)


@torch.no_grad()
def of_text(model: LlamaForCausalLM, blocks: torch.Tensor, count: int = 32) -> float:
    """Mean loss per token on some blocks, in nats."""
    return model(input_ids=blocks[:count], labels=blocks[:count]).loss.item()


if __name__ == "__main__":
    main()
