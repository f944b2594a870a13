"""Progress bars, where somebody looks."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(things: Collection[T], what: str) -> Iterator[T]:
    """Each of them, behind a progress bar where the errors go to a terminal."""
    return iter(tqdm(things, desc=what, leave=False, disable=not sys.stderr.isatty()))
