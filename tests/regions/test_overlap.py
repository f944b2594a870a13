"""Counts of overlaps are those of dense masks, whatever the kinds are, and take the memory of one tensor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_isolate.errors import RegionError
from peft_isolate.regions import Region, Selection, overlap
from peft_isolate.regions.overlap import count_masked, count_sorted, overlaps, shapes_of_all
from peft_isolate.regions.stored import StoredSelection
from tests.regions.test_region import regions


def slow_overlaps(masks: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    """The twin: dense masks of the whole model, each with each."""
    return [[sum(int((a[name] & b[name]).sum()) for name in a) for b in masks] for a in masks]


@settings(max_examples=150, deadline=None)
@given(st.lists(regions(), max_size=5), st.sampled_from([0, 0.3, 2]))
def test_overlaps_are_those_of_masks(made, dense):
    """Of any kinds, packed or not, counted by masks or by sorted lists: exact, symmetric, sizes on the diagonal."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(overlap, "DENSE", dense)
        counts = overlaps([region for region, _ in made])
    assert counts.dtype == np.int64
    assert counts.shape == (len(made), len(made))
    assert counts.tolist() == slow_overlaps([masks for _, masks in made])


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 700))
def test_masks_and_sorted_lists_count_alike(data, numel):
    """Also where a tensor takes many windows and blocks, of which the last is not full."""
    lists = [
        np.array(sorted(data.draw(st.sets(st.integers(0, numel - 1), min_size=1))), np.int32)
        for _ in range(data.draw(st.integers(2, 4)))
    ]
    twin = [[len({*a.tolist()} & {*b.tolist()}) if a is not b else 0 for b in lists] for a in lists]
    assert count_sorted(lists).tolist() == twin
    for window, block in ((overlap.WINDOW, overlap.BLOCK), (64, 1), (8, 3), (128, 2)):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(overlap, "WINDOW", window)
            patched.setattr(overlap, "BLOCK", block)
            assert count_masked(iter(lists), len(lists), numel).tolist() == twin


@pytest.mark.parametrize(("count", "by"), [(299, "count_sorted"), (301, "count_masked")])
def test_density_decides_how_is_counted(count, by, monkeypatch):
    """From 0.3 % on average, holes and elements alike, masks; below it sorted lists. Each code is decoded once."""
    ways, decoded = Counter(), Counter()
    for name in ("count_sorted", "count_masked"):
        real = getattr(overlap, name)
        monkeypatch.setattr(overlap, name, lambda *args, name=name, real=real: (ways.update([name]), real(*args))[1])
    decode = StoredSelection.decode
    monkeypatch.setattr(
        StoredSelection, "decode", lambda self, data: (decoded.update([id(self)]), decode(self, data))[1]
    )
    shape = (100, 1000)
    few = Region({"w": Selection.elements(shape, range(0, 100_000, 400))}).packed()  # 250
    most = Region({"w": Selection.all_but(shape, range(0, 2 * (2 * count - 250), 2))}).packed()
    counts = overlaps([few, most, few, most])
    common = len({*range(0, 100_000, 400)} - {*range(0, 2 * (2 * count - 250), 2)})
    assert counts[0].tolist() == [250, common, 250, common]
    assert counts[1, 3] == most.count
    assert ways == {by: 1}
    assert sorted(decoded.values()) == [2, 2]  # of two places, each in two regions


def test_parameters_of_one_region_take_no_decoding(monkeypatch):
    """What no other region touches has nothing in common with it: its count says all."""
    monkeypatch.setattr(StoredSelection, "decode", None)
    one, other = (Region({name: Selection.elements((8, 8), [1, 2])}).packed() for name in ("a", "b"))
    assert overlaps([one, other, Region()]).tolist() == [[2, 0, 0], [0, 2, 0], [0, 0, 0]]
    assert overlaps([]).shape == (0, 0)


def test_tensors_of_any_size_are_counted_by_what_is_selected():
    """A region's file may claim any shape: rows, columns and positions cost what is listed, not the tensor."""
    shape, at = (2**30, 2**30), [5, 2**40, 2**59]
    given = [
        Selection.elements(shape, at),
        Selection.all_but(shape, at[1:]),
        Selection.rows(shape, [0, 2**29]),
        Selection.columns(shape, [0, 5, 2**29]),
        Selection.whole(shape),
    ]
    numel = 2**60
    assert overlaps([Region({"a": selection}) for selection in given]).tolist() == [
        [3, 1, 2, 3, 3],
        [1, numel - 2, 2**31 - 1, 3 * 2**30 - 2, numel - 2],
        [2, 2**31 - 1, 2**31, 6, 2**31],
        [3, 3 * 2**30 - 2, 6, 3 * 2**30, 3 * 2**30],
        [3, numel - 2, 2**31, 3 * 2**30, numel],
    ]


def test_regions_of_different_models_have_no_overlap():
    """The first parameter with two shapes is named, with both, and with the regions that have them."""
    a, b = (Region({"same": Selection.whole((2,)), "w": Selection.rows(shape, [1])}) for shape in ((4, 6), (4, 8)))
    with pytest.raises(RegionError, match=r"'w' has shape \(4, 6\) in regions\[1\] and \(4, 8\) in regions\[2\]"):
        overlaps([Region(), a, b])
    assert shapes_of_all({"a": a, "same": Region({"x": Selection.whole((3,))})}) == {
        "same": (2,), "w": (4, 6), "x": (3,)
    }  # fmt: skip


MIB = 2**20
CHILD = """
import sys, numpy as np, torch
torch.set_num_threads(1)
from peft_isolate.methods.core_isolation.grouping import group_tasks
from peft_isolate.regions import Region
from peft_isolate.regions.codes import Codes, encode
from peft_isolate.regions.stored import StoredSelection

rows, columns, tensors, tasks = map(int, sys.argv[1:])
drawn, regions = np.random.default_rng(0), {}
for task in range(tasks):
    positions = np.unique(drawn.integers(0, rows * columns, rows * columns // 99, dtype=np.int32))
    code, format = encode(positions, rows * columns)
    codes = Codes(positions.size, code.size, format)
    # Every tensor has bytes of its own, as every tensor of a core has.
    regions[str(task)] = Region({
        str(i): StoredSelection("elements", (rows, columns), codes, torch.from_numpy(code.copy()))
        for i in range(tensors)
    })
grouping = group_tasks(regions)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")) * 1024
print("SIZE", min(grouping.sizes), "CHANCE", grouping.chance, "JACCARD", grouping.jaccard[0, 1], "PEAK", peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_twenty_tasks_of_a_7b_model_stay_within_4_gib():
    """20 cores of 70 million scalars, 1 % of 7 billion in 150 tensors: a process that groups them, all in all."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "6840", "6840", "150", "20"],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    found = dict(zip(words[::2], map(float, words[1::2]), strict=True))
    print(f"peak {found['PEAK'] / MIB:.0f} MiB")
    assert found["SIZE"] > 70_000_000
    assert found["JACCARD"] == pytest.approx(found["CHANCE"], rel=0.05)
    assert found["PEAK"] < 4096 * MIB
