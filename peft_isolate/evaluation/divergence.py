"""KL(reference ‖ model) per token: how far a model has moved from what it was, on some text.

Two sets of logits are compared, and neither is ever whole in memory: the model runs up to its head, and the head is
applied to a chunk of positions at a time. Where gradients are wanted the chunks are computed again in backward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..deltas.reference import Reference, switches, unwrapped
from ..errors import IsolateError
from ..regions.region import unwrap
from ..regions.tree import head_of, text_config
from .forgetting import IGNORED, check_logits, evaluating, prepared

logger = logging.getLogger(__name__)

# Logits that one chunk has, of each of the two models: 64 MiB in fp32.
_LOGITS = 2**24

Logits = Callable[[torch.Tensor], torch.Tensor]


class Divergence(NamedTuple):
    """What `divergence` found.

    Attributes:
        total: Σ over the scored tokens of KL(reference ‖ model), in nats: a scalar, fp32, with a graph where gradients
            are on.
        tokens: How many were scored.
    """

    total: torch.Tensor
    tokens: int


def positions_at_once(vocabulary: int) -> int:
    """Positions whose logits are in memory together, for a vocabulary of so many tokens."""
    return max(1, _LOGITS // vocabulary)


def divergence(model: nn.Module, batch: Mapping[str, torch.Tensor], reference: Reference) -> Divergence:
    """Σ over scored tokens of KL(reference ‖ model) = Σ_v p(v)·(log p(v) − log q(v)), teacher-forced.

    p is the reference's distribution of the next token, q the model's; the log-softmax is taken in fp32. Which tokens
    are scored is said as for `token_loss`. The reference runs in eval mode and without gradients, the model in the
    modes that it is in.

    Args:
        model: A causal language model of transformers, perhaps inside PEFT, DDP, FSDP2 or `torch.compile` (which is
            passed by: both run uncompiled).
        batch: As for `token_loss`.
        reference: What the model was, see `Reference`. Under FSDP2 no graph of the model may be alive where it keeps a
            copy; elsewhere one only costs memory.

    Raises:
        IsolateError: The batch or the logits are not as `token_loss` wants them; or as `Reference.used` raises.
    """
    if not isinstance(reference, Reference):
        raise IsolateError(
            f"reference={reference!r} is no Reference: make one by Reference.now(model) before training, or "
            "Reference.base(model)"
        )
    outer, inner = getattr(model, "_orig_mod", model), unwrapped(model)
    inputs, labels = prepared(inner, batch, 0)
    scored = labels[:, 1:] != IGNORED
    tokens = int(scored.sum())
    heads = _Heads(model, reference)
    with torch.no_grad(), evaluating(inner), reference.used(model):
        with _tapped(inner, scored, heads.remember) as tap:
            logits = inner(**inputs).logits
        finish = tap.finish(logits)
        if finish is None and tap.taken is not None:
            logits = inner(**inputs).logits
    if finish is None:
        check_logits(logits, labels)
        name = type(unwrap(inner)).__name__
        logger.warning("%s does not tell how its head makes logits: they are whole in memory", name)
        learnt = outer(**inputs).logits
        return Divergence(_KL.apply(learnt[:, :-1][scored], logits[:, :-1][scored]), tokens)
    at_once = positions_at_once(logits.shape[-1])
    with _tapped(inner, scored, lambda hidden: heads.total(hidden, tap.taken, finish, at_once)):
        total = outer(**inputs).loss
    return Divergence(total, tokens)


@contextmanager
def _tapped(model: nn.Module, scored: torch.Tensor, take: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[_Tap]:
    """Within, a forward of the model gives `take(hidden states before the head)` as its `loss`.

    The head itself sees one position, so that the logits are next to nothing. All happens inside the model's own
    forward, where FSDP2 has its weights together, and what is taken leaves it as an output, so that FSDP2 and DDP know
    of it.

    Args:
        model: Out of DDP and `torch.compile`.
        scored: (batch, length − 1) bool, the positions whose prediction is wanted.
        take: Gets (tokens, width).
    """
    head, tap = head_of(model), _Tap(model)
    if head is None:
        yield tap
        return

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if tap.busy or not args or args[0].shape[:2] != (len(scored), scored.shape[1] + 1):
            return None
        tap.busy = True
        try:
            tap.taken = take(args[0][:, :-1][scored])
        finally:
            tap.busy = False
        return (args[0][:, :1], *args[1:])

    def after(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if not tap.busy:
            tap.raw = output

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if tap.taken is not None:
            output.loss = tap.taken
        return output

    hooks = [
        head.register_forward_pre_hook(before), head.register_forward_hook(after),
        model.register_forward_hook(leave, prepend=True),
    ]  # fmt: skip
    try:
        yield tap
    finally:
        for hook in hooks:
            hook.remove()


class _Tap:
    """What `_tapped` found: what was taken before the head, and what that made of the one position."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.busy = False
        self.taken: Any = None
        self.raw: torch.Tensor | None = None

    def finish(self, logits: torch.Tensor) -> Logits | None:
        """What the model does to its head's output to get these logits; None where that is not known."""
        if self.taken is None or self.raw is None or self.raw.shape != logits.shape:
            return None
        off, finish = min(
            ((_distance(finish(self.raw), logits), finish) for finish in _finishes(text_config(self._model))),
            key=lambda found: found[0],
        )
        return finish if off <= 4 * torch.finfo(self.raw.dtype).eps else None


def _distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """How far apart two tensors are, beside their largest number; −inf is as far from −inf as 0 from 0."""
    a, b = mine.float(), theirs.float()
    largest = b[b.isfinite()].abs().max().clamp_min(1e-30) if b.isfinite().any() else b.new_ones(())
    return (torch.where(a == b, 0.0, a - b).abs().max() / largest).item()


def _finishes(config: Any) -> Iterator[Logits]:
    """What models are known to do to their head's output; which one does is found by trying."""
    yield lambda raw: raw
    for name in ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier"):
        if isinstance(scale := getattr(config, name, None), int | float) and scale:
            yield lambda raw, scale=scale: raw * scale  # type: ignore[misc]
            yield lambda raw, scale=scale: raw / scale  # type: ignore[misc]
    if cap := getattr(config, "final_logit_softcapping", None):
        yield lambda raw: torch.tanh(raw / cap) * cap


class _Heads:
    """The head as the model has it and as the reference had it, on a chunk of positions at a time."""

    def __init__(self, model: nn.Module, reference: Reference) -> None:
        self._model, self._reference = model, reference
        self._head = self._theirs = head_of(unwrapped(model))
        self._kept: dict[str, torch.Tensor] = {}

    def remember(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the reference has before its head; called while the model computes as the reference.

        Its head is needed again while the model computes as itself, in forward and in backward, where numbers cannot
        be exchanged: of a head that has other numbers by then, a copy is kept until the chunks are done. It is another
        module than the model's where PEFT has saved one around it whole.
        """
        self._theirs = head_of(unwrapped(self._model))
        if self._reference.n_bytes:
            learning = ((name, p) for name, p in self._theirs.named_parameters() if p.requires_grad)
            self._kept = {name: parameter.detach().clone() for name, parameter in learning}
        return hidden

    def total(self, learnt: torch.Tensor, taught: torch.Tensor, finish: Logits, n: int) -> torch.Tensor:
        """Σ KL over hidden states (tokens, width) of the model and of the reference, n at once: a scalar, fp32."""
        total = torch.zeros((), device=learnt.device)
        for mine, theirs in zip(learnt.split(n), taught.split(n), strict=True):
            if torch.is_grad_enabled() and len(learnt) > n:
                total = total + checkpoint(self._of_chunk, mine, theirs, finish, use_reentrant=False)
            else:
                total = total + self._of_chunk(mine, theirs, finish)
        return total

    def _of_chunk(self, learnt: torch.Tensor, taught: torch.Tensor, finish: Logits) -> torch.Tensor:
        # The model's first: where FSDP2 shards the head together with the final norm, the first call ends their pass
        # and the second begins another. If that had a gradient, the norm's weight would be freed before its backward.
        mine = finish(self._head(learnt))
        # To leave adapters out the whole model is walked through: not for each chunk of a head that has none.
        left_out = self._reference.left_out(self._model) if switches(self._theirs) else nullcontext()
        with torch.no_grad(), evaluating(self._theirs), left_out:
            theirs = finish(torch.func.functional_call(self._theirs, self._kept, (taught,)))
        total: torch.Tensor = _KL.apply(mine, theirs)
        return total


class _KL(torch.autograd.Function):
    """Σ KL of logits (tokens, vocabulary) of the model from the reference's: a scalar, fp32.

    For backward the gradient itself is kept, q − p, where autograd would keep four tensors of that size.
    """

    @staticmethod
    def forward(ctx: Any, learnt: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        p, q = (F.log_softmax(logits.float(), dim=-1) for logits in (taught, learnt))
        ratio = p - q
        p.exp_()
        # Where the reference rules a token out, by −inf, it adds nothing, whatever q is.
        total = ratio.mul_(p).masked_fill_(p == 0, 0.0).sum()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(q.exp_().sub_(p))
            ctx.dtype = learnt.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (difference,) = ctx.saved_tensors
        return (difference * grad).to(ctx.dtype), None
