"""Scorers: a scorer is any callable that takes a model and gives one number, higher is better.

`Scores` puts several together as `search_region` wants them. All of them can be pickled, for trials in other
processes, and leave the model in the modes it was in and every random state as it was.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch

from ..deltas.terms import as_finite
from ..errors import IsolateError
from .forgetting import device_of_model, evaluating, token_loss
from .randomness import keeping_host_states, keeping_torch_states
from .rows import Batches, Rows, as_tokenizer, flag, pad_id, positive, read_rows, text_or_none, token_ids

Scorer = Callable[[torch.nn.Module], float]
SPECIALITY, VERSATILITY = "speciality", "versatility"


class HeldOutLoss:
    """Minus the mean loss per token on held-out text, in nats: a score, so higher is better and 0 is perfect.

    Every counted token weighs the same, whatever the batches are; padding never counts. The rows are tokenised once,
    when the scorer is made, as TRL's `SFTTrainer` tokenises what it trains on.

    Args:
        data: A JSONL file, or rows, with "text", "prompt" and "completion", or "messages"; or preferences, whose
            "chosen" counts.
        tokenizer: The model's, or its folder or Hub id.
        batch_size: Rows that go through the model at once.
        max_length: Tokens a row; longer ones lose their end.
        completion_only: Tokens of a "prompt" do not count.
        probability: Give `exp` of it, the tokens' mean probability (geometric), 0 to 1: of one scale with shares, and
            what `min_speciality` of a search can be a share of.
        limit: Score the first rows only.
        name: See `Scores`; by default "held_out_loss" and the file's name.

    Raises:
        IsolateError: The data cannot be read, no token of it counts, or an argument is of another kind.
    """

    def __init__(
        self,
        data: Rows,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        max_length: int | None = 1024,
        completion_only: bool = True,
        probability: bool = False,
        limit: int | None = None,
        name: str | None = None,
    ) -> None:
        positive("batch_size", batch_size)
        flag("completion_only", completion_only)
        flag("probability", probability)
        text_or_none("name", name)
        # The sum over tokens does not depend on which rows share a batch.
        self._batches = Batches(
            read_rows(data, limit), as_tokenizer(tokenizer), batch_size=batch_size, max_length=max_length,
            completion_only=completion_only,
        )  # fmt: skip
        self.batch_size, self.completion_only, self.probability = batch_size, completion_only, probability
        self.name = name or _named("held_out_loss", data)

    def __call__(self, model: torch.nn.Module) -> float:
        """Score a causal language model."""
        with undisturbed(model):
            loss = token_loss(model, self._batches)
        return math.exp(-loss) if self.probability else -loss

    def __repr__(self) -> str:
        return f"HeldOutLoss({self.name!r}, {self._batches.n_rows} rows)"


class ExactMatch:
    """Share of prompts, 0 to 1, that greedy generation answers exactly as expected.

    Args:
        data: A JSONL file, or rows. A prompt is text, or a list of messages for the tokenizer's chat template.
        tokenizer: The model's, or its folder or Hub id. It is not changed: prompts are padded on the left here.
        max_new_tokens: How long an answer may get. The end-of-sequence token ends it earlier.
        batch_size: Prompts that are answered at once.
        prompt_field: Field of the prompt.
        answer_field: Field of the expected answer.
        strip: White space around both does not count.
        until: The answer ends before this text, "\\n" for instance, where the model does not end it by itself.
        limit: Ask the first rows only.
        name: See `Scores`; by default "exact_match" and the file's name.

    Raises:
        IsolateError: The data cannot be read, a row lacks a field, or an argument is of another kind.
    """

    def __init__(
        self,
        data: Rows,
        tokenizer: Any,
        *,
        max_new_tokens: int = 32,
        batch_size: int = 8,
        prompt_field: str = "prompt",
        answer_field: str = "completion",
        strip: bool = True,
        until: str | None = None,
        limit: int | None = None,
        name: str | None = None,
    ) -> None:
        positive("max_new_tokens", max_new_tokens)
        positive("batch_size", batch_size)
        flag("strip", strip)
        for argument, value in (("until", until), ("name", name)):
            text_or_none(argument, value)
        self._tokenizer = as_tokenizer(tokenizer)
        self.max_new_tokens, self.batch_size, self.strip, self.until = max_new_tokens, batch_size, strip, until
        self._asked: list[tuple[list[int], str]] = []
        for number, row in enumerate(read_rows(data, limit)):
            if missing := [field for field in (prompt_field, answer_field) if field not in row]:
                raise IsolateError(
                    f"row {number} has the fields {sorted(row)} and no {missing}: name them by prompt_field and "
                    "answer_field"
                )
            prompt = token_ids(row[prompt_field], self._tokenizer, f"row {number}", open_ended=True)
            answer = row[answer_field]
            if not isinstance(answer, str) or not prompt:
                raise IsolateError(f"row {number}: the prompt is empty, or the answer {str(answer)[:60]!r} is no text")
            self._asked.append((prompt, answer))
        self._asked.sort(key=lambda asked: len(asked[0]), reverse=True)
        self.name = name or _named("exact_match", data)

    def __call__(self, model: torch.nn.Module) -> float:
        """Score a model that generates."""
        if not hasattr(model, "generate"):
            raise IsolateError(
                f"{type(model).__name__} does not generate: ExactMatch wants a language model of transformers, or a "
                "PeftModel of one"
            )
        right = 0
        with undisturbed(model), torch.no_grad():
            for i in range(0, len(self._asked), self.batch_size):
                part = self._asked[i : i + self.batch_size]
                texts = self._answers(model, [prompt for prompt, _ in part])
                right += sum(
                    self._plain(text) == self._plain(want) for text, (_, want) in zip(texts, part, strict=True)
                )
        return right / len(self._asked)

    def _answers(self, model: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
        width, pad = max(map(len, prompts)), pad_id(self._tokenizer)
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        device = device_of_model(model)
        made = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=self._greedy(model, pad),
        )
        # An encoder–decoder gives the answer alone, a decoder the prompt and then the answer.
        start = 0 if getattr(model.config, "is_encoder_decoder", False) else width
        return self._tokenizer.batch_decode(made[:, start:], skip_special_tokens=True)

    def _greedy(self, model: Any, pad: int) -> Any:
        """Greedy whatever the model's own generation config says: what is None here would be taken from there."""
        from transformers import GenerationConfig

        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = {*(own if isinstance(own, list) else [own]), self._tokenizer.eos_token_id} - {None}
        return GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens, pad_token_id=pad,
            eos_token_id=sorted(ends) or None, use_cache=True, temperature=1.0, top_k=50, top_p=1.0,
            repetition_penalty=1.0, no_repeat_ngram_size=0,
        )  # fmt: skip

    def _plain(self, text: str) -> str:
        if self.until is not None:
            text = text.partition(self.until)[0]
        return text.strip() if self.strip else text

    def __repr__(self) -> str:
        return f"ExactMatch({self.name!r}, {len(self._asked)} prompts)"


class Scores:
    """What `search_region` asks of a model: speciality, versatility, and every scorer's own number.

    Versatility is a plain mean and the search adds speciality to it: give scorers of one scale (losses with losses,
    shares with shares).

    Args:
        speciality: The score on the new task.
        versatility: One or several scores on what shall be kept. A scorer's number stands under its `name`, or its
            function's or class's; the names must differ.

    Raises:
        IsolateError: There is no scorer, one whose name is no text, or two of one name.

    Example:
        >>> scores = Scores(speciality=lambda model: 0.5, versatility=[len])
        >>> scores([1, 2])
        {'speciality': 0.5, 'versatility': 2.0, '<lambda>': 0.5, 'len': 2.0}
    """

    def __init__(self, speciality: Scorer, versatility: Scorer | Sequence[Scorer]) -> None:
        self.speciality = speciality
        self.versatility: list[Scorer] = list(versatility) if isinstance(versatility, Sequence) else [versatility]
        if not self.versatility:
            raise IsolateError("versatility=[] has no scorer: pass at least one of what the model shall not forget")
        self._named: dict[str, Scorer] = {}
        for scorer in (speciality, *self.versatility):
            if not callable(scorer):
                raise IsolateError(f"{scorer!r} is no scorer: pass a callable that takes a model and gives a number")
            name = name_of(scorer)
            text_or_none("name", name)
            if name in (SPECIALITY, VERSATILITY) or self._named.setdefault(name, scorer) is not scorer:
                raise IsolateError(f"two numbers would be called {name!r}: give each scorer a name= of its own")

    def __call__(self, model: Any) -> dict[str, float]:
        """Score a model.

        Raises:
            IsolateError: A scorer gives something other than a number, NaN or infinity, as a model does that diverged.
        """
        own = {name: _number(name, scorer(model)) for name, scorer in self._named.items()}
        kept = [own[name_of(scorer)] for scorer in self.versatility]
        return {SPECIALITY: own[name_of(self.speciality)], VERSATILITY: math.fsum(kept) / len(kept)} | own

    def __repr__(self) -> str:
        return f"Scores(speciality={self.speciality!r}, versatility={self.versatility!r})"


def name_of(scorer: Any) -> str:
    """The name that a scorer's number is kept under."""
    return getattr(scorer, "name", None) or getattr(scorer, "__name__", None) or type(scorer).__name__


def checked_scores(scores: Any, where: str = "") -> dict[str, float]:
    """What a `score(model)` returned, as plain numbers; beside the two that must be there, what is none is left out.

    Args:
        scores: As `Scores` gives them.
        where: Of which model, for the message, such as "α = 0.5".

    Raises:
        IsolateError: It is no mapping, or one of the two is missing or no finite number.
    """
    at = f" at {where}" if where else ""
    if not isinstance(scores, Mapping):
        raise IsolateError(
            f"score(model) returned a {type(scores).__name__}, not a dictionary{at}: return {{'speciality': …, "
            "'versatility': …}, as evaluation.Scores does"
        )
    found = {str(name): as_finite(as_number(value)) for name, value in scores.items()}
    for name in (SPECIALITY, VERSATILITY):
        if name not in scores:
            raise IsolateError(
                f"score(model) forgot {name!r}{at}: it returned {sorted(found)}; return both, as evaluation.Scores "
                "does"
            )
        if found[name] is None:
            raise IsolateError(
                f"score(model)[{name!r}] is {scores[name]!r}{at}, which is no finite number: the model diverged "
                "(leave it out), or the score erred (repair it)"
            )
    return {name: value for name, value in found.items() if value is not None}


def as_number(value: Any) -> Any:
    """A number of NumPy's or torch's as Python's own; anything else as it is."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.item() if np.prod(tuple(value.shape)) == 1 else value
    return value


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a finite number of Python's own, as JSON has them."""
    return isinstance(value, int | float) and as_finite(value) is not None


def _number(name: str, score: Any) -> float:
    try:
        value = float(score)
    except OverflowError:
        value = math.inf
    except (TypeError, ValueError) as error:
        raise IsolateError(f"the scorer {name!r} gave {score!r}: it must give one number") from error
    if not math.isfinite(value):
        raise IsolateError(
            f"the scorer {name!r} gave {value}: the model diverged (a lower learning rate?), or it erred"
        )
    return value


def _named(kind: str, data: Rows) -> str:
    return f"{kind}:{Path(data).stem}" if isinstance(data, str | os.PathLike) else kind


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in its own mode, and every random state as it was."""
    with keeping_host_states(), keeping_torch_states(model), evaluating(model):
        yield


__all__ = ["ExactMatch", "HeldOutLoss", "Scorer", "Scores", "name_of", "undisturbed"]
