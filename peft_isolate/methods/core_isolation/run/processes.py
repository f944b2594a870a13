"""One process or several under accelerate: what the main one does alone, the others wait for."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from ....errors import IsolateError

T = TypeVar("T")


def main_does(work: Callable[[], T]) -> T:
    """Let the main process do it; every process gets what it returns, or raises what it raised.

    Args:
        work: Its result is small and can be pickled.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    # Asked for anew each time: every TRL config makes another.
    state = PartialState()
    if state.num_processes == 1:
        return work()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    told = [outcome[0], _portable(outcome[1])]
    broadcast_object_list(told)
    result, failure = outcome if state.is_main_process else told
    if failure is not None:
        raise failure
    return result


def is_main() -> bool:
    """Whether this is the main process, or the only one."""
    from accelerate import PartialState

    return PartialState().is_main_process


def _portable(error: Exception | None) -> Exception | None:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return IsolateError(f"the main process failed: {type(error).__name__}: {error}")
