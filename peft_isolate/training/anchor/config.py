"""What a model is held to while it trains: which text, how strongly, how often."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...errors import IsolateError
from ...evaluation.rows import KINDS, positive, read_rows

RANDOM, SELF = "random", "self"
# What `evaluation.rows.encode` reads of a row, and so all that its tokens depend on.
_READ = ("text", "prompt", "completion", "messages", "chosen", "rejected", "tools", "chat_template_kwargs")
_SOURCES = f'"{RANDOM}", "{SELF}", a JSONL file, or rows of {KINDS}'


@dataclass(frozen=True)
class AnchorConfig:
    """Hold a model to what it was when training began: `L_new + β·KL(reference ‖ model)` on anchor text.

    The reference is the model itself with its adapters as they were. KL is the mean over the scored tokens of the
    anchor text, in nats: how much another distribution over the next token the model has there.

    Args:
        source: The anchor text. "random": uniform tokens, new ones at every anchored step. "self": text that the
            reference writes itself, once before training. Or text of yours: a JSONL file, or rows (a list of mappings,
            a `datasets.Dataset`) with "text", "prompt" and "completion", or "messages"; it is walked through again and
            again, each time in another order. (A file of the name "self" is "./self".)
        beta: β, from 0 on. 0 trains as without an anchor, at no cost.
        batch_size: Rows of anchor text per process and anchored step. Two processes with 4 rows see what one sees with
            8.
        every: Anchor every so many optimizer steps. The term counts so many times there, so that β means the same.
        temperature: At which "self" is sampled; 1 is the reference's own distribution.
        max_length: Tokens a row, from 2 on; longer rows of yours lose their end.
        n_rows: Rows that are sampled for "self".
        seed: Of the tokens, the sampling and the order of rows. The anchor text depends on it, not on the trainer's.

    Raises:
        IsolateError: An argument is of another kind, or out of its range.

    Example:
        >>> AnchorConfig(beta=2).source
        'random'
    """

    source: Any = RANDOM
    beta: float = 1.0
    batch_size: int = 8
    every: int = 1
    temperature: float = 1.0
    max_length: int = 256
    n_rows: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        _check_source(self.source)
        _finite("beta", self.beta)
        if self.beta < 0:
            raise IsolateError(
                f"beta={self.beta!r} would drive the model away from the reference: use a number from 0 on"
            )
        _finite("temperature", self.temperature)
        if self.temperature <= 0:
            raise IsolateError(
                f"temperature={self.temperature!r}: use a number above 0; 1 samples from the reference as it is"
            )
        for name in ("batch_size", "every", "max_length", "n_rows"):
            positive(name, getattr(self, name))
        if self.max_length < 2:
            raise IsolateError(
                f"max_length={self.max_length!r} scores nothing, since a row's first token is not predicted: use a "
                "whole number from 2 on"
            )
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise IsolateError(f"seed={self.seed!r}: use a whole number from 0 to 2**63 - 1")

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON can have it; text of the user's as {"rows": how many, "digest": of what they say}.

        Raises:
            IsolateError: There is no such file any more, or a row is no mapping.
            FormatError: A line of it is no JSON object.
        """
        # Not asdict, which would copy the rows.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"source": self.source if is_made(self.source) else _described(self.source)}


def is_made(source: Any) -> bool:
    """Whether the text is made here, and not the user's."""
    return isinstance(source, str) and source in (RANDOM, SELF)


def _check_source(source: Any) -> None:
    if is_made(source):
        return
    if isinstance(source, str | os.PathLike):
        if not os.path.isfile(source):
            raise IsolateError(f"source={os.fspath(source)!r}: there is no such file; use {_SOURCES}")
        return
    if isinstance(source, Mapping | bytes) or not hasattr(source, "__iter__"):
        raise IsolateError(f"source is {type(source).__name__}: use {_SOURCES}; of a DatasetDict, one of its splits")
    if not hasattr(source, "__len__"):
        raise IsolateError(
            f"source is {type(source).__name__}, which may be read only once, and its rows are walked through again "
            "and again: pass list(rows)"
        )
    # The first row alone: a data set may be large. The others are looked at when they are tokenised.
    read_rows(source, limit=1)


def check_config(config: Any) -> None:
    """Refuse what is no `AnchorConfig`, such as the name of a source alone."""
    if not isinstance(config, AnchorConfig):
        raise IsolateError(
            f"config={config!r} is {type(config).__name__}: pass an AnchorConfig, such as AnchorConfig({RANDOM!r})"
        )


def _finite(name: str, value: Any) -> None:
    try:
        finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError as error:
        raise IsolateError(f"{name} is a whole number beyond any float: use a smaller one") from error
    if not finite:
        raise IsolateError(f"{name}={value!r}: use a finite number")


def _described(source: Any) -> dict[str, Any]:
    """How many rows there are, and a digest of what they say: the same whether they come from a file or a list.

    Other columns do not count: what is in them, such as an image, may not be told apart from its like.
    """
    rows, digest = read_rows(source), hashlib.sha256()
    for row in rows:
        read = _plain({name: row[name] for name in _READ if name in row})
        digest.update(json.dumps(read, sort_keys=True).encode() + b"\n")
    return {"rows": len(rows), "digest": digest.hexdigest()}


def _plain(value: Any) -> Any:
    """A value as JSON can have it. What is neither text nor number is its kind: its `str` may hold an address."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, str | int | float) else type(value).__name__
