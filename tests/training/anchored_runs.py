"""Anchored trainings of tiny models, and the slow twin of what the anchor adds to their gradient."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, SFTConfig, SFTTrainer

from peft_isolate import CoFiTuneConfig, HalfFTConfig, next_round
from peft_isolate.training.anchor import AnchorConfig, Anchored, AnchoredDPOTrainer, AnchoredSFTTrainer, AnchorText
from tests.given import GivenConfig
from tests.importances import importance
from tests.learn import learn
from tests.models import tiny, tokens
from tests.texts import dpo_rows, sft_rows, tokenizer


def whole(gradient: torch.Tensor) -> torch.Tensor:
    """A copy; of what FSDP2 has sharded, from all processes."""
    gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return gradient.detach().clone()


class AnchoredTrainer(Anchored, Trainer):
    """transformers' own, anchored."""


class Gradients(TrainerCallback):
    """What each optimizer step was given."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        learning = {name: each for name, each in model.named_parameters() if each.grad is not None}
        self.steps.append({name: whole(each.grad) for name, each in learning.items()})


def all_but_slow(names: Iterable[str], fast: Collection[str]) -> list[Any]:
    """The names as parameters; all but the fast ones are slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def config(**changes) -> AnchorConfig:
    return AnchorConfig(**({"batch_size": 4, "max_length": 12, "n_rows": 8} | changes))


def moved(model: nn.Module) -> nn.Module:
    """The model, away from where it was: at its reference the KL has no gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def adapted(what: str) -> nn.Module:
    """A tiny model with an adapter, in training mode; the same one each time."""
    torch.manual_seed(0)
    if what == "full":
        return tiny().train()
    if what == "lora_trained":
        return learn(get_peft_model(tiny(), LoraConfig(target_modules="all-linear", init_lora_weights=False)).train())
    if what == "round":
        model = learn(get_peft_model(tiny(), HalfFTConfig()).train())
        next_round(model)
        return model.train()
    if what == "trained":
        return learn(get_peft_model(tiny(), HalfFTConfig()).train())
    configs = {
        "hft": HalfFTConfig(),
        "elements": GivenConfig(kind="elements"),
        "all_but": GivenConfig(kind="all_but"),
        "masked": CoFiTuneConfig(layer_range=(0, 1), modules="MHA+FFN", importance=importance()),
        "lora": LoraConfig(target_modules="all-linear"),
        "saved_head": HalfFTConfig(modules_to_save=["lm_head"]),
    }
    return get_peft_model(tiny(), configs[what]).train()


def arguments(options: dict, kind: type = TrainingArguments, **changes) -> Any:
    """Such that numbers stay where they are, and nothing is clipped."""
    still = {"learning_rate": 0.0, "optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "max_steps": 2}
    given = options | still | changes
    if kind is TrainingArguments:
        given.pop("max_length")
    return kind(**given)


def of_tokens(n: int = 24) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tokens(n, 12)]


def trainers(kind: type[Trainer], model: nn.Module, options: dict, anchor: AnchorConfig | None, **changes) -> Trainer:
    """A trainer of that kind, anchored or not."""
    if kind is Trainer:
        made, args, data = AnchoredTrainer, arguments(options, **changes), of_tokens()
    elif kind is SFTTrainer:
        made, args, data = AnchoredSFTTrainer, arguments(options, SFTConfig, **changes), sft_rows(16)
    else:
        made, args, data = AnchoredDPOTrainer, arguments(options, DPOConfig, **changes), dpo_rows(16)
    more: dict[str, Any] = {"processing_class": tokenizer()}
    if kind is not Trainer:
        data = Dataset.from_list(data)
    if anchor is not None:
        kind, more["anchor"] = made, anchor
    return kind(model=model, args=args, train_dataset=data, callbacks=[Gradients()], **more)


def gradients(trainer: Trainer) -> list[dict[str, torch.Tensor]]:
    """Those of all steps, of a model that has moved since the trainer was made."""
    moved(trainer.model)
    trainer.train()
    return next(each for each in trainer.callback_handler.callbacks if isinstance(each, Gradients)).steps


def kl_gradient(model: nn.Module, then: nn.Module, text: AnchorText, step: int) -> dict[str, torch.Tensor]:
    """The slow twin: of KL(then ‖ model) per scored token of an anchored step."""
    batch = text.batch(step)
    total, scored = torch.zeros((), dtype=torch.float64), 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        row = ids[mask.bool()][None]
        with torch.no_grad():
            wanted = then.eval()(input_ids=row).logits[0, :-1].double()
        found = model(input_ids=row).logits[0, :-1].double()
        for p, q in zip(wanted.log_softmax(-1), found.log_softmax(-1), strict=True):
            total = total + (p.exp() * (p - q)).sum()
            scored += 1
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(total / scored, list(learning.values()), allow_unused=True)
    return {name: each for name, each in zip(learning, found, strict=True) if each is not None}


def flat(gradient: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    return torch.cat([gradient[name].double().flatten() for name in names])


def sft_trainer(architecture: str, options: dict, anchor: AnchorConfig | None, **changes) -> SFTTrainer:
    """TRL's, anchored or not, with HFT."""
    more: dict[str, Any] = {} if anchor is None else {"anchor": anchor}
    return (SFTTrainer if anchor is None else AnchoredSFTTrainer)(
        model=tiny(architecture),
        args=SFTConfig(**(options | {"max_steps": 5, "weight_decay": 0.1} | changes)),
        train_dataset=Dataset.from_list(sft_rows(16)),
        eval_dataset=Dataset.from_list(sft_rows(4, seed=1)),
        processing_class=tokenizer(),
        peft_config=HalfFTConfig(),
        **more,
    )


def trained(options: dict, anchor: AnchorConfig | None, resume: str | bool | None = None, **changes) -> SFTTrainer:
    """One after its run, of GPT-2, with its dropout."""
    trainer = sft_trainer("gpt2", options, anchor, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


SAVING = {"save_strategy": "steps", "save_steps": 2}
