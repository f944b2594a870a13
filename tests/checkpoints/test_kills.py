"""Killed processes and full disks: the old file is whole, or the new one is, and nothing half-written has a name."""

from __future__ import annotations

import builtins
import copy
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_isolate import Region
from peft_isolate.checkpoints.compress import compress, decompress
from peft_isolate.checkpoints.extract import extract
from peft_isolate.checkpoints.merge import merge
from peft_isolate.errors import IsolateError
from peft_isolate.methods.cofitune.importance import Importance
from peft_isolate.regions.files import write_folder, write_whole
from peft_isolate.regions.selection import Selection
from tests.checkpoints.folders import files
from tests.checkpoints.fuzz_folders import adapters, base, exact, model
from tests.checkpoints.fuzzing import scratch

pytestmark = pytest.mark.filterwarnings("ignore")

# Before each of these a process is killed.
EVENTS = ("open", "os.rename", "os.remove", "os.chmod", "os.mkdir", "os.rmdir", "shutil.copyfile", "tempfile.mkstemp",
          "tempfile.mkdtemp", "os.listdir", "os.scandir", "fsync")  # fmt: skip
SIZES = (0, 1, 7, 8, 100, 333, 1000, 2500, 5000, 10_000, 15_000, 20_000, 30_000, 70_000)


@pytest.fixture(autouse=True, scope="module")
def _made() -> None:
    """What is read is made before anything is killed or full: children would make it again, and fail."""
    for make in (base, exact, adapters, model, plain_tuned):
        make()


@pytest.fixture
def here() -> Iterator[Path]:
    """A folder in memory, where nobody waits for a disk."""
    folder = Path(tempfile.mkdtemp(dir=scratch()))
    yield folder
    shutil.rmtree(folder)


def region(seed: int) -> Region:
    """One of some 20 KiB."""
    positions = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))[:2500].sort().values
    return Region({"a": Selection.elements((5000,), positions), "b": Selection.whole((3, seed + 1))})


def importance(seed: int) -> Importance:
    """One of some 20 KiB."""
    generator = torch.Generator().manual_seed(seed)
    return Importance({"model.layers.0.feed-forward.up": torch.rand(5000, generator=generator)}, "absolute", 1, seed)


def pieces(seed: int) -> Callable[[Path], None]:
    """Writes 20 KiB in pieces."""

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            for _ in range(20):
                file.write(bytes([seed]) * 1024)

    return write


OVER = {
    "write_whole": lambda path, seed: write_whole(path, pieces(seed)),
    "Region.save": lambda path, seed: region(seed).save(path),
    "Importance.save": lambda path, seed: importance(seed).save(path),
}
"""What is written over what is there: (path, which content)."""
INTO = {
    "merge": lambda out: merge(base(), adapters()[0], out=out),
    "rebuild": lambda out: merge(base(), exact()[1], out=out),
    "compress": lambda out: compress(adapters()[2], out, "int8"),
    "decompress": lambda out: decompress(adapters()[7], out),
    "extract": lambda out: extract(base(), plain_tuned(), out),
    "extract exact": lambda out: extract(base(), exact()[0], out, mode="exact"),
}
"""What writes a folder."""
IN_RUST = ("Region.save", "Importance.save", "compress", "decompress")  # their numbers: no file of Python's
SLOW = ("decompress", "extract", "extract exact")
SOME_SLOW = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in INTO]


def plain_tuned() -> Path:
    """A tuned checkpoint of the base's own tensors."""
    folder = scratch() / "plain-tuned"
    if not folder.exists():
        merge(base(), adapters()[0], out=folder)
    return folder


def held(name: str, path: Path) -> int:
    """Which content stands there, whole: 1 or 2; 0 for any other."""
    if name == "write_whole":
        data = path.read_bytes()
        return next((seed for seed in (1, 2) if data == bytes([seed]) * 20 * 1024), 0)
    if name == "Region.save":
        found = Region.load(path)
        return next((seed for seed in (1, 2) if found == region(seed)), 0)
    units = next(iter(Importance.load(path).units.values()))
    return next((s for s in (1, 2) if torch.equal(units, next(iter(importance(s).units.values())))), 0)


def in_child(work: Callable[[], object]) -> int:
    """Do it in a copy of this process: 0, 1 for an error that a disk or this library raises, 3 for any other one, −9
    for a kill.
    """
    child = os.fork()
    if not child:
        signal.alarm(60)
        status = 3
        try:
            work()
            status = 0
        except BaseException as error:
            # safetensors' error for a disk that is full is its own.
            known = isinstance(error, OSError | IsolateError) or type(error).__name__ == "SafetensorError"
            status = 1 if known else 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(moment: int, work: Callable[[], object]) -> Callable[[], object]:
    """The work, in a process that is killed before it touches the disk for the so-manieth time."""

    def doomed() -> None:
        left = moment

        def count(event: str, _: object) -> None:
            nonlocal left
            if event in EVENTS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        synced = os.fsync

        def fsync(handle: int) -> None:
            count("fsync", None)
            synced(handle)
            count("fsync", None)

        os.fsync = fsync
        sys.addaudithook(count)
        work()

    return doomed


def assert_only(folder: Path, names: set[str], hidden: bool) -> None:
    """That a folder has these, and after a kill perhaps what is hidden."""
    there = {path.name for path in folder.iterdir()}
    assert {name for name in there if not (hidden and name.startswith("."))} == names


@pytest.mark.parametrize("name", OVER)
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(name, here):
    """Before and after each time that the process touches the disk."""
    path, write, seen = here / "file", OVER[name], []
    write(path, 1)
    for moment in range(1000):
        status = in_child(killed_at(moment, lambda: write(path, 2)))
        assert status in (0, -signal.SIGKILL)
        seen.append(held(name, path))
        assert_only(here, {"file"}, hidden=True)
        if status == 0:
            break
    assert set(seen) == {1, 2}
    assert seen == sorted(seen)
    assert seen.count(1) > 5
    write(path, 1)
    assert held(name, path) == 1


@pytest.mark.parametrize("name", ["merge", *(pytest.param(n, marks=pytest.mark.slow) for n in INTO if n != "merge")])
def test_a_kill_at_any_moment_leaves_no_half_folder(name, here):
    """Nothing or everything stands under the name, and another run goes through."""
    INTO[name](here / "sound")
    wanted, seen = files(here / "sound"), set()
    for moment in range(2000):
        there = here / f"{moment}"
        there.mkdir()
        status = in_child(killed_at(moment, lambda there=there: INTO[name](there / "out")))
        assert status in (0, -signal.SIGKILL)
        seen.add(complete := (there / "out").exists())
        assert_only(there, {"out"} if complete else set(), hidden=True)
        if not complete and moment % 8 == 0:
            INTO[name](there / "out")
        if (there / "out").exists():
            assert files(there / "out") == wanted
        shutil.rmtree(there)
        if status == 0:
            break
    assert seen == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("name", OVER)
def test_a_kill_at_random_leaves_the_old_file_or_the_new_one(name, here):
    """Also in the middle of a write, a hundred times."""
    path, write, generator = here / "file", OVER[name], random.Random(0)
    write(path, 1)

    def on_and_on() -> None:
        while True:
            for seed in (2, 1):
                write(path, seed)

    for _ in range(100):
        if not (child := os.fork()):
            try:
                on_and_on()
            finally:
                os._exit(1)
        time.sleep(generator.uniform(0.001, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert held(name, path)
        assert_only(here, {"file"}, hidden=True)


def test_what_is_written_is_on_the_disk_before_it_has_its_name(here, monkeypatch):
    """Every file and every folder in it, and the name itself afterwards: a power cut is no kill."""
    events: list[str] = []
    synced, renamed = os.fsync, os.replace

    def fsync(handle: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")).partition(".file.")[0])
        synced(handle)

    def replace(*names: object) -> None:
        events.append("rename")
        renamed(*names)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_whole(here / "file", pieces(1))
    assert events == ["", "rename", here.name]
    events.clear()
    with write_folder(here / "folder") as folder:
        (folder / "sub").mkdir()
        for name in ("a", "sub/b"):
            (folder / name).write_text("x")
    at = events.index("rename")
    assert sorted(events[:at]) == sorted(["a", "b", "sub", folder.name])
    assert events[at + 1 :] == [here.name]


def with_limit(n_bytes: int, work: Callable[[], object]) -> Callable[[], object]:
    """The work, where no file may become larger: what is too much fails as on a full disk, whoever writes it."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        work()

    return limited


class Failing:
    """A file of Python's on a disk that has room for some bytes more, in all files together."""

    left = 0

    def __init__(self, file):
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, data):
        Failing.left -= len(data) if isinstance(data, str) else memoryview(data).nbytes
        if Failing.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)


def with_failing_files(n_bytes: int, work: Callable[[], object]) -> Callable[[], object]:
    """The work, where Python's files take so many bytes in all, and then no more."""

    def failing() -> None:
        real, Failing.left = builtins.open, n_bytes

        def opened(file, mode="r", *args, **kwargs):
            found = real(file, mode, *args, **kwargs)
            return Failing(found) if set(mode) & set("wax+") else found

        builtins.open = opened
        work()

    return failing


DISKS = [(name, full) for full in (with_limit, with_failing_files) for name in (*OVER, *INTO)]
DISKS = [
    pytest.param(name, full, marks=pytest.mark.slow if name in SLOW else ())
    for name, full in DISKS
    if full is with_limit or name not in IN_RUST
]


@pytest.mark.parametrize(("name", "full"), DISKS)
def test_a_full_disk_loses_nothing(name, full, here):
    """Wherever it fills: the old file is whole, no half folder has a name, and nothing lies beside, hidden or not."""
    outcomes = []
    for i, n_bytes in enumerate(SIZES):
        there = here / str(i)
        there.mkdir()
        if name in OVER:
            OVER[name](there / "out", 1)
        before = files(there)
        write = (lambda out: OVER[name](out, 2)) if name in OVER else INTO[name]
        status = in_child(full(n_bytes, lambda there=there, write=write: write(there / "out")))
        assert status in (0, 1)
        outcomes.append(status)
        if status:
            assert files(there) == before
        assert_only(there, {"out"} if name in OVER or not status else set(), hidden=False)
    assert set(outcomes) == {0, 1}
    assert outcomes == sorted(outcomes, reverse=True)


@pytest.mark.parametrize("name", [*OVER, *SOME_SLOW])
def test_a_full_disk_of_its_own_loses_nothing(name, here):
    """A file system of a few pages, where also what is mapped, or copied by the kernel, has no room."""
    outcomes = set()
    for pages in (1, 2, 4, 6, 8, 11, 14, 17, 20, 28, 40):
        size = f"size={4096 * pages}"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(here)], capture_output=True).returncode:
            pytest.skip("mounting takes a privilege that this process does not have")
        try:
            if name in OVER and in_child(lambda: OVER[name](here / "out", 1)):
                assert_only(here, set(), hidden=False)
                continue
            before = files(here)
            status = in_child(lambda: OVER[name](here / "out", 2) if name in OVER else INTO[name](here / "out"))
            assert status in (0, 1)
            outcomes.add(status)
            if status:
                assert files(here) == before
            assert_only(here, {"out"} if name in OVER or not status else set(), hidden=False)
        finally:
            subprocess.run(["umount", str(here)], check=True)
    assert outcomes == {0, 1}


def test_a_saved_adapter_that_was_cut_is_refused(here):
    """PEFT writes the two files of `save_pretrained` in place: what a kill leaves of them is sound or an error."""
    folder = shutil.copytree(adapters()[0], here / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(model()), folder)
    outcomes = set()
    for moment in range(200):
        status = in_child(killed_at(moment, lambda: again.save_pretrained(folder)))
        try:
            PeftModel.from_pretrained(copy.deepcopy(model()), folder)
            outcomes.add("sound")
        except (ValueError, OSError) as error:
            outcomes.add(type(error).__name__)
        if status == 0:
            break
    assert "sound" in outcomes
