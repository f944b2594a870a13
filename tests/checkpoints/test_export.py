"""`export`: what changed, as any program can read it, gives the merged checkpoint, bit for bit."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_isolate import HalfFTConfig
from peft_isolate.checkpoints.compress import compress
from peft_isolate.checkpoints.exact import write_exact
from peft_isolate.checkpoints.export import export
from peft_isolate.checkpoints.merge import merge
from peft_isolate.checkpoints.shards import Shards
from peft_isolate.errors import BaseMismatchError, FormatError, IsolateError
from tests.checkpoints.folders import files, load, saved, tensors, trained, with_tokens
from tests.compare import assert_same, bits
from tests.given import GivenConfig

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take", "ignore:Could not find a config file")

# The package has a function of this name.
module = importlib.import_module("peft_isolate.checkpoints.export")
ARCHITECTURES = ("llama", "mixtral", "qwen3_moe", "gpt_neox", "gemma2", "gpt2")
KINDS = ("rows", "columns", "elements", "all_but", "whole")
UP = "model.layers.1.mlp.up_proj.weight"
# The module's own snippet, as a reader copies it.
SNIPPET = textwrap.dedent(re.search(r"( +with safe_open.*?)\n\n", module.__doc__, re.DOTALL).group(1))


def applied(base: Path, exported: Path) -> dict[str, torch.Tensor]:
    """The base's tensors, after the snippet ran on each file."""
    state_dict = {name: tensor.contiguous() for name, tensor in tensors(base).items()}
    for file in sorted(exported.glob("*.safetensors")):
        exec(
            SNIPPET.replace('"indexed.safetensors"', "str(path)"),
            {"safe_open": safe_open, "json": json, "state_dict": state_dict, "path": file},
        )
    return state_dict


def overlaid(base: Path, exported: Path) -> dict[str, torch.Tensor]:
    """The base's tensors, those replaced that were exported."""
    changed = tensors(exported)
    assert changed.keys() <= tensors(base).keys()
    return tensors(base) | changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_formats_give_the_merged_checkpoint(architecture, dtype, tmp_path):
    """Under the names and in the shapes of the disk, wherever the memory has others; tied tensors once."""
    base = saved(tmp_path / "base", architecture, dtype)
    adapter = trained(base, GivenConfig(kind="elements"), tmp_path / "adapter", architecture)
    merge(base, adapter, out=tmp_path / "merged")
    before = files(base), files(adapter)
    whole = export(base, adapter, tmp_path / "whole")
    indexed = export(base, adapter, tmp_path / "indexed", format="indexed")
    assert (files(base), files(adapter)) == before
    wanted = tensors(tmp_path / "merged")
    assert_same(overlaid(base, tmp_path / "whole"), wanted)
    assert_same(applied(base, tmp_path / "indexed"), wanted)
    assert whole[2:4] == indexed[2:4]
    assert list(files(tmp_path / "whole")) == ["model.safetensors"]
    assert list(files(tmp_path / "indexed")) == ["indexed.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_only_what_differs_in_a_bit_is_written(architecture, kind, tmp_path, monkeypatch):
    """Every kind of selection: as many tensors and scalars as a comparison of the two checkpoints finds, no others."""
    monkeypatch.setattr(module, "CHUNK", 100)
    base = saved(tmp_path / "base", architecture, torch.bfloat16)
    adapter = trained(base, GivenConfig(kind=kind, share=0.01), tmp_path / "adapter", architecture)
    merge(base, adapter, out=tmp_path / "merged")
    of_base, of_merged = tensors(base), tensors(tmp_path / "merged")
    differs = {name: bits(of_base[name]).view(-1) != bits(of_merged[name]).view(-1) for name in of_base}
    changed = {name: where.nonzero().view(-1) for name, where in differs.items() if where.any()}
    whole = export(base, adapter, tmp_path / "whole")
    indexed = export(base, adapter, tmp_path / "indexed", "indexed")
    assert tensors(tmp_path / "whole").keys() == changed.keys()
    assert whole.tensors == indexed.tensors == len(changed)
    assert whole.scalars == indexed.scalars == sum(map(len, changed.values()))
    found = tensors(tmp_path / "indexed")
    assert found.keys() == {f"{name}.{part}" for name in changed for part in ("indices", "values")}
    for name, where in changed.items():
        assert found[f"{name}.indices"].dtype == torch.int32
        assert torch.equal(found[f"{name}.indices"].long(), where)
        assert torch.equal(bits(found[f"{name}.values"]), bits(of_merged[name].view(-1)[where]))
    for result in (whole, indexed):
        stored = tensors(result.folder).values()
        assert result.n_bytes == sum(tensor.nbytes for tensor in stored)
        assert str(result).startswith(f"exported {result.scalars:,} changed scalars of {len(changed)} tensors as ")


def test_the_metadata_are_as_stated(tmp_path):
    """transformers' word for a state dict; name, shape and dtype of each tensor for indices."""
    base = saved(tmp_path / "base", "mixtral", torch.bfloat16)
    adapter = trained(base, GivenConfig(kind="elements"), tmp_path / "adapter", "mixtral")
    export(base, adapter, tmp_path / "whole")
    with safe_open(tmp_path / "whole" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    export(base, adapter, tmp_path / "indexed", format="indexed")
    with safe_open(tmp_path / "indexed" / "indexed.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "peft_isolate.indexed/1"
    of_base = tensors(base)
    assert json.loads(metadata["tensors"]) == {
        name: {"shape": list(of_base[name].shape), "dtype": "bfloat16"} for name in names
    }


@pytest.mark.parametrize("format", ["state-dict", "indexed"])
def test_large_exports_are_several_files(format, tmp_path):
    """Each below the bound, indices and values together, named and indexed as transformers does it."""
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    adapter = trained(base, HalfFTConfig(), tmp_path / "adapter")
    merge(base, adapter, out=tmp_path / "merged")
    result = export(base, adapter, tmp_path / "out", format, largest_file=12_000)
    stem = {"state-dict": "model", "indexed": "indexed"}[format]
    parts = sorted((tmp_path / "out").glob("*.safetensors"))
    n = len(parts)
    assert n > 2
    assert [part.name for part in parts] == [f"{stem}-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    index = json.loads((tmp_path / "out" / f"{stem}.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": result.n_bytes}
    assert index["weight_map"] == {key: part.name for part in parts for key in load_file(part)}
    assert len(files(tmp_path / "out")) == n + 1
    for part in parts:
        held = load_file(part)
        assert sum(tensor.nbytes for tensor in held.values()) <= 12_000 or len(held) <= 2
    give = overlaid if format == "state-dict" else applied
    assert_same(give(base, tmp_path / "out"), tensors(tmp_path / "merged"))
    each = export(base, adapter, tmp_path / "each", format, largest_file=1)
    assert len(list((tmp_path / "each").glob("*.safetensors"))) == each.tensors, "an empty file, or two in one"


def test_transformers_loads_what_was_overlaid(tmp_path):
    """A loader of the base's own format takes a state dict as it is."""
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    adapter = trained(base, HalfFTConfig(), tmp_path / "adapter")
    merge(base, adapter, out=tmp_path / "merged")
    export(base, adapter, tmp_path / "out")
    model = load(base)
    found = model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)
    assert not found.unexpected_keys
    assert_same(dict(model.named_parameters()), dict(load(tmp_path / "merged").named_parameters()))


@pytest.mark.parametrize("format", ["state-dict", "indexed"])
def test_minus_zero_that_becomes_zero_has_changed(format, tmp_path):
    """Nothing but these: a delta of zeros changes no other number."""
    base = saved(tmp_path / "base")
    found = tensors(base)
    found[UP][0] = -0.0
    save_file(found, base / "model.safetensors", metadata={"format": "pt"})
    model = get_peft_model(load(base), GivenConfig(kind="rows", share=1.0, target_modules=["up_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", out=tmp_path / "merged")
    result = export(base, tmp_path / "adapter", tmp_path / "out", format)
    assert (result.tensors, result.scalars) == (1, 32)
    give = overlaid if format == "state-dict" else applied
    assert_same(give(base, tmp_path / "out"), tensors(tmp_path / "merged"))


@pytest.mark.parametrize("scale", [0, 0.5, -2])
def test_a_scale_is_that_of_merging(scale, tmp_path):
    """0 changes nothing, and gives files without tensors that can be read."""
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    adapter = trained(base, HalfFTConfig(), tmp_path / "adapter")
    merge(base, adapter, out=tmp_path / "merged", scale=scale)
    for format, give in (("state-dict", overlaid), ("indexed", applied)):
        result = export(base, adapter, tmp_path / format, format, scale)
        assert (result.scalars == 0) == (scale == 0)
        assert_same(give(base, tmp_path / format), tensors(tmp_path / "merged"))


def test_what_merges_is_exported(tmp_path):
    """Modules saved whole, rows of new tokens, packed deltas."""
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    with_tokens(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    compress(tmp_path / "adapter", tmp_path / "packed", values="int8")
    for adapter in (tmp_path / "adapter", tmp_path / "packed"):
        merge(base, adapter, out=tmp_path / f"{adapter.name}-merged")
        wanted = tensors(tmp_path / f"{adapter.name}-merged")
        for format, give in (("state-dict", overlaid), ("indexed", applied)):
            export(base, adapter, tmp_path / f"{adapter.name}-{format}", format)
            found = give(base, tmp_path / f"{adapter.name}-{format}")
            assert_same(found, wanted)
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            assert not torch.equal(wanted[name], tensors(base)[name])


@pytest.fixture
def tuned(tmp_path):
    """A base, and a checkpoint tuned from it: two tensors changed in bf16."""
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    shutil.copytree(base, tmp_path / "tuned")
    found = tensors(base)
    found[UP].mul_(1.01)
    found["model.norm.weight"][3] = -0.0
    save_file(found, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    return base, tmp_path / "tuned"


def difference(base: Path, tuned: Path) -> Path:
    folder = base.parent / "exact"
    folder.mkdir()
    write_exact(Shards(base), Shards(tuned), "base", folder)
    return folder


def test_an_exact_difference_is_exported(tuned):
    """Without its coding: the tuned checkpoint's own numbers."""
    base, other = tuned
    exact = difference(base, other)
    for format, give in (("state-dict", overlaid), ("indexed", applied)):
        result = export(base, exact, base.parent / format, format)
        assert result.tensors == 2
        assert_same(give(base, base.parent / format), tensors(other))
    found = tensors(base)
    found["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(found, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' has"):
        export(base, exact, base.parent / "out")
    with pytest.raises(IsolateError, match=r"scale=0\.5: an exact difference gives back one checkpoint"):
        export(base, exact, base.parent / "out", scale=0.5)


def test_what_an_exact_difference_carries_whole_has_no_indices(tuned):
    """A grown vocabulary is in a state dict; indices into the base's tensor cannot say it."""
    base, other = tuned
    found = tensors(other) | {"model.embed_tokens.weight": torch.ones(65, 32, dtype=torch.bfloat16)}
    save_file(found, other / "model.safetensors", metadata={"format": "pt"})
    exact = difference(base, other)
    assert export(base, exact, base.parent / "whole").scalars == 65 * 32 + export_scalars(base, other)
    assert_same(overlaid(base, base.parent / "whole"), tensors(other))
    wanted = r"'model.embed_tokens.weight' has shape \(65, 32\), the base has \(64, 32\)"
    with pytest.raises(IsolateError, match=wanted):
        export(base, exact, base.parent / "out", format="indexed")
    assert not (base.parent / "out").exists()


def export_scalars(base: Path, tuned: Path) -> int:
    """Scalars that differ, of the tensors that have one shape in both."""
    pairs = [(left, tensors(tuned)[name]) for name, left in tensors(base).items()]
    return sum(int((bits(left) != bits(right)).sum()) for left, right in pairs if left.shape == right.shape)


def test_what_is_wrong_is_refused_and_nothing_is_written(tmp_path):
    """Before anything is made: names, numbers, folders, bases."""
    base = saved(tmp_path / "base")
    adapter = trained(base, HalfFTConfig(), tmp_path / "adapter")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    other = Path(shutil.copytree(base, tmp_path / "other"))
    found = tensors(base)
    found["model.norm.weight"] += 1
    save_file(found, other / "model.safetensors", metadata={"format": "pt"})
    broken = Path(shutil.copytree(adapter, tmp_path / "broken"))
    deltas = load_file(adapter / "adapter_model.safetensors")
    next(iter(deltas.values())).view(-1)[0] = float("nan")
    save_file(deltas, broken / "adapter_model.safetensors")
    before = files(tmp_path)
    for error, message, arguments in (
        (IsolateError, "format='gguf' is unknown: take one of", (base, adapter, "out", "gguf")),
        (IsolateError, "scale=nan: give one finite number", (base, adapter, "out", "indexed", float("nan"))),
        (IsolateError, "scale='1': give one finite number", (base, adapter, "out", "indexed", "1")),
        (IsolateError, "is there already, and nothing is overwritten", (base, adapter, "there")),
        (BaseMismatchError, "'model.norm.weight' has", (other, adapter, "out")),
        (FormatError, "NaN or infinity", (base, broken, "out")),
        (IsolateError, "there is no folder", (base, "./nowhere", "out")),
    ):
        with pytest.raises(error, match=message):
            export(arguments[0], arguments[1], tmp_path / arguments[2], *arguments[3:])
        assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "there", "other", "broken"}


def test_rows_that_cannot_be_are_refused(tmp_path):
    """A stranger's config may name rows that the embedding does not have."""
    base = saved(tmp_path / "base")
    with_tokens(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": [3, 99]}))
    with pytest.raises(FormatError, match=r"rows \[3, 99\]"):
        export(base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_indices_of_a_huge_tensor_are_of_64_bits():
    """From 2^31 scalars on; below, of 32."""
    for n, dtype in ((2**31, torch.int64), (2**31 - 1, torch.int32)):
        before, after = (torch.from_numpy(np.zeros(n, np.int8)) for _ in range(2))
        after[n - 1] = 1
        indices, values = module._indexed(before, after, 1)
        assert indices.dtype == dtype
        assert (indices.tolist(), values.tolist()) == ([n - 1], [1])


MEASURE = """
import sys, threading, time
import tests.given
from peft_isolate.checkpoints import shards
from peft_isolate.checkpoints.export import export
from peft_isolate.checkpoints.verify import verify
shards.MAPPED = 2**22  # what may be mapped at once, small against this model
calls = {
    "state-dict": lambda folder: export(f"{folder}/base", f"{folder}/adapter", f"{folder}/whole"),
    "indexed": lambda folder: export(f"{folder}/base", f"{folder}/adapter", f"{folder}/indexed", "indexed"),
    "verify": lambda folder: verify(f"{folder}/base", f"{folder}/adapter", f"{folder}/merged"),
}
def held():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
def watch():
    while not done.is_set():
        seen.append(held())
        time.sleep(0.002)
for name, run in calls.items():
    run(sys.argv[1])
    done, seen, start = threading.Event(), [], held()
    thread = threading.Thread(target=watch)
    thread.start()
    run(sys.argv[2])
    done.set()
    thread.join()
    print(name, max(seen) - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's own count of a process's memory")
def test_memory_goes_by_the_largest_tensor(tmp_path):
    """Not by the model, nor by what changed of it: some copies of a tensor, and what composing takes at a time."""
    for name, layers, width in (("small", 1, 64), ("large", 20, 512)):
        shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
        base = saved(tmp_path / name / "base", dtype=torch.bfloat16, **shape)
        config = GivenConfig(kind="rows", share=0.5, target_modules=["up_proj", "down_proj"])
        trained(base, config, tmp_path / name / "adapter")
        merge(base, tmp_path / name / "adapter", out=tmp_path / name / "merged")
    # Freed memory goes back at once, so that what is measured is what is held.
    environment = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    peaks = {name: int(n_bytes) for name, n_bytes in map(str.split, result.stdout.splitlines())}
    assert peaks.keys() == {"state-dict", "indexed", "verify"}
    assert max(peaks.values()) < 0.6 * Shards(tmp_path / "large" / "whole").n_bytes
