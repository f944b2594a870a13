"""`Anchored`: a trainer of transformers or TRL that holds the model to what it was when training began.

One optimizer step has the gradient of `L_new + every·β·KL`, where L_new is the trainer's own loss, left as it is, and
KL the mean of KL(reference ‖ model) over the scored tokens of the step's anchor text, on all processes together.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ...deltas.reference import Reference
from ...errors import IsolateError
from ...evaluation.divergence import divergence
from ...regions.region import unwrap
from ...regions.tree import head_of
from .config import RANDOM, SELF, AnchorConfig
from .record import AnchoredTo, KeepsText, Record, check_resumed, kept_text
from .sampling import by_process_0
from .text import AnchorText, anchor_text

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class Anchored(_Trainer):
    """Put in front of a trainer, `class MyTrainer(Anchored, Trainer)`: it then takes `anchor=AnchorConfig(…)`.

    The reference is the model as it is when the trainer is made, whichever adapters that has. A checkpoint tells what
    its run was anchored to, and a resumed run must be anchored to the same. With β = 0 nothing is added: neither a
    forward nor a copy.

    Where there was an anchored step since the last log, `anchor/kl` is logged beside the loss, the mean KL of those
    steps in nats per token, and `anchor/loss`, what the anchor added to the loss, as a mean over all steps since.
    `loss` stays that of the new task.

    Args:
        anchor: To which text, how strongly, how often.
        *args, **kwargs: The trainer's own.

    Attributes:
        anchor: As given.
        anchor_reference: What the model is held to; None with β = 0.
        anchor_text: On which text; None with β = 0. For the source "self" it is sampled when `train` begins, and None
            before.

    Raises:
        IsolateError: `anchor` is no `AnchorConfig`; the trainer cannot add a second backward pass to a step, or would
            not give each process rows of its own; the model has no head; and what `Reference.now` and `anchor_text`
            raise.
    """

    def __init__(self, *args: Any, anchor: AnchorConfig, **kwargs: Any) -> None:
        if not isinstance(anchor, AnchorConfig):
            raise IsolateError(
                f"anchor={anchor!r} is {type(anchor).__name__}: pass an AnchorConfig, or use the trainer that is not "
                "anchored"
            )
        super().__init__(*args, **kwargs)
        self.anchor = anchor
        self.anchor_reference: Reference | None = None
        self.anchor_text: AnchorText | None = None
        self._anchor_mean = _Mean()
        self._anchor_told = False
        self._anchor_said: dict[str, Any] = {}
        if anchor.beta == 0:
            return
        _check_trainer(self)
        _check_model(self.model)
        self.anchor_reference = Reference.now(self.model)
        if anchor.source == SELF:
            # Sampling waits until it is known whether a checkpoint has the text; what it takes is looked at now.
            self._anchor_text_of(replace(anchor, source=RANDOM))
        else:
            self.anchor_text = self._anchor_text_of(anchor)
        # Now, as the text: a file of the user's may be another by the time that training begins.
        self._anchor_said = anchor.to_dict()
        self.add_callback(self._anchor_mean)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own. The source "self" is sampled first, once, or read from the checkpoint.

        Raises:
            IsolateError: The checkpoint's run was anchored to something else.
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        self._begin_anchor(checkpoint and Path(checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; before the one that completes an anchored optimizer step, the anchor's own passes.

        Before, so that no graph of the new task is in memory beside the anchor's.
        """
        if self.anchor_text is not None and self.accelerator.sync_gradients:
            if self.state.global_step % self.anchor.every == 0:
                self._hold(model, self.anchor_text)
            self._anchor_mean.steps += 1
        return super().training_step(model, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer's own; the anchor's numbers stand beside the loss of training."""
        if "loss" in logs and self.anchor_text is not None:
            logs.update(self._anchor_mean.taken(self.accelerator, self.anchor))
        super().log(logs, *args, **kwargs)

    def _hold(self, model: nn.Module, text: AnchorText) -> None:
        """Add the gradient of every·β·KL to those of this step."""
        assert self.anchor_reference is not None
        processes, step = self.accelerator.num_processes, self.state.global_step // self.anchor.every
        batch = text.batch(step, self.accelerator.process_index, processes, self.args.device)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free ones hold other weights for evaluation
        # DDP reduces it together with the new task's. FSDP2 does so at once: it would have to keep whole gradients.
        alone = nullcontext() if self.accelerator.is_fsdp2 else self.accelerator.no_sync(model)
        with alone:
            with self.compute_loss_context_manager():
                found = divergence(model, batch, self.anchor_reference)
            share = found.total / text.global_tokens(step, processes)
            # The sum of the processes' gradients is divided by their number.
            self.accelerator.backward(share * (self.anchor.every * self.anchor.beta * processes))
        self._anchor_mean.add(share.detach())

    def _anchor_text_of(self, anchor: AnchorConfig) -> AnchorText:
        return anchor_text(anchor, self.model, self.processing_class, self.anchor_reference)

    def _begin_anchor(self, checkpoint: Path | None) -> None:
        """Have the text, be sure that the checkpoint's run had the same anchor, and let this run's checkpoints tell.

        Raises:
            IsolateError: It had another.
        """
        reference = self.anchor_reference
        if reference is None:
            return check_resumed(checkpoint, None)
        now = Record(self._anchor_said, by_process_0(reference.digest))
        check_resumed(checkpoint, now)
        if self.anchor_text is None:
            kept = by_process_0(lambda: kept_text(checkpoint, self.anchor, reference))
            self.anchor_text = kept or self._anchor_text_of(self.anchor)
        now = now._replace(text=self.anchor_text.digest())
        check_resumed(checkpoint, now)
        if not self._anchor_told:
            self._anchor_told = True
            self.add_callback(AnchoredTo(**now._asdict()))
            if self.anchor.source == SELF:
                self.add_callback(KeepsText(self.anchor_text))


class _Mean(TrainerCallback):
    """What is logged: sums over the steps since the last log.

    A callback, since a training that does not fit into memory is begun again with smaller batches, within `train`.
    """

    def __init__(self) -> None:
        self.begin()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Also where an attempt before has failed."""
        self.begin()

    def begin(self) -> None:
        """Forget what was added."""
        self.steps = self.anchored = 0
        self._kl: torch.Tensor | float = 0.0

    def add(self, share: torch.Tensor) -> None:
        """One anchored step: this process's share of its KL, a scalar. It is not read here: that would wait for it."""
        self._kl = self._kl + share
        self.anchored += 1

    def taken(self, accelerator: Any, anchor: AnchorConfig) -> dict[str, float]:
        """The numbers of all processes, each of which must call this, or none without an anchored step; begin anew."""
        numbers = {}
        if self.anchored:
            kl = float(accelerator.reduce(self._kl, "sum"))
            numbers = {"anchor/kl": kl / self.anchored, "anchor/loss": anchor.every * anchor.beta * kl / self.steps}
        self.begin()
        return numbers


def _check_trainer(trainer: Any) -> None:
    """Raise `IsolateError` where a second backward pass would not add to the first, or rows are not one process's."""
    accelerator, optimizer = trainer.accelerator, str(getattr(trainer.args.optim, "value", trainer.args.optim))
    parallel = getattr(accelerator, "parallelism_config", None)
    why = None
    if trainer.is_deepspeed_enabled:
        why = "DeepSpeed counts a backward pass as a micro-batch, and an anchored step has one more: train with FSDP2"
    elif trainer.is_fsdp_enabled and not accelerator.is_fsdp2:
        why = "FSDP1 melts parameters together, so that none can be exchanged for the reference's: use fsdp_version: 2"
    elif trainer.args.n_gpu > 1:
        why = (
            f"nn.DataParallel on {trainer.args.n_gpu} devices splits rows on its own: start one process per device by "
            "`accelerate launch`, or show one device only (CUDA_VISIBLE_DEVICES)"
        )
    elif parallel is not None and parallel.non_data_parallel_size > 1:
        why = (
            f"groups of {parallel.non_data_parallel_size} processes share a row (tensor, context or sequence "
            "parallelism), and anchor text is given out to every process: use DDP or FSDP2 alone"
        )
    elif "lomo" in optimizer or "layerwise" in optimizer:
        why = f"optim={optimizer!r} steps within the backward pass, and an anchored step has two: use AdamW"
    elif trainer.model_init is not None:
        why = "model_init makes another model for each training, and the anchor is of one: pass model="
    if why is not None:
        raise IsolateError(f"this training cannot be anchored: {why}")


def _check_model(model: nn.Module) -> None:
    """Raise `IsolateError` where there is no distribution over the next token to hold."""
    if head_of(model) is None:
        raise IsolateError(
            f"{type(unwrap(model)).__name__} has no head that gives logits over the next token, which is what an "
            "anchor holds: use a causal language model"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise IsolateError(
            "nothing of the model learns, so there is nothing to hold: load its adapter by is_trainable=True, or pass "
            "a peft_config"
        )
