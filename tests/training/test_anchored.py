"""`Anchored`: the gradient is the formula's in every setting, and nothing else of the training changes.

The formula's gradient is computed by a slow twin: the trainer without an anchor gives that of L_new, and a second
model, one row and one position at a time with whole logits in fp64, that of the KL.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer
from trl import DPOTrainer, SFTConfig, SFTTrainer

from peft_isolate import HalfFTConfig
from peft_isolate.deltas.reference import Reference
from peft_isolate.errors import IsolateError
from peft_isolate.evaluation.divergence import divergence
from peft_isolate.training.anchor import AnchorConfig, AnchoredSFTTrainer, anchor_text
from tests.compare import adapter, assert_same
from tests.models import CONFIGS, tiny
from tests.texts import sft_rows, tokenizer
from tests.training.anchored_runs import (
    AnchoredTrainer,
    adapted,
    all_but_slow,
    arguments,
    config,
    flat,
    gradients,
    kl_gradient,
    logged,
    moved,
    of_tokens,
    trained,
    trainers,
)  # fmt: skip

# Of the gradient's norm, in fp32; and in bf16 autocast, which the twin does not have for the KL.
OF_TWIN, OF_AUTOCAST = 1e-6, 1e-2


def checkpointing(use_reentrant: bool) -> dict[str, Any]:
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}


def assert_total(found, plain, of_kl, weight: float, tolerance: float) -> None:
    """found = plain + weight · of_kl, and the second is not lost in the first."""
    assert found.keys() == plain.keys() == of_kl.keys()
    names = sorted(found)
    total, new, kl = (flat(each, names) for each in (found, plain, of_kl))
    wanted = new + weight * kl
    assert weight * kl.norm() > 0.01 * new.norm()
    assert (total - wanted).norm() <= tolerance * wanted.norm(), (total - wanted).norm() / wanted.norm()


CASES: dict[str, dict[str, Any]] = {
    **{what: {"what": what} for what in ("hft", "elements", "all_but", "masked", "lora", "lora_trained", "round")},
    "full": {"what": "full"},
    "saved_head": {"what": "saved_head"},
    # Six micro-batches an epoch: four, then two.
    "accumulation": {"changes": {"gradient_accumulation_steps": 4, "max_steps": 3}},
    # The second anchored step is an incomplete one.
    "every 3": {"anchor": {"every": 3}, "changes": {"max_steps": 4, "gradient_accumulation_steps": 4}},
    "beta": {"anchor": {"beta": 7}},
    "reentrant": {
        "changes": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    },
    "not reentrant": {
        "changes": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    },
    "rows of unequal length": {"anchor": {"source": sft_rows(10), "max_length": 48}},
    "bf16 autocast": {"changes": {"bf16": True}, "tolerance": OF_AUTOCAST},
    "SFT": {"kind": SFTTrainer},
    "SFT, accumulated": {"kind": SFTTrainer, "changes": {"gradient_accumulation_steps": 3}},
    "DPO": {"kind": DPOTrainer},
    "DPO of a trained adapter": {"kind": DPOTrainer, "what": "trained", "anchor": {"beta": 100}},
    "DPO after another round": {"kind": DPOTrainer, "what": "round", "anchor": {"beta": 100}},
}


FEW = ("lora_trained", "every 3", "reentrant", "bf16 autocast", "DPO after another round")


@pytest.mark.parametrize("name", all_but_slow(CASES, FEW))
def test_a_step_has_the_gradient_of_the_formula(name, options):
    """L_new + every·β·KL, the reference being the model as it was when the trainer was made."""
    case = {"what": "hft", "kind": Trainer, "anchor": {}, "changes": {}, "tolerance": OF_TWIN} | CASES[name]
    plain = gradients(trainers(case["kind"], adapted(case["what"]), options, None, **case["changes"]))
    model = adapted(case["what"])
    then = copy.deepcopy(model)
    anchor = config(**case["anchor"])
    trainer = trainers(case["kind"], model, options, anchor, **case["changes"])
    found = gradients(trainer)
    assert len(found) == len(plain) == trainer.state.max_steps
    twin = moved(copy.deepcopy(then))
    for step, (total, new) in enumerate(zip(found, plain, strict=True)):
        if step % anchor.every:
            assert_same(total, new)
        else:
            of_kl = kl_gradient(twin, then, trainer.anchor_text, step // anchor.every)
            assert_total(total, new, of_kl, anchor.every * anchor.beta, case["tolerance"])


def test_beta_0_trains_the_bits_of_the_plain_trainer(options):
    """No forward, no copy, nothing logged, nothing sampled; evaluation included."""
    run = {"eval_strategy": "steps", "eval_steps": 2}
    plain, found = trained(options, None, **run), trained(options, config(source="self", beta=0), **run)
    assert_same(adapter(found.model), adapter(plain.model))
    assert found.anchor_reference is found.anchor_text is None
    for name in ("loss", "eval_loss", "grad_norm", "mean_token_accuracy"):
        assert logged(found, name) == logged(plain, name) != []
    assert not logged(found, "anchor/kl")
    assert not (Path(options["output_dir"]) / "anchor.safetensors").exists()


class Watched(AnchoredSFTTrainer):
    """Notes whether the anchor's gradient is there when the new task's loss is computed."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.model.training:
            self.noted.append(any(parameter.grad is not None for parameter in self.model.parameters()))
        return super().compute_loss(model, inputs, *args, **kwargs)


def watched(options: dict, anchor: AnchorConfig, **changes) -> Watched:
    """A run of Llama, which has no dropout."""
    trainer = Watched(
        model=tiny(), args=SFTConfig(**(options | {"max_steps": 4} | changes)),
        train_dataset=Dataset.from_list(sft_rows(24)), eval_dataset=Dataset.from_list(sft_rows(4, seed=1)),
        processing_class=tokenizer(), peft_config=HalfFTConfig(), anchor=anchor,
    )  # fmt: skip
    trainer.noted = []
    trainer.train()
    return trainer


def test_the_anchor_goes_first_once_a_step(options):
    """Before any graph of the new task's; with accumulation, in front of the last micro-batch."""
    assert watched(options, config()).noted == [True] * 4
    assert watched(options, config(every=2)).noted == [True, False] * 2
    steps = watched(options, config(every=2), gradient_accumulation_steps=2, per_device_train_batch_size=2).noted
    # The second micro-batch finds the first one's gradient in any case.
    assert steps == [False, True] * 4


def test_what_is_logged(options):
    """KL is exactly 0 at a fresh adapter; both are means since the last log; the loss stays the new task's."""
    each = watched(options, config(beta=3, every=2), learning_rate=1e-2, eval_strategy="steps", eval_steps=2)
    entries = [entry for entry in each.state.log_history if "loss" in entry]
    assert [("anchor/kl" in entry, "anchor/loss" in entry) for entry in entries] == [(True,) * 2, (False,) * 2] * 2
    assert entries[0]["anchor/kl"] == entries[0]["anchor/loss"] == 0.0
    kl = entries[2]["anchor/kl"]
    assert kl > 1e-5
    assert entries[2]["anchor/loss"] == pytest.approx(6 * kl)
    assert not [entry for entry in each.state.log_history if "eval_loss" in entry and "anchor/kl" in entry]
    assert "anchor/kl" not in each.state.log_history[-1]

    run = {"logging_steps": 4, "eval_strategy": "steps", "eval_steps": 3}
    evaluated, all_at_once, *_ = watched(options, config(beta=3, every=2), learning_rate=1e-2, **run).state.log_history
    assert "eval_loss" in evaluated
    assert not [name for name in evaluated if name.startswith("anchor/")]
    assert all_at_once["anchor/kl"] == pytest.approx(kl / 2)
    assert all_at_once["anchor/loss"] == pytest.approx(3 * 2 * kl / 4)
    assert all_at_once["loss"] == pytest.approx(sum(entry["loss"] for entry in entries) / 4)

    still, plain = (watched(options, config(beta=b), learning_rate=0.0) for b in (1.0, 0))
    for name in ("loss", "entropy", "num_tokens"):
        assert logged(still, name) == logged(plain, name) != []


def test_the_first_kl_is_the_divergence_of_the_first_batch(options):
    """In nats per token, of the model as it stands: measured apart from any trainer."""
    model = adapted("trained")
    trainer = trainers(Trainer, model, options, config(), max_steps=1)
    moved(model)
    reference, text = trainer.anchor_reference, trainer.anchor_text
    found = divergence(model, text.batch(0), reference)
    assert found.tokens == text.global_tokens(0) == 4 * 11
    trainer.train()
    assert logged(trainer, "anchor/kl") == [pytest.approx(found.total.item() / found.tokens, rel=1e-6)]


class OutOfMemory(AnchoredTrainer):
    """Of which the first attempt fails in its second step."""

    passes = 0

    def compute_loss(self, *args, **kwargs):
        self.passes += 1
        if self.passes == 2:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(*args, **kwargs)


def test_an_attempt_that_failed_is_not_in_the_means(options):
    """Where the trainer looks for a batch that fits: of three steps, the first and the third are anchored."""
    run = {"auto_find_batch_size": True, "max_steps": 3, "logging_steps": 3, "learning_rate": 1.0}
    trainer = OutOfMemory(
        get_peft_model(tiny(), HalfFTConfig()), arguments(options, **run), train_dataset=of_tokens(),
        processing_class=tokenizer(), anchor=config(every=2),
    )  # fmt: skip
    trainer.train()
    assert trainer.passes == 5
    (kl,), (loss,) = logged(trainer, "anchor/kl"), logged(trainer, "anchor/loss")
    assert kl > 1e-6
    assert loss == pytest.approx(2 * 2 / 3 * kl)


@pytest.mark.slow
def test_the_anchor_holds(options):
    """After as many steps a larger β has left the model nearer to what it was."""
    run = {"max_steps": 12, "learning_rate": 1e-2}
    distances = []
    for beta in (0, 1, 30):
        trainer = watched(options, config(beta=beta), **run)
        text = anchor_text(config(seed=9), trainer.model, tokenizer())
        found = divergence(trainer.model.eval(), text.batch(0), Reference.base(trainer.model))
        distances.append(found.total.item() / found.tokens)
    assert distances[0] > 1.1 * distances[1] > 2 * distances[2]


@pytest.mark.slow
def test_a_second_training_is_held_to_the_same(options):
    """The reference is of the moment the trainer was made, the text too; means and records do not carry over."""
    logs = []
    for every in (1, 3):
        trainer = watched(options, config(source="self"), logging_steps=every)
        reference, text = trainer.anchor_reference, trainer.anchor_text
        callbacks = len(trainer.callback_handler.callbacks)
        trainer.train()
        assert trainer.anchor_reference is reference
        assert trainer.anchor_text is text
        assert len(trainer.callback_handler.callbacks) == callbacks
        logs.append(logged(trainer, "anchor/loss"))
    assert logs[0][0] > 1e-6
    assert logs[1] == [pytest.approx(sum(logs[0][:3]) / 3)]


class TwoModes(torch.optim.SGD):
    """As schedule-free optimizers are: told which of their two sets of weights is wanted."""

    training = True

    def train(self) -> None:
        self.training = True

    def eval(self) -> None:
        self.training = False


class Moded(AnchoredTrainer):
    """Notes the modes in which losses are computed, the anchor's and the new task's."""

    def compute_loss_context_manager(self):
        self.noted.append((self.model.training, self.optimizer.optimizer.training))
        return super().compute_loss_context_manager()


def test_an_evaluation_between_leaves_no_mode_behind(options):
    """For the anchor's pass, too, the model is in training mode (there may be dropout), and so is the optimizer."""
    model = get_peft_model(tiny(), HalfFTConfig())
    optimizer = TwoModes([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    trainer = Moded(
        model, arguments(options, eval_strategy="steps", eval_steps=1, max_steps=2), train_dataset=of_tokens(),
        eval_dataset=of_tokens(4), processing_class=tokenizer(), optimizers=(optimizer, None), anchor=config(),
    )  # fmt: skip
    trainer.noted = []
    trainer.train()
    step, evaluation = [(True, True)] * 2, [(False, False)]
    assert trainer.noted == (step + evaluation) * 2


class Deepspeed(AnchoredTrainer):
    """As under DeepSpeed, which is not installed here."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_deepspeed_enabled = True


class FSDP1(AnchoredTrainer):
    """As under FSDP1."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = True


class TwoDevices(AnchoredTrainer):
    """As where two devices are shown to one process."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.args._n_gpu = 2


REFUSED: dict[str, tuple[type[Trainer], dict, str]] = {
    "no AnchorConfig": (AnchoredTrainer, {"anchor": "self"}, r"anchor='self' is str: pass an AnchorConfig"),
    "a class": (AnchoredTrainer, {"anchor": AnchorConfig}, "is type: pass an AnchorConfig"),
    "DeepSpeed": (Deepspeed, {}, "DeepSpeed counts .* train with FSDP2"),
    "FSDP1": (FSDP1, {}, r"FSDP1 .* use fsdp_version: 2"),
    "DataParallel": (TwoDevices, {}, r"nn\.DataParallel on 2 devices .*accelerate launch"),
    "LOMO": (AnchoredTrainer, {"args": {"optim": "lomo"}}, "optim='lomo' steps within the backward pass"),
    "layer by layer": (
        AnchoredTrainer,
        {"args": {"optim": "galore_adamw_layerwise"}},
        "optim='galore_adamw_layerwise'",
    ),
    "model_init": (
        AnchoredTrainer,
        {"model": None, "model_init": lambda: tiny()},
        "model_init makes another model .* model=",
    ),
    "encoder and decoder": (AnchoredTrainer, {"model": "t5"}, "has an encoder"),
    "no logits over tokens": (AnchoredTrainer, {"model": "classifier"}, "LlamaForSequenceClassification has no head"),
    "prompt": (AnchoredTrainer, {"model": "prompt"}, "learned prompt"),
    "nothing learns": (AnchoredTrainer, {"model": "frozen"}, "nothing of the model learns.*is_trainable=True"),
    "rows without a token": (AnchoredTrainer, {"anchor": AnchorConfig([{"text": ""}], max_length=8)}, "can be scored"),
    "longer than the model": (AnchoredTrainer, {"anchor": AnchorConfig("self", max_length=65)}, "64 positions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_anchored_is_refused_at_once(name, options):
    """When the trainer is made."""
    kind, given, message = REFUSED[name]
    models = {
        "t5": lambda: tiny("t5"),
        "classifier": lambda: AutoModelForSequenceClassification.from_config(CONFIGS["llama"]()),
        "frozen": lambda: tiny().requires_grad_(False),
        "prompt": lambda: get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
    }
    made = {"model": tiny(), "anchor": config(), "args": {}} | given
    if isinstance(made["model"], str):
        made["model"] = models[made["model"]]()
    made["args"] = arguments(options, **made["args"])
    with pytest.raises(IsolateError, match=message):
        kind(**made, train_dataset=of_tokens(4), processing_class=tokenizer())


def test_a_model_that_cannot_write_says_so_before_training(options):
    model = get_peft_model(tiny(), HalfFTConfig())
    model.get_base_model().can_generate = lambda: False
    trainer = trainers(Trainer, model, options, config(source="self"))
    with pytest.raises(IsolateError, match="cannot generate"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not os.listdir(options["output_dir"])
