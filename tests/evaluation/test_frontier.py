"""`frontier`: one trained adapter scored over α and over what may be done to it, which leaves nothing behind."""

from __future__ import annotations

import copy
import doctest
import fractions
import functools
import importlib
import itertools
import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_isolate import HalfFTConfig, compress, half_reset, next_round
from peft_isolate.deltas.adapters import layers_of, parameter_deltas
from peft_isolate.deltas.prune import prune
from peft_isolate.deltas.scale import set_scale
from peft_isolate.errors import FormatError, IsolateError
from peft_isolate.evaluation import HeldOutLoss, Scores
from peft_isolate.evaluation.frontier import ALPHAS, Frontier, Point, frontier
from tests.compare import adapter, assert_same, base, logits
from tests.given import GivenConfig
from tests.learn import dense, filled, learn, learning
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take", "ignore:Already following")

KINDS = ("rows", "columns", "elements", "all_but", "whole")


def tuned(config=None, **model) -> PeftModel:
    """A model with an adapter of random numbers."""
    config = HalfFTConfig() if config is None else config
    return filled(get_peft_model(tiny(**({"num_hidden_layers": 1} | model)), config))


class Copies(TorchDispatchMode):
    """Counts the scalars that are copied meanwhile."""

    scalars = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.clone.default:
            self.scalars += args[0].numel()
        return func(*args, **(kwargs or {}))


class Distance:
    """Scores that tell any two models apart: how near the logits are to the tuned model's, and to the base's."""

    def __init__(self, model: PeftModel) -> None:
        self.tuned = logits(model)
        with model.disable_adapter():
            self.base = logits(model)
        self.calls = 0

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        self.calls += 1
        found = logits(model)
        near = [-(found - other).double().square().mean().item() for other in (self.tuned, self.base)]
        return {"speciality": near[0], "versatility": near[1]}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything there is."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def scales(model: nn.Module) -> list[dict[str, float]]:
    return [dict(layer.scaling) for layer in layers_of(model).values()]


def points(*numbers: tuple[float, float, float]) -> Frontier:
    """A frontier of (α, speciality, versatility)."""
    return Frontier(tuple(Point(alpha, {}, *scores) for alpha, *scores in numbers), "none")


@pytest.mark.parametrize("kind", KINDS)
def test_points_are_the_product_and_each_is_the_model_it_says(kind):
    """Held against the obvious twin: a copy of the model, changed and scaled by hand, scored on its own."""
    model = tuned(GivenConfig(kind=kind))
    score = Distance(model)
    before, alphas, values = state(model), (0, 0.5, 1, -0.3), ((None, 0.5), (10, None))
    found = frontier(model, score, alphas, changes={half_reset: values[0], prune: values[1]})
    assert_same(state(model), before)
    assert scales(model) == scales(tuned(GivenConfig(kind=kind)))
    wanted = []
    for reset, percent in itertools.product(*values):
        for alpha in alphas:
            twin = copy.deepcopy(model)
            if reset is not None:
                half_reset(twin, reset)
            if percent is not None:
                prune(twin, percent)
            set_scale(twin, alpha)
            wanted.append(Point(float(alpha), {"half_reset": reset, "prune": percent}, **score(twin)))
    assert list(found.points) == wanted
    assert len({point.speciality for point in found.points}) == 4 * 3 + 1


def test_the_base_is_scored_once():
    """At α = 0 every change leaves the same model: bit for bit the base."""
    model = tuned()
    score = Distance(model)
    found = frontier(model, score, (1, 0), changes={prune: (None, 10, 1)})
    assert score.calls == 4
    assert [point.versatility for point in found.points if point.alpha == 0] == [-0.0] * 3
    assert found.points[0].speciality == 0


def test_only_alpha_by_default():
    """Eleven points, no copy of the numbers, and no number written."""
    model = tuned()
    versions = {name: tensor._version for name, tensor in model.state_dict(keep_vars=True).items()}
    with Copies() as copies:
        frontier(model, lambda model: {"speciality": 0, "versatility": 0}, changes={prune: (None,)})
    assert copies.scalars == 0
    found = frontier(model, Distance(model))
    assert [point.alpha for point in found.points] == list(ALPHAS) == [i / 10 for i in range(11)]
    assert {name: tensor._version for name, tensor in model.state_dict(keep_vars=True).items()} == versions


def test_only_the_adapter_that_was_named():
    """Several adapters are active; one is dialled and changed, where the others stay as they are at their own α."""
    model = tuned(GivenConfig(kind="rows"))
    model.add_adapter("other", GivenConfig(kind="elements", seed=3))
    filled(model, "other", seed=1)
    model.base_model.set_adapter(["default", "other"])
    set_scale(model, 0.5)
    set_scale(model, 0.7, "other")
    before, default, at = state(model), adapter(model), scales(model)
    seen = []

    def score(model):
        assert_same(adapter(model), default)
        assert {layer["default"] for layer in scales(model)} == {0.5}
        seen.append(logits(model))
        return {"speciality": 0.0, "versatility": 0.0}

    frontier(model, score, (0, 1), changes={prune: (None, 10)}, adapter_name="other")
    assert len(seen) == 3
    assert_same(state(model), before)
    assert scales(model) == at
    model.base_model.set_adapter(["default"])
    assert torch.equal(seen[0], logits(model))


def test_layers_may_stand_at_alphas_of_their_own():
    """Whatever they were at, they are again."""
    model = tuned(num_hidden_layers=2)
    for number, layer in enumerate(layers_of(model).values()):
        layer.set_scale("default", number / 7)
    before = scales(model)
    frontier(model, Distance(model), (0.5,))
    assert scales(model) == before


def test_scoring_disturbs_nothing():
    """Eval mode inside, each module's own mode afterwards; every point starts from the same random states."""
    model = learn(tuned())
    model.train()
    next(iter(layers_of(model).values())).eval()
    modes = [module.training for module in model.modules()]
    learns = learning(model)
    drawn = []

    def score(model):
        assert not any(module.training for module in model.modules())
        drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
        return {"speciality": 0.0, "versatility": 0.0}

    torch.manual_seed(3)
    frontier(model, score, (0, 0.5, 1), changes={half_reset: (None, 0.5)})
    assert len(set(drawn)) == 1
    assert torch.rand(1).item() == drawn[0][0]
    assert [module.training for module in model.modules()] == modes
    assert learning(model) == learns


@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_is_raised_the_adapter_is_as_before(error, at):
    """Also with numbers pruned and α set."""
    model = tuned()
    set_scale(model, 0.3)
    before, then, calls = state(model), scales(model), itertools.count()

    def score(model):
        if next(calls) == at:
            raise error
        return {"speciality": 0.0, "versatility": 0.0}

    with pytest.raises(error):
        frontier(model, score, (0, 0.5, 1), changes={prune: (None, 10)})
    assert_same(state(model), before)
    assert scales(model) == then


def test_even_the_sign_of_zero_is_as_before():
    """What was −0.0 becomes 0.0 where it is put back, equal and yet another number."""
    model = tuned()
    with torch.no_grad():
        for delta in parameter_deltas(model, "default").values():
            delta.delta.fill_(-0.0)
    before = state(model)
    frontier(model, Distance(model), (1,), changes={half_reset: (1.0,)})
    assert_same(state(model), before)


def _fails(model, value):
    prune(model, value)
    raise RuntimeError("half-way")


def test_a_change_that_fails_is_taken_back():
    model = tuned()
    before = state(model)
    with pytest.raises(RuntimeError, match="half-way"):
        frontier(model, Distance(model), (1,), changes={_fails: (10,)})
    assert_same(state(model), before)
    measured = frontier(model, Distance(model), (1,))
    point = Point(1.0, {"_fails": 10}, 0.0, 0.0)
    found = Frontier((point,), measured.adapter, functions={"_fails": _fails})
    with pytest.raises(RuntimeError, match="half-way"):
        found.apply(model, point)
    assert_same(state(model), before)
    with pytest.raises(RuntimeError, match="half-way"):
        found.report(model, Distance(model), point)
    assert_same(state(model), before)


def test_a_change_that_cannot_be_taken_back_is_said():
    """Another round gives the adapter new parameters."""

    def round_of(model, value):
        next_round(model, round_index=value)

    model = tuned()
    with pytest.raises(IsolateError, match=r"round_of gave the adapter 'default' other tensors.*load it again"):
        frontier(model, Distance(model), (1,), changes={round_of: (1,)})


def test_changes_of_any_kind():
    """Partial functions go by their function's name, and nobody has to name the adapter twice."""
    model = tuned(GivenConfig(kind="rows"))
    model.add_adapter("other", GivenConfig(kind="elements", seed=3))
    filled(model, "other", seed=1)
    model.base_model.set_adapter(["default", "other"])
    before = adapter(model)

    def checked(model, value):  # knows by itself
        assert_same(adapter(model), before)
        prune(model, value, "other")

    found = frontier(
        model, Distance(model), (1,),
        changes={functools.partial(half_reset, seed=5): (0.5,), checked: (50,)}, adapter_name="other",
    )  # fmt: skip
    assert found.points[0].changes == {"half_reset": 0.5, "checked": 50}
    assert_same(adapter(model), before)


@pytest.mark.parametrize(
    ("scored", "message"),
    [
        ({"speciality": 1.0}, r"forgot 'versatility' at α = 0\.5, prune = 10: it returned \['speciality'\]"),
        (0.5, r"returned a float, not a dictionary at α = 0\.5"),
        ({"speciality": float("nan"), "versatility": 1.0}, r"\['speciality'\] is nan at α = 0\.5, prune = 10"),
        ({"speciality": 1.0, "versatility": float("-inf")}, r"\['versatility'\] is -inf at"),
        ({"speciality": "1.0", "versatility": 1.0}, r"\['speciality'\] is '1\.0' at"),
        ({"speciality": None, "versatility": 1.0}, r"\['speciality'\] is None at"),
        ({"speciality": 0, "versatility": 10**400}, r"\['versatility'\] is 10{400} at α = 0\.5, prune = 10"),
    ],
    ids=range(7),
)
def test_scores_that_are_none_name_the_point(scored, message):
    model = tuned()
    before = state(model)
    with pytest.raises(IsolateError, match=message):
        frontier(model, lambda model: scored, (0.5,), changes={prune: (10,)})
    assert_same(state(model), before)
    assert {scale["default"] for scale in scales(model)} == {1.0}


def test_numbers_of_other_kinds_are_scores():
    """NumPy's, torch's, whole ones: all of them are plain numbers in the points."""
    scored = {"speciality": np.float32(0.5), "versatility": torch.tensor(1), "other": None}
    found = frontier(tuned(), lambda model: scored, (1,)).points[0]
    assert (found.speciality, found.versatility) == (0.5, 1.0)
    assert type(found.speciality) is type(found.versatility) is float


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alphas": ()}, "give at least one"),
        ({"alphas": (0, 1, 0.0)}, "each once"),
        ({"alphas": (0, float("nan"))}, "finite number"),
        ({"alphas": "1"}, "finite number"),
        ({"changes": [prune]}, "give {function: values}"),
        ({"changes": {"prune": (1,)}}, "is no change"),
        ({"changes": {prune: ()}}, "give its values, each once"),
        ({"changes": {prune: 10}}, "give its values"),
        ({"changes": {prune: (10, 10)}}, "each once"),
        ({"changes": {prune: (0.5, np.float64(0.5))}}, "each once"),
        ({"changes": {prune: (float("inf"),)}}, "numbers, texts"),
        ({"changes": {prune: (10**400,)}}, "numbers, texts"),
        ({"changes": {prune: ([1],)}}, "numbers, texts"),
        ({"changes": {prune: (1,), functools.partial(prune): (2,)}}, "two changes are called 'prune'"),
        ({"score": 3}, "pass a callable"),
        ({"adapter_name": "other"}, "has no adapter 'other'"),
    ],
)
def test_arguments_are_checked_before_anything_is_scored(arguments, message):
    model = tuned()
    score = Distance(model)
    with pytest.raises(IsolateError, match=message):
        frontier(model, **({"score": score} | arguments))
    assert score.calls == 0


def test_one_alpha_needs_no_list():
    assert frontier(tuned(), lambda model: {"speciality": 1, "versatility": 2}, 0.5).points[0].alpha == 0.5


def test_models_that_cannot_be_dialled():
    """Each with the remedy, before anything is scored."""
    with pytest.raises(IsolateError, match="None is no model"):
        frontier(None, len)
    lora = get_peft_model(tiny(num_hidden_layers=1), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(IsolateError, match="rescale_adapter_scale"):
        frontier(lora, Distance(lora))
    model = tuned()
    score = Distance(model)
    model.merge_adapter()
    with pytest.raises(IsolateError, match="merged"):
        frontier(model, score)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(IsolateError, match="not active"):
        frontier(model, score)
    model.add_adapter("other", HalfFTConfig(seed=1))
    with pytest.raises(IsolateError, match=r"not active.*set_adapter\('other'\)"):
        frontier(model, score, adapter_name="other")
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter(["other"])
    with pytest.raises(IsolateError, match="another adapter is merged"):
        frontier(model, score)
    whole = tuned(HalfFTConfig(modules_to_save=["lm_head"]))
    with pytest.raises(IsolateError, match="whole"):
        frontier(whole, score, (1, 0.5))
    assert score.calls == 0
    assert len(frontier(whole, Distance(whole), (1,)).points) == 1


def test_best_keeps_to_the_floors():
    """A floor on one side gives the best of the other; on both the best sum."""
    found = points((0, 0.1, 1.0), (0.5, 0.6, 0.8), (0.9, 0.9, 0.5), (1, 1.0, 0.2))
    assert found.best(speciality=0.6).alpha == 0.5
    assert found.best(speciality=0.61).alpha == 0.9
    assert found.best(versatility=0.5).alpha == 0.9
    assert found.best(versatility=0.9).alpha == 0
    assert found.best(speciality=0.5, versatility=0.2).alpha in (0.5, 0.9)
    assert found.best(speciality=0.95, versatility=0.1).alpha == 1
    assert found.best(speciality=0.1 * 6 + 1e-12).alpha == 0.5, "up to rounding"
    assert found.best(speciality=-5).alpha == 0
    assert found.best(versatility=np.float32(0.5)).alpha == 0.9
    assert found.best(versatility=fractions.Fraction(1, 2)).alpha == 0.9
    with pytest.raises(IsolateError, match=r"no point has versatility ≥ 1\.5"):
        found.best(versatility=fractions.Fraction(3, 2))


def test_ties_go_to_the_other_score_then_to_the_base():
    """Nearer to the base less has changed that nobody measured."""
    assert points((1, 0.9, 0.5), (0.5, 0.8, 0.5)).best(speciality=0.1).alpha == 1
    assert points((1, 0.5, 0.8), (0.5, 0.5, 0.9)).best(versatility=0.1).alpha == 0.5
    assert points((1, 0.5, 0.5), (-0.4, 0.5, 0.5), (0.5, 0.5, 0.5)).best(versatility=0.1).alpha == -0.4
    assert points((1, 0.4, 0.6), (0.5, 0.6, 0.4)).best(versatility=0.1, speciality=0.1).alpha == 0.5
    same = Frontier((Point(1, {"a": 1}, 0.0, 0.0), Point(1, {"a": None}, 0.0, 0.0)), "none")
    assert same.best(speciality=0).changes == {"a": 1}


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(-3, 3).map(float)] * 3), min_size=1, max_size=8),
    st.none() | st.integers(-4, 4),
    st.none() | st.integers(-4, 4),
)
def test_no_allowed_point_is_better(numbers, speciality, versatility):
    """What `best` gives reaches the floors; nothing that does is better; it raises only where nothing does."""
    found = points(*numbers)
    allowed = [
        p
        for p in found.points
        if (speciality is None or p.speciality >= speciality) and (versatility is None or p.versatility >= versatility)
    ]
    if not allowed or (speciality is None and versatility is None):
        with pytest.raises(IsolateError):
            found.best(speciality=speciality, versatility=versatility)
        return
    best = found.best(speciality=speciality, versatility=versatility)
    assert best in allowed
    wanted = {(False, True): "speciality", (True, False): "versatility"}.get(
        (speciality is not None, versatility is not None)
    )
    value = (lambda p: p.speciality + p.versatility) if wanted is None else (lambda p: getattr(p, wanted))
    assert value(best) == max(map(value, allowed))


def test_floors_that_nobody_reaches():
    """The message says how far one gets."""
    found = points((0, 0.1, 1.0), (1, 0.9, 0.2))
    with pytest.raises(IsolateError, match=r"speciality ≥ 0\.95: the best speciality is at α = 1: speciality 0\.9000"):
        found.best(speciality=0.95)
    with pytest.raises(IsolateError, match=r"and versatility ≥ 0\.5: .*α = 1.*; the best versatility is at α = 0"):
        found.best(speciality=0.5, versatility=0.5)
    with pytest.raises(IsolateError, match="needs a floor"):
        found.best()
    for floor in (float("nan"), "0.5", True, 10**400, np.float32("inf"), 1j):
        with pytest.raises(IsolateError, match="is no floor"):
            found.best(versatility=floor)


def test_the_table_marks_what_is_worth_choosing():
    """A line a point; a star where nothing is as good on both scores and better on one."""
    worse = Point(0.5, {"prune": 10}, 0.1, 0.2)
    found = Frontier((Point(0.0, {"prune": None}, 0.1, 1.0), worse, Point(1.0, {"prune": None}, 0.9, 0.2)), "none")
    assert [found.is_best_of_both(point) for point in found.points] == [True, False, True]
    assert found.table.splitlines() == [
        "prune  alpha  speciality  versatility",
        "-      0      0.1000      1.0000       *",
        "10     0.5    0.1000      0.2000",
        "-      1      0.9000      0.2000       *",
    ]
    assert str(found).startswith(found.table)
    assert str(worse) == "α = 0.5, prune = 10: speciality 0.1000, versatility 0.2000"


def test_chosen_on_validation_reported_on_test():
    """The test score is asked once, at that point alone, of the model that the point says; then all is as before."""
    model = tuned()
    found = frontier(model, Distance(model), (0.5, 1), changes={prune: (None, 10)})
    point = found.points[2]
    before, score, seen = state(model), Distance(model), []

    def test_score(model):
        seen.append(logits(model))
        return {"speciality": 7.0, "versatility": 8.0}

    reported = found.report(model, test_score, point)
    assert reported == Point(0.5, {"prune": 10}, 7.0, 8.0)
    assert_same(state(model), before)
    assert {scale["default"] for scale in scales(model)} == {1.0}
    assert found.report(model, score, point) == point
    found.apply(model, point)
    assert len(seen) == 1
    assert torch.equal(seen[0], logits(model))
    with pytest.raises(IsolateError, match=r"\['versatility'\] is nan at α = 1"):
        found.report(tuned(), lambda model: {"speciality": 0, "versatility": float("nan")}, found.points[1])


def test_applied_for_good():
    """Numbers and α are those of the point; a second time the adapter is another one where numbers changed."""
    model, twin = tuned(), tuned()
    found = frontier(model, Distance(model), (0.5, 0.25), changes={half_reset: (None, 0.5), prune: (None, 10)})
    found.apply(model, found.points[1])
    assert {scale["default"] for scale in scales(model)} == {0.25}
    found.apply(model, found.points[0])
    assert_same(adapter(model), adapter(twin))
    found.apply(model, found.points[-2])
    half_reset(twin)
    prune(twin, 10)
    assert_same(adapter(model), adapter(twin))
    set_scale(twin, 0.5)
    assert torch.equal(logits(model), logits(twin))
    with pytest.raises(IsolateError, match="not the one that was measured"):
        found.apply(model, found.points[0])


def test_another_adapter_is_refused(tmp_path):
    """One number less, or the same numbers elsewhere; the same one under another name will do."""
    model = tuned(GivenConfig(kind="all_but"))
    found = frontier(model, Distance(model), (0.5,))
    for other in (tuned(GivenConfig(kind="all_but", seed=1)), filled(copy.deepcopy(model), seed=2)):
        with pytest.raises(IsolateError, match="not the one that was measured"):
            found.report(other, Distance(other), found.points[0])
    last = copy.deepcopy(model)
    with torch.no_grad():
        list(parameter_deltas(last, "default").values())[-1].delta.view(-1)[-1] += 1e-6
    with pytest.raises(IsolateError, match="not the one that was measured"):
        found.apply(last, found.points[0])
    assert {scale["default"] for scale in scales(last)} == {1.0}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(num_hidden_layers=1), tmp_path, adapter_name="mine")
    assert found.report(loaded, Distance(loaded), found.points[0], adapter_name="mine") == found.points[0]
    with pytest.raises(IsolateError, match="no adapter 'default'"):
        found.apply(loaded, found.points[0])
    with pytest.raises(IsolateError, match="no point of this frontier"):
        found.apply(model, Point(0.7, {}, 0.0, 0.0))


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "mixtral"])
def test_the_same_adapter_however_it_was_made(architecture, tmp_path):
    """Biases and fused experts: loaded, the layers keep their parameters in another order, and beside another adapter
    in yet another. It is the same adapter, of which the same numbers are pruned, also where all |Δ| are equal.
    """
    model = tuned(GivenConfig(kind="rows"), architecture=architecture)
    with torch.no_grad():
        for delta in parameter_deltas(model, "default").values():
            for numbers in delta.parameters():
                numbers.copy_(torch.where(numbers < 0, -0.5, 0.5))
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(tiny(architecture, num_hidden_layers=1), tmp_path, adapter_name="mine")
    beside = get_peft_model(tiny(architecture, num_hidden_layers=1), GivenConfig(kind="columns"))
    beside.load_adapter(tmp_path, "mine")
    beside.set_adapter("mine")
    orders = [list(parameter_deltas(model, "default")), list(parameter_deltas(fresh, "mine"))]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1], "else nothing is tested here"
    found = frontier(model, Distance(model), (0.5,), changes={prune: (None, 10)})
    for loaded in (fresh, beside):
        for point in found.points:
            assert found.report(loaded, Distance(model), point, adapter_name="mine") == point
    found.apply(fresh, found.points[1], adapter_name="mine")
    prune(model, 10)
    assert_same(dense(fresh, "mine"), dense(model))


def test_codes_are_part_of_the_adapter():
    """The same numbers at other positions are another adapter."""
    model = tuned(GivenConfig(kind="elements"))
    other = tuned(GivenConfig(kind="elements", seed=8))
    assert all(torch.equal(a, b) for a, b in zip(adapter(model).values(), adapter(other).values(), strict=True))
    digests = {frontier(each, Distance(each), (1,)).adapter for each in (model, other, copy.deepcopy(model))}
    assert len(digests) == 2


def test_a_packed_adapter_has_alphas_only(tmp_path):
    """It cannot be changed, and says so; its α can."""
    tuned().save_pretrained(tmp_path / "adapter")
    compress(tmp_path / "adapter", tmp_path / "packed", values="exact")
    model = PeftModel.from_pretrained(tiny(num_hidden_layers=1), tmp_path / "packed")
    found = frontier(model, Distance(model), (0, 0.5, 1))
    assert found.points == frontier(tuned(), Distance(model), (0, 0.5, 1)).points
    with pytest.raises(IsolateError, match="inference"):
        frontier(model, Distance(model), (1,), changes={prune: (10,)})


def test_saved_and_loaded(tmp_path):
    """Equal, with the functions given again; without them only α can be set."""
    model = tuned()
    found = frontier(model, Distance(model), (0.5, 1), changes={prune: (None, 10), half_reset: (None, 0.5)})
    found.save(tmp_path / "deep" / "frontier.json")
    loaded = Frontier.load(tmp_path / "deep" / "frontier.json")
    assert loaded == found
    assert loaded.to_dict() == found.to_dict()
    assert loaded.report(model, Distance(model), found.points[0]) == found.points[0]
    with pytest.raises(IsolateError, match=r"prune=10, .*Frontier\.load\(path, changes=\[prune\]\)"):
        loaded.apply(model, found.points[-1])
    with pytest.raises(IsolateError, match="there is no such file; pass the path of a saved frontier"):
        Frontier.load(tmp_path / "frontier.json")
    with pytest.raises(FormatError, match="it is a folder"):
        Frontier.load(tmp_path)
    with pytest.raises(IsolateError, match=r"give a list of functions, such as \[half_reset, prune\]"):
        Frontier.load(tmp_path / "deep" / "frontier.json", changes=prune)
    whole = Frontier.load(tmp_path / "deep" / "frontier.json", changes=[half_reset, prune])
    assert whole.report(model, Distance(model), found.points[-1]) == found.points[-1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.update(format="peft_isolate.search"),
        lambda content: content.update(version=2),
        lambda content: content.update(points=[]),
        lambda content: content.update(adapter=None),
        lambda content: content.pop("adapter_name"),
        lambda content: content["points"][0].update(speciality=None),
        lambda content: content["points"][0].update(alpha=True),
        lambda content: content["points"][0].update(versatility=float("nan")),
        lambda content: content["points"][0].update(changes={"other": 1}),
        lambda content: content["points"][0].update(changes={"prune": [1]}),
        lambda content: content["points"][0].update(changes=[["prune", 1]]),
        lambda content: content["points"][0].update(extra=1),
        lambda content: content["points"][0].pop("alpha"),
        lambda content: content["points"].append(content["points"][0] | {"speciality": 0.3}),
    ],
)
def test_damaged_files(damage, tmp_path):
    path = tmp_path / "frontier.json"
    Frontier((Point(0.0, {"prune": None}, 0.1, 0.2), Point(0.0, {"prune": 1}, 0.1, 0.2)), "digest").save(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match="no saved frontier, or was damaged"):
        Frontier.load(path)
    path.write_text("[" * 100000)
    with pytest.raises(FormatError):
        Frontier.load(path)


def test_points_next_to_each_other_are_two(tmp_path):
    """However alike they look when they are printed."""
    changes = [{"prune": 1}, {"prune": 1.0}, {"prune": True}, {"prune": "1"}]
    points = [Point(alpha, each, 0.1, 0.2) for alpha in (0.3, 0.1 + 0.2) for each in changes]
    found = Frontier(tuple(points), "digest")
    found.save(tmp_path / "frontier.json")
    assert Frontier.load(tmp_path / "frontier.json") == found


def test_the_scorers_of_this_library():
    """`Scores` of held-out losses, on the whole way: measure, choose, report, apply."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "examples" / "demo" / "base")
    rows = [{"text": f"def f{i}(x):\n    return x + {i}\n"} for i in range(4)]
    score = Scores(HeldOutLoss(rows[:2], tokenizer, name="new"), HeldOutLoss(rows[2:], tokenizer, name="old"))
    model = tuned(vocab_size=len(tokenizer))
    found = frontier(model, score, (0, 1), changes={prune: (None, 50)})
    best = found.best(versatility=min(point.versatility for point in found.points))
    assert found.report(model, score, best) == best


def test_the_picture(tmp_path):
    """Drawn whole, or refused by its ending before."""
    pytest.importorskip("matplotlib")
    model = tuned()
    found = frontier(model, Distance(model), (1, 0, 0.5), changes={prune: (None, *range(1, 9))})
    found.plot(tmp_path / "new" / "frontier.png")
    assert (tmp_path / "new" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    found.plot(tmp_path / "frontier.svg")
    assert "<svg" in (tmp_path / "frontier.svg").read_text()
    points((0.5, 0.1, 0.1)).plot(tmp_path / "one.pdf")
    names = ["_mine 1", "_mine $a{$"]
    Frontier(tuple(Point(1.0, dict([name.split()]), 0.0, 0.0) for name in names), "").plot(tmp_path / "named.svg")
    drawn = (tmp_path / "named.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn for name in names), "every setting is in the legend, as it is called"
    with pytest.raises(IsolateError, match="writes no 'doc'"):
        found.plot(tmp_path / "frontier.doc")
    assert not (tmp_path / "frontier.doc").exists()


def test_what_is_drawn():
    """A pair of lines a setting, by α, however the points were ordered."""
    from peft_isolate.evaluation.frontier_plot import _lines

    found = Frontier(
        tuple(Point(alpha, {"a": value, "b": None}, 0.0, 0.0) for value in (None, 0, 2) for alpha in (1, 0, 0.5)), ""
    )
    assert {name: [p.alpha for p in of_name] for name, of_name in _lines(found).items()} == {
        "unchanged": [0, 0.5, 1],
        "a 0": [0, 0.5, 1],
        "a 2": [0, 0.5, 1],
    }


def test_bases_stay_the_base():
    """No number of W0 is ever written."""
    model = tuned()
    before = base(model)
    found = frontier(model, Distance(model), (0.5,), changes={half_reset: (1.0,)})
    found.apply(model, found.points[0])
    assert_same(base(model), before)
    assert torch.equal(logits(model), logits(tiny(num_hidden_layers=1)))


def test_the_example_runs():
    module = importlib.import_module("peft_isolate.evaluation.frontier")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert doctest.testmod(module).failed == 0
