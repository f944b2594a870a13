"""One trial of a search, wherever it runs, and the trials of a level as they finish."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import gc
import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ....evaluation.randomness import keeping_host_states
from ....evaluation.scorers import checked_scores
from ..config import CoFiTuneConfig

Train = Callable[[CoFiTuneConfig], Any]
Score = Callable[[Any], Mapping[str, Any]]

# Of an error's text and traceback the end is kept: a record is a line, not a log.
_MESSAGE, _TRACEBACK = 2000, 6000
# The random states are the process's: threads take turns. Of those who train, so that a trial may search, too.
_TURN = threading.RLock()
# What a future raises but for an interruption; asyncio's is no Exception.
_EXECUTORS = (Exception, SystemExit, asyncio.CancelledError)
# How often jobs are asked that are no futures of Python's own.
_ASK_SECONDS = 0.2


def run_trial(train: Train, score: Score, config: CoFiTuneConfig) -> dict[str, Any]:
    """Train and score one config: what an executor is given, so a function of its own that can be pickled.

    The random states of Python, NumPy and torch start the same in every trial, so that a trial depends on its config
    and neither on what ran before it nor on where; afterwards they are as they were. They are the process's own, so
    that the trials of several threads run one after the other.

    Returns:
        {"scores", "error", "seconds"} in plain numbers and texts, as `Record` has them. No exception of a trial leaves
        it but KeyboardInterrupt.
    """
    with _TURN:
        return _run(train, score, config)


def _run(train: Train, score: Score, config: CoFiTuneConfig) -> dict[str, Any]:
    start = time.perf_counter()
    model, scores, error = None, None, None
    try:
        with _same_randomness():
            # Without an importance there is no mask; said so, a trial does not remark on it.
            model = train(dataclasses.replace(config, soft_mask=None) if config.importance is None else config)
            scores = checked_scores(score(model))
    except (Exception, SystemExit) as raised:  # a trainer that exits ends its trial, not the search
        error = error_of(raised)
    # Models hold cycles of references: this one goes before the next one is made.
    if isinstance(model, torch.nn.Module) or error is not None:
        del model
        gc.collect()
    return {"scores": scores, "error": error, "seconds": time.perf_counter() - start}


def error_of(error: BaseException) -> dict[str, str]:
    """An exception as a record keeps it."""
    return {
        "type": type(error).__name__,
        "message": str(error)[:_MESSAGE],
        "traceback": "".join(traceback.format_exception(error))[-_TRACEBACK:],
    }


def _new_turn() -> None:
    global _TURN
    _TURN = threading.RLock()


if hasattr(os, "register_at_fork"):
    # A forked worker has its parent's lock, but not the thread that would release it.
    os.register_at_fork(after_in_child=_new_turn)


@contextlib.contextmanager
def _same_randomness() -> Iterator[None]:
    # Asking for the state of a GPU that nobody uses would set it up.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with keeping_host_states(), torch.random.fork_rng(devices=devices):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        yield


def run_all(
    train: Train,
    score: Score,
    configs: Mapping[str, CoFiTuneConfig],
    record: Callable[[str, dict[str, Any]], None],
    executor: Any = None,
) -> dict[str, BaseException]:
    """Run the trials of a level, and record each as it finishes, in any order.

    A trial's own exception is in what it returns. One that its future raises is the executor's: a worker died, or the
    trial could not be sent to one. Such a trial was not run, and is not recorded. On an interruption what has finished
    meanwhile is still recorded and what has not begun is cancelled.

    Args:
        train: See `search_region`.
        score: See `search_region`.
        configs: {key: config}.
        record: Called in this process with a key and what `run_trial` returned.
        executor: None runs them here, one after the other.

    Returns:
        {key: why} of the trials that the executor did not run.
    """
    if executor is None:
        for key, config in configs.items():
            record(key, run_trial(train, score, config))
        return {}
    waiting: dict[str, Any] = {}
    lost: dict[str, BaseException] = {}
    try:
        for key, config in configs.items():
            try:
                waiting[key] = executor.submit(run_trial, train, score, config)
            except Exception as error:  # the pool is broken, or shut down
                lost[key] = error
        for key in _finished(waiting):
            future = waiting.pop(key)
            try:
                outcome = future.result()
            except _EXECUTORS as error:
                lost[key] = error
            else:
                record(key, outcome)
    except BaseException:
        for future in waiting.values():
            future.cancel()
        for key, future in waiting.items():
            # An error may be the interruption itself, which reaches the workers too: only what came out counts.
            with contextlib.suppress(BaseException):
                if future.done():
                    record(key, future.result())
        raise
    return lost


def _finished(futures: Mapping[str, Any]) -> Iterator[str]:
    """The keys as their futures finish."""
    keys = {id(future): key for key, future in futures.items()}
    if all(isinstance(future, concurrent.futures.Future) for future in futures.values()):
        yield from (keys[id(future)] for future in concurrent.futures.as_completed(list(futures.values())))
        return
    # The jobs of submitit have the methods of a future, but nothing to wait on.
    pending = dict(futures)
    while pending:
        done = [key for key, future in pending.items() if future.done()]
        for key in done:
            del pending[key]
            yield key
        if pending and not done:
            time.sleep(_ASK_SECONDS)
