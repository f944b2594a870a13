"""Core isolation under TRL's trainers: stages around growing cores, by SFT and then DPO."""

from __future__ import annotations

import math

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel

from peft_isolate import CoreIsolationConfig, merge, next_stage
from tests.compare import assert_same, base, bits, logits
from tests.learn import dense, held
from tests.methods.test_core_isolation import some
from tests.models import tiny
from tests.texts import dpo_rows, sft_rows, tokenizer
from tests.training.test_dpo import dpo, first_loss

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take")


def sft(model, options: dict, seed: int = 0, **changes) -> trl.SFTTrainer:
    """Weight decay, clipping and accumulation, as they leak through gradient masks."""
    fixed = {"weight_decay": 0.5, "max_grad_norm": 0.5, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**(options | fixed)),
        train_dataset=Dataset.from_list(sft_rows(seed=seed)),
        processing_class=tokenizer(),
        **changes,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_by_sft_and_dpo(dtype, options, tmp_path):
    """A probe-like first stage, a second one around a core, a third by DPO around two; what is frozen keeps its bits,
    the file carries all, and merged from files it is the same model.
    """
    model = tiny(dtype=dtype)
    model.save_pretrained(tmp_path / "base")
    first, second = some(model, 0.05, seed=1), some(model, 0.05, seed=2)
    options |= {"bf16": dtype == torch.bfloat16}
    wrapped = sft(model, options, peft_config=CoreIsolationConfig(frozen=first, task_type="CAUSAL_LM")).model
    untouched, numbers = base(wrapped), dense(wrapped)
    next_stage(wrapped, frozen=[first, second])
    wrapped = sft(wrapped, options, seed=1).model
    for name, region in (first | second).items():
        assert torch.equal(dense(wrapped)[name][region.mask()], numbers[name][region.mask()]), name
    kept = held(wrapped)
    trainer = dpo(wrapped, options)
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
    assert_same(held(trainer.model), kept)
    assert_same(base(trainer.model), untouched)
    trainer.model.delete_adapter("ref")
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny(dtype=dtype), tmp_path / "adapter")
    assert_same(dense(loaded), dense(trainer.model))
    merge(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged", dtype=dtype)
    assert torch.equal(bits(logits(merged)), bits(logits(loaded)))
    for name, region in first.items():
        mask = region.mask()
        assert torch.equal(bits(merged.get_parameter(name))[mask], bits(untouched[name])[mask]), name


def test_a_dpo_stage_from_a_config(options):
    """`peft_config=` on a plain base, around a core and on a core alone: the reference is the base."""
    core = some(tiny(), 0.1)
    for config in (CoreIsolationConfig(frozen=core), CoreIsolationConfig(train="core", core=core)):
        trainer = trl.DPOTrainer(
            model=tiny(),
            args=trl.DPOConfig(**(options | {"max_steps": 3, "logging_steps": 1})),
            train_dataset=Dataset.from_list(dpo_rows()),
            processing_class=tokenizer(),
            peft_config=config,
        )
        trainer.train()
        assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
        assert any(numbers.any() for numbers in dense(trainer.model).values())
