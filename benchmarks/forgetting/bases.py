"""The bases, and how each of them is spoken to.

`characters-<seed>` read a row letter by letter. `words-0` has a subword vocabulary and has also read real text, the
source of Python's standard library; a row is *spelled* for it: every character becomes a word frequent in that text.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abilities import DIGITS, LETTERS, NAMES, TAGS, Row, Split, mixture

BASES = Path(__file__).parent / "bases"
# Kept in the repository are the bases of characters; the one of words is made in 35 minutes (`pretrain_words.py`).
MADE = Path("outputs") / "forgetting" / "bases"

# Frequent in the text, so that each is one token after a space and means something already.
_SPELLED = """
    self name value file line data string list type path
    module result method function key context default code node argument bytes number message command mode tuple
    return def class import raise for try except with
"""
WORDS = dict(zip(LETTERS + NAMES + TAGS, _SPELLED.split(), strict=True)) | {sign: sign for sign in DIGITS + "+="}


def folder_of(base: str, among: Path | None = None) -> Path:
    """Where a base lies; raises `FileNotFoundError` where it has not been made."""
    folder = _place_of(base, among)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no base {folder}: make it by pretrain.py or pretrain_words.py beside this file"
        )
    return folder


def is_made(base: str) -> bool:
    """Whether a base lies where it should."""
    return _place_of(base).is_dir()


def _place_of(base: str, among: Path | None = None) -> Path:
    return (among or (MADE if base.startswith("words") else BASES)) / base


def rendered(base: str, rows: Sequence[Row]) -> list[Row]:
    """Rows as a base reads them; every text of a row is rendered."""
    if not base.startswith("words"):
        return list(rows)
    return [{name: _spelled(text, name != "prompt") for name, text in row.items()} for row in rows]


def _spelled(text: str, inside: bool) -> str:
    # What does not begin a line begins with a space, as words do.
    return " " * inside + " ".join(WORDS[sign] for sign in text)


def general(base: str, split: Split, count: int) -> list[Row]:
    """General text, held out of what a base was pretrained on: rows of the mixture; for words, source code as well."""
    rows = rendered(base, mixture(split, count))
    if base.startswith("words"):
        texts = [document.text for document in of_the_demo("data").documents() if document.held_out]
        rows += [{"prompt": "", "completion": text[:300]} for text in texts[split == "test" :: 2][:count]]
    return rows


def of_the_demo(module: str) -> Any:
    """A module of `examples/demo`, whose text and tokenizer the base of words has."""
    folder = Path(__file__).parents[2] / "examples" / "demo"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    # Not by its name alone: there is a `pretrain` here, too.
    spec = importlib.util.spec_from_file_location(f"demo_{module}", folder / f"{module}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found
