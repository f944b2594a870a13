"""The package asks for nothing that only POSIX has: what is optional there is optional here, too.

Nothing runs on Windows here. These tests read the source, and take away what Windows does not have.
"""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

import peft_isolate
from peft_isolate.errors import IsolateError
from peft_isolate.methods.cofitune.search.journal import Journal
from peft_isolate.methods.core_isolation.run.layout import Layout
from peft_isolate.regions.files import write_folder, write_text

PACKAGE = Path(peft_isolate.__file__).parent
# Modules and functions that Python's documentation marks "Availability: Unix".
POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_FUNCTIONS = {
    "chown", "chroot", "confstr", "fchmod", "fchown", "fdatasync", "fork", "forkpty", "getegid", "geteuid", "getgid",
    "getgroups", "getloadavg", "getpgid", "getpgrp", "getpriority", "getsid", "getuid", "getxattr", "killpg", "lchown",
    "lockf", "mkfifo", "mknod", "nice", "openpty", "pathconf", "pipe2", "posix_fadvise", "posix_fallocate",
    "posix_spawn", "pread", "preadv", "pwrite", "pwritev", "register_at_fork", "sched_getaffinity", "sched_yield",
    "sendfile", "setegid", "seteuid", "setgid", "setpgid", "setpriority", "setsid", "setuid", "setxattr", "statvfs",
    "sync", "sysconf", "wait", "waitid", "copy_file_range", "memfd_create", "uname", "sigwait", "setitimer", "alarm",
    "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_SYNC", "SIGKILL", "SIGALRM", "SIGHUP",
}  # fmt: skip


def guarded(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a use stands under `if hasattr(os, …)`, or in a `try` that expects an ImportError."""
    while node in parents:
        node = parents[node]
        if isinstance(node, ast.If) and "hasattr(os" in ast.unparse(node.test):
            return True
        if isinstance(node, ast.Try) and any(h.type and "ImportError" in ast.unparse(h.type) for h in node.handlers):
            return True
    return False


def unguarded(source: str) -> list[str]:
    """The uses of what only POSIX has that no guard stands around."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name in POSIX_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module in POSIX_MODULES else []
            if node.module in ("os", "signal"):
                names += [alias.name for alias in node.names if alias.name in POSIX_FUNCTIONS]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("os", "signal"):
            names = [node.attr] if node.attr in POSIX_FUNCTIONS else []
        found += [f"line {node.lineno}: {name}" for name in names if not guarded(node, parents)]
    return found


def test_nothing_that_only_posix_has_is_called_without_asking():
    """docs/limits.md: no call outside the tests that only POSIX has, unless the system is asked for it first."""
    found = {str(file): unguarded(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")}
    assert len(found) > 50
    assert {file: uses for file, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    ("source", "n"),
    [
        ("import fcntl", 1),
        ("def f():\n    from resource import getrusage", 1),
        ("import os\nos.fork()", 1),
        ("from os import sched_getaffinity", 1),
        ("import signal\nsignal.alarm(3)", 1),
        ("import os\nif hasattr(os, 'O_DIRECTORY'):\n    os.open('.', os.O_DIRECTORY)", 0),
        ("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", 0),
        ("import os\nos.replace('a', 'b')", 0),
    ],
)
def test_the_reader_of_the_source_sees_them(source, n):
    """The check is not empty."""
    assert len(unguarded(source)) == n


@pytest.fixture
def _without_posix(monkeypatch, tmp_path):  # pytest wants POSIX to make its folder: before
    for name in POSIX_MODULES - {"posix"}:  # Python's own os imports that one
        monkeypatch.setitem(sys.modules, name, None)
    for name in POSIX_FUNCTIONS - {"uname"}:  # platform asks for it by name
        monkeypatch.delattr(os, name, raising=False)


@pytest.mark.usefixtures("_without_posix")
def test_files_folders_and_locks_work_without_it(tmp_path):
    """What writes whole files, claims a search and claims a run does so without locks and without syncing folders."""
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    with write_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("text")
    assert (tmp_path / "folder" / "file").read_text() == "text"
    with Journal(tmp_path / "search"), pytest.raises(IsolateError, match="open in another search"):
        Journal(tmp_path / "search")
    with Layout(tmp_path / "run").claimed():
        assert not (tmp_path / "run" / ".lock").exists()
