"""`set_scale`: the model computes with `W0 + α·Δ`, exactly at 0 and 1, and everywhere as it is merged."""

from __future__ import annotations

import copy
import doctest
import fractions
import importlib
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_isolate import CoFiTuneConfig, HalfFTConfig, compress, merge, next_round
from peft_isolate.deltas import DeltaLayer
from peft_isolate.deltas.adapters import layers_of, parameter_deltas
from peft_isolate.deltas.scale import set_scale
from peft_isolate.errors import IsolateError
from tests.checkpoints.folders import load, saved, trained
from tests.compare import adapter, assert_same, base, bits, logits
from tests.given import GivenConfig
from tests.importances import importance
from tests.learn import filled, learn
from tests.models import tiny, tokens

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}") for message in ("the adapter will take", "Could not find a config")
]

DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("rows", "columns", "elements", "all_but", "whole")
CONFIGS = {
    **{kind: lambda kind=kind: GivenConfig(kind=kind) for kind in KINDS},
    "half_ft": HalfFTConfig,
    "soft mask": lambda: CoFiTuneConfig(layer_range=(0, 1), modules="MHA+FFN", importance=importance("llama")),
}


def tuned(config=None, dtype: torch.dtype = torch.float32, architecture: str = "llama") -> PeftModel:
    """A model with an adapter of random numbers."""
    return filled(get_peft_model(tiny(architecture, dtype), HalfFTConfig() if config is None else config))


def composed(model: PeftModel) -> dict[str, torch.Tensor]:
    """{parameter of the base that has a delta: the weight the model computes with}."""
    return {
        f"{name}.{parameter}": getattr(layer, parameter).detach().clone()
        for name, layer in layers_of(model.get_base_model()).items()
        for parameter in layer.parameter_names
    }


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(bits(left), bits(right))


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in CONFIGS), ("half_ft", torch.float32)], ids=str
)
def test_exact_at_both_ends_and_as_merged_between(name, dtype, tmp_path):
    """α = 0 is the base and α = 1 the tuned model, bit for bit, also on the way back; any other α has the bits of
    `merge_adapter` and of the file that `merge(scale=α)` writes.
    """
    # The importance is of a model of three layers.
    folder = saved(tmp_path / "base", dtype=dtype, num_hidden_layers=3 if name == "soft mask" else 1)
    trained(folder, CONFIGS[name](), tmp_path / "adapter")
    model = PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    before, numbers, of_base = logits(model), adapter(model), logits(load(folder))
    assert not same(before, of_base)
    for alpha in (0.3, -1.7, 0, 1.0, 0.9):
        set_scale(model, alpha)
        found = logits(model)
        assert same(found, of_base) == (alpha == 0)
        assert same(found, before) == (alpha == 1)
        model.merge_adapter()
        assert same(logits(model), found)
        model.unmerge_adapter()
        assert same(logits(model), found)
    merge(folder, tmp_path / "adapter", out=tmp_path / "merged", scale=0.9)
    assert same(logits(load(tmp_path / "merged")), logits(model))
    assert_same(adapter(model), numbers)
    assert same(logits(model.merge_and_unload()), found)


@settings(deadline=None, max_examples=25)
@given(
    st.floats(-4, 4, allow_subnormal=False),
    st.sampled_from(KINDS),
    st.sampled_from([*DTYPES, torch.float16]),
    st.integers(0, 3),
)
def test_any_alpha_against_a_slow_twin(alpha, kind, dtype, seed):
    """Each composed weight is W0 + α·Δ, written out: Δ dense, one product, one sum, one cast."""
    model = filled(get_peft_model(tiny(dtype=dtype, num_hidden_layers=1), GivenConfig(kind=kind)), seed=seed)
    before = base(model)
    set_scale(model, alpha)
    deltas = parameter_deltas(model, "default")
    found = composed(model)
    assert found.keys() == deltas.keys()
    for name, weight in found.items():
        change = alpha * deltas[name].dense()
        wanted = before[name].clone()
        where = deltas[name].selection().mask()
        if alpha:
            wanted[where] = (before[name].float() + change)[where].to(dtype)
        assert same(weight, wanted)


def test_one_of_several_adapters():
    """At 0 it is as if it were not active, at 1 as if nobody had touched it; the others keep their own α."""
    model = tuned(GivenConfig(kind="rows"))
    model.add_adapter("other", GivenConfig(kind="elements", seed=3))
    filled(model, "other", seed=1)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    set_scale(model, 0.4, "other")
    set_scale(model, 0, "default")
    third = logits(model)
    assert {layer.scaling[name] for layer in layers_of(model).values() for name in ("default",)} == {0.0}
    model.base_model.set_adapter(["other"])
    assert same(logits(model), third)
    model.base_model.set_adapter(["default", "other"])
    set_scale(model, 1, "other")
    set_scale(model, 1, "default")
    assert same(logits(model), both)
    set_scale(model, 0, "other")
    model.base_model.set_adapter(["default"])
    alone = logits(model)
    model.base_model.set_adapter(["default", "other"])
    assert same(logits(model), alone)
    set_scale(model, 0, "default")
    assert same(logits(model), logits(tiny()))


def test_another_adapter_may_be_merged():
    """Merged is only whose numbers are in the weights: the other's α is set, and counts when it joins."""
    model = tuned(GivenConfig(kind="rows"))
    model.add_adapter("other", GivenConfig(kind="elements", seed=3))
    filled(model, "other", seed=1)
    model.base_model.set_adapter(["default", "other"])
    set_scale(model, 0.5, "other")
    wanted = logits(model)
    set_scale(model, 1.0, "other")
    model.merge_adapter(["default"])
    set_scale(model, 0.5, "other")
    model.merge_adapter(["other"])
    assert same(logits(model), wanted)


def test_everywhere_or_nowhere_while_merged():
    """Merged by hand in the last layer alone: no layer's α changes."""
    model = tuned()
    layers = list(layers_of(model).values())
    layers[-1].merge()
    with pytest.raises(IsolateError, match=r"cannot become 0\.5 while the adapter is merged .*unmerge_adapter"):
        set_scale(model, 0.5)
    assert {layer.scaling["default"] for layer in layers} == {1.0}
    layers[-1].unmerge()
    set_scale(model, 0.5)
    assert {layer.scaling["default"] for layer in layers} == {0.5}


@pytest.mark.parametrize(
    "alpha", [float("nan"), float("inf"), True, "1", None, 1j, torch.tensor(0.5), 10**400, [0.5]], ids=repr
)
def test_what_is_no_finite_number_is_refused(alpha):
    model = tuned()
    with pytest.raises(IsolateError, match="use a finite number"):
        set_scale(model, alpha)
    assert {layer.scaling["default"] for layer in layers_of(model).values()} == {1.0}


@pytest.mark.parametrize("alpha", [2, np.float32(0.5), np.float64(0.5), np.int64(3), fractions.Fraction(1, 2)])
def test_any_real_number_will_do(alpha):
    model = tuned()
    set_scale(model, alpha)
    found = {layer.scaling["default"] for layer in layers_of(model).values()}
    assert found == {float(alpha)}
    assert all(type(number) is float for number in found)


def test_models_without_this_adapter_are_refused():
    """Each with what to do instead: of LoRA PEFT's own way."""
    with pytest.raises(IsolateError, match=r"no adapter 'b' of this library: it has \['default'\]"):
        set_scale(tuned(), 0.5, "b")
    with pytest.raises(IsolateError, match="LlamaForCausalLM has no adapter of this library: wrap it"):
        set_scale(tiny(), 0.5)
    with pytest.raises(IsolateError, match="rescale_adapter_scale"):
        set_scale(get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM")), 0.5)
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(IsolateError, match="another PEFT method's Linear"):
        set_scale(get_peft_model(tiny(), ia3), 0.5)
    with pytest.raises(IsolateError, match="None is no model: pass the one that has the adapter 'default'"):
        set_scale(None, 0.5)
    with pytest.raises(IsolateError, match=r"no adapter 'b' of this library: it has \['default'\]"):
        set_scale(tuned(HalfFTConfig(trainable_token_indices=[3])), 0.5, "b")


@pytest.mark.parametrize("config", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}])
def test_what_is_carried_whole_has_no_scale(config):
    """As in `merge`: there is no half of a whole module, and leaving out Δ alone would not be the base."""
    model = tuned(HalfFTConfig(**config))
    before = logits(model)
    for alpha in (0.0, 0.5):
        with pytest.raises(IsolateError, match=rf"whole \(modules_to_save.* has no scale {alpha}: .*disable_adapter"):
            set_scale(model, alpha)
    set_scale(model, 1)
    assert same(logits(model), before)
    model.add_adapter("plain", HalfFTConfig(seed=3))
    set_scale(model, 0.5, "plain")


def test_of_run_time_only(tmp_path):
    """The file has Δ unscaled, and whoever saves it is told; at α = 1 nobody is."""
    model = tuned()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        model.save_pretrained(tmp_path / "one")
    set_scale(model, 0.25)
    with pytest.warns(UserWarning, match=r"without its scale α = 0\.25.*merge\(base") as caught:
        model.save_pretrained(tmp_path / "scaled")
    told = [warning for warning in caught if "without its scale" in str(warning.message)]
    assert [warning.filename for warning in told] == [__file__]
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "scaled")]
    assert files[0] == files[1]
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "scaled")
    set_scale(loaded, 0.25)
    assert same(logits(loaded), logits(model))
    filled(loaded, seed=1)
    loaded.load_adapter(tmp_path / "one", "default")
    assert same(logits(loaded), logits(model)), "loaded over itself an adapter keeps its α"


def test_a_warning_names_every_scale(tmp_path):
    """Where layers were set one by one."""
    model = tuned()
    for number, layer in enumerate(layers_of(model).values()):
        layer.set_scale("default", 0.5 * (number % 3))
    with pytest.warns(UserWarning, match=r"α = 0, 0\.5, 1,"):
        model.save_pretrained(tmp_path)


def test_a_packed_adapter_is_dialled(tmp_path):
    """It has no parameters, and the same α."""
    folder = saved(tmp_path / "base", dtype=torch.bfloat16, num_hidden_layers=1)
    trained(folder, HalfFTConfig(), tmp_path / "adapter")
    compress(tmp_path / "adapter", tmp_path / "packed", values="exact")
    models = [PeftModel.from_pretrained(load(folder), tmp_path / name) for name in ("adapter", "packed")]
    for alpha in (0.7, 0.0):
        for model in models:
            set_scale(model, alpha)
        assert same(logits(models[0]), logits(models[1]))


def test_held_numbers_are_dialled_too():
    """After another round α acts on all that was learned."""
    model = learn(tuned())
    next_round(model)
    learn(model, seed=1)
    set_scale(model, 0.0)
    assert same(logits(model), logits(tiny()))
    set_scale(model, 0.5)
    before = logits(model)
    model.merge_adapter()
    assert same(logits(model), before)


def test_the_gradient_is_that_of_the_scaled_model():
    """Δ's gradient at α is α times that of the weight the model computes with."""
    model = tuned(GivenConfig(kind="whole"))
    set_scale(model, 0.5)
    merged = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    ids = tokens()
    for each in (model, merged):
        each(input_ids=ids, labels=ids).loss.backward()
    weights = dict(merged.named_parameters())
    for name, delta in parameter_deltas(model, "default").items():
        torch.testing.assert_close(delta.delta.grad, 0.5 * weights[name].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_compiled_model_follows():
    """α is read anew after it was set, also by a graph."""
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), GivenConfig(kind="elements", target_modules=["0"]))
    filled(model)
    compiled, x = torch.compile(model, backend="eager"), torch.randn(3, 6)
    found = []
    for alpha in (1.0, 0.5, 0.0, 0.25):
        set_scale(compiled, alpha)
        found.append(compiled(x))
        assert same(found[-1], model(x))
    assert not any(same(found[-1], other) for other in found[:-1])


def test_a_model_that_transformers_wrapped(tmp_path):
    """`model.load_adapter` of transformers makes no PeftModel."""
    model = tuned()
    model.save_pretrained(tmp_path / "adapter")
    tiny().save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    loaded.load_adapter(tmp_path / "adapter")
    assert any(isinstance(module, DeltaLayer) for module in loaded.modules())
    for each in (model, loaded):
        set_scale(each, 0.5)
    assert same(logits(model), logits(loaded))
    with pytest.warns(UserWarning, match="without its scale") as caught:
        loaded.save_pretrained(tmp_path / "again")
    told = [warning for warning in caught if "without its scale" in str(warning.message)]
    assert [warning.filename for warning in told] == [__file__]


def test_the_example_runs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert doctest.testmod(importlib.import_module("peft_isolate.deltas.scale")).failed == 0
