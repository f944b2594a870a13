"""Region is a set of scalars of a model: exact against dense masks, packed or not."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_isolate import HalfFTConfig
from peft_isolate.errors import RegionError
from peft_isolate.regions import Region, Selection, base_parameters, shapes_of
from peft_isolate.regions.codes import encode
from peft_isolate.regions.stored import StoredSelection
from tests.models import ARCHITECTURES, tiny

SHAPES = {"a.weight": (3, 4), "a.bias": (3,), "b.weight": (2, 2, 3), "scale": ()}
KINDS = ("whole", "rows", "columns", "elements", "all_but")
Masks = dict[str, torch.Tensor]


@st.composite
def regions(draw) -> tuple[Region, Masks]:
    """A region over some of SHAPES, packed or not, and the same as one bool tensor per name."""
    chosen = {}
    for name, shape in SHAPES.items():
        if draw(st.booleans()):
            kind = draw(st.sampled_from(KINDS))
            sizes = {"rows": math.prod(shape[:-1]), "columns": shape[-1] if shape else 1}
            indices = sorted(draw(st.sets(st.integers(0, sizes.get(kind, math.prod(shape)) - 1))))
            chosen[name] = Selection.whole(shape) if kind == "whole" else getattr(Selection, kind)(shape, indices)
    region = Region(chosen)
    return region.packed() if draw(st.booleans()) else region, masks_of(region)


def masks_of(region: Region) -> Masks:
    nothing = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    return nothing | {name: selection.mask() for name, selection in region.items()}


def total(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def assert_is(region: Region, masks: Masks) -> None:
    """The region stands for these masks, and names only what it selects."""
    assert set(region) == {name for name, mask in masks.items() if mask.any()}
    assert all(torch.equal(region[name].mask(), masks[name]) for name in region)
    assert region.count == total(masks)


@settings(max_examples=100, deadline=None)
@given(regions(), regions())
def test_operations_equal_those_on_masks(one, two):
    """| & - == hash, jaccard, complement, fraction and count are those of dense masks, name by name."""
    (a, a_masks), (b, b_masks) = one, two
    both = {name: a_masks[name] & b_masks[name] for name in SHAPES}
    either = {name: a_masks[name] | b_masks[name] for name in SHAPES}
    assert_is(a & b, both)
    assert_is(a | b, either)
    assert_is(a - b, {name: a_masks[name] & ~b_masks[name] for name in SHAPES})
    assert_is(a.complement(SHAPES), {name: ~mask for name, mask in a_masks.items()})
    assert a.fraction(SHAPES) == total(a_masks) / 28
    assert a.jaccard(b) == (total(both) / total(either) if total(either) else 1.0)
    assert (a == b) == all(torch.equal(a_masks[name], b_masks[name]) for name in SHAPES)
    if a == b:
        assert hash(a) == hash(b)


@settings(max_examples=50, deadline=None)
@given(regions())
def test_packing_changes_nothing_but_what_is_kept(made):
    """A packed region has the kinds, indices and order of the other, and is equal to it; single elements are codes.

    So are those of a pickled one and of a copy.
    """
    region = made[0]
    packed = region.packed()
    for same in (packed, packed.packed(), pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed), Region(packed)):
        assert [(n, s.kind, s.shape, s.indices.tolist()) for n, s in same.items()] == [
            (n, s.kind, s.shape, s.indices.tolist()) for n, s in region.items()
        ]
        by_codes = {name for name, place in same.places.items() if isinstance(place, StoredSelection)}
        assert by_codes == {name for name, s in region.items() if s.kind in ("elements", "all_but")}
        assert (same, hash(same), repr(same)) == (region, hash(region), repr(region))


def large(seed: int) -> Region:
    """A packed region of single elements, of holes, and of more."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.randperm(4096, generator=generator)[:41].sort().values
    return Region(
        {
            "elements": Selection.elements((64, 64), at),
            "holes": Selection.all_but((64, 64), at),
            "rows": Selection.rows((4, 3), [0, 2]),
            "whole": Selection.whole((3, 4)),
        }
    ).packed()


def test_a_packed_region_decodes_only_what_is_asked_for(monkeypatch):
    """Names, counts, shapes, == and hash take no decoding; neither does what a whole tensor is combined with.

    So a core's complement, and the part of it in some scope, cost no more than the core.
    """
    one, other, shapes = large(0), large(1), {name: place.shape for name, place in large(0).places.items()}
    whole = Region.whole(shapes)
    elements, holes = one["elements"], one["holes"]

    def refuse(self, data):
        raise AssertionError(f"{self!r} was decoded")

    with monkeypatch.context() as patched:
        patched.setattr(StoredSelection, "decode", refuse)
        assert (len(one), list(one), "holes" in one, "x" in one) == (4, list(shapes), True, False)
        assert one.count == 41 + 4096 - 41 + 6 + 12
        assert one.fraction(shapes) == one.count / whole.count
        assert repr(one) == "Region(4 tensors, 4,114 scalars: 1 whole, 1 rows, 1 elements, 1 all_but)"
        assert one == large(0)
        assert one != other
        assert one != one - Region({"rows": Selection.whole((4, 3))})
        assert one != Region({**one.places, "elements": StoredSelection.encode(Selection.elements((64, 64), [1]))})
        assert hash(one) == hash(Region(dict(reversed(one.places.items()))))
        assert len({one, large(0), other}) == 2
        one.check(shapes)
        Region({name: place for name, place in one.places.items() if name != "rows"}).packed()
        complement, scoped, union = one.complement(shapes), whole & one, whole | one
        assert one - Region() == one | Region() == one
        with pytest.raises(AssertionError, match="was decoded"):
            one["elements"]
    assert complement == Region({"elements": ~elements, "holes": ~holes, "rows": Selection.rows((4, 3), [1, 3])})
    assert [place.kind for place in complement.places.values()] == ["all_but", "elements", "rows"]
    assert scoped == one
    assert union == whole


def test_what_is_made_of_packed_regions_is_packed():
    """Unions and differences of cores stay as small as the cores, whichever side is packed."""
    one, other = (Region({"w": Selection.elements((8, 8), at)}).packed() for at in ([1, 2, 3], [2, 3, 4]))
    open_one = Region(dict(one))
    for made in (one | other, one & other, one - other, open_one | other, one | open_one, other & open_one):
        assert isinstance(made.places["w"], StoredSelection)
    assert not isinstance((open_one | open_one).places["w"], StoredSelection)
    for operation in ("__or__", "__and__", "__sub__"):
        with pytest.raises(RegionError, match=r"'w'.*\(8, 9\) and \(8, 8\)"):
            getattr(Region({"w": Selection.whole((8, 9))}), operation)(one)


def test_codes_of_other_formats_are_the_same_positions():
    """Two packings may differ in their bytes and stand for one region; two may have one length and differ."""
    selection = Selection.elements((64, 64), torch.arange(0, 4088, 7))
    usual = StoredSelection.encode(selection)
    code, format = encode(selection.indices, 4096, "gap9")
    another = StoredSelection(
        "elements", (64, 64), type(usual.codes)(usual.codes.count, code.size, format), torch.from_numpy(code)
    )
    assert another.codes != usual.codes
    assert Region({"a": another}) == Region({"a": usual}) == Region({"a": selection})
    shifted = Region({"a": Selection.elements((64, 64), selection.indices + 1)}).packed()
    assert shifted.places["a"].codes == usual.codes
    assert shifted != Region({"a": usual})
    assert Region({"a": ~usual}) != Region({"a": usual})
    half = torch.arange(0, 4096, 2)
    assert (
        Region({"a": Selection.elements((64, 64), half)}).packed()
        != Region({"a": Selection.all_but((64, 64), half)}).packed()
    )


def test_is_a_mapping_without_empty_entries():
    """A Region is a read-only Mapping in the order given; what selects nothing is not in it."""
    b, a = Selection.whole((2,)), Selection.rows((4, 2), [1])
    region = Region({"b": b, "nothing": Selection.empty((3,)), "a": a})
    assert list(region) == ["b", "a"]
    assert len(region) == 2
    assert dict(region) == {"b": b, "a": a}
    assert "nothing" not in region
    assert region.get("nothing") is None
    assert region == Region({"a": a, "b": b})
    assert region != {"a": a, "b": b, "c": a}
    assert not Region()
    with pytest.raises(TypeError):
        region["c"] = a  # type: ignore[index]


def test_whole_model():
    """Region.whole selects every scalar of a module, and its complement is empty."""
    model = nn.Linear(3, 4)
    whole = Region.whole(model)
    assert whole.count == 16
    assert whole.fraction(model) == 1.0
    assert whole.complement(model) == Region()


@pytest.mark.parametrize("operation", ["__or__", "__and__", "__sub__", "jaccard"])
def test_regions_of_different_models_do_not_combine(operation):
    """The first tensor that differs is named, with both shapes."""
    a = Region({"same": Selection.whole((2,)), "up.weight": Selection.rows((4, 6), [1])})
    b = Region({"same": Selection.whole((2,)), "up.weight": Selection.rows((4, 8), [1])})
    with pytest.raises(RegionError, match=r"'up.weight'.*\(4, 6\) and \(4, 8\)"):
        getattr(a, operation)(b)


def test_check_names_the_first_difference():
    """Against a model, the first name that is missing or has another shape is named: both shapes, and the remedy."""
    region = Region({name: Selection.whole((2, 2)) for name in ("fits", "first", "second")})
    region.check({"second": (2, 2), "first": (2, 2), "fits": (2, 2), "more": (7,)})
    with pytest.raises(RegionError, match=r"'first' has shape \(2, 2\) in the region and \(2, 3\)"):
        region.check({"fits": (2, 2), "first": (2, 3), "second": (9,)})
    with pytest.raises(RegionError, match=r"'first' of shape \(2, 2\), which this model does not have"):
        region.check({"fits": (2, 2), "second": (9,)})
    for method in (region.fraction, region.complement):
        with pytest.raises(RegionError, match="'first'"):
            method({"fits": (2, 2)})


def test_repr_is_readable():
    """The repr says how much of what, not the indices."""
    region = Region({"a": Selection.whole((1000, 2)), "b": Selection.rows((4, 2), [1]), "c": Selection.whole((5,))})
    assert repr(region) == "Region(3 tensors, 2,007 scalars: 2 whole, 1 rows)"
    assert repr(Region()) == "Region(0 tensors, 0 scalars)"


# Names


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "half_ft":
        return get_peft_model(model, HalfFTConfig())
    target = ["c_attn"] if model.config.model_type == "gpt2" else "all-linear"
    saved = {"lora": None, "modules_to_save": ["lm_head"], "tokens": None}[how]
    tokens = [1, 2] if how == "tokens" else None
    return get_peft_model(
        model, LoraConfig(target_modules=target, modules_to_save=saved, trainable_token_indices=tokens)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["lora", "modules_to_save", "tokens", "half_ft"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "gpt_neox", "opt"])
def test_wrapping_changes_no_name(architecture, how):
    """The base parameters keep names, order, shapes and identity inside any PEFT model, tied or not."""
    model = tiny(architecture)
    before, shapes = base_parameters(model), shapes_of(model)
    inside = wrapped(model, how)
    assert shapes_of(inside) == shapes
    assert list(base_parameters(inside)) == list(before)
    assert all(parameter is before[name] for name, parameter in base_parameters(inside).items())


def test_two_adapters_on_one_module_change_no_name():
    """A second adapter, LoRA on top of what LoRA wrapped already, is looked through as well."""
    model = tiny("llama")
    before = list(shapes_of(model))
    inside = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    inside.add_adapter("second", LoraConfig(target_modules=["q_proj", "up_proj"]))
    assert list(shapes_of(inside)) == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_those_of_the_model(architecture):
    """Names, order and tensors are those of `named_parameters()`: a tied tensor comes once, under its first name."""
    model = tiny(architecture)
    assert [(n, id(p)) for n, p in base_parameters(model).items()] == [(n, id(p)) for n, p in model.named_parameters()]


def test_tied_tensors_count_once():
    """With tied embeddings the head is not there a second time, and `fraction` does not count it twice."""
    tied, untied = tiny("llama", tie_word_embeddings=True), tiny("llama")
    assert "lm_head.weight" in shapes_of(untied)
    assert "lm_head.weight" not in shapes_of(tied)
    assert Region.whole(tied).count == sum(parameter.numel() for parameter in tied.parameters())


def test_a_module_used_twice_comes_once():
    """A shared submodule has one name, the first."""
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared)})
    assert list(shapes_of(model)) == ["first.weight", "first.bias"]


def test_shapes_of_takes_tensors_and_shapes():
    """A state dict and a mapping of shapes serve in place of a model."""
    assert shapes_of({"a": torch.zeros(2, 3), "b": [4], "c": ()}) == {"a": (2, 3), "b": (4,), "c": ()}
