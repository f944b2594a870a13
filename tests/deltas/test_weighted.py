"""`add_weighted_adapter`: a new adapter that is the weighted sum of others, over the union of where they act."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_isolate import HalfFTConfig, next_round
from peft_isolate.deltas import DeltaLayer
from peft_isolate.deltas.adapters import regions_of
from peft_isolate.errors import IsolateError
from tests.compare import adapter, assert_same, base, logits
from tests.given import GivenConfig
from tests.learn import dense, filled, held, learn, learning
from tests.models import tiny

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}") for message in ("the adapter will take", "Already following")
]

KINDS = ("whole", "rows", "columns", "elements", "all_but")
WEIGHTS = (0.75, -0.5)


def two(first: str, second: str, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> PeftModel:
    """A model with the adapters "a" and "b" on random parts of two kinds, of which some tensors have one only."""
    model = get_peft_model(tiny(architecture, dtype), GivenConfig(kind=first, exclude_modules=["o_proj"]), "a")
    model.add_adapter("b", GivenConfig(kind=second, seed=1, exclude_modules=["up_proj"]))
    return filled(filled(model, "a", seed=1), "b", seed=2)


def summed(parts: list[tuple[dict[str, torch.Tensor], float]]) -> dict[str, torch.Tensor]:
    """The slow twin: {parameter: Σ factor · Δ}, in fp64 and dense."""
    total: dict[str, torch.Tensor] = {}
    for deltas, factor in parts:
        for name, numbers in deltas.items():
            total[name] = total.get(name, torch.zeros(())) + factor * numbers.double()
    return total


def scale(model: PeftModel, name: str, alpha: float) -> None:
    for layer in (module for module in model.modules() if isinstance(module, DeltaLayer)):
        layer.set_scale(name, alpha)


def assert_is(model: PeftModel, name: str, twin: dict[str, torch.Tensor], plain: torch.nn.Module) -> None:
    """The adapter's numbers are the twin's, and the model with it is `plain` with the twin added to its weights."""
    found = dense(model, name)
    assert found.keys() == twin.keys()
    for parameter, numbers in found.items():
        torch.testing.assert_close(numbers, twin[parameter].float(), rtol=1e-6, atol=1e-8)
        # What the twin has at exactly no scalar, the sum has not either.
        assert torch.equal(numbers != 0, twin[parameter] != 0)
    with torch.no_grad():
        for parameter, numbers in twin.items():
            weight = plain.get_parameter(parameter)
            weight.copy_(weight.double() + numbers)
    model.set_adapter(name)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))
def test_the_sum_is_that_of_the_dense_deltas(first, second):
    model = two(first, second)
    scale(model, "a", 0.5)
    before, active, expected, learned = adapter(model, "a"), model.active_adapters, logits(model), learning(model)
    model.add_weighted_adapter(["a", "b"], list(WEIGHTS), "sum")
    assert model.active_adapters == active
    assert learning(model) == learned
    assert torch.equal(logits(model), expected)
    assert_same(adapter(model, "a"), before)
    regions = {name: regions_of(model, name)[0] for name in ("a", "b", "sum")}
    assert regions["sum"] == regions["a"] | regions["b"]
    twin = summed([(dense(model, "a"), 0.5 * WEIGHTS[0]), (dense(model, "b"), WEIGHTS[1])])
    assert_is(model, "sum", twin, tiny())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_earlier_rounds_hold_counts_like_the_rest(dtype, tmp_path):
    """The sum of two adapters in their second rounds, saved and loaded alone: nothing of it is held."""
    model = learn(get_peft_model(tiny("phi3", dtype), HalfFTConfig(), "a"))
    model.add_adapter("b", HalfFTConfig(seed=1))
    for name in "ab":
        model.set_adapter(name)
        next_round(model, name)
        learn(model, seed=3)
    model.set_adapter("a")
    learn(model)
    assert held(model, "a")
    model.add_weighted_adapter(["a", "b"], [1.0, 0.25], "sum")
    trained, kept = regions_of(model, "sum")
    every = [region for name in "ab" for region in regions_of(model, name)]
    assert trained == every[0] | every[1] | every[2] | every[3]
    assert not kept
    if dtype == torch.float32:
        twin = summed([(dense(model, "a"), 1.0), (dense(model, "b"), 0.25)])
        assert_is(model, "sum", twin, tiny("phi3"))
    model.set_adapter("sum")
    adapted = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny("phi3", dtype), tmp_path / "sum")
    assert torch.equal(logits(loaded), adapted)
    assert torch.equal(logits(model.merge_and_unload()), adapted)


def test_one_adapter_of_weight_one_is_a_copy():
    model = filled(get_peft_model(tiny(), GivenConfig()))
    expected = logits(model)
    model.add_weighted_adapter(["default"], [1.0], "copy")
    assert_same(adapter(model, "copy"), adapter(model))
    model.set_adapter("copy")
    assert torch.equal(logits(model), expected)
    # And it is a copy: what the one learns does not reach the other.
    before = adapter(model)
    learn(model)
    assert_same(adapter(model), before)


def test_a_sum_learns_and_goes_on_in_rounds():
    """It is an adapter like any other."""
    model = filled(filled(_two_halves(), "a"), "b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    untouched, before = base_of(model), logits(model)
    learn(model)
    assert not torch.equal(logits(model), before)
    before = logits(model)
    next_round(model, "sum")
    assert torch.equal(logits(model), before)
    kept = held(model, "sum")
    assert kept
    learn(model)
    assert_same(held(model, "sum"), kept)
    assert_same(base_of(model), untouched)


def _two_halves() -> PeftModel:
    model = get_peft_model(tiny(), HalfFTConfig(), "a")
    model.add_adapter("b", HalfFTConfig(round_index=1))
    return model


def base_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: numbers for name, numbers in base(model).items() if "halfft_" not in name}


def test_a_sum_of_an_adapter_and_its_own_opposite_is_nothing():
    model = filled(get_peft_model(tiny(), GivenConfig(kind="all_but")))
    model.add_weighted_adapter(["default", "default"], [1.0, -1.0], "none")
    model.set_adapter("none")
    assert torch.equal(logits(model), logits(tiny()))


REFUSED = {
    "counts": ((["a", "b"], [1.0], "sum"), {}, "2 adapters and 1 weights: give one weight for each"),
    "nothing": (([], [], "sum"), {}, "0 adapters and 0 weights"),
    "a typo": ((["a", "typo"], [1.0, 1.0], "sum"), {}, r"no adapter 'typo' to combine: there are \['a', 'b'\]"),
    "there already": ((["a", "b"], [1.0, 1.0], "b"), {}, "there is an adapter 'b' already: choose another name"),
    "not linear": ((["a", "b"], [1.0, 1.0], "sum"), {"combination_type": "svd"}, "combination_type='svd'.*'linear'ly"),
    "no number": ((["a", "b"], [1.0, float("nan")], "sum"), {}, "the weight of 'b' must be a finite number, got nan"),
    "a name of torch's": ((["a", "b"], [1.0, 1.0], "half"), {}, "'half' is an attribute of torch's modules"),
    "a name of the model's": ((["a", "b"], [1.0, 1.0], "weight"), {}, "'weight' is also part of a parameter's name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_summed_leaves_nothing(case):
    arguments, more, message = REFUSED[case]
    model = two("rows", "elements")
    assert_refused(model, message, *arguments, **more)


def assert_refused(model: PeftModel, message: str, *arguments, **more) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    configs, expected, learned = copy.deepcopy(model.peft_config), logits(model), learning(model)
    with pytest.raises(IsolateError, match=message):
        model.add_weighted_adapter(*arguments, **more)
    assert_same(model.state_dict(), state)
    assert model.peft_config == configs
    assert learning(model) == learned
    assert torch.equal(logits(model), expected)


def test_nothing_is_summed_while_adapters_are_merged():
    model = two("whole", "columns")
    model.merge_adapter()
    assert_refused(model, r"adapters are merged.*unmerge_adapter\(\) first", ["a", "b"], [1.0, 1.0], "sum")


@pytest.mark.parametrize("beside", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}])
def test_what_is_trained_beside_the_deltas_cannot_be_summed(beside):
    """A head or new tokens that the sum had not would silently be the base's."""
    model = get_peft_model(tiny(), HalfFTConfig(), "a")
    model.add_adapter("b", HalfFTConfig(seed=1, **beside))
    assert_refused(model, rf"'b' has {next(iter(beside))}", ["a", "b"], [1.0, 1.0], "sum")
