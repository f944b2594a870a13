"""`ForgettingCallback`: what it measures, when it logs it, that it stops, and that training stays what it was."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_isolate import HalfFTConfig, next_round, plan
from peft_isolate.deltas.about.totals import totals_of
from peft_isolate.errors import IsolateError
from peft_isolate.evaluation import HeldOutLoss
from peft_isolate.training.causal import check_causal
from peft_isolate.training.watch import ForgettingCallback
from tests.compare import adapter, assert_same, bits
from tests.given import GivenConfig
from tests.learn import filled
from tests.models import CONFIGS, tiny, tokens
from tests.texts import chat_rows, dpo_rows, sft_rows, tokenizer

# Rows of three lengths, in batches of two: padding, and a smaller last batch.
OLD = [{"text": "the sun and the moon"}, {"text": "a river"}, {"text": "stones, trees, leaves and birds"}]
NEW = sft_rows(3, seed=5)
NAMES = ("forgetting/old_loss", "forgetting/rise", "forgetting/kl")


def watch(**changes: Any) -> ForgettingCallback:
    return ForgettingCallback(OLD, **({"every": 2, "kl_on": NEW, "batch_size": 2} | changes))


def sft(model: Any, options: dict, *callbacks: TrainerCallback, config: Any = None, **changes: Any) -> SFTTrainer:
    """A trainer before its run; without `config` the model as it is is trained."""
    fixed = {"max_steps": 5, "learning_rate": 1e-2, "weight_decay": 0.1, "bf16": model.dtype == torch.bfloat16}
    return SFTTrainer(
        model=model,
        args=SFTConfig(**(options | fixed | changes)),
        train_dataset=Dataset.from_list(sft_rows()),
        eval_dataset=Dataset.from_list(sft_rows(4, seed=1)) if "eval_strategy" in changes else None,
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=list(callbacks),
    )


def dpo(model: Any, options: dict, *callbacks: TrainerCallback, config: Any = None, **changes: Any) -> DPOTrainer:
    return DPOTrainer(
        model=model,
        args=DPOConfig(**(options | {"max_steps": 4, "learning_rate": 1e-2} | changes)),
        train_dataset=Dataset.from_list(dpo_rows()),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=list(callbacks),
    )


def plain(model: Any, options: dict, *callbacks: TrainerCallback, config: Any = None, **changes: Any) -> Trainer:
    names = ("output_dir", "max_steps", "learning_rate", "save_strategy", "report_to", "use_cpu", "disable_tqdm")
    given = {name: options[name] for name in names} | {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1}
    return Trainer(
        get_peft_model(model, config),
        TrainingArguments(**(given | changes)),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens(16)],
        callbacks=list(callbacks),
    )


class Recorder(TrainerCallback):
    """Where an integration that writes logs would be: in the list before whoever watches."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict, bool]] = []
        self.closed = False

    def on_log(self, args, state, control, logs=None, **rest):
        self.seen.append((state.global_step, dict(logs), self.closed))

    def on_train_end(self, args, state, control, **rest):
        self.closed = True


class Witness(TrainerCallback):
    """What training has left behind after each step, to be compared between two runs. Comes after whoever watches."""

    def __init__(self) -> None:
        self.states: list[tuple] = []

    def look(self, args, state, control, model=None, **rest):
        self.states.append(
            (
                state.global_step,
                control.should_log,
                [module.training for module in model.modules()],
                [(p.requires_grad, p.grad is None or p.grad.clone()) for p in model.parameters()],
                torch.get_rng_state(),
                random.getstate(),
                np.random.get_state(),
            )
        )

    on_train_begin = on_step_begin = on_step_end = on_epoch_end = look


def same(a: Any, b: Any) -> bool:
    """Bit by bit, in whatever they are kept."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return torch.equal(bits(a), bits(b))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def forgotten(trainer: Trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if any(name in entry for name in NAMES)]


def otherwise_logged(trainer: Trainer) -> list[dict]:
    """What was logged beside, without what a clock decides."""
    entries = [entry for entry in trainer.state.log_history if not any(name in entry for name in NAMES)]
    return [{k: v for k, v in e.items() if not k.endswith(("runtime", "per_second"))} for e in entries]


def numbers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trained_peft() -> PeftModel:
    """An adapter that was trained before, with numbers that are held."""
    model = filled(get_peft_model(tiny(), HalfFTConfig()))
    next_round(model)
    return filled(model, seed=1)


RECOMPUTED = {
    kind: {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": kind == "reentrant"}}
    for kind in ("reentrant", "not reentrant")
}
UNCHANGED: dict[str, tuple] = {
    "sft": (sft, tiny, {"config": HalfFTConfig()}),
    "sft, logged at other steps": (sft, tiny, {"config": HalfFTConfig(), "logging_steps": 3}),
    "elements": (sft, tiny, {"config": GivenConfig(kind="elements")}),
    "all but elements, accumulated": (
        sft, tiny, {"config": GivenConfig(kind="all_but"), "gradient_accumulation_steps": 3},
    ),
    "dropout": (sft, lambda: tiny("gpt2"), {"config": HalfFTConfig()}),
    "bf16": (sft, lambda: tiny(dtype=torch.bfloat16), {"config": HalfFTConfig()}),
    "bf16 autocast": (sft, tiny, {"config": HalfFTConfig(), "bf16": True}),
    "reentrant": (sft, lambda: tiny("gpt2"), {"config": HalfFTConfig()} | RECOMPUTED["reentrant"]),
    "not reentrant": (sft, tiny, {"config": HalfFTConfig()} | RECOMPUTED["not reentrant"]),
    "NEFTune": (sft, tiny, {"config": HalfFTConfig(train_embeddings="input"), "neftune_noise_alpha": 5.0}),
    "held": (sft, trained_peft, {}),
    "lora": (sft, lambda: tiny("gpt2"), {"config": LoraConfig(lora_dropout=0.1, modules_to_save=["ln_f"])}),
    "everything": (sft, lambda: tiny("gpt2"), {}),
    "dpo": (dpo, lambda: tiny("gpt2"), {"config": HalfFTConfig()}),
    "dpo from ref": (dpo, trained_peft, {}),
    "plain": (plain, lambda: tiny("gpt2"), {"config": HalfFTConfig(), "max_grad_norm": 0.3}),
}  # fmt: skip


IN_SECONDS = (
    "sft, logged at other steps",
    "all but elements, accumulated",
    "bf16 autocast",
    "reentrant",
    "dpo from ref",
)


def slow_but(cases: Iterable[str], fast: Sequence[str]) -> list[Any]:
    """The cases, most of which take too long for every day."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", slow_but(UNCHANGED, IN_SECONDS))
def test_nothing_changes_by_being_watched(case, options):
    """The same bits of every parameter, gradient, random state and log, step by step; the same modes."""
    make, model, changes = UNCHANGED[case]
    changes = {"warmup_steps": 1} | changes
    runs = []
    for callbacks in ([], [watch(tokenizer=tokenizer())]):
        torch.manual_seed(3)
        witness = Witness()
        trainer = make(model(), options, *callbacks, witness, **changes)
        trainer.train()
        runs.append((trainer, witness, numbers(trainer.model), trainer.optimizer.state_dict()))
    (alone, seen_alone, alone_ends, alone_optimizer), (watched, seen, ends, optimizer) = runs
    assert_same(ends, alone_ends)
    assert same(seen.states, seen_alone.states)
    assert same(optimizer, alone_optimizer)
    assert otherwise_logged(watched) == otherwise_logged(alone)
    assert forgotten(watched)[-1]["forgetting/kl"] > 0
    assert not forgotten(alone)


@torch.no_grad()
def twin(model: torch.nn.Module, base: torch.nn.Module, old: list[dict], new: list[dict]) -> dict[str, float]:
    """Two models, one row at a time, one token at a time, in fp64."""
    made = tokenizer()

    def each(net, row):
        prompt = row.get("prompt", "")
        ids = [*made(prompt + row.get("completion", row.get("chosen", row.get("text", ""))))["input_ids"], 2]
        logits = net.eval()(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return [(ids[i], logits[i - 1]) for i in range(max(1, len(made(prompt)["input_ids"])), len(ids))]

    losses = [[-q[token].item() for row in old for token, q in each(net, row)] for net in (model, base)]
    kls = [
        (p.exp() * (p - q)).sum().item()
        for row in new
        for (_, p), (_, q) in zip(each(base, row), each(model, row), strict=True)
    ]
    loss, of_base = (sum(values) / len(values) for values in losses)
    return dict(zip(NAMES, (loss, loss - of_base, sum(kls) / len(kls)), strict=True)) | {
        "forgetting/base_loss": of_base, "forgetting/old_tokens": len(losses[0]),
    }  # fmt: skip


def assert_logged(entry: dict, wanted: dict[str, float]) -> None:
    for name in NAMES:
        assert entry[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("old", "batch_size"), [(OLD, 2), (OLD, 1), (sft_rows(3, seed=7), 8), (dpo_rows(3, seed=7), 2)]
)
def test_the_numbers_are_the_formulas(old, batch_size, options):
    """Of rows with a prompt the completion counts, of a preference the chosen one; padding never."""
    trainer = sft(tiny(), options, ForgettingCallback(old, kl_on=NEW, batch_size=batch_size), config=HalfFTConfig())
    trainer.train()
    first, last = forgotten(trainer)
    wanted = twin(trainer.model, tiny(), old, NEW)
    assert_logged(last, wanted)
    assert last["forgetting/kl"] > 0.01
    assert abs(last["forgetting/rise"]) > 0.01
    # A fresh adapter is the base, to the bit.
    assert first["forgetting/rise"] == first["forgetting/kl"] == 0
    assert first["forgetting/base_loss"] == pytest.approx(wanted["forgetting/base_loss"], rel=1e-5)
    assert first["forgetting/old_tokens"] == wanted["forgetting/old_tokens"]


@pytest.mark.parametrize("what", slow_but(("lora", "everything", "modules_to_save"), ("everything",)))
def test_the_base_is_the_model_without_what_was_trained(what, options):
    """Adapters of other libraries are left out; where there is none, the model's own numbers are kept."""
    config = {"lora": LoraConfig(), "modules_to_save": HalfFTConfig(modules_to_save=["lm_head"])}.get(what)
    trainer = sft(tiny(), options, watch(), config=config)
    trainer.train()
    assert_logged(forgotten(trainer)[-1], twin(trainer.model, tiny(), OLD, NEW))


def test_a_trained_adapter_is_compared_with_the_base_and_not_with_its_start(options):
    """In DPO, too, where TRL holds on to the start as "ref"."""
    start = twin(trained_peft(), tiny(), OLD, NEW)
    for make in (sft, dpo):
        trainer = make(trained_peft(), options, watch())
        trainer.train()
        first, *_, last = forgotten(trainer)
        assert first["forgetting/kl"] > 1e-3
        assert_logged(first, start)
        assert_logged(last, twin(trainer.model, tiny(), OLD, NEW))
        assert last["forgetting/kl"] != pytest.approx(start["forgetting/kl"], rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"every": 2}, [0, 2, 4, 5]),
        ({"every": 5}, [0, 5]),
        ({"every": "epoch"}, [0, 3, 5]),
    ],
)
def test_it_measures_at_the_start_every_so_often_and_at_the_end(changes, steps, options):
    """Once each, to the log and to every callback that writes it, before any of them is closed."""
    recorder = Recorder()
    # Three steps an epoch.
    trainer = sft(tiny(), options, recorder, watch(**changes), per_device_train_batch_size=16)
    trainer.train()
    assert [entry["step"] for entry in forgotten(trainer)] == steps
    written = [(step, logs, closed) for step, logs, closed in recorder.seen if NAMES[0] in logs]
    assert [step for step, _, _ in written] == steps
    assert not any(closed for _, _, closed in written)
    for entry, (step, logs, _) in zip(forgotten(trainer), written, strict=True):
        assert entry == logs | {"step": step}
        assert entry["epoch"] == pytest.approx(step / 3)
        assert all(type(value) in (int, float) for value in logs.values())
    # The training's own log at the same steps is not taken for done.
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5]


class Ends(TrainerCallback):
    """Ends the training, or only each epoch, in its own way."""

    def __init__(self, event: str, what: str, step: int) -> None:
        setattr(self, event, self.end)
        self.what, self.step = what, step

    def end(self, args, state, control, **rest):
        if state.global_step % self.step == 0:
            setattr(control, self.what, True)
        return control


TWICE = {"max_steps": -1, "num_train_epochs": 2}
THEN_THE_BEST = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("ends", "changes", "steps", "closed"),
    [
        (Ends("on_step_end", "should_training_stop", 3), {}, [0, 3], False),
        (Ends("on_evaluate", "should_training_stop", 3), {"eval_strategy": "steps", "eval_steps": 3}, [0, 3], False),
        (Ends("on_step_end", "should_epoch_stop", 2), TWICE, [0, 4], True),
        (Ends("on_evaluate", "should_training_stop", 3), TWICE | THEN_THE_BEST, [0, 3], False),
        (Ends("on_step_end", "should_epoch_stop", 2), TWICE | THEN_THE_BEST, [0, 2, 4], False),
    ],
)
def test_it_measures_after_the_last_step_whoever_ends_the_training(ends, changes, steps, closed, options):
    """A callback after it in the list, an evaluation, or an epoch that was cut short; before the best is loaded."""
    recorder = Recorder()
    trainer = sft(tiny(), options, recorder, watch(every=100), ends, per_device_train_batch_size=16, **changes)
    trainer.train()
    assert [entry["step"] for entry in forgotten(trainer)] == steps
    *_, last = [was_closed for _, logs, was_closed in recorder.seen if NAMES[0] in logs]
    assert last == closed


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_of_an_end_that_is_decided_after_it_and_not_saved_it_does_not_learn(first, options):
    """What the best model forgets is never logged as what the last one does."""
    ends = Ends("on_evaluate", "should_training_stop", 6)
    callbacks = (ends, watch(every=100)) if first else (watch(every=100), ends)
    changes = TWICE | THEN_THE_BEST | {"save_strategy": "best", "metric_for_best_model": "loss"}
    changes |= {"per_device_train_batch_size": 16, "num_train_epochs": 3, "greater_is_better": True}
    trainer = sft(tiny(), options, *callbacks, **changes)
    trainer.train()
    assert (trainer.state.global_step, trainer.state.best_global_step) == (6, 3)
    trainer.evaluate()
    assert [entry["step"] for entry in forgotten(trainer)] == ([0, 6] if first else [0])


def test_the_start_says_what_will_be_trained(options, caplog):
    """As `plan` does, in numbers and in one line."""
    with caplog.at_level(logging.INFO, logger="peft_isolate.training.watch"):
        model = trained_peft()
        trainer = sft(model, options, watch(kl_on=None))
        trainer.train()
    first, *others = forgotten(trainer)
    said = plan(tiny(), model.peft_config["default"])
    assert first["forgetting/trained"] == said.trained
    assert first["forgetting/trained_share"] == said.share
    assert first["forgetting/adapter_bytes"] == said.adapter_bytes["fp32"]
    assert not any("forgetting/trained" in entry or "forgetting/kl" in entry for entry in others)
    (line,) = [record.message for record in caplog.records if record.message.startswith("watched: ")]
    assert f"trained {said.trained:,} of {said.total:,} scalars" in line
    assert f"held of earlier rounds {said.held.count:,} scalars" in line
    assert "\n" not in line


def test_totals_are_those_of_the_plan_whatever_is_trained():
    for config in (HalfFTConfig(), GivenConfig(kind="all_but"), GivenConfig(kind="rows")):
        model = get_peft_model(tiny("gpt2"), config)
        assert totals_of(model) == plan(model, config).totals
        assert str(plan(model, config)).count("\n".join(totals_of(model).lines())) == 1
    model = trained_peft()
    assert totals_of(model) == plan(model, model.peft_config["default"]).totals
    everything, factors = totals_of(tiny("gpt2")), totals_of(get_peft_model(tiny("gpt2"), LoraConfig()))
    assert everything.trained == everything.total == factors.total
    assert factors.trained == sum(
        p.numel() for p in get_peft_model(tiny("gpt2"), LoraConfig()).parameters() if p.requires_grad
    )


@pytest.mark.parametrize("budget", slow_but(("stop_at_rise", "stop_at_kl"), ("stop_at_kl",)))
def test_a_spent_budget_ends_the_training_and_saves_it(budget, options, caplog):
    """The last checkpoint is of the step where it ended; resuming there is refused until the budget is raised."""
    old = [{"text": text} for text in ("+-*/=<>()[]" * 4,)]  # of characters that the task has none of
    changes = {"save_strategy": "steps", "save_steps": 100, "max_steps": 10, "learning_rate": 3e-2}

    def run(resume=None, limit=None):
        stop = {} if limit is None else {budget: limit}
        trainer = sft(
            tiny(), options, ForgettingCallback(old, every=2, kl_on=NEW, **stop), config=HalfFTConfig(), **changes
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run()
    name = "forgetting/" + budget.removeprefix("stop_at_")
    values = {entry["step"]: entry[name] for entry in forgotten(whole)}
    most = {step: max(value for at, value in values.items() if at < step) for step in values if step > 2}
    step = next(step for step, before in most.items() if values[step] > before)
    limit = (values[step] + most[step]) / 2
    with caplog.at_level(logging.WARNING, logger="peft_isolate.training.watch"):
        stopped = run(limit=limit)
    assert stopped.state.global_step == step < 10
    (line,) = [record.message for record in caplog.records if record.name == "peft_isolate.training.watch"]
    assert line == f"training ends at step {step}: {name}={values[step]:.4g} exceeds {budget}={limit:g}"
    assert forgotten(stopped) == [entry for entry in forgotten(whole) if entry["step"] <= step]

    saved = f"{options['output_dir']}/checkpoint-{step}"
    with pytest.raises(IsolateError, match=rf"before training begins at step {step}, {name}=.*: raise that budget"):
        run(saved, limit)
    resumed = run(saved, 100.0)
    assert resumed.state.global_step == 10
    assert_same(adapter(resumed.model), adapter(whole.model))


def test_without_a_checkpoint_to_be_kept_none_is_saved(options, tmp_path):
    trainer = sft(tiny(), options, watch(stop_at_kl=0.0), config=HalfFTConfig())
    trainer.train()
    assert trainer.state.global_step == 2
    assert not list(tmp_path.rglob("checkpoint-*"))


class Diverges(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model=None, **rest):
        if state.global_step == 2:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(math.nan)


@pytest.mark.parametrize("budget", [None, "stop_at_rise"])
def test_nan_is_logged_and_spends_any_budget(budget, options):
    stop = {} if budget is None else {budget: 1e9}
    trainer = sft(tiny(), options, Diverges(), watch(every=1, **stop), config=HalfFTConfig())
    trainer.train()
    assert trainer.state.global_step == (5 if budget is None else 3)
    assert all(math.isnan(forgotten(trainer)[-1][name]) for name in NAMES)


def test_a_budget_that_is_spent_before_the_first_step_is_an_error(options):
    trainer = sft(trained_peft(), options, watch(stop_at_kl=1e-9))
    before = numbers(trainer.model)
    with pytest.raises(IsolateError, match=r"begins at step 0, forgetting/kl=\S+ exceeds stop_at_kl=1e-09: raise"):
        trainer.train()
    assert_same(numbers(trainer.model), before)


def test_a_base_that_has_no_loss_is_an_error(options):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(IsolateError, match="forgetting/base_loss=nan is not finite"):
        sft(model, options, watch(), config=HalfFTConfig()).train()


@pytest.mark.parametrize("what", slow_but(("adapter", "biases", "everything", "everything, without KL"), ("biases",)))
def test_a_resumed_run_logs_what_the_whole_one_does(what, options):
    """The rise is still over the base, not over the checkpoint; what the base gave is not logged again."""
    config = {"adapter": HalfFTConfig(), "biases": LoraConfig(bias="all")}.get(what)
    changes = {"save_strategy": "steps", "save_steps": 3}
    new = None if what.endswith("KL") else NEW

    def run(resume=None):
        trainer = sft(tiny("qwen2"), options, watch(kl_on=new), config=config, **changes)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run()
    checkpoint = f"{options['output_dir']}/checkpoint-3"
    saved = {
        step: json.loads(Path(options["output_dir"], f"checkpoint-{step}", "trainer_state.json").read_text())
        for step in (3, 5)
    }
    resumed = run(checkpoint)
    logged = {s: [e["step"] for e in state["log_history"] if NAMES[0] in e] for s, state in saved.items()}
    assert logged == {3: [0, 2], 5: [0, 2, 4, 5]}
    assert forgotten(resumed) == forgotten(whole)
    assert_same(numbers(resumed.model), numbers(whole.model))
    if config is None:
        return
    assert_logged(forgotten(resumed)[-1], twin(resumed.model, tiny("qwen2"), OLD, NEW))
    # Added later than the trainer is made: the base is at hand, unless overwritten.
    late = sft(tiny("qwen2"), options, config=config, **changes)
    late.add_callback(watch())
    if what == "biases":
        with pytest.raises(IsolateError, match="what learns outside adapters is the checkpoint's by now"):
            late.train(resume_from_checkpoint=checkpoint)
        return
    late.train(resume_from_checkpoint=checkpoint)
    assert forgotten(late) == forgotten(whole)
    # One curve is of one text and one base.
    for base, rows in ((tiny("qwen2"), NEW), (tiny("qwen2", seed=1), OLD)):
        other = sft(base, options, ForgettingCallback(rows, every=2), config=HalfFTConfig(), **changes)
        with pytest.raises(IsolateError, match=r"began with forgetting/base_loss=.* on the same old_data"):
            other.train(resume_from_checkpoint=checkpoint)


def test_a_base_that_was_overwritten_is_an_error(options):
    """Without adapters a checkpoint is loaded into the base."""
    changes = {"save_strategy": "steps", "save_steps": 3}
    again = watch(kl_on=None)
    trainer = sft(tiny(), options, again, **changes)
    trainer.train()
    before = forgotten(trainer)
    trainer.train()
    first = forgotten(trainer)[0]
    assert first["forgetting/base_loss"] == before[0]["forgetting/base_loss"]  # not that of the second run's start
    assert first["forgetting/rise"] == before[-1]["forgetting/rise"] != 0
    another = sft(trainer.model, options, max_length=28, max_steps=1)
    another.add_callback(again)
    another.train()
    assert forgotten(another)[0]["forgetting/rise"] == 0
    assert forgotten(another)[0]["forgetting/old_tokens"] < first["forgetting/old_tokens"]
    checkpoint = f"{options['output_dir']}/checkpoint-3"
    late = sft(tiny(), options, **changes)
    late.add_callback(watch())
    with pytest.raises(
        IsolateError, match=r"step 3, and what learns outside adapters.*callbacks=\[…\] when the trainer is made"
    ):
        late.train(resume_from_checkpoint=checkpoint)
    other = sft(tiny(), options, ForgettingCallback(OLD[:2]), **changes)
    with pytest.raises(
        IsolateError, match=r"log has no forgetting/base_loss over \d+ tokens: watch it on the old_data"
    ):
        other.train(resume_from_checkpoint=checkpoint)


@pytest.mark.slow
def test_one_callback_watches_one_trainer_after_the_other(options):
    """A second run of the same trainer, too: the base is still the base."""
    again = watch(every=100)
    for architecture, config in (("llama", None), ("llama", HalfFTConfig()), ("gpt2", None)):
        trainer = sft(tiny(architecture), options, again, config=config)
        for _ in range(2):
            trainer.train()
            assert_logged(forgotten(trainer)[-1], twin(trainer.model, tiny(architecture), OLD, NEW))
        assert forgotten(trainer)[0]["forgetting/kl"] > 0.01


def test_long_rows_lose_their_end_as_in_training_and_only_the_first_are_read(options):
    """`max_length` of the trainer's arguments, unless another is given; `max_rows` of both."""
    rows = [{"text": "a" * 40}, {"text": "b" * 7}, {"text": "c" * 40}]
    for given, tokens_scored in (({}, 30 + 7), ({"max_length": 12}, 11 + 7), ({"max_rows": 1}, 30)):
        trainer = sft(
            tiny(), options, ForgettingCallback(rows, **given), config=HalfFTConfig(), max_length=31, max_steps=1
        )
        trainer.train()
        third = 0 if "max_rows" in given else tokens_scored - 7
        assert forgotten(trainer)[0]["forgetting/old_tokens"] == tokens_scored + third


def test_no_row_is_longer_than_the_model_has_positions(options):
    """The plain Trainer has no `max_length`; nor does a larger one help."""
    for given in ({}, {"max_length": 500}):
        callback = ForgettingCallback([{"text": "a" * 200}], tokenizer=tokenizer(), **given)
        trainer = plain(tiny("gpt2"), options, callback, config=HalfFTConfig(), max_steps=1)
        trainer.train()
        assert forgotten(trainer)[0]["forgetting/old_tokens"] == 63


@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")
def test_where_training_cuts_off_the_beginning_so_does_it(options):
    callback = ForgettingCallback([{"text": "ab" * 20 + "the end"}])
    changes = {"truncation_mode": "keep_end", "max_length": 8, "max_steps": 1}
    trainer = sft(tiny(), options, callback, config=HalfFTConfig(), **changes)
    trainer.train()
    wanted = -HeldOutLoss([{"text": "the end"}], tokenizer())(tiny())
    assert forgotten(trainer)[0]["forgetting/old_loss"] == wanted


def test_rows_come_from_files_and_conversations_and_the_tokenizer_from_a_folder(options, tmp_path):
    """The plain Trainer has no tokenizer of its own."""
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(3)))
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    callback = ForgettingCallback(
        str(tmp_path / "old.jsonl"), kl_on=Dataset.from_list(NEW), tokenizer=tmp_path / "tokenizer"
    )
    trainer = plain(tiny(), options, callback, config=HalfFTConfig())
    trainer.train()
    last = forgotten(trainer)[-1]
    assert last["forgetting/old_loss"] == -HeldOutLoss(chat_rows(3), tokenizer())(trainer.model)
    assert last["forgetting/kl"] > 0


def test_a_processor_brings_its_tokenizer(options):
    """A vision-language trainer's processing class is no tokenizer, but has one."""
    trainer = plain(tiny(), options, config=HalfFTConfig())
    trainer.callback_handler.processing_class = SimpleNamespace(tokenizer=tokenizer())
    trainer.add_callback(watch())
    trainer.train()
    assert forgotten(trainer)


def test_what_a_measurement_costs(options):
    """A forward a batch of the old text, two of the new; and the base's loss once."""
    model = tiny()
    calls = []
    model.model.layers[0].register_forward_hook(lambda module, *_: calls.append(module.training))
    trainer = sft(model, options, watch(every=100), config=HalfFTConfig())
    trainer.train()
    # Two batches of each; the base's, the start's and the end's.
    assert calls.count(False) == 2 + 2 * (2 + 2 * 2)
    assert calls.count(True) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, r'every=0: use a whole number of optimizer steps from 1 on, or "epoch"'),
        ({"every": True}, "every=True"),
        ({"every": 2.0}, r"every=2\.0"),
        ({"every": "step"}, "every='step'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_rows": -1}, "max_rows=-1"),
        ({"stop_at_rise": math.nan}, "stop_at_rise=nan: use a finite number of nats from 0 on, or None"),
        ({"stop_at_rise": True}, "stop_at_rise=True"),
        ({"stop_at_rise": 10**400}, "stop_at_rise=10"),
        ({"stop_at_kl": -0.1}, r"stop_at_kl=-0\.1"),
        ({"stop_at_kl": "1"}, "stop_at_kl='1'"),
        ({"stop_at_kl": 1.0, "kl_on": None}, r"stop_at_kl=1\.0 without rows to measure the KL on: pass kl_on"),
        ({"kl_on": []}, "the data has no rows"),
        ({"kl_on": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
        ({"old_data": None}, "None has no rows: pass a JSONL file, or an iterable"),
        ({"kl_on": 5}, "5 has no rows"),
        ({"tokenizer": 5}, "tokenizer=5 is none: pass the model's"),
        ({"tokenizer": "no/such/folder"}, r"no tokenizer can be loaded from 'no/such/folder' \(.*: pass a folder"),
    ],
)
def test_bad_arguments_are_errors_at_once(arguments, message):
    with pytest.raises(IsolateError, match=message):
        ForgettingCallback(**({"old_data": OLD, "kl_on": NEW} | arguments))


def test_what_the_trainer_cannot_be_watched_with_is_an_error_when_it_is_made(options):
    with pytest.raises(IsolateError, match=r"kl_on: row 0 has the fields \['question'\]: it needs"):
        sft(tiny(), options, watch(kl_on=[{"question": "a"}]))
    with pytest.raises(IsolateError, match="old_data: no token of 3 rows counts"):
        sft(tiny(), options, watch(max_length=1))
    with pytest.raises(IsolateError, match=r"processing class is NoneType, no tokenizer: pass .*tokenizer="):
        plain(tiny(), options, watch(), config=HalfFTConfig())
    for architecture, reason in (("t5", "is an encoder–decoder"), ("bert", "does not predict the next token")):
        with pytest.raises(IsolateError, match=rf"{reason}.*: only causal language models can be watched"):
            plain(tiny(architecture), options, watch(tokenizer=tokenizer()), config=HalfFTConfig())


def test_models_that_predict_the_next_token_are_told_from_others():
    """By the tasks of transformers' classes; a class of another library may do as it likes."""

    class Own(torch.nn.Module):
        config = tiny("gpt2").config

    bert = tiny("bert").config
    bert.is_decoder = True
    for model in [
        Own(),
        AutoModelForCausalLM.from_config(bert),
        *(tiny(a) for a in CONFIGS if a not in ("t5", "bert")),
    ]:
        check_causal(model)
    check_causal(get_peft_model(tiny(), HalfFTConfig()))
    bert.is_decoder = False
    config = tiny("qwen2").config
    for other, reason in (
        (AutoModelForCausalLM.from_config(bert), "BertLMHeadModel has is_decoder=False"),
        (AutoModelForSequenceClassification.from_config(config), "Qwen2ForSequenceClassification does not predict"),
        (AutoModelForTokenClassification.from_config(config), "Qwen2ForTokenClassification does not predict"),
        (tiny().model, "LlamaModel does not predict"),
    ):
        with pytest.raises(IsolateError, match=reason):
            check_causal(other)


def test_a_merged_adapter_is_an_error_before_the_first_step(options):
    model = get_peft_model(tiny(), HalfFTConfig())
    trainer = sft(model, options, watch())
    model.merge_adapter()
    with pytest.raises(IsolateError, match="is merged into"):
        trainer.train()


class Unfreezes(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, model=None, **rest):
        if state.global_step == self.step:
            model.base_model.model.lm_head.requires_grad_(True)


def test_what_learns_only_later_is_an_error_and_not_a_wrong_number(options):
    """What it was before is not kept."""
    trainer = sft(tiny(), options, Unfreezes(1), watch(), config=HalfFTConfig())
    message = r"'base_model\.model\.lm_head\.weight' learns, and did not when the trainer was made"
    for step in (1, 0):
        with pytest.raises(IsolateError, match=message):
            trainer.train()
        assert trainer.state.global_step == 2 * step
        assert len(forgotten(trainer)) == step


def test_nobody_to_log_to_is_an_error(options):
    callback = watch(tokenizer=tokenizer())
    trainer = sft(tiny(), options, config=HalfFTConfig())
    with pytest.raises(IsolateError, match=r"no Trainer called .*callbacks=\[…\]"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, trainer.model)
