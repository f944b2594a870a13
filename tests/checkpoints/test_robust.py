"""Files of strangers: a clear error or the right answer, within the memory and the folder that are theirs."""

from __future__ import annotations

import copy
import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel

from peft_isolate import HalfFTConfig, Region
from peft_isolate.checkpoints.adapter import read_config
from peft_isolate.checkpoints.exact import FILE
from peft_isolate.checkpoints.merge import merge
from peft_isolate.checkpoints.shards import INDEX, Shards
from peft_isolate.errors import FormatError, IsolateError
from peft_isolate.regions import fingerprint
from peft_isolate.regions.selection import Selection
from tests.checkpoints import fuzz_folders
from tests.checkpoints.alterations import signed
from tests.checkpoints.fuzz_files import IN_FILES
from tests.checkpoints.fuzz_folders import IN_FOLDERS
from tests.checkpoints.fuzzing import COUNTS, IN_MEMORY, Target, bounded_memory

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = (*IN_MEMORY, *IN_FILES, *IN_FOLDERS)
NUMBER = st.integers(0, 2**32 - 1)
SCRIPTS = st.lists(st.tuples(NUMBER, NUMBER, NUMBER), min_size=1, max_size=4)
# Altered files, by what it takes to answer one.
FAST = {**dict.fromkeys(IN_MEMORY, 250), **dict.fromkeys(IN_FILES, 100), **dict.fromkeys(IN_FOLDERS, 100)}
SLOW = {**dict.fromkeys(IN_MEMORY, 5500), **dict.fromkeys(IN_FILES, 1500), **dict.fromkeys(IN_FOLDERS, 1000)}
WITH_ATHERIS = 52_000


def fuzz(target: Target, n_files: int, *, derandomize: bool) -> None:
    """Alter so many files; what hypothesis finds it makes small, and prints."""

    @settings(
        max_examples=n_files, deadline=None, database=None, derandomize=derandomize,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(SCRIPTS)
    def altered(script):
        target(script)

    target([])  # its sound file is answered, and made before the memory is bounded
    before = sum(COUNTS[target.name, answered] for answered in (True, False))
    with bounded_memory():
        altered()
    assert sum(COUNTS[target.name, answered] for answered in (True, False)) - before >= n_files


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_an_altered_file_is_an_error_or_the_right_answer(target):
    """Whatever decodes what a stranger may have made, in every `make test` the same files."""
    fuzz(target, FAST[target], derandomize=True)
    assert COUNTS[target.name, True] > 1
    assert COUNTS[target.name, False] > 1


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_many_altered_files(target):
    """Other files in every run."""
    fuzz(target, SLOW[target], derandomize=False)


@pytest.mark.slow
def test_many_altered_files_that_atheris_makes():
    """Mutated towards what no file had reached; in a process of its own, which a crash or a hang would end."""
    pytest.importorskip("atheris", reason="it is installed beside the environment, see the Makefile")
    script = Path(__file__).parent / "fuzz_atheris.py"
    run = subprocess.run(
        [sys.executable, str(script), "--runs", str(WITH_ATHERIS)], capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert f"{WITH_ATHERIS} altered files" in run.stdout
    assert sum(map(int, re.findall(r"(\d+) (?:answered|refused)", run.stdout))) == WITH_ATHERIS


def test_the_slow_tests_alter_a_hundred_thousand_files():
    """Each of them asserts its own number."""
    assert sum(SLOW.values()) + WITH_ATHERIS >= 100_000


def rewritten(path: Path, change: Callable[[dict], None]) -> bytes:
    """A safetensors file whose header was changed."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def exact_with(tmp_path: Path, change: Callable[[dict, dict], None], checked: bool = True) -> Path:
    """An exact difference whose (header, about) were changed, with right checksums."""

    def both(header):
        about = json.loads(header["__metadata__"]["about"])
        change(header, about)
        header["__metadata__"]["about"] = json.dumps(about)

    folder = tmp_path / "exact"
    folder.mkdir()
    data = rewritten(fuzz_folders.exact()[1] / FILE, both)
    (folder / FILE).write_bytes(signed(data) if checked else data)
    return folder


PATHS = ("../beside", "a/../../beside", "/tmp/beside", "..", "sub/../../beside", "C:\\beside", "..\\beside", "a\0b",
         ".ssh/config", "x" * 300, "model.safetensors", "./x", "a//b", "model.safetensors/x", "x.py", "")  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_from_a_file_never_leaves_the_output_folder(path, tmp_path):
    """Nor names what no file is called, or a file as a folder; the checksums are right, so the path alone decides."""

    def rename(header, about):
        about["files"][path] = about["files"].pop("sub/notes.txt")
        header[f"file/{path}"] = header.pop("file/sub/notes.txt")

    folder = exact_with(tmp_path, rename)
    with pytest.raises(FormatError, match=r"leaves the folder|no file has the path|is a file and the folder|carried"):
        merge(fuzz_folders.base(), folder, out=tmp_path / "out" / "result")
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True
    assert not (tmp_path / "beside").exists()
    assert not Path("/tmp/beside").exists()


@pytest.mark.parametrize("name", ["../beside.safetensors", "/tmp/beside.safetensors", "a/b.safetensors", "x" * 5000])
def test_a_shard_that_is_no_file_of_its_folder_is_refused(name, tmp_path):
    """In the index of a base, and among the headers of an exact difference."""
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match=r"no file of its folder|lacks"):
        Shards(tmp_path)

    def rename(header, about):
        about["headers"][name] = about["headers"].pop("model.safetensors")
        header[f"header/{name}"] = header.pop("header/model.safetensors")

    folder = exact_with(tmp_path, rename)
    with pytest.raises(FormatError, match=r"leaves the folder|no file has the path|no name of"):
        merge(fuzz_folders.base(), folder, out=tmp_path / "out")


def test_a_code_under_another_name_is_not_left_out(tmp_path):
    """A flipped letter in a tensor's name once gave the base's own tensor in silence."""

    def rename(header, about):
        name = next(name for name in header if name.startswith("code/"))
        header[name[:-1] + "s"] = header.pop(name)

    folder = exact_with(tmp_path, rename)
    with pytest.raises(FormatError, match="is for nothing in it"):
        merge(fuzz_folders.base(), folder, out=tmp_path / "out")


@pytest.mark.parametrize("kind", ["header/", "code/", "tensor/", "file/"])
def test_every_byte_of_an_exact_difference_is_checked(kind, tmp_path):
    """Also of tensors that it carries whole, which a flipped bit once made other numbers."""
    path = fuzz_folders.exact()[1] / FILE
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack_from("<Q", data)
    start, stop = next(v["data_offsets"] for k, v in json.loads(data[8 : 8 + size]).items() if k.startswith(kind))
    for at in range(start, stop, max(1, (stop - start) // 8)):
        altered = bytearray(data)
        altered[8 + size + at] ^= 1
        (tmp_path / FILE).write_bytes(altered)
        with pytest.raises(FormatError, match="checksum"):
            merge(fuzz_folders.base(), tmp_path, out=tmp_path / "out")


DEEP = "[" * 100_000


def test_what_is_nested_to_no_end_is_refused(tmp_path):
    """Python's parser gives up on it in a way of its own."""
    (tmp_path / INDEX).write_text(f'{{"weight_map": {DEEP}')
    with pytest.raises(FormatError, match="names no files"):
        Shards(tmp_path)
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "HALFFT", "resolved": {DEEP}')
    with pytest.raises(FormatError, match="makes no config"):
        read_config(tmp_path)
    Region({"a": Selection.whole((2,))}).save(tmp_path / "region")
    deep = rewritten(tmp_path / "region", lambda header: header["__metadata__"].update(selections=DEEP))
    (tmp_path / "region").write_bytes(deep)
    with pytest.raises(FormatError, match="not a readable region"):
        Region.load(tmp_path / "region")


def test_bombs_are_refused_by_what_they_claim(tmp_path):
    """What a few bytes claim is held against how few they are, before anything is taken from memory for it."""
    import base64

    def claim(header, about):
        about["files"]["config.json"] = {"bytes": 2**31, "sha256": ""}
        about["headers"]["model.safetensors"] = 10**8

    folder = exact_with(tmp_path, claim)
    text = base64.b85encode(zlib.compress(struct.pack("<BI", 1, 2**32 - 1) + bytes(2**26), 9)).decode()
    short = base64.b85encode(zlib.compress(struct.pack("<BI", 1, 2**32 - 1))).decode()
    with bounded_memory(2**26):
        with pytest.raises(FormatError, match=r"claims 100,000,000 bytes of a frame"):
            merge(fuzz_folders.base(), folder, out=tmp_path / "out")
        for bomb in (text, short):
            with pytest.raises(FormatError, match="fingerprint of its base is damaged"):
                fingerprint.compare(bomb, [])


@pytest.mark.parametrize(
    "field",
    [
        {"modules_to_save": 5}, {"modules_to_save": [5]}, {"modules_to_save": "score"}, {"target_modules": 5},
        {"exclude_modules": [[]]}, {"layers_to_transform": "x"}, {"layers_to_transform": 0.5},
        {"trainable_token_indices": 5}, {"trainable_token_indices": {"x": 5}}, {"target_parameters": [None]},
        {"base_model_name_or_path": 2**64 - 1}, {"revision": [1]}, {"peft_version": 5}, {"auto_mapping": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_of_other_types_is_refused_or_means_nothing(field, tmp_path):
    """In a config of a stranger, and of a user: PEFT checks none of them."""
    sound = fuzz_folders.adapters()[0]
    folder = shutil.copytree(sound, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    if field == {"auto_mapping": 5}:
        merge(fuzz_folders.base(), folder, out=tmp_path / "out")
        return
    with pytest.raises(IsolateError, match=next(iter(field))):
        merge(fuzz_folders.base(), folder, out=tmp_path / "out")
    with pytest.raises(IsolateError, match=next(iter(field))):
        PeftModel.from_pretrained(copy.deepcopy(fuzz_folders.model()), folder)
    with pytest.raises(IsolateError, match=next(iter(field))):
        HalfFTConfig(**field)
