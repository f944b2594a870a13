"""Scorers against twins in plain loops, what they leave untouched, and what they refuse."""

from __future__ import annotations

import json
import math
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedTokenizerFast

from peft_isolate import HalfFTConfig
from peft_isolate.errors import FormatError, IsolateError
from peft_isolate.evaluation.rows import encode
from peft_isolate.evaluation.scorers import ExactMatch, HeldOutLoss, Scores
from tests.models import tiny
from tests.texts import chat_rows, sft_rows, tokenizer


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    made = tiny()
    # Weights of an ordinary size: otherwise every token costs the same, and greedy answers are all alike.
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(6) if parameter.ndim == 2 else None
    return made


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def twin_loss(model: torch.nn.Module, rows: list[dict], completion_only: bool) -> float:
    """One row at a time, one token at a time."""
    made, losses = tokenizer(), []
    for row in rows:
        prompt, text = row.get("prompt", ""), row.get("text", "") or row["prompt"] + row["completion"]
        ids = [*made(text)["input_ids"], made.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        for i in range(max(1, len(made(prompt)["input_ids"]) if completion_only else 1), len(ids)):
            losses.append(-torch.log_softmax(logits[i - 1], -1)[ids[i]].item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_held_out_loss_is_minus_the_mean_over_tokens(model, batch_size, completion_only, tmp_path):
    rows = [*sft_rows(5), {"prompt": "a very much longer prompt than those:", "completion": " x"}]
    scorer = HeldOutLoss(
        write(tmp_path / "held.jsonl", rows), tokenizer(), batch_size=batch_size, completion_only=completion_only
    )
    assert scorer(model) == pytest.approx(-twin_loss(model, rows, completion_only), rel=1e-5)
    assert scorer(model) < 0


def test_text_counts_whole_and_a_better_model_scores_higher(model):
    rows = [{"text": "the sun"}, {"text": "a river and a stone"}]
    scorer = HeldOutLoss(rows, tokenizer(), batch_size=2)
    assert scorer(model) == pytest.approx(-twin_loss(model, rows, False), rel=1e-5)
    learner = tiny()
    before = scorer(learner)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    batch = torch.tensor([tokenizer()("a river and a stone")["input_ids"]])
    for _ in range(20):
        learner(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert scorer(learner) > before


def test_rows_become_the_tokens_that_sft_trainer_trains_on(tmp_path):
    """Text, prompt and completion, messages: ids and the boundary of the prompt are TRL's."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    for rows in (sft_rows(4), [{"text": "a tree"}, {"text": "a leaf."}], chat_rows(4)):
        trainer = SFTTrainer(
            model=tiny(),
            args=SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=16),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        )
        encoded = encode(rows, tokenizer(), 16)
        ours = [row.ids for row in encoded]
        collated = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
        theirs = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(collated["input_ids"], collated["attention_mask"], strict=True)
        ]
        assert ours == theirs
        if "prompt" in rows[0]:
            counted = (collated["labels"] != -100).sum(1).tolist()
            assert counted == [max(0, len(row.ids) - row.prompt) for row in encoded]


def test_limit_and_max_length_cut(model):
    rows = [{"text": "the sun is a stone"}, {"text": "moon"}]
    whole = HeldOutLoss(rows, tokenizer())
    assert HeldOutLoss(rows, tokenizer(), limit=1)(model) == pytest.approx(HeldOutLoss(rows[:1], tokenizer())(model))
    assert HeldOutLoss(rows, tokenizer(), max_length=4)(model) != pytest.approx(whole(model), rel=1e-4)


def greedy(model: torch.nn.Module, prompt: str, n: int) -> str:
    """What the model says, one prompt at a time, without padding, cache or `generate`."""
    made = tokenizer()
    ids, start = list(made(prompt)["input_ids"]), len(made(prompt)["input_ids"])
    for _ in range(n):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == made.eos_token_id:
            break
        ids.append(token)
    return made.decode(ids[start:], skip_special_tokens=True)


PROMPTS = ("turn sun:", "a", "the river and the stone and the leaf", "moon 12", "b c d")


def test_exact_match_is_the_share_of_greedy_answers(model, tmp_path):
    """In batches with padding, as one by one; the tokenizer pads where it padded before."""
    rows = [{"prompt": prompt, "completion": greedy(model, prompt, 6)} for prompt in PROMPTS]
    assert len({row["completion"] for row in rows}) > 2
    rows[1]["completion"] += "!"
    made = tokenizer()
    made.padding_side = "right"
    options = made.init_kwargs.copy()
    for batch_size in (1, 2, 8):
        scorer = ExactMatch(
            write(tmp_path / "task.jsonl", rows), made, max_new_tokens=6, batch_size=batch_size, strip=False
        )
        assert scorer(model) == pytest.approx(4 / 5)
    assert (made.padding_side, made.init_kwargs) == ("right", options)


def test_sampling_in_the_generation_config_does_not_count(model):
    rows = [{"prompt": prompt, "completion": greedy(model, prompt, 6)} for prompt in PROMPTS]
    before = model.generation_config.to_dict()
    try:
        model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=3.0, num_beams=2)
        scorer = ExactMatch(rows, tokenizer(), max_new_tokens=6, strip=False)
        assert [scorer(model), scorer(model)] == [1.0, 1.0]
    finally:
        model.generation_config.update(**before)


def test_strip_until_and_names_of_the_fields(model):
    said = greedy(model, "turn sun:", 6)
    cut = said[2]
    ask = {"q": "turn sun:", "a": f"  {said.partition(cut)[0].strip()}\n"}
    fields = {"max_new_tokens": 6, "prompt_field": "q", "answer_field": "a"}
    assert ExactMatch([ask], tokenizer(), until=cut, **fields)(model) == 1.0
    assert ExactMatch([ask], tokenizer(), until=cut, strip=False, **fields)(model) == 0.0
    assert ExactMatch([ask], tokenizer(), **fields)(model) == 0.0
    with pytest.raises(IsolateError, match=r"no \['prompt', 'completion'\]: name them by prompt_field"):
        ExactMatch([ask], tokenizer())


def test_messages_and_an_encoder_decoder_can_be_asked():
    row = {"prompt": chat_rows(1)[0]["messages"][:1], "completion": "x"}
    assert ExactMatch([row], tokenizer(), max_new_tokens=3)(tiny()) in (0.0, 1.0)
    t5 = tiny("t5")
    made = t5.generate(torch.tensor([tokenizer()("abc")["input_ids"]]), max_new_tokens=4, do_sample=False)
    said = tokenizer().decode(made[0], skip_special_tokens=True)
    assert ExactMatch([{"prompt": "abc", "completion": said}], tokenizer(), max_new_tokens=4)(t5) == 1.0


@pytest.fixture
def scorers() -> list:
    return [HeldOutLoss(sft_rows(4), tokenizer()), ExactMatch(sft_rows(4), tokenizer(), max_new_tokens=3)]


def test_modes_and_random_states_are_as_they_were(scorers):
    model = get_peft_model(tiny(), HalfFTConfig()).train()
    model.base_model.model.model.layers[0].eval()

    class Dice(torch.nn.Module):
        """A model that rolls dice in eval mode, too."""

        def forward(self, x):
            random.random(), np.random.rand(), torch.rand(1)
            return x

    model.base_model.model.model.norm.register_forward_hook(lambda module, args, out: Dice()(out))
    modes = [module.training for module in model.modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for scorer in scorers:
        scorer(model)
        assert [module.training for module in model.modules()] == modes
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert all(parameter.grad is None for parameter in model.parameters())

    model.base_model.model.model.norm.register_forward_hook(lambda *_: 1 / 0)
    for scorer in scorers:
        with pytest.raises(ZeroDivisionError):
            scorer(model)
        assert [module.training for module in model.modules()] == modes
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_dropout_is_off_while_scoring(scorers):
    model = tiny("gpt2", resid_pdrop=0.9, embd_pdrop=0.9)
    expected = [scorer(model) for scorer in scorers]
    modes: set[bool] = set()
    model.register_forward_pre_hook(lambda module, _: modes.add(module.training or torch.is_grad_enabled()))
    assert [scorer(model.train()) for scorer in scorers] == expected
    assert modes == {False}


def test_probability_is_of_the_scale_of_shares(model):
    minus = HeldOutLoss(sft_rows(4), tokenizer())(model)
    assert HeldOutLoss(sft_rows(4), tokenizer(), probability=True)(model) == pytest.approx(math.exp(minus))


def test_pickled_scorers_give_the_same_number(scorers, model):
    together = Scores(*scorers)
    assert pickle.loads(pickle.dumps(together))(model) == together(model)


def test_a_tokenizer_may_be_a_folder(tmp_path, model):
    made: PreTrainedTokenizerFast = tokenizer()
    made.save_pretrained(tmp_path)
    assert HeldOutLoss(sft_rows(3), tmp_path)(model) == HeldOutLoss(sft_rows(3), made)(model)


class Fixed:
    """A scorer of a number, and of how often it was asked."""

    def __init__(self, value, name: str) -> None:
        self.value, self.name, self.asked = value, name, 0

    def __call__(self, model) -> float:
        self.asked += 1
        return self.value


def test_scores_give_both_and_every_number():
    task, one, two = Fixed(0.5, "task"), Fixed(1.0, "one"), Fixed(torch.tensor(4.0), "two")
    assert Scores(task, [one, two])(None) == {
        "speciality": 0.5, "versatility": 2.5, "task": 0.5, "one": 1.0, "two": 4.0,
    }  # fmt: skip
    assert Scores(speciality=task, versatility=one)(None)["versatility"] == 1.0


def test_a_scorer_in_both_places_is_asked_once():
    both = Fixed(0.5, "both")
    assert Scores(both, [both])(None) == {"speciality": 0.5, "versatility": 0.5, "both": 0.5}
    assert both.asked == 1


def test_the_files_name_is_the_scorers(tmp_path):
    path = write(tmp_path / "general.jsonl", sft_rows(2))
    assert HeldOutLoss(path, tokenizer()).name == "held_out_loss:general"
    assert ExactMatch(path, tokenizer()).name == "exact_match:general"
    assert ExactMatch(path, tokenizer(), name="task").name == "task"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "high", torch.ones(2), 10**400], ids=range(6))
def test_what_is_no_number_is_refused(value):
    with pytest.raises(IsolateError, match="the scorer 'odd' gave"):
        Scores(Fixed(0.0, "task"), [Fixed(value, "odd")])(None)


def test_scorers_that_cannot_be_told_apart_are_refused():
    with pytest.raises(IsolateError, match="two numbers would be called 'same'"):
        Scores(Fixed(0, "same"), [Fixed(1, "same")])
    with pytest.raises(IsolateError, match="called 'versatility'"):
        Scores(Fixed(0, "task"), [Fixed(1, "versatility")])
    with pytest.raises(IsolateError, match="no scorer: pass at least one"):
        Scores(Fixed(0, "task"), [])
    with pytest.raises(IsolateError, match="name=3: use text"):
        Scores(Fixed(0, 3), [Fixed(1, "other")])
    with pytest.raises(IsolateError, match=r"0\.5 is no scorer"):
        Scores(Fixed(0, "task"), [0.5])


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        pytest.param([], {}, "has no rows", id="empty"),
        pytest.param(["text"], {}, "row 0 is str, no mapping", id="a dict of splits"),
        pytest.param([{"question": "a"}], {}, r"fields \['question'\]: it needs", id="fields"),
        pytest.param([{"text": 5}], {}, "'5' is neither text nor", id="a number for text"),
        pytest.param([{"prompt": "a", "completion": []}], {}, "of two kinds", id="two kinds"),
        pytest.param([{"prompt": "abcdef", "completion": "b"}], {"max_length": 4}, "no token of 1 rows", id="cut off"),
        pytest.param(sft_rows(1), {"batch_size": 0}, "batch_size=0: use a whole number", id="batch size"),
        pytest.param(sft_rows(1), {"limit": 1.5}, "limit=1.5", id="limit"),
        pytest.param(sft_rows(1), {"probability": "no"}, "probability='no': use True or False", id="flag"),
        pytest.param(sft_rows(1), {"name": 3}, "name=3: use text", id="name"),
        pytest.param(
            [{"messages": [{"role": "user"}]}], {}, "row 0: the tokenizer's chat template cannot", id="no content"
        ),
    ],
)
def test_bad_rows_are_refused_when_the_scorer_is_made(rows, options, message):
    with pytest.raises(IsolateError, match=message):
        HeldOutLoss(rows, tokenizer(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": ""}, "until='': use text that is not empty"),
        ({"until": 3}, "until=3: use text"),
        ({"strip": "no"}, "strip='no': use True or False"),
        ({"name": 3}, "name=3: use text"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_bad_arguments_are_refused_when_the_scorer_is_made(options, message):
    with pytest.raises(IsolateError, match=message):
        ExactMatch(sft_rows(1), tokenizer(), **options)


def test_a_tokenizer_without_a_template_is_named():
    made = tokenizer()
    made.chat_template = None
    with pytest.raises(IsolateError, match="row 0: the tokenizer's chat template cannot render"):
        ExactMatch([{"prompt": chat_rows(1)[0]["messages"], "completion": "x"}], made)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(IsolateError, match=r"there is no file .*nowhere"):
        HeldOutLoss(tmp_path / "nowhere.jsonl", tokenizer())
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n\n{"text": "half a li')
    with pytest.raises(FormatError, match=r"torn\.jsonl, line 3 is no JSON"):
        HeldOutLoss(tmp_path / "torn.jsonl", tokenizer())
    (tmp_path / "latin.jsonl").write_bytes('{"text": "a"}\n{"text": "café"}\n'.encode("latin-1"))
    with pytest.raises(FormatError, match=r"latin\.jsonl, line 2 is not UTF-8"):
        HeldOutLoss(tmp_path / "latin.jsonl", tokenizer())
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(FormatError, match=r"deep\.jsonl, line 1 is no JSON"):
        HeldOutLoss(tmp_path / "deep.jsonl", tokenizer())
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    with pytest.raises(FormatError, match="line 1 is list"):
        HeldOutLoss(tmp_path / "list.jsonl", tokenizer())


def test_a_model_that_cannot_be_asked_is_refused():
    with pytest.raises(IsolateError, match="Linear does not generate"):
        ExactMatch(sft_rows(1), tokenizer())(torch.nn.Linear(2, 2))
