"""`peft-isolate isolate`: a whole small run from a file, started again, and what its file may not say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from peft_isolate.cli.isolate_run import read_run
from peft_isolate.errors import IsolateError
from peft_isolate.methods.core_isolation.run import IsolationResult, IsolationRun
from peft_isolate.methods.core_isolation.run.train import Recipe
from tests.texts import sft_rows

SFT = {
    "learning_rate": 3e-3, "max_steps": 2, "per_device_train_batch_size": 4, "max_length": 48,
    "gradient_checkpointing": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(home) -> Path:
    """Further data: with a test part, and a data set of other columns in a folder, as the Hub has them."""
    for name, seed in (("more", 3), ("more-test", 4)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sft_rows(8, seed)))
    (home / "hub").mkdir()
    lines = [{"question": row["prompt"], "answer": row["completion"], "id": 1} for row in sft_rows(8, 5)]
    (home / "hub" / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


@pytest.fixture
def sheet(tmp_path, rows):
    """`sheet(percent=2)` writes the run's file, with changes, and returns its path; None leaves a field out."""

    def write(**changes) -> Path:
        said = {
            "base": "base",
            "output": str(tmp_path / "out"),
            "tasks": {
                "one": "task.jsonl",
                "two": {"train": "more.jsonl", "test": "more-test.jsonl"},
                "three": {
                    "dataset": "hub",
                    "split": "train",
                    "fields": {"prompt": "question", "completion": "answer"},
                },
            },
            "sft": SFT,
            "threshold": 0,
            "percent": 2.0,
        } | changes
        path = tmp_path / "run.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in said.items() if value is not None}, sort_keys=False)
        )
        return path

    return write


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(Recipe, "train", lambda *_: pytest.fail("it trained"))


def test_a_whole_run(call, sheet, tmp_path, monkeypatch):
    """The last lines are the table, a headline a stage before them; started again, it trains nothing."""
    result = call("isolate", "--config", sheet(probe_config={"method": "lora", "r": 2}, omega=0.5))
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    found = IsolationResult.load(out)
    assert result.stdout == f"{found}\nsaved to {out / 'final'}; {out / 'report.md'} has the rest\n"
    header, *lines = str(found).splitlines()
    for column in ("loss base", "loss probe", "loss fusion", "loss end", "exact_match base", "exact_match end"):
        assert column in header
    assert [line.split()[0] for line in lines] == ["one", "two", "three"]
    for headline in ("== the final adapter is dense", "== probe of two (8 rows)", "== core region of one", "== groups",
                     "== stage 1 of 2: ", "== fusion of ", "== stage 2 of 2: ", "== final adapter"):  # fmt: skip
        assert headline in result.stderr, headline
    assert "2/2 [" in result.stderr
    assert "train_runtime" not in result.output
    config = json.loads((out / "probes" / "three" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 2)
    report = json.loads((out / "report.json").read_text())
    assert report["rows"]["three"] == {"train": 7, "test": 1, "held_out": True}
    assert report["rows"]["two"] == {"train": 8, "test": 8, "held_out": False}

    monkeypatch.setattr(Recipe, "train", lambda *_: pytest.fail("it trained"))
    again = call("isolate", "--config", sheet(probe_config={"method": "LORA", "r": 2}, omega=0.5))
    assert (again.exit_code, again.stdout) == (0, result.stdout)


def test_check_trains_nothing_and_says_what_will_be_written(call, sheet, tmp_path, untrained):
    result = call("isolate", "--check", "--config", sheet())
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("run.yaml is sound: base base, 3 tasks\n")
    assert "note: the final adapter is dense: " in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_option(call):
    """Of the run, and of a task."""
    told = call("isolate", "--help").stdout
    fields = {field.name for field in dataclasses.fields(IsolationRun)} - {"output_dir", "progress"}
    for name in (*fields, "output"):
        assert f"\n    {name}: " in told or f"\n      {name}: " in told or f"  {name}: " in told, name


def test_what_the_file_does_not_say_is_the_runs_default(sheet, rows, monkeypatch):
    monkeypatch.chdir(rows)
    run = read_run(sheet(threshold=None, percent=None, sft=None))
    for field in dataclasses.fields(IsolationRun):
        if field.name not in ("base", "tasks", "output_dir"):
            assert getattr(run, field.name) == field.default, field.name


HUB = {"dataset": "hub", "split": "train"}
TASK = {"one": "task.jsonl"}
MISTAKES: dict[str, tuple[dict, str]] = {
    "unknown": ({"treshold": 0.1}, "'treshold' is unknown, did you mean 'threshold'?"),
    "own": ({"output_dir": "x"}, "'output_dir' is unknown"),
    "missing": ({"tasks": None}, "['tasks'] must be there"),
    "base": ({"base": ["x"]}, "base=['x'] must be text"),
    "tasks": ({"tasks": ["task.jsonl"]}, "is no mapping: write each task as 'name: file'"),
    "one task": ({"tasks": TASK}, "one task, 'one'"),
    "file": ({"tasks": TASK | {"b": "nowhere.jsonl"}}, "task 'b': there is no file 'nowhere.jsonl'"),
    "number": ({"tasks": TASK | {"b": 5}}, "task 'b': 5: write a JSONL file, or {dataset:"),
    "part": ({"tasks": TASK | {"b": {"train": "task.jsonl", "eval": "task.jsonl"}}}, "task 'b': 'eval' is unknown"),
    "source": ({"tasks": TASK | {"b": HUB | {"columns": {}}}}, "task 'b': 'columns' is unknown"),
    "columns": ({"tasks": TASK | {"b": HUB | {"fields": {"prompt": "text"}}}}, "there is no column ['text']"),
    "fields": ({"tasks": TASK | {"b": HUB | {"fields": "question"}}}, "fields='question': write each as"),
    "split": ({"tasks": TASK | {"b": HUB | {"split": "test"}}}, "the split 'test' of 'hub' cannot be had"),
    "data set": ({"tasks": TASK | {"b": {"dataset": "nobody/nothing"}}}, "'nobody/nothing' cannot be had"),
    "sft": ({"sft": [1]}, "sft=[1] is no mapping"),
    "argument": ({"sft": {"epochs": 1}}, "'epochs' is unknown to trl.SFTConfig"),
    "method": ({"probe_config": {"method": "lola"}}, "write 'method:' and one of"),
    "no method": ({"probe_config": "lora"}, "probe_config='lora': write 'method:'"),
    "lora": ({"probe_config": {"method": "lora", "rank": 2}}, "probe_config: 'rank' is unknown"),
    "percent": ({"percent": 200}, "percent 200 is no part of a model"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(mistake, sheet, untrained, name):
    """Also those that only the run itself finds."""
    changes, message = MISTAKES[name]
    assert message in mistake("isolate", "--config", sheet(**changes))


def test_a_task_named_twice_is_refused(sheet, tmp_path):
    """YAML would take the last of the two, and say nothing."""
    path = sheet()
    path.write_text("base: base\noutput: out\ntasks:\n  a: task.jsonl\n  b: more.jsonl\n  a: more.jsonl\n")
    with pytest.raises(IsolateError, match="'a' is there twice, in what begins in line 4"):
        read_run(path)
