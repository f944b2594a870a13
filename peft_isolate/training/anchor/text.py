"""Anchor text: an endless stream of token ids of which every process knows its part of every step."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from ...deltas.reference import Reference, unwrapped
from ...errors import FormatError, IsolateError
from ...evaluation.rows import as_tokenizer, encode, read_rows
from ...regions.files import read_tensors, write_whole
from ...regions.region import unwrap
from .config import RANDOM, SELF, AnchorConfig, check_config, is_made
from .sampling import by_process_0, sampled
from .vocabulary import Vocabulary

FORMAT = "peft_isolate.anchor/1"
# What text that the reference writes depends on, beside the reference.
_WRITTEN_WITH = ("seed", "temperature", "max_length", "n_rows")


class _Rows(Protocol):
    """Rows of token ids by their number in an endless stream."""

    def row(self, number: int) -> torch.Tensor:
        """Token ids, (length,) int64."""
        ...

    def length(self, number: int) -> int:
        """How many there are."""
        ...

    def hashed(self) -> list[bytes]:
        """All that decides them."""
        ...


class AnchorText:
    """Which tokens a model is anchored on at which step: a function of the config and the step, and of nothing else.

    An anchored step n of W processes has the rows n·B·W to (n + 1)·B·W − 1 of one endless stream, B = `batch_size`;
    process r takes its B of them. So nothing has to be kept to go on after a break, and 2 processes with 4 rows have
    exactly the rows of one with 8.

    Made by `anchor_text`, or read by `load`.
    """

    def __init__(self, config: AnchorConfig, rows: _Rows, reference: str | None = None) -> None:
        self.config, self._rows, self._reference = config, rows, reference

    def batch(
        self, step: int, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
    ) -> dict[str, torch.Tensor]:
        """One process's part of an anchored step.

        Args:
            step: Number of the anchored step, from 0 on.
            rank: Number of the process.
            world_size: How many there are.
            device: Where the tensors shall be.

        Returns:
            `input_ids` and `attention_mask` (1: real), both (batch_size, length) int64, padded on the right to the
            longest row of all processes.

        Raises:
            IsolateError: There is no such step or process.
        """
        numbers = self._numbers(step, world_size)
        if not _whole(rank) or not 0 <= rank < world_size:
            raise IsolateError(f"rank={rank!r}: the processes are 0 to {world_size - 1}")
        width = max(map(self._rows.length, numbers))
        mine = numbers[rank * self.config.batch_size : (rank + 1) * self.config.batch_size]
        ids = torch.zeros(len(mine), width, dtype=torch.int64, device="cpu")
        mask = torch.zeros_like(ids)
        for i, number in enumerate(mine):
            row = self._rows.row(number)
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def global_tokens(self, step: int, world_size: int = 1) -> int:
        """Scored tokens of all processes in an anchored step: of every row all but the first."""
        return sum(self._rows.length(number) - 1 for number in self._numbers(step, world_size))

    def _numbers(self, step: int, world_size: int) -> range:
        """The numbers of the rows of an anchored step."""
        if not (_whole(step) and _whole(world_size)) or step < 0 or world_size < 1:
            raise IsolateError(
                f"step={step!r}, world_size={world_size!r}: use whole numbers; steps count from 0 on, processes from "
                "1 on"
            )
        of_all = self.config.batch_size * world_size
        return range(step * of_all, (step + 1) * of_all)

    def digest(self) -> str:
        """A digest of the whole stream, in hex: equal ones are of equal batches, if `batch_size` is equal."""
        digest = hashlib.sha256()
        for part in self._rows.hashed():
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Keep what the reference wrote, in a safetensors file: the old file or the new one is there, never half.

        Raises:
            IsolateError: The text is not the reference's: it can be made anew at any time.
        """
        if not isinstance(self._rows, _Shuffled) or self.config.source != SELF:
            raise IsolateError(f'only text of source="{SELF}" is kept; any other is made anew from the config')
        written_with = {name: getattr(self.config, name) for name in _WRITTEN_WITH}
        about = {"format": FORMAT, "config": json.dumps(written_with), "reference": self._reference or ""}
        tensors = {"ids": self._rows.ids, "lengths": self._rows.lengths}
        write_whole(path, lambda beside: save_file(tensors, beside, about))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: AnchorConfig | None = None, reference: Reference | None = None
    ) -> AnchorText:
        """Read what `save` kept.

        Args:
            path: The file.
            config: What it is used with: `batch_size`, `beta` and `every` may differ from then, what the text depends
                on may not. None: as then, and the defaults of those.
            reference: What it has to be sampled from; None: anything.

        Raises:
            IsolateError: There is no such file, or it was sampled otherwise, or from another reference; or `config`
                is no `AnchorConfig`.
            FormatError: It is another file, truncated or altered.
        """
        if config is not None:
            check_config(config)
        with read_tensors(path, FORMAT, "anchor text") as (file, metadata):
            then = AnchorConfig(source=SELF, **json.loads(metadata["config"]))
            ids, lengths = (file.get_tensor(name).clone() for name in ("ids", "lengths"))
            _check_kept(ids, lengths, then)
            sampled_from = metadata["reference"]
        config = then if config is None else config
        for name in ("source", *_WRITTEN_WITH):
            if (kept := getattr(then, name)) != (wanted := getattr(config, name)):
                raise IsolateError(
                    f"{os.fspath(path)!r} was sampled with {name}={kept!r}, and {name}={wanted!r} is asked for: give "
                    "the config that it was sampled with, or remove the file"
                )
        if reference is not None and reference.digest() != sampled_from:
            raise IsolateError(
                f"{os.fspath(path)!r} was sampled from another reference: begin with the adapters that there were "
                "then, or remove the file"
            )
        return cls(config, _Shuffled(ids, lengths, then.seed), sampled_from)


def anchor_text(
    config: AnchorConfig, model: nn.Module, tokenizer: Any = None, reference: Reference | None = None
) -> AnchorText:
    """The text that a config means for a model. With several processes every one must call it.

    Args:
        config: What text.
        model: A causal language model of transformers, perhaps inside PEFT, DDP or `torch.compile`; not changed.
        tokenizer: Its tokenizer, or a processor that has one; needed for text of yours. Without it, text is made of
            the model's vocabulary and begins as its config says.
        reference: What "self" is sampled from; None: the model as it is now. One process samples, for all.

    Raises:
        IsolateError: The model has an encoder, cannot generate where it should, or has fewer positions than a row;
            the text of yours cannot be tokenised; or an argument is of another kind.
        FormatError: A line of the file is no JSON object.
    """
    check_config(config)
    inner: Any = unwrap(unwrapped(model))
    tokenizer = as_tokenizer(tokenizer)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    vocabulary = Vocabulary.of(inner, tokenizer)
    if not is_made(config.source):
        return AnchorText(config, _Shuffled.of(_tokenised(config, tokenizer, vocabulary), config.seed))
    _check_fits(config.max_length, vocabulary)
    if len(vocabulary.begin) >= config.max_length:
        raise IsolateError(
            f"max_length={config.max_length} leaves no room behind the {len(vocabulary.begin)} tokens that a text "
            "begins with: use more"
        )
    uniform = _Uniform(vocabulary.begin, vocabulary.ordinary, config.max_length, config.seed)
    if config.source == RANDOM:
        return AnchorText(config, uniform)
    then = Reference.now(model) if reference is None else reference
    ids, lengths = by_process_0(
        lambda: _packed(sampled(config, model, inner, vocabulary, then, lambda number: uniform.row(number)[:1]))
    )
    return AnchorText(config, _Shuffled(ids, lengths, config.seed), then.digest())


class _Uniform(NamedTuple):
    """Rows of uniform tokens after what a text begins with."""

    begin: tuple[int, ...]
    ordinary: torch.Tensor
    size: int
    seed: int

    def row(self, number: int) -> torch.Tensor:
        # The remainder favours no token by more than 2^-40: a vocabulary is far smaller than 2^24.
        drawn = _raw(self.seed, "row", number, self.size - len(self.begin)) % len(self.ordinary)
        begin = torch.tensor(self.begin, dtype=torch.int64, device="cpu")
        return torch.cat([begin, self.ordinary[torch.from_numpy(drawn.astype(np.int64))]])

    def length(self, number: int) -> int:
        return self.size

    def hashed(self) -> list[bytes]:
        about = json.dumps([RANDOM, self.begin, self.size, self.seed])
        return [about.encode(), self.ordinary.numpy().tobytes()]


class _Shuffled:
    """Rows that are kept, walked through again and again, each time in another order."""

    def __init__(self, ids: torch.Tensor, lengths: torch.Tensor, seed: int) -> None:
        self.ids, self.lengths, self._seed = ids, lengths, seed
        self._ends = lengths.cumsum(0)
        self._order: tuple[int, np.ndarray] | None = None

    @classmethod
    def of(cls, rows: Sequence[torch.Tensor], seed: int) -> _Shuffled:
        return cls(*_packed(rows), seed)

    def row(self, number: int) -> torch.Tensor:
        row = self._which(number)
        end = int(self._ends[row])
        return self.ids[end - int(self.lengths[row]) : end].long()

    def length(self, number: int) -> int:
        return int(self.lengths[self._which(number)])

    def hashed(self) -> list[bytes]:
        return [json.dumps(["rows", self._seed]).encode(), self.lengths.numpy().tobytes(), self.ids.numpy().tobytes()]

    def _which(self, number: int) -> int:
        """The row that stands at this place of the stream."""
        time, place = divmod(number, len(self.lengths))
        if self._order is None or self._order[0] != time:
            drawn = _raw(self._seed, "order", time, len(self.lengths))
            self._order = time, np.argsort(drawn, kind="stable")
        return int(self._order[1][place])


def _raw(seed: int, what: str, index: int, count: int) -> np.ndarray:
    """Random numbers (count,) uint64 of these three: the raw ones of NumPy, which are the same in every version."""
    key = hashlib.sha256(f"{seed}/{what}/{index}".encode()).digest()[:16]
    return np.random.Philox(key=int.from_bytes(key, "big")).random_raw(count)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _packed(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(all ids one row after the other, how many each row has), int32 and int64."""
    return torch.cat(list(rows)).to(torch.int32), torch.tensor([len(row) for row in rows], device="cpu")


def _tokenised(config: AnchorConfig, tokenizer: Any, vocabulary: Vocabulary) -> list[torch.Tensor]:
    """Text of the user's; rows of which no token could be scored are left out."""
    if tokenizer is None:
        raise IsolateError(
            "text of yours has to be tokenised, and there is no tokenizer: give the model's (to a trainer as "
            f'processing_class), or use source="{RANDOM}"'
        )
    encoded = encode(read_rows(config.source), tokenizer, config.max_length)
    rows = [torch.tensor(row.ids, dtype=torch.int64, device="cpu") for row in encoded if len(row.ids) > 1]
    if not rows:
        raise IsolateError(
            f"no token of {len(encoded)} rows can be scored: a row needs two tokens, since its first is not predicted"
        )
    if (largest := max(int(row.max()) for row in rows)) >= vocabulary.size:
        raise IsolateError(
            f"the tokenizer gives the id {largest}, and the model knows {vocabulary.size} tokens: give the tokenizer "
            "of this model"
        )
    _check_fits(max(map(len, rows)), vocabulary)
    return rows


def _check_fits(length: int, vocabulary: Vocabulary) -> None:
    if vocabulary.positions is not None and length > vocabulary.positions:
        raise IsolateError(
            f"rows of {length} tokens do not fit into the model's {vocabulary.positions} positions: use "
            f"max_length={vocabulary.positions} or less"
        )


def _check_kept(ids: torch.Tensor, lengths: torch.Tensor, config: AnchorConfig) -> None:
    """Refuse tensors that `AnchorText.save` has not written."""
    if (ids.dtype, lengths.dtype) != (torch.int32, torch.int64) or ids.ndim != 1 or lengths.ndim != 1:
        raise FormatError(f"ids are {ids.dtype} {tuple(ids.shape)}, lengths {lengths.dtype} {tuple(lengths.shape)}")
    within = len(lengths) == config.n_rows and int(lengths.min()) >= 2 and int(lengths.max()) <= config.max_length
    if not within or int(lengths.sum()) != len(ids) or int(ids.min()) < 0:
        raise FormatError(
            f"its {len(lengths)} rows of {len(ids)} ids are not {config.n_rows} of 2 to {config.max_length}, from 0 on"
        )
