"""Text that a model writes itself: what it was before training, in its own words."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ...deltas.reference import Reference
from ...errors import IsolateError
from ...evaluation.randomness import seed_torch
from ...evaluation.scorers import undisturbed
from .config import AnchorConfig
from .vocabulary import Vocabulary

logger = logging.getLogger(__name__)

# Rows that are sampled together: with the keys and values of a 7B model, 256 tokens of each take 4 GiB.
_AT_ONCE = 32

T = TypeVar("T")


def sampled(
    config: AnchorConfig,
    model: nn.Module,
    inner: Any,
    vocabulary: Vocabulary,
    reference: Reference,
    first: Callable[[int], torch.Tensor],
) -> list[torch.Tensor]:
    """Rows of text sampled from the reference, each until a token ends it or it has `max_length` tokens.

    The model's modes, settings and all random states are as they were afterwards.

    Args:
        config: How many rows, how long, at which temperature, with which seed.
        model: What the reference was made of.
        inner: The model without any wrapper.
        vocabulary: Of the model.
        reference: To sample from.
        first: Of a row's number, (1,) int64: its first token, where texts begin with none of their own.

    Returns:
        Rows of token ids, int64, with at least two each.

    Raises:
        IsolateError: The model cannot generate, is sharded, or its logits are not finite, or not so any more over
            the temperature.
    """
    _check_can_generate(inner)
    logger.info("sampling %d rows of at most %d tokens from the reference", config.n_rows, config.max_length)
    begin = torch.tensor(vocabulary.begin, dtype=torch.int64, device="cpu")
    rows: list[torch.Tensor] = []
    with undisturbed(inner), torch.no_grad(), reference.used(model), _settings(inner, config, vocabulary) as settings:
        seed_torch(inner, config.seed)
        for start in range(0, config.n_rows, _AT_ONCE):
            numbers = range(start, min(start + _AT_ONCE, config.n_rows))
            prompts = torch.stack([begin if len(begin) else first(number) for number in numbers])
            prompts = prompts.to(next(inner.parameters()).device)
            if not start:
                _check_finite(inner, prompts, float(config.temperature))
            made = inner.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=settings
            ).cpu()
            rows += [_ended(row, prompts.shape[1], vocabulary.ends) for row in made]
    return rows


def by_process_0(make: Callable[[], T]) -> T:
    """What the first process makes, on every process. All of them must call it.

    Raises:
        IsolateError: The first process failed: there with its own error, on the others with this one.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return make()
    told: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            told[0] = make()
        except Exception as error:  # whatever it is: the others wait to be told
            failure, told[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(told)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise IsolateError(f"the first process, which makes the anchor text for all, could not: {told[1]}")
    result: T = told[0]
    return result


def _check_can_generate(inner: Any) -> None:
    can = getattr(inner, "can_generate", None)
    if can is None or not can():
        raise IsolateError(
            f'{type(inner).__name__} cannot generate, so it cannot write its own anchor text: use source="random", or '
            "text of yours"
        )
    if any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in inner.parameters()):
        raise IsolateError(
            "the model is sharded, and one process alone cannot sample from it: make the anchor text before the model "
            "is wrapped, or load what was saved"
        )


def _check_finite(inner: Any, prompts: torch.Tensor, temperature: float) -> None:
    # Before sampling, which on an accelerator would end the process.
    logits = inner(input_ids=prompts).logits
    if not logits.isfinite().all():
        raise IsolateError(
            "the reference's logits are not finite, so nothing can be sampled from it: see what was loaded, or use "
            'source="random"'
        )
    # In fp32 as `generate` divides them, where a small temperature may itself be 0.
    if not (logits[:, -1].float() / temperature).isfinite().all():
        raise IsolateError(
            f"temperature={temperature!r} is too small: the reference's logits over it are not finite; use a larger "
            "one, such as 0.01, which all but always takes the most likely token"
        )


@contextmanager
def _settings(inner: Any, config: AnchorConfig, vocabulary: Vocabulary) -> Iterator[Any]:
    """Plain sampling, whatever the model's own settings are: `generate` would take from them what is left open."""
    from transformers import GenerationConfig

    ends = list(vocabulary.ends) or None
    settings = GenerationConfig(
        do_sample=True, temperature=float(config.temperature), top_k=0, top_p=1.0, num_beams=1, use_cache=True,
        max_length=config.max_length, eos_token_id=ends, pad_token_id=ends[0] if ends else None,
    )  # fmt: skip
    own = inner.generation_config
    inner.generation_config = settings
    try:
        yield settings
    finally:
        inner.generation_config = own


def _ended(row: torch.Tensor, begun: int, ends: tuple[int, ...]) -> torch.Tensor:
    """A row up to the token that ends it; the rest is padding. Before `begun` is what the text began with."""
    found = torch.isin(row[begun:], torch.tensor(ends, dtype=row.dtype, device="cpu")).nonzero()
    return row[: begun + int(found[0]) + 1] if len(found) else row
