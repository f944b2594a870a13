"""`compose` and `linear` against slow, obvious twins; and what they keep for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_isolate.deltas import compose as module
from peft_isolate.deltas.compose import compose
from peft_isolate.deltas.linear import linear
from peft_isolate.deltas.support import Support, delta_shape
from peft_isolate.deltas.terms import Terms
from peft_isolate.regions import Selection, strided

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make_terms(selections, scales, dtypes=None, requires_grad=False) -> Terms:
    dtypes = dtypes or [torch.float32] * len(selections)
    deltas = [
        (torch.randn(delta_shape(s.kind, s.shape, s.indices.numel())) * 0.1).to(dtype).requires_grad_(requires_grad)
        for s, dtype in zip(selections, dtypes, strict=True)
    ]
    supports, indices = zip(*(Support.of(s) for s in selections), strict=True)
    factors = [torch.empty(0) for _ in deltas]  # no soft mask
    return Terms(deltas, list(scales), list(supports), list(indices), factors, [False for _ in deltas])


def compose_twin(w0: torch.Tensor, selections, terms: Terms) -> torch.Tensor:
    """Scalar by scalar: W0, plus each delta in its turn, in fp32 or wider; one cast at the end."""
    wide = torch.promote_types(w0.dtype, torch.float32)
    total = w0.to(wide, copy=True).flatten()
    for selection, delta, scale in zip(selections, terms.deltas, terms.scales, strict=True):
        numbers = delta.detach()[selection.mask()] if selection.kind == "all_but" else delta.detach().flatten()
        for position, value in zip(selection.positions().tolist(), numbers, strict=True):
            value = value.to(wide)
            total[position] = total[position] + (value if scale == 1.0 else value * scale)
    return total.to(w0.dtype).reshape(w0.shape)


def selections_of(shape: tuple[int, ...]):
    """Whole, some rows or columns, regular and irregular, some elements, or all but some."""
    probe = Selection.whole(shape)
    rows, columns = probe.matrix_shape

    def units(size):
        return st.sets(st.integers(0, size - 1), min_size=1, max_size=size).map(sorted)

    return st.one_of(
        st.just(probe),
        units(rows).map(lambda i: Selection.rows(shape, i)),
        units(columns).map(lambda i: Selection.columns(shape, i)),
        units(rows * columns).map(lambda i: Selection.elements(shape, i)),
        units(rows * columns).map(lambda i: Selection.all_but(shape, i)).filter(lambda s: s.count),
    )


@st.composite
def cases(draw):
    shape = draw(st.sampled_from([(6, 4), (1, 5), (7,), (2, 3, 4), (9, 1)]))
    selections = draw(st.lists(selections_of(shape), min_size=1, max_size=3))
    scales = draw(st.lists(st.sampled_from([1.0, 0.0, 0.3, -2.0]), min_size=len(selections), max_size=len(selections)))
    dtypes = draw(
        st.lists(st.sampled_from([torch.float32, torch.bfloat16]), min_size=len(selections), max_size=len(selections))
    )
    return shape, selections, scales, dtypes, draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 5, 2**20]))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_compose_is_its_twin_bit_for_bit(case):
    """For every kind of selection, dtype, number of adapters, scale, and chunk size."""
    shape, selections, scales, dtypes, dtype, chunk = case
    w0, terms = torch.randn(shape).to(dtype), make_terms(selections, scales, dtypes)
    original, module.CHUNK = module.CHUNK, chunk
    try:
        composed = compose(w0, terms)
    finally:
        module.CHUNK = original
    assert composed.dtype == dtype
    assert torch.equal(composed, compose_twin(w0, selections, terms))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_compose_is_w0_itself_outside_the_support(case):
    """Promise 1: bits, not values: W0 is made of random bit patterns, signed zeros and denormals among them."""
    shape, selections, scales, dtypes, _, _ = case
    w0 = torch.randint(-(2**15), 2**15, shape, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    w0 = torch.where(torch.isfinite(w0), w0, torch.tensor(-0.0, dtype=torch.bfloat16))
    outside = torch.ones(shape, dtype=torch.bool)
    for selection in selections:
        outside &= ~selection.mask()
    composed = compose(w0, make_terms(selections, scales, dtypes))
    assert torch.equal(composed.view(torch.int16)[outside], w0.view(torch.int16)[outside])


@pytest.mark.parametrize("shape", [(8, 6), (4, 3, 5)])
def test_compose_takes_weights_of_any_strides(shape):
    """A parameter that is a transposed view, or a permuted 3-D one, is composed where it belongs."""
    w0 = torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])
    assert not w0.is_contiguous()
    for selection in (Selection.whole(shape), Selection.rows(shape, [1, 2]), Selection.columns(shape, [0, 2])):
        terms = make_terms([selection], [1.0])
        assert torch.equal(compose(w0, terms), compose_twin(w0, [selection], terms))


@st.composite
def partitions(draw):
    """A tensor's scalars, dealt out to some parts of any kind, none of which shares a scalar with another."""
    shape = draw(st.sampled_from([(6, 4), (2, 3, 4), (7,)]))
    rest, parts = Selection.whole(shape), []
    for selection in draw(st.lists(selections_of(shape), min_size=1, max_size=4)):
        part = selection & rest
        if part.count:
            parts.append(part)
            rest = rest - part
    return shape, draw(st.permutations(parts))


@settings(max_examples=100, deadline=None)
@given(partitions(), st.sampled_from(DTYPES), st.sampled_from([torch.int32, torch.int64]))
def test_disjoint_parts_are_composed_as_any_others(case, dtype, index_dtype):
    """What one adapter trains and holds: each part in its place, without a wide copy, the same bits."""
    shape, parts = case
    w0, terms = torch.randn(shape).to(dtype), make_terms(parts, [1.0] * len(parts))
    if index_dtype == torch.int32:
        by_elements = [part.kind in ("elements", "all_but") for part in parts]
        terms = terms._replace(
            indices=[i.int() if narrow else i for i, narrow in zip(terms.indices, by_elements, strict=True)]
        )
    composed = compose(w0, terms._replace(disjoint=True))
    assert torch.equal(composed, compose(w0, terms))
    assert torch.equal(composed, compose_twin(w0, parts, terms))


def differentiable_twin(w0, selections, terms):
    total = w0
    for selection, delta, scale in zip(selections, terms.deltas, terms.scales, strict=True):
        mask = selection.mask()
        numbers = delta[mask] if selection.kind == "all_but" else delta.flatten()
        total = total + torch.zeros_like(w0).masked_scatter(mask, numbers) * scale
    return total


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([(6, 4), (9, 3)]).flatmap(
        lambda shape: st.tuples(st.just(shape), st.lists(selections_of(shape), min_size=1, max_size=2))
    ),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(1.0, 1.0), (0.5, -1.5), (0.0, 1.0)]),
)
def test_linear_and_its_gradients_are_those_of_autograd(shape_and_selections, transposed, with_bias, scales):
    """Output, gradient by x, by the bias and by each delta, on both layouts of the weight."""
    shape, selections = shape_and_selections
    w0 = torch.randn(shape, dtype=torch.float64)
    n_in, n_out = shape if transposed else shape[::-1]
    x = torch.randn(2, 3, n_in, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(n_out, dtype=torch.float64, requires_grad=True) if with_bias else None
    terms = make_terms(selections, scales[: len(selections)], [torch.float64] * len(selections), requires_grad=True)
    wanted = [x, *terms.deltas, *([bias] if with_bias else [])]

    ours = linear(x, w0, bias, terms, transposed=transposed)
    weight = differentiable_twin(w0, selections, terms)
    twin = F.linear(x, weight.T if transposed else weight, bias)
    upstream = torch.randn_like(twin)
    torch.testing.assert_close(ours, twin, rtol=0, atol=1e-12)
    for got, expected in zip(
        torch.autograd.grad(ours, wanted, upstream),
        torch.autograd.grad(twin, wanted, upstream, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(selections_of((5, 6)))
def test_compose_has_the_gradient_of_autograd(selection):
    """`compose` alone, as used for norms, embeddings and biases: the gradient gathered on the support."""
    w0, terms = torch.randn(5, 6), make_terms([selection], [0.5], requires_grad=True)
    upstream = torch.randn(5, 6)
    (ours,) = torch.autograd.grad(compose(w0, terms), terms.deltas, upstream)
    (twin,) = torch.autograd.grad(differentiable_twin(w0, [selection], terms), terms.deltas, upstream)
    assert torch.equal(ours, twin)


@pytest.mark.parametrize("transposed", [False, True])
def test_linear_under_autocast_is_what_autocast_makes_of_a_plain_layer(transposed):
    """fp32 weights, bf16 autocast: same output bits, same gradient dtypes."""
    w0, x = torch.randn(6, 6), torch.randn(4, 6, requires_grad=True)
    terms = make_terms([Selection.whole((6, 6))], [1.0], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear(x, w0, torch.zeros(6), terms, transposed=transposed)
        weight = compose(w0, terms)
        plain = F.linear(x, weight.T if transposed else weight, torch.zeros(6))
    assert ours.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(ours, plain)
    ours.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert terms.deltas[0].grad.dtype == torch.float32


def kept_bytes(function, *inputs: torch.Tensor, own: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps for backward, the inputs' and the parameters' own storages not counted."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, *own)}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*inputs)
    # Kept alive until here, so that no storage is freed and its address counted as another's.
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_kept_for_backward_but_the_input(compiled, dtype):
    """At most 1 % of the weight's bytes beside x; the plain formula, counted alike, keeps a whole weight."""
    shape = (128, 256)
    w0 = torch.randn(shape, dtype=dtype)
    selections = [
        Selection.whole(shape),
        Selection.rows(shape, strided(0, 8, 32, 4)),
        Selection.columns(shape, [3, 9]),
        Selection.elements(shape, range(0, 128 * 256, 97)),
        Selection.all_but(shape, range(0, 128 * 256, 97)),
    ]
    terms = make_terms(selections, [1.0, 0.5, 1.0, 1.0, 1.0], requires_grad=True)
    x = torch.randn(4, 256, dtype=dtype, requires_grad=True)

    def ours(x):
        return linear(x, w0, None, terms)

    def plain(x):
        return F.linear(x, (w0.float() + terms.deltas[0]).to(dtype))

    if compiled:
        torch._dynamo.reset()
        ours, plain = torch.compile(ours, fullgraph=True), torch.compile(plain, fullgraph=True)
    own = [w0, *terms.deltas, *terms.indices]
    weight_bytes = w0.numel() * w0.element_size()
    assert kept_bytes(ours, x, own=own) <= 0.01 * weight_bytes
    assert kept_bytes(plain, x, own=own) >= weight_bytes, "the counter does not see what it should"
