"""`W = W0 + Σ α·Δ`, the one place where base and deltas meet: in forward, in backward and in merge.

Why it is built like this:

* **Once, and everywhere the same.** The sum runs in at least fp32, over the adapters in the order they were added, and
  is cast once to W0's dtype. Forward and merge call the same function, so their weights agree bit for bit. Outside the
  support the result has W0's own bits.
* **Nothing kept for backward but the layer's input.** A plain `linear(x, W0 + Δ)` keeps the composed weight of every
  layer, a second model. `linear` composes it again in backward instead. That backward is one opaque operator: in a
  transparent one the compiler finds that forward and backward compute the same sum, and keeps it after all.
* **The gradient is gathered on the support**: for a block of rows only that block's part of the product is computed,
  and at the holes of a dense delta it is exactly zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..errors import IsolateError
from .support import ELEMENTS, ROWS, Support, add_, as_matrix, put, read, take, without_holes, write

# Elements composed at a time on CPU where dtypes differ: the fp32 copy of a chunk stays in the cache. Smaller chunks
# are no faster, and start more parallel loops, which cost dearly where cores are shared (benchmarks/compose.py). A GPU
# kernel converts in registers and takes the tensor in one piece.
CHUNK = 2**20


class Terms(NamedTuple):
    """The numbers that act on one parameter, in the order their adapters were added.

    Attributes:
        deltas: The trained or held numbers, each of its support's `delta_shape`, any floating dtype.
        scales: α of each.
        supports: Where each acts.
        indices: Integer tensors beside the supports that need one, empty beside the others.
        factors: 1 − I of a soft mask, of a shape that multiplies the delta unit by unit; empty where there is none.
        damped: Whether that factor is on the delta, and so on its gradient, too. Else it is on the gradient alone.
        disjoint: No two supports share a scalar, as with a single adapter. Then each is added to its part of W0, and
            no wide copy of the whole is needed.
    """

    deltas: list[torch.Tensor]
    scales: list[float]
    supports: list[Support]
    indices: list[torch.Tensor]
    factors: list[torch.Tensor]
    damped: list[bool]
    disjoint: bool = False

    def flat_supports(self) -> list[int]:
        """The supports as the one list of integers that an operator's schema can carry."""
        return [number for support in self.supports for number in support]

    @classmethod
    def from_flat(
        cls,
        deltas: Sequence[torch.Tensor],
        scales: Sequence[float],
        supports: Sequence[int],
        indices: Sequence[torch.Tensor],
        factors: Sequence[torch.Tensor],
        damped: Sequence[bool],
        disjoint: bool,
    ) -> Terms:
        """The inverse of `flat_supports`, with the rest."""
        width = len(Support._fields)
        unflat = [Support(*supports[i : i + width]) for i in range(0, len(supports), width)]
        return cls(list(deltas), list(scales), unflat, list(indices), list(factors), list(damped), disjoint)


def compose(w0: torch.Tensor, terms: Terms) -> torch.Tensor:
    """The effective weight, differentiable in the deltas; keeps nothing for backward.

    Args:
        w0: The base parameter, any shape and floating dtype. Gets no gradient.
        terms: What is added to it.

    Returns:
        A new tensor of w0's shape and dtype.
    """
    return torch.ops.peft_isolate.compose(
        w0, terms.deltas, terms.scales, terms.flat_supports(), terms.indices, terms.factors, terms.damped,
        terms.disjoint,
    )  # fmt: skip


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
        weight = torch.ops.peft_isolate.compose(w0, deltas, scales, supports, indices, factors, damped, disjoint)
        if cast:
            weight = weight.to(x.dtype)
        if not transposed:
            return F.linear(x, weight, bias)
        # The very call of Conv1D.forward, so that a merged model runs the same kernel on the same shapes.
        flat = x.reshape(-1, x.shape[-1])
        result = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return result.reshape(*x.shape[:-1], weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        x, w0, *tensors = ctx.saved_tensors
        scales, supports, damped, disjoint, transposed, _ = ctx.settings
        deltas, indices, factors = _thirds(tensors)
        needs_x, _, needs_bias, _, *needs = ctx.needs_input_grad
        needs_delta = needs[: len(scales)]
        grad_x, *grad_deltas = torch.ops.peft_isolate.linear_backward(
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


def _thirds(tensors: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], ...]:
    """(deltas, indices, factors)."""
    n = len(tensors) // 3
    return tensors[:n], tensors[n : 2 * n], tensors[2 * n :]


def _compose(w0: torch.Tensor, terms: Terms) -> torch.Tensor:
    if not w0.is_contiguous():
        # Seen flat only by a copy; the result keeps w0's own strides, which choose the kernel (channels_last).
        return torch.empty_like(w0).copy_(_compose(w0.contiguous(), terms))
    wide = torch.promote_types(w0.dtype, torch.float32)
    # α = 0 leaves the term out and α = 1 multiplies nothing: exact at both ends.
    parts = [
        (delta, factor if damped else delta.new_empty(0), scale, support, index)
        for delta, scale, support, index, factor, damped in zip(*terms[:6], strict=True)
        if scale != 0.0
    ]
    if terms.disjoint or len(parts) == 1:
        # Each part in its place. A dense one goes first: the others stand in its holes.
        parts.sort(key=lambda part: not part[3].is_dense)
        if parts and parts[0][3].is_dense:
            delta, factor, scale, support, index = parts.pop(0)
            result = torch.empty_like(w0)
            _add_whole(result, w0, delta, factor, scale, wide)
            if index.numel():
                write(result, Support(ELEMENTS), index, read(w0, Support(ELEMENTS), index, index.shape))
        else:
            result = w0.clone()
        for delta, factor, scale, support, index in parts:
            values = _scaled(delta, factor, scale, wide)
            write(result, support, index, read(w0, support, index, delta.shape).to(wide) + values)
        return result
    total = w0.to(wide, copy=True)
    for delta, factor, scale, support, index in parts:
        add_(total, support, index, _scaled(delta, factor, scale, wide))
    return total.to(w0.dtype)


def _scaled(delta: torch.Tensor, factor: torch.Tensor, scale: float, wide: torch.dtype) -> torch.Tensor:
    """α · (1 − I) · Δ."""
    if factor.numel():
        delta = delta.to(wide) * factor
    return delta if scale == 1.0 else delta.to(wide) * scale


def _add_whole(
    result: torch.Tensor, w0: torch.Tensor, delta: torch.Tensor, factor: torch.Tensor, scale: float, wide: torch.dtype
) -> None:
    """result = cast(wide(w0) + α · (1 − I) · Δ)."""
    on_cpu = w0.device.type == "cpu"
    if scale == 1.0 and torch.result_type(w0, delta) == wide and (w0.dtype == delta.dtype or not on_cpu):
        if not factor.numel():
            torch.add(w0, delta, out=result)
            return
        if w0.dtype == wide == factor.dtype:
            torch.mul(delta, factor, out=result).add_(w0)
            return
    result, w0, delta = as_matrix(result), as_matrix(w0), as_matrix(delta)
    by_rows = factor.numel() and factor.ndim > 1
    factor = factor.reshape(-1, 1) if by_rows else factor
    n_rows = max(1, CHUNK // max(1, w0.shape[1])) if on_cpu else max(1, w0.shape[0])
    for start in range(0, w0.shape[0], n_rows):
        chunk = slice(start, start + n_rows)
        values = _scaled(delta[chunk], factor[chunk] if by_rows else factor, scale, wide)
        result[chunk] = w0[chunk].to(wide) + values


@torch.library.custom_op(
    "peft_isolate::compose",
    mutates_args=(),
    schema="(Tensor w0, Tensor[] deltas, float[] scales, int[] supports, Tensor[] indices, Tensor[] factors, "
    "bool[] damped, bool disjoint) -> Tensor",
)
def _compose_op(w0, deltas, scales, supports, indices, factors, damped, disjoint):
    return _compose(w0, Terms.from_flat(deltas, scales, supports, indices, factors, damped, disjoint))


@_compose_op.register_fake
def _(w0, deltas, scales, supports, indices, factors, damped, disjoint):
    # One tensor without numbers is enough to bring torch here, and would make the result uninitialised memory.
    if w0.device.type != "meta" and any(delta.device.type == "meta" for delta in deltas):
        raise IsolateError(
            "the adapter's numbers are on the meta device, where there are none: they were never loaded, or are "
            "offloaded. Around an offloaded base, load adapters by PeftModel.from_pretrained"
        )
    return torch.empty_like(w0)


def _compose_setup(ctx: Any, inputs, output) -> None:
    _, deltas, scales, supports, indices, factors, _, _ = inputs
    ctx.terms = (
        [(delta.shape, delta.dtype, delta.requires_grad) for delta in deltas],
        scales,
        supports,
        indices,
        factors,
    )


def _compose_backward(ctx: Any, grad):
    deltas, scales, supports, indices, factors = ctx.terms
    unflat = Terms.from_flat([], [], supports, [], [], [], False).supports
    grads: list[torch.Tensor | None] = []
    for (shape, dtype, needed), scale, support, index, factor in zip(
        deltas, scales, unflat, indices, factors, strict=True
    ):
        if not needed:
            grads.append(None)
            continue
        values = without_holes(read(grad, support, index, shape), support, index).to(dtype)
        grads.append((values * factor.to(dtype) if factor.numel() else values) * scale)
    return None, grads, None, None, [None] * len(indices), [None] * len(factors), None, None


torch.library.register_autograd("peft_isolate::compose", _compose_backward, setup_context=_compose_setup)


@torch.library.custom_op(
    "peft_isolate::linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor w0, Tensor[] deltas, float[] scales, int[] supports, Tensor[] indices, "
    "Tensor[] factors, bool[] damped, bool disjoint, bool transposed, bool needs_x, bool[] needs_delta) -> Tensor[]",
)
def _linear_backward(
    grad, x, w0, deltas, scales, supports, indices, factors, damped, disjoint, transposed, needs_x, needs_delta
):
    """Gradients of `linear` by x and by each delta, one empty tensor where none is needed."""
    terms = Terms.from_flat(deltas, scales, supports, indices, factors, damped, disjoint)
    grad, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    grads = [x.new_empty(0)]
    if needs_x:
        weight = _compose(w0, terms).to(grad.dtype)
        grads[0] = (grad @ (weight.T if transposed else weight)).reshape(x.shape).to(x.dtype)
    # The dense gradient is left.T @ right; a support of rows needs those columns of `left` only, one of columns those
    # of `right`.
    left, right = (flat, grad) if transposed else (grad, flat)
    for delta, scale, support, index, factor, needed in zip(*terms[:5], needs_delta, strict=True):
        if not needed:
            grads.append(delta.new_empty(0))
        elif scale == 0.0:
            grads.append(torch.zeros_like(delta))
        else:
            by_units = not support.is_dense and support.axis != ELEMENTS
            a = take(left, support, index) if by_units and support.axis == ROWS else left
            b = take(right, support, index) if by_units and support.axis != ROWS else right
            product = a.T @ b
            if not by_units:
                product = read(product, support, index, delta.shape)
                if support.is_dense and index.numel():
                    put(product, index, 0.0)
            product = product.reshape(delta.shape).to(delta.dtype)
            if factor.numel():
                product = product * factor.to(delta.dtype)
            grads.append(product if scale == 1.0 else product * scale)
    return grads


@_linear_backward.register_fake
def _(grad, x, w0, deltas, scales, supports, indices, factors, damped, disjoint, transposed, needs_x, needs_delta):
    # Contiguous, as the operator's, whatever strides x has.
    return [
        x.new_empty(x.shape if needs_x else 0),
        *(d.new_empty(d.shape if needed else 0) for d, needed in zip(deltas, needs_delta, strict=True)),
    ]
