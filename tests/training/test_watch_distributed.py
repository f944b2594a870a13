"""Two processes that watch a training, by DDP and by FSDP2: each measures a share of the rows, and both know all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft_isolate.training.watch import ForgettingCallback
from tests.compare import assert_same
from tests.training.distributed_worker import BATCH, pair
from tests.training.test_distributed import OF_TRAINER
from tests.training.test_watch import NAMES, NEW, OLD
from tests.training.watch_worker import watched

MODES = ("ddp", "fsdp2")
# Three batches for two processes; then one batch, of which the second process has nothing.
BATCHES = {"three batches": 1, "one batch": 8}
CASES = [
    (mode, what, rows)
    for mode in MODES
    for what, rows in (("hft", "three batches"), ("hft", "one batch"), ("elements", "three batches"),
                       ("everything", "three batches"))
]  # fmt: skip


def watch(rows: str = "three batches", **changes) -> ForgettingCallback:
    return ForgettingCallback(OLD, **({"every": 3, "kl_on": NEW, "batch_size": BATCHES[rows]} | changes))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{job: (what both processes found, the folder it wrote to)}, in one pair of processes."""
    folder = tmp_path_factory.mktemp("pair")
    jobs: dict[Any, dict] = {}
    for mode, what, rows in CASES:
        jobs[mode, what, "alone"] = {"mode": mode, "what": what, "callback": None}
        jobs[mode, what, rows] = {"mode": mode, "what": what, "callback": watch(rows)}
    for mode in MODES:
        stops = watch(every=1, stop_at_kl=1e-5)
        jobs[mode, "hft", "stops"] = {"mode": mode, "what": "hft", "callback": stops}
        resume = {"resume": f"../{list(jobs).index((mode, 'elements', 'alone'))}/checkpoint-2"}
        jobs[mode, "elements", "resumed"] = {"mode": mode, "what": "elements", "callback": watch()} | resume
    results = pair([("watched", job) for job in jobs.values()], folder, 400, "tests.training.watch_worker")
    for result in results:
        assert all(isinstance(each, dict) for each in result), result
    return {name: (result, folder / str(i)) for i, (name, result) in enumerate(zip(jobs, results, strict=True))}


def ended(folder: Path, what: str) -> dict[str, torch.Tensor]:
    return load_file(folder / ("model.safetensors" if what == "everything" else "adapter_model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "what", "rows"), CASES)
def test_two_processes_log_what_one_does_and_train_as_if_alone(mode, what, rows, found, tmp_path):
    (first, second), folder = found[mode, what, rows]
    assert first == second
    (unwatched, _), unwatched_folder = found[mode, what, "alone"]
    assert first["losses"] == unwatched["losses"]
    assert not unwatched["else"]
    assert_same(ended(folder, what), ended(unwatched_folder, what))

    one = watched(tmp_path, watch(rows), mode=None, what=what, batch=BATCH)
    assert [entry["step"] for entry in first["else"]] == [entry["step"] for entry in one["else"]] == [0, 3, 4]
    # What two processes sum is the same; what they have trained is, nearly.
    assert first["else"][0] == one["else"][0]
    for entry, wanted in zip(first["else"], one["else"], strict=True):
        assert entry == pytest.approx(wanted, abs=10 * OF_TRAINER)
    assert {"forgetting/trained", "forgetting/base_loss"} <= first["else"][0].keys()
    assert NAMES[2] in first["else"][2]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_both_processes_stop_at_the_same_step(mode, found):
    results, folder = found[mode, "hft", "stops"]
    assert [result["steps"] for result in results] == [1, 1]
    assert (folder / "checkpoint-1").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_after_a_resume_the_base_is_still_the_base(mode, found):
    """Of a run that was not watched before: what it logs from then on is what the whole one logged."""
    results, folder = found[mode, "elements", "resumed"]
    (whole, _), whole_folder = found[mode, "elements", "three batches"]
    for result in results:
        assert result["else"] == whole["else"][1:]
    assert_same(ended(folder, "elements"), ended(whole_folder, "elements"))
