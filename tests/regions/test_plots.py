"""The picture of what was trained: what stands in it, what it leaves alone, what it refuses."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path

import pytest

from peft_isolate.errors import IsolateError

matplotlib = pytest.importorskip("matplotlib")

from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from peft_isolate.regions.plots import plot_trained_share  # noqa: E402

SHARES = {(0, "q"): 1.0, (0, "down"): 0.0, (1, "q"): 0.25, (None, "head"): 0.999, (None, "norm"): 0.001}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Keeps every figure that is saved, with what was drawn in it."""
    kept: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args, **kwargs):
        kept.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def cells(figure: Figure) -> dict[tuple[float, float], tuple[float, ...]]:
    """Lower corner and colour of every cell, without the hatched background."""
    patches = [p for p in figure.axes[0].patches if isinstance(p, Rectangle) and not p.get_hatch()]
    return {p.get_xy(): p.get_facecolor() for p in patches}


def test_every_share_is_a_cell_and_nothing_else_is(tmp_path: Path, figures: list[Figure]) -> None:
    plot_trained_share(SHARES, tmp_path / "trained.png", title="half of it")
    (figure,) = figures
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q", "down", "norm", "head"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "outside"]
    assert [text.get_text() for text in figure.texts] == ["half of it"]
    # Columns from the left, rows from the top, the last one half a cell lower.
    assert set(cells(figure)) == {(0, 0.0), (1, 0.0), (0, 1.0), (2, 2.5), (3, 2.5)}
    top, bottom = axes.get_ylim()[1], axes.get_ylim()[0]
    assert (top, bottom) == (0, 3.5)


def test_a_larger_share_is_darker(tmp_path: Path, figures: list[Figure]) -> None:
    plot_trained_share({(0, "q"): 0.0, (0, "k"): 0.3, (0, "v"): 0.7, (0, "o"): 1.0}, tmp_path / "trained.png")
    colours = cells(figures[0])
    lightness = [sum(colours[column, 0.0][:3]) for column in range(4)]
    assert lightness == sorted(lightness, reverse=True)
    assert len(set(lightness)) == 4


def test_numbers_say_zero_and_one_only_where_it_is_exact(tmp_path: Path, figures: list[Figure]) -> None:
    plot_trained_share(SHARES, tmp_path / "trained.png")
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["1", "0", ".25", "<.01", ">.99"]


def test_many_layers_have_no_numbers_and_fewer_marks(tmp_path: Path, figures: list[Figure]) -> None:
    shares = {(layer, role): 0.5 for layer in range(80) for role in ("q", "up")}
    plot_trained_share({**shares, (None, "head"): 0.0}, tmp_path / "trained.png")
    axes = figures[0].axes[0]
    assert not axes.texts
    assert [label.get_text() for label in axes.get_yticklabels()] == [*map(str, range(0, 80, 4)), "outside"]
    assert len(cells(figures[0])) == 161
    assert figures[0].get_size_inches()[1] < 16


@pytest.mark.parametrize("shares", [{(None, "unknown"): 1.0}, {(3, "expert"): 0.5}, {(0, "q"): 0, (7, "q"): 1}])
def test_odd_models_are_drawn(tmp_path: Path, shares: dict) -> None:
    plot_trained_share(shares, tmp_path / "trained.png")
    assert (tmp_path / "trained.png").stat().st_size > 0


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")])
def test_the_ending_chooses_the_format(tmp_path: Path, name: str, magic: bytes) -> None:
    path = tmp_path / "new" / "folder" / name
    plot_trained_share(SHARES, str(path))
    assert path.read_bytes().startswith(magic)
    assert [entry.name for entry in path.parent.iterdir()] == [name]


def test_an_ending_that_matplotlib_does_not_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsolateError, match=r"a\.xyz': matplotlib writes no 'xyz'; use \.png, \.svg or \.pdf"):
        plot_trained_share(SHARES, tmp_path / "new" / "a.xyz")
    assert not list(tmp_path.iterdir())


def test_pyplot_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    plot_trained_share(SHARES, tmp_path / "trained.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_a_failed_drawing_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trained.png"
    path.write_bytes(b"old")

    def full_disk(self: Figure, target: Path, **kwargs) -> None:
        Path(target).write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space left"):
        plot_trained_share(SHARES, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("share", [-0.01, 1.01, float("nan")])
def test_what_is_no_share_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(IsolateError, match="the share of \\(2, 'k'\\)"):
        plot_trained_share({(2, "k"): share}, tmp_path / "trained.png")
    assert not list(tmp_path.iterdir())


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsolateError, match="no shares"):
        plot_trained_share({}, tmp_path / "trained.png")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'peft_isolate\[plots\]'"):
        plot_trained_share(SHARES, tmp_path / "trained.png")
