"""Writing a file so that a reader sees the old one or the new one, never half of either."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


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
