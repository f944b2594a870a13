"""`benchmarks/forgetting/real.py` on a model of random weights: everything but the Hub and the GPU."""

from __future__ import annotations

import csv
import json
import math
import shlex
from pathlib import Path

import pytest
import real
import real_data
import real_learn
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from real_data import FinalAnswer, final_answer, parts
from real_settings import NOT_HERE, Setting, read_config, setting_of

from peft_isolate.deltas import Reference
from peft_isolate.errors import IsolateError
from peft_isolate.evaluation import divergence
from peft_isolate.evaluation.forgetting import evaluating
from peft_isolate.evaluation.rows import Batches
from tests.models import tiny
from tests.test_docs_commands import commands
from tests.texts import chat_rows, sft_rows, tokenizer

CONFIGS = Path(real.__file__).parent / "configs"
FEW = {
    "steps": 4, "every": 2, "batch_size": 4, "validation_rows": 4, "new_tokens": 6, "warmup": 0, "max_length": 64,
    "dtype": "float32", "device": "cpu", "anchor_length": 8, "anchor_rows": 4,
}  # fmt: skip


def lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, a task and general text, on disk."""
    made = tmp_path_factory.mktemp("real")
    tiny(max_position_embeddings=128).save_pretrained(made / "model")
    tokenizer().save_pretrained(made / "model")
    lines(made / "task.jsonl", sft_rows(24))
    lines(made / "general.jsonl", [{"text": f"the {row['prompt']}"} for row in sft_rows(6, seed=1)])
    return made


def start(folder: Path, *arms: list[str], **options: object) -> list[dict[str, str]]:
    """The rows after a command."""
    given = {"model": folder / "model", "data": folder / "task.jsonl", "general": folder / "general.jsonl"}
    given |= {"results": folder / "real.csv"} | FEW | options
    command = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    real.main(command + [word for arm in arms for word in ("--arm", *arm)])
    with open(given["results"], newline="") as file:
        return list(csv.DictReader(file))


def test_every_arm_and_rate_gets_rows_and_what_is_there_is_not_run_again(folder, tmp_path, capsys):
    results = tmp_path / "real.csv"
    arms = [["full", "1e-2"], ["HFT | random 1", "1e-2"]]
    rows = start(folder, *arms, results=results, seeds="0")
    assert [(row["arm"], float(row["rate"])) for row in rows] == [("full", 0.01), ("HFT | random 1", 0.01)]
    for row in rows:
        assert float(row["rise"]) != 0.0
        assert (row["reached"], float(row["steps"]), row["forgetting"], row["memory"]) == ("", 4.0, "", "")
        assert 0 <= float(row["test"]) <= 100
        assert float(row["kl"]) > 0
    full, half = rows[0], rows[-1]
    assert int(half["trained"]) < int(full["trained"])
    assert int(full["bytes"]) == 4 * int(full["trained"])
    # 4 steps of 4 rows are the 16 of 24 that are trained on, once; each ends with a token of its own, none is padding.
    learned = parts(some(data=str(folder / "task.jsonl"), validation_rows=4))[0]
    assert len(learned) == 16
    assert int(full["tokens"]) == sum(
        len(tokenizer()(r["prompt"] + r["completion"])["input_ids"]) + 1 for r in learned
    )
    assert half["tokens"] == full["tokens"]
    written = results.read_bytes()
    assert "0 of them to be made" not in capsys.readouterr().out
    start(folder, *arms, results=results, seeds="0")
    assert "2 runs, 0 of them to be made" in capsys.readouterr().out
    assert results.read_bytes() == written
    more = start(folder, ["full", "1e-2"], results=results, seeds="0,1")
    assert [row["arm"] for row in more] == ["full", "HFT | random 1", "full"]
    assert more[0]["rise"] == full["rise"] != more[-1]["rise"]
    # Other settings make another run.
    assert len(start(folder, ["full", "1e-2"], results=results, steps=2)) == 4


@pytest.mark.parametrize(
    "arms", [["full", "HFT"], pytest.param(["LoRA r=8", "CoFiTune, no mask"], marks=pytest.mark.slow)]
)
def test_the_dial_at_zero_is_the_base(folder, tmp_path, arms):
    """α = 0 forgets nothing, α = 1 is what was trained, with and without an adapter."""
    options = {"results": tmp_path / "r.csv", "alphas": "1,0", "score": "loss"}
    rows = start(folder, *([arm, "1e-2"] for arm in arms), **options)
    for here, base in zip(rows[::2], rows[1::2], strict=True):
        assert abs(float(base["rise"])) < 1e-4 < abs(float(here["rise"]))
        assert abs(float(base["kl"])) < 1e-4 < float(here["kl"])
        assert float(here["test"]) < float(base["test"])


def test_kl_is_that_of_the_library_to_a_limit_of_tokens(monkeypatch):
    """Which computes it with both models at hand; the rows that come first count."""
    base, model, rows = tiny(), tiny(seed=1), sft_rows(24)
    setting = some(data="d", **{name: FEW[name] for name in ("batch_size", "max_length")})
    drift = real_data.Drift(rows, tokenizer(), setting)
    drift.remember(base)
    assert drift(base) == pytest.approx(0, abs=1e-6)
    reference, total, tokens = Reference.now(base), 0.0, 0
    base.load_state_dict(model.state_dict())
    for batch in Batches(rows[: real_data.KL_ROWS], tokenizer(), batch_size=4, max_length=64):
        with evaluating(base), torch.no_grad():
            found = divergence(base, batch, reference)
        total, tokens = total + found.total.item(), tokens + found.tokens
    assert drift(model) == pytest.approx(total / tokens, rel=1e-4)
    monkeypatch.setattr(real_data, "KL_TOKENS", 7)
    few = real_data.Drift(rows, tokenizer(), setting)
    few.remember(model)
    assert sum(map(len, few._base)) == 7


@pytest.mark.slow
def test_what_an_adapter_starts_from_is_drawn_by_the_runs_seed(folder, tmp_path):
    one, two = (start(folder, ["LoRA r=8", "1e-2"], results=tmp_path / f"{i}.csv")[0]["rise"] for i in range(2))
    assert one == two


def test_at_a_level_the_training_stops_and_what_is_forgotten_is_read_in_between(folder, tmp_path):
    free = start(folder, ["full", "1e-2"], results=tmp_path / "free.csv", score="loss", steps=6, every=1)
    level = float(free[0]["validation"]) + 0.2
    rows = start(folder, ["full", "1e-2"], results=tmp_path / "l.csv", score="loss", steps=6, every=1, level=level)
    assert rows[0]["reached"] == "True"
    assert 0 < float(rows[0]["steps"]) < 6
    assert not float(rows[0]["steps"]).is_integer()
    assert float(rows[0]["validation"]) == pytest.approx(level, abs=1e-3)


def test_outcomes_are_interpolated_between_two_evaluations():
    """The twin: by hand. Two tasks, of which one lost 10 and the other 20 points at the end."""
    setting = setting_of(
        {"model": "m", "data": "d", "tasks": "x,y", "level": 0.5, "arms": {"full": [1e-3]}, "general": "g"}
    )
    points = [
        {"step": 0, "alpha": 1.0, "validation": 0.0, "x": 0.9, "y": 0.8, "kl": 0.0, "general": -2.0},
        {"step": 10, "alpha": 1.0, "validation": 0.2, "x": 0.9, "y": 0.8, "kl": 0.2, "general": -2.0},
        {"step": 20, "alpha": 1.0, "validation": 0.6, "x": 0.8, "y": 0.6, "kl": 0.6, "general": -2.4, "test": 0.55},
    ]
    run = real_learn.Run(setting, "full", 1e-3, 0)
    row = real_learn.outcomes(run, points)[0]
    assert (row["reached"], row["steps"], row["validation"], row["test"]) == (True, 17.5, 50.0, 55.0)
    assert (row["forgetting:x"], row["forgetting:y"], row["forgetting"], row["rise"]) == (7.5, 15.0, 11.25, 0.3)
    assert row["kl"] == 0.5
    points[-1]["validation"] = 0.1
    missed = real_learn.outcomes(run, points)[0]
    assert (missed["reached"], missed["steps"], missed["forgetting"]) == (False, 10, 0.0)


@pytest.mark.parametrize(
    "arm", ["full", "OSF", "CoFiTune", "HFT, 3 rounds", "full, half reset", "SHiRA", "HFT | self 1"]
)
@pytest.mark.slow
def test_other_kinds_of_arms_run_too(folder, tmp_path, arm):
    rows = start(folder, [arm, "1e-2"], results=tmp_path / "r.csv", steps=6, dtype="bfloat16", autocast="true")
    assert float(rows[0]["steps"]) == 6.0
    assert float(rows[0]["rise"]) != 0.0


WRONG = {
    "no_arm": ([], {}, "no arms: pass --arm NAME RATE"),
    "unknown_arm": ([["HTF", "1e-3"]], {}, r"no method 'HTF' in arms.py; use one such as \['HFT'"),
    "not_here": ([["replay"]], {}, "'replay' is not for a model of one's own"),
    "anchor": ([["HFT | own 1", "1e-3"]], {}, "'own 1' is no anchor here; use 'random' or 'self' and β"),
    "rate": ([["HFT", "-1"]], {}, r"has the rates \(-1.0,\): use learning rates above 0"),
    "no_number": ([["HFT", "fast"]], {}, "arms=.*use names with rates"),
    "dial": ([["SHiRA", "1e-3"]], {"alphas": "1,0.5"}, "it has no dial"),
    "level": ([["HFT", "1e-3"]], {"level": 95}, "level=95 is out of range, since exact_match is a share, from 0 to 1"),
    "loss_level": ([["HFT", "1e-3"]], {"level": -1, "score": "loss"}, "a loss in nats is above 0"),
    "score": ([["HFT", "1e-3"]], {"score": "f1"}, "score='f1' is unknown: use one of exact_match"),
    "steps": ([["HFT", "1e-3"]], {"steps": 0}, "steps=0: use a whole number from 1 on"),
    "kept": ([["HFT", "1e-3"]], {"general": None}, "nothing to forget: pass --tasks"),
    "data": ([["HFT", "1e-3"]], {"data": "none.jsonl"}, "no file 'none.jsonl'"),
    "model": ([["HFT", "1e-3"]], {"model": "./none"}, "no tokenizer can be loaded from './none'"),
    "rows": ([["HFT", "1e-3"]], {"validation_rows": 12}, "validation_rows=12 of 24 rows leaves too few"),
    "template": ([["HFT", "1e-3"]], {"template": "{question}?"}, r"no text \['question'\], which the template wants"),
    "config": ([["HFT", "1e-3"]], {"config": "none.yaml"}, "config='none.yaml' cannot be read"),
    "flag": ([["HFT", "1e-3"]], {"stepz": 3}, "unrecognized arguments: --stepz=3; --help lists"),
}


@pytest.mark.parametrize(("arms", "options", "message"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_line_before_anything_is_written(folder, tmp_path, arms, options, message):
    with pytest.raises(SystemExit, match="^error: [^\n]*" + message):
        start(folder, *arms, results=tmp_path / "r.csv", **options)
    assert not (tmp_path / "r.csv").exists()


def test_a_run_that_fails_lets_the_others_go_and_is_tried_again(folder, tmp_path, monkeypatch, capsys):
    failing = ["full"]

    def learn(run, *rest):
        if run.arm in failing:
            raise RuntimeError("out of memory")
        return [real_learn.key(run, 1.0) | {"test": 1.0, "forgetting": None, "rise": 0.5}]

    monkeypatch.setattr(real, "learn", learn)
    arms = [["full", "1e-3"], ["HFT", "1e-3"]]
    with pytest.raises(SystemExit, match="error: 1 runs failed"):
        start(folder, *arms, results=tmp_path / "r.csv")
    done = capsys.readouterr()
    assert "RuntimeError: out of memory" in done.err
    assert "HFT, rate 0.001, seed 0: α = 1: test 1.0 rise 0.5" in done.out
    failing.clear()
    assert [row["arm"] for row in start(folder, *arms, results=tmp_path / "r.csv")] == ["HFT", "full"]


def some(**options: object) -> Setting:
    return setting_of({"model": "m", "general": "g", "arms": {"full": [1e-3]}, "validation_rows": 5} | options)


def test_no_row_is_in_two_parts_and_none_is_lost(tmp_path):
    rows = [{"prompt": str(i), "completion": "x"} for i in range(40)]
    data = lines(tmp_path / "d.jsonl", rows)
    found = parts(some(data=data))
    assert [len(part) for part in found] == [30, 5, 5]
    assert sorted(int(row["prompt"]) for part in found for row in part) == list(range(40))
    # The same for each seed of the runs, and the training in the data's order.
    assert parts(some(data=data, seeds=3)) == found
    assert [int(row["prompt"]) for row in found[0]] == sorted(int(row["prompt"]) for row in found[0])
    training, validation, test = parts(some(data=data, validation=data, rows=8))
    assert (len(training), len(validation), len(test)) == (8, 5, 5)
    training, _, test = parts(some(data=data, test=data, rows=8, test_rows=3))
    assert (len(training), [row["prompt"] for row in test]) == (8, ["0", "1", "2"])


def test_rows_become_prompts_and_answers(tmp_path):
    """Messages end with the answer; a template takes fields by name, in which braces are only text."""
    chats = parts(some(data=lines(tmp_path / "c.jsonl", chat_rows(24))))[0]
    assert all(row["prompt"][-1]["role"] == "user" for row in chats)
    assert all([message["role"] for message in row["completion"]] == ["assistant"] for row in chats)
    asked = [{"question": f"{{{i}}}", "answer": "a" * i} for i in range(30)]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"rename": {"question": "query"}, "template": "Q: {query}\nA:"}))
    setting = some(data=lines(tmp_path / "q.jsonl", asked), completion="answer", **read_config(str(config)))
    training, validation, test = parts(setting)
    made = {row["prompt"]: row["completion"] for row in training + validation + test}
    assert made == {f"Q: {{{i}}}\nA:": "a" * i for i in range(30)}
    # "{4} aaaa" has 8 characters, the prompt's words do not count.
    short = parts(some(**{name: getattr(setting, name) for name in ("data", "completion", "rename", "template")},
                       max_characters=8, validation_rows=1))  # fmt: skip
    assert sorted(len(row["completion"]) for part in short for row in part) == [0, 1, 2, 3, 4]


def test_chats_are_learned_and_answered(folder, tmp_path):
    rows = start(folder, ["HFT", "1e-3"], data=lines(tmp_path / "c.jsonl", chat_rows(24)), results=tmp_path / "r.csv")
    assert len(rows) == 1


@given(
    st.integers(-999, 999),
    st.sampled_from(["The answer is: {}", "So.\n#### {}", "The final answer is {}.", "The answer is ${}$!"]),
)
def test_a_final_answer_is_the_number_after_the_mark(number, said):
    assert final_answer("1 + 1 = 2. " + said.format(number)) == number
    assert final_answer("1 + 1 = 2. " + said.format(f"{number}.0\n\nQuestion: 5")) == number


def test_a_final_answer_may_be_a_fraction_or_text_or_missing():
    assert final_answer("#### 20/40") == 0.5
    assert final_answer("The answer is: 50%") == 50
    assert final_answer("The answer is: 1/0") == "1/0"
    assert final_answer("The answer is: x + 1") == "x + 1"
    assert final_answer("The answer is: 3. The answer is: 4") == 4
    assert final_answer("it is 4") is None
    with pytest.raises(IsolateError, match="names no result"):
        FinalAnswer([{"prompt": "1+1", "completion": "2"}], tokenizer())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_that_come_along_are_settings(path):
    setting = setting_of(read_config(str(path)))
    assert not set(setting.arms) & set(NOT_HERE)
    assert "unrun" in path.read_text()
    assert setting.template.format(query="1+1?") == "Question: 1+1? Think step by step.\nAnswer:"
    assert math.prod((setting.steps, setting.batch_size, setting.accumulation)) == setting.rows


@pytest.mark.slow
def test_tasks_of_lm_eval_are_what_may_be_forgotten(folder, tmp_path):
    pytest.importorskip("lm_eval")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [
        {"question": row["prompt"], "choices": ["sun", "moon"], "gold": i % 2} for i, row in enumerate(sft_rows(4))
    ]
    task = {
        "task": "choose",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": lines(tmp_path / "choose.jsonl", rows)}, "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tasks / "choose.yaml").write_text(yaml.safe_dump(task))
    options = {"tasks": "choose", "include_path": tasks, "results": tmp_path / "r.csv", "limit": 3}
    found = start(folder, ["full", "1e-1"], ["LoRA r=8", "1e-1"], level=1, **options)
    for row in found:
        assert row["forgetting"] == row["forgetting:choose"]
        assert float(row["forgetting"]) in {round(100 * k / 3, 2) for k in range(-3, 4)}


def test_commands_that_are_printed_are_settings(monkeypatch):
    """They need a GPU and the Hub to be run."""
    root = Path(real.__file__).parents[2]
    monkeypatch.chdir(root)
    printed = [command for command in commands(root / "docs" / "evidence.md") if "/real.py " in command]
    assert len(printed) == 2
    for command in printed:
        setting, results = real.parsed(shlex.split(command)[2:])
        assert setting.arms
        assert results.name == "real.csv"
