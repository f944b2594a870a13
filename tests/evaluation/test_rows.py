"""Rows as batches: preferences as TRL's `DPOTrainer` takes them, and how many tokens are scored."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, extract_prompt

from peft_isolate import HalfFTConfig
from peft_isolate.errors import IsolateError
from peft_isolate.evaluation.forgetting import summed_loss
from peft_isolate.evaluation.rows import Batches, encode
from tests.models import tiny
from tests.texts import TEMPLATE, chat_rows, dpo_rows, sft_rows, tokenizer

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


TOOLS = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}]
TOLD = {"tools": json.dumps(TOOLS), "chat_template_kwargs": {"loud": True}}


@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")
@pytest.mark.parametrize(
    ("rows", "more"),
    [
        ([row | TOLD for row in chat_rows(2)], {}),
        ([{"prompt": r["prompt"], "completion": r["chosen"]} | TOLD for r in CONVERSATIONS], {}),
        (sft_rows(3), {"max_length": 12, "truncation_mode": "keep_end"}),
        (sft_rows(3), {"max_length": 60, "truncation_mode": "keep_end"}),
    ],
)
def test_rows_are_the_tokens_that_sft_trains_on(rows, more, tmp_path):
    """What a row tells its chat template counts, and which end is cut off."""
    made = tokenizer()
    made.chat_template = (
        "{% if loud %}!!{% endif %}{% for t in tools or [] %}{{ t['function']['name'] }}{% endfor %}" + TEMPLATE
    )
    trainer = SFTTrainer(
        tiny(),
        args=SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, **more),
        train_dataset=Dataset.from_list(rows),
        processing_class=made,
    )
    encoded = encode(rows, made, more.get("max_length"), keep_end="truncation_mode" in more)
    for row, found in zip(trainer.train_dataset, encoded, strict=True):
        assert found.ids == row["input_ids"]
        assert row["labels"] == [-100] * found.prompt + found.ids[found.prompt :]
    if "max_length" not in more:
        (listed,) = encode([rows[0] | {"tools": TOOLS}], made)
        (plain,) = encode([{k: v for k, v in rows[0].items() if k not in TOLD}], made)
        assert listed == encoded[0]
        assert len(listed.ids) == len(plain.ids) + len("!!look")


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
        ({"text": "a", "tools": "{"}, "row 0: tools='{' is no JSON .*: write a list"),
        ({"text": "a", "chat_template_kwargs": 1}, "row 0: chat_template_kwargs='1' is no mapping"),
    ],
)
def test_half_a_preference_and_broken_extras_are_errors(row, message):
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
