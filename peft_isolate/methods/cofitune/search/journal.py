"""The records of a search on disk: one line of JSON a trial, appended whole, so that a killed search goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import FormatError, IsolateError
from ....evaluation.scorers import is_number
from ....regions.files import Claim
from ....regions.roles import ROLES
from ..coarse import as_fractions, as_roles
from ..config import CoFiTuneConfig

SCORES = ("speciality", "versatility")
# What every line begins with. A torn line is told by it from the end of a file that is none of ours.
_MARK = b'{"cofitune_trial": 1, '
# What wrapping a model writes into a config, and what a newer PEFT would change: none of it decides what is trained.
_BOOKKEEPING = ("resolved", "auto_mapping", "peft_version", "plugin")


def plain_fields(config: CoFiTuneConfig) -> dict[str, Any]:
    """What a config says, as JSON can hold it: the range in fractions, the modules as roles in their usual order.

    Configs that mean the same have the same fields, "second_quarter" and (0.25, 0.5) too.

    Raises:
        IsolateError: A field holds something that JSON cannot, such as a measured importance.
    """
    names = [field.name for field in dataclasses.fields(config) if field.name not in _BOOKKEEPING]
    fields = {name: _plain(name, getattr(config, name)) for name in names}
    wanted = as_roles(config.modules)
    fields["layer_range"] = list(as_fractions(config.layer_range))
    fields["modules"] = [role for role in ROLES if role in wanted]
    return fields


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, set | frozenset):
        return sorted(_plain(name, item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in value.items()}
    raise IsolateError(
        f"{name} of the config is a {type(value).__name__}, which the records of a search cannot hold: leave it out "
        "of the search and set it on the config that is found, or save it to a file and pass the path"
    )


def config_of(fields: Mapping[str, Any]) -> CoFiTuneConfig:
    """A fresh config of these fields, which no model has used up.

    Raises:
        FormatError: They are no fields of a `CoFiTuneConfig`.
    """
    try:
        return CoFiTuneConfig(**fields)
    except (TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"no CoFiTuneConfig has these fields: {error}") from error


def key_of(fields: Mapping[str, Any]) -> str:
    """The one text that stands for a config: trials of equal keys are the same trial."""
    return json.dumps(fields, sort_keys=True)


@dataclass(frozen=True)
class Record:
    """A finished trial.

    Attributes:
        level: Name of the level that ran it.
        fields: Its config, see `plain_fields`.
        scores: What the scorer returned, as far as it is finite numbers; None where the trial failed.
        error: {"type", "message", "traceback"} of a failed trial; None of another.
        seconds: Training and scoring.
    """

    level: str
    fields: dict[str, Any]
    scores: dict[str, float] | None
    error: dict[str, str] | None
    seconds: float

    @property
    def key(self) -> str:
        """See `key_of`."""
        return key_of(self.fields)

    def line(self) -> bytes:
        """The record as it stands in the file."""
        parts = {
            "level": self.level,
            "config": self.fields,
            "scores": self.scores,
            "error": self.error,
            "seconds": self.seconds,
        }
        return _MARK + json.dumps(parts, allow_nan=False)[1:].encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> Record:
        """Reads what `line` wrote. Raises `ValueError` with what is wrong."""
        if not line.startswith(_MARK):
            raise ValueError("it does not begin like a record of a search")
        parts = json.loads(line)
        if not isinstance(parts, dict):
            raise ValueError("it is no record")
        names = ("level", "config", "scores", "error", "seconds")
        level, fields, scores, error, seconds = map(parts.get, names)
        if not isinstance(level, str) or not isinstance(fields, dict) or not is_number(seconds):
            raise ValueError("level, config or seconds is missing or of another kind")
        if (scores is None) == (error is None):
            raise ValueError("a trial has either scores or an error")
        if scores is not None and not (isinstance(scores, dict) and all(is_number(scores.get(n)) for n in SCORES)):
            raise ValueError(f"scores must hold the numbers {SCORES}")
        if scores is not None and not all(map(is_number, scores.values())):
            raise ValueError("a score is no finite number")
        kinds = ("type", "message", "traceback")
        if error is not None and not (isinstance(error, dict) and all(isinstance(error.get(k), str) for k in kinds)):
            raise ValueError(f"error must hold the texts {kinds}")
        return cls(level, fields, scores, error, float(seconds))


class Journal:
    """The finished trials, in memory and, with `output`, in a file that only grows.

    A record is one `write` at the end of the file, brought to the disk before the search goes on. What a kill tore is
    a last line without its end: it is cut off when the file is opened again, and its trial run again. While one search
    has the file open, another is refused, see `Claim`; its empty file is "<path>.lock".

    Args:
        output: A file that ends in ".jsonl", or a folder, for "trials.jsonl" in it. None keeps nothing.

    Attributes:
        records: {key: record}; of two with the same key the later one, which repeated a failed one.
        path: The file, or None.

    Raises:
        FormatError: A line is damaged, or the file is something else. Nothing is changed then.
        IsolateError: Another search has it open.
    """

    def __init__(self, output: str | os.PathLike[str] | None = None) -> None:
        self.records: dict[str, Record] = {}
        self.path: Path | None = None
        self._file: int | None = None
        self._claim: Claim | None = None
        if output is None:
            return
        path = Path(output)
        self.path = path if path.suffix == ".jsonl" else path / "trials.jsonl"
        if self.path.parent.exists() and not self.path.parent.is_dir():
            raise IsolateError(f"output={str(output)!r} is a file: pass a folder, or a file that ends in '.jsonl'")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        busy = IsolateError(
            f"{self.path} is open in another search: wait for it, or use another output. In a run of several "
            "processes, search in one of them; executor= spreads the trials"
        )
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        try:
            self._claim = Claim(f"{os.path.realpath(self.path)}.lock", busy)
            self._file = os.open(self.path, flags, 0o666)
            self._read(self._file)
        except BaseException:
            self.close()
            raise

    def append(self, record: Record) -> None:
        """Keep a record.

        Raises:
            OSError: The disk does not take all of it; the file then is as before.
            IsolateError: It could not be read back; nothing is written.
        """
        if self._file is not None:
            try:
                line = record.line()
                Record.of_line(line)
            except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
                raise IsolateError(
                    f"the record of a trial of level {record.level!r} cannot be kept in {self.path}: it could not be "
                    f"read back: {error}; names must be text and numbers finite"
                ) from error
            size = os.fstat(self._file).st_size
            written = os.write(self._file, line)
            if written < len(line):
                os.ftruncate(self._file, size)
                raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written; the disk is full")
            os.fsync(self._file)
        self.records[record.key] = record

    def close(self) -> None:
        """Let go of the file; the records stay in memory."""
        if self._file is not None:
            os.close(self._file)
        if self._claim is not None:
            self._claim.release()
        self._file = self._claim = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, file: int) -> None:
        size = os.fstat(file).st_size
        content = b""
        while len(content) < size and (part := os.read(file, size - len(content))):
            content += part
        *lines, torn = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                record = Record.of_line(line)
            except (ValueError, ArithmeticError, RecursionError) as error:  # JSON's and UTF-8's are among them
                raise FormatError(
                    f"{self.path}, line {number}: {error}; restore the file, or delete this line: its trial is then "
                    "run again"
                ) from error
            self.records[record.key] = record
        # After a loss of power a file may end in zeros.
        if torn.strip(b"\0") and not torn.startswith(_MARK) and not _MARK.startswith(torn):
            raise FormatError(f"{self.path}, line {len(lines) + 1}: this is no file of a search; use another output")
        if torn:
            os.ftruncate(file, size - len(torn))
            os.fsync(file)
        with contextlib.suppress(OSError):  # the file's name shall survive, too, where folders can be brought to disk
            folder = os.open(self.path.parent if self.path else ".", os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
