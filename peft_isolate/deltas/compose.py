"""`W = W0 + Σ α·Δ`, the one place where base and deltas meet: in forward, in backward and in merge.

The sum runs in at least fp32, over the adapters in the order they were added, and is cast once to W0's dtype. Forward
and merge call the same function, so their weights agree bit for bit. Outside the support the result has W0's own bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..errors import IsolateError
from .support import ELEMENTS, Support, add_, as_matrix, read, without_holes, write
from .terms import Part, Terms

# Elements composed at a time where dtypes differ: no fp32 copy of a narrower weight is ever whole. On the CPU the copy
# of a chunk stays in the cache; smaller chunks are no faster, and start more parallel loops, which cost dearly where
# cores are shared (benchmarks/compose.py). A GPU wants larger ones, and where a kernel converts in registers, none.
CHUNK = 2**20
CHUNK_GPU = 2**24


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


@torch.no_grad()
def compose_into(result: torch.Tensor, w0: torch.Tensor, terms: Terms) -> torch.Tensor:
    """`compose` without a gradient, into memory that is there: `result`, of w0's shape and dtype, not w0 itself."""
    if not (w0.is_contiguous() and result.is_contiguous()):
        # Seen flat only by a copy; the result keeps its own strides.
        w0 = w0.contiguous()
        return result.copy_(compose_into(torch.empty_like(w0), w0, terms))
    wide = torch.promote_types(w0.dtype, torch.float32)
    parts = terms.parts()
    if terms.disjoint or len(parts) == 1:
        _put_each(result, w0, parts, wide)
    elif w0.dtype == wide:
        _add_each(result.copy_(w0), parts, wide)
    elif w0.numel() <= _chunk(w0):
        _add_each(total := w0.to(wide), parts, wide)
        result.copy_(total)
    else:
        for rows, of_rows in _chunks(w0, parts):
            total = as_matrix(w0)[rows].to(wide)
            _add_each(total, of_rows, wide)
            as_matrix(result)[rows] = total
    return result


def check_here(w0: torch.Tensor, deltas: Iterable[torch.Tensor]) -> None:
    """Raise `IsolateError` where W0 has numbers and a delta has none."""
    if not w0.is_meta and any(delta.is_meta for delta in deltas):
        raise IsolateError(
            "the adapter's numbers are on the meta device, where there are none: they were never loaded, or are "
            "offloaded. Around an offloaded base, load adapters by PeftModel.from_pretrained"
        )


def _put_each(result: torch.Tensor, w0: torch.Tensor, parts: list[tuple[Part, float]], wide: torch.dtype) -> None:
    """Each part in its place, where no two share a scalar."""
    # A dense one goes first: the others stand in its holes.
    parts = sorted(parts, key=lambda part: not part[0].support.is_dense)
    if parts and parts[0][0].support.is_dense:
        part, scale = parts.pop(0)
        _put_whole(result, w0, part, scale, wide)
        if part.at.numel():
            write(result, Support(ELEMENTS), part.at, read(w0, Support(ELEMENTS), part.at, part.at.shape))
    else:
        result.copy_(w0)
    for part, scale in parts:
        values = part.values(scale, wide)
        if part.support.axis == ELEMENTS and w0.dtype == wide == values.dtype:
            add_(result, part.support, part.at, values)
        else:
            of_w0 = read(w0, part.support, part.at, part.numbers.shape)
            write(result, part.support, part.at, of_w0.to(wide) + values)


def _add_each(total: torch.Tensor, parts: list[tuple[Part, float]], wide: torch.dtype) -> None:
    for part, scale in parts:
        add_(total, part.support, part.at, part.values(scale, wide))


def _put_whole(result: torch.Tensor, w0: torch.Tensor, part: Part, scale: float, wide: torch.dtype) -> None:
    """result = cast(wide(w0) + α · (1 − I) · Δ), also at holes."""
    on_cpu = w0.device.type == "cpu"
    delta, factor = part.numbers, part.factor
    damped = part.damped and factor.numel()
    if scale == 1.0 and torch.result_type(w0, delta) == wide and (w0.dtype == delta.dtype or not on_cpu):
        if not damped:
            torch.add(w0, delta, out=result)
            return
        if w0.dtype == wide == factor.dtype:
            torch.mul(delta, factor, out=result).add_(w0)
            return
    for rows, ((of_rows, _),) in _chunks(w0, [(part._replace(at=part.at[:0]), scale)]):
        as_matrix(result)[rows] = as_matrix(w0)[rows].to(wide) + of_rows.values(scale, wide)


def _chunks(w0: torch.Tensor, parts: list[tuple[Part, float]]) -> Iterator[tuple[slice, list[tuple[Part, float]]]]:
    """Some rows of the tensor seen as a matrix, and what the parts have for these."""
    n_rows, n_columns = as_matrix(w0).shape
    step = max(1, _chunk(w0) // max(1, n_columns))
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        yield slice(start, stop), [(part.rows(start, stop, n_columns), scale) for part, scale in parts]


def _chunk(w0: torch.Tensor) -> int:
    return CHUNK if w0.device.type == "cpu" else CHUNK_GPU


@torch.library.custom_op(
    "peft_isolate::compose",
    mutates_args=(),
    schema="(Tensor w0, Tensor[] deltas, float[] scales, int[] supports, Tensor[] indices, Tensor[] factors, "
    "bool[] damped, bool disjoint) -> Tensor",
)
def _compose(w0, deltas, scales, supports, indices, factors, damped, disjoint):
    terms = Terms.from_flat(deltas, scales, supports, indices, factors, damped, disjoint)
    # Of w0's own strides, which choose the kernel (channels_last).
    return compose_into(torch.empty_like(w0), w0, terms)


@_compose.register_fake
def _(w0, deltas, scales, supports, indices, factors, damped, disjoint):
    # One tensor without numbers is enough to bring torch here, and would make the result uninitialised memory.
    check_here(w0, deltas)
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
