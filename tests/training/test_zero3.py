"""DeepSpeed ZeRO-3: two processes train, by the side path, what one process trains, and save it whole.

DeepSpeed stands beside the environment: `make test-slow` installs it and runs this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_isolate import HalfFTConfig
from peft_isolate.deltas.base import fingerprint_of
from peft_isolate.errors import BaseMismatchError, IsolateError
from tests.compare import logits
from tests.models import tiny
from tests.training import distributed_worker
from tests.training.distributed_worker import BATCH, pair
from tests.training.test_distributed import adapter_files, assert_near, assert_same_bytes, share, trained_numbers

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

# Measured: 6e-6, where the largest numbers are 0.0125. The side path sums in another order, and AdamW divides by the
# gradient's own size.
NEAR = 2e-5
# Of the norm of the trained numbers, for bf16 deltas (with an fp32 copy in DeepSpeed's optimizer) over a bf16 base.
OF_BF16 = 0.15

TRAINED: dict[str, dict[str, Any]] = {
    **{what: {"what": what} for what in ("hft", "elements", "all_but", "hft_round")},
    **{f"{what}-sharded": {"what": what, "base": "base"} for what in ("hft", "elements", "all_but", "rows")},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{job: (results of both processes, the folder it wrote to)}, of one pair of processes."""
    folder = tmp_path_factory.mktemp("zero3")
    tiny().save_pretrained(folder / "base")
    tiny(seed=1).save_pretrained(folder / "another")
    jobs: dict[str, tuple[str, dict]] = {name: ("sft", case) for name, case in TRAINED.items()}
    jobs["resumed"] = ("sft", {"what": "elements", "base": "base", "resume": "../5/checkpoint-2"})
    jobs["bf16"] = ("sft", {"what": "hft", "base": "base", "bf16": True})
    jobs["not_gathering"] = ("sft", {"what": "hft", "gathers": False, "save_strategy": "no"})
    arguments = {"base": "base", "another": "another", "adapter": "4"}
    jobs["on_a_sharded_base"] = ("on_a_sharded_base", arguments)
    assert list(jobs)[4:6] == ["hft-sharded", "elements-sharded"]
    names = ("base", "another", "adapter")
    cases = [(job, {k: str(folder / v) if k in names else v for k, v in case.items()}) for job, case in jobs.values()]
    results = pair(cases, folder, timeout=400, module="tests.training.zero3_worker")
    return {name: (result, folder / str(i)) for i, (name, result) in enumerate(zip(jobs, results, strict=True))}


def alone(what: str, folder: Path) -> tuple[list[float], Path]:
    """The same run in one process: (losses, where its adapter is)."""
    if not what.endswith("_round"):
        return distributed_worker.sft(folder, None, what, batch=BATCH), folder
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.texts import sft_rows, tokenizer

    distributed_worker.reset()
    args = SFTConfig(
        output_dir=str(folder), max_steps=distributed_worker.STEPS, per_device_train_batch_size=BATCH,
        learning_rate=5e-3, weight_decay=0.1, max_length=48, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False, max_grad_norm=0.3, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=distributed_worker.build(what), args=args, train_dataset=Dataset.from_list(sft_rows(16)),
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], folder


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_train_what_one_trains(name, found, tmp_path):
    """The losses, the config with the base's fingerprint, and the numbers; positions and held numbers to the bit."""
    results, folder = found[name]
    losses, one = alone(TRAINED[name]["what"], tmp_path)
    for result in results:
        assert isinstance(result, dict), result
        assert result["losses"] == pytest.approx(losses, abs=NEAR)
        assert set(result["paths"].values()) == {"side"}
        assert result["sharded"]
        assert result["dtypes"] == {"torch.float32"}
    (saved, config), (wanted, wanted_config) = adapter_files(folder), adapter_files(one)
    path = TRAINED[name].get("base") and str(folder.parent / "base")
    assert json.loads(config) == json.loads(wanted_config) | {"base_model_name_or_path": path}
    assert_near(saved, wanted, NEAR)
    loaded, of_one = (logits(PeftModel.from_pretrained(tiny(), path)) for path in (folder, one))
    torch.testing.assert_close(loaded, of_one, rtol=0, atol=10 * NEAR)
    assert (loaded - logits(tiny())).abs().max() > 1e-3


def test_resumed_it_ends_with_the_same_bits(found):
    (result, _), folder = found["resumed"]
    assert isinstance(result, dict), result
    assert_same_bytes(adapter_files(folder)[0], adapter_files(found["elements-sharded"][1])[0])


def test_a_bf16_base_learns_in_fp32_and_is_saved_in_bf16(found):
    """TRL has the deltas in the base's dtype under ZeRO-3; DeepSpeed's optimizer keeps them in fp32."""
    (result, _), folder = found["bf16"]
    assert isinstance(result, dict), result
    assert result["dtypes"] == {"torch.bfloat16"}
    assert result["losses"][-1] < result["losses"][0]
    saved, wanted = adapter_files(folder)[0], adapter_files(found["hft"][1])[0]
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    numbers = {name: tensor.float() for name, tensor in trained_numbers(saved).items()}
    assert share(numbers, trained_numbers(wanted)) < OF_BF16


def test_it_is_saved_whole_whatever_deepspeed_was_told_about_whole_models(found):
    """stage3_gather_16bit_weights_on_model_save may be false: of an adapter the trainer gathers what it saves."""
    (result, _), folder = found["not_gathering"]
    assert isinstance(result, dict), result
    assert_near(adapter_files(folder)[0], adapter_files(found["hft"][1])[0], NEAR)


def test_what_a_sharded_base_can_and_cannot(found):
    results, _ = found["on_a_sharded_base"]
    for result in results:
        assert isinstance(result, dict), result
        assert result["fingerprint"] == fingerprint_of(tiny(), HalfFTConfig())
        assert isinstance(result["another"], BaseMismatchError), result["another"]
        for name in ("merge_adapter", "merge_and_unload", "next_round", "half_reset"):
            assert isinstance(result[name], IsolateError), (name, result[name])
            assert "sharded" in str(result[name]), name
            assert "on one device" in str(result[name]), name
        wanted = logits(PeftModel.from_pretrained(tiny(), found["hft-sharded"][1]))
        torch.testing.assert_close(result["logits"], wanted, rtol=0, atol=1e-5)
