"""The exact difference: base and it give the tuned checkpoint's files to the byte, and nothing leaves the folder."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_isolate.checkpoints import exact as module
from peft_isolate.checkpoints.exact import FILE, is_exact, write_exact
from peft_isolate.checkpoints.extract import extract
from peft_isolate.checkpoints.merge import merge
from peft_isolate.checkpoints.shards import DTYPES, SINGLE, Shards
from peft_isolate.errors import BaseMismatchError, FormatError, IsolateError
from peft_isolate.regions.frames import compress
from tests.checkpoints.folders import files, saved, tensors
from tests.models import CONFIGS, tiny

UP = "model.layers.1.mlp.up_proj.weight"


@torch.no_grad()
def tuned(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32, **config) -> Path:
    """The base of `saved` after a training: every second parameter moved, one of them nothing but a little."""
    shard = config.pop("max_shard_size", "5GB")
    model = tiny(architecture, dtype, **config)
    generator = torch.Generator().manual_seed(1)
    for i, parameter in enumerate(model.parameters()):
        if i % 2:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 10.0 ** -(i % 5))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def assert_comes_back(base: Path, tuned: Path, work: Path) -> None:
    """Every file of the tuned checkpoint, by its SHA-256; of the base nothing else."""
    wanted, before = files(tuned), files(base)
    result = extract(base, tuned, work / "exact", mode="exact")
    assert {path.name for path in (work / "exact").iterdir()} == {FILE, "README.md"}
    assert result.n_bytes == (work / "exact" / FILE).stat().st_size
    merged = merge(base, work / "exact", out=work / "out")
    assert files(work / "out") == wanted
    assert files(base) == before
    assert merged.n_bytes == result.tuned_bytes == Shards(tuned).n_bytes
    assert merged.scalars >= result.scalars - sum(
        torch.Size(Shards(tuned)[n].shape).numel() for n in result.carried if n in Shards(tuned)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_comes_back(architecture, dtype, tmp_path):
    """Whatever the disk calls its tensors, and however they are tied."""
    base = saved(tmp_path / "base", architecture, dtype)
    assert_comes_back(base, tuned(tmp_path / "tuned", architecture, dtype), tmp_path)


@pytest.mark.parametrize("sizes", [("5GB", "20KB"), ("20KB", "5GB"), ("20KB", "35KB"), ("20KB", "20KB")])
def test_sharded_otherwise(sizes, tmp_path):
    """The tuned checkpoint's own files and index come back, whatever the base's are."""
    base = saved(tmp_path / "base", max_shard_size=sizes[0])
    assert_comes_back(base, tuned(tmp_path / "tuned", max_shard_size=sizes[1]), tmp_path)


def written(folder: Path, tensors: dict[str, torch.Tensor], **others: str) -> Path:
    """A checkpoint of any tensors, and other files."""
    folder.mkdir()
    save_file(tensors, folder / SINGLE, metadata={"of": folder.name})
    for name, text in others.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_whatever_differs_is_carried(tmp_path):
    """New, missing, resized and cast tensors, integers, complex and float8 numbers, 0-d and empty ones, NaNs."""
    common = {
        "same": torch.randn(4, 4),
        "moved": torch.randn(5, 3).bfloat16(),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0, 0.0]),
        "cast": torch.randn(6),
        "resized": torch.randn(4, 2),
        "buffer": torch.arange(9),
        "flags": torch.tensor([True, False]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "float8": torch.randn(6).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "gone": torch.randn(3),
    }
    other = {name: tensor.clone() for name, tensor in common.items() if name != "gone"}
    other["moved"] += 0.5
    other["nan"] = torch.tensor([1.0, float("nan"), 0.0, -0.0])
    other["cast"] = other["cast"].half()
    other["resized"] = torch.cat([other["resized"], torch.ones(1, 2)])
    other["buffer"] = other["buffer"].flip(0)
    other["flags"] = ~other["flags"]
    other["complex"] *= 2
    other["float8"] = torch.zeros(6).to(torch.float8_e4m3fn)
    other["scalar"] = torch.tensor(2.5)
    other["new"] = torch.zeros(0)
    base = written(tmp_path / "base", common, config__json="{}", chat__jinja="x", gone__txt="x")
    theirs = written(tmp_path / "tuned", other, config__json='{"a": 1}', chat__jinja="x", new__txt="", UPPER="x" * 999)
    assert_comes_back(base, theirs, tmp_path)
    result = extract(base, theirs, tmp_path / "again", mode="exact")
    assert set(result.carried) == {"cast", "resized", "new"}
    assert result.scalars == 15 + 4 + 8 + 2 + 3 + 6 + 1
    assert result.tensors == 3 + 7
    assert result.total == sum(tensor.numel() for tensor in other.values())
    assert files(tmp_path / "again") == files(tmp_path / "exact"), "not reproducible"
    with safe_open(tmp_path / "again" / FILE, framework="pt") as file:
        kept = set(file.keys())
    codes = {f"code/{name}" for name in ("moved", "nan", "buffer", "flags", "complex", "float8", "scalar")}
    carried = {f"tensor/{name}" for name in result.carried}
    frames = {f"file/{name}" for name in ("config.json", "new.txt", "UPPER")}
    assert kept == codes | carried | frames | {f"header/{SINGLE}"}


def test_what_did_not_change_costs_nothing(tmp_path):
    """No byte of code, whatever its size; of equal checkpoints a header is left."""
    for size in (10, 10**6):
        of = {"same": torch.randn(size), "moved": torch.zeros(8)}
        base = written(tmp_path / f"base{size}", of)
        theirs = written(tmp_path / f"tuned{size}", of | {"moved": torch.ones(8)})
        extract(base, theirs, tmp_path / f"exact{size}", mode="exact")
    sizes = [(tmp_path / f"exact{size}" / FILE).stat().st_size for size in (10, 10**6)]
    assert abs(sizes[0] - sizes[1]) < 100
    result = extract(base, base, tmp_path / "equal", mode="exact")
    assert (result.tensors, result.scalars) == (0, 0)
    merge(base, tmp_path / "equal", out=tmp_path / "out")
    assert files(tmp_path / "out") == files(base)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["F32", "BF16", "F16", "F64", "I64", "U8", "BOOL"]),
            st.sampled_from([(), (0,), (5,), (3, 4)]),
            st.sampled_from(["same", "moved", "recast", "resized", "gone", "new"]),
            st.integers(0, 1),
            st.integers(0, 1),
        ),
        max_size=6,
    )
)
def test_any_two_checkpoints(tmp_path_factory, kinds):
    """Any tensors, in any two files on either side."""
    work = tmp_path_factory.mktemp("any")
    sides: dict[str, tuple[dict, dict]] = {"base": ({}, {}), "tuned": ({}, {})}
    for i, (dtype, shape, what, ours, theirs) in enumerate(kinds):
        one = torch.randint(0, 2, shape).to(DTYPES[dtype])
        other = {"moved": ~one.bool(), "recast": one.int(), "resized": torch.ones(7)}.get(what, one)
        if what != "new":
            sides["base"][ours][f"t{i}"] = one
        if what != "gone":
            sides["tuned"][theirs][f"t{i}"] = other.to(one.dtype) if what == "moved" else other
    for side, halves in sides.items():
        (work / side).mkdir()
        weight_map = {}
        for n, half in enumerate(halves):
            save_file(half, work / side / f"{n}.safetensors")
            weight_map |= dict.fromkeys(half, f"{n}.safetensors") | {f"none{n}": f"{n}.safetensors"}
        (work / side / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_comes_back(work / "base", work / "tuned", work)


def test_links_as_in_the_hubs_cache(tmp_path):
    """A snapshot's files are links into blobs: what is written are files."""
    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned")
    wanted = files(theirs)
    for folder in (base, theirs):
        blobs = folder.with_name(f"{folder.name}-blobs")
        blobs.mkdir()
        for i, path in enumerate(sorted(folder.iterdir())):
            path.rename(blobs / f"{i}")
            path.symlink_to(f"../{blobs.name}/{i}")
            (blobs / f"{i}").chmod(0o444)
    extract(base, theirs, tmp_path / "exact", mode="exact")
    merge(base, tmp_path / "exact", out=tmp_path / "out")
    assert files(tmp_path / "out") == wanted
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_programs_are_not_carried(tmp_path):
    """A new or changed one is left out, and said so; the base's own stays, and so does what depends on it."""
    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned")
    for folder in (base, theirs):
        (folder / "modeling_same.py").write_text("same")
        (folder / "modeling_x.py").write_text(folder.name)
    for name in ("new.py", "RUN.SH", "lib.so", "scaler.pkl", "sub/evil.bat", "C:x.txt", "a\\b.txt"):
        (theirs / name).parent.mkdir(exist_ok=True)
        (theirs / name).write_text("x")
    result = extract(base, theirs, tmp_path / "exact", mode="exact")
    assert set(result.left_out) == {
        "modeling_x.py", "new.py", "RUN.SH", "lib.so", "scaler.pkl", "sub/evil.bat", "C:x.txt", "a\\b.txt",
    }  # fmt: skip
    assert "left out, though different: " in str(result)
    merge(base, tmp_path / "exact", out=tmp_path / "out")
    wanted = {name: digest for name, digest in files(theirs).items() if name not in result.left_out}
    assert files(tmp_path / "out") == wanted
    assert "modeling_same.py" in wanted


@pytest.mark.parametrize(
    "change", ["a tensor", "where nothing changed", "where nothing changed, a little", "shape", "name"]
)
def test_another_base_is_refused(change, tmp_path):
    """By the fingerprint; by its shapes; or, where the tuning changed nothing and no sample tells, by the result."""
    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned")
    result = extract(base, theirs, tmp_path / "exact", mode="exact")
    model, changed = tensors(base), tensors(theirs)
    same = next(n for n in model if torch.equal(model[n], changed[n]) and model[n].ndim > 1)
    if change == "a tensor":
        model[UP] += 0.1
    elif change == "where nothing changed":
        model[same] += 0.1
    elif change == "where nothing changed, a little":
        model[same].view(-1)[rarely(base, theirs, model, same)] += 1
    elif change == "shape":
        model = {name: torch.cat([tensor, tensor]) for name, tensor in model.items()}
    else:
        model = {f"x.{name}": tensor for name, tensor in model.items()}
    save_file(model, base / SINGLE, metadata={"format": "pt"})
    named = r"'model.safetensors' comes out otherwise" if change.endswith("little") else r"'(model|lm_head)\."
    with pytest.raises(BaseMismatchError, match=named):
        merge(base, tmp_path / "exact", out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "exact"}
    assert result.tensors


def test_the_bases_other_files_are_checked_too(tmp_path):
    """Those that the tuning left alone are taken from it: changed since, or gone, they are not what they were."""
    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned")
    extract(base, theirs, tmp_path / "exact", mode="exact")
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    with pytest.raises(FormatError, match=r"'config.json' is not what it was: its SHA-256 is another"):
        merge(base, tmp_path / "exact", out=tmp_path / "out")
    (base / "config.json").unlink()
    with pytest.raises(FormatError, match=r"'config.json' shall be the base's, which does not have it"):
        merge(base, tmp_path / "exact", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rarely(base: Path, theirs: Path, model: dict, name: str) -> int:
    """A scalar that the fingerprint has no sample of."""
    from peft_isolate.regions.fingerprint import fingerprint

    before = fingerprint([(name, model[name])])
    for i in range(model[name].numel()):
        other = model[name].clone()
        other.view(-1)[i] += 1
        if fingerprint([(name, other)]) == before:
            return i
    raise AssertionError


@pytest.mark.parametrize("at", range(0, 100, 7))
def test_an_altered_byte_is_noticed(at, tmp_path):
    """Wherever it is; nothing is written."""
    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned")
    extract(base, theirs, tmp_path / "exact", mode="exact")
    path = tmp_path / "exact" / FILE
    data = bytearray(path.read_bytes())
    data[len(data) * at // 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError):
        merge(base, tmp_path / "exact", out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "exact"}


def rewritten(folder: Path, change) -> None:
    """A stranger's difference: `change(about, tensors)`, with checksums that are right."""
    path = folder / FILE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    found, about = load_file(path), json.loads(metadata["about"])
    change(about, found)
    about["checksums"] = {
        name: zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy()) for name, tensor in found.items()
    }
    said = json.dumps(about)
    save_file(found, path, metadata=metadata | {"about": said, "checksum": str(zlib.crc32(said.encode()))})


def uint8(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


EVIL = [
    "../evil", "/tmp/evil-of-peft-isolate", "a/../../evil", "a/..", "..", ".", "", "C:\\evil", "C:evil",
    "a\\..\\..\\evil", "\\\\host\\evil", "//evil", "./evil", "a//evil", "evil/", ".ssh/keys", "a/.git/hooks",
    "evil\0", "x" * 300,
    "a/" * 600 + "b", "modeling_evil.py", "sub/EVIL.PY", "evil.so", "run.sh", "evil.pkl", "pytorch_model.bin",
    "training_args.bin", "x.safetensors", "x.pt", "config.json/evil", "model.safetensors/evil", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("path", EVIL)
def test_a_strangers_path_is_refused(path, tmp_path):
    """Out of the folder, hidden in it, a program, other weights: refused before anything is written."""
    import hashlib

    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned")
    extract(base, theirs, tmp_path / "exact", mode="exact")

    def change(about, found) -> None:
        about["files"][path] = {"bytes": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
        found[f"file/{path}".encode("utf-8", "replace").decode()] = uint8(compress(b"evil"))

    rewritten(tmp_path / "exact", change)
    before = files(tmp_path)
    with pytest.raises(FormatError):
        merge(base, tmp_path / "exact", out=tmp_path / "out")
    assert files(tmp_path) == before
    assert not Path("/tmp/evil-of-peft-isolate").exists()


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/model.safetensors", "a/model.safetensors", "x.bin", ".safetensors"]
)
def test_a_strangers_weights_stay_in_the_folder(shard, tmp_path):
    """Their files are named as files of it."""
    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned")
    extract(base, theirs, tmp_path / "exact", mode="exact")

    def change(about, found) -> None:
        for of in ("headers", "digests"):
            about[of] = {shard: about[of].pop(SINGLE)}
        found[f"header/{shard}"] = found.pop(f"header/{SINGLE}")

    rewritten(tmp_path / "exact", change)
    with pytest.raises(FormatError):
        merge(base, tmp_path / "exact", out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "exact"}


def said_otherwise(case: str, about: dict, found: dict[str, torch.Tensor]) -> None:
    head = f"header/{SINGLE}"
    text = {"x": {"dtype": "F32", "shape": [2**31], "data_offsets": [0, 2**33]}}
    if case == "a tensor of 8 GiB that nobody has":
        data = json.dumps(text).encode()
        found[head], about["headers"][SINGLE] = uint8(compress(data)), len(data)
        for name in list(found):
            if name[:4] in ("code", "tens"):
                del found[name]
    elif case == "a carried tensor that is larger in the header":
        name = next(name for name in found if name.startswith("tensor/"))
        found[name] = found[name][:1].clone()
    elif case == "a header of 100 MB in few bytes":
        found[head], about["headers"][SINGLE] = uint8(compress(b" " * 100_000_000)), 100_000_000
    elif case == "a header larger than it says":
        found[head] = uint8(compress(b" " * 50_000_000))
    elif case == "a header of more than any":
        about["headers"][SINGLE] = 2**40
    elif case == "a file of 64 MiB in few bytes":
        data = compress(b"\0" * 2**26)
        about["files"]["config.json"]["bytes"], found["file/config.json"] = 2**26, uint8(data)
    elif case == "a file that claims more than it is":
        about["files"]["config.json"]["bytes"] = 2**50
    elif case == "a code that is none":
        found[f"code/{UP}"] = uint8(b"grid/1" + b"\1" * 30)
    elif case == "a code of another dtype":
        found[f"code/{UP}"] = torch.ones(3)
    elif case == "no digest":
        about["digests"] = {}
    elif case == "digests of others":
        about["digests"]["x.safetensors"] = "0"
    elif case == "a tensor for nothing":
        found["code/nothing"] = torch.zeros(2)
    elif case == "no header":
        del found[head]
    elif case == "deep":
        about["files"] = json.loads("[" * 900 + "]" * 900)
    else:
        about[case.partition(" ")[0]] = None


@pytest.mark.parametrize(
    "case",
    [
        "a tensor of 8 GiB that nobody has",
        "a carried tensor that is larger in the header",
        "a header of 100 MB in few bytes",
        "a header larger than it says",
        "a header of more than any",
        "a file of 64 MiB in few bytes",
        "a file that claims more than it is",
        "a code that is none",
        "a code of another dtype",
        "no digest",
        "digests of others",
        "a tensor for nothing",
        "no header",
        "deep",
        "base is nothing",
        "headers is nothing",
        "files is nothing",
    ],
)
def test_a_strangers_claims_are_checked(case, tmp_path, monkeypatch):
    """In little memory, whatever is claimed; no folder is left."""
    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned", vocab_size=66)
    extract(base, theirs, tmp_path / "exact", mode="exact")
    rewritten(tmp_path / "exact", lambda about, found: said_otherwise(case, about, found))
    largest = []
    decompress = module.decompress
    monkeypatch.setattr(module, "decompress", lambda frame, size: largest.append(size) or decompress(frame, size))
    with pytest.raises((FormatError, BaseMismatchError)):
        merge(base, tmp_path / "exact", out=tmp_path / "out")
    assert max(largest, default=0) <= 2**20
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "exact"}


def test_it_stands_alone(tmp_path):
    """No other adapter, no scale; it is told apart by its file, also in a repository's copy."""
    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned")
    extract(base, theirs, tmp_path / "exact", mode="exact")
    assert is_exact(tmp_path / "exact")
    assert not is_exact(base)
    with pytest.raises(IsolateError, match="goes with no other adapter and no scale"):
        merge(base, tmp_path / "exact", tmp_path / "exact", out=tmp_path / "out")
    with pytest.raises(IsolateError, match="goes with no other adapter and no scale"):
        merge(base, tmp_path / "exact", out=tmp_path / "out", scale=0.5)
    merge(base, tmp_path / "exact", out=tmp_path / "out", scale=[1])


def test_from_the_hub(tmp_path, monkeypatch):
    """Base, tuned and difference may all be repositories."""
    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned")
    extract(base, theirs, tmp_path / "exact", mode="exact")
    here = {"some/base": base, "some/tuned": theirs, "some/exact": tmp_path / "exact"}
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: asked.append(name) or str(here[name]))
    extract("some/base", "some/tuned", tmp_path / "again", mode="exact")
    merge("some/base", "some/exact", out=tmp_path / "out")
    assert files(tmp_path / "out") == files(theirs)
    assert set(asked) == here.keys()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["extract", "merge"])
def test_interrupted(when, error, tmp_path, monkeypatch):
    """Nothing is left of what was begun."""
    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned")
    extract(base, theirs, tmp_path / "exact", mode="exact")
    calls = []

    def fails(*args):
        calls.append(args)
        if len(calls) == 5:
            raise error
        return real(*args)

    name = "encode" if when == "extract" else "decode"
    real = getattr(module.grid, name)
    monkeypatch.setattr(module.grid, name, fails)
    with pytest.raises(error):
        _ = (
            extract(base, theirs, tmp_path / "out", mode="exact")
            if when == "extract"
            else merge(base, tmp_path / "exact", out=tmp_path / "out")
        )
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "exact"}


def test_relative_paths_and_trailing_slashes(tmp_path, monkeypatch):
    """Folders however they are written; out inside the base too."""
    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned")
    wanted = files(theirs)
    monkeypatch.chdir(tmp_path)
    extract("base/", "./tuned/", "exact/", mode="exact")
    merge("./base/", "exact/", out="base/out/")
    assert files(base / "out") == wanted
    with pytest.raises(IsolateError, match="is there already"):
        merge("base", "exact", out="base")


def test_what_it_found(tmp_path):
    """Names of what is gone, too, for those who ask."""
    of = {"a": torch.zeros(3), "b": torch.zeros(3), "c": torch.zeros(2)}
    base = written(tmp_path / "base", of)
    theirs = written(tmp_path / "tuned", {"a": torch.tensor([0.0, 1.0, -0.0]), "c": torch.zeros(3)})
    (tmp_path / "out").mkdir()
    found = write_exact(Shards(base), Shards(theirs), "base", tmp_path / "out")
    assert (found.changed, found.carried, found.gone, found.n_changed) == (["a"], ["c"], ["b"], 2)
    shutil.rmtree(tmp_path / "out")
    with safe_open(base / SINGLE, framework="pt") as file:
        assert file.metadata() == {"of": "base"}
    assert struct.unpack("<Q", (base / SINGLE).read_bytes()[:8])[0] > 0
