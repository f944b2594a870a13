"""Rows as batches: preferences as TRL's `DPOTrainer` takes them, and how many tokens are scored."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from trl import DPOConfig, DPOTrainer, extract_prompt

from peft_isolate import HalfFTConfig
from peft_isolate.errors import IsolateError
from peft_isolate.evaluation.forgetting import summed_loss
from peft_isolate.evaluation.rows import Batches, encode
from tests.models import tiny
from tests.texts import chat_rows, dpo_rows, sft_rows, tokenizer

CONVERSATIONS = [{"prompt": r["messages"][:1], "chosen": r["messages"][1:]} for r in chat_rows(3)]
WORDS = st.text("ab ", min_size=1, max_size=8)


def test_what_was_chosen_is_scored_on_the_tokens_that_dpo_trains_on(tmp_path):
    rows = dpo_rows(4)
    arguments = DPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    trainer = DPOTrainer(
        get_peft_model(tiny(), HalfFTConfig()),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    for row, found in zip(trainer.train_dataset, encode(rows, tokenizer()), strict=True):
        assert found.ids == row["prompt_ids"] + row["chosen_ids"]
        assert found.prompt == len(row["prompt_ids"])


@given(WORDS, WORDS)
def test_a_prompt_that_is_not_told_is_what_both_begin_with(chosen, rejected):
    """As TRL finds it. Where they begin apart, it looks at the text's last character, and we do not."""
    row = {"chosen": chosen, "rejected": rejected}
    split = extract_prompt(row)
    if chosen[0] != rejected[0]:
        split = {"prompt": "", "chosen": chosen}
    assert encode([row], tokenizer()) == encode([{k: split[k] for k in ("prompt", "chosen")}], tokenizer())


def test_turns_that_both_have_are_the_prompt():
    no = [{"role": "assistant", "content": "no"}]
    together = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + no} for r in CONVERSATIONS]
    assert encode(together, tokenizer()) == encode(CONVERSATIONS, tokenizer())
    assert all(row.prompt > 0 for row in encode(CONVERSATIONS, tokenizer()))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a"}, r"\['chosen'\]: it needs .*a preference, \"chosen\" beside a \"prompt\" or \"rejected\""),
        ({"chosen": "a", "rejected": []}, r"\['chosen', 'rejected'\]: it needs"),
        ({"prompt": "a", "chosen": []}, "of two kinds"),
    ],
)
def test_half_a_preference_is_an_error(row, message):
    with pytest.raises(IsolateError, match=message):
        encode([row], tokenizer())


@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("max_length", [None, 9, 12])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_tokens_are_counted_as_they_are_scored(batch_size, max_length, completion_only):
    """Whatever is padded, cut off or empty; every row once, the longest first."""
    rows = [*sft_rows(5), {"text": "one"}, {"text": "of another length"}, *dpo_rows(2)]
    batches = Batches(rows, tokenizer(), batch_size=batch_size, max_length=max_length, completion_only=completion_only)
    assert batches.n_tokens == summed_loss(tiny(), batches)[1]
    assert batches.n_rows == len(rows)
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches]).tolist()
    assert lengths == sorted((len(row.ids) for row in encode(rows, tokenizer(), max_length)), reverse=True)
    assert len(list(batches)) == len(batches) == -(-len(rows) // batch_size)
