"""Composing in place, some rows at a time, gives the bits of composing at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_isolate.deltas.compose import compose
from peft_isolate.deltas.delta import Delta
from peft_isolate.deltas.in_place import compose_in_place
from peft_isolate.deltas.soft_mask import SoftMask, units_on
from peft_isolate.deltas.terms import Part
from peft_isolate.regions.selection import KINDS, Selection, strided
from tests.compare import bits

SHAPES = [(7,), (9, 5), (3, 4, 6), (1, 8), (8, 1)]


def selection(kind: str, shape: tuple[int, ...], seed: int) -> Selection:
    whole = Selection.whole(shape)
    if kind == "whole":
        return whole
    size = {"rows": whole.matrix_shape[0], "columns": whole.matrix_shape[1]}.get(kind, whole.numel)
    units = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: max(1, size // 2)]
    return getattr(Selection, kind)(shape, units.sort().values)


def filled(trained: Selection, mask: SoftMask | None = None, seed: int = 0, held: Selection | None = None) -> Delta:
    delta = Delta(trained, held, torch.empty(0), mask=mask)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for numbers in delta.parameters():
            numbers.copy_(torch.randn(numbers.shape, generator=generator))
    return delta


def assert_same(w0: torch.Tensor, deltas: list[Delta], scales: list[float], scalars: int) -> None:
    parts = [(part, scale) for delta, scale in zip(deltas, scales, strict=True) for part in delta.parts()]
    args = [part for part, _ in parts], [scale for _, scale in parts]
    disjoint = len(deltas) == 1
    wanted = compose(w0, Part.terms(*args, disjoint=disjoint))
    found = w0.clone()
    compose_in_place(found, *args, disjoint=disjoint, scalars=scalars)
    assert torch.equal(bits(found), bits(wanted))


@settings(deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([1.0, 0.5, -2.0])), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(1, 60),
    st.integers(0, 9),
)
def test_the_same_bits_in_any_number_of_rows(shape, kinds, dtype, scalars, seed):
    """One adapter or several, of any kind of selection, any dtype, cut anywhere."""
    w0 = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    deltas = [filled(selection(kind, shape, seed + i), seed=i) for i, (kind, _) in enumerate(kinds)]
    assert_same(w0, deltas, [scale for _, scale in kinds], scalars)


@pytest.mark.parametrize("damps", ["update", "gradient"])
@pytest.mark.parametrize(
    ("kind", "axis"), [("whole", "rows"), ("whole", "columns"), ("rows", "rows"), ("columns", "columns")]
)
@pytest.mark.parametrize("scalars", [1, 12, 1000])
def test_soft_masks_are_cut_with_their_rows(kind, axis, damps, scalars):
    """The factor of a unit stays with the unit."""
    chosen = selection(kind, (9, 5), 3)
    count = units_on(chosen, axis)
    assert count is not None
    mask = SoftMask(axis, damps, count, torch.rand(count))
    assert_same(torch.randn(9, 5), [filled(chosen, mask)], [1.0], scalars)


def test_interleaved_rows_and_what_is_held():
    """Regular blocks of rows, as of one head each, beside held numbers on the others."""
    q = Selection.rows((12, 4), strided(0, 2, 6, 2))
    k = Selection.rows((12, 4), strided(2, 2, 6, 2))
    for scalars in (1, 8, 20, 100):
        assert_same(torch.randn(12, 4).bfloat16(), [filled(q, held=k)], [1.0], scalars)
