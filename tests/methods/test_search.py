"""The search of CoFiTune: the paper's tree, records that survive a kill, failures, executors, result and picture."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from peft_isolate import CoFiTuneConfig
from peft_isolate.errors import FormatError, IsolateError
from peft_isolate.methods.cofitune.search import search_region
from peft_isolate.methods.cofitune.search.journal import Journal, Record, config_of, key_of, plain_fields
from peft_isolate.methods.cofitune.search.levels import PAPER_LEVELS, Level
from peft_isolate.methods.cofitune.search.result import SearchResult, is_eligible
from peft_isolate.methods.cofitune.search.trial import run_trial
from tests.methods import search_trials
from tests.methods.search_trials import score, train
from tests.models import tiny

MHA, FFN = ("q", "k", "v"), ("up", "down")
BROAD = [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)]
# What the paper's tree tries where (0, ½] and then (¼, ½] are best, in this order.
SEQUENCE = [
    *[("broad", pair, group) for pair in BROAD for group in (MHA, FFN)],
    *[("narrow", pair, group) for pair in [(0.0, 0.25), (0.25, 0.5)] for group in (MHA, FFN)],
    ("modules", (0.25, 0.5), ("up",)),
    ("modules", (0.25, 0.5), ("down",)),
]


def search(train=train, score=score, **options) -> SearchResult:
    return search_region(train, score, progress=False, **options)


class Counting:
    """A training that remembers what it was asked for."""

    def __init__(self, fails=lambda config: False):
        self.asked, self.fails = [], fails

    def __call__(self, config):
        self.asked.append((config.layer_range, config.modules))
        if self.fails(config):
            raise RuntimeError(f"no {config.modules} today")
        return config


def by(value):
    """A scorer of this speciality."""
    return lambda config: {"speciality": value(config), "versatility": 0.0}


def untimed(result: SearchResult) -> tuple:
    """All of a result that must not differ between two runs."""
    return tuple(replace(trial, seconds=0) for trial in result.trials), result.path, result.best


# -- the tree ---------------------------------------------------------------------------------------------------------


def test_the_papers_tree():
    """12 trials: 6 broad, 4 in the two quarters of the best, up and down alone; FFN and MHA are known by then."""
    counting = Counting()
    result = search(counting)
    assert [(trial.level, trial.layer_range, trial.modules) for trial in result.trials] == SEQUENCE
    assert counting.asked == [(pair, modules) for _, pair, modules in SEQUENCE]
    assert [(choice.level, choice.compared, choice.chosen) for choice in result.path] == [
        ("broad", (0, 1, 2, 3, 4, 5), 1), ("narrow", (6, 7, 8, 9), 9), ("modules", (8, 9, 10, 11), 9),
    ]  # fmt: skip
    assert (result.best.layer_range, result.best.modules, result.best.resolved) == ((0.25, 0.5), FFN, None)
    trial = result.trials[9]
    assert trial.metric == trial.unified == trial.speciality + trial.versatility
    assert trial.scores == {"speciality": trial.speciality, "versatility": trial.versatility, "perplexity": 7.0}


@pytest.mark.parametrize("best", [(i / 4, (i + 1) / 4) for i in range(4)])
@pytest.mark.parametrize("modules", [MHA, FFN, ("up",), ("down",)])
def test_it_finds_the_best_wherever_it_is(best, modules):
    """Scores that fall with the distance from any place lead there, in 12 trials."""

    def value(config):
        (a, b), (c, d) = config.layer_range, best
        overlap = max(0.0, min(b, d) - max(a, c))
        return overlap / (b - a) + 0.1 * len(set(config.modules) & set(modules)) / len({*config.modules, *modules})

    result = search(score=by(value))
    assert (result.best.layer_range, result.best.modules) == (best, modules)
    assert len(result.trials) == 12


def test_of_equal_trials_the_first_is_best():
    assert [choice.chosen for choice in search(score=by(lambda config: 1.0)).path] == [0, 6, 6]


def test_the_other_fields_of_the_config_are_kept_and_the_config_is_left_alone():
    base = CoFiTuneConfig(exclude_modules=["lm_head"], save_dtype="bfloat16", layer_range="top", modules="MHA")
    before, seen = plain_fields(base), []

    def use_up(config):
        seen.append((config.exclude_modules, config.save_dtype))
        config.resolved, config.exclude_modules = {"used": "up"}, {"else"}
        return config

    result = search(use_up, config=base)
    assert set(map(str, seen)) == {"({'lm_head'}, 'bfloat16')"}, "one trial's config is no other's"
    assert plain_fields(base) == before
    assert base.resolved is None
    assert plain_fields(result.best) == before | {"layer_range": [0.25, 0.5], "modules": [*FFN]}


def test_equal_configs_are_one_trial_whatever_they_are_called():
    levels = [
        Level("one", ["second_quarter", (0.25, 0.5)], ["FFN", ("up", "down"), ["down", "up"]]),
        Level("two", "best", "FFN"),
        Level("three", "halves", [("v", "k", "q"), "up"]),
    ]
    counting = Counting()
    result = search(counting, levels=levels)
    assert counting.asked == [
        ((0.25, 0.5), FFN), ((0.25, 0.375), MHA), ((0.25, 0.375), ("up",)),
        ((0.375, 0.5), MHA), ((0.375, 0.5), ("up",)),
    ]  # fmt: skip
    assert [len(choice.compared) for choice in result.path] == [1, 1, 4]


def test_levels_of_ones_own():
    """Ranges from a function of the best so far, which is the whole depth at first."""

    def thirds(best):
        cuts = np.linspace(*best, 4).tolist()
        return list(itertools.pairwise(cuts))

    result = search(levels=[Level("thirds", thirds, ["FFN"]), Level("ninths", thirds, ["FFN", "MHA+FFN"])])
    assert len(result.trials) == 9
    assert all(trial.layer_range[1] - trial.layer_range[0] == pytest.approx(1 / 9) for trial in result.trials[3:])
    halves = Level("halves", "halves", "FFN")
    assert search(levels=[halves]).trials[1].layer_range == (0.5, 1.0)
    assert untimed(search(levels=halves)) == untimed(search(levels=iter([halves]))) == untimed(search(levels=[halves]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "middle", ["FFN"]), r"ranges='middle' of level 'a': use \['best', 'halves'\]"),
        (("a", [], ["FFN"]), "nothing to try"),
        (("a", "best", []), "nothing to try"),
        (("a", [(8, 15)], ["FFN"]), "no range of layers"),
        (("a", "best", ["FNN"]), "modules=.*FNN"),
        ((1, "best", ["FFN"]), "name 1 is no text"),
        (("", "best", ["FFN"]), "name '' is no text"),
    ],
)
def test_levels_that_mean_nothing(arguments, message):
    with pytest.raises(IsolateError, match=message):
        Level(*arguments)


def with_a_tensor() -> CoFiTuneConfig:
    """A config that no JSON can hold: set afterwards, what it would refuse itself."""
    config = CoFiTuneConfig()
    config.modules_to_save = [torch.zeros(2)]
    return config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": []}, "at least one Level"),
        ({"levels": 3}, "levels=3: give at least one Level"),
        ({"levels": ["broad"]}, "at least one Level"),
        ({"levels": [Level("a", lambda best: [], ["FFN"])]}, "gave no range within"),
        ({"metric": "unifed"}, "metric='unifed'"),
        ({"min_speciality": 0.9}, "give both"),
        ({"full_speciality": 0.9}, "give both"),
        ({"min_speciality": math.nan, "full_speciality": 1.0}, "give both"),
        ({"min_speciality": 10**400, "full_speciality": 1.0}, "give both"),
        ({"min_speciality": 0.9, "full_speciality": -2.3}, "positive"),
        ({"config": "FFN"}, "config is a str"),
        ({"config": CoFiTuneConfig(target_modules=["up_proj"])}, "target_modules of the config"),
        ({"config": CoFiTuneConfig(layers_to_transform=[1])}, "layers_to_transform of the config"),
        ({"config": with_a_tensor()}, "modules_to_save of the config is a Tensor"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_trained(options, message, tmp_path):
    counting = Counting()
    with pytest.raises(IsolateError, match=message):
        search(counting, output=tmp_path / "out", **options)
    assert not counting.asked


def test_a_config_that_a_model_has_used_up_is_refused():
    config = CoFiTuneConfig(layer_range="top")
    get_peft_model(tiny(), config)
    with pytest.raises(IsolateError, match="used to wrap a model"):
        search(config=config)


# -- what is maximised ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["unified", "speciality", "versatility", lambda scores: -scores["perplexity"]])
def test_metrics(metric):
    value = {
        "unified": lambda t: t.unified,
        "speciality": lambda t: t.speciality,
        "versatility": lambda t: t.versatility,
    }
    result = search(metric=metric)
    expected = value.get(metric, lambda trial: -7.0)
    assert [trial.metric for trial in result.trials] == [expected(trial) for trial in result.trials]
    for choice in result.path:
        compared = [result.trials[index] for index in choice.compared]
        assert result.trials[choice.chosen].metric == max(trial.metric for trial in compared)


@pytest.mark.parametrize("kind", [np.float32, np.float64, lambda x: np.array([x]), torch.tensor, lambda x: torch.ones(1) * x])  # fmt: skip  # noqa: E501
def test_a_metric_may_give_any_kind_of_number(kind, tmp_path):
    result = search(metric=lambda scores: kind(scores["perplexity"]))
    assert {(type(trial.metric), trial.metric) for trial in result.trials} == {(float, 7.0)}
    result.save(tmp_path / "result.json")
    for nonsense in (True, "7", torch.ones(2), np.bool_(True), None, 10**400):
        with pytest.raises(IsolateError, match="is no finite number"):
            search(metric=lambda scores, value=nonsense: value)


def test_another_metric_on_the_same_records_trains_nothing_again(tmp_path):
    counting = Counting()
    with pytest.raises(IsolateError, match=r"the metric metric of .*nan, which is no finite number"):
        search(counting, output=tmp_path, metric=lambda scores: math.nan)
    assert len(counting.asked) == 1, "it is said at once"
    search(counting, output=tmp_path)
    search(counting, output=tmp_path, metric=lambda scores: scores["speciality"] + 2 * scores["versatility"])
    assert len(counting.asked) == 12


def test_trials_below_the_floor_are_not_chosen():
    def scores(config):
        # The best unified score is MHA's, at little speciality.
        ffn = config.modules != MHA
        return {"speciality": 0.3 if ffn else 0.2, "versatility": 0.1 if ffn else 0.9}

    assert search(score=scores).best.modules == MHA
    result = search(score=scores, min_speciality=0.1, full_speciality=3)  # 0.3 and a bit, in floats
    assert result.best.modules == FFN
    assert "speciality below 0.3" in str(result)
    with pytest.raises(
        IsolateError, match=r"no trial of level 'broad' reaches speciality 0\.33 .*the best has 0\.3: FFN in"
    ):
        search(score=scores, min_speciality=0.11, full_speciality=3)


# -- trials that fail -------------------------------------------------------------------------------------------------


def test_a_trial_that_raises_is_recorded_and_the_search_goes_on(tmp_path):
    result = search(search_trials.fail_on_up, output=tmp_path)
    assert len(result.trials) == 12
    assert [(trial.modules, trial.error) for trial in result.trials if trial.error] == [
        (("up",), "RuntimeError: no memory for up")
    ]
    assert "failed: RuntimeError: no memory for up" in str(result)
    records = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    (error,) = [record["error"] for record in records if record["error"]]
    assert 'raise RuntimeError("no memory for up")' in error["traceback"]


def test_failed_trials_are_repeated_only_when_asked_for(tmp_path):
    broken, whole = Counting(lambda config: config.modules == MHA), Counting()
    search(broken, output=tmp_path)
    assert not any(trial.error is None for trial in search(whole, output=tmp_path).trials if trial.modules == MHA)
    assert not whole.asked
    result = search(whole, output=tmp_path, retry_failed=True)
    assert whole.asked == [(pair, modules) for _, pair, modules in SEQUENCE if modules == MHA]
    assert untimed(result) == untimed(search())
    assert untimed(search(whole, output=tmp_path)) == untimed(search()), "the later record counts"
    assert len(whole.asked) == 5


def test_where_a_whole_level_fails_it_says_why(tmp_path):
    broken = Counting(lambda config: config.layer_range in [(0.0, 0.25), (0.25, 0.5)])
    with pytest.raises(IsolateError) as raised:
        search(broken, output=tmp_path)
    said = str(raised.value)
    assert "all trials of level 'narrow' failed" in said
    assert "MHA in (0, 0.25]: RuntimeError: no ('q', 'k', 'v') today" in said
    assert said.count("RuntimeError") == 4
    assert str(tmp_path / "trials.jsonl") in said
    assert "retry_failed=True" in said


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"speciality": math.nan, "versatility": 1.0}, r"\['speciality'\] is nan"),
        ({"speciality": 1.0, "versatility": -math.inf}, r"\['versatility'\] is -inf"),
        ({"speciality": 1.0}, "forgot 'versatility': it returned .'speciality'."),
        ({"speciality": "good", "versatility": 1.0}, r"\['speciality'\] is 'good'"),
        ({"speciality": 1.0, "versatility": True}, r"\['versatility'\] is True"),
        ({"speciality": torch.ones(2), "versatility": 1.0}, r"\['speciality'\] is tensor"),
        ({"speciality": 10**400, "versatility": 1.0}, r"\['speciality'\] is 10{400}, which is no finite"),
        (0.7, "returned a float, not a dictionary"),
        (None, "returned a NoneType, not a dictionary"),
    ],
)
def test_a_scorer_that_returns_nonsense_fails_its_trials(scores, message):
    with pytest.raises(IsolateError, match=message):
        search(score=lambda model: scores)


def test_numbers_of_any_kind_are_scores_and_what_is_no_number_beside_them_is_left_out(tmp_path):
    scores = {"speciality": torch.tensor(0.5), "versatility": np.float32(0.25), "extra": math.nan, "note": "fine"}
    result = search(score=lambda model: scores, output=tmp_path)
    assert result.trials[0].scores == {"speciality": 0.5, "versatility": 0.25}
    assert {type(number) for number in result.trials[0].scores.values()} == {float}


def test_a_trainer_that_exits_ends_its_trial_only():
    def leave(config):
        return sys.exit("out of data") if config.modules == MHA else config

    assert [trial.error for trial in search(leave).trials[:2]] == ["SystemExit: out of data", None]


# -- records ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("recorded") / "trials.jsonl"
    search(output=path)
    return path.read_bytes()


def goes_on_after(content: bytes, recorded: bytes, path: Path) -> None:
    """Same result and records, and only the trials are run again whose record was lost."""
    path.write_bytes(content)
    counting = Counting()
    assert untimed(search(counting, output=path)) == untimed(search())
    assert counting.asked == [(pair, modules) for _, pair, modules in SEQUENCE[content.count(b"\n") :]]
    assert keys(path.read_bytes()) == keys(recorded)


def keys(content: bytes) -> list[str]:
    return [Record.of_line(line).key for line in content.splitlines()]


def test_cut_at_any_byte_the_whole_lines_remain(recorded, tmp_path):
    path, lines = tmp_path / "trials.jsonl", keys(recorded)
    for size in range(len(recorded) + 1):
        path.write_bytes(recorded[:size])
        with Journal(path) as journal:
            assert list(journal.records) == lines[: recorded[:size].count(b"\n")]
        assert path.read_bytes() == recorded[: recorded[:size].rfind(b"\n") + 1]


def test_cut_around_any_record_it_goes_on_to_the_same_result(recorded, tmp_path):
    """Whatever a kill leaves of the file: before, in and after the mark of a line, and around its end."""
    ends = [i + 1 for i, byte in enumerate(recorded) if byte == 0x0A]
    for size in {0, *(end + shift for end in ends for shift in (-2, -1, 0, 1, 20, 300))}:
        goes_on_after(recorded[:size], recorded, tmp_path / "trials.jsonl")


@pytest.mark.slow
def test_cut_at_any_byte_it_goes_on_to_the_same_result(recorded, tmp_path):
    for size in range(len(recorded) + 1):
        goes_on_after(recorded[:size], recorded, tmp_path / "trials.jsonl")


def test_zeros_that_a_loss_of_power_leaves_are_cut_off(recorded, tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_bytes(recorded + bytes(100))
    assert untimed(search(Counting(lambda config: True), output=path)) == untimed(search())
    assert path.read_bytes() == recorded


@pytest.mark.parametrize("line", [1, 5, 12])
@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:-20],
        lambda line: b"",
        lambda line: line.replace(b'"perplexity": 7.0', b'"perplexity": NaN'),
        lambda line: line.replace(b'"perplexity": 7.0', b'"perplexity": 7e999'),
        lambda line: line.replace(b'"versatility": 0', b'"versatility": "0"').replace(b'"0".', b'"0", "x": 1'),
        lambda line: line.replace(b"speciality", b"specialty"),
        lambda line: line.replace(b'"error": null', b'"error": {}'),
        lambda line: line.replace(b'"seconds"', b'"second"'),
        lambda line: line[:60] + b"\xff" + line[60:],
        lambda line: line[:24] + b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_line_is_named_and_nothing_is_touched(recorded, tmp_path, line, damage):
    lines = recorded.split(b"\n")
    lines[line - 1] = damage(lines[line - 1])
    path = tmp_path / "trials.jsonl"
    path.write_bytes(b"\n".join(lines) + b"torn")
    damaged, counting = path.read_bytes(), Counting()
    with pytest.raises(FormatError, match=rf"trials\.jsonl, line {line}: .*delete this line"):
        search(counting, output=path)
    assert path.read_bytes() == damaged
    assert not counting.asked


@pytest.mark.parametrize("content", [b"a user's notes", b'{"prompt": "x"}\n{"prompt"', b'{"prompt": "x"}'])
def test_another_file_is_left_alone(tmp_path, content):
    path = tmp_path / "notes.jsonl"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"notes\.jsonl, line 1"):
        search(output=path)
    assert path.read_bytes() == content


def test_output_is_a_folder_or_a_file(tmp_path):
    search(output=tmp_path / "new" / "folder")
    search(output=str(tmp_path / "new" / "file.jsonl"))
    assert sorted(path.name for path in (tmp_path / "new").rglob("*.jsonl")) == ["file.jsonl", "trials.jsonl"]
    (tmp_path / "report.txt").write_text("mine")
    with pytest.raises(IsolateError, match=r"report\.txt' is a file: pass a folder"):
        search(output=tmp_path / "report.txt")


def test_searches_of_two_configs_share_a_file_and_do_not_mix(tmp_path):
    first, second = Counting(), Counting()
    search(first, output=tmp_path)
    with pytest.warns(UserWarning, match=r"12 of the 12 trials .* another config \(train_bias differs\)"):
        result = search(second, output=tmp_path, config=CoFiTuneConfig(train_bias=False))
    assert second.asked == first.asked
    assert result.best.train_bias is False
    with pytest.warns(UserWarning, match="12 of the 24"):
        search(second, output=tmp_path)
    assert len(second.asked) == 12


def test_two_searches_at_once_in_one_file_are_refused(tmp_path):
    """Until the first has ended, by an exception too."""
    code = f"""
from peft_isolate.methods.cofitune.search.journal import Journal
try:
    Journal({str(tmp_path)!r})
except ValueError as error:
    print(error, flush=True)
else:
    print("not refused", flush=True)
input()
Journal({str(tmp_path)!r})
print("open")
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    heard = []

    def train(config):
        heard.append(other.stdout.readline())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(train, output=tmp_path)
    assert "is open in another search: wait for it" in heard[0]
    assert other.communicate("go on\n")[0] == "open\n"


@pytest.mark.parametrize("link", [False, True])
def test_two_searches_in_threads_of_one_process_are_refused(tmp_path, link):
    """Under another name of the file, too; afterwards it is free."""
    (tmp_path / "mine").mkdir()
    other = tmp_path / "mine" / "trials.jsonl"
    if link:
        other = tmp_path / "link.jsonl"
        other.symlink_to(tmp_path / "mine" / "trials.jsonl")

    def second(config):
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            thread.submit(Journal, other).result()

    with pytest.raises(IsolateError, match="is open in another search: wait for it"):
        search(second, output=tmp_path / "mine")
    assert untimed(search(output=other, retry_failed=True)) == untimed(search())


def test_a_reader_of_the_records_does_not_end_the_lock(tmp_path):
    """A cell of a notebook that looks at the records while the search runs."""
    code = f"from peft_isolate.methods.cofitune.search.journal import Journal; Journal({str(tmp_path)!r})"
    heard = []

    def train(config):
        (tmp_path / "trials.jsonl").read_bytes()
        heard.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(train, output=tmp_path)
    assert "is open in another search" in heard[0]


@pytest.mark.parametrize("change", [{"level": 1}, {"seconds": math.nan}, {"scores": {"speciality": 1.0}}])
def test_what_could_not_be_read_back_is_not_written(recorded, tmp_path, change):
    path = tmp_path / "trials.jsonl"
    path.write_bytes(recorded)
    with Journal(path) as journal, pytest.raises(IsolateError, match=r"cannot be kept in .*trials\.jsonl"):
        journal.append(replace(Record.of_line(recorded.splitlines()[0]), **change))
    assert path.read_bytes() == recorded


def test_a_full_disk_loses_nothing(recorded, tmp_path, monkeypatch):
    """Half a line that was written is taken back, and the error is the system's."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:20]))
    path = tmp_path / "trials.jsonl"
    lines = recorded.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    with pytest.raises(OSError, match="the disk is full"):
        search(output=path)
    assert path.read_bytes() == b"".join(lines[:3])


def test_each_record_is_one_write_at_the_end_of_the_file_and_on_the_disk(tmp_path, monkeypatch):
    calls, write, fsync = [], os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda file, data: calls.append(data.count(b"\n")) or write(file, data))
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("synced") or fsync(file))
    search(output=tmp_path)
    assert calls[1:] == [1, "synced"] * 12


def test_an_interruption_keeps_what_is_finished(tmp_path):
    def interrupt(config):
        if config.layer_range == (0.25, 0.5):
            raise KeyboardInterrupt
        return config

    with pytest.raises(KeyboardInterrupt):
        search(interrupt, output=tmp_path)
    counting = Counting()
    assert untimed(search(counting, output=tmp_path)) == untimed(search())
    assert counting.asked == [(pair, modules) for _, pair, modules in SEQUENCE[8:]]


def test_a_killed_process_goes_on_where_it_stopped(tmp_path):
    """SIGKILL in the middle of a real process."""
    code = f"""
from peft_isolate.methods.cofitune.search import search_region
from tests.methods.search_trials import score, slow_train
search_region(slow_train, score, output={str(tmp_path)!r}, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    path, deadline = tmp_path / "trials.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done, counting = path.read_bytes().count(b"\n"), Counting()
    assert 4 <= done < 12
    assert untimed(search(counting, output=tmp_path)) == untimed(search())
    assert counting.asked == [(pair, modules) for _, pair, modules in SEQUENCE[done:]]


def test_fields_are_the_same_where_configs_mean_the_same():
    assert plain_fields(CoFiTuneConfig(layer_range="second_quarter", modules=["down", "up"])) == plain_fields(
        CoFiTuneConfig()
    )


def test_fields_and_config_are_each_others_inverse():
    config = CoFiTuneConfig(
        layer_range="middle", modules="MHA", exclude_modules=["b", "a"], trainable_token_indices={"embed": [1]},
        task_type="CAUSAL_LM", modules_to_save=["head"],
    )  # fmt: skip
    fields = json.loads(key_of(plain_fields(config)))
    assert plain_fields(config_of(fields)) == fields == plain_fields(config)
    with pytest.raises(FormatError, match="no CoFiTuneConfig has these fields"):
        config_of(fields | {"rank": 8})


# -- executors --------------------------------------------------------------------------------------------------------


class Shuffled(concurrent.futures.Executor):
    """Finishes what was submitted in an order of its own, once nothing more comes."""

    def __init__(self, seed: int):
        self.random, self.waiting, self.order = random.Random(seed), [], []
        self.timer: threading.Timer | None = None

    def submit(self, fn, /, *args, **kwargs):
        if self.timer is not None:
            self.timer.cancel()
        future: concurrent.futures.Future = concurrent.futures.Future()
        self.waiting.append((future, fn, args))
        self.timer = threading.Timer(0.01, self.flush)
        self.timer.start()
        return future

    def flush(self):
        waiting, self.waiting = self.waiting, []
        self.random.shuffle(waiting)
        for future, fn, args in waiting:
            self.order.append((args[2].layer_range, args[2].modules))
            future.set_result(fn(*args))


class Job:
    """What submitit returns: it has a future's methods, and is none."""

    def __init__(self, fn, args):
        self.call, self.asked = (fn, args), 0

    def done(self):
        self.asked += 1
        return self.asked > 1

    def result(self):
        return self.call[0](*self.call[1])

    def cancel(self):
        pass


class Cluster:
    def submit(self, fn, *args):
        return Job(fn, args)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_result_does_not_depend_on_the_order_in_which_trials_finish(seed):
    executor = Shuffled(seed)
    assert untimed(search(executor=executor)) == untimed(search())
    assert sorted(executor.order) == sorted((pair, modules) for _, pair, modules in SEQUENCE), "all went through it"
    executor = Shuffled(seed)
    assert untimed(search(score=by(lambda config: 1.0), executor=executor)) == untimed(search(score=by(lambda c: 1.0)))


def test_records_stand_in_the_order_of_their_coming(tmp_path):
    executor = Shuffled(3)
    search(executor=executor, output=tmp_path)
    records = [Record.of_line(line) for line in (tmp_path / "trials.jsonl").read_bytes().splitlines()]
    found = [(tuple(record.fields["layer_range"]), tuple(record.fields["modules"])) for record in records]
    assert found == executor.order != [(pair, modules) for _, pair, modules in SEQUENCE]


def test_the_jobs_of_submitit_will_do():
    assert untimed(search(executor=Cluster())) == untimed(search())


def test_an_unseeded_trial_gives_the_same_here_and_there_and_leaves_no_trace(tmp_path):
    """A trial depends on its config alone: neither on the trials before it nor on the process it runs in."""
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    here = search(score=search_trials.score_by_chance, output=tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    torch.manual_seed(6)
    path = tmp_path / "trials.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    assert untimed(search(score=search_trials.score_by_chance, output=path)) == untimed(here)


def spawned(workers: int = 1) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


@pytest.mark.slow
def test_processes_and_what_they_cannot_do(tmp_path):
    """A pool of fresh processes gives what one process gives; a function that cannot be sent is named."""
    with spawned(2) as executor:
        assert untimed(search(search_trials.fail_on_up, executor=executor)) == untimed(
            search(search_trials.fail_on_up)
        )
        chance = search_trials.score_by_chance
        assert untimed(search(score=chance, executor=executor)) == untimed(search(score=chance))
        with pytest.raises(IsolateError, match=r"cannot be sent to a worker \(.*pickle.*at the top level of a module"):
            search(lambda config: config, executor=executor, output=tmp_path)
    with pytest.raises(IsolateError, match=r"RuntimeError: cannot schedule new futures after shutdown.* 0 of 6"):
        search(executor=executor, output=tmp_path)
    assert not (tmp_path / "trials.jsonl").read_bytes()


def test_a_worker_that_dies_decides_nothing(tmp_path):
    """What it did not run is neither recorded nor passed over: the search ends, and started again it goes on."""
    with spawned() as executor, pytest.raises(IsolateError, match=r"a worker died.*BrokenProcessPool") as raised:
        search(search_trials.die_in_the_middle, executor=executor, output=tmp_path)
    records = [Record.of_line(line) for line in (tmp_path / "trials.jsonl").read_bytes().splitlines()]
    assert len(records) < 6
    assert not any(record.error for record in records)
    assert f"{len(records)} of 6 trials of level 'broad' are recorded in {tmp_path}" in str(raised.value)
    assert "start the search again with the same output to go on" in str(raised.value)
    assert isinstance(raised.value.__cause__, concurrent.futures.BrokenExecutor)
    counting = Counting()
    assert untimed(search(counting, output=tmp_path)) == untimed(search())
    assert len(counting.asked) == 12 - len(records)


class Losing(concurrent.futures.Executor):
    """Its own error in place of the trials of FFN; at the end of the others, as a cluster gives up late."""

    def __init__(self, error: BaseException):
        self.error = error

    def submit(self, fn, /, *args, **kwargs):
        future: concurrent.futures.Future = concurrent.futures.Future()
        lost = args[2].modules == FFN
        future.set_exception(self.error) if lost else future.set_result(fn(*args))
        return future


class KilledWorker(Exception):
    """As Dask calls it."""


@pytest.mark.parametrize(
    "error",
    [
        KilledWorker("died 4 times"), concurrent.futures.BrokenExecutor("out of memory"), SystemExit(9),
        concurrent.futures.CancelledError(), asyncio.CancelledError(), OSError("lost the node"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("output", [True, False])
def test_what_an_executor_did_not_run_is_not_recorded_and_the_rest_is(tmp_path, error, output):
    folder = tmp_path if output else None
    said = "recorded in" if output else "done; nothing is kept without output="
    with pytest.raises(IsolateError, match=rf"3 of 6 trials of level 'broad' are {said}") as raised:
        search(search_trials.fail_on_mha, executor=Losing(error), output=folder)
    assert raised.value.__cause__ is error
    if output:
        with Journal(tmp_path) as journal:
            modules = [(tuple(record.fields["modules"]), record.scores) for record in journal.records.values()]
        assert modules == [(MHA, None)] * 3, "a trial's own failure is recorded"
        counting = Counting()
        assert untimed(search(counting, output=tmp_path, retry_failed=True)) == untimed(search())
        assert len(counting.asked) == 12


def test_threads_take_turns(tmp_path):
    """The random states are the process's: in threads, too, a trial depends on its config and leaves no trace."""
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    here = search(search_trials.train_by_chance, search_trials.score_by_chance)
    with concurrent.futures.ThreadPoolExecutor(6) as executor:
        there = search(search_trials.train_by_chance, search_trials.score_by_chance, executor=executor)
    assert untimed(there) == untimed(here)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert max(trial.seconds for trial in there.trials) < 0.5, "waiting is no training"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_worker_forked_during_a_trial_is_not_stuck():
    begun, end = threading.Event(), threading.Event()

    def wait(config):
        begun.set()
        return end.wait(60)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        trial = thread.submit(run_trial, wait, score, CoFiTuneConfig())
        assert begun.wait(60)
        forked = multiprocessing.get_context("fork").Process(target=run_trial, args=(train, score, CoFiTuneConfig()))
        forked.start()
        forked.join(30)
        forked.kill()
        end.set()
        trial.result()
    assert forked.exitcode == 0


def test_an_interruption_keeps_what_other_processes_finished(tmp_path, monkeypatch):
    """And cancels what has not begun."""
    futures: list[concurrent.futures.Future] = []

    class Stuck(concurrent.futures.Executor):
        """Three finish; the first of them to be handed on meets the user's Ctrl-C, the others wait for ever."""

        def submit(self, fn, /, *args, **kwargs):
            future: concurrent.futures.Future = concurrent.futures.Future()
            futures.append(future)
            if len(futures) <= 3:
                future.set_result(fn(*args))
            return future

    calls, append = [], Journal.append

    def interrupted(self, record):
        calls.append(record)
        append(self, record)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(executor=Stuck(), output=tmp_path)
    assert [future.cancelled() for future in futures] == [False] * 3 + [True] * 3
    with Journal(tmp_path) as journal:
        assert len(journal.records) == 3


def test_an_interruption_that_reaches_the_workers_is_no_failure(tmp_path):
    """Ctrl-C goes to every process of a terminal."""

    class Interrupted(concurrent.futures.Executor):
        def submit(self, fn, /, *args, **kwargs):
            future: concurrent.futures.Future = concurrent.futures.Future()
            future.set_exception(KeyboardInterrupt())
            return future

    with pytest.raises(KeyboardInterrupt):
        search(executor=Interrupted(), output=tmp_path)
    with Journal(tmp_path) as journal:
        assert not journal.records


@pytest.mark.filterwarnings("ignore")
def test_a_dask_cluster():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert untimed(search(executor=client.get_executor())) == untimed(search())
        result = search(search_trials.fail_on_up, executor=client.get_executor(pure=False))
        assert untimed(result) == untimed(search(search_trials.fail_on_up))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_dask_cluster_of_processes_that_really_trains():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        there = search(search_trials.train_tiny, search_trials.score_tiny, executor=client.get_executor())
    here = search(search_trials.train_tiny, search_trials.score_tiny)
    assert there.path == here.path
    assert [trial.unified for trial in there.trials] == pytest.approx([trial.unified for trial in here.trials])


# -- a real run -------------------------------------------------------------------------------------------------------


def test_a_real_search_on_a_tiny_llama(tmp_path):
    """Every trial trains its own region, from the same model; the winner's config wraps and trains a model."""
    result = search(search_trials.train_tiny, search_trials.score_tiny, output=tmp_path)
    assert len(result.trials) == 12
    assert not [trial.error for trial in result.trials if trial.error]
    assert len({trial.unified for trial in result.trials}) == 12
    again = search_trials.score_tiny(search_trials.train_tiny(result.best))
    winner = result.trials[result.path[-1].chosen]
    assert again["speciality"] == pytest.approx(winner.speciality, abs=1e-6)
    # The config is used up now; what is kept of it is not.
    assert result.best.resolved is not None
    result.save(tmp_path / "result.json")
    assert SearchResult.load(tmp_path / "result.json").best.resolved is None


def test_a_range_that_selects_no_layer_fails_alone():
    """A quarter of three layers may be none of them: its trials say so, and the other quarter is chosen."""

    def train(config):
        return get_peft_model(tiny(num_hidden_layers=3), config)

    result = search(train, by(lambda model: 1.0), levels=[Level("quarters", ["first_quarter", "top"], ["FFN"])])
    assert "has no layer" in result.trials[0].error
    assert result.best.layer_range == (0.5, 1.0)


# -- the result -------------------------------------------------------------------------------------------------------


def test_the_table():
    result = search(search_trials.fail_on_up, metric=lambda scores: scores["speciality"])
    lines = str(result).splitlines()
    assert lines[0].split() == [
        "level",
        "layers",
        "modules",
        "speciality",
        "versatility",
        "unified",
        "metric",
        "seconds",
    ]
    assert len(lines) == 14
    assert lines[10].split()[:4] == ["narrow", "(0.25,", "0.5]", "FFN"]
    assert lines[10].endswith("best of narrow, modules")
    assert lines[13] == f"best      FFN in (0.25, 0.5], metric {result.trials[9].speciality:.4f}"
    numbers = [line.index("  MHA") for line in lines[1:8:2]]
    assert len(set(numbers)) == 1, "columns are aligned"
    assert result.table[9]["note"] == "best of narrow, modules"
    assert result.table[10]["unified"] is None


def test_it_says_so_where_a_wider_region_scored_higher():
    """The tree keeps the best of each level, as the paper's does, and not the best of all."""
    result = search(score=by(lambda config: config.layer_range[1] - config.layer_range[0]))
    assert result.best.layer_range == (0.0, 0.25)
    assert "(higher at an earlier level: MHA in (0, 0.5], 0.5000)" in str(result)


def test_save_and_load(tmp_path):
    result = search(search_trials.fail_on_up, config=CoFiTuneConfig(exclude_modules=["head"]))
    path = tmp_path / "new" / "result.json"
    result.save(path)
    loaded = SearchResult.load(path)
    assert loaded == result
    assert str(loaded) == str(result)
    floored = search(min_speciality=0.9, full_speciality=1.1)
    floored.save(path)
    assert SearchResult.load(path) == floored


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("old")
    result = search()
    monkeypatch.setattr(Path, "write_text", lambda self, *a, **k: self.write_bytes(b"half") and os.close(-1))
    with pytest.raises(OSError, match="Bad file"):
        result.save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_result_is_refused(tmp_path):
    path = tmp_path / "result.json"
    search(search_trials.fail_on_up).save(path)
    content = path.read_bytes()
    for size in range(0, len(content) - 1, 37):
        path.write_bytes(content[:size])
        with pytest.raises(FormatError, match=r"result\.json is no result of a search, or was damaged"):
            SearchResult.load(path)
    for damage in [
        lambda c: c.update(version=2), lambda c: c.pop("path"), lambda c: c["path"].clear(),
        lambda c: c["path"][1].update(chosen=99), lambda c: c["path"][2].update(chosen=10),  # out of range, failed
        lambda c: c["trials"][3].update(speciality="high"), lambda c: c["trials"][3].update(speciality=None),
        lambda c: c["trials"][3].update(layer_range=[8, 15]), lambda c: c["trials"][3].update(extra=1),
        lambda c: c["best"].update(layer_range=[0, 1]), lambda c: c["best"].update(rank=8),
        lambda c: c.update(floor="x"), lambda c: c.update(metric=1),
    ]:  # fmt: skip
        damaged = json.loads(content)
        damage(damaged)
        path.write_text(json.dumps(damaged))
        with pytest.raises(FormatError, match="was damaged"):
            SearchResult.load(path)
    with pytest.raises(IsolateError, match="there is no such file; pass the path of a saved result"):
        SearchResult.load(tmp_path / "nowhere.json")


def test_the_bar_shows_the_best_so_far(capsys):
    search_region(train, score)
    shown = capsys.readouterr().err
    assert "level 3 of 3: modules: 100%" in shown
    assert "12/12" in shown
    assert "best FFN in (0.25, 0.5]" in shown
    search()
    assert capsys.readouterr().err == ""


# -- the picture ------------------------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch):
    """Keeps every figure that is saved, with what was drawn in it."""
    figure = pytest.importorskip("matplotlib.figure")
    kept, save = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: kept.append(self) or save(self, *a, **k))
    return kept


def test_the_picture_has_every_node_the_path_and_both_maps(tmp_path, figures):
    result = search(search_trials.fail_on_up, min_speciality=0.9, full_speciality=1.1)
    result.plot(tmp_path / "new" / "search.png")
    assert (tmp_path / "new" / "search.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    tree, speciality, versatility = figure.axes
    assert [label.get_text() for label in tree.get_yticklabels()] == ["broad", "narrow", "modules"]
    texts = [text.get_text() for text in tree.texts]
    assert len(texts) == 6 + 4 + 4
    trial = result.trials[9]
    assert texts.count(f"FFN (0.25, 0.5]\nS {trial.speciality:.3f}   V {trial.versatility:.3f}") == 2
    assert "up (0.25, 0.5]\nfailed" in texts
    assert [text.get_text() for text in tree.texts if text.get_weight() == "bold"] == [
        texts[choice_start + choice.compared.index(choice.chosen)]
        for choice_start, choice in zip((0, 6, 10), result.path, strict=True)
    ]
    dashed = [patch for patch in tree.patches if patch.get_linestyle() in ("--", "dashed")]
    unreached = [t for choice in result.path for t in choice.compared if result.trials[t].speciality is not None]
    assert len(dashed) == sum(not is_eligible(result.trials[t], result.floor) for t in unreached) > 0
    for axes, score_name in ((speciality, "speciality"), (versatility, "versatility")):
        assert axes.get_title(loc="left") == score_name
        assert [label.get_text() for label in axes.get_xticklabels()] == ["MHA", "FFN", "up", "down"]
        assert len(axes.get_yticklabels()) == 5
        numbers = sorted(text.get_text() for text in axes.texts)
        assert numbers == sorted(f"{getattr(t, score_name):.3f}" for t in result.trials if t.error is None)
    assert any("a speculative insight" in text.get_text() for text in figure.texts)


@pytest.mark.parametrize("levels", [PAPER_LEVELS, [Level("one", [(0, 1)], ["FFN"])], [Level("wide", [(i / 20, (i + 1) / 20) for i in range(20)], ["MHA+FFN", ("gate", "o")])]])  # fmt: skip  # noqa: E501
def test_any_tree_can_be_drawn(tmp_path, levels):
    pytest.importorskip("matplotlib")
    search(levels=levels).plot(tmp_path / "search.svg")
    assert (tmp_path / "search.svg").read_bytes().startswith(b"<?xml")


def test_an_ending_that_matplotlib_does_not_write_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(IsolateError, match=r"search\.xyz': matplotlib writes no 'xyz'; use \.png"):
        search().plot(tmp_path / "new" / "search.xyz")
    assert not list(tmp_path.iterdir())


def test_drawing_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'peft_isolate\[plots\]'"):
        search().plot(tmp_path / "search.png")
