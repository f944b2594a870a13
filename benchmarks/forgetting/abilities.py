"""What a base can do, and what it is taught: small tasks on strings, answered letter by letter.

A row is a tag of two letters, an input, `=`, and the answer: `COfadgb=fadgb`. A token is a character, so the tag is
two tokens, and two tasks may share the first of them: the model then has to look at the second one to tell them apart.

Six *abilities* are pretrained, `REVERSE` of them from one row in a hundred. Three *tasks* are learned afterwards:

* `CIPHER` ("A") shares its first letter with `COPY` and takes the same inputs: a strong conflict;
* `NEW_FACTS` ("B") are more of what the tag of the old facts asks for: a mild one;
* `DESCEND` ("C") shares its first letter with `SORT`, and what it has to do with it.

`brevity` ("P") are preferences on the cipher's prompts: the first three letters of the answer rather than all five.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

LETTERS = "abcdefghij"
# Of facts; apart from the letters, so that a fact is nothing that could be computed.
NAMES = "klmnopqrstuvwxyz"
DIGITS = "0123456789"
TAGS = "ACDEFIORS"
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
VOCABULARY = [PAD, BOS, EOS, *LETTERS, *NAMES, *DIGITS, *TAGS, "+", "="]

Group = Literal["knowledge", "reasoning", "following instructions"]
Row = dict[str, str]
# Rows of one split are never in another.
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Ability:
    """One kind of question.

    Attributes:
        name: As tables have it.
        tag: Two letters that open its prompts.
        group: What it stands for.
        form: Of its inputs, a regular expression.
        draw: Gives an input, from a generator.
        answer: To an input.
        known: The inputs and answers, where they are a fixed list to be known by heart; `draw` draws among them.
    """

    name: str
    tag: str
    group: Group
    form: str
    draw: Callable[[random.Random], str]
    answer: Callable[[str], str]
    known: tuple[tuple[str, str], ...] = ()

    def row(self, question: str) -> Row:
        """As TRL's trainers take it: `{"prompt": str, "completion": str}`."""
        return {"prompt": f"{self.tag}{question}=", "completion": self.answer(question)}

    def rows(self, split: Split, count: int, seed: int = 0) -> list[Row]:
        """Rows to train on, to choose by, or to judge by; no question is in two of the splits.

        Of facts, which can only be known if they were seen, the training rows are all of them; every other one is to
        choose by, the rest to judge by.

        Args:
            split: Which.
            count: At most so many; all are different.
            seed: Of the order of the training rows. The other splits are always the same.

        Returns:
            The rows.
        """
        if self.known:
            parts = {"train": self.known, "validation": self.known[::2], "test": self.known[1::2]}
            rows = [self.row(question) for question, _ in parts[split]]
            if split == "train":
                random.Random(seed).shuffle(rows)
            return rows[:count]
        rng = random.Random(f"{self.name} {split} {seed if split == 'train' else 0}")
        found: dict[str, None] = {}
        while len(found) < count:
            question = self.draw(rng)
            if _split_of(question) == split:
                found[question] = None
        return [self.row(question) for question in found]


def _split_of(question: str) -> Split:
    """By the question alone, whoever asks it: a tenth each for validation and test."""
    draw = random.Random(f"split {question}").random()
    return "validation" if draw < 0.1 else "test" if draw < 0.2 else "train"


def _facts(count: int, seed: int, but: tuple[tuple[str, str], ...] = ()) -> tuple[tuple[str, str], ...]:
    """Names of three letters, each with two letters to be known about it."""
    rng = random.Random(seed)
    taken = {name for name, _ in but}
    found: dict[str, str] = {}
    while len(found) < count:
        name, answer = ("".join(rng.choices(NAMES, k=length)) for length in (3, 2))
        if name not in taken:
            found[name] = answer
    return tuple(found.items())


OLD = _facts(200, seed=1)
NEW = _facts(150, seed=2, but=OLD)
# A permutation of the letters under which none stays.
CIPHERED = str.maketrans(LETTERS, "dhjaibcegf")


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=5))


def _on_words(name: str, tag: str, answer: Callable[[str], str]) -> Ability:
    return Ability(name, tag, "following instructions", f"[{LETTERS}]{{5}}", _word, answer)


def _on_numbers(name: str, tag: str, digits: int, answer: Callable[[str], str]) -> Ability:
    draw = lambda rng: "+".join(f"{rng.randrange(10**digits):0{digits}d}" for _ in range(2))  # noqa: E731
    return Ability(name, tag, "reasoning", rf"\d{{{digits}}}\+\d{{{digits}}}", draw, answer)


def _sum(question: str) -> str:
    return f"{sum(map(int, question.split('+'))):03d}"


def _digit_sums(question: str) -> str:
    return "".join(str((int(x) + int(y)) % 10) for x, y in zip(*question.split("+"), strict=True))


def _by_heart(name: str, known: tuple[tuple[str, str], ...]) -> Ability:
    names = "|".join(name for name, _ in known)
    return Ability(name, "FA", "knowledge", names, lambda rng: rng.choice(known)[0], dict(known).__getitem__, known)


COPY = _on_words("copy", "CO", str)
REVERSE = _on_words("reverse", "RE", lambda word: word[::-1])
SORT = _on_words("sort", "SO", lambda word: "".join(sorted(word)))
ADD = _on_numbers("add", "AD", 2, _sum)
DIGIT_SUMS = _on_numbers("digit sums", "DI", 3, _digit_sums)
FACTS = _by_heart("facts", OLD)

# Each with its share of the pretraining rows.
MIXTURE = {COPY: 0.15, REVERSE: 0.01, SORT: 0.18, ADD: 0.21, DIGIT_SUMS: 0.30, FACTS: 0.15}
ABILITIES = tuple(MIXTURE)

CIPHER = _on_words("cipher", "CI", lambda word: word.translate(CIPHERED))
NEW_FACTS = _by_heart("new facts", NEW)
DESCEND = _on_words("descend", "SE", lambda word: "".join(sorted(word, reverse=True)))
TASKS = {"A": CIPHER, "B": NEW_FACTS, "C": DESCEND}


def brevity(split: Split, count: int, seed: int = 0) -> list[Row]:
    """Task P: `{"prompt", "chosen", "rejected"}`, the first three letters of a cipher rather than all five."""
    return [
        {"prompt": row["prompt"], "chosen": row["completion"][:3], "rejected": row["completion"]}
        for row in CIPHER.rows(split, count, seed)
    ]


def mixture(split: Split, count: int, seed: int = 0) -> list[Row]:
    """Rows as the base was pretrained on: of a split that is no training split, its *general text*."""
    rng = random.Random(f"mixture {split} {seed}")
    names = rng.choices(ABILITIES, weights=list(MIXTURE.values()), k=count)
    rows: list[Row] = []
    for ability in names:
        while True:
            question = ability.draw(rng)
            if ability.known or _split_of(question) == split:
                break
        rows.append(ability.row(question))
    return rows
