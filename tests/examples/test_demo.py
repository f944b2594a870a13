"""The demo: its data, its base model, and (slow) the whole of it with a few steps."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo import data
from peft_isolate.evaluation import token_loss

DEMO = Path(__file__).parents[2] / "examples" / "demo"


def test_the_base_is_small_and_has_learned_something():
    """At most 3 MiB, and far better than a uniform guess on text it never saw."""
    assert sum(file.stat().st_size for file in (DEMO / "base").iterdir()) <= 3 * 2**20
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    batches = data.general_batches(tokenizer, data.documents())[:2]
    # Python's own version decides the text, and so the number: 2.26 in the README is for 3.11.7.
    assert token_loss(model, batches) < 3.0


def test_nothing_held_out_is_trained_on():
    """Neither in the instruction data's training split nor by name; and the split is a pure function of the names."""
    texts = data.documents()
    held_out = {text.name for text in texts if text.held_out}
    assert 0.02 < len(held_out) / len(texts) < 0.10
    assert [text.name for text in data.documents()] == [text.name for text in texts]
    training, validation = data.instruction_pairs(texts)
    prompts = {pair["prompt"] for pair in training}
    assert len(prompts) == len(training) > 500
    assert not prompts & {pair["prompt"] for pair in validation}
    assert data.instruction_pairs([text for text in texts if not text.held_out])[0] == training


def test_rejected_answers_are_true_docstrings_of_other_functions():
    training, _ = data.instruction_pairs(data.documents())
    pairs = data.preference_pairs(training[:50])
    completions = {pair["completion"] for pair in training[:50]}
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert {pair["rejected"] for pair in pairs} <= completions


@pytest.mark.slow
def test_the_whole_demo_with_a_few_steps(tmp_path):
    """Every row, both adapters, the merged model and the picture; it checks isolation and ln 2 by itself."""
    command = [sys.executable, DEMO / "demo.py", "--steps", "3", "--output", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + 8
    for name in (
        "cofitune-adapter",
        "importance.png",
        "sft-adapter",
        "anchored-adapter",
        "dpo-adapter",
        "lora-adapter",
        "merged",
        "trained.png",
        "results.md",
    ):
        assert (tmp_path / name).exists(), name
    assert "first loss 0.6931" in run.stdout


@pytest.mark.slow
def test_the_search_from_end_to_end_and_again(tmp_path):
    """Twelve trials of two steps, the pictures, the final adapter; a second run trains no trial again."""
    command = [sys.executable, DEMO.parent / "cofitune_search.py", "--output", tmp_path, "--final-steps", "2"]
    for _ in range(2):
        run = subprocess.run([*command, "--steps", "2"], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 12
    for name in ("tree.png", "importance.png", "importance.safetensors", "search.json", "adapter", "results.md"):
        assert (tmp_path / name).exists(), name
    assert "| best region, soft mask |" in run.stdout
    run = subprocess.run([*command, "--steps", "3"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "holds a search with other settings" in run.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_mistake_gets_one_line(tmp_path):
    command = [sys.executable, DEMO / "demo.py", "--model", tmp_path / "nowhere", "--output", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("error: ")
