"""A tokenizer of single characters and a few lines of data, made on the fly: no file, no network."""

from __future__ import annotations

import random

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

WORDS = ("sun", "moon", "tree", "river", "stone", "cloud", "bird", "leaf")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; 0 pads, 1 begins, 2 ends, as in the models of `tiny`, which know 64 tokens."""
    characters = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 .,:;!?'-+*/=<>()[]\n"]
    made = Tokenizer(WordLevel({character: i for i, character in enumerate(characters)}, unk_token="<unk>"))
    made.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=TEMPLATE,
    )  # fmt: skip


def sft_rows(n: int = 48, seed: int = 0) -> list[dict[str, str]]:
    """Rows of `prompt` and `completion`: a word, and the word backwards."""
    draw = random.Random(seed)
    words = [f"{draw.choice(WORDS)} {draw.randint(0, 99)}" for _ in range(n)]
    return [{"prompt": f"turn {word}:", "completion": f" {word[::-1]}"} for word in words]


def dpo_rows(n: int = 32, seed: int = 0) -> list[dict[str, str]]:
    """Rows of `prompt`, `chosen` and `rejected`: backwards is right."""
    rows = sft_rows(n, seed)
    return [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["prompt"][4:-1]} for row in rows]


def chat_rows(n: int = 24, seed: int = 0) -> list[dict[str, list[dict[str, str]]]]:
    """The rows of `sft_rows` as conversations under `messages`."""
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
        }
        for row in sft_rows(n, seed)
    ]
