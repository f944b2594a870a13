"""`peft-isolate importance`: the file is what `measure_importance` gives on the same batches."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import peft_isolate.cli.read
from tests.texts import sft_rows, tokenizer

Importance = pytest.importorskip("peft_isolate.methods.cofitune.importance").Importance


def batches(n: int, size: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Right-padded, in the file's order."""
    made, rows = tokenizer(), sft_rows(12)
    ids = [
        [*made(row["prompt"] + row["completion"])["input_ids"], made.eos_token_id][:length] for row in rows[: n * size]
    ]
    parts = [ids[i : i + size] for i in range(0, len(ids), size)]
    return [
        {
            "input_ids": torch.tensor([row + [0] * (max(map(len, part)) - len(row)) for row in part]),
            "attention_mask": torch.tensor([[1] * len(r) + [0] * (max(map(len, part)) - len(r)) for r in part]),
        }
        for part in parts
    ]


def same(left: Importance, right: Importance) -> None:
    assert left.units.keys() == right.units.keys()
    assert all(torch.equal(left.units[key], right.units[key]) for key in left.units)
    assert (left.method, left.batches, left.tokens) == (right.method, right.batches, right.tokens)


def test_the_file_is_what_the_function_measures(call, home, tmp_path):
    from peft_isolate.methods.cofitune.importance import measure_importance

    file, picture = tmp_path / "i.safetensors", tmp_path / "i.png"
    result = call(
        "importance", "base", "task.jsonl", "--output", file, "--plot", picture, "--batch-size", 5, "--max-length", 20,
        "--max-batches", 2, "--method", "signed", "--seed", 3, "--no-heads", "--dropout", 0.1, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"saved to {file}" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    same(
        Importance.load(file),
        measure_importance(
            model, batches(2, 5, 20), method="signed", seed=3, heads=False, dropout=0.1, progress=False
        ),
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_defaults(call, home, tmp_path):
    from peft_isolate.methods.cofitune.importance import measure_importance

    assert call("importance", "base", "task.jsonl", "--output", tmp_path / "i", "--device", "cpu").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    same(Importance.load(tmp_path / "i"), measure_importance(model, batches(12, 8, 512), progress=False))


def test_mistakes(mistake, home, tmp_path):
    assert "there is no file 'nowhere.jsonl'" in mistake("importance", "base", "nowhere.jsonl")
    assert "no folder" in mistake("importance", "base", "task.jsonl", "--output", tmp_path / "no" / "i.safetensors")
    assert "batch_size=0" in mistake("importance", "base", "task.jsonl", "--batch-size", 0)
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"te')
    assert "torn.jsonl, line 2 is no JSON" in mistake("importance", "base", tmp_path / "torn.jsonl")
    (tmp_path / "other.jsonl").write_text('{"question": "a"}\n')
    assert "['question']: it needs" in mistake("importance", "base", tmp_path / "other.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    assert "latin.jsonl, line 1 is not UTF-8" in mistake("importance", "base", tmp_path / "latin.jsonl")
    (tmp_path / "empty.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    assert "row 0: the tokenizer's chat template cannot" in mistake("importance", "base", tmp_path / "empty.jsonl")
    out = ("--output", tmp_path / "i.safetensors")
    assert "device 'abacus'" in mistake("importance", "base", "task.jsonl", "--device", "abacus", *out)
    assert not (tmp_path / "i.safetensors").exists()


def test_mistakes_are_found_before_the_model_is_loaded(mistake, monkeypatch, tmp_path):
    def wrong(*options) -> str:
        return mistake("importance", "base", "task.jsonl", "--output", tmp_path / "i.safetensors", *options)

    monkeypatch.setattr(peft_isolate.cli.read, "load_model", lambda *_: pytest.fail("it loaded"))
    assert "is a folder: name a file in it" in wrong("--output", tmp_path)
    assert "matplotlib writes no 'xyz'" in wrong("--plot", tmp_path / "i.xyz")
    assert "is a folder" in wrong("--plot", tmp_path)
    assert "are both" in wrong("--plot", tmp_path / "i.safetensors")
    assert "dropout=0.0: the two passes differ" in wrong("--dropout", 0)
    assert "seed=-1: use a whole number" in wrong("--seed", -1)
    assert "max_batches=0" in wrong("--max-batches", 0)
    assert "device 'meta' cannot be used here" in wrong("--device", "meta")
    if not torch.cuda.is_available():
        assert "device 'cuda' cannot be used here" in wrong("--device", "cuda")
