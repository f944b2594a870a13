"""What HFT does between rounds: `next_round` holds what was learned and draws anew; `half_reset` puts a part back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from trl.trainer.utils import use_adapter

from peft_isolate import HalfFTConfig, half_reset, next_round, plan
from peft_isolate.deltas import DeltaLayer
from peft_isolate.deltas.adapters import parameter_deltas, regions_of
from peft_isolate.errors import IsolateError, RegionError
from peft_isolate.regions import Region
from tests.compare import adapter, assert_same, base, bits, logits
from tests.given import GivenConfig
from tests.learn import dense, filled, held, learn, learning
from tests.models import tiny

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}") for message in ("the adapter will take", "Already following")
]

DTYPES = (torch.float32, torch.bfloat16)
# Whole matrices; q learns while k is held inside one tensor, as rows, columns, and rows of every head; 3-D experts.
ARCHITECTURES = ("llama", "phi3", "gpt2", "gpt_neox", "mixtral")


def after_a_round(architecture: str = "llama", dtype: torch.dtype = torch.float32, **config) -> PeftModel:
    """A model that has learned one half and now trains the next."""
    model = learn(get_peft_model(tiny(architecture, dtype), HalfFTConfig(**config)))
    next_round(model)
    return model


def on(region: Region, numbers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The numbers that lie in the region."""
    return {name: numbers[name][selection.mask()] for name, selection in region.items() if name in numbers}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounds_hold_what_was_learned_and_go_on(architecture, dtype):
    """Three rounds: nothing moves when a round begins; then the new half moves, and nothing else does.

    AdamW with weight decay and clipping: had the numbers that are held any gradient or any decay, they would move.
    """
    untouched = dict(tiny(architecture, dtype).named_parameters())
    model = learn(get_peft_model(tiny(architecture, dtype), HalfFTConfig()))
    support = regions_of(model, "default")[0]
    overlapped = 0
    for round_index in (1, 2):
        before, learned = logits(model), dense(model)
        trained = next_round(model)
        assert torch.equal(logits(model), before)
        now = dense(model)
        assert_same({name: now[name] for name in learned}, learned)
        assert not any(now[name].any() for name in now.keys() - learned.keys())

        assert trained == plan(tiny(architecture, dtype), HalfFTConfig(round_index=round_index)).region
        assert regions_of(model, "default") == (trained, support - trained)
        assert model.peft_config["default"].round_index == round_index
        assert plan(model, model.peft_config["default"]).region == trained
        assert learning(model) == {name for name, _ in model.named_parameters() if name.endswith(".default.delta")}

        learn(model, seed=round_index)
        moved = dense(model)
        assert_same(on(support - trained, moved), on(support - trained, learned))
        both = support & trained
        overlapped += both.count
        then = on(both, learned)
        assert all((numbers != then[name]).any() for name, numbers in on(both, moved).items())
        assert_same(base(model), untouched)
        grown = support | trained
        assert round_index > 1 or grown.count > support.count
        support = grown
    assert overlapped, "halves that overlap nowhere would test nothing"

    adapted = logits(model)
    assert not torch.equal(adapted, before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny(architecture, dtype)))
    model.merge_adapter()
    assert torch.equal(logits(model), adapted)
    model.unmerge_adapter()
    assert_same(base(model), untouched)
    assert torch.equal(logits(model), adapted)
    assert torch.equal(logits(model.merge_and_unload()), adapted)


@pytest.mark.parametrize("architecture", ["phi3", "gpt2", "gpt_neox"])
def test_one_tensor_learns_and_holds(architecture):
    """In a fused q, k, v the one learns and the other is held; both are there in the same delta."""
    deltas = parameter_deltas(after_a_round(architecture), "default")
    both = [delta for delta in deltas.values() if len(delta.places) == 2]
    assert both
    for delta in both:
        assert (delta.selection("delta") & delta.selection("held")).count == 0
        assert delta.held.any()


def test_where_halves_overlap_the_same_number_goes_on():
    """One step of plain gradient descent in the new round begins where the last one ended, not at zero."""
    model = learn(get_peft_model(tiny(), HalfFTConfig()))
    before = dense(model)
    shared = regions_of(model, "default")[0] & next_round(model)
    assert shared.count
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    for name, numbers in on(shared, dense(model)).items():
        torch.testing.assert_close(numbers, on(shared, before)[name] - 0.5, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_a_half_that_has_nothing_of_the_first_tensor_begins_at_zero(seed):
    """A delta that only holds has no trained numbers to take a dtype from: drawing a new tensor then failed, after
    the config had been changed.
    """
    model = get_peft_model(tiny(dtype=torch.bfloat16), HalfFTConfig(seed=seed))
    for _ in range(6):
        before = logits(filled(model))
        next_round(model)
        assert torch.equal(logits(model), before)
    assert {p.dtype for p in adapter(model).values()} == {torch.float32}


def test_an_earlier_round_comes_back_with_its_numbers():
    """Its half learns again; what the later round taught the rest is held."""
    model = learn(get_peft_model(tiny(), HalfFTConfig()))
    first = regions_of(model, "default")[0]
    second = next_round(model)
    learn(model, seed=7)
    before, numbers = logits(model), dense(model)
    assert next_round(model, round_index=0) == first
    assert regions_of(model, "default") == (first, second - first)
    assert torch.equal(logits(model), before)
    assert_same(dense(model), numbers)
    assert next_round(model) == second, "the one after the last"


def test_the_same_round_again_changes_nothing():
    model = learn(get_peft_model(tiny(), HalfFTConfig()))
    before = adapter(model)
    first = regions_of(model, "default")
    next_round(model, round_index=0)
    assert regions_of(model, "default") == first
    assert_same(adapter(model), before)


def test_an_optimizer_of_the_last_round_trains_nothing_any_more():
    """The adapter has new parameters: a trainer made before the call would otherwise move what is held."""
    model = learn(get_peft_model(tiny(), HalfFTConfig()))
    last = [parameter for parameter in model.parameters() if parameter.requires_grad]
    old = torch.optim.AdamW(last, lr=0.1)
    next_round(model)
    before = adapter(model)
    for parameter in last:
        parameter.grad = torch.ones_like(parameter)
    old.step()
    assert_same(adapter(model), before)


def _ref(model: PeftModel) -> PeftModel:
    """What TRL's trainers do with a trained adapter."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    return model


def _used(model: PeftModel) -> PeftModel:
    for name in (None, "ref", "default"):
        with use_adapter(model, name):
            logits(model)
    return model


def _disabled(model: PeftModel) -> PeftModel:
    with model.disable_adapter():
        logits(model)
    return model


def _reenabled(model: PeftModel) -> PeftModel:
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    return model


def _activated(model: PeftModel) -> PeftModel:
    model.set_adapter("default")
    return model


def _there_and_back(model: PeftModel) -> PeftModel:
    model.add_adapter("other", HalfFTConfig(seed=5))
    model.set_adapter("other")
    model.set_adapter("default")
    return model


def _deleted(model: PeftModel) -> PeftModel:
    model.add_adapter("other", HalfFTConfig(seed=5))
    model.set_adapter("other")
    model.delete_adapter("other")
    model.set_adapter("default")
    return model


def _merged(model: PeftModel) -> PeftModel:
    model.merge_adapter()
    model.unmerge_adapter()
    return model


def _asked(model: PeftModel) -> PeftModel:
    model.set_requires_grad("default", requires_grad=False)
    model.set_requires_grad("default", requires_grad=True)
    return model


DOORS = {
    "set_adapter": _activated,
    "set_adapter there and back": _there_and_back,
    "disable_adapter": _disabled,
    "enable_adapter_layers": _reenabled,
    "set_requires_grad": _asked,
    "ref": _ref,
    "use_adapter": lambda model: _used(_ref(model)),
    "delete_adapter": _deleted,
    "merge and unmerge": _merged,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "train and eval": lambda model: model.train().eval(),
    "to": lambda model: model.to(torch.float64).to(torch.float32),
}


@pytest.mark.parametrize("door", DOORS)
def test_what_is_held_stays_through_every_door(door):
    """PEFT makes every parameter of an adapter trainable in a dozen places; then AdamW's decay alone would move it."""
    model = after_a_round()
    expected, kept = logits(model), held(model)
    assert kept
    assert all(numbers.any() for numbers in kept.values())
    model = DOORS[door](model)
    assert torch.equal(logits(model), expected)
    assert_same(held(model), kept)
    names = learning(model)
    assert names == {name for name in names if name.endswith(".default.delta")}
    assert len(names) == len(regions_of(model, "default")[0])
    learn(model)
    assert_same(held(model), kept)
    assert not torch.equal(logits(model), expected)
    if door in ("ref", "use_adapter"):
        assert_same(held(model, "ref"), kept)
        model.set_adapter("ref")
        assert torch.equal(logits(model), expected)
        assert not any(name.endswith(".held") for name in learning(model))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_a_round_is_saved_and_goes_on(architecture, dtype, tmp_path):
    """Loaded in every way it is the same model, with the same held numbers, and the next round is the same, too."""
    model = learn(after_a_round(architecture, dtype), seed=1)
    expected, kept = logits(model), held(model)
    model.save_pretrained(tmp_path)
    for trainable in (True, False):
        for low_cpu_mem_usage in (True, False):
            loaded = PeftModel.from_pretrained(
                tiny(architecture, dtype), tmp_path, is_trainable=trainable, low_cpu_mem_usage=low_cpu_mem_usage
            )
            assert torch.equal(logits(loaded), expected)
            assert_same(adapter(loaded), adapter(model))
            assert learning(loaded) == (learning(model) if trainable else set())
            assert regions_of(loaded, "default") == regions_of(model, "default")
            if trainable:
                assert_same(held(learn(copy.deepcopy(loaded))), kept)
            # Another round begins with what learns, also on an adapter that was loaded to be used.
            again = copy.deepcopy(model)
            assert next_round(loaded) == next_round(again)
            assert learning(loaded) == learning(again)
            assert_same(adapter(learn(loaded, seed=2)), adapter(learn(again, seed=2)))


def test_a_loaded_round_takes_the_numbers_of_another_run(tmp_path):
    """load_adapter into an adapter that is there: the held numbers are replaced and stay frozen."""
    model = after_a_round()
    other = after_a_round()
    filled(other, seed=3).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same(adapter(model), adapter(other))
    kept = held(model)
    assert_same(held(learn(model)), kept)


def test_another_adapter_keeps_its_numbers_and_stays_active():
    model = learn(get_peft_model(tiny(), HalfFTConfig()))
    model.add_adapter("b", HalfFTConfig(seed=3))
    filled(model, "b")
    model.set_adapter("b")
    kept, expected = adapter(model, "b"), logits(model)
    next_round(model)
    assert model.active_adapters == ["b"]
    assert torch.equal(logits(model), expected)
    assert_same(adapter(model, "b"), kept)
    assert all(".b." in name for name in learning(model))


def test_the_order_of_adapters_and_their_scale_are_those_of_before():
    """A layer that the new half touches first has the same order and the same α as all the others.

    Three numbers summed in another order round to another sum: in some layers only, and other than after a reload.
    """
    model = filled(get_peft_model(tiny(), HalfFTConfig()))
    for name in "bc":
        model.add_adapter(name, HalfFTConfig(fraction=1.0))
        filled(model, name)
    layers = [module for module in model.modules() if isinstance(module, DeltaLayer)]
    for layer in layers:
        layer.set_scale("default", 0.5)
    model.base_model.set_adapter(["default", "b", "c"])
    before = logits(model)
    assert any("default" not in layer.scaling for layer in layers)
    next_round(model)
    assert torch.equal(logits(model), before)
    for layer in layers:
        assert list(layer.scaling) == [name for name in ("default", "b", "c") if name in layer.scaling]
        assert layer.scaling.get("default", 0.5) == 0.5


def test_modules_to_save_and_new_tokens_go_on_learning():
    """They are PEFT's own and know no rounds: same numbers, still trained."""
    config = HalfFTConfig(modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [5, 6]})
    model = learn(get_peft_model(tiny(), config))
    beside = {name for name in learning(model) if "halfft_" not in name}
    assert len(beside) == 2
    before = logits(model)
    next_round(model)
    assert torch.equal(logits(model), before)
    assert {name for name in learning(model) if "halfft_" not in name} == beside


def test_deltas_of_the_bases_dtype_keep_it():
    model = get_peft_model(tiny(dtype=torch.bfloat16), HalfFTConfig(), autocast_adapter_dtype=False)
    before = logits(filled(model))
    next_round(model)
    assert torch.equal(logits(model), before)
    assert {p.dtype for p in adapter(model).values()} == {torch.bfloat16}


def test_rounds_among_target_modules_and_embeddings():
    for config in (
        HalfFTConfig(target_modules=["q_proj", "v_proj"]),
        HalfFTConfig(train_embeddings="input"),
        HalfFTConfig(fraction=1.0),
        HalfFTConfig(granularity="layer"),
        HalfFTConfig(train_bias=False),
    ):
        model = learn(get_peft_model(tiny("qwen2"), config))
        before = logits(model)
        next_round(model)
        assert torch.equal(logits(model), before), config
        kept = held(model)
        assert_same(held(learn(model)), kept)


def _merged_model() -> nn.Module:
    model = filled(get_peft_model(tiny(), HalfFTConfig()))
    model.merge_adapter()
    return model


REFUSED = {
    "merged": (_merged_model, {}, "are merged.*unmerge_adapter"),
    "not a PeftModel": (tiny, {}, "LlamaForCausalLM is no PeftModel with an adapter of this library: wrap it"),
    "another library's": (
        lambda: get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])), {}, "is no PeftModel with an adapter",
    ),
    "another method's": (lambda: get_peft_model(tiny(), GivenConfig()), {}, "is an adapter of GivenConfig, which"),
    "a typo": (
        lambda: get_peft_model(tiny(), HalfFTConfig()), {"adapter_name": "typo"},
        r"the model has no adapter 'typo': it has \['default'\]",
    ),
    "a negative round": (
        lambda: get_peft_model(tiny(), HalfFTConfig()), {"round_index": -1}, "round_index=-1 must be a whole number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_next_round_is_refused_and_left_as_it_is(case):
    make, arguments, message = REFUSED[case]
    model = make()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    configs = copy.deepcopy(getattr(model, "peft_config", None))
    expected, names = logits(model), learning(model)
    with pytest.raises(IsolateError, match=message):
        next_round(model, **arguments)
    assert_same(model.state_dict(), state)
    assert getattr(model, "peft_config", None) == configs
    assert learning(model) == names
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_half_reset_puts_the_drawn_part_of_an_adapter_back(architecture):
    """Exactly that part is zero, also of what is held; every other number keeps its bits."""
    model = filled(after_a_round(architecture))
    before, expected = dense(model), logits(model)
    reset = half_reset(model, seed=2)
    support = regions_of(model, "default")[0] | regions_of(model, "default")[1]
    assert reset - support == Region()
    assert 0.3 < reset.count / support.count < 0.7
    assert (reset & regions_of(model, "default")[1]).count
    for name, numbers in dense(model).items():
        part = reset[name].mask() if name in reset else torch.zeros_like(numbers, dtype=torch.bool)
        assert not numbers[part].any()
        assert torch.equal(bits(numbers[~part]), bits(before[name][~part]))
    assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_half_reset_puts_a_tuned_model_half_back_to_its_base(architecture, dtype):
    """The drawn part has the base's bits, the rest the tuned model's; the base is left alone."""
    start, tuned = tiny(architecture, dtype), tiny(architecture, dtype, seed=1)
    before = {name: parameter.detach().clone() for name, parameter in tuned.named_parameters()}
    reset = half_reset(tuned, base=start)
    assert_same(dict(start.named_parameters()), dict(tiny(architecture, dtype).named_parameters()))
    assert 0.3 < reset.fraction(tuned) < 0.7
    for name, parameter in tuned.named_parameters():
        part = reset[name].mask() if name in reset else torch.zeros(parameter.shape, dtype=torch.bool)
        assert torch.equal(bits(parameter[part]), bits(start.get_parameter(name)[part])), name
        assert torch.equal(bits(parameter[~part]), bits(before[name][~part])), name
    assert not torch.equal(logits(tuned), logits(tiny(architecture, dtype, seed=1)))


def test_half_reset_reaches_weights_of_any_strides():
    start, tuned = tiny(), tiny(seed=1)
    for layer in tuned.model.layers:
        for weight in (layer.mlp.up_proj.weight, layer.self_attn.q_proj.weight):
            weight.data = weight.data.T.contiguous().T
    reset = half_reset(tuned, fraction=1.0, base=start)
    assert reset == half_reset(tiny(seed=1), fraction=1.0, base=start)
    assert_same(dict(tuned.model.layers.named_parameters()), dict(start.model.layers.named_parameters()))


def test_half_reset_of_a_model_that_is_not_all_here_changes_nothing():
    start, tuned = tiny(), tiny(seed=1)
    start.model.layers[2].to("meta")
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    with pytest.raises(IsolateError, match="quantised, sharded or offloaded in one of the two models"):
        half_reset(tuned, fraction=1.0, base=start)
    assert_same(tuned.state_dict(), before)


def test_a_round_does_not_begin_while_adapters_are_disabled():
    """Layers that are new to the adapter would be enabled beside disabled ones."""
    model = filled(get_peft_model(tiny(), HalfFTConfig()))
    before = dense(model)
    model.base_model.disable_adapter_layers()
    with pytest.raises(IsolateError, match=r"adapters are disabled.*enable_adapter_layers\(\) first"):
        next_round(model)
    assert_same(dense(model), before)


@settings(max_examples=12, deadline=None)
@given(fraction=st.floats(0.05, 1.0), seed=st.integers(0, 2**31))
def test_half_reset_keeps_its_promise_for_any_share_and_seed(fraction, seed):
    """On an adapter by elements, drawn as blocks of rows: some of a tensor's elements go, the others stay."""
    config = GivenConfig(kind="elements", share=0.2)
    model = filled(get_peft_model(tiny("phi3", num_hidden_layers=1), config))
    before = dense(model)
    reset = half_reset(model, fraction=fraction, seed=seed)
    again = filled(get_peft_model(tiny("phi3", num_hidden_layers=1), GivenConfig(kind="elements", share=0.2)))
    assert half_reset(again, fraction=fraction, seed=seed) == reset
    trained, _ = regions_of(model, "default")
    assert reset - trained == Region()
    if fraction == 1.0:
        assert reset == trained
    for name, numbers in dense(model).items():
        wanted = before[name].clone()
        if name in reset:
            wanted[reset[name].mask()] = 0.0
        assert torch.equal(numbers, wanted)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (tiny, {}, "LlamaForCausalLM is no PeftModel"),
        (_merged_model, {}, r"'default' is merged: unmerge_adapter\(\) first"),
        (lambda: get_peft_model(tiny(), HalfFTConfig()), {"base": tiny()}, "an adapter and a base: leave out base="),
        (
            lambda: get_peft_model(tiny(), HalfFTConfig()),
            {"adapter_name": "typo"},
            r"no adapter 'typo'.*\['default'\]",
        ),
        (tiny, {"base": tiny(), "fraction": 0.0}, r"fraction=0\.0 is no share"),
        (tiny, {"base": tiny("gpt2")}, "another model|is not in|in this model"),
        (tiny, {"base": tiny(intermediate_size=64)}, r"shape \(48, 32\) in the region and \(64, 32\) in this model"),
    ],
)
def test_what_cannot_be_reset_is_refused_and_left_as_it_is(make, arguments, message):
    model = make()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(IsolateError, match=message) as caught:
        half_reset(model, **arguments)
    assert isinstance(caught.value, RegionError) == ("another" in message or "shape" in message)
    assert_same(model.state_dict(), expected)
