"""A round or a stage that is stopped half-way leaves all as it was; one that begins under inference mode can learn;
an adapter that only holds is not trained in silence.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model

from peft_isolate import CoreIsolationConfig, HalfFTConfig, half_reset, next_round, next_stage
from peft_isolate.deltas import DeltaLayer, DeltaTuner
from peft_isolate.deltas.adapters import layers_of, rearrange, regions_of, tuner_of
from peft_isolate.deltas.delta import Delta
from peft_isolate.regions import Region
from tests.compare import adapter, assert_same, bits, logits
from tests.learn import dense, filled, learn, learning
from tests.methods.test_core_isolation import some
from tests.models import tiny
from tests.texts import sft_rows, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take")

NOTHING = "nothing learns in this training: all that the adapter 'default' has is held"


def core_of_some_layers() -> Region:
    """A stage around another core has more modules than this one, and biases of modules that this one has."""
    names = [name for name in some(tiny("qwen2")) if ("layers.1." in name or "q_proj" in name) and "bias" not in name]
    return some(tiny("qwen2"), 0.3, names=names)


METHODS = {
    "next_stage": (
        lambda: CoreIsolationConfig(train="core", core=core_of_some_layers()),
        lambda model: next_stage(model, frozen=some(tiny("qwen2"), 0.1, seed=1)),
    ),
    "next_round": (lambda: HalfFTConfig(), next_round),
    "add_weighted_adapter": (
        lambda: CoreIsolationConfig(train="core", core=core_of_some_layers()),
        lambda model: model.base_model.add_weighted_adapter(["default", "default"], [0.5, 2.0], "sum"),
    ),
}
ADAPTERS = ("one", "two", "two, of which the other is active")


def trained(method: str, adapters: str) -> PeftModel:
    """A model that has learned, and has as many adapters; that of its first layers has an α of its own."""
    torch.manual_seed(0)
    model = learn(get_peft_model(tiny("qwen2"), METHODS[method][0]()))
    for layer in layers_of(model).values():
        layer.set_scale("default", 0.5)
    if adapters != "one":
        config = HalfFTConfig(seed=3) if method == "next_round" else CoreIsolationConfig(target_modules=["up_proj"])
        model.add_adapter("b", config)
        filled(model, "b")
        model.base_model.set_adapter("b" if "other" in adapters else ["default", "b"])
    return model


def state(model: PeftModel) -> dict:
    """All that a stopped call could have left otherwise: the very parameters, not equal ones, among it."""
    tuner = tuner_of(model)
    return {
        "parameters": [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        "numbers": [bits(p).tolist() for p in model.parameters()],
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "layers": {
            name: (list(layer.scaling.items()), layer.adapter_layer_names, layer.active_adapters)
            for name, layer in layers_of(model).items()
        },
        "configs": [(name, id(config), copy.deepcopy(config.to_dict())) for name, config in model.peft_config.items()],
        "tuner": (tuner.active_adapter, tuple(tuner.targeted_module_names), tuple(tuner.targeted_parameter_names)),
        "model": (model.active_adapter, {name: regions_of(model, name) for name in model.peft_config}),
    }


def without_identities(found: dict) -> dict:
    """What two models have in common."""
    found = found | {"modules": [name for name, _ in found["modules"]]}
    found["parameters"] = [(name, *rest) for name, _, *rest in found["parameters"]]
    return found | {"configs": [(name, said) for name, _, said in found["configs"]]}


class Stop:
    """Raises `error` in the n-th call of a method, from 1; counts the calls. Before or after the call's own work."""

    def __init__(self, monkeypatch, owner: type, name: str, n: int = 0, error=None, after: bool = False) -> None:
        self.calls, real = 0, getattr(owner, name)

        def call(*args, **kwargs):
            self.calls += 1
            result = real(*args, **kwargs) if after or self.calls != n else None
            if self.calls == n:
                raise error("stopped")
            return result

        monkeypatch.setattr(owner, name, call)


PLACES = {
    "a layer": (DeltaLayer, "update_layer", False),
    "behind a layer": (DeltaLayer, "update_layer", True),
    "a delta": (Delta, "fill", False),
    "behind a delta": (Delta, "fill", True),
    "reading": (Delta, "dense", False),
    "the end of PEFT's part": (DeltaTuner, "_mark_only_adapters_as_trainable", True),
}


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_stopped_leaves_all_as_it_was(method, place, adapters, monkeypatch):
    """At the first, second, middle and last call: the same modules, parameters, configs and logits, and an optimizer
    of them goes on; then the same call does what it does on a model that nothing has happened to.
    """
    owner, name, after = PLACES[place]
    model, begin = trained(method, adapters), METHODS[method][1]
    untouched = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        count = Stop(patch, owner, name)
        begin(copy.deepcopy(model))
    assert count.calls > 0
    expected, before = bits(logits(model)), state(model)
    for turn, n in enumerate(sorted({1, 2, (count.calls + 1) // 2, count.calls} & set(range(1, count.calls + 1)))):
        error = (MemoryError, KeyboardInterrupt)[turn % 2]
        with monkeypatch.context() as patch:
            Stop(patch, owner, name, n, error, after)
            with pytest.raises(error, match="stopped"):
                begin(model)
        assert state(model) == before, n
        assert torch.equal(bits(logits(model)), expected), n
    wanted = begin(untouched)
    assert begin(model) == wanted
    assert without_identities(state(model)) == without_identities(state(untouched))
    assert torch.equal(bits(logits(model)), bits(logits(untouched)))
    if method != "add_weighted_adapter":
        assert torch.equal(bits(logits(model)), expected)
        assert any(id(p) != was for (_, was, *_), p in zip(before["parameters"], model.parameters(), strict=False))
    assert_same(adapter(learn(model)), adapter(learn(untouched)))


@pytest.mark.parametrize("method", ["next_stage", "next_round"])
def test_an_optimizer_goes_on_after_a_stopped_call(method, monkeypatch):
    """Its parameters are the adapter's still."""
    model, begin = trained(method, "one"), METHODS[method][1]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    with monkeypatch.context() as patch:
        Stop(patch, Delta, "fill", 3, MemoryError)
        with pytest.raises(MemoryError):
            begin(model)
    before = dense(model)
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    optimizer.step()
    assert any(not torch.equal(numbers, before[name]) for name, numbers in dense(model).items())


@pytest.mark.parametrize("place", PLACES)
def test_a_stopped_call_keeps_what_was_switched_by_hand(place, monkeypatch):
    """As after loading for inference nothing learns, and one layer is without its adapters: PEFT's injection sets both
    to what the tuner and the config say.
    """
    owner, name, after = PLACES[place]
    model = trained("next_stage", "two").requires_grad_(False)
    list(layers_of(model).values())[-1].set_adapter([])
    expected, before = bits(logits(model)), state(model)
    with monkeypatch.context() as patch:
        Stop(patch, owner, name, 1, MemoryError, after)
        with pytest.raises(MemoryError):
            METHODS["next_stage"][1](model)
    assert state(model) == before
    assert torch.equal(bits(logits(model)), expected)


def test_a_stopped_call_keeps_what_is_trained_beside(monkeypatch):
    """modules_to_save and new tokens are PEFT's own wrappers: they learn on, with their numbers."""
    beside = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [5, 6]}}
    model = learn(get_peft_model(tiny("qwen2"), HalfFTConfig(**beside)))
    expected, before, learns = bits(logits(model)), state(model), learning(model)
    for owner, name in ((DeltaLayer, "update_layer"), (Delta, "fill")):
        with monkeypatch.context() as patch:
            Stop(patch, owner, name, 4, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                next_round(model)
        assert state(model) == before
        assert learning(model) == learns
        assert torch.equal(bits(logits(model)), expected)


UNDER_INFERENCE = {
    "next_stage": METHODS["next_stage"],
    "next_round": METHODS["next_round"],
    "half_reset": (
        lambda: CoreIsolationConfig(train="core", core=core_of_some_layers()),
        lambda model: half_reset(model, seed=2),
    ),
}


@pytest.mark.parametrize("method", UNDER_INFERENCE)
def test_what_begins_under_inference_mode_can_be_trained(method):
    """Neither a parameter nor anything that a backward needs was made as one that has no gradient."""
    config, begin = UNDER_INFERENCE[method]
    model = learn(get_peft_model(tiny("qwen2"), config()))
    # As it comes from a file: which elements its deltas have has not been decoded yet.
    for delta in (module for module in model.modules() if isinstance(module, Delta)):
        for where in delta._where.values():
            where.forget()
    usual = copy.deepcopy(model)
    wanted = begin(usual)
    with torch.inference_mode():
        assert begin(model) == wanted
        assert torch.is_inference_mode_enabled()
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    assert_same(adapter(model), adapter(usual))
    assert_same(adapter(learn(model)), adapter(learn(usual)))


def test_no_gradients_are_followed_where_nobody_asked():
    """The guard against inference mode switches gradients on; under no_grad they stay off for all that is filled."""
    model = learn(get_peft_model(tiny("qwen2"), HalfFTConfig()))
    with torch.no_grad():
        next_round(model)
        half_reset(model)
        assert not torch.is_grad_enabled()
    assert all(parameter.is_leaf and parameter.grad_fn is None for parameter in model.parameters())


# ------------------------------------------------------------------------------------- an adapter that only holds


def only_holding(folder, **config) -> None:
    """An adapter as `fuse` writes it: everything is held, nothing learns."""
    model = filled(get_peft_model(tiny(), CoreIsolationConfig(**config)))
    rearrange(tuner_of(model), "default", Region(), regions_of(model, "default")[0])
    assert not any("_isolation_" in name for name in learning(model))
    model.save_pretrained(folder)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_training_that_changes_nothing_does_not_begin_in_silence(trainable, tmp_path):
    """To load the adapter is right, since next_stage comes after that: only who begins to train without it is told."""
    only_holding(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=trainable)
        model.eval()
        logits(model)
    with pytest.warns(UserWarning, match=rf"{NOTHING}.*next_stage\(model, frozen=…\).*trainer after that") as told:
        model.train()
    assert all(module.training for module in model.modules())
    assert [warning.filename for warning in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.eval()
        next_stage(model, frozen=some(tiny()))
        model.train()
    assert learning(model)


def test_a_trainer_of_an_adapter_that_only_holds_says_so(tmp_path):
    """TRL makes the embedding's output follow gradients, so that without any parameter it runs to its end."""
    only_holding(tmp_path / "held")
    for trainable in (True, False):
        trainer = trl.SFTTrainer(
            model=PeftModel.from_pretrained(tiny(), tmp_path / "held", is_trainable=trainable),
            args=trl.SFTConfig(
                output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, bf16=False, save_strategy="no"
            ),
            train_dataset=Dataset.from_list(sft_rows()),
            processing_class=tokenizer(),
        )
        with pytest.warns(UserWarning, match=NOTHING):
            trainer.train()


def test_who_has_something_that_learns_is_told_nothing(tmp_path):
    """Beside what is held, in another adapter, or an adapter for inference that could learn."""
    only_holding(tmp_path / "beside", modules_to_save=["lm_head"])
    only_holding(tmp_path / "held")
    filled(get_peft_model(tiny(), HalfFTConfig())).save_pretrained(tmp_path / "half")
    two = PeftModel.from_pretrained(tiny(), tmp_path / "held", is_trainable=True)
    two.add_adapter("b", CoreIsolationConfig())
    two.set_adapter("b")
    models = [
        PeftModel.from_pretrained(tiny(), tmp_path / "beside", is_trainable=True),
        two,
        PeftModel.from_pretrained(tiny(), tmp_path / "half"),
        PeftModel.from_pretrained(tiny(), tmp_path / "half", is_trainable=True),
    ]
    for model in models:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.train()
    two.base_model.set_adapter("default", inference_mode=True)
    with pytest.warns(UserWarning, match=NOTHING):
        two.train()
