"""`IsolationRun`: the whole method against its parts called by hand, refusals before training, kills, two ranks."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_isolate import Region
from peft_isolate.checkpoints.difference import difference_of
from peft_isolate.checkpoints.merge import merge
from peft_isolate.deltas import gradient
from peft_isolate.errors import BaseMismatchError, FormatError, IsolateError, RegionError
from peft_isolate.evaluation.rows import collate, encode
from peft_isolate.evaluation.scorers import ExactMatch, HeldOutLoss
from peft_isolate.methods.core_isolation import CoreIsolationConfig, next_stage
from peft_isolate.methods.core_isolation.fusion import fuse
from peft_isolate.methods.core_isolation.gradients import measure_gradients
from peft_isolate.methods.core_isolation.grouping import Grouping, group_tasks
from peft_isolate.methods.core_isolation.probe import core_region
from peft_isolate.methods.core_isolation.run import IsolationResult, IsolationRun, layout, steps
from peft_isolate.methods.core_isolation.run.settings import differences, plain
from peft_isolate.methods.core_isolation.run.tasks import (
    for_training,
    probe_rows,
    read_tasks,
    sample_rows,
    sample_size,
)
from peft_isolate.methods.core_isolation.run.train import Recipe
from peft_isolate.regions.selection import Selection
from tests.checkpoints.test_kills import in_child
from tests.compare import assert_same, logits
from tests.models import tiny
from tests.texts import chat_rows, sft_rows, tokenizer
from tests.training.distributed_worker import pair

# What a dropout draws shows in every bit.
DROPOUT = {"attention_dropout": 0.1}
SFT = {
    "max_steps": 2, "learning_rate": 3e-3, "weight_decay": 0.1, "per_device_train_batch_size": 4, "max_length": 48,
    "gradient_checkpointing": False,
}  # fmt: skip
SHARED = {"sft": SFT, "percent": 5.0, "threshold": None, "order": ["b", "a"], "progress": False}


@pytest.fixture(scope="module", autouse=True)
def _few_to_collect():
    """Trainers collect garbage often, and what the tests import is a lot to look through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny model with dropout, and its tokenizer."""
    folder = tmp_path_factory.mktemp("run") / "base"
    tiny(num_hidden_layers=2, **DROPOUT).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def data() -> dict:
    """Two tasks: one with a test part, one without."""
    return {"a": {"train": sft_rows(20), "test": sft_rows(4, seed=9)}, "b": sft_rows(24, seed=5)}


@pytest.fixture(scope="module")
def make(base) -> Callable[..., IsolationRun]:
    """A run, with changes."""

    def made(out: Path, **changes) -> IsolationRun:
        options = SHARED | {"tasks": data()} | changes
        return IsolationRun(options.pop("base", base), options.pop("tasks"), out, **options)

    return made


@pytest.fixture(scope="module")
def done(make, tmp_path_factory) -> IsolationResult:
    """A finished run."""
    return make(tmp_path_factory.mktemp("done") / "out", merge=True).run()


@pytest.fixture
def untrained(monkeypatch) -> None:
    """Nothing is trained."""
    monkeypatch.setattr(Recipe, "train", lambda *_: pytest.fail("it trained"))


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def contents(folder: Path) -> dict[str, bytes | Region]:
    """Every file of a run but those that tell the time; regions as what they are."""
    timed = ("training.json", "report.md", "report.json", ".lock")
    return {
        path.relative_to(folder).as_posix(): Region.load(path) if path.parent.name == "regions" else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in timed
    }


def trained_by_hand(model, rows, config=None, **changes):
    """As a user would: TRL's trainer."""
    args = SFTConfig("unused", **(SFT | changes), save_strategy="no", report_to="none", use_cpu=True, bf16=False)
    trainer = SFTTrainer(
        model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), peft_config=config
    )
    trainer.train()
    return trainer.model


# --- the whole


def test_a_run_is_its_parts_called_by_hand(done, base, tmp_path, monkeypatch):
    """The slow twin: probes, cores, groups, two stages, fusion, two stages, each by the public function of its own."""
    monkeypatch.chdir(tmp_path)
    load = functools.partial(AutoModelForCausalLM.from_pretrained, base)
    split = {task.name: task for task in read_tasks(data(), seed=0)}
    rows = {name: list(task.train) for name, task in split.items()}
    cores = {}
    for name in "ab":
        trained_by_hand(load(), rows[name], CoreIsolationConfig()).save_pretrained(f"probe-{name}")
        cores[name] = core_region(base, f"probe-{name}", percent=5.0)
        assert cores[name] == Region.load(done.folder / "regions" / f"{name}.safetensors")
    groups = group_tasks(cores, None, order=["b", "a"], total=next(iter(cores.values())) and scalars(base))
    assert groups == Grouping.load(done.folder / "groups.json")
    assert done.groups == (("b",), ("a",))

    def stage(number, task_rows, before=None, frozen=()):
        if before is None:
            model = trained_by_hand(load(), task_rows, CoreIsolationConfig())
        else:
            model = PeftModel.from_pretrained(load(), before, is_trainable=True)
            next_stage(model, frozen=frozen)
            model = trained_by_hand(model, task_rows)
        model.save_pretrained(f"stage-{number}")
        assert_same(numbers(Path(f"stage-{number}")), numbers(done.folder / "stages" / str(number)))
        return f"stage-{number}"

    last = stage(1, rows["b"])
    last = stage(2, rows["a"], last, [cores["b"]])
    ordered = {name: cores[name] for name in "ba"}
    fuse(base, {name: f"probe-{name}" for name in "ba"}, ordered, "fused", onto=last)
    assert_same(numbers(Path("fused")), numbers(done.folder / "fused"))
    samples = {name: sample_rows(task, 0, 2) for name, task in split.items()}
    last = stage(3, samples["b"], "fused")
    last = stage(4, samples["a"], last, [cores["b"]])
    assert_same(numbers(Path(last)), numbers(done.final))


def scalars(base: Path) -> int:
    """In scope."""
    config = CoreIsolationConfig()
    return config.resolve(AutoModelForCausalLM.from_pretrained(base)).region.count


def test_earlier_cores_stay_through_later_stages(done, base):
    """In each pass the second stage leaves the first group's core bit-identical, and moves the rest."""
    core = Region.load(done.folder / "regions" / "b.safetensors")
    for before, after in ((1, 2), (3, 4)):
        then, now = (difference_of(base, done.folder / "stages" / str(k)) for k in (before, after))
        for name, selection in core.items():
            at = selection.indices
            assert torch.equal(then[name].flatten()[at], now[name].flatten()[at]), name
        assert all(not torch.equal(then[name], now[name]) for name in core)


def test_the_scores_are_those_of_the_scorers(done, base):
    """Of the final adapter and of a probe, made by hand."""
    tasks = {task.name: task for task in read_tasks(data(), seed=0)}
    for folder, step, names in ((done.final, "end", "ab"), (done.folder / "probes" / "a", "probe", "a")):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        for name in names:
            scores = done.scores[step][name]
            assert scores["loss"] == pytest.approx(-HeldOutLoss(tasks[name].test, tokenizer())(model), rel=1e-6)
            assert scores["exact_match"] == ExactMatch(tasks[name].test, tokenizer())(model)
    assert list(done.scores) == ["base", "probe", "stage 1", "stage 2", "fusion", "stage 3", "stage 4", "end"]
    assert done.scores["stage 4"] == done.scores["end"]
    assert done.scores["end"]["a"]["loss"] < done.scores["base"]["a"]["loss"]


def test_the_final_adapter_and_the_merged_model_agree(done, base):
    """Bit for bit; the adapter is over the original base, and what is on the way lies in its folder."""
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), done.final)
    merged = AutoModelForCausalLM.from_pretrained(done.merged)
    assert torch.equal(logits(adapted), logits(merged))
    names = {path.name for path in done.folder.iterdir()}
    assert names == {".lock", "run.json", "base.json", "probes", "regions", "groups.json", "similarity.png", "stages",
                     "fused", "final", "merged", "gradients", "report.md", "report.json"}  # fmt: skip
    assert not (done.final / "training.json").exists()
    assert AutoTokenizer.from_pretrained(done.final).get_vocab() == tokenizer().get_vocab()


def test_the_report_says_what_was_run(done):
    """Groups, chance, a table a task, forgetting, shares by role, sizes, the probes' compute; read back as it is."""
    assert IsolationResult.load(done.folder) == done
    told = (done.folder / "report.md").read_text(encoding="utf-8")
    for said in ("# CPI-FT", "chance", "| stage 4: a |", "| fusion |", "## Forgetting", "| gate |", "| final |",
                 "held out", "The probes took 4 steps"):  # fmt: skip
        assert said in told, said
    content = json.loads((done.folder / "report.json").read_text(encoding="utf-8"))
    assert content["training"]["probe of a"]["steps"] == 2
    assert content["training"]["probe of a"]["tokens"] > 0
    assert content["bytes"]["final"] > 4 * sum(t.numel() for t in numbers(done.final).values())
    assert content["rows"] == {
        "a": {"train": 20, "test": 4, "held_out": False}, "b": {"train": 23, "test": 1, "held_out": True},
    }  # fmt: skip
    lowest = min(scores["a"]["loss"] for step, scores in done.scores.items() if step != "probe")
    assert done.forgetting["a"] == done.scores["end"]["a"]["loss"] - lowest
    assert [row["group"] for row in done.table] == [2, 1]
    header, *lines = str(done).splitlines()
    assert header.split()[:4] == ["task", "group", "loss", "base"]
    assert [line.split()[0] for line in lines] == ["a", "b"]


def test_forgetting_is_over_the_lowest_loss_along_the_run():
    """A probe is another model: it forgot nothing, and what it reached counts for nothing."""
    losses = {"base": 3.0, "probe": 0.5, "stage 1": 1.0, "stage 2": 1.5, "end": 1.25}
    scores = {step: {"a": {"loss": loss}} for step, loss in losses.items()}
    result = IsolationResult(Path("run"), ("a",), (("a",),), scores)
    assert result.forgetting == {"a": 0.25}
    assert result.table[0]["loss fusion"] is None
    assert "fusion" not in str(result)


def test_a_finished_run_trains_nothing_again(done, make, untrained, monkeypatch):
    """Nor does it score; it gives the same result."""
    monkeypatch.setattr(Recipe, "load", lambda *_, **__: pytest.fail("it loaded a model"))
    before = contents(done.folder)
    assert make(done.folder, merge=True).run() == done
    assert contents(done.folder) == before


def test_dpi_ends_before_fusion(make, base, tmp_path):
    """Cores of gradients at the base, of each tensor; tasks as pairs, of other columns; one group; sampled."""
    rows = Dataset.from_list([row | {"id": "x"} for row in sft_rows(20)])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row | {"id": 5}) + "\n" for row in sft_rows(24, seed=5)))
    tasks = [("a", DatasetDict(train=rows)), ("b", tmp_path / "b.jsonl")]
    run = make(
        tmp_path / "out", tasks=tasks, fuse=False, score="gradient", scope="tensor", threshold=0, order=None,
        stage_data="sample", sample=3, save_dtype="bfloat16", probe_rows=8,
    )  # fmt: skip
    result = run.run()
    assert [len(group) for group in result.groups] == [2]
    assert list(result.scores) == ["base", "stage 1", "end"]
    assert result.merged is None
    assert not (tmp_path / "out" / "fused").exists()
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {step: took["rows"] for step, took in content["training"].items()} == {"stage 1": 6}
    assert {tensor.dtype for tensor in numbers(result.final).values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in numbers(tmp_path / "out" / "stages" / "1").values()} == {torch.float32}
    # Half the digits are another model.
    assert result.scores["end"] != result.scores["stage 1"]
    assert result.scores["end"]["a"]["loss"] == pytest.approx(result.scores["stage 1"]["a"]["loss"], rel=1e-3)
    assert "# DPI" in (tmp_path / "out" / "report.md").read_text()
    # The first batch of four rows and the second, by hand.
    recipe = Recipe(str(base), SFT)
    task = read_tasks(tasks, seed=0)[0]
    drawn = probe_rows(task, 0, 8)
    batches = [collate(encode(part, tokenizer()), 0, True) for part in (drawn[:4], drawn[4:])]
    gradients = measure_gradients(recipe.load_base(), batches)
    assert core_region(base, gradients, 5.0, "tensor", "gradient") == Region.load(
        tmp_path / "out" / "regions" / "a.safetensors"
    )


def test_probes_from_elsewhere(make, base, done, tmp_path, monkeypatch):
    """An adapter of a LoRA, and a merged checkpoint, given: neither is trained; the other task's is, as a LoRA."""
    torch.manual_seed(0)
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    merge(base, done.folder / "probes" / "b", out=tmp_path / "tuned")
    tasks = {"c": sft_rows(24, seed=7)} | data()
    told: list[str] = []
    monkeypatch.setattr(steps.Steps, "_say", lambda self, what: told.append(what))
    run = make(
        tmp_path / "out", tasks=tasks, probes={"a": tmp_path / "lora", "b": tmp_path / "tuned"}, threshold=0,
        order=None, probe_config=LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), freeze_all_cores=True,
        probe_sft={"max_steps": 3},
    )  # fmt: skip
    result = run.run()
    what = [each for each in told if each and ("probe" in each or "core" in each)]
    assert run.probe_config.base_model_name_or_path is None
    assert what == ["core region of a", "core region of b", "probe of c (23 rows)", "core region of c"]
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {step: took["steps"] for step, took in content["training"].items()} == {
        "probe of c": 3, "stage 1": 2, "stage 2": 2,
    }  # fmt: skip
    assert set(result.scores["probe"]) == {"a", "b", "c"}
    config = json.loads((tmp_path / "out" / "probes" / "c" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 2)
    assert Region.load(tmp_path / "out" / "regions" / "a.safetensors") == core_region(base, tmp_path / "lora", 5.0)
    assert "Trained elsewhere" in (tmp_path / "out" / "report.md").read_text()
    # All cores are frozen after fusion.
    fused, last = (difference_of(base, tmp_path / "out" / part) for part in ("fused", "stages/2"))
    for task in tasks:
        for name, selection in Region.load(tmp_path / "out" / "regions" / f"{task}.safetensors").items():
            at = selection.indices
            assert torch.equal(fused[name].flatten()[at], last[name].flatten()[at])
    save_file({"x": torch.ones(1)}, tmp_path / "lora" / "more.safetensors")
    with pytest.raises(IsolateError, match=r"other settings: probes\.a: "):
        run.run()


# --- what a run is told


def test_a_config_and_its_arguments_are_the_same_run(done, make, base, untrained):
    """What an SFTConfig does not change is TRL's default, and its own output_dir counts for nothing."""
    # What a run does anyway may be said.
    config = SFTConfig("elsewhere", **SFT, use_cpu=True, bf16=False, save_strategy="no", eval_strategy="no")
    assert make(done.folder, sft=config).run() == done
    assert (
        make(
            done.folder,
            sft=SFT | {"weight_decay": 0.1, "lr_scheduler_type": "linear", "logging_steps": 5},
            progress=True,
            base=str(base),
        ).run()
        == done
    )
    run = make(
        done.folder, sft=SFT | {"max_steps": 7}, probe_sft=SFTConfig("x", max_steps=2, use_cpu=True, bf16=False)
    )
    with pytest.raises(IsolateError) as raised:
        run.run()
    assert "sft.max_steps: 2 then, 7 now" in str(raised.value)
    assert "probe_sft" not in str(raised.value)


CHANGES = {
    "percent": ({"percent": 4.0}, "percent: 5.0 then, 4.0 now"),
    "rate": ({"sft": SFT | {"learning_rate": 1e-3}}, "sft.learning_rate: 0.003 then, 0.001 now"),
    "argument": ({"sft": SFT | {"seed": 1}}, "sft.seed: nothing then, 1 now"),
    "order": ({"order": ["a", "b"]}, "order: ['b', 'a'] then, ['a', 'b'] now"),
    "threshold": ({"threshold": 0.0}, "threshold: nothing then, 0.0 now"),
    "seed": ({"seed": 1}, "seed: 0 then, 1 now"),
    "dpi": ({"fuse": False}, "fuse: True then, False now"),
    "omega": ({"omega": [0.5, 0.25]}, "omega: nothing then, [0.5, 0.25] now"),
    "task": (
        {"tasks": {**data(), "c": sft_rows(5)}, "order": ["b", "a", "c"]},
        'tasks.c: nothing then, {"train": 4, "test": 1',
    ),
    "rows": ({"tasks": data() | {"b": sft_rows(24, seed=6)}}, "tasks.b.data: "),
    "probe": ({"probe_config": LoraConfig(r=2)}, 'probe_config: nothing then, {"task_type": null'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_in_an_old_folder_is_refused_by_name(done, make, untrained, change):
    """Each setting that differs is named, and nothing else; the folder stays as it is."""
    options, message = CHANGES[change]
    before = contents(done.folder)
    with pytest.raises(IsolateError, match="other settings: ") as raised:
        make(done.folder, **options).run()
    assert message in str(raised.value)
    # Another task is one in the order, too.
    # What stages are told, probes are, too.
    assert str(raised.value).count(" then, ") == {"task": 3, "rate": 2, "argument": 2}.get(change, 1)
    assert contents(done.folder) == before


def test_another_base_is_refused(done, make, untrained, tmp_path):
    """By what it holds, not by where it lies."""
    tiny(num_hidden_layers=2, seed=1, **DROPOUT).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(IsolateError, match=r"other settings: base: '.{16}' then, '.{16}' now"):
        make(done.folder, base=tmp_path / "other").run()


def test_a_damaged_record_is_refused(make, untrained, tmp_path):
    """So is a folder with a run's names that is none."""
    (tmp_path / "run.json").write_text('{"format": "peft_isolate.run"')
    with pytest.raises(FormatError, match="is no record of a run"):
        make(tmp_path).run()
    (tmp_path / "run.json").unlink()
    (tmp_path / "final").mkdir()
    with pytest.raises(IsolateError, match=r"has 'final' and no run.json"):
        make(tmp_path).run()


def test_other_versions_are_a_note(done, make, monkeypatch, tmp_path):
    """A run goes on with a newer torch, and says so."""
    shutil.copytree(done.folder, tmp_path / "out")
    path = tmp_path / "out" / "run.json"
    path.write_text(path.read_text().replace(torch.__version__, "2.0.0"))
    notes = make(tmp_path / "out").check()
    assert (
        f"begun with other versions, the numbers may differ: torch: '2.0.0' then, {torch.__version__!r} now" in notes
    )


def test_what_will_be_written_is_said_beforehand(make, tmp_path, base):
    """The adapter is dense: its bytes, and those of all on the way. Checking writes nothing."""
    count = scalars(base)
    final, way, few = make(tmp_path / "out").check()
    assert "on 2 rows of each task, since 'a' has 20: sample= takes another number" in few
    assert f"dense: {4 * count / 1000:.3g} kB for {count:,} scalars" in final
    assert "up to 7 adapters" in way
    half, way = make(tmp_path / "out", save_dtype="bfloat16", fuse=False, probe_config=LoraConfig()).check()
    assert f"dense: {2 * count / 1000:.3g} kB" in half
    assert "up to 2 adapters" in way
    assert not (tmp_path / "out").exists()


ONE = {"a": sft_rows(5)}
MISTAKES: dict[str, tuple[dict, str]] = {
    "one task": ({"tasks": ONE}, "one task, 'a'.* CoreIsolationConfig.* alone"),
    "no task": ({"tasks": {}}, "tasks is empty"),
    "no tasks": ({"tasks": 5}, "tasks is a int"),
    "without data": ({"tasks": ONE | {"b": []}}, "task 'b': the data has no rows"),
    "without a file": ({"tasks": ONE | {"b": "nowhere.jsonl"}}, "task 'b': there is no file 'nowhere.jsonl'"),
    "data of numbers": ({"tasks": ONE | {"b": 5}}, "task 'b': 5 has no rows"),
    "no train part": ({"tasks": ONE | {"b": {"test": sft_rows(3)}}}, "'train' must be among them"),
    "unknown part": ({"tasks": ONE | {"b": {"train": sft_rows(3), "eval": []}}}, r"the parts \['eval'\]"),
    "one row": ({"tasks": ONE | {"b": sft_rows(1)}}, "task 'b' has one row"),
    "empty test": ({"tasks": ONE | {"b": {"train": sft_rows(3), "test": []}}}, "task 'b', test: the data has no rows"),
    "same name": ({"tasks": [("a", sft_rows(5)), ("a", sft_rows(5))]}, "two tasks are called 'a' and 'a'"),
    "case": ({"tasks": ONE | {"A": sft_rows(5)}}, "two tasks are called 'a' and 'A'"),
    "accents": ({"tasks": {"\u00e9": sft_rows(5), "e\u0301": sft_rows(5)}}, "two tasks are called"),
    "a number": ({"tasks": ONE | {5: sft_rows(5)}}, "the name of a task is 5"),
    "path": ({"tasks": ONE | {"b/c": sft_rows(5)}}, "'b/c' is no name of a folder"),
    "up": ({"tasks": ONE | {"..": sft_rows(5)}}, "'..' is no name of a folder"),
    "hidden": ({"tasks": ONE | {".b": sft_rows(5)}}, "is no name of a folder"),
    "empty name": ({"tasks": ONE | {"": sft_rows(5)}}, "is no name of a folder"),
    "long name": ({"tasks": ONE | {"b" * 201: sft_rows(5)}}, "is no name of a folder"),
    "control": ({"tasks": ONE | {"b\n": sft_rows(5)}}, "is no name of a folder"),
    "wide slash": ({"tasks": ONE | {"b／c": sft_rows(5)}}, "is no name of a folder"),
    "fields": ({"tasks": ONE | {"b": [{"question": "?"}] * 3}}, r"task 'b': its rows have the fields \['question'\]"),
    "mixed rows": ({"tasks": ONE | {"b": [*sft_rows(2), {"text": "x"}]}}, "row 2 has the fields"),
    "other fields": ({"tasks": ONE | {"b": [{"text": "abc"}] * 3}, "threshold": 0.1},
                     "of task 'a' are prompt and completion as text, those of 'b' text as text: tasks that come to"),
    "messages": ({"tasks": ONE | {"b": chat_rows(3)}, "threshold": 0.1}, "'b' messages as messages: .*each alone"),
    "other test": ({"tasks": ONE | {"b": {"train": sft_rows(3), "test": [{"text": "abc"}]}}}, "in its test part"),
    "nothing counts": ({"tasks": ONE | {"b": [{"prompt": "a", "completion": "b"}] * 3}, "sft": {"max_length": 1}},
                       "test: no token of 1 rows counts"),
    "nothing": ({"percent": 0.001}, "rounds to nothing: use at least"),
    "nothing of a tensor": ({"percent": 0.01, "scope": "tensor"}, "of the largest tensor rounds to nothing"),
    "too much": ({"percent": 101}, "percent 101 is no part"),
    "negative": ({"percent": -1}, "percent -1 is no part"),
    "not a percent": ({"percent": "many"}, "percent 'many' is no number"),
    "all": ({"percent": 100}, "percent=100 makes everything"),
    "scope": ({"scope": "layer"}, "scope='layer' is unknown"),
    "score": ({"score": "loss"}, "score='loss' is unknown"),
    "stage data": ({"stage_data": "some"}, "stage_data='some' is unknown"),
    "threshold": ({"threshold": 2}, "threshold"),
    "order": ({"order": ["a"]}, "order"),
    "flag": ({"fuse": "no"}, "fuse='no'"),
    "seed": ({"seed": 0.5}, "seed=0.5"),
    "sample": ({"sample": 0}, "sample=0"),
    "large sample": ({"sample": 21}, "sample=21 rows of each task, but 'a' has 20"),
    "probe rows": ({"probe_rows": 0}, "probe_rows=0"),
    "dtype": ({"save_dtype": "int8"}, "save_dtype='int8'"),
    "prompt": ({"probe_config": PromptTuningConfig(num_virtual_tokens=2)}, "trains a prompt and moves no weight"),
    "probe config": ({"probe_config": "lora"}, "probe_config is a str"),
    "frozen in DPI": ({"fuse": False, "freeze_all_cores": True}, "freeze_all_cores=True"),
    "embeddings": ({"include_embeddings": True}, "include_embeddings=True puts the head in scope"),
    "elsewhere": ({"elsewhere": "mean"}, "elsewhere='mean'"),
    "slerp_on": ({"slerp_on": "x"}, "slerp_on='x'"),
    "epsilon": ({"epsilon": 2}, "epsilon=2"),
    "omega": ({"omega": [0.5]}, r"omega=\[0.5\]"),
    "argument": ({"sft": {"epochs": 1}}, "'epochs' is unknown"),
    "probe's argument": ({"probe_sft": {"learning_rate": "1e-5"}}, "write 1.0e-5"),
    "not a config": ({"sft": 5}, "sft is a int"),
    "own": ({"sft": {"save_strategy": "steps"}}, "'save_strategy': every step of a run is saved whole"),
    "eval": ({"sft": {"eval_strategy": "steps", "eval_steps": 1}}, "'eval_strategy': a run scores"),
    "base in probes": ({"probe_sft": {"model_init_kwargs": {"dtype": "bfloat16"}}}, "a run has one base"),
    "no base": ({"base": "./nowhere"}, "there is no folder './nowhere'"),
    "a model": ({"base": torch.nn.Linear(2, 2)}, "base is a Linear"),
    "probe of no task": ({"probes": {"c": "x"}}, "probes has 'c', which is none of"),
    "probe in memory": ({"probes": {"a": torch.nn.Linear(2, 2)}}, "the probe of 'a' is a Linear"),
    "no probe": ({"probes": {"a": "./nowhere"}}, "there is no folder './nowhere'"),
    "probes": ({"probes": ["x"]}, "probes is a list"),
    "gradient": ({"score": "gradient"}, "fusion needs one of 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_before_anything_is_trained_or_written(make, untrained, tmp_path, name):
    options, message = MISTAKES[name]
    with pytest.raises(IsolateError, match=message):
        make(tmp_path / "out", **options).run()
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_output_folder(make, untrained, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(IsolateError, match=r"output_dir=.*: give a folder"):
        make(tmp_path / "out").run()


def test_probes_of_another_model_or_of_none_are_refused(make, base, untrained, tmp_path):
    """Of other shapes, of another base, or the base itself: nothing is trained."""
    tiny(num_hidden_layers=2, intermediate_size=40).save_pretrained(tmp_path / "narrow")
    with pytest.raises(RegionError, match=r"the probe of 'a': .*\(48, 32\).*\(40, 32\)"):
        make(tmp_path / "out", probes={"a": tmp_path / "narrow"}).run()
    other = get_peft_model(tiny(num_hidden_layers=2, seed=1, **DROPOUT), CoreIsolationConfig(init_weights=False))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="the probe of 'a': "):
        make(tmp_path / "out", probes={"a": tmp_path / "other"}).run()
    assert not (tmp_path / "out").exists()
    with pytest.raises(RegionError, match=r"the core region of 'b': .* does not differ"):
        make(tmp_path / "out", probes={"b": base}).run()


def test_tasks_that_share_no_group_may_have_other_fields(make, tmp_path):
    """Each alone: one of prompts and completions, one of text."""
    tasks = {"a": sft_rows(6), "b": [{"text": row["prompt"]} for row in sft_rows(6)]}
    scores = make(tmp_path / "out", tasks=tasks, threshold=None, fuse=False).run().scores["end"]
    assert sorted(scores["a"]) == ["exact_match", "loss"]
    assert sorted(scores["b"]) == ["loss"]


def test_a_probe_that_learned_nothing_is_refused(make, tmp_path):
    """As soon as it is trained; the next one is not."""
    with pytest.raises(RegionError, match=r"the core region of 'a': .* does not differ"):
        make(tmp_path / "out", sft=SFT | {"learning_rate": 0.0}).run()
    assert [path.name for path in (tmp_path / "out" / "probes").iterdir()] == ["a"]


def test_a_training_that_diverged_is_refused(make, tmp_path, monkeypatch):
    """Its loss is no number; the message says what to do."""
    monkeypatch.setattr(HeldOutLoss, "__call__", lambda *_: float("nan"))
    with pytest.raises(IsolateError, match=r"base: the loss of 'a' is nan: .* lower learning rate"):
        make(tmp_path / "out").run()


def test_stages_that_could_train_nothing_are_refused_before_the_first(make, tmp_path, monkeypatch, done):
    """Cores that cover all of the scope between them: known when the groups are."""
    shutil.copytree(done.folder, tmp_path / "out", ignore=shutil.ignore_patterns("stages", "fused", "final", "merged"))
    monkeypatch.setattr(steps.Steps, "_union", lambda self, tasks: Region({"x": Selection.whole((10**6,))}))
    path = tmp_path / "out" / "groups.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"sizes": [10**6, 10**6]}))
    with pytest.raises(IsolateError, match=r"the cores of b are all .* could train nothing"):
        make(tmp_path / "out").run()


@pytest.mark.parametrize("name", ["base.json", "stages/2/scores.json", "groups.json", "stages/1/training.json"])
def test_a_damaged_file_of_a_run_is_refused(make, done, tmp_path, untrained, name):
    """And named; what was found lies there still."""
    shutil.copytree(done.folder, tmp_path / "out")
    (tmp_path / "out" / name).write_text('{"a": [')
    with pytest.raises(FormatError, match=Path(name).name):
        make(tmp_path / "out", merge=True).run()
    (tmp_path / "out" / "report.json").write_text("{}")
    with pytest.raises(FormatError, match=r"report\.json is no result"):
        IsolationResult.load(tmp_path / "out")
    with pytest.raises(IsolateError, match="there is no such file; pass the folder of a finished run"):
        IsolationResult.load(tmp_path / "nowhere")


def test_the_picture_is_no_reason_to_lose_a_run(make, done, tmp_path, untrained, monkeypatch, capsys):
    """Without matplotlib there is a note in its place."""

    def fails(self, path):
        raise ImportError("drawing needs matplotlib")

    monkeypatch.setattr(Grouping, "plot", fails)
    shutil.copytree(done.folder, tmp_path / "out")
    (tmp_path / "out" / "similarity.png").unlink()
    result = make(tmp_path / "out", merge=True, progress=True).run()
    assert result.scores == done.scores
    assert "== no similarity.png: drawing needs matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out" / "similarity.png").exists()


def test_a_folder_has_one_run_at_a_time(make, tmp_path, untrained):
    with (
        layout.Layout(tmp_path / "out").claimed(),
        pytest.raises(IsolateError, match="another run works in"),
    ):
        make(tmp_path / "out").run()


# --- rows


@given(st.integers(2, 300), st.integers(0, 3), st.text(st.sampled_from("abc"), min_size=1))
def test_what_is_held_out_is_a_twentieth_and_never_trained_on(n, seed, name):
    rows = [{"text": str(i)} for i in range(n)]
    task, twin = read_tasks({name: rows, "other": rows}, seed)
    assert len(task.test) == max(1, round(0.05 * n))
    assert sorted((*task.train, *task.test), key=rows.index) == rows
    assert list(task.train) == [row for row in rows if row not in task.test]
    assert read_tasks([("other", rows), (name, rows)], seed)[1] == task
    assert twin.held_out


def test_sizes_of_probes_and_samples():
    """Papers' section 3: a probe takes the larger of a tenth and 1,000, a sample the smaller."""
    rows = [{"text": str(i)} for i in range(14_000)]
    big, small, tiny_one = read_tasks(
        {name: {"train": rows[:n], "test": rows[:1]} for name, n in (("x", 14_000), ("y", 3_000), ("z", 4))}, seed=0
    )
    assert [len(probe_rows(task, 0, None)) for task in (big, small, tiny_one)] == [1400, 1000, 4]
    assert len(probe_rows(big, 0, 7)) == 7
    assert sample_size([big, small], None) == 300
    assert sample_size([big], None) == 1000
    assert sample_size([big, tiny_one], None) == 1
    drawn = sample_rows(small, 0, 300)
    assert len(drawn) == 300
    assert drawn == sorted(drawn, key=lambda row: int(row["text"]))
    assert drawn == sample_rows(small, 0, 300)
    assert drawn != sample_rows(small, 1, 300)
    assert drawn != probe_rows(small, 0, 300)
    held = read_tasks({"x": rows, "y": rows}, seed=0)
    assert [len(task.test) for task in held] == [500, 500]
    assert held[0].test != held[1].test


def test_rows_carry_what_trl_reads_and_no_more():
    """Columns of a data set that differ from task to task would not fit into one."""
    row = {"prompt": "a", "completion": "b", "id": 5, "tools": []}
    assert for_training([row], ("prompt", "completion")) == [{"prompt": "a", "completion": "b", "tools": []}]


KEYS = st.sampled_from("abc")
VALUES = st.sampled_from([True, 1, 1.0, 0.5, "1", "", [1, "x"], []])
SETTINGS = st.dictionaries(KEYS, VALUES | st.none() | st.dictionaries(KEYS, VALUES, min_size=1))


def leaves(settings, name=""):
    """{dotted name: value}, without what is None: that is as if it were not said."""
    found = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{name}{key}.")
        elif value is not None:
            found[f"{name}{key}"] = json.dumps(value)
    return found


@given(SETTINGS, SETTINGS)
def test_settings_differ_by_name(then, now):
    """Equal ones have no difference, also once they have been through a file; True is not 1."""
    assert list(differences(then, json.loads(json.dumps(plain("x", then))))) == []
    named = [line.partition(": ")[0] for line in differences(then, now)]
    different = {name for name, _ in leaves(then).items() ^ leaves(now).items()}
    # A mapping and a number of one name are one difference.
    assert {name.partition(".")[0] for name in named} == {name.partition(".")[0] for name in different}
    assert len(set(named)) == len(named)


def test_settings_that_cannot_be_kept_are_refused(make, untrained, tmp_path):
    with pytest.raises(IsolateError, match=r"sft, data_seed holds <object.*which run.json cannot hold"):
        plain("sft, data_seed", object())


def test_what_a_base_lacks_is_made_up_the_same_way(base, tmp_path):
    """A head that is not in the file is drawn whenever the base is loaded."""
    shutil.copytree(base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    recipe, heads = Recipe(str(tmp_path / "base"), SFT), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(recipe.load_base().lm_head.weight.detach().clone())
    assert torch.equal(*heads)


# --- kills


def steps_of(folder: Path) -> list[str]:
    """What a run has finished."""
    return sorted(name for name in contents(folder) if not name.startswith(".") and "/." not in name)


def doomed(run: IsolationRun, at: Callable[[str], bool]) -> Callable[[], object]:
    """The run, in a process that dies before the first rename to a path of which this is true."""

    def work() -> None:
        def watch(event: str, arguments: tuple) -> None:
            if event == "os.rename" and at(os.fspath(arguments[1])):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        run.run()

    return work


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


def test_a_killed_run_ends_with_the_same_bytes(make, done, tmp_path):
    """Killed as the second stage is about to get its name, after other random numbers were drawn; then run again."""
    out = tmp_path / "out"
    torch.manual_seed(5)
    run = make(out, merge=True)
    assert in_child(doomed(run, lambda path: path == str(out / "stages" / "2"))) == -signal.SIGKILL
    assert (out / "stages" / "1" / "scores.json").is_file()
    assert not (out / "stages" / "2").exists()
    assert unfinished(out)
    torch.manual_seed(7)
    assert dataclasses.replace(run.run(), folder=done.folder) == done
    assert contents(out) == contents(done.folder)
    assert unfinished(out) == []


@pytest.mark.slow
def test_a_run_that_is_killed_in_each_step_ends_with_the_same_bytes(make, done, tmp_path):
    """Each process lives until the second name is about to be given: as many processes as files and folders."""
    out, seen, killed = tmp_path / "out", [], 0
    run = make(out, merge=True)
    while True:
        names: list[str] = []

        def second(path: str, names: list[str] = names) -> bool:
            # What is inside an unfinished folder counts with it.
            names += [] if "/." in path.removeprefix(str(out)) else [path]
            return len(names) > 1

        status = in_child(doomed(run, second))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
        assert set(seen) <= set(steps_of(out))
        seen = steps_of(out)
    assert killed > 20
    assert contents(out) == contents(done.folder)
    assert unfinished(out) == []


@pytest.mark.slow
def test_a_run_that_is_killed_in_each_training_ends_with_the_same_bytes(make, done, tmp_path):
    """Between the two optimizer steps of a probe and of every stage."""
    out = tmp_path / "out"
    run = make(out, merge=True)
    for folder in ("probes/a", "probes/b", "stages/1", "stages/2", "stages/3", "stages/4"):

        def work(folder: str = folder) -> None:
            once = SFTTrainer.training_step

            def training_step(self, *args, **kwargs):
                if self.state.global_step == 1 and here():
                    os.kill(os.getpid(), signal.SIGKILL)
                return once(self, *args, **kwargs)

            def here() -> bool:
                order = ["probes/a", "probes/b", "stages/1", "stages/2", "stages/3", "stages/4"]
                return next(each for each in order if not (out / each).exists()) == folder

            SFTTrainer.training_step = training_step
            run.run()

        assert in_child(work) == -signal.SIGKILL
        assert not (out / folder).exists()
    run.run()
    assert contents(out) == contents(done.folder)


def test_what_a_kill_left_is_removed_and_nothing_else(make, done, tmp_path, untrained):
    """Unfinished files and folders of a run's names; a user's own hidden files stay."""
    out = tmp_path / "out"
    shutil.copytree(done.folder, out)
    left = [".run.json.abcdefg_", ".fused.abcd1234", "..fused.abcd1234.efgh5678", "stages/.3.abcdefgh",
            "probes/.a.abcdefgh", "regions/.a.safetensors.abcdefgh", "probes/a/.scores.json.abcdefgh",
            "final/.scores.json.abcdefgh"]  # fmt: skip
    kept = [".gitignore", ".note.abcdefgh", ".fused", "stages/.keep", "final/.note.abcdefgh"]
    for number, name in enumerate(left + kept):
        if number % 2:
            (out / name).mkdir()
            (out / name / "x").write_text("")
        else:
            (out / name).write_text("")
    make(out, merge=True).run()
    assert [name for name in left if (out / name).exists()] == []
    assert [name for name in kept if not (out / name).exists()] == []


# --- two processes


@pytest.mark.slow
def test_two_processes_find_the_same(base, tmp_path):
    """Under gloo: both return the same result, from one folder, and again when it is there; an error reaches both."""
    options = SHARED | {"sft": SFT | {"per_device_train_batch_size": 2, "use_cpu": True}}
    job = {"base": str(base), "tasks": data(), "options": options}
    broken = job | {"options": options | {"sft": options["sft"] | {"learning_rate": 0.0}}}
    first, again, failed = pair(
        [("isolated", job), ("isolated", job | {"again": True}), ("isolated", broken)], tmp_path
    )
    for results in (first, again):
        assert isinstance(results[0], IsolationResult), results[0]
        assert results[0] == results[1]
    assert again[0].scores == first[0].scores
    for error in failed:
        assert isinstance(error, RegionError)
        assert "does not differ" in str(error)
    alone = IsolationRun(base, data(), tmp_path / "alone", **SHARED).run()
    assert alone.groups == first[0].groups
    # Two processes average their gradients, and a rounding may pick another scalar at the end of the list.
    for name in "ab":
        ours, theirs = (Region.load(r.folder / "regions" / f"{name}.safetensors") for r in (alone, first[0]))
        assert ours.count == theirs.count
    for task, scores in alone.scores["end"].items():
        assert scores["loss"] == pytest.approx(first[0].scores["end"][task]["loss"], rel=0.05)


def test_no_clock_decides_the_bits_of_a_run(make, tmp_path, monkeypatch):
    """Or a run that was stopped and goes on could end elsewhere: see `deltas.gradient`."""
    seen = []

    def train(_):
        seen.append(gradient._by_rule)
        raise RuntimeError("enough was seen")

    monkeypatch.setattr(SFTTrainer, "train", train)
    with pytest.raises(RuntimeError, match="enough was seen"):
        make(tmp_path / "out").run()
    assert seen == [True]
    assert not gradient._by_rule
