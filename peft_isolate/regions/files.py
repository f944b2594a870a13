"""Files of this library: written so that a reader sees the old one or the new one, never half of either; and read as
what a stranger may have made.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import FormatError, IsolateError


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk, then rename it over `path`.

    A full disk, an exception or a kill leaves `path` as it was.

    Args:
        path: Where the file shall be. Missing folders are made.
        write: Called with the path to write to.

    Raises:
        IsolateError: `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsolateError(f"{os.fspath(path)!r} is a folder, and a file is to be written: name one in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _new_beside(path, lambda name: os.close(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)))
    try:
        mode = stat.S_IMODE(beside.stat().st_mode)
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        beside.chmod(mode)  # safetensors makes files for their owner alone
        os.replace(beside, path)
        _sync_folder(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, as `write_whole` does, with its line ends as they are."""
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8", newline=""))


@contextmanager
def write_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to be filled: it lies beside `path` under a hidden name, and is renamed to it at the end.

    A full disk, an exception or a kill leaves nothing under `path`; a kill leaves the hidden folder. Its files follow
    the process's umask.

    Args:
        path: Where the folder shall be: nothing is there, or an empty folder. Its parents are made.

    Yields:
        The folder to write to.

    Raises:
        IsolateError: Something is there already.
    """
    path = Path(path)
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _new_beside(path, os.mkdir)
    try:
        mode = stat.S_IMODE(beside.stat().st_mode) & 0o666
        yield beside
        for inside in beside.rglob("*"):
            if inside.is_file():
                inside.chmod(mode)  # safetensors makes files for their owner alone
                with open(inside, "rb+") as opened:
                    os.fsync(opened.fileno())
            elif inside.is_dir():
                _sync_folder(inside)
        _sync_folder(beside)
        try:
            os.replace(beside, path)
        except OSError:
            check_free(path)  # another writer was here first
            raise
        _sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def check_there(path: str | os.PathLike[str], remedy: str, given_as: str = "") -> None:
    """Raise `IsolateError` unless something is at this path.

    Args:
        path: To be read.
        remedy: Ends the message.
        given_as: Like "frozen=", begins it.
    """
    if not os.path.exists(path):
        raise IsolateError(f"{given_as}{os.fspath(path)!r}: there is no such file; {remedy}")


def check_free(path: str | os.PathLike[str]) -> None:
    """Raise `IsolateError` unless nothing is at this path, or an empty folder, and a folder can be made there."""
    if not isinstance(path, str | os.PathLike):
        raise IsolateError(f"{path!r} is no path: name a folder that is to be made")
    path = Path(path)
    if blocked := [parent for parent in path.parents if parent.exists() and not parent.is_dir()]:
        raise IsolateError(f"{os.fspath(path)!r} cannot be made: {os.fspath(blocked[0])!r} is a file; name another")
    if path.exists() and (os.path.ismount(path) or path.resolve() == Path.cwd()):
        raise IsolateError(
            f"{os.fspath(path)!r} is the current folder, or one that another file system is mounted on, and no "
            "finished folder can be put in its place: name one inside it"
        )
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise IsolateError(
            f"{os.fspath(path)!r} is there already, and nothing is overwritten: remove it, or name another"
        )


def _new_beside(path: Path, make: Callable[[Path], object]) -> Path:
    """What `make` makes under a hidden name of its own beside `path`: with the umask, which only making tells.

    `make` raises `FileExistsError` where something has that name.
    """
    while True:
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            make(beside)
        except FileExistsError:
            continue
        return beside


def blocks(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """A file's content, in pieces of little memory."""
    with open(path, "rb") as file:
        while block := file.read(2**20):
            yield block


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    hashed = hashlib.sha256()
    for block in blocks(path):
        hashed.update(block)
    return hashed.hexdigest()


# {(process, path): what claims it}; a fork's are its parent's.
_CLAIMED: dict[tuple[int, str], Claim] = {}


class Claim:
    """That nobody else works here meanwhile: nobody in this process, and where the system knows locks, in any other.

    What is locked is an empty file: of one with content, any reader that closes it would end the lock. The lock is the
    process's: a worker that outlives its killed parent does not keep it.

    Args:
        path: Of the empty file, in a folder that is there; made by this where the system knows locks.
        busy: What is raised where somebody else has claimed it.
    """

    def __init__(self, path: str | os.PathLike[str], busy: IsolateError) -> None:
        self._lock: int | None = None
        # Another thread's: a lock of this process would let it pass, and end with the first that is closed.
        self._name = (os.getpid(), os.path.realpath(path))
        if _CLAIMED.setdefault(self._name, self) is not self:
            raise busy
        try:
            self._take(path, busy)
        except BaseException:
            self.release()
            raise

    def _take(self, path: str | os.PathLike[str], busy: IsolateError) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise busy from error
        except OSError:
            pass  # a file system without locks

    def release(self) -> None:
        """Let others in; once more does nothing."""
        if _CLAIMED.get(self._name) is self:
            del _CLAIMED[self._name]
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where folders can be opened for that."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def read_tensors(
    path: str | os.PathLike[str], format: str | tuple[str, ...], what: str
) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a safetensors file whose metadata say which `format` of ours it has.

    Args:
        path: The file.
        format: Like "peft_isolate.region/1"; or several, of which it may have any.
        what: Like "region", for the message.

    Yields:
        (the open file, its metadata).

    Raises:
        IsolateError: There is no such file.
        FormatError: It is another file, or truncated; also in place of what the caller finds wrong in it, meanwhile.
    """
    check_there(path, f"pass the path of a saved {what}, or save one there first")
    try:
        if os.path.isdir(path):
            raise FormatError("it is a folder")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            formats = (format,) if isinstance(format, str) else format
            if metadata.get("format") not in formats:
                raise FormatError(f"its format is {metadata.get('format')!r}, not {' or '.join(map(repr, formats))}")
            yield file, metadata
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise FormatError(
            f"{os.fspath(path)!r} is not a readable {what} ({error}): get the file again from where it came from, or "
            "make it anew"
        ) from error
