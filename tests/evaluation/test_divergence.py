"""KL from what a model was: the formula's value and gradient, whatever the head does, without whole logits."""

from __future__ import annotations

import importlib
import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from peft_isolate import HalfFTConfig
from peft_isolate.deltas.reference import Reference
from peft_isolate.errors import IsolateError
from peft_isolate.evaluation.divergence import divergence, positions_at_once
from tests.given import GivenConfig
from tests.learn import filled, learn
from tests.models import ARCHITECTURES, tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore")

module = importlib.import_module("peft_isolate.evaluation.divergence")
CAUSAL = [name for name in ARCHITECTURES if name != "bert"]


@pytest.fixture(params=[2**24, 64 * 5], ids=["one chunk", "chunks of five"])
def chunked(request, monkeypatch):
    """All positions at once, and few."""
    monkeypatch.setattr(module, "_LOGITS", request.param)


def padded() -> dict[str, torch.Tensor]:
    """Rows of unequal length, and labels that leave some tokens out."""
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    labels = ids.clone()
    labels[2, :6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


def slow(model: nn.Module, batch: dict, reference: Reference) -> tuple[torch.Tensor, int]:
    """The formula, one token after the other, on whole logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch.get("labels", batch["input_ids"])
    with torch.no_grad(), reference.used(model):
        base = model(**inputs).logits
    tuned, total, count = model(**inputs).logits, 0.0, 0
    for row in range(len(labels)):
        for at in range(1, labels.shape[1]):
            if labels[row, at] == -100:
                continue
            p, q = F.softmax(base[row, at - 1].double(), -1), F.log_softmax(tuned[row, at - 1].double(), -1)
            total, count = total + (p * (p.log() - q)).sum(), count + 1
    return total, count


def moved(model: nn.Module) -> nn.Module:
    """With deltas large enough that KL is no rounding error."""
    filled(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default" in name:
                parameter.mul_(8)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_as_slow(model: nn.Module, reference: Reference, batch: dict, tolerance: float = 1e-5) -> None:
    model.eval()
    total, count = divergence(model, batch, reference)
    total.backward()
    found = gradients(model)
    wanted, number = slow(model, batch, reference)
    wanted.backward()
    theirs = gradients(model)
    assert count == number
    assert math.isclose(total.item(), wanted.item(), rel_tol=1e-5, abs_tol=1e-7 * count)
    assert found.keys() == theirs.keys()
    assert found
    scale = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (found[name] - gradient).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize(("architecture", "at_once"), [("llama", 2**24), *((name, 64 * 5) for name in CAUSAL)])
def test_value_and_gradient_are_the_formulas(architecture, at_once, monkeypatch, caplog):
    """Also where a model caps what its head gives (Gemma 2), and where head and embedding are tied."""
    monkeypatch.setattr(module, "_LOGITS", at_once)
    model = get_peft_model(tiny(architecture), HalfFTConfig())
    reference = Reference.now(model)
    assert_as_slow(moved(model), reference, padded())
    assert "whole in memory" not in caplog.text


@pytest.mark.parametrize(("name", "scale"), [("granite", 3.0), ("cohere", 0.25)])
def test_scaled_logits(name, scale, chunked, caplog):
    """Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
    key = "logits_scaling" if name == "granite" else "logit_scale"
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **fields, **{key: scale})
    model = get_peft_model(AutoModelForCausalLM.from_config(config), HalfFTConfig())
    reference = Reference.now(model)
    assert_as_slow(moved(model.eval()), reference, padded())
    assert "whole in memory" not in caplog.text


@pytest.mark.parametrize("kind", ["rows", "all_but"])
def test_a_reference_that_is_a_copy(kind, chunked):
    """A trained adapter that is trained on."""
    model = filled(get_peft_model(tiny(), GivenConfig(kind=kind)))
    reference = Reference.now(model)
    assert_as_slow(learn(model, 10).eval(), reference, padded())


def test_lora(chunked):
    """The base is the adapter disabled, there as well."""
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    reference = Reference.now(model)
    assert_as_slow(learn(model, 10).eval(), reference, padded())


def inner_head() -> nn.Module:
    """A model whose head stands inside a module, `cls`, that does more."""
    return BertLMHeadModel(
        BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
            is_decoder=True, tie_word_embeddings=False,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "made",
    [
        lambda: get_peft_model(tiny(), HalfFTConfig(modules_to_save=["lm_head"])),
        lambda: get_peft_model(tiny(), GivenConfig(kind="rows", target_modules=["lm_head"])),
        lambda: filled(get_peft_model(tiny(), HalfFTConfig(train_embeddings=True))),
        lambda: tiny(),
        lambda: get_peft_model(inner_head(), LoraConfig(r=2, target_modules=["query"], modules_to_save=["cls"])),
    ],
    ids=["saved whole", "delta", "delta that goes on", "everything", "in a module saved whole"],
)
def test_a_head_that_learns(made, chunked):
    """The reference has its own head, in each chunk, in forward and in backward."""
    model = made()
    reference = Reference.now(model)
    learn(model.train(), 10)
    assert_as_slow(model.eval(), reference, padded())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_learned_is_exactly_zero(dtype, chunked):
    """Both are the same bits, so that KL is zero and not nearly so."""
    model = get_peft_model(tiny(dtype=dtype), HalfFTConfig())
    found = divergence(model, padded(), Reference.now(model))
    assert found.total.item() == 0.0
    assert found.tokens == 11 + 7 + 6


def test_neither_logits_are_ever_whole(monkeypatch):
    """In forward and in backward no tensor has as many scalars as the logits of the batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (499,) and tensor.shape[-2:] != (32, 499):
                    self.found = max(self.found, tensor.numel() // 499)
            return out

    monkeypatch.setattr(module, "_LOGITS", 499 * 4)
    model = filled(get_peft_model(tiny(vocab_size=499), HalfFTConfig()))
    reference = Reference.base(model)
    kept = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        divergence(model, {"input_ids": tokens(2, 20)}, reference).total.backward()
    assert largest.found == 4
    assert not [t.shape for t in kept if t.shape[-1:] == (499,) and t.shape[-2:] != (32, 499)]
    with Largest() as largest:
        slow(model, {"input_ids": tokens(2, 20)}, reference)
    assert largest.found == 40


def test_modes_and_flags_stay():
    """A model in training, with dropout in its adapter: the reference has none, and nothing is turned on or off."""
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
    reference = Reference.now(model)
    learn(model.train())
    model.base_model.model.lm_head.eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(0)
    first = divergence(model, padded(), reference).total.item()
    torch.manual_seed(1)
    assert divergence(model, padded(), reference).total.item() != first
    assert [m.training for m in model.modules()] == modes
    with torch.no_grad():
        assert not divergence(model, padded(), reference).total.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"]])
def test_the_reference_never_drops_out(targets, chunked):
    """It is in eval mode, the model is in its own; also the head, also when chunks are computed again in backward."""
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=targets, lora_dropout=0.5))
    learn(model.train())
    reference = Reference.now(model)
    modes = []
    name, dropout = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Dropout))
    dropout.register_forward_hook(lambda m, *_: modes.append(m.training))
    divergence(model, padded(), reference).total.backward()
    assert set(modes) == {True, False}, name
    assert modes.count(False) >= modes.count(True) - 1


class Counted(Reference):
    """How often the model was walked through to leave adapters out."""

    walks = 0

    @contextmanager
    def left_out(self, model):
        self.walks += 1
        with super().left_out(model):
            yield


@pytest.mark.parametrize(("targets", "per_chunk"), [(["q_proj"], 0), (["lm_head"], 1)])
def test_chunks_cost_the_head_alone(targets, per_chunk, monkeypatch):
    """The model is walked through once, and for each chunk only where the head has adapters to be left out."""
    model, calls = get_peft_model(tiny(), LoraConfig(r=2, target_modules=targets)), []
    reference = Counted.now(model)
    learn(model)
    model.base_model.model.lm_head.register_forward_hook(lambda *_: calls.append(None))
    monkeypatch.setattr(module, "_LOGITS", 64 * 5)
    chunks = -(-divergence(model, padded(), reference).tokens // 5)
    assert chunks > 2
    assert reference.walks == 1 + per_chunk * chunks
    assert len(calls) == 2 + 2 * chunks  # of both models, one position and the chunks


def test_half_precision(chunked):
    """The head's logits are bf16, what follows is fp32."""
    model = get_peft_model(tiny(dtype=torch.bfloat16), HalfFTConfig())
    reference = Reference.now(model)
    batch = padded()
    found, wanted = (f(moved(model), batch, reference)[0].item() for f in (divergence, slow))
    assert math.isclose(found, wanted, rel_tol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, chunked):
    """Both kinds: layers are computed again in backward, with the adapter on."""
    model, twin = (filled(get_peft_model(tiny(), HalfFTConfig())) for _ in range(2))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for one in (model, twin):
        divergence(one, padded(), Reference.base(one)).total.backward()
    found, wanted = gradients(model), gradients(twin)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-7)


class Unknown(nn.Module):
    """A causal model whose head nobody knows; its logits are all that it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, input_ids, attention_mask=None):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.out(self.embed(input_ids)))


def test_a_model_without_a_known_head(caplog):
    """Right as well, with whole logits, and it says so."""
    model = get_peft_model(Unknown(), HalfFTConfig(target_modules=["embed", "out"], fraction=1.0))
    reference = Reference.now(model)
    assert_as_slow(moved(model), reference, padded())
    assert "whole in memory" in caplog.text


def test_a_model_that_does_more_to_its_logits(caplog, chunked):
    """Something that is in no config: found by trying, and then the logits are whole."""
    base = tiny()
    base.lm_head.register_forward_hook(lambda _, args, output: output)
    model = get_peft_model(base, HalfFTConfig())
    own = model.base_model.model.forward

    def cubed(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits = output.logits**3
        return output

    model.base_model.model.forward = cubed
    reference = Reference.now(model)
    assert_as_slow(moved(model), reference, padded())
    assert "whole in memory" in caplog.text


def test_tokens_that_the_model_rules_out(caplog, chunked):
    """−inf in both adds nothing, and is no reason to have logits whole."""
    base = tiny()
    base.lm_head.register_forward_hook(lambda _, args, output: output.masked_fill(torch.arange(64) > 60, -torch.inf))
    model = get_peft_model(base, HalfFTConfig())
    reference = Reference.now(model)
    batch = {"input_ids": tokens().clamp_max(60)}
    total = divergence(moved(model.eval()), batch, reference).total
    with torch.no_grad(), reference.used(model):
        p = model(**batch).logits[:, :-1, :61].log_softmax(-1)
    q = model(**batch).logits[:, :-1, :61].log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum()
    assert math.isclose(total.item(), wanted.item(), rel_tol=1e-5)
    total.backward()
    found = gradients(model)
    wanted.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert "whole in memory" not in caplog.text


def test_bad_input():
    """The batch is named as for `token_loss`."""
    model = get_peft_model(tiny(), HalfFTConfig())
    with pytest.raises(IsolateError, match="input_ids"):
        divergence(model, {"text": tokens()}, Reference.now(model))
    with pytest.raises(IsolateError, match="reference=None is no Reference"):
        divergence(model, {"input_ids": tokens()}, None)
    with pytest.raises(IsolateError, match="same shape"):
        divergence(model, {"input_ids": tokens(), "labels": tokens(1)}, Reference.now(model))


def test_chunks_of_a_vocabulary():
    """At least one position, however large the vocabulary."""
    assert positions_at_once(2**30) == 1
    assert positions_at_once(2**17) == 128
