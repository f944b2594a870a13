"""Rows of text as batches of token ids: what scorers score, and what importance is measured on.

Rows are tokenised as TRL's `SFTTrainer` tokenises them, so that a held-out part of the training file is scored on the
very tokens that the rest was trained on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import FormatError, IsolateError
from .forgetting import IGNORED

Rows = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
KINDS = '"text", "prompt" and "completion", or "messages"'


class Encoded(NamedTuple):
    """One row as token ids.

    Attributes:
        ids: Of the whole row.
        prompt: How many of them, from the left, are the prompt; 0 where the row has none.
    """

    ids: list[int]
    prompt: int


def read_rows(source: Rows, limit: int | None = None) -> list[Mapping[str, Any]]:
    """The rows of a JSONL file, or of any iterable of mappings such as a `datasets.Dataset`.

    Args:
        source: Where they are.
        limit: Read no more than these.

    Raises:
        IsolateError: There is no such file, no row in it, or a row is no mapping.
        FormatError: A line is no JSON object, or not UTF-8.
    """
    positive("limit", limit, optional=True)
    given = _lines(Path(source)) if isinstance(source, str | os.PathLike) else source
    if not isinstance(given, Iterable):
        raise IsolateError(f"{source!r} has no rows: pass a JSONL file, or an iterable of mappings")
    rows: list[Mapping[str, Any]] = []
    for number, row in enumerate(given):
        if limit is not None and number >= limit:
            break
        if not isinstance(row, Mapping):
            raise IsolateError(
                f"row {number} is {type(row).__name__}, no mapping of fields: pass a JSONL file, or one split of a "
                "dataset"
            )
        rows.append(row)
    if not rows:
        raise IsolateError(f"{_shown(source)} has no rows: at least one is needed")
    return rows


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise IsolateError(f"there is no file {str(path)!r}: pass a JSONL file, one JSON object a line")
    # As bytes: of a text file, an error of its encoding does not tell the line.
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise FormatError(f"{path}, line {number} is not UTF-8 ({error}): save the file as UTF-8") from error
            except (ValueError, RecursionError) as error:
                raise FormatError(f"{path}, line {number} is no JSON ({error}): write one object a line") from error
            if not isinstance(row, dict):
                raise FormatError(f"{path}, line {number} is {type(row).__name__}, no JSON object: write {{…}} a line")
            yield row


def as_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer as it is, or loaded from a folder or the Hub.

    Raises:
        IsolateError: There is none.
    """
    if not isinstance(tokenizer, str | os.PathLike):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise IsolateError(
            f"no tokenizer can be loaded from {str(tokenizer)!r} ({type(error).__name__}: {error}): pass a folder "
            "that save_pretrained wrote, a Hub id, or a tokenizer"
        ) from error


def encode(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int | None = None, keep_end: bool = False
) -> list[Encoded]:
    """Token ids of rows with the fields "text", "prompt" and "completion", or "messages".

    Text and completions end with the tokenizer's end-of-sequence token, as when they are trained on. Prompts and
    completions may be lists of messages, too. Of a preference, "chosen" is the completion; where it has no "prompt",
    that is what "chosen" and "rejected" begin with alike, as TRL's `DPOTrainer` takes it. A row's "tools" (a list, or
    JSON of one) and "chat_template_kwargs" go to the chat template.

    Args:
        rows: See `read_rows`.
        tokenizer: A tokenizer of transformers. It is not changed.
        max_length: Longer rows lose their end.
        keep_end: They lose their beginning instead, as with TRL's `truncation_mode="keep_end"`.

    Raises:
        IsolateError: A row has none of these fields, or one of another kind.
    """
    positive("max_length", max_length, optional=True)
    encoded = []
    for number, row in enumerate(rows):
        end = tokenizer.eos_token or ""
        prompt: list[int] = []
        options = _template_options(row, f"row {number}")
        if "chosen" in row and "completion" not in row:
            row = _preferred(row)
        if "prompt" in row and "completion" in row:
            before, after = row["prompt"], row["completion"]
            if isinstance(before, str) != isinstance(after, str):
                raise IsolateError(f"row {number}: prompt and completion are of two kinds: make both text or messages")
            prompt = token_ids(before, tokenizer, f"row {number}", True, options)
            whole = before + (_ended(after, end) if isinstance(after, str) else after)
        elif "text" in row:
            whole = _ended(row["text"], end) if isinstance(row["text"], str) else row["text"]
        elif "messages" in row:
            whole = row["messages"]
        else:
            raise IsolateError(
                f'row {number} has the fields {sorted(row)}: it needs {KINDS}; a preference, "chosen" beside a '
                '"prompt" or "rejected"'
            )
        ids = token_ids(whole, tokenizer, f"row {number}", options=options)
        # Tokens may merge across the boundary: the completion starts where the two differ.
        same = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
        lost = max(0, len(ids) - max_length) if keep_end and max_length is not None else 0
        encoded.append(Encoded(ids[lost:][:max_length], max(0, same - lost)))
    return encoded


def _template_options(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a row tells its chat template beside the messages."""
    tools, more = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise IsolateError(f"{where}: tools={tools[:60]!r} is no JSON ({error}): write a list of them") from error
    if more is not None and not isinstance(more, Mapping):
        raise IsolateError(f"{where}: chat_template_kwargs={str(more)[:60]!r} is no mapping of names to values")
    return {"tools": tools, **(more or {})}


def _preferred(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The better half of a preference as "prompt" and "completion"; the row as it is where it does not tell both."""
    chosen, rejected = row["chosen"], row.get("rejected")
    if "prompt" in row:
        return {"prompt": row["prompt"], "completion": chosen}
    if not isinstance(chosen, str | list) or not isinstance(rejected, type(chosen)):
        return row
    shorter = min(len(chosen), len(rejected))
    same = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if same is None:
        same = max(0, shorter - 1)  # so that something is left to be chosen
    elif same and chosen[same - 1] == " ":
        same -= 1  # it belongs to the word that follows
    return {"prompt": chosen[:same], "completion": chosen[same:]}


def token_ids(
    text: Any, tokenizer: Any, where: str, open_ended: bool = False, options: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a text or of a list of messages.

    Args:
        text: Either.
        tokenizer: Not changed.
        where: What it is, for an error.
        open_ended: The model shall go on from here: no end-of-sequence token, and the assistant's turn begins.
        options: For the chat template.

    Raises:
        IsolateError: It is neither, or no messages that the tokenizer's chat template knows.
    """
    if isinstance(text, str):
        ids = list(tokenizer(text)["input_ids"])
    elif isinstance(text, list) and text and all(isinstance(message, Mapping) for message in text):
        try:
            ids = tokenizer.apply_chat_template(
                text, tokenize=True, return_dict=False, add_generation_prompt=open_ended, **(options or {})
            )
        except ImportError:
            raise
        except Exception as error:  # a template raises whatever it likes
            raise IsolateError(
                f"{where}: the tokenizer's chat template cannot render {str(text)[:60]!r} ({type(error).__name__}: "
                f"{error}): messages need a 'role' and a 'content', and the tokenizer a template"
            ) from error
    else:
        raise IsolateError(f"{where}: {str(text)[:60]!r} is neither text nor a list of messages")
    if open_ended and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def collate(rows: Sequence[Encoded], pad: int, completion_only: bool = False) -> dict[str, torch.Tensor]:
    """One batch: `input_ids`, `attention_mask` and `labels`, (batch, longest) int64, padded on the right.

    Args:
        rows: See `encode`.
        pad: The id that fills; it is masked.
        completion_only: Prompts get the label -100.
    """
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n] = torch.tensor(row.ids, dtype=torch.int64)
        mask[i, :n] = 1
        start = min(row.prompt, n) if completion_only else 0
        labels[i, start:n] = ids[i, start:n]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Batches(Sequence[dict[str, torch.Tensor]]):
    """Rows to be scored, as batches: rows of like length share one, which means less padding.

    Args:
        rows: See `encode`.
        tokenizer: Likewise.
        batch_size: Rows of a batch.
        max_length: Longer rows lose their end.
        keep_end: They lose their beginning instead.
        completion_only: Tokens of a prompt are not scored.

    Attributes:
        n_rows: How many there are, without the empty ones.
        n_tokens: How many tokens are scored.

    Raises:
        IsolateError: No token would be scored; or as `encode` raises.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        *,
        batch_size: int,
        max_length: int | None,
        keep_end: bool = False,
        completion_only: bool = True,
    ) -> None:
        encoded = encode(rows, tokenizer, max_length, keep_end)
        self.n_tokens = sum(max(0, len(row.ids) - max(1, row.prompt if completion_only else 0)) for row in encoded)
        if not self.n_tokens:
            raise IsolateError(
                f"no token of {len(encoded)} rows counts: they are empty, or prompts fill max_length={max_length}"
            )
        self._rows = sorted((row for row in encoded if row.ids), key=lambda row: len(row.ids), reverse=True)
        self._pad, self._size, self._completion_only = pad_id(tokenizer), batch_size, completion_only
        self.n_rows = len(self._rows)

    def __len__(self) -> int:
        return -(-self.n_rows // self._size)

    def __getitem__(self, number: Any) -> Any:
        """A batch, see `collate`."""
        first = range(0, self.n_rows, self._size)[number]
        return collate(self._rows[first : first + self._size], self._pad, self._completion_only)


def pad_id(tokenizer: Any) -> int:
    """An id to pad with, for a tokenizer without one, too: padding is masked, so that any will do."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def positive(name: str, value: Any, optional: bool = False) -> None:
    """Refuse what is no whole number above zero."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise IsolateError(f"{name}={value!r}: use a whole number from 1 on" + (", or None" if optional else ""))


def flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False: a text such as "no" would count as True."""
    if not isinstance(value, bool):
        raise IsolateError(f"{name}={value!r}: use True or False")


def text_or_none(name: str, value: Any) -> None:
    """Refuse what is neither None nor text with something in it."""
    if value is not None and (not isinstance(value, str) or not value):
        raise IsolateError(f"{name}={value!r}: use text that is not empty, or leave it out")


def _ended(text: str, end: str) -> str:
    return text if text.endswith(end) else text + end


def _shown(source: Rows) -> str:
    return repr(str(source)) if isinstance(source, str | os.PathLike) else "the data"
