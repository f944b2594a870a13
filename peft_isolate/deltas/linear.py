"""A linear layer with a composed weight, `x @ (W0 + Σ α·Δ).T + b`, and its gradient.

Why it is built like this:

* **Nothing kept for backward but the layer's input.** A plain `linear(x, W0 + Δ)` keeps the composed weight of every
  layer, a second model. Here it is composed in a buffer that all layers share, and again in backward. That backward is
  one opaque operator to a compiler: in a transparent one it finds that forward and backward compute the same sum, and
  keeps it after all.
* **The gradient is gathered on the support**: for a block of rows only that block's part of the product is computed,
  for single elements only what they need, and at the holes of a dense delta it is exactly zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import gradient
from .compose import check_here, compose, compose_into
from .scratch import scratch_like
from .support import ELEMENTS, ROWS, put, take
from .terms import Terms


def linear(
    x: torch.Tensor, w0: torch.Tensor, bias: torch.Tensor | None, terms: Terms, *, transposed: bool = False
) -> torch.Tensor:
    """`x @ compose(w0, terms).T + bias`, keeping nothing for backward but x.

    Args:
        x: (..., in_features). Under autocast it is cast first, as `torch.nn.functional.linear` would cast it.
        w0: (out_features, in_features), or the other way round where `transposed`.
        bias: (out_features,), differentiable, or None.
        terms: The deltas on w0.
        transposed: The weight is stored as a `transformers.pytorch_utils.Conv1D` stores it.

    Returns:
        (..., out_features).
    """
    cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    if cast:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    learns = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, bias, *terms.deltas)
    )  # fmt: skip
    if not (learns or _watched()):
        return _apply(x, _weight(w0, terms, x.dtype if cast else w0.dtype), bias, transposed)
    settings = (
        tuple(terms.scales), tuple(terms.flat_supports()), tuple(terms.damped), terms.disjoint, transposed, cast,
    )  # fmt: skip
    return _Linear.apply(x, w0, bias, settings, *terms.deltas, *terms.indices, *terms.factors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args):
        # All in one `args`: where nothing needs a gradient, the compiler counts these names to tell whether there is a
        # `ctx`, and miscounts beside others.
        x, w0, bias, settings, *tensors = args
        scales, supports, damped, disjoint, transposed, cast = settings
        deltas, indices, factors = _thirds(tensors)
        ctx.save_for_backward(x, w0, *tensors)
        ctx.settings = settings
        ctx.has_bias = bias is not None
        terms = Terms.from_flat(deltas, scales, supports, indices, factors, damped, disjoint)
        if _watched():
            weight = compose(w0, terms)
            weight = weight.to(x.dtype) if cast else weight
        else:
            weight = _weight(w0, terms, x.dtype if cast else w0.dtype)
        return _apply(x, weight, bias, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        x, w0, *tensors = ctx.saved_tensors
        scales, supports, damped, disjoint, transposed, _ = ctx.settings
        deltas, indices, factors = _thirds(tensors)
        needs_x, _, needs_bias, _, *needs = ctx.needs_input_grad
        needs_delta = needs[: len(scales)]
        # Going through the dispatcher takes as long as all of a small layer's arithmetic.
        backward = torch.ops.peft_isolate.linear_backward if _watched() else _linear_backward
        grad_x, *grad_deltas = backward(
            grad, x, w0, deltas, scales, supports, indices, factors, damped, disjoint, transposed, needs_x, needs_delta
        )
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias and needs_bias else None
        return (
            grad_x if needs_x else None,
            None,
            grad_bias,
            None,
            *(g if needed else None for g, needed in zip(grad_deltas, needs_delta, strict=True)),
            *(None for _ in (*indices, *factors)),
        )


def _watched() -> bool:
    """Whether someone compiles, traces or keeps operators: then composing is one, whatever it is made of."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def _thirds(tensors: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], ...]:
    """(deltas, indices, factors)."""
    n = len(tensors) // 3
    return tensors[:n], tensors[n : 2 * n], tensors[2 * n :]


def _apply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    # The very call of Conv1D.forward, so that a merged model runs the same kernel on the same shapes.
    flat = x.reshape(-1, x.shape[-1])
    result = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return result.reshape(*x.shape[:-1], weight.shape[1])


def _weight(w0: torch.Tensor, terms: Terms, dtype: torch.dtype) -> torch.Tensor:
    """The composed weight in this dtype, to be used before anything else is composed."""
    check_here(w0, terms.deltas)
    weight = compose_into(scratch_like(w0), w0, terms)
    return weight if dtype == weight.dtype else scratch_like(w0, dtype=dtype).copy_(weight)


def _linear_backward(
    grad, x, w0, deltas, scales, supports, indices, factors, damped, disjoint, transposed, needs_x, needs_delta
):
    """Gradients of `linear` by x and by each delta, one empty tensor where none is needed."""
    terms = Terms.from_flat(deltas, scales, supports, indices, factors, damped, disjoint)
    grad, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    grads = [x.new_empty(0)]
    if needs_x:
        weight = _weight(w0, terms, grad.dtype)
        grads[0] = (grad @ (weight.T if transposed else weight)).reshape(x.shape).to(x.dtype)
    # The dense gradient is left.T @ right; a support of rows needs those columns of `left` only, one of columns those
    # of `right`.
    left, right = (flat, grad) if transposed else (grad, flat)
    for delta, scale, support, index, factor, needed in zip(*terms[:5], needs_delta, strict=True):
        if not needed:
            grads.append(delta.new_empty(0))
            continue
        if scale == 0.0:
            grads.append(torch.zeros_like(delta))
            continue
        if support.axis == ELEMENTS:
            found = gradient.of_elements(left, right, index)
        elif support.is_dense:
            found = left.T @ right
            if index.numel():
                put(found, index, 0.0)
        else:
            by_rows = support.axis == ROWS
            a = take(left, support, index) if by_rows else left
            b = right if by_rows else take(right, support, index)
            found = a.T @ b
        found = found.reshape(delta.shape).to(delta.dtype)
        if factor.numel():
            found *= factor.to(delta.dtype)
        if scale != 1.0:
            found *= scale
        grads.append(found)
    return grads


_linear_backward_op = torch.library.custom_op(
    "peft_isolate::linear_backward",
    _linear_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor w0, Tensor[] deltas, float[] scales, int[] supports, Tensor[] indices, "
    "Tensor[] factors, bool[] damped, bool disjoint, bool transposed, bool needs_x, bool[] needs_delta) -> Tensor[]",
)


@_linear_backward_op.register_fake
def _(grad, x, w0, deltas, scales, supports, indices, factors, damped, disjoint, transposed, needs_x, needs_delta):
    # Contiguous, as the operator's, whatever strides x has.
    return [
        x.new_empty(x.shape if needs_x else 0),
        *(d.new_empty(d.shape if needed else 0) for d, needed in zip(deltas, needs_delta, strict=True)),
    ]
