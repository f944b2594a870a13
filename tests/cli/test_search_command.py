"""`peft-isolate search` and the trial that it trains: a whole small search, in this process and in others."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file

import peft_isolate.cli.search_run
from peft_isolate import CoFiTuneConfig, HalfFTConfig
from peft_isolate.errors import IsolateError
from peft_isolate.evaluation.scorers import ExactMatch, HeldOutLoss
from peft_isolate.methods.cofitune.search.result import SearchResult
from peft_isolate.training import SFTTrial
from tests.compare import adapter, assert_same
from tests.models import tiny
from tests.texts import tokenizer

TRAINING = {"learning_rate": 3e-3, "max_steps": 2, "per_device_train_batch_size": 4, "max_length": 48, "use_cpu": True}
LEVELS = [
    {"name": "broad", "ranges": ["bottom", "top"], "modules": ["FFN"]},
    {"name": "modules", "ranges": "best", "modules": ["FFN", ["up"]]},
]


@pytest.fixture
def sheet(tmp_path):
    """`sheet(workers=2)` writes the search's file, with changes, and returns its path; None leaves a field out."""

    def write(**changes) -> Path:
        said = {
            "base": "base",
            "data": "task.jsonl",
            "output": str(tmp_path / "out"),
            "training": TRAINING,
            "levels": LEVELS,
            "speciality": {"type": "held_out_loss", "data": "task.jsonl"},
            "versatility": [
                {"type": "held_out_loss", "data": "general.jsonl", "batch_size": 2},
                {"type": "exact_match", "data": "task.jsonl", "max_new_tokens": 2, "name": "exact"},
            ],
        } | changes
        path = tmp_path / "search.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in said.items() if value is not None}))
        return path

    return write


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def test_a_whole_search(call, sheet, home, tmp_path):
    """Its numbers are those of a trial and of scorers made by hand; started again, it trains nothing."""
    result = call("search", "--config", sheet())
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    found = SearchResult.load(out / "result.json")
    assert result.stdout == f"{found}\nsaved to {out}\n"
    assert (out / "tree.png").read_bytes().startswith(b"\x89PNG")
    assert [(t.range_name, t.modules_name) for t in found.trials][:2] == [("(0, 0.5]", "FFN"), ("(0.5, 1]", "FFN")]
    assert len(found.trials) == len(lines(out)) == 3

    made = SFTTrial("base", "task.jsonl", TRAINING)(CoFiTuneConfig(layer_range="top", modules="FFN"))
    top, spoken = found.trials[1].scores, tokenizer()
    assert top["held_out_loss:task"] == top["speciality"] == pytest.approx(HeldOutLoss("task.jsonl", spoken)(made))
    assert top["held_out_loss:general"] == pytest.approx(HeldOutLoss("general.jsonl", spoken)(made))
    assert top["exact"] == ExactMatch("task.jsonl", spoken, max_new_tokens=2)(made)
    assert top["versatility"] == pytest.approx((top["held_out_loss:general"] + top["exact"]) / 2)

    before = (out / "trials.jsonl").read_bytes()
    again = call("search", "--config", sheet())
    assert (again.stdout, (out / "trials.jsonl").read_bytes()) == (result.stdout, before)
    # Another metric is another reading of the same trials.
    assert call("search", "--config", sheet(metric="speciality")).exit_code == 0
    assert (out / "trials.jsonl").read_bytes() == before


@pytest.mark.slow
def test_workers_find_the_same(call, sheet, tmp_path):
    """Slow: every process imports torch and TRL."""
    assert call("search", "--config", sheet()).exit_code == 0
    alone = SearchResult.load(tmp_path / "out" / "result.json")
    result = call("search", "--config", sheet(workers=2, output=str(tmp_path / "two")))
    assert result.exit_code == 0, result.output
    together = SearchResult.load(tmp_path / "two" / "result.json")
    assert [t.error for t in together.trials] == [None] * 3
    assert [t.scores for t in together.trials] == [pytest.approx(t.scores) for t in alone.trials]
    assert together.best == alone.best


def test_trials_of_other_settings_are_not_taken_for_these(call, mistake, sheet, tmp_path):
    one = [{"name": "one", "ranges": ["top"], "modules": ["up"]}]
    assert call("search", "--config", sheet(levels=one)).exit_code == 0
    changed = TRAINING | {"max_steps": 3}
    line = mistake("search", "--config", sheet(levels=one, training=changed))
    assert "holds the trials of a search with another training" in line
    assert call("search", "--config", sheet(levels=one, training=changed, output=str(tmp_path / "b"))).exit_code == 0


def test_nor_are_those_of_other_data_of_the_same_name(call, mistake, sheet, tmp_path):
    one = [{"name": "one", "ranges": ["top"], "modules": ["up"]}]
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps({"text": "a river"}) + "\n")
    changed = {"levels": one, "versatility": {"type": "held_out_loss", "data": str(data)}}
    assert call("search", "--config", sheet(**changed)).exit_code == 0
    assert call("search", "--config", sheet(**changed)).exit_code == 0
    data.write_text(json.dumps({"text": "a stone"}) + "\n")
    line = mistake("search", "--config", sheet(**changed))
    assert "holds the trials of a search with another content of its files" in line


def test_the_picture_is_no_reason_to_lose_a_search(call, sheet, tmp_path, monkeypatch):
    def fails(self, path):
        raise ImportError("drawing needs matplotlib")

    monkeypatch.setattr(SearchResult, "plot", fails)
    result = call("search", "--config", sheet(levels=[{"name": "one", "ranges": ["top"], "modules": ["up"]}]))
    assert result.exit_code == 0
    assert "no tree.png: drawing needs matplotlib" in result.stderr
    assert SearchResult.load(tmp_path / "out" / "result.json").best.modules == ("up",)


def test_failed_trials_are_run_again_only_when_asked(call, mistake, sheet, home, tmp_path):
    """All fail: one line with the reasons. The cause removed, `--retry-failed` finds."""
    broken = home / "broken.jsonl"
    broken.write_text('{"messages": [{"role": "user", "text": "what a template does not know"}]}\n')
    one = {"levels": [{"name": "one", "ranges": ["top"], "modules": ["up"]}], "data": "broken.jsonl"}
    result = call("search", "--config", sheet(**one))
    assert result.exit_code == 1
    assert "all trials of level 'one' failed" in result.stderr.splitlines()[-1]
    broken.write_text('{"text": "a sun"}\n{"text": "a moon"}\n')
    assert call("search", "--config", sheet(**one)).exit_code == 1
    assert call("search", "--retry-failed", "--config", sheet(**one)).exit_code == 0
    assert [line["error"] is None for line in lines(tmp_path / "out")] == [False, True]


SCORER = {"type": "held_out_loss", "data": "task.jsonl"}
MISTAKES = {
    "unknown key": ({"leaning": 1}, "'leaning' is unknown"),
    "missing key": ({"base": None}, "['base'] must be there; `peft-isolate search --help`"),
    "no base": ({"base": "./nowhere"}, "there is no folder './nowhere'"),
    "no data": ({"data": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
    "columns": ({"data": "odd.jsonl"}, "have the fields ['question']: to train, they need"),
    "odd row": ({"data": "mixed.jsonl"}, "row 1 has the fields ['question'], row 0 ['text']"),
    "odd text": ({"data": "number.jsonl"}, "row 1: 5 is neither text nor a list of messages"),
    "argument": ({"training": {"learnin_rate": 1}}, "'learnin_rate' is unknown to trl.SFTConfig; did you mean one of"),
    "output_dir": ({"training": {"output_dir": "x"}}, "'output_dir': a trial keeps nothing on disk"),
    "value": ({"training": {"optim": "best", "use_cpu": True}}, "training arguments"),
    "text rate": ({"training": {"learning_rate": "4e-5"}}, "learning_rate='4e-5' is text: write 4.0e-5"),
    "text steps": ({"training": {"max_steps": "x"}}, "max_steps='x' is text: write a number"),
    "quoted steps": ({"training": {"max_steps": "20"}}, "max_steps='20' is text: write 20, without quotes"),
    "half a step": ({"training": {"max_steps": 1.5}}, "max_steps=1.5: use a whole number"),
    "no length": ({"training": {"max_length": 0}}, "max_length=0: use a whole number from 1 on, or None"),
    "no batch": ({"training": {"per_device_train_batch_size": 0}}, "per_device_train_batch_size=0: use a whole"),
    "rate": ({"training": {"learning_rate": float("nan")}}, "learning_rate=nan: use a finite number"),
    "minus": ({"training": {"learning_rate": -1}}, "learning_rate=-1: use a number from 0 on"),
    "yes": ({"training": {"max_steps": True}}, "max_steps=True: use a whole number"),
    "flag": ({"training": {"bf16": "no"}}, "bf16='no': use True or False"),
    "training": ({"training": "fast"}, "training='fast' is no mapping"),
    "config": ({"config": {"soft_masc": None}}, "search.yaml, config: 'soft_masc' is unknown"),
    "searched": ({"config": {"layer_range": "top"}}, "config: 'layer_range' is unknown"),
    "excluded": ({"config": {"exclude_modules": ["up_proj", "down_proj"]}}, "selects nothing"),
    "scorer": ({"speciality": {"type": "bleu"}}, "no scorer: write 'type:' and one of ['held_out_loss'"),
    "scorer's key": ({"speciality": SCORER | {"batchsize": 1}}, "speciality, held_out_loss: 'batchsize' is unknown"),
    "scorer's data": ({"speciality": {"type": "exact_match"}}, "exact_match needs ['data']"),
    "scorer's file": ({"versatility": [SCORER | {"data": "no.jsonl"}]}, "versatility 0: there is no file 'no.jsonl'"),
    "names": ({"versatility": [SCORER]}, "two numbers would be called 'held_out_loss:task'"),
    "metric": ({"metric": "accuracy"}, "metric='accuracy': use one of"),
    "share": ({"min_speciality": 0.9, "full_speciality": -2}, "a share of a score means something for positive"),
    "number": ({"min_speciality": "0.9", "full_speciality": 1}, "min_speciality='0.9'"),
    "until": ({"speciality": {"type": "exact_match", "data": "task.jsonl", "until": 3}}, "speciality: until=3: use"),
    "latin": ({"data": "latin.jsonl"}, "latin.jsonl, line 1 is not UTF-8"),
    "pattern": ({"config": {"exclude_modules": "["}}, "config: exclude_modules='[' is no regular expression"),
    "level's name": ({"levels": [{"name": 1, "ranges": ["top"], "modules": ["up"]}]}, "name 1 is no text"),
    "floor": ({"min_speciality": 0.9}, "min_speciality=0.9, full_speciality=None"),
    "workers": ({"workers": 0}, "workers=0"),
    "levels": ({"levels": [{"name": "a", "ranges": ["top"]}]}, "level 0: ['modules'] must be there"),
    "ranges": ({"levels": [{"name": "a", "ranges": ["upper"], "modules": ["up"]}]}, "layer_range='upper'"),
    "modules": ({"levels": [{"name": "a", "ranges": ["top"], "modules": ["upp"]}]}, "modules='upp'"),
    "output": ({"output": "task.jsonl"}, "output 'task.jsonl' is a file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_before_the_first_training(mistake, sheet, home, tmp_path, monkeypatch, name):
    monkeypatch.setattr(SFTTrial, "__call__", lambda *_: pytest.fail("it trained"))
    (home / "odd.jsonl").write_text('{"question": "a"}\n')
    (home / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (home / "mixed.jsonl").write_text('{"text": "a"}\n{"question": "a"}\n')
    (home / "number.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    changes, message = MISTAKES[name]
    assert message in mistake("search", "--check", "--config", sheet(**changes))
    assert not (tmp_path / "out" / "result.json").exists()


def test_mistakes_with_the_file_itself(mistake, tmp_path):
    assert "there is no file 'nowhere.yaml'" in mistake("search", "--config", "nowhere.yaml")
    (tmp_path / "a.yaml").write_text("base: [a\n")
    assert "is no YAML" in mistake("search", "--config", tmp_path / "a.yaml")


def test_check_trains_nothing(call, sheet, tmp_path, monkeypatch):
    monkeypatch.setattr(peft_isolate.cli.search_run, "search_region", lambda *_, **__: pytest.fail("it searched"))
    result = call("search", "--check", "--config", sheet())
    assert result.exit_code == 0, result.output
    assert "is sound" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("depth", "said"),
    [
        (2, "note: at a depth of 2 bottom (0, 0.5] and middle (0.25, 0.75] and second_quarter (0.25, 0.5] are the "
            "same layers; top (0.5, 1] and fourth_quarter (0.75, 1] are the same layers; first_quarter (0, 0.25] and "
            "third_quarter (0.5, 0.75] have no layer\n"),
        (4, ""),
    ],
)  # fmt: skip
def test_ranges_that_are_the_same_layers_are_noted(call, sheet, tmp_path, depth, said):
    tiny(num_hidden_layers=depth).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    result = call("search", "--check", "--config", sheet(base=str(tmp_path / "base"), levels=None))
    assert result.exit_code == 0, result.output
    assert "".join(line for line in result.stderr.splitlines(keepends=True) if "note:" in line) == said


@pytest.fixture
def trial(home) -> SFTTrial:
    return SFTTrial(str(home / "base"), str(home / "task.jsonl"), TRAINING)


def test_a_trial_is_a_function_of_its_config(trial, home):
    """Whatever the random state before it, and after a pickle; another config gives another model."""
    choice = {"layer_range": "top", "modules": "FFN", "init_weights": False}
    torch.manual_seed(1)
    one = trial(CoFiTuneConfig(**choice))
    torch.manual_seed(2)
    two = pickle.loads(pickle.dumps(trial))(CoFiTuneConfig(**choice))
    assert isinstance(one, PeftModel)
    assert_same(adapter(one), adapter(two))
    assert all(tensor.any() for tensor in adapter(one).values())
    assert adapter(trial(HalfFTConfig())).keys() != adapter(one).keys()


def test_what_a_base_lacks_is_made_up_the_same_way(trial, home, tmp_path):
    """A head that is not in the file is drawn when the base is loaded."""
    shutil.copytree(home / "base", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    headless = SFTTrial(str(tmp_path / "base"), trial.data, trial.args)
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(headless(CoFiTuneConfig()).base_model.model.lm_head.weight.detach().clone())
    assert torch.equal(*heads)


def test_a_trial_leaves_nothing_behind(trial, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    trial(CoFiTuneConfig(layer_range="top"))
    assert list(tmp_path.iterdir()) == [tmp_path / "tmp"]
    assert [path for path in (tmp_path / "tmp").iterdir() if "peft-isolate" in path.name] == []
    assert capfd.readouterr().out == ""


def test_logging_is_there_for_those_who_ask(home, capfd):
    SFTTrial(str(home / "base"), str(home / "chat.jsonl"), TRAINING | {"logging_steps": 1})(CoFiTuneConfig())
    assert "'loss'" in capfd.readouterr().out


def test_check_finds_the_trials_mistakes(trial, home):
    trial.check()
    with pytest.raises(IsolateError, match="'epochs' is unknown"):
        SFTTrial(trial.base, trial.data, {"epochs": 1}).check()
    with pytest.raises(IsolateError, match="there is no file"):
        SFTTrial(trial.base, "nowhere.jsonl").check()
