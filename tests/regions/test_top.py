"""The global top p % of |Δ|: equal to a stable sort of all of it, in bounded memory, or an error."""

import doctest
import math
import tracemalloc
from decimal import Decimal
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from peft_isolate.errors import RegionError
from peft_isolate.regions import Region, Selection
from peft_isolate.regions import top as module
from peft_isolate.regions.top import top

SMALLEST = 2.0**-149  # the smallest denormal of fp32
EVEN = [0.0, -0.0, 1.0, -1.0, 2.0, 0.5, SMALLEST, -3 * SMALLEST, 2.0**-126, 1.0 + 2.0**-23, 1.0 + 2.0**-7]


def moves(base, tuned):
    """|Δ| of two tensors, flat, as the specification has it, in numpy."""
    if torch.float64 in (base.dtype, tuned.dtype):
        return np.abs(tuned.double().numpy() - base.double().numpy()).astype(np.float32).reshape(-1)
    return np.abs(tuned.float().numpy() - base.float().numpy()).reshape(-1)


def slow_top(pairs, percent):
    """The specification: all |Δ| one after the other, a stable descending sort, the first k of it."""
    every = np.concatenate([moves(base, tuned) for _, base, tuned in pairs])
    count = int(Decimal(str(percent)) * every.size // 100)
    chosen = np.argsort(-every.astype(np.float64), kind="stable")[:count]
    selections, start = {}, 0
    for name, base, _ in pairs:
        mine = chosen[(chosen >= start) & (chosen < start + base.numel())] - start
        selections[name] = Selection.elements(base.shape, np.sort(mine))
        start += base.numel()
    threshold = float(every[chosen].min()) if count else 0.0
    return Region(selections), count, every.size, int((every > 0).sum()), threshold


def calls_of(pairs):
    """`pairs` as a function that counts its calls, and the list in which it does."""
    calls = []

    def again():
        calls.append(None)
        yield from pairs

    return again, calls


def assert_same(result, expected):
    region, count, total, moved, threshold = expected
    assert result.region == region
    assert (result.count, result.total, result.moved, result.threshold) == (count, total, moved, threshold)
    assert result.region.count == count


@st.composite
def tensors(draw, shape):
    """A tensor of this shape: values with many ties, any floating dtype, any strides."""
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    value = draw(
        st.sampled_from(
            [st.sampled_from(EVEN), st.just(1.0), st.floats(-6e4, 6e4, width=32), st.floats(-1, 1, width=16)]
        )
    )
    size = math.prod(shape)
    tensor = torch.tensor(draw(st.lists(value, min_size=size, max_size=size)), dtype=dtype).reshape(shape)
    if draw(st.booleans()) and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if draw(st.booleans()) and tensor.ndim:
        return torch.stack([tensor, tensor], -1)[..., 0]
    return tensor


@st.composite
def models(draw):
    """Pairs of one to four tensors: scalars, empty ones, vectors, matrices and more."""
    shapes = st.sampled_from([(), (0,), (0, 3), (1,), (7,), (3, 4), (4, 3, 2), (2, 9)])
    shape_of = draw(st.lists(shapes, min_size=1, max_size=4))
    return [(f"w{i}", draw(tensors(shape)), draw(tensors(shape))) for i, shape in enumerate(shape_of)]


percents = st.one_of(
    st.sampled_from([0.1, 1, 10, 29.0, 50, 99.9, 100]),
    st.floats(0, 100, exclude_min=True),
    st.floats(0, 100, exclude_min=True).map(lambda percent: round(percent, 1) or 0.1),
)


@given(models(), percents, st.sampled_from([2, 3, 5, 2**19]), st.sampled_from([0, 3, 2**22]))
@settings(max_examples=400, deadline=None)
def test_it_is_what_a_stable_sort_of_all_begins_with(pairs, percent, chunk, candidates):
    """Ties, zeros of either sign, denormals, mixed dtypes, odd shapes and strides; in two readings and in three."""
    with mock.patch.multiple(module, CHUNK=chunk, CANDIDATES=candidates):
        assert_same(top(lambda: iter(pairs), percent), slow_top(pairs, percent))


@given(models(), percents)
@settings(max_examples=100, deadline=None)
def test_it_selects_the_values_that_topk_finds(pairs, percent):
    """`torch.topk` of the concatenation breaks ties as it likes, but its values are these."""
    result = top(lambda: pairs, percent)
    every = torch.cat([torch.from_numpy(moves(base, tuned)) for _, base, tuned in pairs])
    mask = torch.cat([result.region.get(n, Selection.empty(b.shape)).mask().reshape(-1) for n, b, _ in pairs])
    assert torch.equal(every[mask].sort(descending=True).values, torch.topk(every, result.count).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("candidates", [0, 2**22])
def test_whole_chunks_and_buckets_of_a_model(dtype, candidates):
    """Some 10^6 scalars in several tensors, with the chunk as it is; in bf16 and fp16 most of them tie."""
    pairs = []
    for i, shape in enumerate([(700, 900), (30,), (3, 211, 517), (2**18 + 1,)]):
        base = 0.02 * torch.randn(shape)
        pairs.append((f"w{i}", base.to(dtype), (base + 1e-4 * torch.randn(shape)).to(dtype)))
    for percent in (0.1, 1, 60):
        with mock.patch.object(module, "CANDIDATES", candidates):
            assert_same(top(lambda: pairs, percent), slow_top(pairs, percent))


@pytest.mark.parametrize(
    ("percent", "total", "count"),
    [
        (0.1, 1000, 1),
        (0.1, 999, 0),
        (0.1, 1001, 1),
        (0.3, 1000, 3),
        (0.57, 10_000, 57),
        (64.1, 1000, 641),
        (29.0, 100, 29),
        (57, 100, 57),
        (99.99, 10_000, 9999),
        (100, 7, 7),
        (100.0, 1, 1),
        (1e-9, 100, 0),
        (np.float64(0.57), 10_000, 57),
        (np.float32(0.57), 10_000, 57),
        (np.int64(7), 100, 7),
        (Decimal("0.57"), 10_000, 57),
        (Fraction(1, 3), 300, 1),
    ],
)
def test_the_count_is_exact(percent, total, count):
    """floor(p · D / 100) of the decimal that was written: in binary 0.57 · 10000 / 100 is less than 57."""
    tuned = torch.arange(total, dtype=torch.float32)
    result = top(lambda: [("w", torch.zeros(total), tuned)], percent)
    assert (result.count, result.total, result.region.count) == (count, total, count)
    assert result.threshold == (total - count if count else 0.0)


def test_of_all_everything_is_selected():
    """At 100 % every tensor is whole, unmoved ones too, and one without scalars is left out."""
    pairs = [
        ("a", torch.ones(3, 2), torch.ones(3, 2)),
        ("b", torch.zeros(()), torch.ones(())),
        ("c", *[torch.ones(0)] * 2),
    ]
    result = top(lambda: pairs, 100)
    assert {name: selection.kind for name, selection in result.region.items()} == {"a": "whole", "b": "whole"}
    assert (result.count, result.total, result.moved, result.threshold) == (7, 7, 1, 0.0)


def test_of_nothing_nothing_is_selected():
    """No tensor, or none with a scalar, is a model of which nothing can move."""
    for pairs in ([], [("a", torch.ones(0, 3), torch.ones(0, 3))]):
        assert_same(top(lambda pairs=pairs: pairs, 50), (Region(), 0, 0, 0, 0.0))


def test_denormals_count_and_order():
    """The smallest numbers of fp32 are not flushed to zero, and -0.0 is zero."""
    tuned = torch.tensor([-0.0, SMALLEST, -2 * SMALLEST, 0.0, 3 * SMALLEST])
    result = top(lambda: [("w", torch.tensor([0.0, 0.0, 0.0, -0.0, 0.0]), tuned)], 40)
    assert result.region["w"].indices.tolist() == [2, 4]
    assert (result.moved, result.threshold) == (3, 2 * SMALLEST)
    brain = tuned.mul(2**20).bfloat16()
    assert top(lambda: [("w", torch.zeros_like(brain), brain)], 40).region["w"].indices.tolist() == [2, 4]


def test_doubles_are_subtracted_as_doubles():
    """A difference far below fp32's resolution of the numbers is seen where one of the two is float64."""
    base = torch.ones(4)
    tuned = torch.tensor([1.0, 1.0 + 1e-12, 1.0 - 2e-12, 1.0 + 1e-50], dtype=torch.float64)
    result = top(lambda: [("w", base, tuned), ("v", tuned, base)], 50)
    assert result.moved == 4
    assert [selection.indices.tolist() for selection in result.region.values()] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("move", [0.0, SMALLEST, 1.0, 3e38])
@pytest.mark.parametrize("candidates", [0, 2**22])
def test_where_all_tie_the_first_positions_are_selected(move, candidates):
    """Earlier tensors first, then lower positions, over the ends of chunks and tensors."""
    pairs = [(name, torch.zeros(20, 5), torch.full((20, 5), move)) for name in "ab"]
    with mock.patch.multiple(module, CHUNK=32, CANDIDATES=candidates):
        for count in (1, 31, 32, 33, 99, 100, 101, 150, 199):
            result = top(lambda: pairs, count / 2)
            expected = {"a": list(range(min(count, 100))), "b": list(range(count - 100))}
            found = {name: selection.positions().tolist() for name, selection in result.region.items()}
            assert found == {name: positions for name, positions in expected.items() if positions}
            assert (result.moved, result.threshold) == (200 if move else 0, float(np.float32(move)))


@pytest.mark.parametrize(
    ("values", "readings"),
    [
        (torch.arange(1.0, 101.0), 2),
        (torch.ones(100), 2),
        (torch.zeros(100), 2),
        (torch.cat([torch.ones(90), 1 + torch.arange(1, 11) * 2.0**-20]), 2),
        (1 + torch.arange(11) * 2.0**-20, 2),
        (1 + torch.arange(100) * 2.0**-20, 4),
    ],
)
def test_the_pairs_are_read_twice(values, readings):
    """What reads them may be a disk: four times only where more than `CANDIDATES` others share the cut's bucket."""
    pairs = [("w", torch.zeros_like(values), values)]
    again, calls = calls_of(pairs)
    with mock.patch.object(module, "CANDIDATES", 10):
        assert_same(top(again, 10), slow_top(pairs, 10))
    assert len(calls) == readings


def test_where_nothing_is_to_be_selected_the_pairs_are_read_once():
    """There is nothing to look for then, but what moved is counted."""
    again, calls = calls_of([("w", torch.zeros(100), torch.ones(100))])
    assert_same(top(again, 0.5), (Region(), 0, 100, 100, 0.0))
    assert len(calls) == 1


@pytest.mark.parametrize("values", ["equal", "zero", "one bucket", "normal", "rising"])
@pytest.mark.parametrize("percent", [1, 50])
def test_memory_goes_by_what_is_selected(values, percent):
    """Of two million scalars that tie, or share a bucket, only the selected ones are ever listed."""
    n = 2**21
    tuned = {
        "equal": lambda: torch.full((n,), 0.25),
        "zero": lambda: torch.zeros(n),
        "one bucket": lambda: 1 + torch.arange(n) % 2**15 * 2.0**-23,
        "normal": lambda: torch.randn(n),
        "rising": lambda: torch.arange(1, n + 1, dtype=torch.float32),
    }[values]()
    base = torch.zeros(n)
    pairs = [(f"w{i}", *both) for i, both in enumerate(zip(base.split(n // 16), tuned.split(n // 16), strict=True))]
    with mock.patch.multiple(module, CHUNK=2**14, CANDIDATES=2**14):
        top(lambda: pairs, percent)
        tracemalloc.start()
        result = top(lambda: pairs, percent)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # What the positions are made from, ten bytes each where many tie and four else, goes as they come, tensor by
    # tensor; there may be an eighth more of it than is selected. The rest is tables of counts, chunks and candidates.
    assert peak < (9.5 if values in ("normal", "rising") else 12.5) * result.count + 1.5e6


class LargestNew(TorchDispatchMode):
    """Writes down the bytes of the largest tensor that torch makes, views aside."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {
            value.untyped_storage().data_ptr()
            for value in [*args, *(kwargs or {}).values()]
            if isinstance(value, torch.Tensor)
        }
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in held:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("strides", ["plain", "transposed", "expanded", "long rows"])
def test_no_tensor_is_copied_as_a_whole(dtype, strides):
    """Another dtype or other strides cost a chunk, not a second copy of the embeddings."""
    base = {
        "plain": lambda: torch.zeros(1000, 300),
        "transposed": lambda: torch.zeros(300, 1000).T,
        "expanded": lambda: torch.zeros(1000, 1).expand(1000, 300),
        "long rows": lambda: torch.zeros(3, 100_000, 2)[..., 0],
    }[strides]().to(dtype)
    tuned = torch.randn(base.shape)
    with mock.patch.object(module, "CHUNK", 2**16), LargestNew() as largest:
        result = top(lambda: [("w", base, tuned)], 0.1)
    assert largest.bytes <= 2**16 * 8
    assert_same(result, slow_top([("w", base, tuned)], 0.1))


def test_parameters_and_another_default_device():
    """Parameters that want gradients are read as they are, and another default device changes nothing."""
    base, tuned = torch.nn.Parameter(torch.zeros(6)), torch.nn.Parameter(torch.arange(6.0))
    with torch.device("meta"):
        result = top(lambda: [("w", base, tuned)], 50)
    assert result.region["w"].indices.tolist() == [3, 4, 5]


def test_the_region_is_like_any_other(tmp_path):
    """int64 positions that pass every check, saved and loaded."""
    pairs = [(name, torch.zeros(9, 4), torch.randn(9, 4)) for name in "abc"]
    region = top(lambda: pairs, 30).region
    for selection in region.values():
        assert (selection.kind, selection.indices.dtype) == ("elements", torch.int64)
        assert Selection.elements(selection.shape, selection.indices) == selection
    region.save(tmp_path / "region.safetensors")
    assert Region.load(tmp_path / "region.safetensors") == region


nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("base", "tuned", "dtype", "side"),
    [
        (nan, 0.0, torch.float32, "in base,"),
        (0.0, -nan, torch.float32, "in tuned,"),
        (inf, 0.0, torch.float32, "in base,"),
        (0.0, -inf, torch.float32, "in tuned,"),
        (inf, inf, torch.float32, "in base and tuned,"),
        (3e38, -3e38, torch.float32, "in the difference, which is beyond fp32,"),
        (0.0, 1e39, torch.float64, "in the difference, which is beyond fp32,"),
        (0.0, inf, torch.float16, "in tuned,"),
        (nan, 0.0, torch.bfloat16, "in base,"),
    ],
)
def test_what_is_not_finite_is_refused(base, tuned, dtype, side):
    """There is no largest |Δ| beside a NaN: the error names the tensor and the side it is on."""
    at = torch.zeros(7, 3, dtype=dtype)
    pair = [at.index_fill(0, torch.tensor([5]), value) for value in (base, tuned)]
    fine = torch.randn(7, 3)
    with mock.patch.object(module, "CHUNK", 4), pytest.raises(RegionError, match=rf"'bad' has NaN or infinity {side}"):
        top(lambda: [("fine", fine, -fine), ("bad", *pair), ("also", fine, fine)], 1)


def test_the_largest_finite_difference_is_one():
    """Next to overflow: the greatest fp32 number is no infinity, and 1e300 in both is no difference."""
    greatest = torch.finfo(torch.float32).max
    far = torch.tensor([1e300, 1e300], dtype=torch.float64)
    result = top(lambda: [("far", far, far), ("w", torch.zeros(2), torch.tensor([1.0, -greatest]))], 25)
    assert (result.region, result.threshold) == (Region({"w": Selection.elements((2,), [1])}), greatest)


@pytest.mark.parametrize(
    "percent", [0, -1, 100.5, 0.0, -0.0, nan, inf, "half", "50", "1/0", None, True, torch.tensor(1.0)]
)
def test_a_percent_that_is_none(percent):
    """Refused before a tensor is asked for."""
    with pytest.raises(RegionError, match="above 0 and up to 100"):
        top(lambda: pytest.fail("read"), percent)


@pytest.mark.parametrize(
    ("pairs", "match"),
    [
        ([("w", torch.ones(3, 2), torch.ones(2, 3))], r"'w' has shape \(3, 2\) in base and \(2, 3\) in tuned"),
        ([("w", torch.ones(3), torch.ones(3))] * 2, "'w' comes twice"),
        ([("w", torch.ones(3).int(), torch.ones(3))], "'w' is of dtype torch.int32 in base"),
        ([("w", torch.ones(3), torch.ones(3, dtype=torch.complex64))], "'w' is of dtype torch.complex64 in tuned"),
        ([("w", torch.ones(3), torch.ones(3, device="meta"))], "'w' is without numbers, on the meta device in tuned"),
    ],
)
def test_tensors_without_a_difference_are_refused(pairs, match):
    """Each by its name, with what is wrong."""
    with pytest.raises(RegionError, match=match):
        top(lambda: pairs, 10)


# The cut falls into the bucket of 8, of which they are not the lowest value.
TWO = [(name, torch.zeros(10), torch.tensor([*range(8), 8 + 2**-6, 9])) for name in "ab"]
OTHERS = {
    "nothing": ([], r"nothing rather than 'a' of shape \(10,\)"),
    "less": (TWO[:1], r"nothing rather than 'b' of shape \(10,\)"),
    "more": ([*TWO, ("c", *TWO[0][1:])], r"'c' of shape \(10,\) rather than nothing"),
    "name": ([("z", *TWO[0][1:]), TWO[1]], r"'z' of shape \(10,\) rather than 'a' of shape \(10,\)"),
    "order": (TWO[::-1], "'b' of shape .* rather than 'a'"),
    "shape": ([("a", torch.zeros(2, 5), torch.ones(2, 5)), TWO[1]], r"'a' of shape \(2, 5\) rather than 'a'"),
    "greater": ([("a", torch.zeros(10), torch.full((10,), 9.0)), TWO[1]], "other scalars than the first time"),
    "smaller": ([("a", torch.zeros(10), torch.zeros(10)), TWO[1]], "other scalars than the first time"),
    "nan": ([("a", torch.zeros(10), torch.full((10,), nan)), TWO[1]], "other scalars than the first time"),
    "fewer": ([(n, torch.zeros(10), torch.tensor([*range(8), 0.0, 9.0])) for n in "ab"], "other scalars than"),
    # As many from the bucket on, but fewer in it.
    "shifted": ([(n, torch.zeros(10), torch.tensor([*range(8), 9.0, 9.0])) for n in "ab"], "other scalars than"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(("reading", "candidates"), [(2, 2**22), (3, 0), (4, 0)])
def test_pairs_that_change_between_the_readings(other, reading, candidates):
    """Not a wrong region: an error that says what to pass."""
    calls = []

    def pairs():
        calls.append(None)
        return OTHERS[other][0] if len(calls) == reading else TWO

    with mock.patch.object(module, "CANDIDATES", candidates), pytest.raises(RegionError) as error:
        top(pairs, 15)
    assert error.match(OTHERS[other][1])
    assert error.match("pass a function that begins anew each time")


def test_scalars_that_grow_are_noticed_before_they_fill_the_memory():
    """Where all are large at a later reading, no more are listed than there were to find."""
    read = []

    def pairs():
        tuned = torch.ones(10) if read else torch.arange(10.0) / 10
        for i in range(20):
            read.append(i)
            yield f"w{i}", torch.zeros(10), tuned

    with mock.patch.object(module, "CANDIDATES", 0), pytest.raises(RegionError, match="other scalars than"):
        top(pairs, 10)
    # Of the second reading no more than gives too many; the third only counts.
    assert len(read) == 20 + 3 + 20


def test_a_shape_that_changes_on_one_side():
    """Also in a later reading base and tuned must match before they are read together."""
    calls = []

    def pairs():
        calls.append(None)
        return TWO if len(calls) == 1 else [("a", torch.zeros(10), torch.zeros(9)), TWO[1]]

    with pytest.raises(RegionError, match=r"'a' has shape \(10,\) in base and \(9,\) in tuned"):
        top(pairs, 15)


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
