"""Region is a set of scalars of a model: exact against dense masks, and whole or absent on the disk."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

import peft_isolate.regions.region as region_module
from peft_isolate import HalfFTConfig
from peft_isolate.errors import FormatError, RegionError
from peft_isolate.regions import Region, Selection, base_parameters, shapes_of
from tests.models import ARCHITECTURES, tiny

SHAPES = {"a.weight": (3, 4), "a.bias": (3,), "b.weight": (2, 2, 3), "scale": ()}
KINDS = ("whole", "rows", "columns", "elements", "all_but")
Masks = dict[str, torch.Tensor]


@st.composite
def regions(draw) -> tuple[Region, Masks]:
    """A region over some of SHAPES, and the same as one bool tensor per name."""
    chosen = {}
    for name, shape in SHAPES.items():
        if draw(st.booleans()):
            kind = draw(st.sampled_from(KINDS))
            sizes = {"rows": math.prod(shape[:-1]), "columns": shape[-1] if shape else 1}
            indices = sorted(draw(st.sets(st.integers(0, sizes.get(kind, math.prod(shape)) - 1))))
            chosen[name] = Selection.whole(shape) if kind == "whole" else getattr(Selection, kind)(shape, indices)
    return Region(chosen), masks_of(Region(chosen))


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


# Files


def example() -> Region:
    return Region(
        {
            "whole": Selection.whole((3, 4)),
            "rows": Selection.rows((4, 3), [0, 2]),
            "columns": Selection.columns((2, 2, 5), [1, 4]),
            "elements": Selection.elements((3, 4), [0, 5, 11]),
            "all_but": Selection.all_but((3, 4), [7]),
            "scalar": Selection.whole(()),
        }
    )


@settings(max_examples=30, deadline=None)
@given(regions())
def test_save_and_load_any_region(tmp_path_factory, made):
    """Load gives back what was saved: same names, kinds, order and indices, also of an empty region."""
    path = tmp_path_factory.mktemp("regions") / "region.safetensors"
    made[0].save(path)
    back = Region.load(path)
    assert back == made[0]
    assert [(n, s.kind, s.indices.tolist()) for n, s in back.items()] == [
        (n, s.kind, s.indices.tolist()) for n, s in made[0].items()
    ]


def test_one_selection_under_several_names_is_saved(tmp_path):
    """Safetensors takes no tensor twice; a region of many layers may well hold one selection many times."""
    rows = Selection.rows((4, 3), [0, 2])
    region = Region({"layers.0.q": rows, "layers.1.q": rows})
    region.save(tmp_path / "region")
    assert Region.load(tmp_path / "region") == region


def rewrite(path, tensors=None, metadata=None, **entries) -> None:
    """Write `example()` with some of its tensors, metadata or descriptions replaced; None takes one away."""
    described = {name: {"kind": s.kind, "shape": list(s.shape)} for name, s in example().items()} | entries
    written = {name: s.indices.clone() for name, s in example().items() if s.kind != "whole"} | (tensors or {})
    header = {"format": region_module.FORMAT, "selections": json.dumps(described)} | (metadata or {})
    save_file(
        {name: tensor for name, tensor in written.items() if tensor is not None},
        path,
        metadata={key: value for key, value in header.items() if value is not None},
    )


def test_rewrite_without_changes_is_what_save_writes(tmp_path):
    """The altered files below differ from a good one in what they say, and in nothing else."""
    rewrite(tmp_path / "region")
    assert Region.load(tmp_path / "region") == example()


@pytest.mark.parametrize(
    "altered",
    [
        {"tensors": {"rows": torch.tensor([2, 0])}},
        {"tensors": {"elements": torch.tensor([5, 5])}},
        {"tensors": {"elements": torch.tensor([0, 12])}},
        {"tensors": {"all_but": torch.tensor([-1])}},
        {"tensors": {"columns": torch.tensor([1.0])}},
        {"tensors": {"columns": torch.tensor([[1]])}},
        {"tensors": {"rows": None}},
        {"rows": {"kind": "diagonal", "shape": [4, 3]}},
        {"rows": {"kind": "load", "shape": [4, 3]}},
        {"rows": {"kind": ["rows"], "shape": [4, 3]}},
        {"rows": {"kind": "rows"}},
        {"rows": {"shape": [4, 3]}},
        {"rows": {"kind": "rows", "shape": [2, 3]}},
        {"rows": {"kind": "rows", "shape": [4, "x"]}},
        {"whole": {"kind": "whole", "shape": [-3, 4]}},
        {"whole": {"kind": "whole", "shape": [3.5, 4]}},
        {"whole": {"kind": "whole", "shape": [math.inf]}},
        {"whole": {"kind": "whole", "shape": 3}},
        {"rows": 7},
        {"metadata": {"format": "peft_isolate.region/99"}},
        {"metadata": {"format": None}},
        {"metadata": {"selections": None}},
        {"metadata": {"selections": "{"}},
        {"metadata": {"selections": "[1]"}},
        {"metadata": {"selections": "null"}},
    ],
    ids=str,
)
def test_an_altered_file_is_refused(tmp_path, altered):
    """Whatever of a region file is changed to nonsense: FormatError, with the file's name."""
    rewrite(tmp_path / "region", **altered)
    with pytest.raises(FormatError, match="region' is not a readable region"):
        Region.load(tmp_path / "region")


def test_a_truncated_file_is_refused(tmp_path):
    """A file cut anywhere is no region."""
    path = tmp_path / "region"
    example().save(path)
    content = path.read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError):
            Region.load(path)


def test_foreign_files_are_refused(tmp_path):
    """Another safetensors file, a text, a folder: FormatError. A path where nothing is: Python's own error."""
    (tmp_path / "text").write_text("not a region, whatever its name says")
    (tmp_path / "folder").mkdir()
    save_file({"lora_A": torch.zeros(2)}, tmp_path / "adapter")
    for name in ("text", "folder", "adapter"):
        with pytest.raises(FormatError, match=name):
            Region.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Region.load(tmp_path / "nothing")


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    """A disk that fills while writing loses nothing: the old region is whole, and no half file lies beside it."""
    path = tmp_path / "region"
    example().save(path)
    before = path.read_bytes()

    def full_disk(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(region_module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        Region().save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["region"]
    monkeypatch.undo()
    Region().save(path)
    assert Region.load(path) == Region()
    assert [file.name for file in tmp_path.iterdir()] == ["region"]


def test_a_saved_file_has_the_usual_rights(tmp_path):
    """Saving through a temporary file must not make the region private: its mode is that of any new file."""
    (tmp_path / "usual").touch()
    example().save(tmp_path / "region")
    assert (tmp_path / "region").stat().st_mode == (tmp_path / "usual").stat().st_mode


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
