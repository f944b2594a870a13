"""The gradient of single elements of a weight: gathered from the dense one, or computed for them alone.

The dense gradient of `x @ W.T` is one product of matrices, of which a delta by elements needs a few scalars. Computing
only those (`torch.sparse.sampled_addmm`, a scalar product of two columns for each) does less work less efficiently:
where it wins depends on the density, the dtype, the number of tokens and the machine (benchmarks/gradient.py). So the
first time that a case is met both are timed, and the faster one serves from then on. Neither is seen in the file, the
names or the optimizer's state. They sum in different orders, so a run that chose the other one differs in the last
bits; `torch.use_deterministic_algorithms(True)` and `by_rule` choose by a rule instead, the same on every machine.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import warnings
from collections.abc import Callable, Iterator

import torch

from .scratch import scratch_like

logger = logging.getLogger(__name__)

# Multiplications of the dense gradient below which it takes less time than a second choice is worth: some 0.2 ms.
SMALL = 2**24

# Of the rule: below it samples win on the CPU in fp32, with room to spare (benchmarks/gradient.py); elsewhere the rule
# has none.
RULE_DENSITY = 0.1

# Scalars between rows that would lie whole pages apart, in bytes.
PADDING = 16
PAGE = 4096

TRIES = 3

_by_rule = False

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def of_elements(left: torch.Tensor, right: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`(left.T @ right).flatten()[positions]`, by whichever way is faster.

    Args:
        left: (tokens, rows), any floating dtype.
        right: (tokens, columns), of left's dtype.
        positions: int32 or int64 (count,), sorted and unique flat positions in (rows, columns).

    Returns:
        (count,) in left's dtype or, where it was computed there, in fp32.
    """
    tokens, n_rows = left.shape
    if not positions.numel() or tokens * n_rows * right.shape[1] < SMALL:
        return by_product(left, right, positions)
    traced = type(left) is not torch.Tensor  # what a tracer puts in its place has no speed
    if _by_rule or traced or torch.are_deterministic_algorithms_enabled():
        wide = left.device.type == "cpu" and left.dtype in (torch.float32, torch.float64)
        sparse = positions.numel() < RULE_DENSITY * n_rows * right.shape[1]
        return (by_samples if wide and sparse else by_product)(left, right, positions)
    # Batches of other lengths and layers of a like density need no probe of their own.
    case = (left.device, left.dtype, n_rows, right.shape[1], tokens.bit_length(), positions.numel().bit_length())
    if case not in _chosen:
        if left.is_cuda and torch.cuda.is_current_stream_capturing():
            return by_product(left, right, positions)
        _chosen[case] = _faster(left, right, positions)
    return _chosen[case](left, right, positions)


@contextlib.contextmanager
def by_rule() -> Iterator[None]:
    """Within, no clock decides: the same run gives the same bits again."""
    global _by_rule
    before, _by_rule = _by_rule, True
    try:
        yield
    finally:
        _by_rule = before


def by_product(left: torch.Tensor, right: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """From the dense gradient."""
    product = scratch_like(left, (left.shape[1], right.shape[1]))
    torch.mm(left.T, right, out=product)
    return product.view(-1).index_select(0, positions)


def by_samples(left: torch.Tensor, right: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """For the elements alone."""
    _quiet()
    n_rows, n_columns = left.shape[1], right.shape[1]
    wide = torch.promote_types(left.dtype, torch.float32)
    starts = torch.arange(n_rows + 1, device=positions.device) * n_columns
    found = torch.sparse_csr_tensor(
        torch.searchsorted(positions, starts.to(positions.dtype), out_int32=True),
        (positions % n_columns).int(),
        torch.zeros(positions.numel(), dtype=wide, device=left.device),
        (n_rows, n_columns),
        check_invariants=False,
    )
    # The kernel wants both factors by features. Of so many tokens at a time they, and what it takes to turn them, are
    # no larger than the weight, whose buffer is free by now.
    step = max(1, n_rows * n_columns // (n_rows + n_columns + max(n_rows, n_columns) + PADDING))
    for start in range(0, left.shape[0], step):
        chunk = slice(start, start + step)
        a, b = _by_features(left[chunk], right[chunk], wide)
        torch.sparse.sampled_addmm(found, a, b.T, out=found)
    return found.values()


def _by_features(left: torch.Tensor, right: torch.Tensor, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """left.T and right.T, contiguous, in the dtype `wide`; in the shared buffer where there is one."""
    pair = (left, right)
    tokens, widest = left.shape[0], max(t.shape[1] for t in pair) + PADDING
    sizes = [t.numel() for t in pair]
    *homes, aside = scratch_like(left, (sum(sizes) + tokens * widest,), wide).split([*sizes, tokens * widest])
    turned = []
    for t, home in zip(pair, homes, strict=True):
        if t.device.type == "cpu" and t.shape[1] * t.element_size() % PAGE == 0:
            # Rows whole pages apart push one another out of the cache, and would take twice as long to turn.
            t = aside.view(tokens, widest)[:, : t.shape[1]].copy_(t)
        turned.append(home.view(t.shape[1], tokens).copy_(t.T))
    return turned[0], turned[1]


@functools.cache
def _quiet() -> None:
    """torch says once that its CSR tensors are in beta, which is no news to whoever trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), device="cpu", check_invariants=False)


_chosen: dict[tuple[object, ...], Way] = {}
"""{case: the faster way}, as measured in this process."""


def _faster(left: torch.Tensor, right: torch.Tensor, positions: torch.Tensor) -> Way:
    seconds = {}
    for way in (by_product, by_samples):
        try:
            seconds[way] = min(_seconds(functools.partial(way, left, right, positions)) for _ in range(TRIES))
        except RuntimeError as error:  # no kernel for this device and dtype, or no memory for it
            logger.debug("%s: %s", way.__name__, error)
    best = min(seconds, key=seconds.__getitem__, default=by_product)
    logger.debug(
        "gradient of %d of %s scalars (%s, %d tokens): %s", positions.numel(), (left.shape[1], right.shape[1]),
        left.dtype, left.shape[0], {way.__name__: seconds[way] for way in seconds},
    )  # fmt: skip
    return best


def _seconds(run: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
