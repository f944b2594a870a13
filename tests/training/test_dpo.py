"""`DPOTrainer`: where its reference comes from, that it stays, and that only the region learns."""

from __future__ import annotations

import math
import os

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import use_adapter

from peft_isolate import HalfFTConfig, plan
from tests.compare import adapter, assert_same, base, bits, logits
from tests.models import tiny
from tests.texts import dpo_rows, sft_rows, tokenizer

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def sft(options):
    """Make a PeftModel that SFT has trained, with the same bits each time."""

    def make(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> PeftModel:
        trainer = SFTTrainer(
            model=tiny(architecture, dtype),
            args=SFTConfig(**(options | {"bf16": dtype == torch.bfloat16, "learning_rate": 1e-2})),
            train_dataset=Dataset.from_list(sft_rows()),
            processing_class=tokenizer(),
            peft_config=HalfFTConfig(),
        )
        trainer.train()
        trainer.save_model()
        # As a user comes to DPO: from the file, on a fresh base.
        return PeftModel.from_pretrained(tiny(architecture, dtype), options["output_dir"], is_trainable=True)

    return make


def dpo(model, options: dict, config=None, resume: str | None = None, **changes) -> DPOTrainer:
    """A trainer after its run of ten steps."""
    fixed = {"max_steps": 10, "learning_rate": 1e-2, "weight_decay": 0.1, "bf16": model.dtype == torch.bfloat16}
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**(options | fixed | changes)),
        train_dataset=Dataset.from_list(dpo_rows()),
        processing_class=tokenizer(),
        peft_config=config,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def first_loss(trainer: DPOTrainer) -> float:
    return trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_a_new_adapter_is_compared_with_its_base(architecture, dtype, options):
    untouched = dict(tiny(architecture, dtype).named_parameters())
    before = logits(tiny(architecture, dtype))
    # GPT-2's dropout would differ between policy and reference.
    model = tiny(architecture, dtype)
    trainer = dpo(model, options, HalfFTConfig(), disable_dropout=True)
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
    assert trainer.state.log_history[8]["loss"] < 0.68
    assert all(delta.any() for delta in adapter(trainer.model).values())
    assert_same(base(trainer.model), untouched)
    with use_adapter(trainer.model, None):
        assert torch.equal(logits(trainer.model), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_a_trained_adapter_is_compared_with_itself(architecture, dtype, options, sft):
    """TRL adds "ref" from the same config and copies the parameters whose name has ".default." in it."""
    model = sft(architecture, dtype)
    start, policy = adapter(model), logits(model)
    assert not torch.equal(policy, logits(tiny(architecture, dtype)))
    trainer = dpo(model, options, disable_dropout=True)

    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
    assert trainer.state.log_history[8]["loss"] < 0.68
    assert_same(adapter(trainer.model, "ref"), start)
    with use_adapter(trainer.model, "ref"):
        assert torch.equal(logits(trainer.model), policy)
    assert not torch.equal(logits(trainer.model), policy)
    moved = adapter(trainer.model)
    assert not any(torch.equal(moved[name], start[name]) for name in start)
    assert_same(base(trainer.model), dict(tiny(architecture, dtype).named_parameters()))
    assert [name for name, p in trainer.model.named_parameters() if p.requires_grad and ".default." not in name] == []


def test_the_merged_model_trains_another_half(options, sft):
    """The second round of HFT: what SFT taught the first half is the base of the second."""
    first = plan(tiny(), HalfFTConfig()).region
    merged = sft().merge_and_unload()
    start = {name: p.detach().clone() for name, p in merged.named_parameters()}
    second = plan(merged, HalfFTConfig(round_index=1)).region
    assert 0 < first.jaccard(second) < 0.7
    before = logits(merged)
    trainer = dpo(merged, options, HalfFTConfig(round_index=1))

    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
    assert_same(base(trainer.model), start)
    with use_adapter(trainer.model, None):
        assert torch.equal(logits(trainer.model), before)
    aligned = logits(trainer.model)
    final = trainer.model.merge_and_unload()
    assert torch.equal(logits(final), aligned)
    for name, weight in final.named_parameters():
        same = bits(weight.detach()) == bits(start[name])
        assert same.all() if name not in second else same[~second[name].mask()].all(), name


@pytest.mark.parametrize("fresh", [True, False])
def test_a_run_that_was_stopped_ends_with_the_same_bits(fresh, options, sft):
    """With a new adapter, and with a trained one: then the reference comes from the checkpoint, too."""

    def start():
        return (tiny(), HalfFTConfig()) if fresh else (sft(), None)

    first = options["output_dir"] + "-first"
    run = {"save_strategy": "steps", "save_steps": 4}
    model, config = start()
    whole = dpo(model, options | {"output_dir": first}, config, **run)
    model, config = start()
    again = options | {"output_dir": options["output_dir"] + "-again"}
    resumed = dpo(model, again, config, f"{first}/checkpoint-4", **run)
    assert not os.path.exists(f"{again['output_dir']}/checkpoint-4")
    for name in ("default",) if fresh else ("default", "ref"):
        assert_same(adapter(resumed.model, name), adapter(whole.model, name))
    states = [torch.load(f"{folder}/checkpoint-10/optimizer.pt")["state"] for folder in (first, again["output_dir"])]
    for index, state in states[0].items():
        assert_same(states[1][index], state)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_trains_the_same_bits(use_reentrant, options, sft):
    plain = dpo(sft(), options)
    recomputed = dpo(
        sft(), options, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    assert_same(adapter(recomputed.model), adapter(plain.model))
    assert_same(adapter(recomputed.model, "ref"), adapter(plain.model, "ref"))


def test_the_head_is_refused_with_a_warning_that_says_what_to_do(options):
    with pytest.warns(UserWarning, match="train_embeddings='input'"), pytest.raises(ValueError, match="lm_head"):
        dpo(tiny(), options, HalfFTConfig(train_embeddings=True))


def test_a_model_wrapped_by_hand_starts_like_one_the_trainer_wraps(options):
    """A fresh adapter is zero, so its copy "ref" is the base."""
    wrapped = dpo(get_peft_model(tiny(), HalfFTConfig()), options)
    by_trainer = dpo(tiny(), options, HalfFTConfig())
    assert first_loss(wrapped) == pytest.approx(math.log(2), abs=1e-4)
    assert_same(adapter(wrapped.model), adapter(by_trainer.model))
    assert not any(delta.any() for delta in adapter(wrapped.model, "ref").values())
