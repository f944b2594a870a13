"""How a step is judged: the loss of every task on its held-out rows, and how many prompts are answered exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ....errors import FormatError, IsolateError
from ....evaluation.rows import token_ids
from ....evaluation.scorers import ExactMatch, HeldOutLoss
from .tasks import Task
from .train import Recipe

LOSS, MATCH = "loss", "exact_match"
# {task: {"loss": nats a token, "exact_match": share}}, the latter where rows have prompt and completion as text.
TaskScores = dict[str, dict[str, float]]
# An answer of more tokens counts as wrong: generating is slow, and long answers are hardly ever the same.
_LONGEST_ANSWER = 128


class Judges:
    """The scorers of all tasks.

    Args:
        tasks: Whose test rows.
        recipe: Rows are tokenised and cut as for training.
        exact_match: Whether prompts are answered, which takes far longer than a loss.

    Raises:
        IsolateError: No token of a task counts, or the tokenizer's chat template cannot render its messages.
    """

    def __init__(self, tasks: Iterable[Task], recipe: Recipe, exact_match: bool = True) -> None:
        tokenizer = recipe.load_tokenizer()
        self._losses: dict[str, HeldOutLoss] = {}
        self._matches: dict[str, ExactMatch] = {}
        for task in tasks:
            try:
                self._losses[task.name] = HeldOutLoss(
                    task.test, tokenizer, batch_size=recipe.eval_batch_size, max_length=recipe.max_length,
                    completion_only=recipe.completion_only,
                )  # fmt: skip
                if exact_match and _asks(task):
                    self._matches[task.name] = ExactMatch(
                        task.test, tokenizer, batch_size=recipe.eval_batch_size,
                        max_new_tokens=_longest_answer(task, tokenizer),
                    )  # fmt: skip
            except IsolateError as error:
                raise type(error)(f"task {task.name!r}, test: {error}") from error

    def __call__(self, model: nn.Module, tasks: Iterable[str], step: str) -> TaskScores:
        """Score a model.

        Args:
            model: On its device.
            tasks: On which of them.
            step: What it is, for an error.

        Raises:
            IsolateError: A loss is not finite.
        """
        found: TaskScores = {}
        for task in tasks:
            loss = -self._losses[task](model)
            if not math.isfinite(loss):
                raise IsolateError(
                    f"{step}: the loss of {task!r} is {loss}: the training diverged; start anew in another output_dir "
                    "with a lower learning rate"
                )
            found[task] = {LOSS: loss}
            if task in self._matches:
                found[task][MATCH] = self._matches[task](model)
        return found


def load_scores(path: Path) -> TaskScores:
    """Read what was kept of a step.

    Raises:
        FormatError: It is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(task): {str(k): float(v) for k, v in scores.items()} for task, scores in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path} holds no scores ({error}): delete it, and they are measured again") from error


def _asks(task: Task) -> bool:
    return "prompt" in task.fields and all(
        isinstance(row["completion"], str) and row["completion"] for row in task.test
    )


def _longest_answer(task: Task, tokenizer: Any) -> int:
    """Tokens of the longest answer, and its end."""
    longest = max(len(token_ids(row["completion"], tokenizer, "an answer")) for row in task.test)
    return min(longest + 1, _LONGEST_ANSWER)


__all__ = ["LOSS", "MATCH", "Judges", "TaskScores", "load_scores"]
