"""Rows of a new task for a model of one's own, and everything that is asked of the model."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_settings import Setting

from peft_isolate.errors import IsolateError
from peft_isolate.evaluation import ExactMatch, HeldOutLoss, LMEvalScorer
from peft_isolate.evaluation.forgetting import IGNORED, evaluating
from peft_isolate.evaluation.rows import Batches, read_rows

Row = Mapping[str, Any]
# What the answer of MetaMathQA and of GSM8K stands behind, in the order in which PEFT's comparison looks for them.
MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


def stream(name: str, source: str) -> Iterable[Row]:
    """The rows of a JSONL file, or of a data set of the Hub, which comes row by row.

    Args:
        name: The setting, for an error.
        source: A file, or ID, ID:SPLIT or ID:CONFIG:SPLIT; the split is otherwise "train".

    Raises:
        IsolateError: There is none.
    """
    if Path(source).is_file() or source.endswith((".jsonl", ".json")):
        return read_rows(source)
    repository, *rest = source.split(":")
    config, split = rest[0] if len(rest) > 1 else None, rest[-1] if rest else "train"
    import datasets

    try:
        return datasets.load_dataset(repository, config, split=split, streaming=True)
    except Exception as error:  # the loaders raise many kinds, few of them documented
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise IsolateError(
            f"{name}={source!r} cannot be loaded ({reason}): pass a JSONL file, or a Hub id such as "
            "openai/gsm8k:main:test"
        ) from error


def tasks_of(name: str, source: str, setting: Setting, max_characters: int | None = None) -> Iterator[Row]:
    """Rows of "prompt" and "completion", text or messages, as the setting makes them of what is there."""
    asked = [part[1] for part in string.Formatter().parse(setting.template or "") if part[1]]
    wanted = [*asked, setting.completion]
    for number, given in enumerate(stream(name, source)):
        row = {setting.rename.get(key, key): value for key, value in given.items()}
        if setting.template is not None:
            if missing := [key for key in wanted if not isinstance(row.get(key), str)]:
                raise IsolateError(
                    f"{name}={source!r}, row {number} has the fields {sorted(row)} and no text {missing}, which the "
                    "template wants: rename them by rename="
                )
            made: Row = {"prompt": setting.template.format(**row), "completion": row[setting.completion]}
        elif isinstance(row.get("messages"), list) and len(row["messages"]) > 1:
            made = {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        elif "prompt" in row and "completion" in row:
            made = {"prompt": row["prompt"], "completion": row["completion"]}
        else:
            raise IsolateError(
                f'{name}={source!r}, row {number} has the fields {sorted(row)}: it needs "prompt" and "completion", '
                'or "messages" that end with the answer; or pass a template'
            )
        said = made.values() if setting.template is None else [row[key] for key in wanted]
        # A space between each two, as in PEFT's comparison.
        if max_characters is None or len(" ".join(map(_text, said))) <= max_characters:
            yield made


def parts(setting: Setting) -> tuple[list[Row], list[Row], list[Row]]:
    """Training, validation and test rows. The order in which validation is drawn does not depend on the run's seed.

    Raises:
        IsolateError: The data cannot be read, or there are too few rows.
    """
    wanted = setting.validation_rows
    own = setting.validation is None
    spare = (1 + (setting.test is None)) * wanted if own else 0
    limit = None if setting.rows is None else setting.rows + spare
    training = list(itertools.islice(tasks_of("data", setting.data, setting, setting.max_characters), limit))
    pool = training if setting.validation is None else list(tasks_of("validation", setting.validation, setting))
    order = np.arange(len(pool))
    np.random.RandomState(0).shuffle(order)
    drawn = order[: (1 + (setting.test is None)) * wanted].tolist()
    if len(drawn) < (1 + (setting.test is None)) * wanted or (own and len(drawn) == len(pool)) or not training:
        raise IsolateError(
            f"validation_rows={wanted} of {len(pool)} rows leaves too few for validation, test and training: lower "
            "it, or pass --validation and --test with data of their own"
        )
    validation, test = [pool[i] for i in drawn[:wanted]], [pool[i] for i in drawn[wanted:]]
    if setting.test is not None:
        test = list(itertools.islice(tasks_of("test", setting.test, setting), setting.test_rows))
    if own:
        out = set(drawn)
        training = [row for i, row in enumerate(training) if i not in out]
    return training, validation, test


def final_answer(text: str) -> float | str | None:
    """What a solution comes to, as PEFT's comparison reads it: a number, or else text; None where it says nothing."""
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark is None:
        return None
    found = text.rpartition(mark)[2].strip().split("\n", 1)[0].strip(" .!?$%")
    try:
        numerator, *denominator = (Decimal(part.strip()) for part in found.split("/"))
        if len(denominator) > 1:
            return found
        return float(numerator / denominator[0] if denominator else numerator)
    except (InvalidOperation, ZeroDivisionError):
        return found


class FinalAnswer(ExactMatch):
    """Share of solutions that come to the right result, whatever is written before it."""

    def __init__(self, rows: Sequence[Row], tokenizer: Any, **options: Any) -> None:
        for number, row in enumerate(rows):
            if final_answer(row["completion"]) is None:
                raise IsolateError(
                    f"score='final_answer', row {number}: the solution {row['completion'][-60:]!r} names no result; "
                    f"it stands behind one of {MARKS}"
                )
        super().__init__(rows, tokenizer, **options)

    def _plain(self, text: str) -> Any:
        return final_answer(super()._plain(text))


# Rows and tokens of the new task that KL from the base is measured on.
KL_ROWS, KL_TOKENS = 16, 1024


class Drift:
    """KL(base ‖ model) on what is trained on of the new task, by predictions of the base that are kept.

    Neither a second model nor a copy of the weights is kept, which would count as a run's memory: on the CPU are the
    log-probabilities of at most `KL_TOKENS` tokens, 4 bytes for each word of the vocabulary.

    Args:
        rows: Of the new task; the first `KL_ROWS` count.
        tokenizer: The model's.
        setting: How rows are cut, and what of them is an answer.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Any, setting: Setting) -> None:
        self._batches = Batches(
            rows[:KL_ROWS], tokenizer, batch_size=setting.batch_size, max_length=setting.max_length,
            completion_only=setting.completion_only,
        )  # fmt: skip
        self._base: list[torch.Tensor] = []

    def remember(self, base: torch.nn.Module) -> None:
        """Keep what the base predicts."""
        self._base = [said.cpu() for said in self._predicted(base)]

    def __call__(self, model: torch.nn.Module) -> float:
        """Mean over the tokens, in nats; 0 for the base."""
        total = tokens = 0.0
        for base, said in zip(self._base, self._predicted(model), strict=True):
            total += torch.nn.functional.kl_div(said, base.to(said.device), reduction="sum", log_target=True).item()
            tokens += len(base)
        return total / tokens

    @torch.no_grad()
    def _predicted(self, model: torch.nn.Module) -> Iterator[torch.Tensor]:
        """Of each batch the log-probabilities at the scored tokens, (tokens, vocabulary) fp32."""
        left, device = KL_TOKENS, next(model.parameters()).device
        with evaluating(model):
            for batch in self._batches:
                if left <= 0:
                    return
                given = {name: tensor.to(device) for name, tensor in batch.items()}
                scored = given.pop("labels")[:, 1:] != IGNORED
                logits = model(**given).logits[:, :-1][scored][:left]
                left -= len(logits)
                yield logits.float().log_softmax(-1)


class Exam:
    """Everything that is asked of a model: the new task, old abilities, general text, how far it is from the base.

    Args:
        setting: What, and how.
        tokenizer: The model's.

    Attributes:
        training: Rows to train on.

    Raises:
        IsolateError: Data or a task cannot be found.
        ImportError: There are tasks, and lm_eval is not installed.
    """

    def __init__(self, setting: Setting, tokenizer: Any) -> None:
        self.setting, self.tokenizer = setting, tokenizer
        many = setting.evaluation_batch_size
        self._old = {
            task: LMEvalScorer(
                [task], tokenizer, include_path=setting.include_path, num_fewshot=setting.fewshot, batch_size=many,
                limit=int(setting.limit) if setting.limit is not None and setting.limit >= 1 else setting.limit,
            )
            for task in setting.tasks
        }  # fmt: skip
        self._general = None
        if setting.general is not None:
            rows = list(itertools.islice(stream("general", setting.general), setting.general_rows))
            self._general = HeldOutLoss(
                [{"text": row["text"]} if "text" in row else row for row in rows], tokenizer,
                # As in training: the logits of a larger batch would be the peak of the memory.
                batch_size=setting.batch_size,
                max_length=setting.general_length,
            )  # fmt: skip
        self.training, validation, test = parts(setting)
        self._validation, self._test = self._scorer(validation), self._scorer(test)
        self._drift = Drift(validation, tokenizer, setting)

    def _scorer(self, rows: list[Row]) -> Any:
        setting = self.setting
        if setting.score == "loss":
            return HeldOutLoss(
                rows, self.tokenizer, batch_size=setting.batch_size, max_length=setting.max_length,
                completion_only=setting.completion_only,
            )  # fmt: skip
        kind = FinalAnswer if setting.score == "final_answer" else ExactMatch
        asked = [{"prompt": row["prompt"], "completion": _text(row["completion"])} for row in rows]
        return kind(
            asked, self.tokenizer, max_new_tokens=setting.new_tokens, until=setting.until,
            batch_size=setting.evaluation_batch_size,
        )  # fmt: skip

    def validation(self, model: torch.nn.Module) -> float:
        """Score on the new task's validation, higher is better: a share, or minus a loss in nats."""
        return self._validation(model)

    def test(self, model: torch.nn.Module) -> float:
        """The same on its test rows."""
        return self._test(model)

    def remember(self, base: torch.nn.Module) -> None:
        """Keep what KL is measured from: before anything is asked of what was trained."""
        self._drift.remember(base)

    def kept(self, model: torch.nn.Module) -> dict[str, float]:
        """{task: main metric, higher is better; "kl" from the base, and minus the loss on "general" text, in nats}."""
        found = {task: scorer(model) for task, scorer in self._old.items()} | {"kl": self._drift(model)}
        return found if self._general is None else found | {"general": self._general(model)}


def _text(said: Any) -> str:
    """Text, or the text of messages."""
    return said if isinstance(said, str) else "\n".join(str(message.get("content", "")) for message in said)
