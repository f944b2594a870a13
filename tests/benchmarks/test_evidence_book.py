"""The book of runs: numbers as they were written, stages in their order, and what a script says when it ends."""

from __future__ import annotations

import sys

import book
import pytest
from book import Book


@pytest.fixture
def made(tmp_path, monkeypatch) -> Book:
    """A book in which a run is its own row, made in this process; run 3 cannot be made."""

    def run_all(book: Book, stage, rows, workers, until) -> bool:
        new = [run for run in book.pending(stage(rows), rows) if run.number != 3]
        book.add(rows, [{"number": run.number, "stage": stage.__name__} for run in new])
        return all(run.number != 3 for run in stage(rows))

    monkeypatch.setattr(book, "run_all", run_all)
    return Book(tmp_path / "b.csv", ("number",), ("stage",), lambda run: [{"number": run.number}], list, str)


class Run:
    def __init__(self, number: int) -> None:
        self.number, self.name = number, f"run {number}"


def first(rows):
    return [Run(1)]


def second(rows):
    """Plans from what the first has left."""
    return [Run(row["number"] + 1) for row in rows if row["stage"] == "first"]


def third(rows):
    return [Run(3)]


@pytest.mark.parametrize("number", [3, -1, 0.5, 95.0, 1e-05])
def test_a_number_is_read_as_it_was_written(number, tmp_path):
    """A whole number is none with a decimal point."""
    book.write(tmp_path / "b.csv", [{"x": number, "word": "7", "none": "", "yes": True}])
    [row] = book.read(tmp_path / "b.csv", ["word"])
    assert (row["x"], row["word"], row["none"], row["yes"]) == (number, "7", "", True)
    assert type(row["x"]) is type(number)
    before = (tmp_path / "b.csv").read_bytes()
    book.write(tmp_path / "b.csv", [row])
    assert (tmp_path / "b.csv").read_bytes() == before


def test_stages_are_made_in_order_until_one_is_not_whole(made):
    assert book.run_stages(made, [first, second], 1, 0.0)
    assert [row["number"] for row in made.rows()] == [1, 2]
    assert not book.run_stages(made, [third, first], 1, 0.0)


@pytest.mark.parametrize(("words", "code", "stages"), [([], 1, ["first"]), (["--stage", "first"], 0, ["first"])])
def test_a_script_ends_with_whether_all_is_there(made, monkeypatch, words, code, stages):
    """And makes the one stage that it is asked for."""
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    with pytest.raises(SystemExit) as ended:
        book.command("What it does.", made, [first, third, second])
    assert ended.value.code == code
    assert [row["stage"] for row in made.rows()] == stages


def test_no_run_is_begun_after_the_time(tmp_path, capsys):
    """Nor the first ones."""
    unmade = Book(tmp_path / "b.csv", ("number",), ("stage",), lambda run: [{"number": run.number}], list, str)
    assert not book.run_all(unmade, first, [], 1, until=0.0)
    assert not unmade.path.exists()
    assert "first: 1 runs" in capsys.readouterr().out
