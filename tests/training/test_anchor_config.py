"""What an AnchorConfig takes, what it refuses, and what it says of itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from peft_isolate.errors import FormatError, IsolateError
from peft_isolate.training.anchor.config import AnchorConfig

ROWS = [{"text": "the sun"}, {"text": "a river"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": -0.1}, "beta=-0.1"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"beta": float("inf")}, "beta=inf"),
        ({"beta": True}, "beta=True"),
        ({"beta": "1"}, "beta='1'"),
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"every": 0}, "every=0"),
        ({"every": True}, "every=True"),
        ({"n_rows": 0}, "n_rows=0"),
        ({"max_length": 1}, "max_length=1 scores nothing"),
        ({"max_length": None}, "max_length=None"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"seed": True}, "seed=True"),
        ({"source": "Random"}, '\'Random\': there is no such file; use "random", "self"'),
        ({"source": Path("none.jsonl")}, "'none.jsonl': there is no such file"),
        ({"source": None}, "source is NoneType"),
        ({"source": b"random"}, "source is bytes"),
        ({"source": {"train": ROWS}}, "source is dict.*one of its splits"),
        ({"source": iter(ROWS)}, r"source is list_iterator.*pass list\(rows\)"),
        ({"source": []}, "has no rows"),
        ({"source": ["text"]}, "row 0 is str"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(arguments, message):
    """The value, the reason, the remedy, when the config is made."""
    with pytest.raises(IsolateError, match=message):
        AnchorConfig(**arguments)


def test_the_edges_are_allowed():
    """No anchor at all, one row, two tokens; whole numbers where numbers are wanted."""
    config = AnchorConfig(beta=0, batch_size=1, every=1, temperature=1, max_length=2, n_rows=1, seed=2**63 - 1)
    assert (config.source, config.beta, config.temperature) == ("random", 0, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta = 1.0


def test_it_says_what_it_is_in_json():
    """Every argument, as JSON can have it; two equal configs say the same."""
    config = AnchorConfig(source="self", beta=0.5, seed=3)
    said = config.to_dict()
    assert AnchorConfig(**json.loads(json.dumps(said))) == config
    assert said == AnchorConfig(source="self", beta=0.5, seed=3).to_dict()


def test_text_is_described_by_what_it_says(tmp_path):
    """A file, a list and a data set of the same rows are the same source; other rows, or another order, are not."""

    def described(source: Any) -> Any:
        return json.loads(json.dumps(AnchorConfig(source=source).to_dict()["source"]))

    path = tmp_path / "random"  # a file of this name, by its path
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    wanted = described(ROWS)
    assert wanted["rows"] == 2
    assert described(path) == described(str(path)) == described(tuple(ROWS)) == wanted
    assert described(datasets.Dataset.from_list(ROWS)) == wanted
    pairs = [{"prompt": "the", "completion": " sun"}]
    assert described([dict(reversed(row.items())) for row in pairs]) == described(pairs)
    assert described(ROWS[::-1]) != wanted
    assert described(ROWS[:1])["digest"] != wanted["digest"]
    assert described([{"text": "the sun"}, {"text": "a rivers"}]) != wanted


def test_a_config_of_much_text_is_made_without_reading_it(tmp_path):
    """Only the first row of a list is looked at, and none of a file: both are read when they are tokenised."""
    AnchorConfig(source=[{"text": "a"}, "no row"])
    path = tmp_path / "broken.jsonl"
    path.write_text("no json\n", encoding="utf-8")
    config = AnchorConfig(source=path)
    with pytest.raises(FormatError, match="line 1 is no JSON"):
        config.to_dict()


def test_configs_compare_by_value():
    """A changed argument is another config; the source counts."""
    assert AnchorConfig(source=ROWS) == AnchorConfig(source=list(ROWS))
    assert AnchorConfig() != AnchorConfig(source="self")
