"""Rounds under TRL's trainers: the second half learns by SFT or DPO, what the first learned stays; and KTO, GRPO, RLOO
and reward modelling, one step each.
"""

from __future__ import annotations

import math
import os
import warnings

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification, Trainer
from trl.trainer.utils import use_adapter

from peft_isolate import HalfFTConfig, next_round
from peft_isolate.deltas.adapters import regions_of
from tests.compare import adapter, assert_same, base, logits
from tests.given import GivenConfig
from tests.learn import filled, held, learn, learning
from tests.models import CONFIGS, tiny, tokens
from tests.texts import dpo_rows, sft_rows, tokenizer
from tests.training.test_dpo import dpo, first_loss

DTYPES = (torch.float32, torch.bfloat16)


def second_round(dtype: torch.dtype = torch.float32, seed: int = 1) -> PeftModel:
    """A model with something held and something new: as after SFT, `next_round` and a few steps."""
    model = learn(get_peft_model(tiny(dtype=dtype), HalfFTConfig()))
    next_round(model)
    return learn(model, seed=seed)


def sft(model: PeftModel, options: dict, resume: str | None = None, **changes) -> trl.SFTTrainer:
    """A trainer of a model that is wrapped already, after its run."""
    fixed = {"bf16": model.dtype == torch.bfloat16, "weight_decay": 0.5, "max_grad_norm": 0.5, "learning_rate": 1e-2}
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**(options | fixed | changes)),
        train_dataset=Dataset.from_list(sft_rows()),
        eval_dataset=Dataset.from_list(sft_rows(8, seed=1)),
        processing_class=tokenizer(),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stopped_second_round_ends_with_the_same_bits(dtype, options):
    """Resumed on a model in the same round but with other numbers, also held ones: all come from the checkpoint."""
    run = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4}
    start = second_round(dtype)
    kept, untouched, first = held(start), base(start), options["output_dir"]
    whole = sft(start, options, **run)
    ended = adapter(whole.model)
    assert_same(held(whole.model), kept)
    assert_same(base(whole.model), untouched)
    other = filled(second_round(dtype, seed=5), seed=9)
    again = options | {"output_dir": f"{first}-again"}
    resumed = sft(other, again, f"{first}/checkpoint-4", **run)
    assert not os.path.exists(f"{first}-again/checkpoint-4")
    assert_same(adapter(resumed.model), ended)
    states = [torch.load(f"{folder}/checkpoint-9/optimizer.pt")["state"] for folder in (first, f"{first}-again")]
    for index, state in states[0].items():
        assert_same(states[1][index], state)


def test_the_best_checkpoint_comes_back_with_what_is_held(options):
    """ "Best" by the highest loss, so that the best is not the last."""
    model = second_round()
    kept = held(model)
    trainer = sft(
        model, options, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    best, last = (load_file(f"{options['output_dir']}/checkpoint-{step}/adapter_model.safetensors") for step in (4, 8))
    assert os.path.samefile(trainer.state.best_model_checkpoint, f"{options['output_dir']}/checkpoint-4")
    assert_same(adapter(trainer.model), best)
    assert_same(held(trainer.model), kept)
    assert not all(torch.equal(best[name], last[name]) for name in last)
    assert not any(name.endswith(".held") for name in learning(trainer.model))


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sft_then_another_half_by_dpo(dtype, from_file, options, tmp_path):
    """The paper's two stages, without a rounded base in between: DPO's reference is the SFT policy, bit for bit."""
    model = sft(get_peft_model(tiny(dtype=dtype), HalfFTConfig()), options).model
    first = regions_of(model, "default")[0]
    policy = logits(model)
    second = next_round(model)
    assert torch.equal(logits(model), policy)
    if from_file:
        model.save_pretrained(tmp_path / "sft")
        model = PeftModel.from_pretrained(tiny(dtype=dtype), tmp_path / "sft", is_trainable=True)
    start, kept, untouched = adapter(model), held(model), base(model)
    trainer = dpo(model, options, disable_dropout=True)

    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
    assert trainer.state.log_history[8]["loss"] < 0.68
    assert_same(adapter(trainer.model, "ref"), start)
    with use_adapter(trainer.model, "ref"):
        assert torch.equal(logits(trainer.model), policy)
    for name in ("default", "ref"):
        assert_same(held(trainer.model, name), kept)
    assert_same(base(trainer.model), untouched)
    trained = {name: numbers for name, numbers in adapter(trainer.model).items() if name.endswith(".delta")}
    assert not any(torch.equal(numbers, start[name]) for name, numbers in trained.items())
    assert regions_of(trainer.model, "default") == regions_of(trainer.model, "ref") == (second, first - second)

    aligned = logits(trainer.model)
    trainer.save_model()
    folder = options["output_dir"]
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(dtype=dtype), folder)), aligned)
    assert torch.equal(logits(trainer.model.merge_and_unload()), aligned)


def kto_rows() -> list[dict]:
    rows = dpo_rows(16)
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, row in enumerate(rows)
    ]


def distinct(completions: list[str], **_) -> list[float]:
    """A reward that differs between completions."""
    return [float(len(set(completion))) for completion in completions]


GENERATING = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}
TRAINERS = {
    "KTO": (kto_rows, {}, {}),
    "GRPO": (lambda: [{"prompt": row["prompt"]} for row in sft_rows(8)], GENERATING, {"reward_funcs": distinct}),
    "RLOO": (lambda: [{"prompt": row["prompt"]} for row in sft_rows(8)], GENERATING, {"reward_funcs": distinct}),
}


def one_step(kind: str, model: torch.nn.Module, options: dict, config=None) -> Trainer:
    """One step of a trainer of TRL's."""
    rows, arguments, more = TRAINERS[kind]
    common = {name: value for name, value in options.items() if name != "max_length" or kind == "KTO"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # KTO is experimental
        trainer_class, config_class = (getattr(trl, kind + part) for part in ("Trainer", "Config"))
        trainer = trainer_class(
            model=model,
            args=config_class(**(common | arguments | {"max_steps": 1, "weight_decay": 0.5, "learning_rate": 1e-2})),
            train_dataset=Dataset.from_list(rows()),
            processing_class=tokenizer(),
            peft_config=config,
            **more,
        )
        trainer.train()
    return trainer


@pytest.mark.parametrize("config", [HalfFTConfig, GivenConfig])
@pytest.mark.parametrize("kind", TRAINERS)
def test_one_step_with_a_new_adapter(kind, config, options):
    """The region learns, the base does not; the reference is the base, from which the policy has not moved yet."""
    untouched = dict(tiny().named_parameters())
    trainer = one_step(kind, tiny(), options, config())
    assert_same(base(trainer.model), untouched)
    assert any(numbers.any() for numbers in adapter(trainer.model).values())
    first = trainer.state.log_history[0]
    assert first["grad_norm"] > 0
    assert first.get("kl", 0.0) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", TRAINERS)
def test_one_step_of_the_second_round(kind, options):
    """Given a trained PeftModel, TRL makes "ref" from it: the policy as it was, what is held included."""
    model = second_round()
    start, kept, policy = adapter(model), held(model), logits(model)
    trainer = one_step(kind, model, options)
    assert_same(base(trainer.model), dict(tiny().named_parameters()))
    first = trainer.state.log_history[0]
    assert first["grad_norm"] > 0
    assert first.get("kl", 0.0) == pytest.approx(0.0, abs=1e-6)
    assert_same(adapter(trainer.model, "ref"), start)
    with use_adapter(trainer.model, "ref"):
        assert torch.equal(logits(trainer.model), policy)
    assert_same(held(trainer.model), kept)
    assert any(not torch.equal(numbers, start[name]) for name, numbers in adapter(trainer.model).items())


def classifier() -> LlamaForSequenceClassification:
    """A reward model; its head is always the same one."""
    torch.manual_seed(0)
    return LlamaForSequenceClassification(CONFIGS["llama"](num_labels=1)).eval()


def rewarded(options: dict, model: torch.nn.Module, config=None) -> trl.RewardTrainer:
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(**(options | {"max_steps": 2, "learning_rate": 1e-2, "weight_decay": 0.5})),
        train_dataset=Dataset.from_list(dpo_rows(16)),
        processing_class=tokenizer(),
        peft_config=config,
    )
    trainer.train()
    return trainer


@torch.no_grad()
def scores(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(tokens()).logits


@pytest.mark.parametrize("config", [HalfFTConfig, GivenConfig])
def test_a_reward_model_keeps_its_head(config, options):
    """With the task the new head trains and is saved, as with any PEFT method; also through another round."""
    start = classifier()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stays as it is and is not saved.*")
        trainer = rewarded(options, start, config(task_type="SEQ_CLS"))
    head = trainer.model.get_base_model().score
    assert torch.equal(head.original_module.weight, classifier().score.weight)
    assert not torch.equal(head.modules_to_save["default"].weight, classifier().score.weight)
    trainer.save_model()
    folder = options["output_dir"]
    assert sum("score" in name for name in load_file(f"{folder}/adapter_model.safetensors")) == 1
    loaded = PeftModel.from_pretrained(classifier(), folder, is_trainable=True)
    assert torch.equal(scores(loaded), scores(trainer.model))
    if config is HalfFTConfig:
        expected = scores(loaded)
        next_round(loaded)
        assert torch.equal(scores(loaded), expected)
        kept = held(loaded)
        again = rewarded(options | {"output_dir": f"{folder}-again"}, loaded)
        assert_same(held(again.model), kept)
        trained = again.model.get_base_model().score.modules_to_save["default"].weight
        assert not torch.equal(trained, head.modules_to_save["default"].weight)
        again.save_model()
        assert torch.equal(scores(PeftModel.from_pretrained(classifier(), f"{folder}-again")), scores(again.model))


def test_a_reward_model_without_its_task_is_warned_about(options):
    """Its random head would stay random, and not be saved."""
    with pytest.warns(UserWarning, match=r"the head 'score' stays as it is and is not saved: .*SEQ_CLS"):
        trainer = rewarded(options, classifier(), HalfFTConfig())
    assert torch.equal(trainer.model.get_base_model().score.weight, classifier().score.weight)
