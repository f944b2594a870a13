"""Files of this library: written so that a reader sees the old one or the new one, never half of either; and read as
what a stranger may have made.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import FormatError


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk, then rename it over `path`.

    A full disk, an exception or a kill leaves `path` as it was.

    Args:
        path: Where the file shall be; its folder must exist.
        write: Called with the path to write to.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files for their owner alone; a shared file follows the process's umask like any other.
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def read_tensors(path: str | os.PathLike[str], format: str, what: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a safetensors file whose metadata say which `format` of ours it has.

    Args:
        path: The file.
        format: Like "peft_isolate.region/1".
        what: Like "region", for the message.

    Yields:
        (the open file, its metadata).

    Raises:
        FormatError: It is another file, or truncated; also in place of what the caller finds wrong in it, meanwhile.
    """
    try:
        if os.path.isdir(path):
            raise FormatError("it is a folder")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format:
                raise FormatError(f"its format is {metadata.get('format')!r}, not {format!r}")
            yield file, metadata
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(
            f"{os.fspath(path)!r} is not a readable {what} ({error}): get the file again from where it came from, or "
            "make it anew"
        ) from error
