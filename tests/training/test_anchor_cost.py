"""The estimate of an anchor's cost against what is counted: products of matrices, live bytes, kept numbers."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_isolate import CoFiTuneConfig, HalfFTConfig
from peft_isolate.deltas.reference import Reference
from peft_isolate.errors import IsolateError
from peft_isolate.evaluation.divergence import divergence
from peft_isolate.training.anchor.config import AnchorConfig
from peft_isolate.training.anchor.cost import anchor_cost
from tests.models import tiny, tokens

# Not by its name as an attribute: there the folder has the function.
module = importlib.import_module("peft_isolate.evaluation.divergence")
ADAPTERS = {
    "full": lambda: None,
    "hft": HalfFTConfig,
    "cofitune": lambda: CoFiTuneConfig(layer_range=(0.34, 0.67), soft_mask=None),
    "lora": lambda: LoraConfig(r=2, target_modules=["q_proj", "up_proj"]),
    "lora and head": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def made(adapter: str, architecture: str = "llama", **config: Any) -> nn.Module:
    base = tiny(architecture, **config)
    given = ADAPTERS[adapter]()
    return (base if given is None else get_peft_model(base, given)).train()


def products(run: Callable[[], object]) -> int:
    """Floating point operations in products of a matrix with a matrix, also inside of our own operators."""
    with torch.autograd.profiler.profile(with_flops=True, use_cpu=True, acc_events=True) as found:
        run()
    return sum(event.flops or 0 for event in found.function_events if event.name in ("aten::mm", "aten::addmm"))


CASES = [
    ("full", "llama", 64, False, False),
    ("full", "llama", 512, True, True),
    ("hft", "llama", 64, False, False),
    ("hft", "gpt2", 64, True, False),
    ("cofitune", "llama", 64, False, False),
    ("lora", "gemma3", 256, True, True),
    ("lora and head", "llama", 512, False, False),
]


@pytest.mark.parametrize(("adapter", "architecture", "vocabulary", "checkpointing", "chunked"), CASES)
def test_the_time_is_that_of_the_products_of_matrices(
    adapter, architecture, vocabulary, checkpointing, chunked, monkeypatch
):
    """Estimated from shapes, within 8 % of what the profiler counts: whatever learns, however the head is chunked."""
    model = made(adapter, architecture, vocab_size=vocabulary)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    monkeypatch.setattr(module, "_LOGITS", vocabulary * (8 if chunked else 1000))
    reference, ids = Reference.now(model), tokens()
    plain = products(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())
    anchored = products(lambda: divergence(model, {"input_ids": ids}, reference).total.backward())
    config = AnchorConfig(batch_size=ids.shape[0], max_length=ids.shape[1])
    cost = anchor_cost(model, config, ids.numel(), checkpointing=checkpointing)
    assert cost.share == pytest.approx(anchored / plain, rel=0.08)
    assert cost.positions == (8 if chunked else 22)


def test_where_everything_learns_it_is_four_to_three():
    """A forward and backward is three units, the reference's forward one more; with checkpointing five to four."""
    config = AnchorConfig(batch_size=4, max_length=16)
    assert anchor_cost(made("full"), config, 64).share == pytest.approx(4 / 3)
    assert anchor_cost(made("full"), config, 640).share == pytest.approx(4 / 30)
    deep = made("full", num_hidden_layers=40)  # next to which the head, which is not checkpointed, is nothing
    assert anchor_cost(deep, config, 64, checkpointing=True).share == pytest.approx(5 / 4, rel=0.01)


def test_it_is_a_mean_over_the_steps():
    """Anchored every k-th step, a step costs a k-th of it; twice the rows cost twice."""
    model = made("hft")
    once = anchor_cost(model, AnchorConfig(batch_size=4, max_length=16), 128)
    rare = anchor_cost(model, AnchorConfig(batch_size=8, max_length=16, every=8), 128)
    assert (once.tokens, rare.tokens) == (64, 16)
    assert rare.share == pytest.approx(once.share / 4)


def test_experts_and_tied_heads_are_matrices_too():
    """Fused experts count as they are; a tied head is a product like an untied one, and looking up is none."""
    tied = anchor_cost(made("full", "gemma2"), AnchorConfig(batch_size=4, max_length=16), 64)
    assert tied.share == pytest.approx(4 / 3)
    untied = made("lora", vocab_size=2048, tie_word_embeddings=False)
    again = made("lora", vocab_size=2048, tie_word_embeddings=True)
    config = AnchorConfig(batch_size=4, max_length=16)
    assert anchor_cost(untied, config, 64) == anchor_cost(again, config, 64)
    assert anchor_cost(made("full", "qwen3_moe"), config, 64).share == pytest.approx(4 / 3)


class Live(TorchDispatchMode):
    """The most bytes of tensors made within that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._sizes.pop, storage._cdata, None)
                    self.peak = max(self.peak, sum(self._sizes.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_memory_of_the_logits_is_what_is_alive(dtype, chunked, monkeypatch):
    """Of a vocabulary beside which the body is small: as much as is alive at the peak, within 10 %; less in chunks."""
    vocabulary = 2**14
    model = made("lora", dtype=dtype, vocab_size=vocabulary, max_position_embeddings=256)
    monkeypatch.setattr(module, "_LOGITS", vocabulary * (100 if chunked else 1000))
    ids = torch.randint(3, 64, (1, 201))
    reference = Reference.now(model)
    with Live() as live:
        divergence(model, {"input_ids": ids}, reference).total.backward()
    cost = anchor_cost(model, AnchorConfig(batch_size=1, max_length=201), 100)
    assert cost.positions == (100 if chunked else 200)
    assert cost.logits_bytes == pytest.approx(live.peak, rel=0.1)


def test_it_tells_what_is_kept_of_the_reference():
    """Nothing for a fresh adapter, an adapter's numbers where it goes on, the model where that learns as a whole."""
    config = AnchorConfig(batch_size=2, max_length=8)
    model = made("hft")
    assert anchor_cost(model, config, 64).reference_bytes == 0
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in learning:
            parameter.add_(0.1)
    kept = anchor_cost(model, config, 64).reference_bytes
    assert kept == sum(parameter.nbytes for parameter in learning)
    assert anchor_cost(model, config, 64, reference=Reference.base(model)).reference_bytes == 0
    full = made("full")
    assert anchor_cost(full, config, 64).reference_bytes == sum(p.nbytes for p in full.parameters())


class Copies(TorchDispatchMode):
    """How many tensors are cloned within."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


def test_what_is_kept_is_counted_without_a_copy():
    """A model that learns as a whole may not fit into memory twice; what could not be kept is an error as before."""
    model = made("full")
    with Copies() as copies:
        anchor_cost(model, AnchorConfig(), 64)
        assert copies.n == 0
        Reference.now(model)
    assert copies.n == len(list(model.parameters()))
    with pytest.raises(IsolateError, match="is on the meta device, so its numbers cannot be kept"):
        anchor_cost(model.to("meta"), AnchorConfig(), 64)


def test_no_anchor_costs_nothing():
    """With β = 0 there is neither a forward nor a copy, and nothing is sampled."""
    cost = anchor_cost(made("full"), AnchorConfig(source="self", beta=0), 64)
    assert not any((cost.tokens, cost.share, cost.reference_bytes, cost.logits_bytes, cost.sampled_tokens))
    assert "+0% of a step" in str(cost)


def test_it_can_be_read():
    """One line each for tokens, time, memory, and what is sampled beforehand."""
    model = made("hft", vocab_size=512)
    cost = anchor_cost(model, AnchorConfig(source="self", batch_size=4, max_length=16, n_rows=100), 1024)
    assert cost.sampled_tokens == 1600
    assert str(cost).splitlines() == [
        "anchor    at most 64 tokens a step, beside 1,024 of the new task",
        f"time      +{100 * cost.share:.2g}% of a step's forward and backward",
        "memory    0 B for the reference, 645 kB for the logits of 60 positions at once",
        "before    at most 1,600 tokens are sampled, once",
    ]
    assert "before" not in str(anchor_cost(model, AnchorConfig(), 1024))
    rare = anchor_cost(model, AnchorConfig(batch_size=4, max_length=12, every=100), 1024)
    assert "at most 0.48 tokens a step" in str(rare)
    assert f"time      +{100 * rare.share:.2g}% of" in str(rare)


def test_nothing_is_changed():
    """Neither modes nor what learns nor any number: nothing is run."""
    model = made("lora")
    before = [(p, p.requires_grad, p._version) for p in model.parameters()]
    anchor_cost(model, AnchorConfig(), 64)
    assert all(p.requires_grad == learned and p._version == version for p, learned, version in before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens_per_step": 0}, "tokens_per_step=0"),
        ({"tokens_per_step": True}, "tokens_per_step=True"),
        ({"checkpointing": "no"}, "checkpointing='no'"),
        ({"config": "self"}, "config='self' is str: pass an AnchorConfig"),
        ({"model": nn.Linear(2, 2)}, "Linear has no input embedding"),
    ],
)
def test_what_cannot_be_estimated_is_refused(arguments, message):
    """The value, the reason, the remedy."""
    given = {"model": made("hft"), "config": AnchorConfig(), "tokens_per_step": 64} | arguments
    with pytest.raises(IsolateError, match=message):
        anchor_cost(**given)
