"""What core regions are found in: dtypes that differ, state dicts, gradients, arguments and files that are none."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_isolate.checkpoints.difference import difference_of
from peft_isolate.checkpoints.weights import weights_of
from peft_isolate.errors import IsolateError, RegionError
from peft_isolate.methods.core_isolation import core_region, group_tasks, measure_gradients, save_gradients, scope
from peft_isolate.methods.core_isolation.grouping import Grouping
from peft_isolate.methods.core_isolation.probe import core_report
from peft_isolate.regions import Region, base_parameters
from tests.checkpoints.tunings import UP, lora
from tests.methods.test_core_region import batches, of_each, top_of
from tests.models import tiny, tokens

NARROWER = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
    (torch.float16, torch.bfloat16),
]


def moved(model: nn.Module, scale: float = 0.01, seed: int = 5) -> nn.Module:
    """A copy, every number of which is another."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype))
    return other


# ------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("kind", ["global", "tensor"])
@pytest.mark.parametrize(("wide", "narrow"), NARROWER, ids=str)
def test_a_cast_is_no_training(wide, narrow, kind, tmp_path):
    """A model that was only cast has moved nowhere, however it comes."""
    base = tiny(dtype=wide)
    cast = copy.deepcopy(base).to(narrow)
    cast.save_pretrained(tmp_path / "cast")
    for other in (cast, cast.state_dict(), tmp_path / "cast"):
        with pytest.raises(RegionError, match=r"does not differ from .* in scope: it was not trained"):
            core_region(base, other, 1, kind)


@pytest.mark.parametrize(("wide", "narrow"), NARROWER, ids=str)
def test_a_tuned_model_of_a_narrower_dtype(wide, narrow):
    """Δ is taken from W0 rounded to that dtype; what `difference_of` gives is as it was."""
    base = tiny(dtype=wide)
    other = moved(base).to(narrow)
    before, after = base_parameters(base), base_parameters(other)
    deltas = {n: after[n].detach().double() - before[n].detach().to(narrow).double() for n in scope(base)}
    assert core_region(base, other, 1) == top_of(deltas, 1)
    assert core_region(base, other, 5, "tensor") == of_each(deltas, 5)
    exact = (after[UP].double() - before[UP].double()).detach()
    assert torch.equal(difference_of(base, other)[UP], exact.to(torch.promote_types(wide, torch.float32)))
    assert core_region(other, base, 1) == top_of(
        {n: before[n].detach().double() - after[n].detach().double() for n in scope(base)}, 1
    )


def test_updates_that_a_narrower_dtype_has_lost():
    """The count of what moved is not hidden by what rounding the base moved."""
    base = tiny()
    with pytest.raises(RegionError, match=r"scalars moved at all, fewer than 50 %.*a checkpoint in bf16"):
        core_region(base, moved(base, 1e-6).bfloat16(), 50)


# -------------------------------------------------------------------------------------------------------- state dicts


def test_what_batch_norms_count_is_no_parameter():
    """Of state dicts on either side or both, and also where it moved most."""
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    other = moved(base)
    other[1].running_mean.add_(5.0)
    other[1].num_batches_tracked.add_(3)
    wanted = core_region(base, other, 25)
    assert wanted
    for left in (base, base.state_dict()):
        for right in (other, other.state_dict()):
            assert core_region(left, right, 25) == wanted
    assert list(weights_of(base.state_dict())) == [name for name, _ in base.named_parameters()]


def test_a_parameter_of_such_a_name_is_one():
    """Where a model says so."""
    base = nn.Sequential(nn.Linear(4, 4), nn.Module())
    base[1].running_mean = nn.Parameter(torch.zeros(4))
    other = moved(base)
    wanted = core_region(base, other, 100)
    assert "1.running_mean" in wanted
    assert core_region(base.state_dict(), other, 100) == core_region(base, other.state_dict(), 100) == wanted


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_vision", "gpt2", "mixtral"])
def test_a_state_dict_as_the_base(architecture, tmp_path):
    """Has the scope and the ties of what was tuned: a model, a folder, a PeftModel, a model with gradients."""
    base = tiny(architecture)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    other = moved(base)
    other.save_pretrained(tmp_path / "other")
    for include in (False, True):
        wanted = core_region(base, other, 1, include_embeddings=include)
        for given in (other, tmp_path / "other", weights_of(other)):
            assert core_region(state, given, 1, include_embeddings=include) == wanted
            assert list(difference_of(state, given)) == list(base_parameters(base))
    for parameter in base_parameters(other).values():
        parameter.grad = torch.randn_like(parameter)
    wanted = core_region(base, other, 1, score="gradient")
    assert core_region(state, other, 1, score="gradient") == wanted
    if architecture != "gemma3_vision":
        peft_model = get_peft_model(tiny(architecture), lora(architecture))
        assert core_region(state, peft_model, 1) == core_region(base, peft_model, 1)


# ---------------------------------------------------------------------------------------------------------- gradients


def test_gradients_are_spoken_of_as_gradients():
    """No probe and no checkpoint is there that a message could speak of."""
    model = tiny()
    found = measure_gradients(model, batches(1))
    few = {name: tensor if name == UP else torch.zeros_like(tensor) for name, tensor in found.items()}
    few[UP] = few[UP].flatten().index_fill(0, torch.arange(30, 48 * 32), 0.0).view(48, 32)
    altered = {value: found | {UP: torch.full((48, 32), value)} for value in (torch.nan, -torch.inf)}
    altered |= {1e300: found | {UP: torch.full((48, 32), 1e300, dtype=torch.float64)}}
    for kind in ("global", "tensor"):
        match = r"30 of [\d,]+ scalars have a gradient other than zero, fewer than 10 % .*measure on more batches$"
        with pytest.raises(RegionError, match=match):
            core_region(model, few, 10, kind, "gradient")
        for gradients in altered.values():
            with pytest.raises(RegionError, match=f"^the gradient of '{UP}' is NaN or infinite: check the model"):
                core_region(model, gradients, 1, kind, "gradient")
    assert core_region(model, few, 0.1, score="gradient").count == 23


def test_gradients_that_are_no_tensors():
    """By name and type."""
    model = tiny()
    found = measure_gradients(model, batches(1))
    for value, what in (([0.0], "list"), (torch.ones(48, 32).int(), r"torch\.int32"), (None, "NoneType")):
        with pytest.raises(IsolateError, match=rf"the gradient of '{UP}' is a {what}, no tensor of floating"):
            core_region(model, found | {UP: value}, score="gradient")


def test_batches_that_are_none():
    """One batch in place of several, a batch that is no mapping, none at all; the model stays as it was."""
    model = tiny()
    for given, match in (
        (batches(1)[0], r"batches is one mapping.*pass a list of it, \[batch\]"),
        ([["x"]], r"batch 0 is a list, no mapping: pass \{'input_ids': …\} for each"),
        ([*batches(1), tokens()], "batch 1 is a Tensor, no mapping"),
        ([], "no batches to measure on"),
    ):
        with pytest.raises(IsolateError, match=match):
            measure_gradients(model, given)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------ arguments and files


@pytest.mark.parametrize("given", ["x", 1, None])
def test_whether_embeddings_are_included_is_a_bool(given):
    """Refused before anything is read."""
    model = tiny()
    for call in (
        lambda: core_region("no/such/folder", None, include_embeddings=given),
        lambda: measure_gradients(model, batches(1), include_embeddings=given),
        lambda: core_report(Region(), model, given),
        lambda: scope(model, given),
    ):
        with pytest.raises(IsolateError, match=f"include_embeddings={given!r}: use True or False"):
            call()


def test_files_that_are_not_there(tmp_path):
    """The path, and what to do: of whoever reads one."""
    missing = tmp_path / "missing"
    region = Region.whole({"w": (3,)})
    for call, match in (
        (lambda: core_region(tiny(), missing, score="gradient"), "pass the path of a saved file of gradients"),
        (lambda: Region.load(missing), "pass the path of a saved region"),
        (lambda: Grouping.load(missing), "pass the path of a saved grouping"),
        (lambda: group_tasks({"a": region, "b": str(missing)}), r"core_region\(…\)\.save\(path\) writes one"),
    ):
        with pytest.raises(IsolateError, match=rf"missing': there is no such file; {match}"):
            call()
    with pytest.raises(IsolateError, match=r"^regions\['b'\]='"):
        group_tasks({"a": region, "b": missing})


def test_folders_are_made_for_what_is_saved(tmp_path):
    """Of a region, of gradients, of a grouping."""
    region = Region.whole({"w": (3,)})
    region.save(tmp_path / "a" / "b" / "region")
    assert Region.load(tmp_path / "a" / "b" / "region") == region
    model = tiny()
    found = measure_gradients(model, batches(1))
    save_gradients(tmp_path / "c" / "d" / "gradients", found)
    assert core_region(model, tmp_path / "c" / "d" / "gradients", score="gradient") == core_region(
        model, found, score="gradient"
    )
    grouping = group_tasks({"a": region})
    grouping.save(tmp_path / "e" / "f" / "groups.json")
    assert Grouping.load(tmp_path / "e" / "f" / "groups.json") == grouping
