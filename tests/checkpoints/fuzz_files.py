"""Altered files that a library reads before this one does: regions, importances, the shards of a base."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from safetensors.torch import save_file

from peft_isolate import Region
from peft_isolate.checkpoints.shards import INDEX, Shards
from peft_isolate.methods.cofitune.importance import Importance
from peft_isolate.regions.selection import Selection
from tests.checkpoints.alterations import Script, altered_tensors, altered_text
from tests.checkpoints.fuzzing import Target, scratch, taken


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def _regions() -> tuple[bytes, bytes]:
    path = scratch() / "sound"
    Region({
        "a.weight": Selection.rows((6, 10), [0, 1, 4]),
        "b.weight": Selection.columns((3, 4, 5), [1, 3]),
        "c.bias": Selection.whole((9,)),
        "d.weight": Selection.elements((16, 16), [3, 7, 200]),
        "e.weight": Selection.all_but((16, 16), [3, 7, 201]),
    }).save(path)  # fmt: skip
    region = path.read_bytes()
    units = {f"model.layers.{i}.feed-forward.up": torch.rand(5, generator=_random(i)) for i in range(3)}
    Importance(units | {"model.layers.0.expert.down": torch.rand(2, 3)}, "absolute", 1, 24).save(path)
    return region, path.read_bytes()


def _judge_region(script: Script) -> None:
    """A region's file: a region that its own save gives back, within its tensors."""
    path = scratch() / "region.safetensors"
    path.write_bytes(altered_tensors(_regions()[0], script, ["selections"]))
    region = Region.load(path)
    for selection in region.values():
        assert 0 < selection.count <= selection.numel
        assert selection.indices.dtype == torch.int64
        assert bool((selection.indices.diff() > 0).all())
    with taken():
        region.save(again := scratch() / "again.safetensors")
        assert Region.load(again) == region


def _judge_importance(script: Script) -> None:
    """An importance's file: numbers from 0 to 1 of known keys."""
    path = scratch() / "importance.safetensors"
    path.write_bytes(altered_tensors(_regions()[1], script, ["importance"]))
    importance = Importance.load(path)
    assert importance.units
    assert all(bool(((units >= 0) & (units <= 1)).all()) for units in importance.units.values())
    with taken():
        importance.save(again := scratch() / "again.safetensors")
        assert Importance.load(again).units.keys() == importance.units.keys()


@functools.cache
def _shards() -> Path:
    folder = scratch() / "shards"
    folder.mkdir()
    save_file({"a": torch.randn(3, 4), "b": torch.arange(5)}, folder / "1.safetensors", {"format": "pt"})
    save_file({"c": torch.randn(8).bfloat16()}, folder / "2.safetensors", {"format": "pt"})
    return folder


NAMED = {
    "metadata": {"total_size": 104},
    "weight_map": {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"},
}


def _judge_shards(script: Script) -> None:
    """A base's files: every tensor that is named can be read, and lies in the folder."""
    sound = _shards()
    folder = scratch() / "altered-shards"
    folder.mkdir(exist_ok=True)
    first, index = (sound / "1.safetensors").read_bytes(), altered_text(NAMED, ())
    if script and script[0][1] % 2:
        first = altered_tensors(first, script)
    else:
        index = altered_text(NAMED, script)
    (folder / "1.safetensors").write_bytes(first)
    (folder / "2.safetensors").write_bytes((sound / "2.safetensors").read_bytes())
    (folder / INDEX).write_bytes(index)
    shards = Shards(folder)
    assert set(shards.files) <= {"1.safetensors", "2.safetensors"}
    for name, entry in shards.items():
        raw = (folder / entry.file).read_bytes()[entry.start : entry.start + entry.n_bytes]
        assert raw == shards.read(name).reshape(-1).view(torch.uint8).numpy().tobytes() if entry.n_bytes else True


IN_FILES = tuple(
    Target(judge.__name__.removeprefix("_judge_"), judge)
    for judge in (_judge_region, _judge_importance, _judge_shards)
)
