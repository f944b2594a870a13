"""Deltas damped unit by unit: against slow, obvious twins; and what is kept for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_isolate.deltas import compose as module
from peft_isolate.deltas.compose import compose
from peft_isolate.deltas.delta import Delta
from peft_isolate.deltas.linear import linear
from peft_isolate.deltas.soft_mask import SoftMask, units_on
from peft_isolate.deltas.terms import Terms
from peft_isolate.errors import FormatError
from peft_isolate.regions import Selection
from tests.deltas.test_compose import DTYPES, kept_bytes, make_terms


@st.composite
def damped_cases(draw, shapes=((6, 4), (1, 5), (7,), (2, 3, 4), (9, 1))):
    """(shape, selections, soft mask of each or None): whole, or some units of the axis that the mask is on."""
    shape = draw(st.sampled_from(shapes))
    selections, masks = [], []
    for _ in range(draw(st.integers(1, 3))):
        axis = "columns" if len(shape) == 1 else draw(st.sampled_from(["rows", "columns"]))
        size = Selection.whole(shape).matrix_shape[0 if axis == "rows" else 1]
        units = draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size).map(sorted))
        selection = draw(st.sampled_from([Selection.whole(shape), getattr(Selection, axis)(shape, units)]))
        n_units = units_on(selection, axis)
        values = draw(st.lists(st.sampled_from([0.0, 0.25, 0.7, 1.0]), min_size=n_units, max_size=n_units))
        damps = draw(st.sampled_from(["update", "gradient", None]))
        selections.append(selection)
        masks.append(damps and SoftMask(axis, damps, n_units, torch.tensor(values)))
    return shape, selections, masks


def damped_terms(selections, masks, *args, **kwargs) -> Terms:
    terms = make_terms(selections, *args, **kwargs)
    factors = [
        torch.empty(0) if mask is None else mask.factor(mask.importance, delta.shape)
        for mask, delta in zip(masks, terms.deltas, strict=True)
    ]
    return terms._replace(factors=factors, damped=[mask is not None and mask.damps == "update" for mask in masks])


def unit_factors(selection: Selection, mask: SoftMask | None) -> torch.Tensor:
    """1 − I of every selected scalar, one by one, in the order of their positions."""
    if mask is None:
        return torch.ones(selection.count)
    n_columns = selection.matrix_shape[1]
    units = sorted({p // n_columns if mask.axis == "rows" else p % n_columns for p in selection.positions().tolist()})
    place = {unit: i for i, unit in enumerate(units)}
    of_scalar = (p // n_columns if mask.axis == "rows" else p % n_columns for p in selection.positions().tolist())
    return torch.stack([1.0 - mask.importance[place[unit]] for unit in of_scalar])


@settings(max_examples=150, deadline=None)
@given(damped_cases(), st.sampled_from(DTYPES), st.sampled_from([1, 5, 2**20]), st.booleans(), st.data())
def test_compose_is_its_twin_bit_for_bit(case, dtype, chunk, alone, data):
    """W0 + α·(1 − I)·Δ scalar by scalar, for "update"; "gradient" is not seen forward."""
    shape, selections, masks = case
    if alone:
        selections, masks = selections[:1], masks[:1]
    scales = [data.draw(st.sampled_from([1.0, 0.0, 0.3])) for _ in selections]
    w0, terms = torch.randn(shape).to(dtype), damped_terms(selections, masks, scales)
    wide = torch.promote_types(dtype, torch.float32)
    total = w0.to(wide, copy=True).flatten()
    for selection, mask, delta, scale in zip(selections, masks, terms.deltas, scales, strict=True):
        factors = unit_factors(selection, mask if mask is not None and mask.damps == "update" else None)
        for position, value, factor in zip(selection.positions().tolist(), delta.flatten(), factors, strict=True):
            damped = value.to(wide) * factor
            total[position] = total[position] + (damped if scale == 1.0 else damped * scale)
    original, module.CHUNK = module.CHUNK, chunk
    try:
        composed = compose(w0, terms._replace(disjoint=alone))
    finally:
        module.CHUNK = original
    assert torch.equal(composed, total.to(dtype).reshape(shape))


@settings(max_examples=80, deadline=None)
@given(damped_cases(shapes=((6, 4), (9, 3))), st.booleans())
def test_gradients_are_those_of_the_formula(case, transposed):
    """∂L/∂Δ = (1 − I)·∂L/∂W for both; through `linear` and through `compose`."""
    shape, selections, masks = case
    w0 = torch.randn(shape, dtype=torch.float64)
    n_in, n_out = shape if transposed else shape[::-1]
    x, upstream = torch.randn(5, n_in, dtype=torch.float64), torch.randn(5, n_out, dtype=torch.float64)
    scales = [1.0, 0.5, -1.5][: len(selections)]
    terms = damped_terms(selections, masks, scales, [torch.float64] * len(selections), requires_grad=True)
    of_weight = (x.T @ upstream) if transposed else (upstream.T @ x)
    through_linear = torch.autograd.grad(linear(x, w0, None, terms, transposed=transposed), terms.deltas, upstream)
    through_compose = torch.autograd.grad(compose(w0, terms), terms.deltas, of_weight)
    for i, (selection, mask) in enumerate(zip(selections, masks, strict=True)):
        wanted = of_weight.flatten()[selection.positions()] * unit_factors(selection, mask) * scales[i]
        for gradient in (through_linear[i], through_compose[i]):
            torch.testing.assert_close(gradient.flatten(), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("damps", ["update", "gradient"])
def test_nothing_is_kept_for_backward_but_the_input(damps, compiled):
    """A damped delta computed outside the operator would be kept: a second copy of what learns."""
    shape = (128, 256)
    w0, x = torch.randn(shape), torch.randn(4, 256, requires_grad=True)
    mask = SoftMask("rows", damps, 128, torch.rand(128))
    terms = damped_terms([Selection.whole(shape)], [mask], [1.0], requires_grad=True)

    def ours(x):
        return linear(x, w0, None, terms)

    def careless(x):
        return F.linear(x, w0 + terms.deltas[0] * terms.factors[0])

    if compiled:
        torch._dynamo.reset()
        ours = torch.compile(ours, fullgraph=True)
    own = [w0, *terms.deltas, *terms.indices, *terms.factors]
    assert kept_bytes(ours, x, own=own) <= 0.01 * w0.numel() * 4
    assert kept_bytes(careless, x, own=own) >= w0.numel() * 4, "the counter does not see what it should"


def test_an_importance_that_was_never_loaded_is_an_error():
    """Beside a config alone; and whatever is no share."""
    whole = Selection.whole((4, 3))
    delta = Delta(whole, None, torch.zeros(4, 3), mask=SoftMask("rows", "update", 4))
    with pytest.raises(FormatError, match="lies between nan and nan instead of 0 and 1: it was altered or never"):
        list(delta.parts())
    for bad in (1.5, float("nan"), float("inf")):
        delta.importance = torch.tensor([0.0, 0.5, bad, 1.0])
        with pytest.raises(FormatError, match="never loaded"):
            list(delta.parts())
    delta.importance = torch.tensor([0.0, 0.5, 1.0, 1.0])
    assert [part.factor.flatten().tolist() for part in delta.parts()] == [[1.0, 0.5, 0.0, 0.0]]
    # Stock loading copies in place: it is looked at again.
    delta.load_state_dict(delta.state_dict() | {"importance": torch.full((4,), 2.0)})
    with pytest.raises(FormatError, match="never loaded"):
        list(delta.parts())


@pytest.mark.parametrize(
    "described",
    [None, [], {}, {"axis": "rows", "damps": "update"}, {"axis": "rows", "damps": "all", "count": 3},
     {"axis": "diagonal", "damps": "update", "count": 3}, {"axis": "rows", "damps": "update", "count": -1},
     {"axis": "rows", "damps": "update", "count": True}],
)  # fmt: skip
def test_what_describes_no_mask_is_refused(described):
    with pytest.raises(FormatError, match="describes no soft mask"):
        SoftMask.from_dict(described)
    mask = SoftMask("columns", "gradient", 3)
    assert SoftMask.from_dict(mask.to_dict()) == mask
