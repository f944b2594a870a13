"""Files of the library: whole or not there, everybody's as the umask says, and claimed by one at a time."""

from __future__ import annotations

import os
import signal
import time

import pytest

from peft_isolate import Region
from peft_isolate.errors import IsolateError
from peft_isolate.regions.files import Claim, file_digest, write_folder, write_text


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_and_folders_are_everybodys_as_the_umask_says(tmp_path, mask):
    """Which is not asked for: to ask is to set it, for every thread of the process."""
    before = os.umask(mask)
    try:
        (tmp_path / "plain").touch()
        (tmp_path / "plain folder").mkdir()
        write_text(tmp_path / "file", "text")
        with write_folder(tmp_path / "folder") as folder:
            (folder / "inside").touch(0o600)
            (folder / "deeper").mkdir()
    finally:
        os.umask(before)
    mode = lambda name: (tmp_path / name).stat().st_mode  # noqa: E731
    assert mode("file") == mode("folder/inside") == mode("plain")
    assert mode("folder") == mode("folder/deeper") == mode("plain folder")


def test_a_folder_is_no_file(tmp_path):
    """And no hidden name is in the message, nor left."""
    with pytest.raises(IsolateError, match=rf"'{tmp_path}' is a folder.*name one in it"):
        Region().save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_claim_is_alone_until_it_is_released(tmp_path):
    busy = IsolateError("busy")
    first = Claim(tmp_path / ".lock", busy)
    with pytest.raises(IsolateError, match="busy"):
        Claim(tmp_path / ".lock", busy)
    first.release()
    first.release()
    Claim(tmp_path / ".lock", busy).release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
def test_a_worker_that_outlives_its_killed_parent_does_not_keep_the_claim(tmp_path):
    busy = IsolateError("busy")
    read, write = os.pipe()
    if not (parent := os.fork()):
        Claim(tmp_path / ".lock", busy)
        if not (worker := os.fork()):
            time.sleep(60)
            os._exit(0)
        os.write(write, str(worker).encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(read, 20))
    try:
        with pytest.raises(IsolateError, match="busy"):
            Claim(tmp_path / ".lock", busy)
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        Claim(tmp_path / ".lock", busy).release()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_digest_is_of_the_content(tmp_path):
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(text)
    a, b, c = (file_digest(tmp_path / name) for name in "abc")
    assert a == b != c
