"""A model as it was: the bits it had then, and nothing of it changed by asking."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn

from peft_isolate import CoFiTuneConfig, CoreIsolationConfig, HalfFTConfig, compress, next_round
from peft_isolate.deltas.reference import Reference
from peft_isolate.errors import IsolateError
from tests.compare import adapter, assert_same, bits, logits
from tests.given import GivenConfig
from tests.importances import importance
from tests.learn import filled, learn, learning
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**fields) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.5, **fields)


def second_round() -> PeftModel:
    model = filled(get_peft_model(tiny(), HalfFTConfig()))
    next_round(model)
    return model


def beside_a_trained_one() -> PeftModel:
    """A fresh adapter that learns on top of one that stays as it is."""
    model = filled(get_peft_model(tiny(), HalfFTConfig()))
    model.add_adapter("fresh", HalfFTConfig(seed=1))
    model.base_model.set_adapter(["default", "fresh"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".fresh." in name)
    return model


def trained_lora() -> PeftModel:
    return learn(get_peft_model(tiny(), lora()).train())


def pissa() -> PeftModel:
    """Its base is changed when it begins, and its factors are not zero."""
    return get_peft_model(tiny(), lora(init_lora_weights="pissa"))


CASES = {
    "fresh": lambda: get_peft_model(tiny(), HalfFTConfig()),
    "elements": lambda: get_peft_model(tiny("gpt2"), GivenConfig(kind="elements")),
    "all but": lambda: get_peft_model(tiny("mixtral"), CoreIsolationConfig()),
    "trained": lambda: filled(get_peft_model(tiny(), GivenConfig(kind="rows"))),
    "second round": second_round,
    "beside a trained one": beside_a_trained_one,
    "saved whole": lambda: get_peft_model(tiny(), HalfFTConfig(modules_to_save=["lm_head"])),
    "tokens": lambda: get_peft_model(tiny(), HalfFTConfig(trainable_token_indices=[5, 6])),
    "lora": lambda: get_peft_model(tiny(), lora()),
    "trained lora": trained_lora,
    "dora": lambda: get_peft_model(tiny(), lora(use_dora=True)),
    "pissa": pissa,
    "no adapter": tiny,
}
WITHOUT_COPIES = {"fresh", "elements", "all but", "saved whole", "lora", "beside a trained one"}


@pytest.mark.parametrize("case", CASES)
def test_it_computes_as_it_did(case):
    """Whatever the adapter was when training began, its bits are there again after steps of it, and so are its own."""
    model = CASES[case]()
    before, wanted, flags = adapter(model), logits(model), learning(model)
    reference = Reference.now(model)
    digest = reference.digest()
    learn(model)
    after, trained = {name: p.detach().clone() for name, p in model.named_parameters()}, logits(model)
    assert not torch.equal(bits(trained), bits(wanted))
    for _ in range(2):
        with reference.used(model):
            assert torch.equal(bits(logits(model)), bits(wanted))
            assert learning(model) == flags
        assert torch.equal(bits(logits(model)), bits(trained))
        assert_same({name: p.detach() for name, p in model.named_parameters()}, after)
    assert reference.digest() == digest
    assert (reference.n_bytes == 0) is (case in WITHOUT_COPIES)
    assert case in ("no adapter",) or not before or reference.n_bytes <= sum(t.nbytes for t in before.values()) + 2**12


@pytest.mark.parametrize("case", ["trained", "second round", "beside a trained one", "trained lora"])
def test_the_base_is_the_model_without_any_adapter(case):
    """Bit for bit, and it costs no memory."""
    model = CASES[case]()
    reference = Reference.base(model)
    with model.disable_adapter():
        wanted = logits(model)
    with reference.used(model):
        assert torch.equal(bits(logits(model)), bits(wanted))
    assert not torch.equal(bits(logits(model)), bits(wanted))
    assert reference.n_bytes == 0


def beside_an_adapter(what: str):
    """Models in which something learns that is of no adapter."""
    if what == "biases":
        return get_peft_model(tiny("qwen2"), lora(bias="all"))
    model = get_peft_model(tiny(), lora() if what == "head" else HalfFTConfig())
    {"head": model.base_model.model.lm_head, "embedding": model.base_model.model.model.embed_tokens}[
        what
    ].requires_grad_(True)
    return model


@pytest.mark.parametrize("what", ["biases", "head", "embedding"])
def test_the_base_of_what_learns_beside_an_adapter(what):
    """PEFT's bias="all", or a user's requires_grad_: it is kept."""
    model = beside_an_adapter(what)
    reference, wanted = Reference.base(model), logits(model)
    learn(model)
    with reference.used(model):
        assert torch.equal(bits(logits(model)), bits(wanted))
    assert reference.n_bytes > 0
    assert reference.uncovered(model) is None


def test_what_learns_only_later_is_named():
    """It will not be what it was."""
    model = get_peft_model(tiny(), HalfFTConfig())
    for reference in (Reference.base(model), Reference.now(model)):
        assert reference.uncovered(model) is None
        model.base_model.model.lm_head.requires_grad_(True)
        assert reference.uncovered(model) == "base_model.model.lm_head.weight"
        model.base_model.model.lm_head.requires_grad_(False)
    trained = filled(get_peft_model(tiny(), HalfFTConfig()))
    learns = next(p for p in trained.parameters() if p.requires_grad)
    learns.requires_grad_(False)
    reference = Reference.now(trained)
    learns.requires_grad_(True)
    assert reference.uncovered(trained).endswith(".default.delta")
    assert Reference.base(trained).uncovered(trained) is None


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_that_an_adapter_was_taken_out_of_is_not_at_hand(init):
    """The model as it was is; the base is not."""
    with pytest.raises(IsolateError, match=f"init_lora_weights='{init}'"):
        Reference.base(get_peft_model(tiny(), lora(init_lora_weights=init)))


def test_an_interrupted_exchange_is_taken_back(monkeypatch):
    """Wherever it is interrupted."""
    from peft_isolate.deltas import reference as module

    model = filled(get_peft_model(tiny(), HalfFTConfig()))
    reference = Reference.now(model)
    learn(model)
    wanted, put, calls = logits(model), module._put, []

    def half(numbers):
        calls.append(len(numbers))
        put(numbers[: len(numbers) // 2] if len(calls) == 1 else numbers)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_put", half)
    with pytest.raises(KeyboardInterrupt), reference.used(model):
        pass
    assert len(calls) == 2
    assert torch.equal(bits(logits(model)), bits(wanted))


def test_a_plain_model_is_kept_whole():
    """There is no adapter to leave out."""
    model = tiny()
    assert Reference.base(model).n_bytes == sum(p.nbytes for p in model.parameters())


def test_what_a_user_froze_stays_frozen():
    """PEFT's own switch turns on whatever an active adapter has."""
    model = get_peft_model(tiny(), HalfFTConfig())
    frozen = next(p for p in model.parameters() if p.requires_grad)
    frozen.requires_grad_(False)
    with Reference.now(model).used(model):
        pass
    assert not frozen.requires_grad


@pytest.mark.parametrize("case", ["fresh", "trained", "trained lora"])
def test_an_exception_leaves_the_model_as_it_was(case):
    """Whatever happens inside."""
    model = CASES[case]()
    reference = Reference.now(model)
    learn(model)
    wanted = logits(model)
    with pytest.raises(ZeroDivisionError), reference.used(model):
        raise ZeroDivisionError
    assert torch.equal(bits(logits(model)), bits(wanted))


@pytest.mark.parametrize("case", ["fresh", "trained", "trained lora", "no adapter"])
def test_a_graph_that_is_alive_survives(case):
    """Where nothing is sharded: the new task's loss may wait while the reference computes."""
    model, twin = CASES[case](), CASES[case]()
    twin.load_state_dict(model.state_dict())
    reference = Reference.now(model)
    learn(model.eval(), seed=3)
    learn(twin.eval(), seed=3)
    losses = []
    for one in (model, twin):
        ids = torch.arange(24).reshape(2, 12)
        losses.append(one(input_ids=ids, labels=ids).loss)
    with reference.used(model):
        logits(model)
    for loss in losses:
        loss.backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (theirs[name].grad is None)
        assert parameter.grad is None or torch.equal(parameter.grad, theirs[name].grad)


def test_digests_tell_references_apart():
    """Of other numbers, and of adapters left out or not; equal for models made alike."""
    first, again = (Reference.now(filled(get_peft_model(tiny(), HalfFTConfig()))) for _ in range(2))
    other = Reference.now(filled(get_peft_model(tiny(), HalfFTConfig()), seed=1))
    fresh = Reference.now(get_peft_model(tiny(), HalfFTConfig()))
    elsewhere = Reference.now(get_peft_model(tiny(), HalfFTConfig(seed=1)))
    assert first.digest() == again.digest()
    assert len({one.digest() for one in (first, other, fresh, elsewhere, Reference.base(tiny()))}) == 5


@pytest.mark.parametrize("method", [HalfFTConfig, lora])
def test_it_remembers_what_was_active_and_at_which_scale(method):
    """Another adapter made active, or another α, is not what the model was; nor is one that was added since."""
    model = get_peft_model(tiny(), method())
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    reference, wanted = Reference.now(model), logits(model)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["o_proj"]) if method is lora else HalfFTConfig(seed=1))
    model.set_adapter("b")
    learn(model)
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.5)
    with reference.used(model):
        assert torch.equal(bits(logits(model)), bits(wanted))
    assert model.active_adapters == ["b"]
    model.set_adapter("default")
    assert not torch.equal(bits(logits(model)), bits(wanted))


@pytest.mark.parametrize("made", [trained_lora, tiny], ids=["lora", "no adapter"])
def test_autocast_does_not_remember_other_numbers(made):
    """Its cache knows a parameter, and not that its numbers were exchanged."""
    model = made()
    reference = Reference.now(model)
    learn(model, 6)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        with reference.used(model):
            before = logits(model)
        assert torch.equal(logits(model), wanted)
        with reference.used(model):
            assert torch.equal(logits(model), before)
    assert not torch.equal(before, wanted)


def test_a_digest_sees_the_base_and_frozen_adapters():
    """Of which no copy is kept."""
    digests = {Reference.now(get_peft_model(tiny(seed=seed), HalfFTConfig())).digest() for seed in (0, 1, 0)}
    assert len(digests) == 2

    def stacked(seed):
        model = beside_a_trained_one()
        filled(model, seed=seed)
        return Reference.now(model).digest()

    assert stacked(0) == stacked(0) != stacked(1)


def test_a_wrapped_model_is_the_same_model():
    """DDP and `torch.compile` put something before every name."""
    model = get_peft_model(tiny(), HalfFTConfig())
    reference, wanted = Reference.now(filled(model)), logits(model)
    filled(model, seed=1)
    compiled = torch.compile(model, backend="eager")
    with reference.used(compiled):
        assert torch.equal(bits(logits(model)), bits(wanted))


def test_what_it_cannot_follow_is_refused():
    """With what to do instead."""
    merged = get_peft_model(tiny(), HalfFTConfig())
    reference = Reference.now(merged)
    merged.merge_adapter()
    with pytest.raises(IsolateError, match="unmerge_adapter"):
        Reference.base(merged)
    with pytest.raises(IsolateError, match="unmerge_adapter"), reference.used(merged):
        pass
    prompt = get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(IsolateError, match="learned prompt"):
        Reference.now(prompt)
    with pytest.raises(IsolateError, match="meta device"):
        Reference.now(tiny().to("meta"))
    plain = nn.Linear(2, 2)
    with pytest.raises(IsolateError, match="no parameter"), Reference.now(plain).used(nn.Sequential(nn.Linear(2, 2))):
        pass
    with pytest.raises(IsolateError, match="had \\(2, 2\\)"), Reference.now(plain).used(nn.Linear(3, 2)):
        pass


def test_a_soft_mask_is_part_of_it():
    """An adapter that damps what it adds is left out, or kept, like any other."""
    config = CoFiTuneConfig(layer_range=(0, 1), modules="FFN", importance=importance("llama"))
    model = filled(get_peft_model(tiny(), config))
    reference, wanted = Reference.now(model), logits(model)
    filled(model, seed=1)
    with reference.used(model):
        assert torch.equal(bits(logits(model)), bits(wanted))


def test_adapters_that_were_off_are_off():
    """And whoever turned them off finds them off afterwards."""
    model = filled(get_peft_model(tiny(), HalfFTConfig()))
    trained = logits(model)
    with model.disable_adapter():
        reference, wanted = Reference.now(model), logits(model)
        with reference.used(model):
            pass
        assert torch.equal(bits(logits(model)), bits(wanted))
    assert torch.equal(bits(logits(model)), bits(trained))
    with reference.used(model):
        assert torch.equal(bits(logits(model)), bits(wanted))


def test_a_packed_adapter_is_no_empty_one(tmp_path):
    """It has no parameters that could be looked at; a fresh one beside it learns."""
    filled(get_peft_model(tiny(), HalfFTConfig())).save_pretrained(tmp_path / "adapter")
    compress(tmp_path / "adapter", tmp_path / "packed")
    model = PeftModel.from_pretrained(tiny(), tmp_path / "packed")
    wanted, base = logits(model), logits(tiny())
    assert not torch.equal(wanted, base)
    with Reference.now(model).used(model):
        assert torch.equal(bits(logits(model)), bits(wanted))
    with Reference.base(model).used(model):
        assert torch.equal(bits(logits(model)), bits(base))
