"""What `real.py` is told, by a YAML file and by flags, which win. It is checked before anything is loaded."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from arms import METHODS, Arm

from peft_isolate.errors import IsolateError

SCORES = ("exact_match", "final_answer", "loss")
# Methods that are for the small bases alone.
NOT_HERE = {
    "replay": "it replays rows of the small bases",
    "random elements": "its positions alone are larger than a real model",
}
# Peers whose change cannot be scaled after the training.
NO_DIAL = ("SHiRA", "OSF")
# What says where a run is made, or which runs are; a row is the same one whatever they are.
_NOT_THE_RUN = ("model", "data", "device", "arms", "seeds", "alphas")


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError
    return int(str(value))


def _share(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _flag(value: Any) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _several(kind: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def several(value: Any) -> tuple[Any, ...]:
        given = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
        return tuple(kind(each.strip() if isinstance(each, str) else each) for each in given)

    return several


def _names(value: Any) -> dict[str, str]:
    return {str(old): str(new) for old, new in value.items()}


def _arms(value: Any) -> dict[str, tuple[float, ...]]:
    return {str(name): _several(_share)(rates or ()) for name, rates in value.items()}


def _told(kind: Callable[[Any], Any], wanted: str, shown: str) -> dict[str, Any]:
    """Of a setting: what makes a value of what was typed, what that is to be, and what --help says."""
    return {"kind": kind, "wanted": wanted, "help": shown}


@dataclass(frozen=True)
class Setting:
    """One question: what does this model forget while it learns this task? Each field is a flag and a key."""

    model: str = field(default="", metadata=_told(str, "a Hub id or a folder", "Hub id or folder of the model"))
    data: str = field(
        default="",
        metadata=_told(str, "a JSONL file or a Hub id", "rows of the new task: a JSONL file or ID[:CONFIG][:SPLIT]"),
    )
    arms: dict[str, tuple[float, ...]] = field(
        default_factory=dict, metadata=_told(_arms, "names with rates", "see --arm")
    )
    seeds: tuple[int, ...] = field(
        default=(0,), metadata=_told(_several(_whole), "whole numbers", "of data order and what methods draw")
    )
    alphas: tuple[float, ...] = field(
        default=(1.0,), metadata=_told(_several(_share), "numbers", "places of the dial")
    )
    device: str = field(
        default="auto", metadata=_told(str, "auto, cuda or cpu", "cuda, cpu, or auto: cuda where there is one")
    )
    # The new task.
    rows: int | None = field(default=None, metadata=_told(_whole, "a whole number", "train on the first rows only"))
    rename: dict[str, str] = field(
        default_factory=dict, metadata=_told(_names, "{old: new}", "fields to rename (in YAML only)")
    )
    template: str | None = field(
        default=None, metadata=_told(str, "text with {fields}", "makes the prompt of a row's fields")
    )
    completion: str = field(
        default="completion", metadata=_told(str, "the name of a field", "field of the answer, beside a template")
    )
    max_characters: int | None = field(
        default=None, metadata=_told(_whole, "a whole number", "leave longer rows out of the training")
    )
    validation: str | None = field(
        default=None, metadata=_told(str, "like data", "where validation is drawn from; else from the data")
    )
    validation_rows: int = field(default=100, metadata=_told(_whole, "a whole number", "how many are drawn"))
    test: str | None = field(
        default=None, metadata=_told(str, "like data", "test rows; else as many as for validation, from there")
    )
    test_rows: int | None = field(default=None, metadata=_told(_whole, "a whole number", "ask the first of them only"))
    score: str = field(
        default="exact_match", metadata=_told(str, f"one of {', '.join(SCORES)}", "exact_match, final_answer or loss")
    )
    new_tokens: int = field(default=64, metadata=_told(_whole, "a whole number", "length of a generated answer"))
    until: str | None = field(default=None, metadata=_told(str, "text", "an answer ends before this text"))
    # What may be forgotten.
    tasks: tuple[str, ...] = field(
        default=(), metadata=_told(_several(str), "names", "tasks of lm-evaluation-harness, commas between")
    )
    limit: float | None = field(
        default=None, metadata=_told(_share, "a number", "ask the first of each task: a number, or a share below 1")
    )
    fewshot: int | None = field(default=None, metadata=_told(_whole, "a whole number", "examples in a task's prompt"))
    include_path: str | None = field(default=None, metadata=_told(str, "a folder", "task files of your own"))
    general: str | None = field(default=None, metadata=_told(str, "like data", "general text, whose loss is followed"))
    general_rows: int = field(default=100, metadata=_told(_whole, "a whole number", "its first rows"))
    general_length: int = field(
        default=768, metadata=_told(_whole, "a whole number", "tokens of a row that are scored")
    )
    # The training.
    level: float | None = field(
        default=None, metadata=_told(_share, "a number", "read what is forgotten where validation gets here")
    )
    steps: int = field(default=500, metadata=_told(_whole, "a whole number", "optimizer steps, at most"))
    every: int = field(default=50, metadata=_told(_whole, "a whole number", "steps between evaluations"))
    batch_size: int = field(
        default=8, metadata=_told(_whole, "a whole number", "rows that go through the model at once")
    )
    accumulation: int = field(default=1, metadata=_told(_whole, "a whole number", "of these in a step"))
    evaluation_batch_size: int = field(
        default=16, metadata=_told(_whole, "a whole number", "rows that are answered at once")
    )
    max_length: int = field(default=1024, metadata=_told(_whole, "a whole number", "tokens of a row"))
    completion_only: bool = field(default=True, metadata=_told(_flag, "true or false", "prompts are not learned"))
    schedule: str | None = field(
        default=None, metadata=_told(str, "transformers' name", "of the rate, instead of the method's own")
    )
    warmup: float = field(default=0.1, metadata=_told(_share, "a number", "steps, or a share of all below 1"))
    weight_decay: float = field(default=0.0, metadata=_told(_share, "a number", "AdamW's"))
    clip: float = field(default=1.0, metadata=_told(_share, "a number", "largest norm of a gradient"))
    dtype: str = field(
        default="bfloat16",
        metadata=_told(str, "bfloat16 or float32", "of the weights; adapters are float32 at any rate"),
    )
    autocast: bool = field(
        default=False, metadata=_told(_flag, "true or false", "compute in bfloat16, whatever the weights are in")
    )
    checkpointing: bool = field(default=False, metadata=_told(_flag, "true or false", "gradient checkpointing"))
    anchor_length: int = field(default=256, metadata=_told(_whole, "a whole number", "tokens of a row of anchor text"))
    anchor_rows: int = field(default=512, metadata=_told(_whole, "a whole number", 'rows that "self" samples'))

    def __post_init__(self) -> None:
        for name in ("model", "data"):
            if not getattr(self, name):
                raise IsolateError(f"no {name}: pass --{name} with {_kinds()[name]['wanted']}")
        for name, choices in (
            ("score", SCORES),
            ("dtype", ("bfloat16", "float32")),
            ("device", ("auto", "cuda", "cpu")),
        ):
            if getattr(self, name) not in choices:
                raise IsolateError(f"{name}={getattr(self, name)!r} is unknown: use one of {', '.join(choices)}")
        for each in fields(self):
            value = getattr(self, each.name)
            if each.metadata["kind"] is _whole and value is not None and value < (0 if each.name == "fewshot" else 1):
                raise IsolateError(f"{each.name}={value}: use a whole number from 1 on")
        if not self.tasks and self.general is None:
            raise IsolateError("nothing to forget: pass --tasks, such as arc_easy,hellaswag, or --general with text")
        if self.level is not None and not 0 < self.level <= (math.inf if self.score == "loss" else 1):
            reason = "a loss in nats is above 0" if self.score == "loss" else f"{self.score} is a share, from 0 to 1"
            raise IsolateError(f"level={self.level:g} is out of range, since {reason}: give one in it, or none")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise IsolateError(f"include_path={self.include_path!r} is no folder: pass one with task files")
        self._check_arms()

    def _check_arms(self) -> None:
        if not self.arms:
            raise IsolateError("no arms: pass --arm NAME RATE ..., such as --arm full 1e-5 --arm 'HFT | self 1' 1e-4")
        for name, rates in self.arms.items():
            arm = Arm.named(name)
            if arm.method in NOT_HERE:
                raise IsolateError(
                    f"arm {name!r} is not for a model of one's own, since {NOT_HERE[arm.method]}: leave it out"
                )
            if arm.method not in METHODS:
                close = difflib.get_close_matches(arm.method, METHODS, n=3) or list(METHODS)
                raise IsolateError(
                    f"arm {name!r}: there is no method {arm.method!r} in arms.py; use one such as {close}"
                )
            if any(alpha != 1 for alpha in self.alphas) and arm.method in NO_DIAL:
                raise IsolateError(
                    f"alphas={self.alphas} with arm {name!r}: it has no dial; give it a run without alphas"
                )
            if any(rate <= 0 for rate in rates):
                raise IsolateError(f"arm {name!r} has the rates {rates}: use learning rates above 0")
            _check_anchor(name, arm.anchor)

    @property
    def lower_is_better(self) -> bool:
        return self.score == "loss"

    @property
    def digest(self) -> str:
        """Of all that makes a run what it is, beside the columns that say so themselves."""
        kept = {name: value for name, value in asdict(self).items() if name not in _NOT_THE_RUN}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:10]

    def rates(self, arm: str) -> tuple[float, ...]:
        """Those that were given, or the method's own."""
        return self.arms[arm] or METHODS[Arm.named(arm).method].rates


def _check_anchor(name: str, anchor: str) -> None:
    source, _, beta = anchor.partition(" ")
    try:
        fine = anchor == "none" or (source in ("random", "self") and 0 < float(beta) < math.inf)
    except ValueError:
        fine = False
    if not fine:
        raise IsolateError(
            f"arm {name!r}: {anchor!r} is no anchor here; use 'random' or 'self' and β, such as 'self 1'"
        )


def _kinds() -> dict[str, Mapping[str, Any]]:
    return {each.name: each.metadata for each in fields(Setting)}


def setting_of(given: Mapping[str, Any]) -> Setting:
    """A setting of names and values as they were typed; None counts as not given.

    Raises:
        IsolateError: A name is unknown, or a value of another kind or out of its range.
    """
    values = {}
    for name, value in given.items():
        if name not in _kinds():
            close = difflib.get_close_matches(str(name), _kinds(), n=1)
            raise IsolateError(
                f"{name!r} is no setting" + (f"; did you mean {close[0]!r}?" if close else ": see --help")
            )
        if value is None:
            continue
        try:
            values[name] = _kinds()[name]["kind"](value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise IsolateError(f"{name}={value!r}: use {_kinds()[name]['wanted']}") from error
    return Setting(**values)


def read_config(path: str) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        IsolateError: There is no such file, or no mapping in it.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise IsolateError(
            f"config={path!r} cannot be read ({error.strerror}): see benchmarks/forgetting/configs"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise IsolateError(f"config={path!r} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise IsolateError(
            f"config={path!r} holds {type(found).__name__}, no settings: write one 'name: value' a line"
        )
    return found
