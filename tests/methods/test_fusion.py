"""`fuse`: cores transplanted, the rest interpolated, as an adapter that holds it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from peft_isolate.checkpoints.merge import merge
from peft_isolate.errors import RegionError
from peft_isolate.methods.core_isolation import core_region, mixing, scope
from peft_isolate.methods.core_isolation.fusion import fuse
from peft_isolate.regions import Region, base_parameters
from peft_isolate.regions.selection import KINDS, Selection
from tests.checkpoints.folders import load, saved
from tests.checkpoints.tunings import assert_merges, in_memory
from tests.compare import bits
from tests.methods.fusions import HEAD, NORM, ULP, UP, core, deltas, held, made, numbers, of, probe, slow_fuse
from tests.models import tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take", "ignore:Could not find a config file")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """See `made`."""
    return made(tmp_path_factory.mktemp("llama"))


# ------------------------------------------------------------------------------------------------- the whole of it


OMEGAS = {"a": [0], "ab": [0.5, 0.5], "abc": [1 / 2, 1 / 3, 1 / 4]}


@pytest.mark.parametrize(
    ("elsewhere", "slerp_on", "onto", "tasks"),
    [
        ("slerp", "weights", True, "abc"),
        ("slerp", "weights", False, "ab"),
        ("slerp", "delta", True, "ab"),
        ("slerp", "delta", False, "abc"),
        ("slerp", "weights", True, "a"),
        ("linear", "weights", True, "ab"),
        ("linear", "delta", False, "abc"),
        ("keep", "weights", True, "abc"),
        ("keep", "delta", False, "ab"),
    ],
)
def test_it_is_the_papers(elsewhere, slerp_on, onto, tasks, llama, tmp_path):
    """The same numbers and counts as scalar by scalar, by the default ω; what was transplanted, to the bit."""
    base, tuned, regions = of(llama, tasks)
    theta = llama / "onto" if onto else None
    found = fuse(base, tuned, regions, tmp_path / "out", onto=theta, elsewhere=elsewhere, slerp_on=slerp_on)
    loaded = {task: Region.load(path) for task, path in regions.items()}
    before, omegas = numbers(base), OMEGAS[tasks]
    wanted, transplanted, won, conflicts, kinds = slow_fuse(
        before,
        {task: numbers(folder) for task, folder in tuned.items()},
        loaded,
        scope(load(base)),
        omegas,
        onto=None if theta is None else numbers(theta),
        elsewhere=elsewhere,
        slerp_on=slerp_on,
    )
    got = deltas(base, tmp_path / "out")
    for name, delta in wanted.items():
        there = got.get(name, torch.zeros(delta.shape))
        assert there.dtype == torch.float32
        assert (there.double() - delta).abs().max() <= 4 * ULP * max(1e-3, float(delta.abs().max())), name
        claimed = torch.zeros(delta.numel(), dtype=torch.bool)
        for region in loaded.values():
            if name in region:
                claimed[region[name].positions()] = True
        exact = delta.reshape(-1)[claimed].float()
        assert torch.equal(there.reshape(-1)[claimed], exact), name
    assert (found.transplanted, found.won, found.conflicts) == (transplanted, won, conflicts)
    assert {"slerp": found.slerped, "linear": found.linear, "keep": found.kept} == kinds
    assert found.tasks == tuple(tasks)
    assert found.omegas == (tuple(omegas) if elsewhere != "keep" else (0.0,) * len(tasks))
    assert (found.conflicts > 0) == (len(tasks) > 1)
    assert found.scalars == sum(selection.count for selection in held(tmp_path / "out", base).values())
    assert found.n_bytes == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        *((name, torch.bfloat16) for name in ("llama", "gpt2", "mixtral", "gpt_neox", "gemma2", "bert", "qwen3_next")),
        ("llama", torch.float64),
        ("gpt2", torch.float64),
    ],
)
def test_every_architecture_and_dtype(architecture, dtype, tmp_path):
    """Merged in files and in memory to the same bits; over bf16 in fp32, over float64 in float64."""
    base = saved(tmp_path / "base", architecture, dtype)
    tuned = {task: probe(tmp_path / task, seed, architecture, dtype) for seed, task in enumerate("abc")}
    regions = {task: core(base, folder) for task, folder in tuned.items()}
    found = fuse(base, tuned, regions, tmp_path / "out", slerp_on="delta")
    names = scope(load(base, architecture))
    wanted, transplanted, *_ = slow_fuse(
        numbers(base, architecture),
        {task: numbers(folder, architecture) for task, folder in tuned.items()},
        regions, names, found.omegas, slerp_on="delta",
    )  # fmt: skip
    got = deltas(base, tmp_path / "out", architecture)
    assert got.keys() <= set(names)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for name, delta in wanted.items():
        if name in got:
            assert got[name].dtype == torch.promote_types(dtype, torch.float32)
            # The twin adds W0 and takes it away again.
            assert (got[name].double() - delta).abs().max() <= 4 * eps * max(1.0, float(delta.abs().max())), name
        else:
            assert not delta.any()
    assert found.transplanted == transplanted
    assert_merges(base, tmp_path / "out", tmp_path / "merged", architecture)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_claims_scalar_by_scalar(data):
    """Whatever the cores, the sizes of the pieces and the ties: who has the larger share of its mean, the earlier one
    where they are equal."""
    n, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    small = st.integers(-3, 3)
    delta = [data.draw(st.lists(small, min_size=size, max_size=size)) for _ in range(n)]
    cores = [data.draw(st.lists(st.booleans(), min_size=size, max_size=size)) for _ in range(n)]
    means = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=n, max_size=n))
    fused = torch.full((size,), 9.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "PIECE", data.draw(st.integers(1, 5)))
        claims = mixing._Claims(fused, torch.tensor(means, dtype=torch.float64))
        for task in range(n):
            claims.take(task, torch.tensor(delta[task], dtype=torch.float32), torch.tensor(cores[task]))
    for at in range(size):
        who = [task for task in range(n) if cores[task][at]]
        best = max(who, key=lambda task: (abs(delta[task][at]) / means[task], -task), default=-1)
        assert int(claims.owners[at]) == best
        assert float(fused[at]) == (delta[best][at] if who else 9.0)
        assert bool(claims.contested[at]) == (len(who) > 1)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([(), (5,), (3, 4), (2, 3, 4)]), st.sampled_from(KINDS), st.data())
def test_a_mask_has_what_the_selection_has(shape, kind, data):
    if kind == "whole":
        selection = Selection.whole(shape)
    else:
        whole = Selection.whole(shape)
        size = {"rows": whole.matrix_shape[0], "columns": whole.matrix_shape[1]}.get(kind, whole.numel)
        units = sorted(data.draw(st.sets(st.integers(0, size - 1))))
        selection = getattr(Selection, kind)(shape, units)
    assert torch.equal(mixing.mask_of(selection), selection.mask())


# ------------------------------------------------------------------------------------------------------ what it is


def test_transplanted_is_the_probes_number(llama, tmp_path):
    """Merged, a core's scalars are its probe's to one unit in the last place."""
    base, tuned, regions = of(llama, "abc")
    fuse(base, tuned, regions, tmp_path / "out", onto=llama / "onto")
    merge(base, tmp_path / "out", out=tmp_path / "merged")
    merged = in_memory(tmp_path / "merged")
    theirs = {task: in_memory(folder) for task, folder in tuned.items()}
    for task, path in regions.items():
        for name, selection in Region.load(path).items():
            at = selection.positions()
            one = bits(merged[name]).reshape(-1)[at].long()
            off = torch.stack([(one - bits(theirs[o][name]).reshape(-1)[at].long()).abs() for o in theirs])
            others = [o for o, p in regions.items() if o != task and name in Region.load(p)]
            alone = torch.ones(at.numel(), dtype=torch.bool)
            for other in others:
                alone &= ~torch.isin(at, Region.load(regions[other])[name].positions())
            assert (off[list(theirs).index(task)][alone] <= 1).all(), name
            assert (off.min(dim=0).values <= 1).all(), name


def test_transplanted_of_a_trained_probe(tmp_path):
    """To 1.5 units in the last place of the larger of T and W0, and to the bit within a factor of two."""
    base = tiny()
    tuned = copy.deepcopy(base)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-3)
    for step in range(40):
        ids = tokens(seed=step % 4)
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = core_region(base, tuned, 20)
    fuse(base, {"a": tuned}, {"a": found}, tmp_path / "out")
    merged = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").merge_and_unload()
    exact = 0
    for name, selection in found.items():
        at = selection.mask()
        ours, theirs, w0 = (model.get_parameter(name).detach()[at] for model in (merged, tuned, base))
        larger = torch.maximum(theirs.abs(), w0.abs())
        unit = torch.nextafter(larger, torch.full_like(larger, torch.inf)) - larger
        assert ((ours - theirs).double().abs() <= 1.5 * unit.double()).all(), name
        near = (theirs / 2 <= w0) & (w0 <= 2 * theirs) | (theirs / 2 >= w0) & (w0 >= 2 * theirs)
        assert torch.equal(bits(ours)[near], bits(theirs)[near]), name
        exact += int(near.sum())
    assert exact > 1000


def test_one_task_is_its_core_on_the_base(llama, tmp_path):
    """Nothing else: outside of the core the base's own bits; on it the probe's. A sparse, small adapter."""
    base, tuned, regions = of(llama, "a")
    found = fuse(base, tuned, regions, tmp_path / "out")
    region = Region.load(regions["a"])
    assert found.scalars == region.count == found.transplanted["a"]
    assert (found.omegas, found.slerped, found.linear) == ((0.0,), 0, 0)
    assert held(tmp_path / "out", base) == region
    merge(base, tmp_path / "out", out=tmp_path / "merged")
    merged, before, theirs = (in_memory(folder) for folder in (tmp_path / "merged", base, tuned["a"]))
    for name in before:
        mask = region[name].mask() if name in region else torch.zeros(before[name].shape, dtype=torch.bool)
        assert torch.equal(bits(merged[name])[~mask], bits(before[name])[~mask])
        assert (bits(merged[name])[mask].long() - bits(theirs[name])[mask].long()).abs().le(1).all()


@pytest.mark.parametrize("slerp_on", ["weights", "delta"])
def test_omega_at_its_ends(slerp_on, llama, tmp_path):
    """Outside of the cores: 0 leaves θ_base, 1 makes it the last task's, to the bit of the deltas."""
    base, tuned, regions = of(llama)
    inside = scope(load(base))
    union = Region.load(regions["a"]) | Region.load(regions["b"])
    for omega, theirs in ((0, "onto"), (1, "b"), ([1, 0], "a")):
        out = tmp_path / f"{omega}"
        fuse(base, tuned, regions, out, onto=llama / "onto", omega=omega, slerp_on=slerp_on)
        got = deltas(base, out)
        before, after = in_memory(base), in_memory(llama / theirs)
        for name in inside:
            free = ~union[name].mask() if name in union else torch.ones(before[name].shape, dtype=torch.bool)
            assert torch.equal(got[name][free], (after[name] - before[name])[free]), name


def test_models_that_are_one(llama, tmp_path):
    """Collinear and equal: three times the same probe, everywhere its numbers; ties go to the first."""
    base = llama / "base"
    tuned = dict.fromkeys("xyz", llama / "a")
    regions = dict.fromkeys("xyz", llama / "a.region")
    found = fuse(base, tuned, regions, tmp_path / "out", onto=llama / "a", slerp_on="delta")
    count = Region.load(llama / "a.region").count
    assert found.transplanted == found.won == {"x": count, "y": 0, "z": 0}
    assert (found.conflicts, found.slerped) == (count, 0)
    got, before, after = deltas(base, tmp_path / "out"), in_memory(base), in_memory(llama / "a")
    for name in got:
        wanted = after[name] - before[name]
        assert (got[name] - wanted).abs().le(4 * ULP * wanted.abs()).all(), name


def test_what_did_not_move_stays_the_bases(tmp_path):
    """Zero vectors: a tensor that no model moved has no delta; one that a single task moved goes half the way."""
    base = saved(tmp_path / "base")

    def only(name: str, out: Path) -> Path:
        model = load(base)
        with torch.no_grad():
            base_parameters(model)[name].add_(0.5)
        model.save_pretrained(out)
        return out

    tuned = {"up": only(UP, tmp_path / "up"), "norm": only(NORM, tmp_path / "norm")}
    regions = {
        "up": Region({UP: Selection.rows((48, 32), [0])}),
        "norm": Region({NORM: Selection.columns((32,), [3])}),
    }
    for slerp_on in ("weights", "delta"):
        found = fuse(base, tuned, regions, tmp_path / slerp_on, slerp_on=slerp_on)
        got = deltas(base, tmp_path / slerp_on)
        assert set(got) == {UP, NORM}
        # Of the matrix the first step goes half the way, the second back the half of it.
        if slerp_on == "delta":
            assert torch.allclose(got[UP][1:], torch.tensor(0.125), atol=1e-6)
            assert torch.allclose(got[NORM][:3], torch.tensor(0.25), atol=1e-6)
        assert torch.allclose(got[UP][0], torch.tensor(0.5), atol=1e-6)
        assert float(got[NORM][3]) == pytest.approx(0.5, abs=1e-6)
        assert found.tensors == 2


def test_a_conflict_is_won_by_shares(tmp_path):
    """|Δ| counts in units of the task's mean over its whole core, whichever parameters that lies in."""
    base = saved(tmp_path / "base")

    def tuned(out: Path, change: dict[tuple[str, int], float]) -> Path:
        model = load(base)
        with torch.no_grad():
            for (name, at), by in change.items():
                base_parameters(model)[name].view(-1)[at] += by
        model.save_pretrained(out)
        return out

    # Means: small (0.05 + 0.1 + 6 · 0.1) / 8 = 0.094, large (10 + 4) / 2 = 7. By sums large would have both.
    small = tuned(tmp_path / "small", {(UP, 0): 0.05, (UP, 1): 0.1} | {(NORM, at): -0.1 for at in range(6)})
    large = tuned(tmp_path / "large", {(UP, 0): -10.0, (UP, 1): 4.0})
    both = {UP: Selection.elements((48, 32), [0, 1])}
    regions = {"large": Region(both), "small": Region(both | {NORM: Selection.elements((32,), range(6))})}
    found = fuse(base, {"large": large, "small": small}, regions, tmp_path / "out", elsewhere="keep")
    got = deltas(base, tmp_path / "out")
    assert got[UP].reshape(-1)[[0, 1]].tolist() == pytest.approx([-10.0, 0.1], abs=1e-6)
    assert got[NORM][:6].tolist() == pytest.approx([-0.1] * 6, abs=1e-6)
    assert found.transplanted == {"large": 1, "small": 7}
    assert found.won == {"large": 1, "small": 1}
    assert (found.conflicts, found.scalars) == (2, 8)
    assert "2 scalars are in several cores; of these have: large 1, small 1" in str(found)


def test_what_is_out_of_scope_is_onto_s(llama, tmp_path):
    """Head and embeddings of θ_base go along, of the tasks nothing; with include_embeddings they are fused."""
    base, tuned, regions = of(llama)
    fuse(base, tuned, regions, tmp_path / "out", onto=llama / "onto")
    before, after = in_memory(base), in_memory(llama / "onto")
    got = deltas(base, tmp_path / "out")
    assert torch.equal(got[HEAD], after[HEAD] - before[HEAD])
    assert HEAD not in deltas(base, fuse(base, tuned, regions, tmp_path / "none").folder)
    fuse(base, tuned, regions, tmp_path / "all", onto=llama / "onto", include_embeddings=True)
    assert not torch.equal(deltas(base, tmp_path / "all")[HEAD], got[HEAD])


def test_tied_embeddings_cannot_be_carried(tmp_path):
    """A θ_base that moved them has no place for that in an adapter; one that did not is fine."""
    base = saved(tmp_path / "base", "gemma2")
    a, onto = (probe(tmp_path / name, seed, "gemma2") for seed, name in enumerate(("a", "onto")))
    region = core(base, a)
    with pytest.raises(RegionError, match=r"'model.embed_tokens.weight' differs .* is tied to \['lm_head.weight'\]"):
        fuse(base, {"a": a}, {"a": region}, tmp_path / "out", onto=onto)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "onto"]
