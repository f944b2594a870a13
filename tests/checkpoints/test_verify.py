"""`verify`: a sound adapter passes, and whatever is wrong in one way is named."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_isolate import HalfFTConfig, next_round
from peft_isolate.checkpoints.compress import compress
from peft_isolate.checkpoints.exact import FILE, write_exact
from peft_isolate.checkpoints.merge import merge
from peft_isolate.checkpoints.shards import Shards
from peft_isolate.checkpoints.verify import CHUNK, first_difference, verify
from peft_isolate.errors import BaseMismatchError, FormatError, IsolateError, RegionError
from peft_isolate.regions.fingerprint import fingerprint
from tests.checkpoints.folders import files, load, saved, tensors, trained, with_tokens
from tests.compare import bits
from tests.given import GivenConfig
from tests.learn import filled

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take", "ignore:Could not find a config file")

ARCHITECTURES = ("llama", "mixtral", "qwen3_moe", "gpt_neox", "gemma2")
WEIGHTS = "adapter_model.safetensors"
MODEL = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@functools.cache
def made(root: Path, architecture: str, kind: str) -> tuple[Path, Path, Path]:
    folder = root / f"{architecture}-{kind}"
    base = saved(folder / "base", architecture, torch.bfloat16)
    adapter = trained(base, GivenConfig(kind=kind), folder / "adapter", architecture)
    merge(base, adapter, out=folder / "merged")
    return base, adapter, folder / "merged"


@pytest.fixture
def sound(tmp_path_factory, tmp_path):
    """(base, adapter, merged) of an architecture and a kind of selection, to be altered."""
    root = tmp_path_factory.getbasetemp() / "sound"

    def copied(architecture: str = "llama", kind: str = "elements") -> tuple[Path, Path, Path]:
        found = [tmp_path / folder.name for folder in made(root, architecture, kind)]
        for folder, to in zip(made(root, architecture, kind), found, strict=True):
            shutil.copytree(folder, to)
        return found[0], found[1], found[2]

    return copied


def rewritten(file: Path, change) -> None:
    """A safetensors file, after `change` was made to the dict of its tensors."""
    found = load_file(file)
    change(found)
    save_file(found, file, metadata={"format": "pt"})


def flipped(tensor: torch.Tensor, at: int) -> torch.Tensor:
    """With another lowest bit in one scalar."""
    changed = bits(tensor)
    changed.view(-1)[at] ^= 1
    return changed.view(tensor.dtype)


@pytest.mark.parametrize("kind", ["elements", "all_but", "rows", "columns", "whole"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_sound_passes(architecture, kind, sound):
    """Adapter and merged checkpoint, also where the disk has other names and shapes; nothing is written."""
    base, adapter, merged = sound(architecture, kind)
    before = files(base), files(adapter), files(merged)
    found = verify(base, adapter, merged)
    assert [check.name for check in found.checks] == [
        "base",
        "file",
        "numbers",
        "indices",
        "unaltered",
        "outside",
        "inside",
    ]
    assert str(found).splitlines() == [f"{name}: {what}" for name, what in found.checks]
    assert verify(base, adapter).checks == found.checks[:5]
    assert (files(base), files(adapter), files(merged)) == before


@pytest.mark.parametrize("kind", ["elements", "all_but", "columns"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_the_counts_are_those_of_the_region(architecture, kind, sound):
    """What is reported was counted: scalars of the region inside, all others of the checkpoint outside."""
    base, adapter, merged = sound(architecture, kind)
    region = load_region(adapter)
    total = sum(tensor.numel() for tensor in tensors(base).values())
    found = {check.name: check.found for check in verify(base, adapter, merged).checks}
    assert found["base"].startswith(f"{len(list(load(base, architecture).parameters()))} of ")
    assert found["numbers"].startswith(f"{region:,} of the deltas, finite")
    assert found["inside"].startswith(f"{region:,} scalars of ")
    assert found["outside"].startswith(f"{total - region:,} scalars of ")


def load_region(adapter: Path) -> int:
    """Scalars of an adapter's region, by its config."""
    from peft import PeftConfig

    resolved = PeftConfig.from_pretrained(adapter).recorded()
    return sum(place.count for places in resolved[:2] for place in places.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_bit_of_the_merged_checkpoint_is_enough(architecture, sound):
    """The lowest bit of a scalar, in every fourth tensor of the disk: where the adapter acts and where it does not."""
    base, adapter, merged = sound(architecture)
    originals, of_base = tensors(merged), tensors(base)
    in_memory = load(base, architecture).state_dict()
    seen = set()
    for name in [*list(originals)[::4], list(originals)[-1]]:
        tensor = originals[name]
        differs = bits(tensor).view(-1) != bits(of_base[name]).view(-1)
        for at in {tensor.numel() - 1, *differs.nonzero().view(-1)[:1].tolist()}:
            save_file({**originals, name: flipped(tensor, at)}, merged / MODEL, metadata={"format": "pt"})
            with pytest.raises((RegionError, IsolateError), match="at flat position") as caught:
                verify(base, adapter, merged)
            inside = not isinstance(caught.value, RegionError)
            assert inside or not differs[at]
            seen.add(inside)
            if name in in_memory:
                assert f"{name!r} of {str(merged)!r} has " in str(caught.value)
                assert f"at flat position {at:,}, where" in str(caught.value)
    assert seen == {True, False}


def test_minus_zero_is_not_zero(tmp_path):
    """By their bits they differ, and the message shows both."""
    base = saved(tmp_path / "base")
    rewritten(base / MODEL, lambda found: found["model.norm.weight"].zero_())
    adapter = trained(base, GivenConfig(kind="rows"), tmp_path / "adapter")
    merge(base, adapter, out=tmp_path / "merged")
    verify(base, adapter, tmp_path / "merged")
    rewritten(tmp_path / "merged" / MODEL, lambda found: found["model.norm.weight"][5:].fill_(-0.0))
    wanted = r"'model.norm.weight' .* has -0\.0 \(0x80000000\) at flat position 5, .* 0\.0 \(0x00000000\)"
    with pytest.raises(RegionError, match=wanted):
        verify(base, adapter, tmp_path / "merged")


def altered_merged(case: str, merged: Path) -> None:
    def change(found):
        if case == "missing":
            del found["model.norm.weight"]
        elif case == "extra":
            found["model.rotary.inv_freq"] = torch.zeros(4)
        elif case == "dtype":
            found["model.norm.weight"] = found["model.norm.weight"].float()
        elif case == "another adapter":
            found[UP] = found[UP] + 1
        elif case == "NaN":
            found[UP].fill_(float("nan"))

    rewritten(merged / MODEL, change)
    if case == "shape":
        said = json.loads((merged / "config.json").read_text())
        said["vocab_size"] = 65
        (merged / "config.json").write_text(json.dumps(said))
        rewritten(
            merged / MODEL,
            lambda found: found.update(
                {name: torch.zeros(65, 32) for name, t in found.items() if t.shape == (64, 32)}
            ),
        )


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("missing", IsolateError, "lacks 'model.norm.weight'"),
        ("extra", IsolateError, "has 'model.rotary.inv_freq', which it should not"),
        (
            "dtype",
            IsolateError,
            r"'model.norm.weight' .* is torch.float32 \(32,\) and should be torch.bfloat16 \(32,\)",
        ),
        ("shape", IsolateError, r"\(65, 32\) and should be torch.bfloat16 \(64, 32\)"),
        ("another adapter", RegionError, f"'{UP}' .* outside the adapter's region the base has"),
        ("NaN", RegionError, r"has nan \(0x7fc0\)"),
    ],
)
def test_another_merged_checkpoint_is_named(case, error, message, sound):
    """Names, dtypes, shapes and numbers are those of the base with the adapter."""
    base, adapter, merged = sound()
    altered_merged(case, merged)
    with pytest.raises(error, match=message):
        verify(base, adapter, merged)


def test_a_buffer_is_compared_like_any_tensor(sound):
    """What is no parameter must be the base's too."""
    base, adapter, merged = sound()
    for folder in (base, merged):
        rewritten(folder / MODEL, lambda found: found.update({"model.rotary.inv_freq": torch.arange(4.0)}))
    verify(base, adapter, merged)
    rewritten(merged / MODEL, lambda found: found["model.rotary.inv_freq"].add_(1e-6))
    with pytest.raises(RegionError, match=r"'model.rotary.inv_freq' .* at flat position 0,"):
        verify(base, adapter, merged)


def test_what_transformers_saved_passes_in_any_shards(sound):
    """By the names in memory: the model that was merged there, in other files than the base's."""
    base, adapter, _ = sound("mixtral")
    from peft import PeftModel

    in_memory = PeftModel.from_pretrained(load(base, "mixtral"), adapter).merge_and_unload()
    in_memory.save_pretrained(base.parent / "other", max_shard_size="20KB")
    assert len(Shards(base.parent / "other").files) > 1
    verify(base, adapter, base.parent / "other")


def test_what_was_trained_beside_the_region(tmp_path):
    """Modules that are saved whole and rows of new tokens are part of the adapter; the other rows are the base's."""
    base = saved(tmp_path / "base", tie_word_embeddings=True)
    with_tokens(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", out=tmp_path / "merged")
    found = {check.name: check.found for check in verify(base, tmp_path / "adapter", tmp_path / "merged").checks}
    assert "1 tensors trained beside it" in found["file"]
    assert "and 64 beside them" in found["numbers"]
    name = "model.embed_tokens.weight"
    for row, error in ((4, RegionError), (5, IsolateError)):
        save_file(
            tensors(tmp_path / "merged") | {name: flipped(tensors(tmp_path / "merged")[name], row * 32)},
            shutil.copytree(tmp_path / "merged", tmp_path / f"row{row}") / MODEL,
            metadata={"format": "pt"},
        )
        with pytest.raises(error, match=f"'{name}' .* at flat position {row * 32},") as caught:
            verify(base, tmp_path / "adapter", tmp_path / f"row{row}")
        assert type(caught.value) is error


def test_a_module_saved_whole_is_inside(tmp_path):
    """All of it is what the adapter carries, and none of it the base's."""
    base = saved(tmp_path / "base")
    with_tokens(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    merge(base, tmp_path / "adapter", out=tmp_path / "merged")
    found = {check.name: check.found for check in verify(base, tmp_path / "adapter", tmp_path / "merged").checks}
    assert "and 2,112 beside them" in found["numbers"]
    rewritten(tmp_path / "merged" / MODEL, lambda found: found["lm_head.weight"][0].zero_())
    with pytest.raises(IsolateError, match=r"'lm_head.weight' .* merging the adapter gives") as caught:
        verify(base, tmp_path / "adapter", tmp_path / "merged")
    assert type(caught.value) is IsolateError


def test_what_is_wrong_outside_is_said_first(sound):
    """Wherever it stands: a last tensor that is not the base's, though all before it are unmerged."""
    base, adapter, _ = sound()
    other = Path(shutil.copytree(base, base.parent / "other"))
    rewritten(other / MODEL, lambda found: found.update({"lm_head.weight": flipped(found["lm_head.weight"], 0)}))
    with pytest.raises(RegionError, match=r"'lm_head.weight' .* at flat position 0,"):
        verify(base, adapter, other)
    with pytest.raises(IsolateError, match="merging the adapter gives"):
        verify(base, adapter, base)


@pytest.mark.parametrize("rows", [[3, 64], [3, -1], [3, 3], [3, 5, 6], [3, True]])
def test_rows_that_cannot_be_are_refused(rows, tmp_path):
    """The config's row numbers, and how many of them the file has numbers for."""
    base = saved(tmp_path / "base")
    with_tokens(base, tmp_path / "adapter")
    verify(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(path.read_text())
    said["trainable_token_indices"] = rows
    path.write_text(json.dumps(said))
    with pytest.raises(FormatError, match=r"rows .* was altered"):
        verify(base, tmp_path / "adapter")


@pytest.mark.parametrize("bad", ["NaN", "integers", "one that nobody named"])
def test_rows_of_other_numbers_are_refused(bad, tmp_path):
    """NaN, and what the config does not know."""
    base = saved(tmp_path / "base")
    with_tokens(base, tmp_path / "adapter")

    def change(found):
        key = next(key for key in found if key.endswith("trainable_tokens_delta"))
        if bad == "NaN":
            found[key][1, 4] = float("nan")
        elif bad == "integers":
            found[key] = found[key].int()
        else:
            found[key.replace("embed_tokens", "lm_head")] = found[key].clone()

    rewritten(tmp_path / "adapter" / WEIGHTS, change)
    with pytest.raises(FormatError, match=r"trained rows of|which its config does not name"):
        verify(base, tmp_path / "adapter")


def test_what_is_held_counts_and_may_not_be_trained_as_well(tmp_path):
    """Two rounds pass; positions that stand in both of one adapter's selections do not."""
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    model = filled(get_peft_model(load(base), HalfFTConfig(granularity="model")))
    next_round(model)
    filled(model, seed=3).save_pretrained(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", out=tmp_path / "merged")
    verify(base, tmp_path / "adapter", tmp_path / "merged")
    path = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(path.read_text())
    name = next(name for name in said["resolved"]["region"] if name not in said["resolved"]["held"])
    said["resolved"]["held"][name] = said["resolved"]["region"][name]
    path.write_text(json.dumps(said))

    def change(found):
        module, _, parameter = name.rpartition(".")
        key = f"base_model.model.{module}.halfft_{parameter}"
        found[f"{key}.held"] = found[f"{key}.delta"].clone()

    rewritten(tmp_path / "adapter" / WEIGHTS, change)
    with pytest.raises(FormatError, match=f"'{name}' .* trained and in what it held"):
        verify(base, tmp_path / "adapter")


def altered_adapter(case: str, base: Path, adapter: Path) -> None:
    said = json.loads((adapter / "adapter_config.json").read_text())

    def change(found):
        deltas = sorted(key for key in found if key.endswith(".delta"))
        codes = sorted(key for key in found if key.endswith("_codes"))
        if case in ("NaN", "infinity"):
            found[deltas[4]][-1] = float("nan" if case == "NaN" else "inf")
        elif case == "cut codes":
            found[codes[2]] = found[codes[2]][:-1].clone()
        elif case == "empty codes":
            found[codes[2]] = torch.zeros_like(found[codes[2]])
        elif case == "codes out of range":
            found[codes[2]] = torch.full_like(found[codes[2]], 255)
        elif case == "missing":
            del found[deltas[4]]
        elif case == "missing delta":
            for key in [key for key in found if key.startswith(deltas[4].removesuffix("delta"))]:
                del found[key]
        elif case == "extra":
            found["base_model.model.lm_head.given_weight.delta"] = torch.zeros(4)
        elif case == "base weight":
            found["base_model.model.model.norm.weight"] = torch.ones(32)

    rewritten(adapter / WEIGHTS, change)
    if case == "no samples":
        said["resolved"]["base"] = fingerprint([("another", torch.ones(3))])
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    if case == "other base":
        rewritten(base / MODEL, lambda found: found["model.norm.weight"].add_(1))
    elif case == "LoRA":
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("NaN", FormatError, r"^'model\.layers\.0\.[a-z_.]*weight' of .*NaN or infinity"),
        ("infinity", FormatError, "NaN or infinity"),
        ("cut codes", FormatError, "by its config"),
        ("empty codes", FormatError, "nothing but zeros"),
        ("codes out of range", FormatError, "model.layers"),
        ("missing", FormatError, "lacks|is only in the config"),
        ("missing delta", FormatError, "is only in the config"),
        ("extra", FormatError, "is only in the file"),
        ("base weight", FormatError, "a weight of the base, which it would overwrite"),
        ("no samples", BaseMismatchError, "of the 30 tensors .* the adapter's fingerprint has none"),
        ("other base", BaseMismatchError, "another base than the adapter's: 'model.norm.weight'"),
        ("LoRA", IsolateError, "an adapter of LoraConfig"),
    ],
)
def test_what_is_wrong_with_an_adapter_is_named(case, error, message, sound):
    """One thing at a time, and nothing is written."""
    base, adapter, _ = sound()
    altered_adapter(case, base, adapter)
    before = files(base.parent)
    with pytest.raises(error, match=message):
        verify(base, adapter)
    assert files(base.parent) == before


def test_without_a_fingerprint_it_says_so(sound, monkeypatch):
    """It cannot be compared: not an error, and no claim. Nor where the check is switched off."""
    base, adapter, _ = sound()
    rewritten(base / MODEL, lambda found: found["model.norm.weight"].add_(1))
    monkeypatch.setenv("PEFT_ISOLATE_SKIP_BASE_CHECK", "1")
    with pytest.warns(UserWarning, match="it was skipped"):
        assert verify(base, adapter).checks[0].found.startswith("not compared")
    monkeypatch.delenv("PEFT_ISOLATE_SKIP_BASE_CHECK")
    path = adapter / "adapter_config.json"
    said = json.loads(path.read_text())
    said["resolved"]["base"] = None
    path.write_text(json.dumps(said))
    assert verify(base, adapter).checks[0].found.startswith("not compared")


@pytest.mark.parametrize("values", ["bf16", "int8", "exact"])
def test_every_byte_of_a_packed_delta_counts(values, sound):
    """Any one of them altered: its checksum tells, and the tensor is named."""
    base, adapter, _ = sound()
    compress(adapter, adapter.parent / "packed", values=values)
    packed = adapter.parent / "packed"
    merge(base, packed, out=packed.parent / "merged-packed")
    found = {check.name: check.found for check in verify(base, packed, packed.parent / "merged-packed").checks}
    assert found["unaltered"].endswith("packed deltas have their CRC-32")
    originals = load_file(packed / WEIGHTS)
    key = sorted(originals)[3]
    for at in range(0, originals[key].numel(), 97):
        changed = originals[key].clone()
        changed[at] ^= 1 << (at % 8)
        save_file(originals | {key: changed}, packed / WEIGHTS)
        with pytest.raises(FormatError, match=r"'model\.layers.*: .*packed delta"):
            verify(base, packed)


@pytest.fixture
def exact(tmp_path):
    """(base, exact difference, tuned): a changed tensor, a new one, one of another shape, a changed file."""
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    rewritten(base / MODEL, lambda found: found["model.layers.0.input_layernorm.weight"].fill_(float("inf")))
    (base / "tokenizer.json").write_text("{}")
    tuned = Path(shutil.copytree(base, tmp_path / "tuned"))
    (tuned / "tokenizer.json").write_text('{"tuned": 1}')

    def change(found):
        found[UP].mul_(1.01)
        found["model.norm.weight"][3] = float("inf")
        found["model.embed_tokens.weight"] = torch.ones(65, 32)
        found["new.weight"] = torch.ones(2)
        del found["lm_head.weight"]

    rewritten(tuned / MODEL, change)
    (tmp_path / "exact").mkdir()
    write_exact(Shards(base), Shards(tuned), "base", tmp_path / "exact")
    return base, tmp_path / "exact", tuned


def test_an_exact_difference_passes(exact):
    """It says what it is, counts what is infinite, and compares the tuned checkpoint bit for bit."""
    base, difference, tuned = exact
    found = {check.name: check.found for check in verify(base, difference, tuned).checks}
    assert list(found) == ["base", "file", "numbers", "unaltered", "merged"]
    assert found["file"] == "30 tensors, of which 2 as codes and 2 whole, and nothing else"
    assert "the 4 tensors that are not the base's all but 1, 'model.norm.weight' the first" in found["numbers"]
    assert found["merged"].startswith("30 tensors")
    merge(base, difference, out=base.parent / "again")
    verify(base, difference, base.parent / "again")


def test_every_tensor_of_the_tuned_checkpoint_counts(exact):
    """One bit of any of them, a file beside it, a tensor more or less."""
    base, difference, tuned = exact
    originals = tensors(tuned)
    for name, tensor in originals.items():
        save_file({**originals, name: flipped(tensor, tensor.numel() - 1)}, tuned / MODEL)
        with pytest.raises(IsolateError, match=f"'{name}' .* at flat position {tensor.numel() - 1:,}, .* difference"):
            verify(base, difference, tuned)
    save_file({**originals, "more": torch.ones(1)}, tuned / MODEL)
    with pytest.raises(IsolateError, match="has 'more', which it should not"):
        verify(base, difference, tuned)
    save_file({name: tensor for name, tensor in originals.items() if name != UP}, tuned / MODEL)
    with pytest.raises(IsolateError, match=f"lacks '{UP}'"):
        verify(base, difference, tuned)
    save_file(originals | {UP: originals[UP].float()}, tuned / MODEL)
    with pytest.raises(IsolateError, match=f"'{UP}' .* is torch.float32"):
        verify(base, difference, tuned)
    save_file(originals, tuned / MODEL)
    (tuned / "tokenizer.json").write_text("{}")
    with pytest.raises(IsolateError, match=r"'tokenizer.json' of .* is not what the difference gives"):
        verify(base, difference, tuned)


@pytest.mark.parametrize("key", [f"code/{UP}", "tensor/new.weight", "file/tokenizer.json", f"header/{MODEL}"])
def test_every_kind_of_content_of_an_exact_difference_counts(key, exact):
    """One bit of each, and its checksum tells."""
    base, difference, _ = exact
    about, found = opened(difference)
    found[key] = flipped(found[key], found[key].numel() // 2)
    save_file(found, difference / FILE, metadata=about)
    with pytest.raises(FormatError, match=f"'{key}' of an exact difference has another checksum"):
        verify(base, difference)


def opened(difference: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """(metadata, tensors) of an exact difference's file."""
    with safe_open(difference / FILE, framework="pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def signed(difference: Path, about: dict, found: dict[str, torch.Tensor]) -> None:
    """Write it with all its checksums right, as who alters one with intent does."""
    about["checksums"] = {key: zlib.crc32(tensor.view(torch.uint8).numpy().data) for key, tensor in found.items()}
    text = json.dumps(about)
    said = {"format": "peft_isolate.exact/1", "about": text, "checksum": str(zlib.crc32(text.encode()))}
    save_file(found, difference / FILE, metadata=said)


@pytest.mark.parametrize("case", ["code", "file", "both", "twice"])
def test_an_exact_difference_that_contradicts_itself_is_refused(case, exact):
    """Its own checksums may be right, yet a tensor is there twice, or its content is none."""
    base, difference, _ = exact
    metadata, found = opened(difference)
    about = json.loads(metadata["about"])
    if case == "code":
        found[f"code/{UP}"] = flipped(found[f"code/{UP}"], found[f"code/{UP}"].numel() // 2)
        message = f"'{UP}': "
    elif case == "file":
        about["files"]["tokenizer.json"]["sha256"] = "0" * 64
        message = r"'tokenizer.json' is not what it was: its SHA-256"
    elif case == "both":
        found[f"tensor/{UP}"] = torch.zeros_like(tensors(base)[UP])
        message = f"'{UP}' both as a code and whole"
    else:
        found["header/more.safetensors"] = found[f"header/{MODEL}"].clone()
        for part in ("headers", "digests"):
            about[part]["more.safetensors"] = about[part][MODEL]
        message = f"stands in '{MODEL}' and in 'more.safetensors'"
    signed(difference, about, found)
    with pytest.raises(FormatError, match=message):
        verify(base, difference)


def test_the_base_of_an_exact_difference_is_the_one(exact):
    """Another one, and one that lacks a tensor which did not change, or has it in another dtype."""
    base, difference, _ = exact
    whole = (base / MODEL).read_bytes()
    rewritten(base / MODEL, lambda found: found[UP].add_(1))
    with pytest.raises(BaseMismatchError, match=f"another base than the adapter's: '{UP}'"):
        verify(base, difference)
    untouched = "model.layers.0.mlp.up_proj.weight"
    for change, message in (
        (lambda found: found.pop(untouched), f"'{untouched}' shall be the base's, .* no such tensor"),
        (lambda found: found.update({untouched: found[untouched].float()}), f"'{untouched}' shall be .*F32"),
        (lambda found: found.update({untouched: between_samples(untouched, found[untouched])}), "comes out otherwise"),
    ):
        (base / MODEL).write_bytes(whole)
        rewritten(base / MODEL, change)
        with pytest.raises(BaseMismatchError, match=message):
            verify(base, difference)


def between_samples(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """With another bit in a scalar at which no fingerprint looks."""
    recorded = fingerprint([(name, tensor)])
    return next(
        changed
        for changed in (flipped(tensor, at) for at in range(tensor.numel()))
        if fingerprint([(name, changed)]) == recorded
    )


def test_a_base_that_differs_between_the_samples(sound):
    """The adapter alone cannot tell; the merged checkpoint does, since there every bit is compared."""
    base, adapter, merged = sound()
    rewritten(base / MODEL, lambda found: found.update({UP: between_samples(UP, found[UP])}))
    verify(base, adapter)
    with pytest.raises((RegionError, IsolateError), match=f"'{UP}' .* at flat position"):
        verify(base, adapter, merged)


def test_merging_is_not_believed(sound, monkeypatch):
    """Outside the region the base itself is compared: a merge that writes there would not be excused by itself."""
    merging = importlib.import_module("peft_isolate.checkpoints.merge")
    base, adapter, _ = sound(kind="columns")
    right = merging.compose_in_place

    def wrong(w0, parts, scales, **kwargs):
        before = w0.clone()
        right(w0, parts, scales, **kwargs)
        untouched = (bits(before) == bits(w0)).nonzero()[-1]
        w0[tuple(untouched)] += 1

    monkeypatch.setattr(merging, "compose_in_place", wrong)
    merge(base, adapter, out=base.parent / "wrong")
    with pytest.raises(RegionError, match="outside the adapter's region the base has"):
        verify(base, adapter, base.parent / "wrong")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.float64, torch.complex64])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_first_difference_is_the_first(dtype, data):
    """As the obvious comparison of all bits finds it, among those that are compared."""
    n = data.draw(st.integers(1, 60))
    left = (torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(n)) > 0).to(dtype)
    right = left.clone()
    changed = data.draw(st.lists(st.integers(0, n - 1), max_size=4))
    for at in changed:
        right[at] = 1 - right[at] if dtype != torch.bool else ~right[at]
    among = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    different = [at for at in range(n) if left[at] != right[at]]
    assert first_difference(left, right) == min(different, default=None)
    assert first_difference(left, right, among) == min((at for at in different if among[at]), default=None)


def test_the_first_difference_beyond_a_chunk():
    """Positions count from the tensor's beginning, not from a chunk's."""
    left = torch.zeros(2, CHUNK, dtype=torch.uint8)
    right = copy.deepcopy(left)
    right[1, 7] = right[1, 9] = 1
    assert first_difference(left, right) == CHUNK + 7
    where = torch.ones_like(left, dtype=torch.bool)
    where[1, 7] = False
    assert first_difference(left, right, where) == CHUNK + 9
