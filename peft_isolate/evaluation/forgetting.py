"""Forgetting: how much worse a model became on text that has nothing to do with its new task.

It is measured as PEFT's own method comparison measures it: the rise of the mean loss per token on held-out general
text, relative to the base model. Both numbers are in nats; zero means nothing was lost, a negative one that the model
got better at the general text too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import IsolateError
from ..regions.region import device_of, walk_parameters

# Positions whose logits are cast to fp32 at once: with a vocabulary of 128k that is half a gigabyte.
_POSITIONS = 1024
# The label of a token that is not scored, as in transformers.
IGNORED = -100


def token_loss(model: torch.nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
    """Mean cross-entropy per token of a causal language model, every token weighted the same.

    A token is scored from the logits one position earlier. The first token of a row has none and is never scored,
    neither is padding, nor the first token after padding on the left. Rows of unequal length and a smaller last batch
    therefore give the same number as one token after the other would.

    Args:
        model: returns an object with `logits`, (batch, length, vocabulary), in any float type. Its modules are in eval
            mode meanwhile and back in their own modes afterwards, also after an exception.
        batches: mappings of `input_ids` (batch, length) int64, optionally `attention_mask` (batch, length), 1 for real
            tokens, and `labels` (batch, length) int64, -100 for tokens not to score. Without labels the inputs are
            scored. Every other tensor goes to the model as it is, all of them on the device of its first parameter.
            Models with learned absolute positions want padding on the right, or `position_ids`.

    Returns:
        Nats per scored token; the log-softmax is taken in fp32 and summed in fp64.

    Raises:
        IsolateError: without a batch, without a scored token, or where the logits do not line up with the inputs.
    """
    total, tokens, count = _summed(model, batches)
    if count == 0:
        raise IsolateError("no batches to score: pass at least one (an iterator that was used up gives none)")
    if tokens == 0:
        raise IsolateError(
            f"none of the tokens in {count} batches is scored: rows need two real tokens, and labels other than "
            f"{IGNORED} after the first"
        )
    return total / tokens


def summed_loss(model: torch.nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> tuple[float, int]:
    """`token_loss` before it is divided, for a part of the batches: other processes have the others.

    Returns:
        (nats, scored tokens); zeros where there is nothing.
    """
    total, tokens, _ = _summed(model, batches)
    return total, tokens


def _summed(model: torch.nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> tuple[float, int, int]:
    """(nats, scored tokens, batches)."""
    total, tokens, count = 0.0, 0, 0
    # Not inference_mode: its tensors have no version counter, which caches of decoded positions rely on.
    with evaluating(model), torch.no_grad():
        for batch in batches:
            rows, targets = predictions(model, batch, count)
            for part, target in zip(rows.split(_POSITIONS), targets.split(_POSITIONS), strict=True):
                # On the CPU, since not every device has fp64.
                total += F.cross_entropy(part.float(), target, reduction="none").cpu().double().sum().item()
            tokens += len(targets)
            count += 1
    return total, tokens, count


def forgetting(model: torch.nn.Module, base_loss: float, batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
    """Rise of the mean loss per token on general text over the base model's.

    Args:
        model: the tuned model, as `token_loss` wants it.
        base_loss: `token_loss` of the base on the same batches, in nats.
        batches: the held-out general text, as `token_loss` wants it.

    Returns:
        `token_loss(model, batches) - base_loss` in nats per token; above zero the model has forgotten.

    Raises:
        IsolateError: where `base_loss` is not finite, and what `token_loss` raises.
    """
    if not math.isfinite(base_loss):
        raise IsolateError(
            f"base_loss={base_loss} is not finite, so no rise over it can be measured: pass token_loss(base, batches)"
        )
    return token_loss(model, batches) - base_loss


def predictions(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model predicts of a batch where something is to be scored, as `token_loss` says.

    Args:
        model: As for `token_loss`.
        batch: Likewise.
        number: Of the batch, for messages.

    Returns:
        (logits (tokens, vocabulary), their targets (tokens,) int64).

    Raises:
        IsolateError: There are no `input_ids`, or the logits do not line up with them.
    """
    inputs, labels = prepared(model, batch, number)
    logits = model(**inputs).logits
    check_logits(logits, labels)
    return _scored(logits, labels)


def device_of_model(model: torch.nn.Module) -> torch.device:
    """Where the model wants its inputs: with its first parameter, which are the embeddings."""
    return next((device_of(p, module) for _, _, module, p in walk_parameters(model)), torch.device("cpu"))


def prepared(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], number: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """What a model is called with for a batch, as `token_loss` says, and what is scored.

    Args:
        model: As for `token_loss`.
        batch: Likewise.
        number: Of the batch, for messages.

    Returns:
        (arguments, on the model's device; labels (batch, length) int64, -100 where nothing is scored).

    Raises:
        IsolateError: There are no `input_ids`, or labels or mask do not line up with them.
    """
    device = device_of_model(model)
    # A cache of keys and values would only cost memory here; models without this field do not know the argument.
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    if "input_ids" not in inputs:
        raise IsolateError(
            f"batch {number} has no tensor 'input_ids' but {sorted(batch)}: token ids are scored; tokenize the text "
            "first"
        )
    labels = _targets(inputs, number)
    inputs.pop("labels", None)
    return inputs | options, labels


def check_logits(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Raise `IsolateError` unless there is one row of logits for every input token."""
    if logits.shape[:2] != labels.shape:
        raise IsolateError(
            f"logits of shape {tuple(logits.shape)} for input_ids of shape {tuple(labels.shape)}: wanted is one row "
            "of logits for every input token, as a causal language model gives"
        )


def _targets(inputs: Mapping[str, torch.Tensor], number: int) -> torch.Tensor:
    """What each position should have been: labels or inputs, -100 where nothing is scored; (batch, length) int64."""
    ids = inputs["input_ids"]
    labels = inputs.get("labels", ids)
    mask = inputs.get("attention_mask")
    for name, value in (("labels", labels), ("attention_mask", mask)):
        if value is not None and value.shape != ids.shape:
            raise IsolateError(
                f"batch {number}: {name} of shape {tuple(value.shape)} beside input_ids of shape {tuple(ids.shape)}: "
                "give both the same shape (batch, length)"
            )
    if mask is None:
        return labels
    real = mask.bool()
    scored = real.clone()
    # The first real token after padding on the left would be predicted from a pad.
    scored[:, 1:] &= real[:, :-1]
    return labels.masked_fill(~scored, IGNORED)


def _scored(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick the scored positions: logits (tokens, vocabulary) and their targets (tokens,) int64."""
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    return logits[:, :-1][chosen.to(logits.device)], targets[chosen].to(logits.device)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and each back in its own mode: a user may keep some in eval while training."""
    modes: list[tuple[Any, bool]] = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
