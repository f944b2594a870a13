"""What an AnchorConfig takes, what it refuses, and what it says of itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from peft_isolate.errors import FormatError, IsolateError
from peft_isolate.evaluation.rows import encode
from peft_isolate.training.anchor.config import _READ, AnchorConfig
from peft_isolate.training.anchor.text import AnchorText, anchor_text
from tests.models import tiny
from tests.texts import chat_rows, dpo_rows, sft_rows, tokenizer

ROWS = [{"text": "the sun"}, {"text": "a river"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": -0.1}, "beta=-0.1"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"beta": float("inf")}, "beta=inf"),
        ({"beta": True}, "beta=True"),
        ({"beta": "1"}, "beta='1'"),
        ({"beta": 10**400}, "beta is a whole number beyond any float"),
        ({"temperature": 10**5000}, "temperature is a whole number beyond any float"),
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


class Read(Mapping[str, Any]):
    """A row that notes which of its fields are asked for."""

    def __init__(self, row: dict[str, Any], noted: set[str]) -> None:
        self._row, self._noted = row, noted

    def __getitem__(self, name: str) -> Any:
        self._noted.add(name)
        return self._row[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def test_only_what_is_read_of_a_row_is_described():
    """A run goes on whose rows have a column, or a part of a message, that nothing but its address tells apart."""

    def described(row: dict) -> Any:
        return AnchorConfig([row]).to_dict()["source"]

    wanted = described({"text": "a"})
    for more in ({"image": object()}, {1: "x"}, {("a", 1): "x"}):
        assert described({"text": "a"} | more) == wanted
    messages = [[{"role": "user", "content": [{"type": "image", "image": object()}], 1: "x"}] for _ in range(2)]
    assert messages[0] != messages[1]
    assert described({"messages": messages[0]}) == described({"messages": messages[1]})
    noted: set[str] = set()
    for row in sft_rows(1) + chat_rows(1) + dpo_rows(1) + [{"chosen": "ab", "rejected": "ac"}, {"text": "a"}]:
        encode([Read(row, noted)], tokenizer())
    assert noted == set(_READ)
    for name in _READ:
        assert described({"text": "a", name: "b"}) != wanted


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


def test_arguments_of_another_kind_are_refused(tmp_path):
    """Not by whatever fails first within: a name for a config, a number for a tokenizer."""
    for ask in (lambda: anchor_text("random", tiny()), lambda: AnchorText.load(tmp_path / "x", "self")):
        with pytest.raises(IsolateError, match=r"is str: pass an AnchorConfig, such as AnchorConfig\('random'\)"):
            ask()
    with pytest.raises(IsolateError, match="tokenizer=42 is int: give the tokenizer of this model"):
        anchor_text(AnchorConfig(max_length=8), tiny(), 42)


def test_a_temperature_that_no_logits_can_be_divided_by_is_refused():
    """Whether it is 0 in fp32 or not; at a small one the most likely token is taken, at a large one any."""
    for temperature in (1e-40, 1e-50):
        with pytest.raises(IsolateError, match=f"temperature={temperature} is too small"):
            anchor_text(AnchorConfig("self", temperature=temperature, max_length=8, n_rows=2), tiny())
    few = AnchorConfig("self", temperature=1e-9, max_length=8, n_rows=4, batch_size=4)
    assert len(anchor_text(few, tiny()).batch(0)["input_ids"].unique(dim=0)) == 1
    assert anchor_text(AnchorConfig("self", temperature=1e300, max_length=8, n_rows=2), tiny())
