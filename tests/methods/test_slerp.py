"""Spherical interpolation: at both ends, along a line, between opposite and zero vectors, from any origin."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_isolate.methods.core_isolation.slerp import Mix, mix_of, slerp

SLERP = sys.modules[slerp.__module__]
ULP = torch.finfo(torch.float32).eps

shares = st.floats(0, 1)
sizes = st.integers(1, 40)
seeds = st.integers(0, 999)
dtypes = st.sampled_from([torch.float32, torch.float64])


def vector(size: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_slerp(a, b, omega, epsilon=5e-4, origin=None) -> np.ndarray:
    """The formula, in float64, of whole vectors."""
    o = np.zeros(a.shape) if origin is None else origin.double().numpy()
    a, b = o + a.double().numpy(), o + b.double().numpy()
    length = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = (a @ b) / length if length else 1.0
    if abs(cosine) > 1 - epsilon:
        return (1 - omega) * a + omega * b - o
    angle = np.arccos(cosine)
    return np.sin((1 - omega) * angle) / np.sin(angle) * a + np.sin(omega * angle) / np.sin(angle) * b - o


@settings(deadline=None)
@given(sizes, seeds, shares, dtypes, st.integers(1, 9), st.booleans())
def test_it_is_the_formula(size, seed, omega, dtype, piece, from_origin):
    """In pieces of any size as at once, from any origin, rounded once."""
    a, b = vector(size, seed, dtype), vector(size, seed + 1000, dtype)
    origin = vector(size, seed + 2000).bfloat16() if from_origin else None
    kept = a.clone(), b.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SLERP, "PIECE", piece)
        found, kind = slerp(a, b, omega, origin=origin)
    wanted = slow_slerp(a, b, omega, origin=origin)
    assert found.dtype == dtype
    assert kind == ("linear" if size == 1 else kind)
    tolerance = torch.finfo(dtype).eps * (np.abs(wanted) + 1e-3) + 1e-13
    assert (np.abs(found.double().numpy() - wanted) <= tolerance).all()
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])


@settings(deadline=None)
@given(sizes, seeds, dtypes, st.booleans(), st.booleans())
def test_the_ends_are_the_two_to_the_bit(size, seed, dtype, from_origin, linear):
    """ω = 0 and ω = 1, whatever the angle."""
    a, b = vector(size, seed, dtype), vector(size, seed + 1, dtype)
    origin = vector(size, seed + 2) if from_origin else None
    assert torch.equal(slerp(a, b, 0.0, origin=origin, linear=linear)[0], a)
    assert torch.equal(slerp(a, b, 1.0, origin=origin, linear=linear)[0], b)


@settings(deadline=None)
@given(sizes, seeds, shares, st.floats(0.01, 100))
def test_along_a_line_it_is_linear(size, seed, omega, factor):
    """b = c·a gives ((1 − ω) + ωc)·a, to one unit in the last place."""
    a = vector(size, seed, torch.float64)
    found, kind = slerp(a, a * factor, omega)
    assert kind == "linear"
    wanted = a * (1 - omega + omega * factor)
    assert ((found - wanted).abs() <= 4 * torch.finfo(torch.float64).eps * wanted.abs()).all()


@settings(deadline=None)
@given(sizes, seeds, shares)
def test_opposite_vectors_have_no_arc(size, seed, omega):
    """Between a and −a every way is as short: linear, through zero."""
    a = vector(size, seed)
    found, kind = slerp(a, -a, omega)
    assert kind == "linear"
    assert torch.allclose(found, a * (1 - 2 * omega), rtol=0, atol=2 * ULP * float(a.abs().max()))
    assert not slerp(a, -a, 0.5)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_vector_has_no_angle(dtype):
    a, zero = torch.tensor([3.0, -4.0], dtype=dtype), torch.zeros(2, dtype=dtype)
    assert mix_of(a, zero, 0.25) == mix_of(zero, a, 0.25) == mix_of(zero, zero, 0.25) == Mix("linear", 0.75, 0.25)
    assert slerp(a, zero, 0.25)[0].tolist() == [2.25, -3.0]
    assert slerp(zero, a, 0.25)[0].tolist() == [0.75, -1.0]
    assert slerp(zero, zero, 0.25)[0].tolist() == [0.0, 0.0]
    # From an origin they are the origin, and no zero vectors.
    assert slerp(zero, zero, 0.25, origin=a)[0].tolist() == [0.0, 0.0]


@settings(deadline=None)
@given(seeds, shares)
def test_the_length_is_kept(seed, omega):
    """Of two vectors of one length, what lies between them has that length: that is why it is spherical."""
    a, b = (torch.nn.functional.normalize(vector(30, seed + i, torch.float64), dim=0) for i in (0, 1000))
    found, kind = slerp(a, b, omega)
    assert kind == "slerp"
    assert float(found.norm()) == pytest.approx(1, abs=1e-12)
    angle = math.acos(float(a @ b))
    assert math.acos(min(1.0, float(a @ found))) == pytest.approx(omega * angle, abs=1e-6)


@settings(deadline=None)
@given(st.floats(1e-6, 0.2), shares, st.sampled_from([1, -1]))
def test_epsilon_says_from_where_on(epsilon, omega, sign):
    """|cos| just above 1 − ε is linear, just below is not; of opposite ones, too."""
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for cosine, kind in ((1 - epsilon * 0.99, "linear"), (1 - epsilon * 1.01, "slerp")):
        b = sign * torch.tensor([cosine, math.sqrt(1 - cosine**2)], dtype=torch.float64)
        assert mix_of(a, b, omega, epsilon).kind == kind


def test_epsilon_at_its_ends():
    """0 divides by no zero; 1 is always linear, but at a right angle."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0])
    assert mix_of(a, 2 * a, 0.3, 0.0) == mix_of(a, -a, 0.3, 0.0) == Mix("linear", 0.7, 0.3)
    assert slerp(a, -a, 0.5, 0.0)[0].tolist() == [0.0, 0.0]
    assert mix_of(a, b, 0.3, 0.0).kind == "slerp"
    assert mix_of(a, b, 0.3, 1.0).kind == "linear"


@settings(deadline=None)
@given(sizes, seeds, shares, shares, st.booleans(), st.integers(1, 9))
def test_only_what_is_asked_for_takes_part(size, seed, omega, density, from_origin, piece):
    """Elsewhere the result is a, to the bit; there it is that of the scalars alone."""
    a, b = vector(size, seed), vector(size, seed + 1)
    origin = vector(size, seed + 2) if from_origin else None
    where = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < density
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SLERP, "PIECE", piece)
        found, kind = slerp(a, b, omega, where=where, origin=origin)
    alone, kind_alone = slerp(a[where], b[where], omega, origin=None if origin is None else origin[where])
    assert kind == kind_alone
    assert torch.equal(found[~where], a[~where])
    assert torch.allclose(found[where], alone, rtol=ULP, atol=1e-7)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_any_shape_and_in_place(shape):
    """Matrices are vectors of all their scalars; the result may be written over a."""
    a, b = torch.randn(shape), torch.randn(shape)
    wanted, _ = slerp(a.reshape(-1), b.reshape(-1), 0.3)
    found, _ = slerp(a, b, 0.3)
    assert torch.equal(found, wanted.reshape(shape))
    into, _ = slerp(a, b, 0.3, out=a)
    assert into is a
    assert torch.equal(a, found)


@settings(deadline=None)
@given(sizes, seeds, shares)
def test_what_did_not_move_stays_zero(size, seed, omega):
    """Linear between differences from an origin: no rounding of 1 − ω brings the origin into a zero."""
    origin, a, b = vector(size, seed), torch.zeros(size), torch.zeros(size)
    b[::2] = 1e-4 * vector(b[::2].numel(), seed + 1)
    found, kind = slerp(a, b, omega, 1.0, origin=origin)
    assert kind == "linear"
    assert not found[1::2].any()


def test_long_vectors_are_summed_in_float64():
    """In fp32 the cosine of 10 million scalars would be off by more than ε is."""
    a = torch.full((10_000_000,), 1e-3)
    b = a.clone()
    b[0] = 1e6
    mix = mix_of(a, b, 0.5)
    aa, bb = 10_000_000 * float(a[0]) ** 2, 9_999_999 * float(a[0]) ** 2 + 1e12
    cosine = (9_999_999 * float(a[0]) ** 2 + 1e6 * float(a[0])) / math.sqrt(aa * bb)
    angle = math.acos(cosine)
    assert mix.kind == "slerp"
    assert mix.a == pytest.approx(math.sin(angle / 2) / math.sin(angle), rel=1e-12)
