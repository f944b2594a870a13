"""Checkpoints as files: what is read, copied and written is what lies there, to the byte; damage is refused."""

from __future__ import annotations

import json
import os
import struct
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peft_isolate.checkpoints import shards as module
from peft_isolate.checkpoints.shards import DTYPES, INDEX, SINGLE, Patch, Shards, Spool, TensorFile
from peft_isolate.errors import FormatError, IsolateError
from peft_isolate.regions.files import check_free, write_folder
from peft_isolate.regions.fingerprint import as_bytes
from tests.compare import assert_same

SHAPES = [(), (0,), (1,), (7,), (3, 0), (0, 3), (3, 5), (2, 3, 4)]


def random(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits; of bool 0 and 1."""
    n = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (n,), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def every_kind() -> dict[str, torch.Tensor]:
    """A tensor of every dtype and shape."""
    return {f"{text}.{i}": random(dtype, shape, i) for text, dtype in DTYPES.items() for i, shape in enumerate(SHAPES)}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(as_bytes(tensor))


def assert_reads(shards: Shards | TensorFile, wanted: dict[str, torch.Tensor]) -> None:
    read = shards.read if isinstance(shards, Shards) else shards.get_tensor
    for name, tensor in wanted.items():
        found = read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert raw(found) == raw(tensor), name


def test_every_dtype_and_shape_is_read_and_written(tmp_path):
    """0-d and empty ones too; what the spool writes, safetensors' own reader reads."""
    wanted = {"odd": random(torch.uint8, (3,))} | every_kind()
    save_file(wanted, tmp_path / SINGLE, metadata={"format": "pt", "mine": "kept"})
    shards = Shards(tmp_path)
    assert set(shards) == set(wanted)
    assert_reads(shards, wanted)
    assert shards.n_bytes == sum(len(raw(tensor)) for tensor in wanted.values())
    assert [entry.start for entry in shards.values()] == sorted(entry.start for entry in shards.values())
    spool = Spool(tmp_path / "spooled.safetensors")
    for name, tensor in wanted.items():
        spool.add(name, tensor)
    spool.close({"format": "pt"})
    there = load_file(tmp_path / "spooled.safetensors")
    assert {name: raw(tensor) for name, tensor in there.items()} == {n: raw(tensor) for n, tensor in wanted.items()}
    starts = TensorFile(tmp_path / "spooled.safetensors").entries.values()
    assert all(entry.start % DTYPES[entry.dtype].itemsize == 0 for entry in starts), "not aligned"
    assert {path.name for path in tmp_path.iterdir()} == {SINGLE, "spooled.safetensors"}


def test_a_file_that_is_not_aligned_is_read(tmp_path):
    """Older writers did not pad the header."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    text += b" " * (1 - len(text) % 2)
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<2f", 1.5, -2.5))
    assert len(text) % 4
    assert Shards(tmp_path).read("a").tolist() == [1.5, -2.5]


def test_a_file_is_mapped_anew_and_reads_the_same(tmp_path, monkeypatch):
    """However often it is let go of: tensors given out stay, and reading across files does too."""
    monkeypatch.setattr(module, "MAPPED", 10)
    wanted = {f"{i}": random(torch.float32, (5,), i) for i in range(8)}
    files = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(wanted)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in wanted.items() if files[name] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    shards = Shards(tmp_path)
    found = {name: shards.read(name) for name in wanted}
    assert_same(found, wanted)
    assert all(file._open is None for file in shards._of_file.values())


def test_one_file_is_mapped_at_a_time(tmp_path):
    """Reading another file lets go of the one before."""
    for i in range(2):
        save_file({f"{i}": torch.zeros(3)}, tmp_path / f"{i}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {f"{i}": f"{i}.safetensors" for i in range(2)}}))
    shards = Shards(tmp_path)
    for name in ("0", "1", "0"):
        shards.read(name)
        assert [file for file, of in shards._of_file.items() if of._open is not None] == [f"{name}.safetensors"]


def test_a_single_file_goes_before_an_index(tmp_path):
    """As in transformers; what is left of an older save does not go with the weights."""
    save_file({"a": torch.zeros(2)}, tmp_path / SINGLE)
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}))
    assert Shards(tmp_path).files == wins(tmp_path) == [SINGLE]
    assert Shards(tmp_path).others() == []
    (tmp_path / SINGLE).unlink()
    assert Shards(tmp_path).files == wins(tmp_path) == ["model-1.safetensors"]
    assert Shards(tmp_path).others() == [Path(INDEX)]


def wins(folder: Path) -> list[str]:
    """The files that transformers would load."""
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    found, _ = _get_resolved_checkpoint_files(
        str(folder), variant=None, gguf_file=None, use_safetensors=None, user_agent=None, is_remote_code=False,
        download_kwargs={},
    )  # fmt: skip
    return [Path(file).name for file in found]


def test_a_tensor_in_two_files_is_refused(tmp_path):
    """Which one counts, nobody knows."""
    for i in range(2):
        save_file({"a": torch.zeros(2), f"{i}": torch.zeros(1)}, tmp_path / f"{i}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "0.safetensors", "1": "1.safetensors"}}))
    with pytest.raises(IsolateError, match=r"'a' stands in '0.safetensors' and in '1.safetensors'"):
        Shards(tmp_path)


@pytest.mark.parametrize(
    "said", ["[" * 100_000, "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}', "\xff"]
)
def test_an_index_that_is_none_is_refused(said, tmp_path):
    """In one error of ours."""
    (tmp_path / INDEX).write_bytes(said.encode("latin-1"))
    with pytest.raises(FormatError, match="names"):
        Shards(tmp_path)


def test_no_checkpoint_is_said_so(tmp_path):
    """A missing folder, an empty one, one of pickles, a shard that is not there yet."""
    with pytest.raises(IsolateError, match="there is no folder"):
        Shards(tmp_path / "nowhere")
    with pytest.raises(IsolateError, match="it is no model's checkpoint"):
        Shards(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(IsolateError, match="a format that can run code"):
        Shards(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(FormatError, match="the download is incomplete"):
        Shards(tmp_path)


def header(**tensors: dict) -> bytes:
    text = json.dumps(
        {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | one for name, one in tensors.items()}
    )
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"{}" + b"left over",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        header(a={}),
        header(a={}) + b"1234567",
        header(a={}) + b"123456789",
        header(a={"shape": [3]}) + b"12345678",
        header(a={"shape": [2**62, 4]}) + b"12345678",
        header(a={"shape": [-2]}) + b"12345678",
        header(a={"dtype": "F4"}) + b"12345678",
        header(a={"data_offsets": [8, 16]}) + b"1234567812345678",
        header(a={}, b={}) + b"12345678",
        header(a={"data_offsets": [0, 2**63]}) + b"12345678",
    ],
)
def test_a_damaged_file_is_refused(data, tmp_path):
    """Cut short, longer, with gaps, shared bytes, or claims that no memory holds: before any is taken."""
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(FormatError):
        Shards(tmp_path)


def test_a_patch_changes_its_tensors_and_nothing_else(tmp_path):
    """The same header, the same order; in any order of writing; another dtype or shape is refused."""
    wanted = every_kind()
    source, out = tmp_path / SINGLE, tmp_path / "out.safetensors"
    save_file(wanted, source, metadata={"mine": "kept"})
    source.chmod(0o444)
    patch = Patch(source, out)
    new = {name: random(wanted[name].dtype, tuple(wanted[name].shape), 99) for name in list(wanted)[::-3]}
    for name, tensor in new.items():
        patch.write(name, tensor)
    with pytest.raises(IsolateError, match=r"'F32.6' is F32 \(3, 5\) in the file, and torch.float16 \(3, 5\)"):
        patch.write("F32.6", torch.zeros(3, 5).half())
    with pytest.raises(IsolateError, match=r"torch.float32 \(5, 3\)"):
        patch.write("F32.6", torch.zeros(5, 3))
    patch.write("F32.6", wanted["F32.6"].T.contiguous().T)
    patch.close()
    left, right = source.read_bytes(), out.read_bytes()
    (size,) = struct.unpack_from("<Q", left)
    assert left[: 8 + size] == right[: 8 + size]
    there = load_file(out)
    assert {name: raw(tensor) for name, tensor in there.items()} == {
        name: raw(new.get(name, tensor)) for name, tensor in wanted.items()
    } | {"F32.6": raw(wanted["F32.6"])}


def test_a_copy_is_as_private_as_the_users_files(tmp_path):
    """The umask rules over what is written, also where the source is open to all."""
    source = tmp_path / SINGLE
    save_file({"a": torch.zeros(2)}, source)
    source.chmod(0o666)
    before = os.umask(0o077)
    try:
        with write_folder(tmp_path / "out") as folder:
            Patch(source, folder / SINGLE).close()
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "out" / SINGLE).stat().st_mode & 0o777 == 0o600


def test_others_are_what_goes_with_the_weights(tmp_path):
    """Neither weights of any format, nor what is hidden, nor a card; through links to files, as in the Hub's cache."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("{}")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").symlink_to("../blobs/1")
    for name in ("tokenizer.json", "sub/x.jinja", ".git/config", ".hidden", "sub/.y", "README.md", "x.gguf", INDEX):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    save_file({"a": torch.zeros(1)}, folder / SINGLE)
    (folder / INDEX).unlink()
    assert [path.as_posix() for path in Shards(folder).others()] == ["config.json", "sub/x.jinja", "tokenizer.json"]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.sampled_from(SHAPES)), max_size=6), st.integers(0, 9))
def test_a_spool_is_as_safetensors_writes(tmp_path_factory, kinds, seed):
    """Any tensors in any order come back."""
    path = tmp_path_factory.mktemp("spool") / SINGLE
    wanted = {f"t{i}": random(DTYPES[dtype], shape, seed + i) for i, (dtype, shape) in enumerate(kinds)}
    spool = Spool(path)
    for name, tensor in wanted.items():
        spool.add(name, tensor)
    spool.close({})
    assert_reads(TensorFile(path), wanted)


class Stop(BaseException):
    """As KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
def test_an_interrupted_folder_leaves_nothing(error, tmp_path):
    """Neither it nor the hidden one; its parents are made."""

    def write() -> None:
        with write_folder(tmp_path / "a" / "out") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text("x")
            raise error

    with pytest.raises(error):
        write()
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize("there", ["file", "folder", "link to a folder", "dangling link"])
def test_what_is_there_is_not_overwritten(there, tmp_path):
    """Said before any work is done."""
    out = tmp_path / "out"
    if there == "file":
        out.write_text("mine")
    elif there == "folder":
        out.mkdir()
        (out / "x").write_text("mine")
    else:
        (tmp_path / "other").mkdir()
        out.symlink_to("other" if there == "link to a folder" else "nowhere")
    with pytest.raises(IsolateError, match="is there already, and nothing is overwritten"):
        check_free(out)
    entered = False
    with pytest.raises(IsolateError, match="is there already"), write_folder(out):
        entered = True
    assert not entered


def test_a_folder_that_cannot_be_is_refused_at_once(tmp_path):
    """Below a file, or no path at all: not after an hour of work."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(IsolateError, match=r"file/deep/out' cannot be made: '.*file' is a file; name another"):
        check_free(tmp_path / "file" / "deep" / "out")
    with pytest.raises(IsolateError, match="None is no path"):
        check_free(None)
    check_free(tmp_path / "new" / "out")


def test_an_empty_folder_is_filled(tmp_path):
    """As `mkdtemp` makes them."""
    (tmp_path / "out").mkdir()
    with write_folder(f"{tmp_path}/out/") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "out" / "x").read_text() == "x"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_of_two_writers_one_wins_and_one_is_told(tmp_path):
    """The folder is whole, of one of them; nothing of the other is left."""
    both, errors = threading.Barrier(2), []

    def write(text: str) -> None:
        try:
            with write_folder(tmp_path / "out") as folder:
                for i in range(5):
                    (folder / f"{i}").write_text(text)
                both.wait(30)
        except IsolateError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    assert "is there already" in str(errors[0])
    assert len({path.read_text() for path in (tmp_path / "out").iterdir()}) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
