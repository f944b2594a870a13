"""Which tokens a model and its tokenizer know, and how a text begins and ends with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ...errors import IsolateError
from ...regions.region import base_module, logical_shape
from ...regions.tree import text_config
from ..causal import positions_of

_END = "eos_token_id"
_ALL = "all_special_ids"
_SPECIAL = ("bos_token_id", _END, "pad_token_id")


class Vocabulary(NamedTuple):
    """What text for a model can be made of.

    Attributes:
        size: Tokens that the model knows: the rows of its input embedding.
        ordinary: The ids that stand for text, (n,) int64, ascending: no special tokens, and no rows of the embedding
            that the tokenizer has no token for.
        begin: The ids that a text begins with.
        ends: The ids that end a text.
        positions: Tokens that a row may have; None where the model does not say.
    """

    size: int
    ordinary: torch.Tensor
    begin: tuple[int, ...]
    ends: tuple[int, ...]
    positions: int | None

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any = None) -> Vocabulary:
        """The vocabulary of a causal language model; without a tokenizer, what its config says.

        Args:
            model: Without any wrapper.
            tokenizer: Of transformers.

        Raises:
            IsolateError: The model has an encoder, no input embedding, or no ordinary token; or the tokenizer is none.
        """
        if tokenizer is not None and not all(hasattr(tokenizer, name) for name in ("__call__", "__len__", _ALL)):
            raise IsolateError(
                f"tokenizer={tokenizer!r} is {type(tokenizer).__name__}: give the tokenizer of this model, or what it "
                "is loaded from"
            )
        config: Any = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise IsolateError(
                f"{type(model).__name__} has an encoder, and an anchor holds a decoder alone: use a causal language "
                "model"
            )
        text = text_config(model)
        generation = getattr(model, "generation_config", None)
        size, _ = embedded(model)
        known = size
        begin = tuple(_ids(text, "bos_token_id"))
        ends = {*_ids(text, _END), *_ids(generation, _END)}
        special = {i for name in _SPECIAL for i in _ids(text, name)} | ends
        if tokenizer is not None:
            known = min(size, len(tokenizer))
            begin = _begin(tokenizer)
            ends |= {*_ids(tokenizer, _END)}
            added = getattr(tokenizer, "added_tokens_decoder", {})
            special |= ends | {*getattr(tokenizer, _ALL), *(i for i, token in added.items() if token.special)}
        ordinary = torch.tensor([i for i in range(known) if i not in special], dtype=torch.int64, device="cpu")
        if not len(ordinary):
            raise IsolateError(
                f"all of the {known} tokens that model and tokenizer know are special, and no text can be made of "
                "them: give the tokenizer of this model"
            )
        return cls(size, ordinary, begin, tuple(sorted(ends)), positions_of(model))


def embedded(model: Any) -> tuple[int, nn.Parameter]:
    """(tokens that a model knows, the weight of its input embedding).

    Args:
        model: Without any wrapper.

    Raises:
        IsolateError: It has no input embedding.
    """
    try:
        embedding: Any = base_module(model.get_input_embeddings())
        weight = embedding.weight
    except (AttributeError, NotImplementedError) as error:
        raise IsolateError(
            f"{type(model).__name__} has no input embedding to ask for its vocabulary ({error}): use a causal "
            "language model of transformers, or a PeftModel of one"
        ) from error
    return logical_shape(embedding, "weight", weight)[0], weight


def _ids(source: Any, name: str) -> list[int]:
    """Token ids that a config or a tokenizer names: there may be none, one or a list."""
    value = getattr(source, name, None)
    return [] if value is None else [*value] if isinstance(value, list | tuple) else [value]


def _begin(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a text, such as the token that begins a sequence."""
    alone, put = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = range(len(put) - len(alone) + 1)
    return tuple(put[: next((i for i in starts if put[i : i + len(alone)] == alone), 0)])
