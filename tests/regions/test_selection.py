"""Selection is a set of scalars: every operation equals the one on dense boolean masks, at a small fraction of it."""

from __future__ import annotations

import json
import math
import operator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_isolate.errors import FormatError, RegionError
from peft_isolate.regions import Selection, strided
from peft_isolate.regions.selection import KINDS, to_strides

SHAPES = [(), (1,), (7,), (0,), (1, 5), (5, 1), (4, 6), (0, 3), (3, 0), (2, 3, 4)]
OPERATIONS = [operator.or_, operator.and_, operator.sub]
HUGE = (2**20, 2**12)


def dense(kind: str, shape: tuple[int, ...], indices: list[int]) -> torch.Tensor:
    """The slow twin: a bool tensor of `shape`, written from the definition of each kind."""
    n_columns = shape[-1] if shape else 1
    matrix = torch.zeros(math.prod(shape[:-1]), n_columns, dtype=torch.bool)
    if kind == "whole":
        matrix[:] = True
    elif kind == "rows":
        matrix[indices, :] = True
    elif kind == "columns":
        matrix[:, indices] = True
    else:
        matrix[[i // n_columns for i in indices], [i % n_columns for i in indices]] = True
        matrix = ~matrix if kind == "all_but" else matrix
    return matrix.reshape(shape)


def build(kind: str, shape: tuple[int, ...], indices: list[int]) -> Selection:
    return Selection.whole(shape) if kind == "whole" else getattr(Selection, kind)(shape, indices)


def index_sets(size: int) -> st.SearchStrategy[list[int]]:
    """Sorted unique indices below `size`, the empty and the full set among them."""
    some = st.sets(st.integers(0, size - 1), max_size=size).map(sorted) if size else st.just([])
    return st.one_of(some, st.just(list(range(size))), st.just([]))


@st.composite
def selections(draw, shape: tuple[int, ...], kind: str) -> tuple[Selection, torch.Tensor]:
    sizes = {"whole": 0, "rows": math.prod(shape[:-1]), "columns": shape[-1] if shape else 1}
    indices = draw(index_sets(sizes.get(kind, math.prod(shape))))
    return build(kind, shape, indices), dense(kind, shape, indices)


@pytest.mark.parametrize("left_kind", KINDS)
@pytest.mark.parametrize("right_kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_operation_equals_the_one_on_masks(left_kind, right_kind, data):
    """| & - == and hash of every pair of kinds, on 0-d to 3-d and empty shapes, are those of boolean masks."""
    shape = data.draw(st.sampled_from(SHAPES))
    left, left_mask = data.draw(selections(shape, left_kind))
    right, right_mask = data.draw(selections(shape, right_kind))
    expected = [left_mask | right_mask, left_mask & right_mask, left_mask & ~right_mask]
    for operation, mask in zip(OPERATIONS, expected, strict=True):
        result = operation(left, right)
        assert_is(result, mask)
        assert result == Selection.elements(shape, mask.flatten().nonzero().flatten())
    assert (left == right) == torch.equal(left_mask, right_mask)
    if left == right:
        assert hash(left) == hash(right)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_one_selection_equals_its_mask(kind, data):
    """mask, positions, count, complement and normal form of every kind are those of the mask it stands for."""
    selection, mask = data.draw(selections(data.draw(st.sampled_from(SHAPES)), kind))
    assert_is(selection, mask)
    assert_is(~selection, ~mask)
    assert ~~selection == selection


def assert_is(selection: Selection, mask: torch.Tensor) -> None:
    """The selection stands for this mask, and keeps the normal form."""
    assert selection.shape == tuple(mask.shape)
    assert torch.equal(selection.mask(), mask)
    positions = selection.positions()
    assert positions.dtype == torch.int64
    assert positions.tolist() == mask.flatten().nonzero().flatten().tolist()
    assert selection.count == int(mask.sum())
    if selection.numel:
        assert (selection.kind == "whole") == bool(mask.all())
        if not mask.any():
            assert (selection.kind, selection.indices.numel()) == ("elements", 0)
    assert bool((torch.diff(selection.indices) > 0).all())


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (Selection.rows((2, 3), [0, 1]), "whole"),
        (Selection.rows((3,), [0]), "whole"),
        (Selection.columns((2, 3), [0, 1, 2]), "whole"),
        (Selection.elements((2, 2), [0, 1, 2, 3]), "whole"),
        (Selection.all_but((2, 2), []), "whole"),
        (Selection.elements((), [0]), "whole"),
        (Selection.rows((2, 3), []), "elements"),
        (Selection.columns((2, 3), []), "elements"),
        (Selection.all_but((2, 2), [0, 1, 2, 3]), "elements"),
        (Selection.rows((2, 3), [1]), "rows"),
        (Selection.columns((3,), [1]), "columns"),
        (Selection.elements((2, 2), [0]), "elements"),
        (Selection.all_but((2, 2), [0]), "all_but"),
        (Selection.rows((4, 4), [0]) & Selection.columns((4, 4), [0]), "elements"),
        (Selection.rows((4, 4), [0, 1, 2]) & Selection.columns((4, 4), [0, 1, 2]), "all_but"),
    ],
    ids=repr,
)
def test_normal_form(made, kind):
    """All becomes "whole", nothing becomes "elements", and a mixed result takes the kind with fewer indices."""
    assert made.kind == kind


def test_selections_of_different_shapes_are_different_and_do_not_combine():
    """Same indices of another shape are another selection; combining the two names both shapes."""
    a, b = Selection.rows((4, 6), [1]), Selection.rows((4, 8), [1])
    assert a != b
    assert a != "rows"
    for operation in OPERATIONS:
        with pytest.raises(RegionError, match=r"\(4, 6\) and \(4, 8\)"):
            operation(a, b)


def test_indices_are_the_selections_own():
    """Changing the tensor or array a selection was made of does not change the selection."""
    tensor, array = torch.tensor([0, 2]), np.array([0, 2])
    made = [Selection.rows((4, 2), tensor), Selection.rows((4, 2), array)]
    tensor[0] = array[0] = 1
    assert [s.indices.tolist() for s in made] == [[0, 2], [0, 2]]


@pytest.mark.parametrize("make", [Selection.rows, Selection.columns, Selection.elements, Selection.all_but])
@pytest.mark.parametrize(
    ("indices", "shown"),
    [
        ([2, 1], "2 comes before 1"),
        ([0, 1, 1], "1 comes before 1"),
        ([0, 99], "99"),
        ([-3, 0], "-3"),
        ([0.5], "0.5"),
        (torch.tensor([1.0]), "float32"),
        ([True, False], "True"),
        (np.array([True]), "True"),
        ([[0, 1]], r"\(1, 2\)"),
        (torch.tensor(1), r"\(\)"),
        (torch.tensor([1 + 1j]), "complex"),
        ([[0], [1, 2]], r"\[\[0\], \[1, 2\]\]"),
        (["one"], "one"),
        ([2**70], str(2**70)),
    ],
    ids=repr,
)
def test_bad_indices(make, indices, shown):
    """Unsorted, repeated, out of range or no whole numbers: a RegionError that shows the value and the shape."""
    with pytest.raises(RegionError, match=shown) as caught:
        make((5, 4), indices)
    assert "(5, 4)" in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 2**40), max_size=40)).map(sorted))
def test_strides_give_the_indices_back(indices):
    """Concatenating strided(*s) of what `to_strides` finds gives the very same indices, in order."""
    strides = to_strides(torch.tensor(indices, dtype=torch.int64))
    assert [i for s in strides for i in strided(*s).tolist()] == indices


@pytest.mark.parametrize(
    ("indices", "strides"),
    [
        ([], []),
        ([5], [(5, 1, 1, 1)]),
        (range(3, 9), [(3, 6, 6, 1)]),
        ([0, 1, 6, 7, 12, 13], [(0, 2, 6, 3)]),
        ([0, 2, 4, 6, 7], [(0, 1, 2, 3), (6, 2, 2, 1)]),
    ],
)
def test_strides_are_short(indices, strides):
    """A block, and blocks at equal distances, cost one stride each."""
    assert to_strides(torch.tensor(list(indices), dtype=torch.int64)) == strides


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_dict_round_trip_through_json(data):
    """from_dict(to_dict()) through JSON is the same selection of the same kind."""
    shape = data.draw(st.sampled_from([(7,), (4, 6), (2, 3, 4), (30, 2)]))
    selection, _ = data.draw(selections(shape, data.draw(st.sampled_from(["whole", "rows", "columns"]))))
    if selection.count == 0:
        return
    back = Selection.from_dict(json.loads(json.dumps(selection.to_dict())))
    assert (back.kind, back.shape) == (selection.kind, selection.shape)
    assert torch.equal(back.indices, selection.indices)


@pytest.mark.parametrize("selection", [Selection.elements((4, 4), [1]), Selection.all_but((4, 4), [1])], ids=repr)
def test_single_elements_have_no_dict(selection):
    """Elements do not belong into a JSON file: the error names the way that there is."""
    with pytest.raises(RegionError, match=r"Region\.save"):
        selection.to_dict()


def described(**changes) -> dict:
    return {"kind": "rows", "shape": [4, 8], "strides": [[0, 1, 2, 2]]} | changes


ALTERED = {
    "no dict": [1, 2],
    "none": None,
    "empty": {},
    "no kind": {"shape": [4, 8], "strides": [[0, 1, 1, 1]]},
    "no shape": {"kind": "rows", "strides": [[0, 1, 1, 1]]},
    "no strides": {"kind": "rows", "shape": [4, 8]},
    "unknown kind": described(kind="diagonal"),
    "kind of elements": described(kind="elements"),
    "kind is a list": described(kind=["rows"]),
    "kind is a method": described(kind="from_dict"),
    "negative size": described(shape=[-4, 8]),
    "negative size, whole": {"kind": "whole", "shape": [-4, 8]},
    "fractional size": described(shape=[4.7, 8]),
    "infinite size": described(shape=[math.inf, 8]),
    "size is text": described(shape=["4", "8"]),
    "size is true": described(shape=[True, 8]),
    "shape is a number": described(shape=4),
    "strides are a dict": described(strides={"0": 1}),
    "stride is a number": described(strides=[1]),
    "three numbers": described(strides=[[0, 1, 2]]),
    "five numbers": described(strides=[[0, 1, 2, 2, 2]]),
    "negative start": described(strides=[[-1, 1, 1, 1]]),
    "negative step": described(strides=[[3, 1, -1, 2]]),
    "fraction": described(strides=[[0.5, 1, 1, 1]]),
    "start is true": described(strides=[[True, 1, 1, 1]]),
    "too many": described(strides=[[0, 1, 1, 5]]),
    "beyond the end": described(strides=[[3, 1, 1, 2]]),
    "overlapping": described(strides=[[0, 2, 1, 2]]),
    "twice the same": described(strides=[[0, 1, 1, 1], [0, 1, 1, 1]]),
    "empty blocks, many": described(strides=[[0, 0, 1, 2**50]]),
    "no blocks, long": described(strides=[[0, 2**50, 1, 0]]),
    "huge count": described(strides=[[0, 1, 1, 2**50]]),
    "huge length": described(strides=[[0, 2**50, 1, 1]]),
    "start beyond int64": described(strides=[[2**70, 1, 1, 1]]),
    "step beyond int64": described(strides=[[0, 1, 2**70, 2]]),
}


@pytest.mark.parametrize("entry", ALTERED.values(), ids=ALTERED)
def test_an_altered_dict_is_refused_before_memory_is_spent(entry):
    """What `to_dict` never writes raises FormatError, and no number in it is believed before it is checked."""
    with small_memory(), pytest.raises(FormatError):
        Selection.from_dict(entry)


def test_huge_shapes_are_counted_exactly():
    """Counts are Python's own integers: a shape beyond 2⁶³ scalars does not wrap around."""
    assert Selection.whole((2**40, 2**40)).count == 2**80
    assert Selection.from_dict(described(shape=[2**40, 2**40])).count == 2 * 2**40


def few(kind: str) -> Selection:
    n = math.prod(HUGE)
    indices = {"rows": [5, 77], "columns": [3], "elements": [1, 5 * 2**12, n - 1], "all_but": [0, 5 * 2**12 + 3]}
    return build(kind, HUGE, indices.get(kind, []))


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
def test_memory_goes_with_the_indices_not_with_the_tensor(left, right):
    """On 4 G scalars, operations on a few rows, columns or elements take no mask: megabytes, and the counts add up."""
    with small_memory():
        a, b = few(left), few(right)
        common = (a & b).count
        assert (a | b).count == a.count + b.count - common
        assert (a - b).count == a.count - common
        assert (~a).count == math.prod(HUGE) - a.count
        assert (a == b) == (left == right)


@contextmanager
def small_memory(limit: int = 256 * 2**20):
    """Inside, the process can allocate no more than `limit` bytes beyond what it has: numpy's and torch's alike."""
    resource = pytest.importorskip("resource")
    if not (statm := Path("/proc/self/statm")).exists():
        pytest.skip("this system does not say how much memory a process has")
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_small_memory_would_notice():
    """The guard of the tests above is not blind: a mask of 4 G scalars does not fit."""
    with small_memory(), pytest.raises(RuntimeError, match="can't allocate memory"):
        few("columns").mask()
