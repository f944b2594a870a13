"""Two processes are held as one is that has all rows: DDP and FSDP2, the gradient, whole trainings, resumed ones."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import load_file

from peft_isolate.errors import IsolateError
from tests.compare import assert_same
from tests.training import anchored_worker
from tests.training.anchored_runs import flat
from tests.training.distributed_worker import pair

pytestmark = pytest.mark.slow

MODULE = "tests.training.anchored_worker"
# Of the gradient's norm.
OF_ONE = 1e-6
# Of trained numbers, as in `test_distributed`: the largest are 0.0125.
OF_TRAINER = 1e-5

GRADIENTS: dict[str, dict[str, Any]] = {
    **{
        f"{mode}, {what}": {"mode": mode, "what": what}
        for mode in ("ddp", "fsdp2")
        for what in ("hft", "elements", "lora", "lora_trained", "trained", "round", "full")
    },
    "ddp, self": {"mode": "ddp", "what": "trained", "anchor": {"source": "self"}},
    "ddp, every 2": {"mode": "ddp", "what": "hft", "anchor": {"every": 2, "beta": 3}},
    "fsdp2, every 2": {"mode": "fsdp2", "what": "hft", "anchor": {"every": 2, "beta": 3}},
    "ddp, each synchronised": {
        "mode": "ddp", "what": "hft",
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    },
    **{
        f"ddp, reentrant={reentrant}": {
            "mode": "ddp", "what": "hft", "gradient_checkpointing": True, "ddp_find_unused_parameters": False,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
        for reentrant in (True, False)
    },
}  # fmt: skip
SFT = {"ddp": {"mode": "ddp", "source": "self"}, "fsdp2": {"mode": "fsdp2", "every": 2}}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{(job, its name): (results, the folder it wrote to)} of all jobs, in one pair of processes."""
    folder = tmp_path_factory.mktemp("pair")
    names = [("gradients", name) for name in GRADIENTS]
    jobs = [("gradients", case) for case in GRADIENTS.values()]
    for name, case in SFT.items():
        checkpoint = f"../{len(jobs)}/checkpoint-2"
        names += [("sft", name), ("resumed", name), ("otherwise", name)]
        more: list[dict] = [{}, {"resume": checkpoint}, {"resume": checkpoint, "beta": 2.0}]
        jobs += [("sft", case | each) for each in more]
    results = pair(jobs, folder, timeout=300, module=MODULE)
    return {name: (result, folder / str(i)) for i, (name, result) in enumerate(zip(names, results, strict=True))}


@pytest.mark.parametrize("name", GRADIENTS)
def test_two_processes_have_the_gradient_of_one(name, found, tmp_path):
    alone = anchored_worker.gradients(tmp_path, **(GRADIENTS[name] | {"mode": None, "processes": 1}))
    for result in found["gradients", name][0]:
        assert isinstance(result, dict), result
        assert result["text"] == alone["text"]
        assert result["kl"] == pytest.approx(alone["kl"], rel=1e-5)
        assert len(result["steps"]) == len(alone["steps"]) == 2
        for steps in zip(result["steps"], alone["steps"], strict=True):
            assert steps[0].keys() == steps[1].keys()
            two, one = (flat(step, sorted(step)) for step in steps)
            assert (two - one).norm() <= OF_ONE * one.norm(), (two - one).norm() / one.norm()


@pytest.mark.parametrize("name", SFT)
def test_a_training_ends_where_that_of_one_process_does(name, found, tmp_path):
    results, folder = found["sft", name]
    alone = anchored_worker.sft(tmp_path, **(SFT[name] | {"mode": None, "processes": 1}))
    assert alone[-1] > 1e-6
    for result in results:
        assert result == pytest.approx(alone, rel=1e-3)
    two, one = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path))
    assert two.keys() == one.keys()
    assert max((two[key] - one[key]).abs().max() for key in one) <= OF_TRAINER


@pytest.mark.parametrize("name", SFT)
def test_a_run_of_two_that_was_stopped_ends_with_the_same_bits(name, found):
    (result, _), folder = found["resumed", name]
    assert isinstance(result, list), result
    whole = found["sft", name][1]
    assert (whole / "checkpoint-2" / "anchor.safetensors").exists() == ("source" in SFT[name])
    assert_same(*(load_file(path / "adapter_model.safetensors") for path in (folder, whole)))


@pytest.mark.parametrize("name", SFT)
def test_both_processes_refuse_another_anchor(name, found):
    for result in found["otherwise", name][0]:
        assert isinstance(result, IsolateError), result
        assert "it had beta=1.0, and this one has beta=2.0" in str(result)
