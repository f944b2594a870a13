"""`LMEvalScorer` on tasks of our own: YAML and JSONL files, no network. Runs where lm_eval is installed."""

from __future__ import annotations

import builtins
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import get_peft_model

from peft_isolate import HalfFTConfig
from peft_isolate.errors import IsolateError
from peft_isolate.evaluation.harness import LMEvalScorer
from tests.models import tiny
from tests.texts import tokenizer

CHOICES = [(["ab", "cd", "sun"], 1), (["moon", "tree", "a"], 0), (["x", "yy", "zzz"], 2), (["one", "two", "six"], 1)]


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.partition(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'peft_isolate\[eval\]'"):
        LMEvalScorer(["hellaswag"])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Multiple choice, a loss (lower is better), one that does not say which, a group without numbers, and a tag."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"q{i}", "choices": choices, "gold": gold} for i, (choices, gold) in enumerate(CHOICES)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    choose = common | {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": " ",
        "tag": "mine",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    }
    loss = common | {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{choices[0]}}",
        "metric_list": [
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
        ],
    }
    unsaid = choose | {
        "tag": None,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": None}],
    }
    files = {
        "choose": {"task": "choose"} | choose,
        "again": {"task": "again"} | choose | {"doc_to_text": "the {{question}} again"},
        "loss": {"task": "loss"} | loss,
        "unsaid": {"task": "unsaid"} | unsaid,
        "both": {"group": "both", "task": ["choose", "again"]},
    }
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    made = tiny(max_position_embeddings=128)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(6) if parameter.ndim == 2 else None
    return made


def accuracy(model: torch.nn.Module, before: str = "", norm: bool = False) -> float:
    """The twin: log-likelihood of each choice after the question, in plain loops."""
    made, right = tokenizer(), 0
    for i, (choices, gold) in enumerate(CHOICES):
        prompt = made(f"the q{i} again" if before else f"q{i}")["input_ids"]
        scores = []
        for choice in choices:
            ids = prompt + made(f" {choice}")["input_ids"]
            with torch.no_grad():
                logs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
            score = sum(logs[j - 1, ids[j]].item() for j in range(len(prompt), len(ids)))
            scores.append(score / len(choice) if norm else score)
        right += max(range(len(scores)), key=scores.__getitem__) == gold
    return right / len(CHOICES)


def test_the_main_metric_is_the_twins(tasks, model):
    scorer = LMEvalScorer("choose", tokenizer(), include_path=tasks)
    assert scorer(model) == accuracy(model)
    assert scorer.name == "lm_eval:choose"
    norm = LMEvalScorer(["choose"], tokenizer(), include_path=tasks, metric="acc_norm", batch_size=1)
    assert norm(model) == accuracy(model, norm=True)
    assert accuracy(model) != accuracy(model, norm=True)


def test_tasks_groups_and_tags_are_means(tasks, model):
    mean = (accuracy(model) + accuracy(model, "again")) / 2
    for names in (["choose", "again"], ["both"], ["mine"]):
        assert LMEvalScorer(names, tokenizer(), include_path=tasks)(model) == pytest.approx(mean), names


def test_where_lower_is_better_the_score_has_a_minus(tasks, model):
    worse = LMEvalScorer(["loss"], tokenizer(), include_path=tasks)(model)
    assert worse < -1.0
    with torch.no_grad():
        flat = tiny(max_position_embeddings=128)
        flat.lm_head.weight.zero_()
    assert LMEvalScorer(["loss"], tokenizer(), include_path=tasks)(flat) > worse


def test_an_adapter_is_left_as_it_was_and_scores_are_repeatable(tasks):
    model = get_peft_model(tiny(max_position_embeddings=128), HalfFTConfig()).train()
    made = tokenizer()
    made.padding_side, made.pad_token = "right", None
    scorer = LMEvalScorer(["choose"], made, include_path=tasks, limit=3, num_fewshot=0)
    modes = [module.training for module in model.modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = scorer(model)
    assert pickle.loads(pickle.dumps(scorer))(model) == first
    assert [module.training for module in model.modules()] == modes
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert (made.padding_side, made.pad_token) == ("right", None)


def test_what_cannot_be_scored_is_refused(tasks, model):
    with pytest.raises(IsolateError, match="does not say whether a higher 'acc,none' is better"):
        LMEvalScorer(["unsaid"], tokenizer(), include_path=tasks)(model)
    with pytest.raises(IsolateError, match=r"no metric 'f1': it reports \['acc,none', 'acc_norm,none'\]"):
        LMEvalScorer(["choose"], tokenizer(), include_path=tasks, metric="f1")(model)
    with pytest.raises(IsolateError, match="is no folder"):
        LMEvalScorer(["choose"], tokenizer(), include_path=tasks / "choose.yaml")
    with pytest.raises(IsolateError, match="limit=0"):
        LMEvalScorer(["choose"], tokenizer(), include_path=tasks, limit=0)


@pytest.mark.slow
def test_an_unknown_task_is_named_with_its_neighbours(tasks):
    """Slow: the harness reads its fourteen thousand files."""
    with pytest.raises(IsolateError, match=r"knows no task 'helaswag', but \[.*'hellaswag'"):
        LMEvalScorer(["choose", "helaswag"], tokenizer(), include_path=tasks)
