"""`prune`: the largest numbers of an adapter stay, exactly as many as asked for; the others are the base's again."""

from __future__ import annotations

import copy
import doctest
import fractions
import importlib
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model

from peft_isolate import CoFiTuneConfig, HalfFTConfig, compress, next_round
from peft_isolate.deltas.adapters import parameter_deltas, regions_of
from peft_isolate.deltas.prune import prune
from peft_isolate.errors import IsolateError, RegionError
from peft_isolate.regions import Region, Selection
from tests.compare import adapter, assert_same, base, bits, logits
from tests.given import GivenConfig
from tests.importances import importance
from tests.learn import dense, filled, learn
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take", "ignore:Already following")

KINDS = ("rows", "columns", "elements", "all_but", "whole")


def tuned(config=None, dtype: torch.dtype = torch.float32, architecture: str = "llama", **model) -> PeftModel:
    """A model with an adapter of random numbers."""
    config = HalfFTConfig() if config is None else config
    return filled(get_peft_model(tiny(architecture, dtype, **model), config))


def support_of(model: PeftModel, name: str = "default") -> Region:
    trained, held = regions_of(model, name)
    return trained | held


def slow(model: PeftModel, percent: float, name: str = "default") -> dict[str, torch.Tensor]:
    """The same by one stable sort of every |Δ|: {parameter: what its dense Δ shall be}."""
    numbers, support = dense(model, name), support_of(model, name)
    places = [(key, at) for key in base(model) if key in support for at in support[key].positions().tolist()]
    size = torch.tensor([abs(numbers[key].view(-1)[at].item()) for key, at in places], dtype=torch.float32)
    count = math.floor(fractions.Fraction(str(percent)) * len(places) / 100)
    kept = [places[i] for i in torch.sort(size, descending=True, stable=True).indices[:count].tolist()]
    wanted = {key: torch.zeros_like(value) for key, value in numbers.items()}
    for key, at in kept:
        wanted[key].view(-1)[at] = numbers[key].view(-1)[at]
    return wanted


def assert_pruned(model: PeftModel, percent: float, name: str = "default") -> Region:
    """Prunes, and holds it against the slow twin."""
    wanted, support, before = slow(model, percent, name), support_of(model, name), dense(model, name)
    pruned = prune(model, percent, name)
    found = dense(model, name)
    assert found.keys() == wanted.keys()
    for key, numbers in found.items():
        assert torch.equal(numbers, wanted[key]), key
        assert not torch.signbit(numbers[numbers == 0]).any()
        back = pruned.get(key, Selection.empty(numbers.shape))
        assert not numbers.view(-1)[back.positions()].any()
        assert torch.equal(*(each.view(-1)[(~back).positions()] for each in (numbers, before[key])))
    assert (pruned - support).count == 0
    assert support.count - pruned.count == math.floor(fractions.Fraction(str(percent)) * support.count / 100)
    return pruned


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([0.5, 1, 10, 33.3, 50, 99.9, 100]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.02]),
)
def test_the_largest_stay_exactly(kind, percent, dtype, seed, step):
    """Any region, any share, many ties: as a stable sort of all |Δ| says. Half of the numbers may be of one size."""
    model = get_peft_model(tiny(dtype=dtype, num_hidden_layers=1), GivenConfig(kind=kind, seed=seed))
    filled(model, seed=seed)
    if step:
        with torch.no_grad():
            for delta in parameter_deltas(model, "default").values():
                for numbers in delta.parameters():
                    numbers.copy_((numbers / step).round() * step)
    assert_pruned(model, percent)


@pytest.mark.parametrize("architecture", ["phi3", "gpt_neox", "mixtral"])
def test_trained_and_held_compete_together(architecture):
    """After another round one tensor learns and holds; the cut goes through both, in the order of their positions."""
    model = learn(get_peft_model(tiny(architecture, num_hidden_layers=1), HalfFTConfig()))
    next_round(model)
    learn(model, seed=1)
    filled(model, seed=4)
    trained, held = regions_of(model, "default")
    pruned = assert_pruned(model, 20)
    for part in (trained, held):
        assert 0 < (part & pruned).count < part.count
    assert regions_of(model, "default") == (trained, held), "the region stays: only numbers are zero"


@pytest.mark.parametrize("damps", ["update", "gradient"])
def test_what_counts_is_what_the_weight_gets(damps):
    """A mask on the update damps |Δ|; one on the gradient does not."""
    config = CoFiTuneConfig(layer_range=(0, 1), modules="MHA+FFN", soft_mask=damps, importance=importance("llama"))
    model = tuned(config)
    plain = copy.deepcopy(model)
    pruned = assert_pruned(model, 10)
    with torch.no_grad():
        for delta in parameter_deltas(plain, "default").values():
            for name in delta.state:
                delta.state[name].zero_()
    assert (prune(plain, 10) == pruned) == (damps == "gradient")


def test_the_model_is_the_base_where_it_was_pruned():
    """Merged, every weight that was put back has W0's bits; the base itself is not touched; twice is once."""
    model = tuned(dtype=torch.bfloat16)
    before = base(model)
    pruned = prune(model, 5)
    assert_same(base(model), before)
    numbers = adapter(model)
    assert prune(model, 100) == Region()
    assert_same(adapter(model), numbers)
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    for name, selection in pruned.items():
        back = selection.positions()
        left, right = (bits(each[name].detach()).view(-1)[back] for each in (merged, before))
        assert torch.equal(left, right)
    assert not torch.equal(logits(model), logits(tiny(dtype=torch.bfloat16)))


def test_saved_and_trained_further(tmp_path):
    """A pruned adapter is an adapter like any other: the same parameters, and they go on learning."""
    model = learn(get_peft_model(tiny(), HalfFTConfig()))
    parameters = {id(parameter) for parameter in model.parameters()}
    with torch.inference_mode():
        pruned = prune(model, 10)
    assert not any(selection.indices.is_inference() for selection in pruned.values())
    assert {id(parameter) for parameter in model.parameters()} == parameters
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path)), expected)
    learn(model, steps=1)
    assert not torch.equal(logits(model), expected)


def test_only_the_adapter_that_was_named():
    model = tuned(GivenConfig(kind="rows"))
    model.add_adapter("other", GivenConfig(kind="elements", seed=3))
    filled(model, "other", seed=1)
    before = adapter(model)
    assert_pruned(model, 10, "other")
    assert_same(adapter(model), before)


def test_a_fresh_adapter_keeps_zeros():
    """Nothing moved, so every choice is as good: no error, and no number."""
    model = get_peft_model(tiny(), HalfFTConfig())
    assert_pruned(model, 10)


@pytest.mark.parametrize("percent", [0, -1, 100.1, float("nan"), "10", True, None, 1e-9])
def test_shares_that_are_none(percent):
    """Refused before anything is read or written."""
    model = tuned()
    before = adapter(model)
    with pytest.raises(RegionError, match=r"percent|% of .* scalars is not one: take a larger percent"):
        prune(model, percent)
    assert_same(adapter(model), before)


def test_models_that_have_nothing_to_prune(tmp_path):
    """Each with the remedy, and nothing changed."""
    with pytest.raises(IsolateError, match=r"an adapter of this library: it has LoRA, .*HalfFTConfig"):
        prune(get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM")), 10)
    for nothing in (tiny(), None):
        with pytest.raises(IsolateError, match="no PeftModel with an adapter of this library: wrap it"):
            prune(nothing, 10)
    model = tuned()
    before = adapter(model)
    with pytest.raises(IsolateError, match="has no adapter 'other'"):
        prune(model, 10, "other")
    model.merge_adapter()
    with pytest.raises(IsolateError, match=r"is merged: unmerge_adapter\(\) first"):
        prune(model, 10)
    model.unmerge_adapter()
    assert_same(adapter(model), before)
    model.save_pretrained(tmp_path / "adapter")
    compress(tmp_path / "adapter", tmp_path / "packed", values="exact")
    with pytest.raises(IsolateError, match="inference"):
        prune(PeftModel.from_pretrained(tiny(), tmp_path / "packed"), 1e-9)  # before its numbers are looked at


def test_numbers_that_are_none():
    """A NaN has no place in an order; nothing is written."""
    model = tuned()
    name, delta = list(parameter_deltas(model, "default").items())[-1]
    with torch.no_grad():
        delta.delta.view(-1)[3] = float("nan")
    before = adapter(model)
    with pytest.raises(RegionError, match=rf"'default' has NaN or infinity for '{name}', .*load a sound adapter"):
        prune(model, 10)
    assert_same(adapter(model), before)


def test_numbers_that_are_not_here():
    """On the meta device with accelerate's hook, as offloading leaves them: refused with what to do."""
    model = tuned()
    last = list(parameter_deltas(model, "default").values())[-1]
    last.delta = torch.nn.Parameter(last.delta.detach().to("meta"))
    last._hf_hook = object()
    before = {name: p for name, p in adapter(model).items() if not p.is_meta}
    with pytest.raises(IsolateError, match="sharded or offloaded"):
        prune(model, 10)
    assert_same({name: p for name, p in adapter(model).items() if not p.is_meta}, before)


def test_the_example_runs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert doctest.testmod(importlib.import_module("peft_isolate.deltas.prune")).failed == 0
