"""`extract` as an adapter: what changed, and nothing else; of all that changed what moved most."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import save_file

from peft_isolate.checkpoints.extract import difference, extract, tightest
from peft_isolate.checkpoints.merge import merge
from peft_isolate.checkpoints.shards import SINGLE
from peft_isolate.deltas.adapters import parameter_deltas
from peft_isolate.errors import IsolateError, RegionError
from peft_isolate.regions import Region, base_parameters, roles
from peft_isolate.regions.selection import Selection
from tests.checkpoints.folders import load, saved, tensors
from tests.checkpoints.tunings import NESTED, UP, assert_merges, everything, in_memory, of_layers, region_of, tuned
from tests.compare import bits
from tests.learn import learn
from tests.models import CONFIGS

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take", "ignore:Could not find a config file")

# ---------------------------------------------------------------------------------------------------- what changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name not in NESTED])
def test_all_that_changed_of_every_architecture(architecture, dtype, tmp_path):
    """Merged, it is the tuned checkpoint but for the scalars that are counted, one unit in the last place off."""
    base = saved(tmp_path / "base", architecture, dtype)
    theirs = tuned(tmp_path / "tuned", everything, architecture, dtype)
    result = extract(base, theirs, tmp_path / "adapter", include_embeddings=False)
    assert_merges(base, tmp_path / "adapter", tmp_path / "out", architecture)
    found, wanted, before = (in_memory(tmp_path / name, architecture) for name in ("out", "tuned", "base"))
    embeddings = {
        r.parameter for r in roles(load(base, architecture)) if r.name in ("embedding", "head") and r.layer is None
    }
    unequal = 0
    for name in wanted:
        if name in embeddings or name in result.left_out:
            assert torch.equal(found[name], before[name]), name
            continue
        differ = bits(found[name]) != bits(wanted[name])
        unequal += int(differ.sum())
        assert not (bits(found[name]).long() - bits(wanted[name]).long()).abs().gt(1).any(), name
    assert result.unequal == unequal
    assert set(result.left_out) >= embeddings & set(before)
    assert result.tuned_bytes == sum(tensor.nbytes for tensor in tensors(theirs).values())
    assert result.n_bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size


def test_what_a_delta_cannot_say_is_counted(tmp_path):
    """Numbers far smaller than the base's: W0 + Δ is off by what fp32 cannot hold beside W0, and that is said."""

    def change(parameters) -> None:
        parameters[UP].copy_(torch.randn(parameters[UP].shape) * 1e-6)

    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned", change)
    result = extract(base, theirs, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", out=tmp_path / "out")
    before, wanted, found = (tensors(tmp_path / name)[UP] for name in ("base", "tuned", "out"))
    assert 0 < result.unequal == int((bits(found) != bits(wanted)).sum())
    assert f"merged, {result.unequal:,} of them are not the tuned model's number" in str(result)
    assert not ((found - wanted).abs() > torch.finfo(torch.float32).eps * before.abs()).any()


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt_neox"])
def test_a_partial_training_made_elsewhere(architecture, tmp_path):
    """Frozen layers cost nothing: the region is the parameters that learned, whole."""
    base = saved(tmp_path / "base", architecture)
    model = load(base, architecture)
    learned = {name: p for name, p in base_parameters(model).items() if ".layers.1." in name and "norm" not in name}
    for parameter in learned.values():
        parameter.requires_grad_(True)
    learn(model).save_pretrained(tmp_path / "tuned")
    result = extract(base, tmp_path / "tuned", tmp_path / "adapter")
    region = region_of(base, tmp_path / "adapter", architecture)
    assert region == Region({name: Selection.whole(tuple(p.shape)) for name, p in learned.items()})
    assert (result.tensors, result.scalars) == (len(learned), region.count)
    assert result.total == sum(p.numel() for p in base_parameters(model).values())
    assert_merges(base, tmp_path / "adapter", tmp_path / "out", architecture)


def test_each_tensor_by_what_describes_it_best(tmp_path):
    """Rows of new tokens, columns, scattered elements, everything; in one adapter."""

    def change(parameters) -> None:
        parameters["model.embed_tokens.weight"][[3, 17, 18]] += 0.1
        parameters["model.layers.0.mlp.up_proj.weight"][:, [0, 5, 6]] += 0.1
        parameters["model.layers.0.mlp.down_proj.weight"].view(-1)[[0, 9, 777, 1535]] += 0.1
        parameters["model.layers.2.self_attn.q_proj.weight"] += 0.1
        parameters["model.norm.weight"][[3, 4]] += 0.1

    base = saved(tmp_path / "base")
    result = extract(base, tuned(tmp_path / "tuned", change), tmp_path / "adapter")
    assert region_of(base, tmp_path / "adapter") == Region(
        {
            "model.embed_tokens.weight": Selection.rows((64, 32), [3, 17, 18]),
            "model.layers.0.mlp.up_proj.weight": Selection.columns((48, 32), [0, 5, 6]),
            "model.layers.0.mlp.down_proj.weight": Selection.elements((32, 48), [0, 9, 777, 1535]),
            "model.layers.2.self_attn.q_proj.weight": Selection.whole((32, 32)),
            "model.norm.weight": Selection.columns((32,), [3, 4]),
        }
    )
    assert result.scalars == 3 * 32 + 3 * 48 + 4 + 32 * 32 + 2
    assert_merges(base, tmp_path / "adapter", tmp_path / "out")


@settings(deadline=None)
@given(
    st.sampled_from([(), (7,), (1, 9), (9, 1), (6, 8), (2, 3, 4), (0,), (3, 0), (0, 3)]),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_the_tightest_selection_covers_all_that_changed(shape, share, seed):
    """And is no larger than everything, all its rows, or all its columns; nothing where nothing changed."""
    changed = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    found = tightest(changed)
    assert found.shape == shape
    positions = set(found.positions().tolist()) if found.count else set()
    assert set(changed.reshape(-1).nonzero().flatten().tolist()) <= positions
    if not changed.any():
        assert found.count == 0
        return
    matrix = changed.reshape(1, -1) if changed.ndim < 2 else changed.reshape(-1, shape[-1])
    rows, columns = int(matrix.any(1).sum()) * matrix.shape[1], int(matrix.any(0).sum()) * matrix.shape[0]
    assert found.count <= min(rows, columns, changed.numel())
    if found.kind == "elements":
        assert found.count == int(changed.sum()) < 0.5 * min(rows, columns)


def test_a_tuning_saved_in_a_wider_dtype(tmp_path):
    """Over a bf16 base, Δ is fp32; merged it is what rounding the tuned numbers gives, but for those counted."""
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    wide = {name: tensor.float() + torch.randn_like(tensor.float()) * 1e-3 for name, tensor in tensors(base).items()}
    theirs = saved(tmp_path / "tuned", dtype=torch.float32)
    save_file(wide, theirs / SINGLE, metadata={"format": "pt"})
    result = extract(base, theirs, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", out=tmp_path / "out")
    merged = tensors(tmp_path / "out")
    unequal = sum(int((merged[name] != tensor.bfloat16()).sum()) for name, tensor in wide.items())
    assert result.unequal == unequal < 0.01 * result.scalars
    assert all(tensor.dtype == torch.bfloat16 for tensor in merged.values())


@pytest.mark.parametrize(
    "dtypes", [(torch.float64, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_the_difference_is_taken_wide(dtypes, monkeypatch):
    """In fp32, in float64 where one of them is; piece by piece as at once; neither is written to."""
    monkeypatch.setattr(sys.modules[extract.__module__], "PIECE", 5)
    base, theirs = torch.randn(4, 7).to(dtypes[0]), torch.randn(7, 4).to(dtypes[1]).T
    kept = base.clone(), theirs.clone()
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    found = difference(base, theirs)
    assert found.dtype == wide
    assert torch.equal(found, theirs.to(wide) - base.to(wide))
    assert torch.equal(base, kept[0])
    assert torch.equal(theirs, kept[1])


# ---------------------------------------------------------------------------------------------- what moved most


def slow_top(base: Path, theirs: Path, architecture: str, percent: str, embeddings: bool) -> tuple[dict, int, int]:
    """{parameter: flat positions} of the largest |Δ|, by a stable sort of all of them at once."""
    before, after, model = in_memory(base, architecture), in_memory(theirs, architecture), load(base, architecture)
    out = {r.parameter for r in roles(model) if r.layer is None and r.name in ("embedding", "head")}
    names = [name for name in before if embeddings or name not in out]
    delta = torch.cat([(after[name].float() - before[name].float()).abs().reshape(-1) for name in names])
    count = math.floor(delta.numel() * int(float(percent) * 1000) / 100_000)
    chosen = torch.zeros(delta.numel(), dtype=torch.bool)
    chosen[delta.argsort(descending=True, stable=True)[:count]] = True
    parts = chosen.split([before[name].numel() for name in names])
    where = {name: part.nonzero().flatten().tolist() for name, part in zip(names, parts, strict=True)}
    return {name: positions for name, positions in where.items() if positions}, count, delta.numel()


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "qwen3_moe", "gpt_neox", "gpt2", "t5", "gemma3"])
@pytest.mark.parametrize(("percent", "embeddings"), [("1", False), ("0.7", False), ("25", False), ("5", True)])
def test_the_top_is_that_of_a_sort_of_everything(architecture, percent, embeddings, tmp_path):
    """Over all tensors together, in the model's order, ties by position (bf16 has many); exactly floor(p·D/100)."""
    config = {"tie_word_embeddings": False} if architecture == "gemma3" else {}
    if embeddings and architecture in ("t5", "gpt2"):
        pytest.skip("tied")
    base = saved(tmp_path / "base", architecture, torch.bfloat16, **config)
    theirs = tuned(tmp_path / "tuned", everything, architecture, torch.bfloat16, max_shard_size="20KB", **config)
    wanted, count, total = slow_top(base, theirs, architecture, percent, embeddings)
    result = extract(
        base, theirs, tmp_path / "adapter", mode="top", percent=float(percent), include_embeddings=embeddings or None
    )
    region = region_of(base, tmp_path / "adapter", architecture)
    assert {name: selection.positions().tolist() for name, selection in region.items()} == wanted
    assert (result.scalars, result.total, result.tensors) == (count, total, len(wanted))
    before, after = in_memory(base, architecture), in_memory(theirs, architecture)
    of = {name: (after[name].double() - before[name].double()).reshape(-1) for name in before}
    kept = sum(float(of[name][positions].square().sum()) for name, positions in wanted.items())
    names = [name for name in before if name not in result.left_out]
    assert result.kept == pytest.approx(kept / sum(float(of[name].square().sum()) for name in names), rel=1e-6)
    assert bool(result.left_out) != embeddings
    assert "of ‖Δ‖² is kept" in str(result)
    assert_merges(base, tmp_path / "adapter", tmp_path / "out", architecture)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_it_can_be_trained_on(architecture, tmp_path):
    """As any adapter: its numbers move, nothing outside does."""
    base = saved(tmp_path / "base", architecture)
    extract(base, tuned(tmp_path / "tuned", of_layers, architecture), tmp_path / "adapter", mode="top", percent=10)
    model = PeftModel.from_pretrained(load(base, architecture), tmp_path / "adapter", is_trainable=True)
    before = {name: delta.dense() for name, delta in parameter_deltas(model, "default").items()}
    learn(model)
    after = parameter_deltas(model, "default")
    assert any(not torch.equal(after[name].dense(), dense) for name, dense in before.items())
    model.save_pretrained(tmp_path / "again")
    assert region_of(base, tmp_path / "again", architecture) == region_of(base, tmp_path / "adapter", architecture)
    assert_merges(base, tmp_path / "again", tmp_path / "out", architecture)


def test_too_little_moved(tmp_path):
    """Zeros are no choice; neither is nothing."""

    def change(parameters) -> None:
        parameters[UP].view(-1)[:20] += 1

    base, theirs = saved(tmp_path / "base"), tuned(tmp_path / "tuned", change)
    with pytest.raises(RegionError, match=r"only 20 of .* scalars moved at all, fewer than 1.0 %"):
        extract(base, theirs, tmp_path / "adapter", mode="top")
    with pytest.raises(RegionError, match="is not one: take a larger percent"):
        extract(base, theirs, tmp_path / "adapter", mode="top", percent=1e-6)
    with pytest.raises(RegionError, match="does not differ"):
        extract(base, base, tmp_path / "adapter")
    for percent in (0, -1, 101, float("nan"), "x"):
        with pytest.raises(RegionError, match="percent"):
            extract(base, theirs, tmp_path / "adapter", mode="top", percent=percent)
    with pytest.raises(IsolateError, match="mode='TOP' is unknown"):
        extract(base, theirs, tmp_path / "adapter", mode="TOP")
    assert extract(base, theirs, tmp_path / "adapter", mode="top", percent=0.05).scalars == 11
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "adapter"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_the_top_has_the_tuned_numbers(dtype, tmp_path):
    """Merged, what was selected is the tuned model's, whatever was measured of it on the way."""
    base = saved(tmp_path / "base", "llama", dtype)
    theirs = tuned(tmp_path / "tuned", everything, "llama", dtype)
    result = extract(base, theirs, tmp_path / "top", "top", percent=5.0)
    merge(base, tmp_path / "top", out=tmp_path / "out")
    before, wanted, found = (tensors(tmp_path / name) for name in ("base", "tuned", "out"))
    moved = {name: found[name] != before[name] for name in before}
    assert sum(int(where.sum()) for where in moved.values()) == result.scalars
    equal = sum(int((found[name] == wanted[name])[where].sum()) for name, where in moved.items())
    assert equal == result.scalars - result.unequal
    assert equal > 0.9 * result.scalars
    assert 0.05 < result.kept < 1.0
