"""Where everything of a run lies in its folder, who may write there, and what a killed one left."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from ....errors import IsolateError
from ....regions.files import Claim

# A file system takes 255 bytes a name; those of unfinished files are longer by 20.
_LONGEST_NAME = 200
_NOT_IN_NAMES = '<>:"/\\|?*'
# What tempfile puts behind the name of an unfinished file or folder; a folder within one has two of them.
_UNFINISHED = re.compile(r"\.+(?P<name>.+?)(\.[a-z0-9_]{8})+")
_OF_THE_RUN = ("run.json", "base.json", "groups.json", "similarity.png", "fused", "final", "merged", "report.md",
               "report.json")  # fmt: skip
_FOLDERS = ("probes", "gradients", "regions", "stages")


class Layout:
    """The paths of a run; none of them need be there."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.settings = self.folder / "run.json"
        self.base_scores = self.folder / "base.json"
        self.groups = self.folder / "groups.json"
        self.picture = self.folder / "similarity.png"
        self.fused = self.folder / "fused"
        self.final = self.folder / "final"
        self.merged = self.folder / "merged"
        self.report = self.folder / "report.md"
        self.numbers = self.folder / "report.json"

    def probe(self, task: str) -> Path:
        """A task's probe."""
        return self.folder / "probes" / task

    def gradients(self, task: str) -> Path:
        """A task's mean |gradient| at the base."""
        return self.folder / "gradients" / f"{task}.safetensors"

    def region(self, task: str) -> Path:
        """A task's core region."""
        return self.folder / "regions" / f"{task}.safetensors"

    def stage(self, number: int) -> Path:
        """The adapter after a stage, from 1."""
        return self.folder / "stages" / str(number)

    def check_owner(self) -> None:
        """Refuse a folder that has what a run writes, and is no run's: it would be taken for this one's.

        Raises:
            IsolateError: It is.
        """
        if not self.settings.is_file():
            for name in (*_OF_THE_RUN, *_FOLDERS):
                if (self.folder / name).exists():
                    raise IsolateError(
                        f"{str(self.folder)!r} has {name!r} and no {self.settings.name}: it is no folder of a run, or "
                        "a damaged one; use another output_dir"
                    )

    def prepare(self) -> None:
        """Make the folders that files are written to, and remove what a killed run left unfinished."""
        self._remove_unfinished(self.folder, _OF_THE_RUN)
        for name in _FOLDERS:
            folder = self.folder / name
            folder.mkdir(exist_ok=True)
            self._remove_unfinished(folder)
            for inside in folder.iterdir():
                if inside.is_dir():
                    self._remove_unfinished(inside, ("scores.json",))
        for inside in (self.fused, self.final):
            if inside.is_dir():
                self._remove_unfinished(inside, ("scores.json",))

    def _remove_unfinished(self, folder: Path, names: Iterable[str] | None = None) -> None:
        for path in sorted(folder.iterdir()):
            found = _UNFINISHED.fullmatch(path.name)
            if not found or (names is not None and found["name"] not in names):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Nobody else runs in this folder meanwhile, where the system can tell.

        Raises:
            IsolateError: Somebody does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        busy = IsolateError(f"another run works in {str(self.folder)!r}: wait for it, or use another output_dir")
        claim = Claim(self.folder / ".lock", busy)
        try:
            yield
        finally:
            claim.release()


def check_names(names: Iterable[object]) -> tuple[str, ...]:
    """Names of tasks, each of which becomes a folder of its own on any file system.

    Raises:
        IsolateError: One is no text, no name of a folder, or means the same folder as another.
    """
    known: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str):
            raise IsolateError(f"the name of a task is {name!r}: use text, in quotes in YAML")
        plain = unicodedata.normalize("NFKC", name)
        if (
            not name
            or name.startswith(".")
            or name != name.strip()
            or name.endswith(".")
            or any(sign in plain or sign in name for sign in _NOT_IN_NAMES)
            or any(unicodedata.category(sign).startswith("C") for sign in name)
            or len(name.encode("utf-8", "replace")) > _LONGEST_NAME
        ):
            raise IsolateError(
                f"the task's name {name[:80]!r} is no name of a folder: use up to {_LONGEST_NAME} bytes of letters, "
                "digits, '-' and '_', without a point at either end"
            )
        # Some file systems see neither case nor how an accent is written.
        same = plain.casefold()
        if same in known:
            raise IsolateError(
                f"two tasks are called {known[same]!r} and {name!r}, which would share a folder: give each a name of "
                "its own"
            )
        known[same] = name
    return tuple(known.values())
