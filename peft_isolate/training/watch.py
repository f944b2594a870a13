"""What a model forgets, while it is trained: measured, logged and, on request, limited in any `Trainer`.

The base is the model itself with its adapters left out, so that no second model is needed. Nothing of the training
changes by being watched: modes, random states, gradients and what is logged otherwise stay as they would have been.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import SaveStrategy

from ..deltas.about.totals import totals_of
from ..deltas.adapters import layers_of
from ..deltas.reference import Reference
from ..deltas.terms import as_finite
from ..errors import IsolateError
from ..evaluation.divergence import divergence
from ..evaluation.forgetting import summed_loss
from ..evaluation.rows import Batches, Rows, as_tokenizer, positive, read_rows
from ..evaluation.scorers import undisturbed
from .causal import check_causal, positions_of

logger = logging.getLogger(__name__)

EPOCH = "epoch"
_UNDER = "forgetting/"
OLD_LOSS, RISE, KL = (f"{_UNDER}{name}" for name in ("old_loss", "rise", "kl"))
BASE_LOSS, TOKENS = f"{_UNDER}base_loss", f"{_UNDER}old_tokens"

# Two processes of other hardware may add up the same loss otherwise by this much.
SAME_LOSS = 1e-3

# Of one batch, summed over its scored tokens, in nats.
Score = Callable[[Mapping[str, torch.Tensor]], float]


class ForgettingCallback(TrainerCallback):
    """Log what a model forgets while it is trained: `Trainer(…, callbacks=[ForgettingCallback(…)])`.

    Goes to whatever `report_to` names, and to `trainer.state.log_history`, at the start, every so many steps, and
    after the last step:

    - `forgetting/old_loss`: mean loss per token on text of the base's domain, in nats;
    - `forgetting/rise`: how much that is above the base's, which is the model without its adapters;
    - `forgetting/kl`: mean KL(base ‖ model) per completion token of text of the new task, in nats: Σ over the
      vocabulary of p·(log p − log q), p the base's distribution of the next token, q the model's.

    Of rows with a prompt the completion's tokens count, of others all. At the start there are also the base's own
    `forgetting/base_loss`, the `forgetting/old_tokens` that both losses are means over, and what `plan` tells in
    `forgetting/trained`, `forgetting/trained_share`, and for an adapter of this library `forgetting/adapter_bytes` (in
    fp32, without positions).

    With several processes each measures its share of the rows, and all log the same numbers. What learns outside any
    adapter is compared with what it was when the trainer was made: beside adapters, and for `kl_on`, that takes a copy
    of it.

    Args:
        old_data: Text of what shall not be forgotten: a JSONL file, or rows with "text", "prompt" and "completion",
            "messages", or a preference's "chosen".
        every: Optimizer steps between two measurements, or "epoch".
        kl_on: Held-out rows of the new task, likewise; None: no KL.
        tokenizer: The model's, or its folder or Hub id; None: the trainer's processing class.
        batch_size: Rows that go through a process at once.
        max_length: Tokens a row, longer ones lose their end (with `truncation_mode="keep_end"` among the trainer's
            arguments, their beginning). None: the `max_length` of the trainer's arguments, where they have one. In any
            case no more than the model has positions.
        max_rows: Take the first rows only, of both; None: all.
        stop_at_rise: End the training when `forgetting/rise` exceeds this, in nats. NaN does, too.
        stop_at_kl: Likewise for `forgetting/kl`.

    Raises:
        IsolateError: A file or an argument makes no sense. When the trainer is made: rows that cannot be tokenised,
            no token that counts, no tokenizer, a model that is no causal language model, or a base that is not at
            hand. When training begins: a budget that is spent already, or a base that is gone by now.

    Example:
        >>> watch = ForgettingCallback([{"text": "to be kept"}], every=50, stop_at_rise=0.1)
    """

    def __init__(
        self,
        old_data: Rows,
        *,
        every: int | str = 100,
        kl_on: Rows | None = None,
        tokenizer: Any = None,
        batch_size: int = 8,
        max_length: int | None = None,
        max_rows: int | None = None,
        stop_at_rise: float | None = None,
        stop_at_kl: float | None = None,
    ) -> None:
        if every != EPOCH and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise IsolateError(f'every={every!r}: use a whole number of optimizer steps from 1 on, or "{EPOCH}"')
        positive("batch_size", batch_size)
        positive("max_length", max_length, optional=True)
        positive("max_rows", max_rows, optional=True)
        for name, budget in (("stop_at_rise", stop_at_rise), ("stop_at_kl", stop_at_kl)):
            _check_budget(name, budget)
        if stop_at_kl is not None and kl_on is None:
            raise IsolateError(f"stop_at_kl={stop_at_kl!r} without rows to measure the KL on: pass kl_on, too")
        self.every, self.batch_size, self.max_length = every, batch_size, max_length
        self._budgets = {RISE: ("stop_at_rise", stop_at_rise), KL: ("stop_at_kl", stop_at_kl)}
        self._tokenizer = None if tokenizer is None else _of_text(as_tokenizer(tokenizer))
        if tokenizer is not None and self._tokenizer is None:
            raise IsolateError(f"tokenizer={tokenizer!r} is none: pass the model's tokenizer, or its folder or Hub id")
        self._old_rows = read_rows(old_data, max_rows)
        self._new_rows = None if kl_on is None else read_rows(kl_on, max_rows)
        self._old: Batches  # from `_prepare`, which comes before any measurement
        self._new: Batches | None = None
        self._reference: Reference | None = None
        self._base_loss = math.nan
        self._trainer_args: Any = None
        self._measured_at: int | None = None

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **rest: Any
    ) -> None:
        """Tokenise, and keep what learns outside adapters before a checkpoint is loaded into it."""
        self._prepare(args, model, processing_class)
        if self._new is None and not _has_adapters(model):
            return
        if not any(parameter.is_meta for parameter in model.parameters()):
            self._reference = Reference.base(model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **rest: Any
    ) -> Any:
        """Measure the base, say what will be trained, and how much is forgotten already."""
        if self._trainer_args is not args:  # of another trainer, or of none: added by trainer.add_callback
            self._prepare(args, model, processing_class)
        self._measured_at = None
        self._measure_base(model, state)
        totals, of_regions = totals_of(model), bool(layers_of(model))
        lines = totals.lines() if of_regions else totals.lines()[:1]
        _say(state, logging.INFO, "watched: " + "; ".join(" ".join(line.split()) for line in lines))
        if state.global_step:  # resumed: what the run began with is in its log
            self._check_unspent(_last_entry(state), state)
            return None
        self._measured_at = state.global_step
        values = self._measure(model)
        self._check_unspent(values, state)
        start = {BASE_LOSS: self._base_loss, TOKENS: self._old.n_tokens}
        about = {f"{_UNDER}trained": totals.trained, f"{_UNDER}trained_share": totals.share}
        if of_regions:
            about[f"{_UNDER}adapter_bytes"] = totals.adapter_bytes["fp32"]
        return _log(values | start | about, args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> Any:
        """Measure where it is due, and after the last step, before that is saved and before integrations close."""
        due = isinstance(self.every, int) and state.global_step % self.every == 0
        return self._watch(due or control.should_training_stop, args, state, control, model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> Any:
        """Measure where it is due, and where an evaluation has ended the training."""
        # An epoch that is cut short may be the last: at the training's end it is too late for that.
        cut_short = args.load_best_model_at_end and control.should_epoch_stop
        due = self.every == EPOCH or control.should_training_stop or cut_short
        return self._watch(due, args, state, control, model)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> Any:
        """Measure where an epoch's evaluation has ended the training; of others the epoch's end tells."""
        return self._watch(control.should_training_stop, args, state, control, model)

    on_save = on_evaluate  # by now a callback after it in the list may have ended the training

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> Any:
        """Measure where the last epoch was cut short; by now the best model may have been loaded, which is another."""
        control = self._watch(not args.load_best_model_at_end, args, state, control, model)
        self._measured_at = state.global_step  # evaluations that follow are none of the training
        return control

    def _watch(self, due: bool, args: Any, state: Any, control: Any, model: nn.Module) -> Any:
        """Measure and log, once at a step; end the training where a budget is spent."""
        if not due or self._measured_at == state.global_step:
            return None
        self._measured_at = state.global_step
        values = self._measure(model)
        control = _log(values, args, state, control)
        if (reason := self._spent(values)) and not control.should_training_stop:
            _say(state, logging.WARNING, f"training ends at step {state.global_step}: {reason}")
            control.should_training_stop = True
            if args.save_strategy == SaveStrategy.STEPS:  # as where training ends by itself
                control.should_save = True
        return control

    def _prepare(self, args: Any, model: nn.Module, processing_class: Any) -> None:
        """Forget the trainer before, and tokenise the rows."""
        self._trainer_args, self._reference, self._base_loss = args, None, math.nan
        check_causal(model)
        tokenizer = _of_text(processing_class) if self._tokenizer is None else self._tokenizer
        if tokenizer is None:
            raise IsolateError(
                f"the trainer's processing class is {type(processing_class).__name__}, no tokenizer: pass "
                "ForgettingCallback(…, tokenizer=…)"
            )
        given = getattr(args, "max_length", None) if self.max_length is None else self.max_length
        longest = min((length for length in (given, positions_of(model)) if length is not None), default=None)
        keep_end = getattr(args, "truncation_mode", None) == "keep_end"

        def tokenised(what: str, rows: list[Mapping[str, Any]]) -> Batches:
            try:
                return Batches(rows, tokenizer, batch_size=self.batch_size, max_length=longest, keep_end=keep_end)
            except IsolateError as error:
                raise IsolateError(f"{what}: {error}") from error

        self._old = tokenised("old_data", self._old_rows)
        self._new = None if self._new_rows is None else tokenised("kl_on", self._new_rows)

    def _measure_base(self, model: nn.Module, state: Any) -> None:
        """Find the base's loss: of the model as the reference, as it is, or from the log of the run that is resumed.

        Without a reference, what an earlier run of the same trainer began with is still the base.

        Raises:
            IsolateError: The base is not at hand, or has no finite loss.
        """
        resumed = state.global_step > 0
        if self._reference is None and (_has_adapters(model) or (self._new is not None and not resumed)):
            late = Reference.base(model)
            self._reference = None if resumed and late.n_bytes else late
        if self._reference is not None:
            self._check_covered(model)
            with self._reference.used(model):
                self._base_loss = self._old_loss(model)
        elif math.isfinite(self._base_loss):
            return
        elif resumed:
            self._base_loss = self._base_from_log(state)
        else:
            self._base_loss = self._old_loss(model)
        if not math.isfinite(self._base_loss):
            raise IsolateError(
                f"{BASE_LOSS}={self._base_loss} is not finite, so no rise over it can be measured: look for NaN in "
                "the base's weights, or load it in another dtype"
            )
        if resumed:
            self._check_same_base(state)

    def _check_same_base(self, state: Any) -> None:
        """Raise `IsolateError` where the log of the run that is resumed begins with another base, or other text."""
        then, tokens = _logged_base(state)
        if then is None:
            return  # it was not watched
        if tokens != self._old.n_tokens or not math.isclose(then, self._base_loss, rel_tol=SAME_LOSS):
            raise IsolateError(
                f"the run that is resumed began with {BASE_LOSS}={then:.6g} over {tokens} tokens, and here it is "
                f"{self._base_loss:.6g} over {self._old.n_tokens}: make the trainer on the base as the first time, "
                "not on the checkpoint's model, and watch it on the same old_data"
            )

    def _base_from_log(self, state: Any) -> float:
        """What the log of a run says of its base, which a checkpoint was loaded into.

        Raises:
            IsolateError: It says nothing, or what it was on other text; or a KL is wanted.
        """
        then, tokens = _logged_base(state)
        if self._new is not None or then is None or tokens != self._old.n_tokens:
            raise IsolateError(
                f"the run is resumed at step {state.global_step}, and what learns outside adapters is the "
                "checkpoint's by now, so the base is not at hand, "
                + (
                    "which a KL needs: pass the callback as callbacks=[…] when the trainer is made, before it loads "
                    "the checkpoint into the base"
                    if self._new is not None
                    else f"and the run's log has no {BASE_LOSS} over {self._old.n_tokens} tokens: watch it on the "
                    "old_data that it began with, or leave the callback out"
                )
            )
        return then

    def _check_covered(self, model: nn.Module) -> None:
        if self._reference is not None and (name := self._reference.uncovered(model)):
            raise IsolateError(
                f"{name!r} learns, and did not when the trainer was made, so what it was in the base is not kept: set "
                "its requires_grad before the trainer is made"
            )

    def _measure(self, model: nn.Module) -> dict[str, float]:
        self._check_covered(model)
        loss = self._old_loss(model)
        values = {OLD_LOSS: loss, RISE: loss - self._base_loss}
        if self._new is not None and (reference := self._reference) is not None:
            values[KL] = _mean(model, self._new, lambda batch: divergence(model, batch, reference).total.item())
        return values

    def _old_loss(self, model: nn.Module) -> float:
        return _mean(model, self._old, lambda batch: summed_loss(model, [batch])[0])

    def _spent(self, values: Mapping[str, float]) -> str | None:
        """Which budget is spent, and by what; None where none is."""
        for name, (argument, budget) in self._budgets.items():
            # "Not below" instead of "above": NaN is neither.
            if budget is not None and name in values and not values[name] <= budget:
                return f"{name}={values[name]:.4g} exceeds {argument}={budget:g}"
        return None

    def _check_unspent(self, values: Mapping[str, float], state: Any) -> None:
        if reason := self._spent(values):
            raise IsolateError(
                f"before training begins at step {state.global_step}, {reason}: raise that budget, or begin with an "
                "adapter that has forgotten less"
            )


def _mean(model: nn.Module, batches: Batches, score: Score) -> float:
    """The mean per scored token over all processes, each of which scores every n-th batch.

    The sums are added exactly, so that their number does not matter, and all processes get the same bits.
    """
    state = PartialState()
    first, step = state.process_index, state.num_processes
    mine = []
    with undisturbed(model), torch.no_grad():
        # FSDP2 gathers weights in every forward, so that all processes must make the same number of them.
        for number in range(first, -(-len(batches) // step) * step, step):
            total = score(batches[number % len(batches)])
            if number < len(batches):
                mine.append(total)
    return math.fsum(gather_object(mine)) / batches.n_tokens


def _log(values: Mapping[str, float], args: Any, state: Any, control: Any) -> Any:
    """Log as `Trainer.log` does. Not by it: TRL's would hand out the averages of its own metrics before their time."""
    logs: dict[str, Any] = dict(values)
    if state.epoch is not None:
        logs["epoch"] = state.epoch
    state.log_history.append(logs | {"step": state.global_step})
    asked = control.should_log
    control = _handler().on_log(args, state, control, logs)
    control.should_log = asked  # on_log takes what was asked for, the log of the training's own loss, as done
    return control


def _handler() -> CallbackHandler:
    """Who called the callback: it knows all the others, of which those that write logs come first in its list.

    A callback is not told; so the frame of the call is asked.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), CallbackHandler):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    raise IsolateError("no Trainer called ForgettingCallback, so nobody would log: pass it as callbacks=[…] of one")


def _of_text(processing_class: Any) -> Any:
    """A tokenizer as it is, that of a processor of text and images, or None."""
    if hasattr(processing_class, "eos_token"):
        return processing_class
    return getattr(processing_class, "tokenizer", None)


def _has_adapters(model: nn.Module) -> bool:
    return bool(getattr(model, "peft_config", None))


def _logged_base(state: Any) -> tuple[float | None, int | None]:
    """(the base's loss, over how many tokens), as the log of a run begins; None where it was not watched then."""
    first: Mapping[str, Any] = next((entry for entry in state.log_history if BASE_LOSS in entry), {})
    return first.get(BASE_LOSS), first.get(TOKENS)


def _last_entry(state: Any) -> Mapping[str, Any]:
    """What was logged here at the step that a run is resumed at."""
    entries = [entry for entry in state.log_history if OLD_LOSS in entry and entry["step"] == state.global_step]
    return entries[-1] if entries else {}


def _say(state: Any, level: int, text: str) -> None:
    if state.is_world_process_zero:
        logger.log(level, text)


def _check_budget(name: str, budget: Any) -> None:
    """Refuse what is no finite number from 0 on."""
    if budget is not None and ((nats := as_finite(budget)) is None or nats < 0):
        raise IsolateError(f"{name}={budget!r}: use a finite number of nats from 0 on, or None")
