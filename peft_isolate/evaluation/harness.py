"""lm-evaluation-harness as a scorer: its tasks, and your own in its YAML format. Needs the extra `eval`."""

from __future__ import annotations

import copy
import difflib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import IsolateError
from .rows import as_tokenizer, positive
from .scorers import undisturbed


class LMEvalScorer:
    """Mean of the main metrics of some tasks of lm-evaluation-harness (`lm_eval`), higher is better.

    A task's main metric is the first that it reports; one where lower is better, such as a perplexity, counts with a
    minus. A group counts with what it reports for itself, else with the mean of its tasks, and so does a tag. Whether
    the tasks are there is asked when the scorer is made; their data is loaded when it is first called.

    Args:
        tasks: Names of tasks, groups or tags.
        tokenizer: The model's, or its folder or Hub id; it is not changed. None: the one of the model's base.
        include_path: Folder of task files of your own. Where they are all that `tasks` names, the fourteen thousand
            tasks that come with the harness are not read, which saves ten seconds.
        metric: Take this one of every task instead, such as "acc_norm"; a filter of several is named after a comma.
        limit: Ask the first of each task only: a number of them, or a share below 1.
        num_fewshot: Examples in the prompt, instead of the task's own number.
        batch_size: Of the requests.
        name: See `Scores`; by default "lm_eval:" and the tasks.

    Raises:
        ImportError: lm_eval is not installed.
        IsolateError: A task is not known.
    """

    def __init__(
        self,
        tasks: str | Sequence[str],
        tokenizer: Any = None,
        *,
        include_path: str | os.PathLike[str] | None = None,
        metric: str | None = None,
        limit: int | float | None = None,
        num_fewshot: int | None = None,
        batch_size: int = 8,
        name: str | None = None,
    ) -> None:
        self.tasks = [tasks] if isinstance(tasks, str) else list(tasks)
        if not self.tasks or not all(isinstance(task, str) for task in self.tasks):
            raise IsolateError(f"tasks={tasks!r}: pass the names of tasks, at least one")
        if limit is not None and not limit > 0:
            raise IsolateError(f"limit={limit!r}: use a number of examples from 1 on, or a share below 1")
        positive("batch_size", batch_size)
        if include_path is not None and not os.path.isdir(include_path):
            raise IsolateError(f"include_path={os.fspath(include_path)!r} is no folder of task files")
        self.tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
        self.include_path = None if include_path is None else os.fspath(include_path)
        self.metric, self.limit, self.num_fewshot, self.batch_size = metric, limit, num_fewshot, batch_size
        self.name = name or "lm_eval:" + "+".join(self.tasks)
        self._manager: Any = self._found()

    def __call__(self, model: torch.nn.Module) -> float:
        """Score a language model of transformers, or a PeftModel of one."""
        simple_evaluate, harness_model = _lm_eval()
        if self._manager is None:
            self._manager = self._found()
        with undisturbed(model):
            wrapped = harness_model(
                pretrained=model,
                # It sets a pad token and a side to pad on.
                tokenizer=copy.deepcopy(self.tokenizer),
                batch_size=self.batch_size,
            )
            scores = [
                self._value(
                    task,
                    simple_evaluate(
                        model=wrapped,
                        # One at a time: of a tag, the results do not tell which are its tasks.
                        tasks=[task],
                        task_manager=self._manager,
                        limit=self.limit,
                        num_fewshot=self.num_fewshot,
                        bootstrap_iters=0,
                        log_samples=False,
                    ),
                )
                for task in self.tasks
            ]
        return math.fsum(scores) / len(scores)

    def _value(self, task: str, outcome: Mapping[str, Any]) -> float:
        """The number of one task, group or tag: its own metric, or the mean over what it is made of."""
        results = outcome["results"]
        groups = outcome.get("group_subtasks", {})
        counted = [task] if self._metrics(results.get(task, {})) else [name for name in results if name not in groups]
        values = []
        for name in counted:
            metrics = self._metrics(results[name])
            if not metrics:
                reported = [key for key in results[name] if _is_metric(key, results[name][key])]
                raise IsolateError(f"the task {name!r} has no metric {self.metric!r}: it reports {reported}")
            key, value = next(iter(metrics.items()))
            better = outcome["higher_is_better"].get(name, {}).get(key.partition(",")[0])
            if better is None:
                raise IsolateError(
                    f"the task {name!r} does not say whether a higher {key!r} is better: write higher_is_better into "
                    "its file, or choose another metric="
                )
            values.append(value if better else -value)
        return math.fsum(values) / len(values)

    def _metrics(self, entry: Mapping[str, Any]) -> dict[str, float]:
        """{"metric,filter": value} of the metrics that may count, in the task's order."""
        wanted = {key: float(value) for key, value in entry.items() if _is_metric(key, value)}
        if self.metric is None:
            return wanted
        return {key: value for key, value in wanted.items() if self.metric in (key, key.partition(",")[0])}

    def _found(self) -> Any:
        """The harness's index of the tasks."""
        _lm_eval()
        from lm_eval.tasks import TaskManager

        manager = None
        if self.include_path is not None:
            manager = TaskManager(include_path=self.include_path, include_defaults=False)
        if manager is None or not set(self.tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=self.include_path)
        for task in self.tasks:
            if task not in manager.all_tasks:
                close = difflib.get_close_matches(task, manager.all_tasks, n=3)
                raise IsolateError(
                    f"lm_eval knows no task {task!r}"
                    + (f", but {close}" if close else "")
                    + ": see `lm_eval ls tasks`;"
                    " a folder of your own tasks goes to include_path"
                )
        return manager

    def __getstate__(self) -> dict[str, Any]:
        # The index is large, and every process can make its own.
        return self.__dict__ | {"_manager": None}

    def __repr__(self) -> str:
        return f"LMEvalScorer({self.tasks!r}, metric={self.metric!r}, limit={self.limit!r})"


def _is_metric(key: str, value: Any) -> bool:
    return "," in key and "_stderr," not in key and isinstance(value, int | float)


def _lm_eval() -> tuple[Any, Any]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(
            f"LMEvalScorer needs lm-evaluation-harness, which cannot be imported ({error}): "
            "pip install 'peft_isolate[eval]'"
        ) from error
    return simple_evaluate, HFLM
