"""Core regions: exactly the scalars that moved most, of any two models; gradients as the other score; the report."""

from __future__ import annotations

import json
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from peft_isolate.checkpoints.difference import difference_of
from peft_isolate.deltas.adapters import parameter_deltas
from peft_isolate.errors import FormatError, IsolateError, RegionError
from peft_isolate.methods.core_isolation import CoreIsolationConfig, scope
from peft_isolate.methods.core_isolation.gradients import SavedGradients, measure_gradients, save_gradients
from peft_isolate.methods.core_isolation.probe import core_region, core_report
from peft_isolate.regions import Region, base_parameters, roles
from peft_isolate.regions.selection import Selection
from tests.checkpoints.folders import load, saved
from tests.checkpoints.tunings import UP, everything, tuned
from tests.compare import bits
from tests.learn import filled, learn
from tests.models import tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take", "ignore:nothing is frozen")


def top_of(deltas: dict[str, torch.Tensor], percent) -> Region:
    """The slow, obvious twin: one sort of all |Δ|, one tensor after the other."""
    flat = torch.cat([delta.float().abs().flatten() for delta in deltas.values()])
    count = int(Fraction(str(percent)) * flat.numel() / 100)
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:count]] = True
    assert torch.equal(flat[chosen].sort().values, flat.topk(count).values.sort().values)
    parts = chosen.split([delta.numel() for delta in deltas.values()])
    return Region(
        {
            name: Selection.elements(tuple(delta.shape), part.nonzero().flatten())
            for (name, delta), part in zip(deltas.items(), parts, strict=True)
        }
    )


def of_each(deltas: dict[str, torch.Tensor], percent) -> Region:
    """Likewise for `scope="tensor"`."""
    parts = [top_of({name: delta}, percent) for name, delta in deltas.items() if delta.any()]
    return Region({name: selection for part in parts for name, selection in part.items()})


def deltas_of(base: nn.Module, other: nn.Module, include_embeddings: bool = False) -> dict[str, torch.Tensor]:
    before, after = base_parameters(base), base_parameters(other)
    names = scope(base, include_embeddings)
    return {name: after[name].detach().float() - before[name].detach().float() for name in names}


# ------------------------------------------------------------------------------------------------------- by the update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mixtral", "gpt_neox", "bert"])
def test_exactly_what_moved_most(architecture, dtype, tmp_path):
    """Over all of D, or of each tensor; ties by position; from models, state dicts and sharded folders alike."""
    base = saved(tmp_path / "base", architecture, dtype, max_shard_size="20KB")
    theirs = tuned(tmp_path / "tuned", everything, architecture, dtype, max_shard_size="20KB")
    models = load(base, architecture), load(theirs, architecture)
    for include in (False, True):
        deltas = deltas_of(*models, include)
        for percent in (0.3, 1, 12.5, 99.99, 100) if dtype == torch.float32 else (0.3, 1, 50):
            wanted = top_of(deltas, percent)
            assert core_region(base, theirs, percent, include_embeddings=include) == wanted
            assert core_region(*models, percent, include_embeddings=include) == wanted
            assert wanted.count == int(Fraction(str(percent)) * sum(d.numel() for d in deltas.values()) / 100)
        assert core_region(base, models[1], 5, "tensor", include_embeddings=include) == of_each(deltas, 5)
    assert core_region(models[0].state_dict(), models[1].state_dict(), 1) == top_of(deltas_of(*models), 1)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=5),
    st.sampled_from([1, 7.5, 33, 50, 100, Fraction(1, 3)]),
    st.integers(0, 2**16),
)
def test_ties_go_by_position(shapes, percent, seed):
    """Of numbers that are equal, as bf16 makes them, the earlier scalar goes first, in either scope."""
    percent = float(percent)
    generator = torch.Generator().manual_seed(seed)
    base = {f"layers.{i}.up.weight": torch.zeros(shape) for i, shape in enumerate(shapes)}
    other = {name: torch.randint(-2, 3, t.shape, generator=generator).float() for name, t in base.items()}
    total, moved = (sum(count(t) for t in other.values()) for count in (torch.numel, torch.count_nonzero))
    count = int(Fraction(str(percent)) * total / 100)
    if not moved or not count or moved < count:
        with pytest.raises(RegionError, match=r"does not differ|is not one|moved at all"):
            core_region(base, other, percent)
    else:
        assert core_region(base, other, percent) == top_of(other, percent)
    wanted = of_each(other, percent)
    if wanted and all(other[name].count_nonzero() >= wanted[name].count for name in wanted):
        assert core_region(base, other, percent, "tensor") == wanted
    else:
        with pytest.raises(RegionError):
            core_region(base, other, percent, "tensor")


@pytest.mark.parametrize("scope_of", ["global", "tensor"])
def test_of_an_adapter(scope_of, tmp_path):
    """A probe by CoreIsolationConfig or LoRA, live or saved, over bf16: its own Δ, not what bf16 leaves of it."""
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    probe = learn(get_peft_model(load(base), CoreIsolationConfig()))
    probe.save_pretrained(tmp_path / "probe")
    lora = get_peft_model(load(base), LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    lora.save_pretrained(tmp_path / "lora")
    twin = top_of if scope_of == "global" else of_each
    for live, folder in ((probe, tmp_path / "probe"), (lora, tmp_path / "lora")):
        found = difference_of(base, live)
        wanted = twin({name: found[name] for name in scope(load(base))}, 2)
        assert wanted.count
        for other in (live, folder):
            assert core_region(base, other, 2, scope_of) == wanted
    assert {name: d.dense() for name, d in parameter_deltas(probe, "default").items()}.keys() == set(scope(load(base)))


def test_experts_that_saw_no_token_drop_out(tmp_path):
    """Δ = 0: nothing of them is core, and per tensor they do not count as too little moved."""
    base = tiny("mixtral")
    other = tiny("mixtral")
    stale = [name for name in scope(base) if ".layers.1." in name and "experts" in name]
    half = next(name for name in scope(base) if ".layers.0." in name and "experts.down_proj" in name)
    with torch.no_grad():
        everything(dict(base_parameters(other)))
        for name in stale:
            base_parameters(other)[name].copy_(base_parameters(base)[name])
        base_parameters(other)[half][0].add_(9.0)
        base_parameters(other)[half][1].copy_(base_parameters(base)[half][1])
    assert stale
    per_expert = base_parameters(base)[half][0].numel()
    for kind in ("global", "tensor"):
        region = core_region(base, other, 1, kind)
        assert not set(stale) & set(region)
        assert int(region[half].indices.max()) < per_expert
        assert region == (top_of if kind == "global" else of_each)(deltas_of(base, other), 1)


def test_float64_deltas_are_taken_in_float64():
    """Over a float64 base two |Δ| are told apart where fp32 weights would not be."""
    base = {"layers.0.up.weight": torch.full((4,), 1e6, dtype=torch.float64)}
    other = {"layers.0.up.weight": base["layers.0.up.weight"] + torch.tensor([1e-6, 3e-6, 2e-6, 0])}
    assert core_region(base, other, 25)["layers.0.up.weight"].indices.tolist() == [1]


def test_nothing_of_the_models_changes(tmp_path):
    """Nor is the result in need of them."""
    base, other = tiny(), tiny(seed=1)
    before = {name: bits(p) for model in (base, other) for name, p in model.named_parameters()}
    region = core_region(base, other, 1)
    assert all(torch.equal(before[name], bits(p)) for name, p in other.named_parameters())
    region.save(tmp_path / "core.safetensors")
    assert Region.load(tmp_path / "core.safetensors") == region


# ----------------------------------------------------------------------------------------------------- what is refused


def test_models_that_do_not_differ():
    """Identical probes are an error, in either scope, also where only embeddings moved."""
    base, other = tiny(), tiny()
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    for kind in ("global", "tensor"):
        with pytest.raises(RegionError, match=r"does not differ from .* in scope: it was not trained"):
            core_region(base, other, 1, kind)
        assert set(core_region(base, other, 0.5, kind, include_embeddings=True)) == {"model.embed_tokens.weight"}
    untrained = get_peft_model(tiny(), CoreIsolationConfig())
    with pytest.raises(RegionError, match="does not differ"):
        core_region(base, untrained)


def test_updates_that_bf16_has_lost():
    """Fewer than p % moved at all: the largest |Δ| would be zeros, so the message says how few moved."""
    base = tiny(dtype=torch.bfloat16)
    other = tiny(dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in base_parameters(other).values():
            parameter.add_(torch.full_like(parameter, 1e-6))
    deltas = deltas_of(base, other)
    moved = sum(int(delta.count_nonzero()) for delta in deltas.values())
    total = sum(delta.numel() for delta in deltas.values())
    share = 100 * moved / total
    assert 0 < share < 5
    with pytest.raises(RegionError, match=f"only {moved:,} of {total:,} scalars moved at all.*a checkpoint in bf16"):
        core_region(base, other, share + 1)
    assert core_region(base, other, int(share * 10) / 10) == top_of(deltas, int(share * 10) / 10)


def test_a_tensor_that_moved_too_little():
    """Per tensor, the one that moved in fewer than p % is named; one that stood still is not."""
    base = {"layers.0.up.weight": torch.zeros(100), "layers.1.up.weight": torch.zeros(100)}
    other = {name: tensor.clone() for name, tensor in base.items()}
    other["layers.0.up.weight"][:3] = 1.0
    assert core_region(base, other, 3, "tensor") == Region(
        {"layers.0.up.weight": Selection.elements((100,), [0, 1, 2])}
    )
    with pytest.raises(RegionError, match=r"'layers\.0\.up\.weight': only 3 of 100 scalars moved"):
        core_region(base, other, 4, "tensor")


@pytest.mark.parametrize("percent", [0, -1, 100.5, float("nan"), float("inf"), "much", "1", "1/0", True, None])
def test_percents_that_are_none(percent):
    """Before anything is read."""
    with pytest.raises(RegionError, match=r"percent .* is no"):
        core_region("no/such/folder", None, percent)


def test_percents_that_round_to_nothing():
    """The number of scalars, and what to do."""
    base, other = tiny(), tiny(seed=1)
    with pytest.raises(RegionError, match=r"1e-09 % of [\d,]+ scalars is not one: take a larger"):
        core_region(base, other, 1e-9)
    with pytest.raises(RegionError, match="of no tensor is one scalar"):
        core_region(base, other, 1e-9, "tensor")


def test_arguments_and_models_of_another_kind(tmp_path):
    """Unknown words, other architectures, NaN."""
    base, other = tiny(), tiny(seed=1)
    with pytest.raises(IsolateError, match="scope='layer' is unknown"):
        core_region(base, other, scope="layer")
    with pytest.raises(IsolateError, match="score='size' is unknown"):
        core_region(base, other, score="size")
    with pytest.raises(RegionError, match="is only in the"):
        core_region(base, tiny("gpt2"))
    with pytest.raises(RegionError, match="no parameter in scope"):
        core_region({"embed_tokens.weight": torch.zeros(3, 2)}, {"embed_tokens.weight": torch.ones(3, 2)})
    for value in (torch.nan, torch.inf):
        with torch.no_grad():
            base_parameters(other)[UP][0, 0] = value
        for kind in ("global", "tensor"):
            with pytest.raises(RegionError, match=f"'{UP}' has NaN or infinity"):
                core_region(base, other, 1, kind)
    with pytest.raises(IsolateError, match="no folder"):
        core_region(tmp_path / "nothing", other)


# ----------------------------------------------------------------------------------------------------- by the gradient


def batches(n: int = 3) -> list[dict[str, torch.Tensor]]:
    found = [{"input_ids": tokens(2, 9, seed), "attention_mask": torch.ones(2, 9).long()} for seed in range(3)]
    found[0]["attention_mask"][1, 5:] = 0
    found[1]["labels"] = found[1]["input_ids"].masked_fill(torch.arange(9) < 4, -100)
    return found[:n]


def gradients_by_hand(model: nn.Module, names) -> dict[str, torch.Tensor]:
    """The slow, obvious twin."""
    parameters = base_parameters(model)
    total = {name: torch.zeros(parameters[name].shape) for name in names}
    for batch in batches():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch.get("labels", batch["input_ids"]).masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        found = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, found, strict=True):
            if gradient is not None:
                total[name] += gradient.abs().float()
    return {name: tensor / len(batches()) for name, tensor in total.items()}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("include", [False, True])
def test_gradients_are_those_of_the_definition(architecture, include):
    """The mean over batches of |∇ loss|, of every scalar in scope; a tied tensor once, with both of its uses."""
    model = tiny(architecture).requires_grad_(True)
    names = scope(model, include)
    wanted = gradients_by_hand(model, names)
    found = measure_gradients(model, batches(), include_embeddings=include)
    assert list(found) == names
    for name in names:
        assert found[name].dtype == torch.float32
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-8), name
    region = core_region(model, found, 1, score="gradient", include_embeddings=include)
    assert region == top_of(found, 1)
    assert core_region(model, found, 5, "tensor", "gradient", include_embeddings=include) == of_each(found, 5)


def test_measuring_leaves_the_model_as_it_was():
    """Numbers, gradients, what requires one, modes, random states; also when a batch is bad."""
    model = tiny().train()
    model.model.layers[0].eval()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    base_parameters(model)[UP].requires_grad_(True).grad = torch.ones(48, 32)

    def state():
        return (
            {n: (bits(p), p.requires_grad, p.grad) for n, p in model.named_parameters()},
            [module.training for module in model.modules()],
            torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(),
        )  # fmt: skip

    def assert_as_before():
        now = state()
        for name, (numbers, learns, gradient) in before[0].items():
            assert torch.equal(now[0][name][0], numbers)
            assert now[0][name][1] == learns
            assert now[0][name][2] is gradient
        assert now[1] == before[1]
        assert torch.equal(now[2], before[2])
        assert now[3:] == before[3:]

    before = state()
    with torch.inference_mode():
        first = measure_gradients(model, batches())
    assert_as_before()
    assert torch.equal(base_parameters(model)[UP].grad, torch.ones(48, 32))
    assert all(torch.equal(first[name], tensor) for name, tensor in measure_gradients(model, batches()).items())
    with pytest.raises(IsolateError, match="no tensor 'input_ids'"):
        measure_gradients(model, [*batches(), {"labels": tokens()}])
    assert_as_before()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_measuring_is_without_dropout():
    """A model in training mode has the gradient of one in eval mode, and no random number is drawn."""
    model = tiny("gpt2")
    wanted = measure_gradients(model, batches(1))
    state = torch.get_rng_state()
    found = measure_gradients(model.train(), batches(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.transformer.drop.training
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_gradients_saved_and_read(tmp_path):
    """The same region from memory, from a file and from a model after a backward; NaN and other files are refused."""
    model = tiny(dtype=torch.bfloat16)
    found = measure_gradients(model, batches())
    save_gradients(tmp_path / "g.safetensors", found)
    saved_ones = SavedGradients(tmp_path / "g.safetensors")
    assert list(saved_ones) == sorted(found) or set(saved_ones) == set(found)
    assert all(torch.equal(saved_ones[name], found[name]) for name in found)
    wanted = top_of(found, 2)
    for given_as in (found, tmp_path / "g.safetensors", str(tmp_path / "g.safetensors")):
        assert core_region(model, given_as, 2, score="gradient") == wanted
    model.requires_grad_(True)
    model.model.layers[1].requires_grad_(False)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    gradients = {
        name: torch.zeros(p.shape) if p.grad is None else p.grad.float()
        for name, p in base_parameters(model).items()
        if name in scope(model)
    }
    assert core_region(tiny(dtype=torch.bfloat16), model, 2, score="gradient") == top_of(gradients, 2)
    save_file(found, tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match="is not a readable file of gradients"):
        core_region(model, tmp_path / "other.safetensors", score="gradient")


def test_gradients_that_are_none():
    """Missing, of another model, of another shape, zero, NaN; and no model after a backward."""
    model = tiny()
    found = measure_gradients(model, batches(1))

    def refused(gradients, match: str) -> None:
        with pytest.raises(IsolateError, match=match):
            core_region(model, gradients, score="gradient")

    refused({name: tensor for name, tensor in found.items() if name != UP}, f"'{UP}' is in scope and has no gradient")
    refused(found | {"other": torch.ones(2)}, "no such parameter")
    refused(found | {UP: torch.ones(2)}, r"\(48, 32\) in the base, and its gradient \(2,\)")
    refused(found | {UP: torch.full((48, 32), torch.nan)}, "NaN")
    refused({name: torch.zeros_like(tensor) for name, tensor in found.items()}, "every gradient in scope is zero")
    refused(tiny(), "call loss.backward")
    refused(3, "int holds no gradients")


def test_what_no_gradient_can_be_measured_of():
    """No batch, no token, adapters, numbers that are not finite."""
    model = tiny()
    with pytest.raises(IsolateError, match="no batches"):
        measure_gradients(model, [])
    with pytest.raises(IsolateError, match="no token of batch 0 counts"):
        measure_gradients(model, [{"input_ids": tokens(2, 1)}])
    with pytest.raises(IsolateError, match="adapters are in the model"):
        measure_gradients(get_peft_model(tiny(), CoreIsolationConfig()), batches())
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(IsolateError, match="is NaN or infinite"):
        measure_gradients(model, batches())


# ---------------------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2", "mixtral", "gpt_neox"])
def test_the_report_counts_by_tensor_and_by_role(architecture):
    """Every scalar of D and of the core once; blocks of fused weights go to their own roles."""
    base, other = tiny(architecture), tiny(architecture, seed=1)
    region = core_region(base, other, 3)
    report = core_report(region, base)
    names = scope(base)
    shapes = {name: p.numel() for name, p in base_parameters(base).items()}
    assert [(row.name, row.scalars) for row in report.tensors] == [(name, shapes[name]) for name in names]
    assert {row.name: row.core for row in report.tensors if row.core} == {n: s.count for n, s in region.items()}
    assert (report.core, report.scalars) == (region.count, sum(shapes[name] for name in names))
    by_role: dict[str, list[int]] = {}
    for role in roles(base):
        if role.parameter in names:
            counts = by_role.setdefault(role.name, [0, 0])
            inside = torch.zeros(shapes[role.parameter], dtype=torch.bool)
            inside[role.selection.positions()] = True
            core = torch.zeros_like(inside)
            if role.parameter in region:
                core[region[role.parameter].positions()] = True
            counts[0] += int(inside.sum())
            counts[1] += int((inside & core).sum())
    assert {row.name: [row.scalars, row.core] for row in report.roles} == by_role
    assert sum(row.core for row in report.roles) == report.core
    assert sum(report.of_core(row) for row in report.roles) == pytest.approx(1.0)


def test_the_report_in_words_and_as_json(tmp_path):
    """Roles always, the tensors with most of the core, and how many have none; from a folder, without its numbers."""
    base, other = tiny(), tiny()
    with torch.no_grad():
        base_parameters(other)[UP].add_(torch.randn(48, 32))
    region = core_region(base, other, 0.5)
    report = core_report(region, saved(tmp_path / "base"))
    assert report == core_report(region, base)
    text = str(report)
    assert f"core: {region.count:,} of {report.scalars:,} scalars in 1 tensors" in text
    assert all(row.name in text for row in report.roles)
    assert UP in text
    assert f"{len(report.tensors) - 10} more tensors; {len(report.tensors) - 1} of all have no core scalar" in text
    assert max(map(len, text.splitlines())) < 120
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["core"] == region.count
    up = next(row for row in plain["roles"] if row["name"] == "up")
    assert up == {
        "name": "up",
        "scalars": 3 * 48 * 32,
        "core": region.count,
        "share": region.count / 4608,
        "of_core": 1.0,
    }
    assert [row["name"] for row in plain["tensors"]] == scope(base)


def test_the_report_of_another_model():
    """The first tensor that differs, and of a region outside of the scope all of it is counted."""
    region = Region({"model.embed_tokens.weight": Selection.rows((64, 32), [1])})
    report = core_report(region, tiny())
    assert report.core == 32
    assert "embedding" in {row.name for row in report.roles}
    with pytest.raises(RegionError, match=r"'model.embed_tokens.weight' of shape \(64, 32\)"):
        core_report(region, tiny("gpt2"))


def test_a_filled_adapter_in_bf16_and_a_nan_adapter(tmp_path):
    """A region of an adapter whose numbers are on the support alone: D is still all in scope."""
    base = tiny(dtype=torch.bfloat16)
    core = core_region(base, tiny(dtype=torch.bfloat16, seed=1), 10)
    model = filled(get_peft_model(tiny(dtype=torch.bfloat16), CoreIsolationConfig(train="core", core=core)))
    found = core_region(base, model, 1)
    assert not found - core
    assert found.count == int(sum(base_parameters(base)[n].numel() for n in scope(base)) / 100)
    with pytest.raises(RegionError, match="moved at all, fewer than 50 %"):
        core_region(base, model, 50)
    next(iter(parameter_deltas(model, "default").values())).delta.data.fill_(torch.nan)
    with pytest.raises(RegionError, match="NaN"):
        core_region(base, model, 1)
