"""Makes the demo's base model from nothing but the running Python's standard library.

Run `python examples/demo/pretrain.py`: it trains a tokenizer, then a small Llama (1.3 M parameters, grouped-query
attention, untied head), measures it on held-out documents and writes `examples/demo/base/`. Half an hour on one core.
The numbers in the folder's README are the ones this run measured.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if __package__:  # python -m examples.demo.pretrain
    from .data import Document, documents, general_batches, token_blocks
else:
    from data import Document, documents, general_batches, token_blocks

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SAMPLE_PROMPT = "def read_lines(path):\n"

README = """# The demo's base model

A toy: a Llama with {parameters:,} parameters ({layers} layers, hidden size {hidden}, {heads} attention heads on
{kv_heads} key and value heads, untied head, bfloat16) and a byte-level BPE tokenizer of {vocabulary:,} tokens. It has
read the source files, docstrings and help topics of Python's standard library and nothing else. It is here so that
`demo.py` and the tests have real trained weights without a download; it is of no other use.

**Licence of the text.** Source and docstrings of Python's standard library (CPython {python}), Copyright Python
Software Foundation, under the [PSF License Version 2](https://docs.python.org/3/license.html); the library's own
headers name further authors of some modules.

## How it was made

    python examples/demo/pretrain.py --steps {steps} --seed {seed}

with CPython {python}, torch {torch} and one CPU thread: {steps:,} steps of {batch} blocks of {length} tokens
({seen:.1f} M tokens, {epochs:.1f} passes over {training:,} training documents), AdamW, peak learning rate {rate:g},
cosine to a tenth of it; {minutes:.0f} minutes at {speed:,.0f} tokens a second. Another Python version has another
standard library and gives another model.

## What was measured

{held_out} documents ({held_out_tokens:,} tokens) were held out by a hash of their names (`data.py`): never trained on,
here or in the demo. Mean loss per token on them, with the weights as stored: **{loss:.4f} nats** (perplexity
{perplexity:.2f}; a uniform guess has {uniform:.4f}). Training loss, mean of the last 100 steps: {training_loss:.4f}.

A sample, prompt `{prompt}`, temperature 0.7:

{sample}
"""


def train_tokenizer(texts: list[Document], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the training documents.

    Args:
        texts: documents; held-out ones are left out here too.
        vocabulary: tokens in all, the three special ones included.

    Returns:
        A tokenizer with pad, bos and eos that adds no special token by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in texts if not d.held_out), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def train(model: LlamaForCausalLM, blocks: torch.Tensor, args: argparse.Namespace) -> tuple[float, float]:
    """Train in place with AdamW, warm-up and a cosine to a tenth of the peak rate.

    Args:
        model: on the CPU, fp32.
        blocks: token ids, (blocks, length) int64.
        args: `steps`, `batch_size`, `learning_rate`, `seed`.

    Returns:
        Mean loss of the last 100 steps in nats per token, and tokens per second.
    """
    generator = torch.Generator().manual_seed(args.seed)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    warm_up = min(100, args.steps // 10 + 1)

    def schedule(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, args.steps - warm_up))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    order = torch.empty(0, dtype=torch.int64)
    losses: list[float] = []
    model.train()
    start = time.perf_counter()
    bar = tqdm(range(args.steps), desc="pretraining", unit="step", mininterval=5)
    for _ in bar:
        if len(order) < args.batch_size:  # a new pass: every block once, in a new order
            order = torch.cat([order, torch.randperm(len(blocks), generator=generator)])
        batch, order = blocks[order[: args.batch_size]], order[args.batch_size :]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            speed = len(losses) * batch.numel() / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {sum(losses[-50:]) / 50:.3f}, {speed:,.0f} tokens/s", refresh=False)
    seconds = time.perf_counter() - start
    tail = losses[-100:]
    return sum(tail) / len(tail), args.steps * args.batch_size * blocks.shape[1] / seconds


def held_out_loss(model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean loss per token in nats over batches of equal blocks."""
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            scored = batch["input_ids"][:, 1:].numel()
            total += model(**batch, labels=batch["input_ids"]).loss.item() * scored
            tokens += scored
    return total / tokens


def main() -> None:
    """Train the tokenizer and the model, measure both and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "base", help="folder to write")
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a block")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="peak rate")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens, the three special ones included")
    parser.add_argument("--layers", type=int, default=6, help="decoder layers")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and order")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; another number rounds differently")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    texts = documents()
    tokenizer = train_tokenizer(texts, args.vocabulary)
    blocks = token_blocks(tokenizer, [d for d in texts if not d.held_out], args.length)
    general = general_batches(tokenizer, texts, length=args.length)
    held_out_tokens = sum(b["input_ids"].numel() for b in general)
    print(f"{len(texts)} documents: {blocks.numel():,} training tokens, {held_out_tokens:,} held out")

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    start = time.perf_counter()
    training_loss, speed = train(model, blocks, args)
    minutes = (time.perf_counter() - start) / 60

    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    # Measured in fp32 on the stored, rounded weights: what a reader of the folder gets.
    model = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    loss = held_out_loss(model, general)
    torch.manual_seed(args.seed)
    prompt = tokenizer(tokenizer.bos_token + SAMPLE_PROMPT, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**prompt, max_new_tokens=120, do_sample=True, temperature=0.7, top_k=40)
    sample = tokenizer.decode(ids[0], skip_special_tokens=True)

    (args.output / "README.md").write_text(
        README.format(
            parameters=model.num_parameters(),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            vocabulary=len(tokenizer),
            python=platform.python_version(),
            torch=torch.__version__.split("+")[0],
            steps=args.steps,
            seed=args.seed,
            batch=args.batch_size,
            length=args.length,
            seen=args.steps * args.batch_size * args.length / 1e6,
            epochs=args.steps * args.batch_size / len(blocks),
            training=sum(not d.held_out for d in texts),
            rate=args.learning_rate,
            minutes=minutes,
            speed=speed,
            held_out=sum(d.held_out for d in texts),
            held_out_tokens=held_out_tokens,
            loss=loss,
            perplexity=math.exp(loss),
            uniform=math.log(len(tokenizer)),
            training_loss=training_loss,
            prompt=SAMPLE_PROMPT.strip(),
            sample="\n".join(("    " + line).rstrip() for line in sample.splitlines()),
        ),
        encoding="utf-8",
    )
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"held-out loss {loss:.4f}, training loss {training_loss:.4f}, {size:,} bytes in {args.output}\n{sample}")


if __name__ == "__main__":
    main()
