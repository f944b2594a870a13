"""Grouping: which tasks share a stage is what the paper's graph says, and can be read, drawn, kept and trusted."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_isolate.errors import FormatError, IsolateError, RegionError
from peft_isolate.methods.core_isolation.grouping import Grouping, group_tasks
from peft_isolate.regions import Region, Selection

SHAPE = (10, 10)


def core(*ranges: range, shape: tuple[int, ...] = SHAPE) -> Region:
    return Region({"w": Selection.elements(shape, sorted({i for each in ranges for i in each}))})


def chain() -> dict[str, Region]:
    """a – b – c overlap by a third each, a and c not at all; d stands alone."""
    return {
        "a": core(range(20)),
        "d": core(range(80, 100)),
        "b": core(range(10, 30)),
        "c": core(range(20, 40)).packed(),
    }


def slow_groups(regions: dict[str, Region], threshold: float | None) -> set[frozenset[str]]:
    """The twin: groups are merged as long as two of them have linked tasks."""
    groups = {frozenset([task]) for task in regions}
    for one, other in itertools.combinations(regions, 2):
        if threshold is not None and regions[one].jaccard(regions[other]) >= threshold:
            joined = frozenset().union(*(group for group in groups if one in group or other in group))
            groups = {group for group in groups if not group & joined} | {joined}
    return groups


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 15), min_size=1), min_size=1, max_size=6),
    st.one_of(st.none(), st.sampled_from([0, 1, 0.5, 1 / 3]), st.floats(0, 1)),
    st.integers(0, 3),
)
def test_groups_are_connected_components(cores, threshold, seed):
    """Jaccard, sizes and groups are the twin's; the order is the seed's, and within a group that of `regions`."""
    regions = {str(i): Region({"w": Selection.elements((16,), sorted(at))}) for i, at in enumerate(cores)}
    grouping = group_tasks(regions, threshold, seed=seed)
    assert grouping.tasks == tuple(regions)
    assert grouping.sizes == tuple(map(len, cores))
    assert grouping.jaccard.tolist() == [[a.jaccard(b) for b in regions.values()] for a in regions.values()]
    assert set(map(frozenset, grouping.groups)) == slow_groups(regions, threshold)
    assert all(list(group) == sorted(group) for group in grouping.groups)
    by_first = sorted(grouping.groups)
    random.Random(seed).shuffle(by_first)
    assert list(grouping.groups) == by_first
    assert Grouping.from_dict(json.loads(json.dumps(grouping.to_dict()))) == grouping


def test_threshold_is_the_papers():
    """An edge from τ on, τ itself among it; 0 links all, None links none, 1 equal regions alone."""
    regions = chain()
    jaccard = regions["a"].jaccard(regions["b"])
    assert jaccard == 10 / 30
    order = ["a", "b", "c", "d"]
    for threshold, groups in [
        (0.1, (("a", "b", "c"), ("d",))),
        (jaccard, (("a", "b", "c"), ("d",))),
        (np.nextafter(jaccard, 1), (("a",), ("b",), ("c",), ("d",))),
        (0, (("a", "b", "c", "d"),)),
        (None, (("a",), ("b",), ("c",), ("d",))),
    ]:
        grouping = group_tasks(regions, threshold, order=order)
        assert grouping.groups == groups
        assert grouping.threshold == threshold
    same = {"x": core(range(5)), "y": core(range(5)), "z": core(range(6))}
    assert group_tasks(same, 1, order=["z", "x", "y"]).groups == (("z",), ("x", "y"))


def test_order_is_given_or_drawn():
    """A given order sets that of groups and of tasks; without one the seed does, and nothing else."""
    regions = chain()
    assert group_tasks(regions, order=["c", "d", "a", "b"]).groups == (("c", "a", "b"), ("d",))
    assert group_tasks(regions, order=iter("cdab")).groups == (("c", "a", "b"), ("d",))
    assert group_tasks(regions, order=("d", "b", "a", "c")).groups == (("d",), ("b", "a", "c"))
    assert group_tasks(regions, order=["d", "b", "a", "c"], seed=5).groups == (("d",), ("b", "a", "c"))
    random.seed(1)
    drawn = {seed: group_tasks(regions, None, seed=seed).groups for seed in range(20)}
    assert len(set(drawn.values())) > 5
    random.seed(2)
    assert group_tasks(regions, None, seed=3).groups == drawn[3]
    # Written out, so that no version of Python or of this library draws another order for a run that goes on.
    assert drawn[0] == (("b",), ("a",), ("d",), ("c",))


def test_chance_is_what_random_regions_would_have():
    """p / (200 − p) for equal p, the mean over pairs else; measured on random regions."""
    generator = torch.Generator().manual_seed(0)

    def random_core(count: int) -> Region:
        at = torch.randperm(10**6, generator=generator)[:count].sort().values
        return Region({"w": Selection.elements((1000, 1000), at)})

    equal = group_tasks({str(i): random_core(10_000) for i in range(6)})
    assert equal.chance == pytest.approx(1 / 199)
    measured = equal.jaccard[np.triu_indices(6, 1)].mean()
    assert measured == pytest.approx(equal.chance, rel=0.05)
    mixed = group_tasks({str(i): random_core(count) for i, count in enumerate((1_000, 100_000, 500_000))})
    assert mixed.chance == pytest.approx(mixed.jaccard[np.triu_indices(3, 1)].mean(), rel=0.05)
    assert group_tasks({"a": core(range(10)), "b": core(range(10, 20))}, total=1000).chance == pytest.approx(1 / 199)
    assert group_tasks({"a": core(range(10))}).chance == 0
    two = Region({"v": Selection.whole((100,)), "w": Selection.empty(SHAPE)})
    assert group_tasks({"a": core(range(50)), "b": two}).chance == pytest.approx(25 / 125)  # of 200 scalars


def test_regions_come_from_files(tmp_path):
    """A path stands for the region saved there."""
    regions = chain()
    for task, region in regions.items():
        region.save(tmp_path / task)
    from_files = group_tasks({task: tmp_path / task if task < "c" else str(tmp_path / task) for task in regions})
    assert from_files == group_tasks(regions)


def refused(regions, match: str, error: type[Exception] = IsolateError, **arguments) -> None:
    with pytest.raises(error, match=match):
        group_tasks(regions, **arguments)


def test_bad_input_is_named():
    """What is wrong, why, and what to do instead, before anything is counted."""
    regions = chain()
    refused({}, "no region to group: pass one for each task")
    refused(regions | {"e": Region()}, "region of 'e' is empty.*leave the task out", RegionError)
    other = {"e": core(range(5), shape=(10, 12))}
    refused(regions | other, r"'w' has shape \(10, 10\) in the region of 'a' and \(10, 12\) in .* 'e'", RegionError)
    for threshold in (-0.1, 1.1, float("nan"), "0.1", True, [0.1]):
        refused(regions, "threshold=.*from 0 ", threshold=threshold)
    for order in (["a", "b", "c"], ["a", "b", "c", "d", "d"], ["a", "b", "c", "x"], [], "abcd", 5, [1, 2, 3, 4]):
        refused(regions, "order=.* every task once: 'a', 'd', 'b', 'c'", order=order)
    for seed in (None, 1.0, "1", True):
        refused(regions, "seed=.*whole number", seed=seed)
    for total in (39, 0, -1, 100.0, True):
        refused(regions, "total=.*two of them select 40 already", total=total)
    assert group_tasks(regions, total=40).chance > 0
    refused(regions | {"e": {"w": 3}}, "'e': dict is no region")
    refused({"": core(range(3))}, "'' is no name of a task")
    refused({1: core(range(3))}, "1 is no name of a task")
    refused(regions | {"e": "nowhere"}, r"regions\['e'\]='nowhere': there is no such file; core_region")


def test_a_grouping_reads_as_a_table():
    """Groups, sizes, every Jaccard index, the threshold and the chance level stand in it."""
    text = str(group_tasks(chain(), order=["a", "b", "c", "d"]))
    assert text.splitlines() == [
        "   group  task  core  1       2       3       4",
        "1  1      a     20    1.0000  0.0000  0.3333  0.0000",
        "2  2      d     20    0.0000  1.0000  0.0000  0.0000",
        "3  1      b     20    0.3333  0.0000  1.0000  0.3333",
        "4  1      c     20    0.0000  0.0000  0.3333  1.0000",
        "groups    2, linked from a Jaccard of 0.1 on: a, b, c; d",
        "chance    0.1111, the Jaccard of random regions of these sizes",
    ]
    assert "each alone: " in str(group_tasks(chain(), None))
    assert "chance" not in str(group_tasks({"a": core(range(3))}))


def test_a_grouping_is_kept_whole_and_cannot_be_changed(tmp_path):
    """Saved and loaded it is the same, to the last digit; its numbers are read-only."""
    regions = {str(i): core(range(i, 3 * i + 1)) for i in range(1, 8)}
    grouping = group_tasks(regions, 0.3)
    grouping.save(tmp_path / "new" / "groups.json")
    loaded = Grouping.load(tmp_path / "new" / "groups.json")
    assert loaded == grouping
    assert hash(loaded) == hash(grouping)
    assert (loaded.jaccard == grouping.jaccard).all()
    assert loaded != group_tasks(regions, 0.31)
    assert loaded != "groups"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["groups.json"]
    with pytest.raises(ValueError, match="read-only"):
        grouping.jaccard[0, 1] = 1
    table = np.eye(1)
    Grouping(("a",), (("a",),), table, None, 0.0, (1,))
    table[0, 0] = 0.5  # the caller's own stays writable, and apart


@pytest.mark.parametrize(
    "altered",
    [
        {"format": "peft_isolate.groups/9"},
        {"tasks": []},
        {"tasks": ["a", "b"]},
        {"tasks": ["a", "d", "b", "b"]},
        {"tasks": "adbc"},
        {"tasks": ["a", "d", "b", 3]},
        {"groups": [["a", "b"], ["d"]]},
        {"groups": [["a", "b", "c"], ["d"], []]},
        {"groups": [["a", "b", "c"], ["d", "a"]]},
        {"groups": ["abc", "d"]},
        {"groups": 7},
        {"sizes": [1, 2, 3]},
        {"sizes": [1, 2, 3, 0]},
        {"sizes": [1, 2, 3, 4.0]},
        {"sizes": None},
        {"jaccard": [[1.0]]},
        {"jaccard": [[1.0] * 4] * 3},
        {"jaccard": [[0.1, 0.2, 0.3, 0.4]] * 4},
        {"jaccard": [[2.0] * 4] * 4},
        {"jaccard": [[float("nan")] * 4] * 4},
        {"jaccard": [["1"] * 4] * 4},
        {"jaccard": None},
        {"threshold": 2},
        {"threshold": "0.1"},
        {"chance": None},
        {"chance": float("inf")},
    ],
    ids=str,
)
def test_an_altered_file_is_refused(tmp_path, altered):
    """What is no grouping of these tasks: FormatError, with the file's name."""
    described = group_tasks(chain()).to_dict()
    path = tmp_path / "groups.json"
    path.write_text(json.dumps(described | altered))
    with pytest.raises(FormatError, match=r"groups.json' is no readable file of groups"):
        Grouping.load(path)
    for name in described:
        with pytest.raises(FormatError, match=name):
            Grouping.from_dict({key: value for key, value in described.items() if key != name})


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"null", b"\xff", b"[" * 100_000], ids=lambda content: str(content[:9])
)
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "groups.json").write_bytes(content)
    with pytest.raises(FormatError, match="no readable file of groups"):
        Grouping.load(tmp_path / "groups.json")


def test_plot_draws_groups_together(tmp_path, monkeypatch):
    """Tasks stand group by group, each group outlined; every pair is a cell, the diagonal none."""
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    figures, save = [], figure_class.savefig
    monkeypatch.setattr(figure_class, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    group_tasks(chain(), order=["b", "c", "d", "a"]).plot(tmp_path / "pictures" / "similarity.png")
    assert (tmp_path / "pictures" / "similarity.png").read_bytes()[1:4] == b"PNG"
    axes, bar = figures[0].axes
    names = ["b", "c", "a", "d"]
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    cells = {p.get_xy(): p.get_facecolor() for p in axes.patches if p.get_fill()}
    assert set(cells) == {(i, j) for i in range(4) for j in range(4) if i != j}
    assert cells[0, 1] == cells[1, 0] == cells[2, 0] != cells[2, 1]
    outlines = [(p.get_xy(), p.get_width(), p.get_height()) for p in axes.patches if not p.get_fill()]
    assert outlines == [((0, 0), 3, 3), ((3, 3), 1, 1)]
    written = {(t.get_position()): t.get_text() for t in axes.texts}
    assert written[1.5, 0.5] == ".333"
    assert written[3.5, 0.5] == "0"
    assert [label.get_text() for label in bar.get_yticklabels()] == ["0.1 linked, 0.11 chance", "0", "0.33"]


@pytest.mark.parametrize(("tasks", "threshold"), [(1, None), (1, 0.1), (2, 0.0), (30, 1.0)])
def test_plot_takes_any_number_of_tasks(tmp_path, tasks, threshold):
    """One task, all in one group, more than have room for numbers."""
    pytest.importorskip("matplotlib")
    regions = {f"task {i}": core(range(i, i + 5)) for i in range(tasks)}
    group_tasks(regions, threshold).plot(tmp_path / "similarity.svg", title="of a few")
    assert (tmp_path / "similarity.svg").stat().st_size > 1000
    with pytest.raises(IsolateError, match="writes no 'txt'"):
        group_tasks(regions).plot(tmp_path / "similarity.txt")
