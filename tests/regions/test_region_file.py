"""A region's file: whole or absent on the disk, small, and read as what a stranger may have made."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import save_file

import peft_isolate.regions.region_file as file_module
from peft_isolate.errors import FormatError, IsolateError
from peft_isolate.regions import Region, Selection
from peft_isolate.regions.codes import encode
from peft_isolate.regions.stored import StoredSelection
from tests.regions.test_region import regions


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
    one = Region({"v": Selection.elements((4, 3), [0, 2])}).packed().places["v"]
    Region({"v": one, "w": one}).save(tmp_path / "region")
    assert Region.load(tmp_path / "region") == Region({"v": one, "w": one})


def test_a_loaded_region_is_packed(tmp_path):
    """A file is about as large as its codes, and what is loaded holds no more; nor does it hold on to the file."""
    region = Region({"w": Selection.elements((1000, 1000), torch.arange(0, 10**6, 100))})
    region.save(tmp_path / "region")
    assert (tmp_path / "region").stat().st_size < 1.2 * 10_000
    loaded = Region.load(tmp_path / "region")
    assert isinstance(loaded.places["w"], StoredSelection)
    before = loaded.places["w"].data.clone()
    with open(tmp_path / "region", "rb+") as file:
        file.seek(-100, 2)
        file.write(bytes(100))
    assert torch.equal(loaded.places["w"].data, before)
    assert loaded == region


def test_rows_of_many_experts_are_a_small_file(tmp_path):
    """Row numbers are coded like any: a header that lists each would pass what safetensors reads."""
    region = Region({f"{i}": Selection.rows((10**6, 2), torch.arange(0, 10**6, 2)) for i in range(3)})
    region.save(tmp_path / "region")
    assert (tmp_path / "region").stat().st_size < 500_000
    assert Region.load(tmp_path / "region") == region


def rewrite(path, tensors=None, metadata=None, **entries) -> None:
    """Write `example()` as version 1, with some tensors, metadata or descriptions replaced; None takes one away."""
    described = {name: {"kind": s.kind, "shape": list(s.shape)} for name, s in example().items()} | entries
    written = {name: s.indices.clone() for name, s in example().items() if s.kind != "whole"} | (tensors or {})
    header = {"format": file_module.INDICES, "selections": json.dumps(described)} | (metadata or {})
    save_file(
        {name: tensor for name, tensor in written.items() if tensor is not None},
        path,
        metadata={key: value for key, value in header.items() if value is not None},
    )


def content(path) -> tuple[dict[str, str], dict[str, list[int]]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name).tolist() for name in sorted(file.keys())}


def test_rewrite_without_changes_is_what_save_writes(tmp_path):
    """The altered files below differ from a good one in what they say, and in nothing else.

    A file of version 1 is still read, to a packed region.
    """
    rewrite(tmp_path / "region")
    assert Region.load(tmp_path / "region") == example()
    assert isinstance(Region.load(tmp_path / "region").places["all_but"], StoredSelection)
    recode(tmp_path / "region")
    assert Region.load(tmp_path / "region") == example()
    example().save(tmp_path / "saved")
    assert content(tmp_path / "saved") == content(tmp_path / "region")


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


def recode(path, tensors=None, **entries) -> None:
    """Write `example()` as version 2, with some of its tensors replaced, and some entries of its descriptions."""
    described, written = {}, {}
    for name, selection in example().items():
        described[name] = {"kind": selection.kind, "shape": list(selection.shape)}
        if selection.kind != "whole":
            size = {"rows": 4, "columns": 5}.get(name, 12)
            code, format = encode(selection.indices, size)
            described[name] |= {"count": selection.indices.numel(), "format": format}
            written[name] = torch.from_numpy(code)
        described[name] |= entries.get(name, {})
    written = {name: t for name, t in (written | (tensors or {})).items() if t is not None}
    metadata = {"format": file_module.FORMAT, "selections": json.dumps(described)}
    save_file(written, path, metadata=metadata)


def test_what_is_wrong_is_said(tmp_path):
    """An unknown kind, a missing tensor, a version to come: by name."""
    for altered, message in [
        ({"rows": {"kind": "diagonal"}}, "'rows' has the unknown kind 'diagonal'"),
        ({"tensors": {"rows": None}}, "the indices of 'rows' are missing"),
    ]:
        recode(tmp_path / "region", **altered)
        with pytest.raises(FormatError, match=message):
            Region.load(tmp_path / "region")
    recode(tmp_path / "region")
    with safe_open(tmp_path / "region", framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in sorted(file.keys())}
    save_file(tensors, tmp_path / "later", metadata=metadata | {"format": "peft_isolate.region/3"})
    with pytest.raises(FormatError, match=r"its format is 'peft_isolate.region/3', not 'peft_isolate.region/2' or "):
        Region.load(tmp_path / "later")


def coded(*indices: int, size: int = 12, format: str = "gap2") -> torch.Tensor:
    return torch.from_numpy(encode(torch.tensor(indices), size, format)[0])


@pytest.mark.parametrize(
    "altered",
    [
        {"tensors": {"elements": torch.zeros(2, dtype=torch.uint8)}},
        {"tensors": {"elements": torch.zeros(3, dtype=torch.uint8)}},
        {"tensors": {"elements": torch.tensor([0, 5, 11])}},
        {"tensors": {"elements": torch.zeros(2, 1, dtype=torch.uint8)}},
        {"tensors": {"elements": torch.zeros(2, dtype=torch.bfloat16)}},
        {"tensors": {"elements": None}},
        {"tensors": {"rows": None}},
        {"tensors": {"rows": torch.tensor([255], dtype=torch.uint8)}},
        {"elements": {"count": 2}},
        {"elements": {"count": 4}},
        {"elements": {"count": 10**15}},
        {"elements": {"count": -1}},
        {"elements": {"count": 3.0}},
        {"elements": {"count": True}},
        {"elements": {"count": None}},
        {"elements": {"format": "gap3"}},
        {"elements": {"format": "gap33"}},
        {"elements": {"format": ["gap2"]}},
        {"elements": {"shape": [3, 3]}},
        {"elements": {"shape": [10**400]}},
        {"elements": {"kind": "diagonal"}},
        {"elements": {"count": 0}, "tensors": {"elements": torch.zeros(0, dtype=torch.uint8)}},
        {"all_but": {"count": 0}, "tensors": {"all_but": torch.zeros(0, dtype=torch.uint8)}},
        {"elements": {"count": 12, "format": "gap2"}, "tensors": {"elements": coded(*range(12))}},
        {"rows": {"count": 4, "format": "gap2"}, "tensors": {"rows": coded(*range(4), size=4)}},
        {"rows": {"count": 2, "format": "gap2", "shape": [3, 3]}, "tensors": {"rows": coded(0, 3)}},
        {"columns": {"count": 2, "format": "gap2"}, "tensors": {"columns": coded(0, 5)}},
        {"whole": {"shape": [2**62, 2]}},
    ],
    ids=str,
)
def test_an_altered_file_of_codes_is_refused(tmp_path, altered):
    """Whatever is not the one code of some of the indices there are: FormatError, with the file's name."""
    recode(tmp_path / "region", **altered)
    with pytest.raises(FormatError, match="region' is not a readable region"):
        Region.load(tmp_path / "region")


def test_a_claim_takes_no_memory(tmp_path):
    """A few bytes that speak of a tensor of 2⁶⁰ scalars are a few positions, whatever is asked about them."""
    shape, at = (2**30, 2**30), [5, 2**40, 2**59]
    region = Region({"a": Selection.elements(shape, at), "b": Selection.rows(shape, [1, 2**29])})
    region.save(tmp_path / "region")
    loaded = Region.load(tmp_path / "region")
    assert loaded.count == 3 + 2**31
    assert loaded["a"].indices.tolist() == at
    assert loaded == region
    assert loaded.jaccard(region.packed()) == 1


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
    """Another safetensors file, a text, a folder: FormatError. A path where nothing is: said so."""
    (tmp_path / "text").write_text("not a region, whatever its name says")
    (tmp_path / "folder").mkdir()
    save_file({"lora_A": torch.zeros(2)}, tmp_path / "adapter")
    for name in ("text", "folder", "adapter"):
        with pytest.raises(FormatError, match=name):
            Region.load(tmp_path / name)
    with pytest.raises(IsolateError, match="nothing': there is no such file; pass the path of a saved region"):
        Region.load(tmp_path / "nothing")


def test_what_is_of_no_selection_is_refused(tmp_path):
    """A tensor more, one of a parameter that is selected whole, a name described twice: two readers could differ."""
    path = tmp_path / "region"
    for write in (rewrite, recode):
        for name in ("more", "whole"):
            write(path, tensors={name: torch.tensor([1], dtype=torch.uint8)})
            with pytest.raises(FormatError, match=f"it has a tensor '{name}', which is of no selection"):
                Region.load(path)
    for twice in (
        '{"w": {"kind": "whole", "shape": [3]}, "w": {"kind": "whole", "shape": [4]}}',
        '{"w": {"kind": "whole", "shape": [3], "shape": [4]}}',
    ):
        save_file({}, path, metadata={"format": file_module.FORMAT, "selections": twice})
        with pytest.raises(FormatError, match="one comes twice"):
            Region.load(path)


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    """A disk that fills while writing loses nothing: the old region is whole, and no half file lies beside it."""
    path = tmp_path / "region"
    example().save(path)
    before = path.read_bytes()

    def full_disk(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_module, "save_file", full_disk)
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
