"""The gradient of single elements: the same by either way, and chosen so that nobody sees which."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_isolate.deltas import gradient
from peft_isolate.deltas.gradient import by_product, by_rule, by_samples, of_elements

WAYS = (by_product, by_samples)


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(gradient, "_chosen", {})
    monkeypatch.setattr(gradient, "SMALL", 0)


def case(tokens=40, rows=12, columns=30, count=50, dtype=torch.float32, positions_dtype=torch.int32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(tokens, n, generator=generator).to(dtype) for n in (rows, columns))
    positions = torch.randperm(rows * columns, generator=generator)[:count].sort().values.to(positions_dtype)
    return left, right, positions


def twin(left, right, positions):
    """Element by element, in fp64."""
    columns = right.shape[1]
    left, right = left.double(), right.double()
    values = [float(left[:, p // columns] @ right[:, p % columns]) for p in positions.tolist()]
    return torch.tensor(values, dtype=torch.float64)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(WAYS),
    st.integers(0, 70), st.integers(1, 9), st.integers(1, 9), st.floats(0, 1),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from([torch.int32, torch.int64]),
)  # fmt: skip
def test_either_way_is_the_slow_twin(way, tokens, rows, columns, share, dtype, positions_dtype):
    """For no tokens, no elements, single rows and columns, and every element, too."""
    left, right, positions = case(tokens, rows, columns, round(share * rows * columns), dtype, positions_dtype)
    found = way(left, right, positions)
    assert found.shape == positions.shape
    precision = torch.finfo(dtype if way is by_product else torch.promote_types(dtype, torch.float32)).eps
    bound = 2 * (tokens + 1) * precision * twin(left.abs(), right.abs(), positions)
    assert bool(((found.double() - twin(left, right, positions)).abs() <= bound).all())


def test_both_are_timed_once_for_a_case(monkeypatch):
    """And the faster one serves from then on, for batches and counts of a like size, too."""
    calls = []
    monkeypatch.setattr(gradient, "by_product", lambda *args: calls.append("product") or by_product(*args))
    monkeypatch.setattr(gradient, "by_samples", lambda *args: calls.append("samples") or by_samples(*args))
    monkeypatch.setattr(gradient, "_seconds", lambda run: (run(), 1.0 if calls[-1] == "product" else 0.5)[1])
    of_elements(*case())
    assert calls == ["product"] * gradient.TRIES + ["samples"] * (gradient.TRIES + 1)
    calls.clear()
    of_elements(*case(tokens=50, count=60))
    assert calls == ["samples"]
    for other in ({"tokens": 400}, {"count": 5}, {"rows": 13}, {"dtype": torch.float64}):
        calls.clear()
        of_elements(*case(**other))
        assert "product" in calls


@pytest.mark.parametrize("slower", WAYS)
def test_the_slower_way_is_not_taken(slower, monkeypatch):
    monkeypatch.setattr(gradient, "_seconds", lambda run: (run(), float(run.func is slower))[1])
    of_elements(*case())
    assert list(gradient._chosen.values()) == [way for way in WAYS if way is not slower]


def test_where_there_is_no_kernel_the_dense_gradient_serves(monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError('"sampled_addmm" not implemented')

    monkeypatch.setattr(torch.sparse, "sampled_addmm", missing)
    assert torch.equal(of_elements(*case()), by_product(*case()))


@pytest.mark.parametrize("how", ["by_rule", "deterministic algorithms"])
def test_without_a_clock_the_same_run_gives_the_same_bits(how, monkeypatch):
    def clock(run):
        raise AssertionError("a clock decided")

    monkeypatch.setattr(gradient, "_seconds", clock)
    few, many = case(count=5), case(count=200)
    if how == "by_rule":
        with by_rule():
            found = of_elements(*few), of_elements(*many), of_elements(*case(count=5, dtype=torch.bfloat16))
    else:
        torch.use_deterministic_algorithms(True)
        try:
            found = of_elements(*few), of_elements(*many), of_elements(*case(count=5, dtype=torch.bfloat16))
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.equal(found[0], by_samples(*few))
    assert torch.equal(found[1], by_product(*many))
    assert found[2].dtype == torch.bfloat16  # the product's
    with pytest.raises(AssertionError, match="a clock decided"):
        of_elements(*few)


def test_little_work_asks_no_clock(monkeypatch):
    monkeypatch.setattr(gradient, "SMALL", 40 * 12 * 30 + 1)
    monkeypatch.setattr(gradient, "_seconds", None)
    assert torch.equal(of_elements(*case()), by_product(*case()))
