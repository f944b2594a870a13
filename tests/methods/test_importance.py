"""Importance: equal to the formula in plain loops and to gated weights, on every architecture; nothing left behind."""

from __future__ import annotations

import copy
import math
import os
import re
import statistics
import warnings
from unittest.mock import patch

import pytest
import torch
import torch.multiprocessing
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BatchEncoding,
    DeepseekV3Config,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from peft_isolate import HalfFTConfig
from peft_isolate.errors import FormatError, IsolateError, RegionError
from peft_isolate.methods.cofitune.importance import Importance, measure_importance, passes
from peft_isolate.methods.cofitune.importance import gates as gates_module
from peft_isolate.methods.cofitune.importance.importance import normalised
from peft_isolate.methods.cofitune.importance.sites import of_columns
from peft_isolate.regions import roles
from tests.models import ARCHITECTURES, CONFIGS, MORE_ARCHITECTURES, tiny, tokens

GATED = [name for name in (*ARCHITECTURES, *MORE_ARCHITECTURES) if name != "mamba"]
DROPOUT = 0.1  # more than the paper's, so that the KL is no rounding error


def batch_for(architecture: str, seed: int = 0, batch: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    found = {"input_ids": tokens(batch, length, seed=seed)}
    return found | {"labels": tokens(batch, 5, seed=seed + 50)} if architecture in ("t5", "switch") else found


def measure(model, batches, **options) -> Importance:
    return measure_importance(model, batches, **({"progress": False, "dropout": DROPOUT} | options))


def assert_same(one: Importance, other: Importance, tolerance: float = 0.0) -> None:
    assert list(one.units) == list(other.units)
    for key, values in one.units.items():
        torch.testing.assert_close(
            values, other.units[key], rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


class Masks:
    """Dropout masks by number of the call: recorded from one run, applied again in another."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor] = []
        self.replay: int | None = None

    def __call__(self, x: torch.Tensor, probability: float) -> torch.Tensor:
        if self.replay is None:
            self.masks.append(torch.rand(x.shape) >= probability)
            mask = self.masks[-1]
        else:
            mask = self.masks[self.replay]
            self.replay += 1
        return x * mask.to(x) / (1 - probability)


def gated_weights(model, gates: dict[str, torch.Tensor], n_heads: int) -> dict[str, torch.Tensor]:
    """The model's weights, each output unit of up and down, and what o reads of each head, multiplied by its gate."""
    weights = dict(model.named_parameters())
    o_of = {(r.stack, r.layer, r.block): r for r in roles(model) if r.name == "o" and r.parameter.endswith("weight")}
    for role in roles(model):
        key = Importance.key_of(role)
        if key not in gates:
            continue
        if key.endswith("heads"):
            if role.name == "q" and role.parameter.endswith("weight"):
                o = o_of[role.stack, role.layer, role.block]
                by_rows = isinstance(model.get_submodule(o.module), Conv1D)
                each = gates[key].repeat_interleave(weights[o.parameter].shape[0 if by_rows else 1] // n_heads)
                weights[o.parameter] = weights[o.parameter] * (each[:, None] if by_rows else each)
            continue
        gate = gates[key] if role.expert is None else gates[key][role.expert]
        weight, at = weights[role.parameter], role.selection.positions()
        if isinstance(model.get_submodule(role.module), Conv1D) or weight.ndim == 1:
            factor = gate.repeat(len(at) // len(gate))
        else:
            factor = gate.repeat_interleave(len(at) // len(gate))
        ones = torch.ones(weight.numel(), dtype=weight.dtype, device=weight.device)
        weights[role.parameter] = weight * ones.scatter(0, at.to(weight.device), factor).reshape(weight.shape)
    return weights


def twin_hooks(model, masks: Masks, measured: Importance) -> list:
    """Dropout where the method has it, without any gate."""
    handles, seen = [], set()
    for role in roles(model):
        if role.tower or role.layer is None or role.module in seen:
            continue
        module = model.get_submodule(role.module)
        if role.name == "down":
            handles.append(module.register_forward_hook(lambda m, a, out: masks(out, DROPOUT)))
        elif role.name == "o" and f"{role.stack}.{role.layer}.{role.block}.heads" in measured.units:
            handles.append(module.register_forward_pre_hook(lambda m, a: (masks(a[0], DROPOUT), *a[1:])))
        else:
            continue
        seen.add(role.module)
    return handles


def divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The formula, as torch's kl_div(input=log_softmax(first), target=softmax(second)) means it; batch mean."""
    log_p, q = first.log_softmax(-1), second.softmax(-1)
    return (q * (q.log() - log_p)).sum() / len(first)


def by_hand(model, gates, inputs, n_heads, masks) -> torch.Tensor:
    weights = gated_weights(model, gates, n_heads)
    first, second = (functional_call(model, weights, (), inputs).logits for _ in range(2))
    return divergence(first, second)


def in_plain_loops(gradients: list[dict[str, list[float]]], n_tokens: int, method: str) -> dict[str, list[float]]:
    """{key: importance} from {key: gradient of each unit} of each batch."""
    found = {}
    for key in gradients[0]:
        n = len(gradients[0][key])
        totals = []
        for unit in range(n):
            total = 0.0
            for batch in gradients:
                total += abs(batch[key][unit]) if method == "absolute" else batch[key][unit]
            totals.append(total / n_tokens)
        mean, std = statistics.mean(totals), statistics.stdev(totals)
        found[key] = [abs(math.tanh((total - mean) / std)) for total in totals]
    return found


class Norm(nn.Module):
    """An RMSNorm that stays in fp64: differences of a KL do not survive rounding to fp32."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


@pytest.mark.parametrize(("architecture", "method"), [("llama", "absolute"), ("opt", "absolute"), ("opt", "signed")])
def test_the_formula_in_plain_loops(architecture, method):
    """Two layers, fp64: each unit's weights scaled by 1 ± h and 1 ± 2h, the KL by its formula; no autograd."""
    small = {"ffn_dim": 10} if architecture == "opt" else {"intermediate_size": 10}
    model = tiny(architecture, torch.float64, num_hidden_layers=2, hidden_size=16, **small,
                 **({"word_embed_proj_dim": 16} if architecture == "opt" else {}))  # fmt: skip
    for name, module in list(model.named_modules()):
        if "RMSNorm" in type(module).__name__:
            model.set_submodule(name, Norm(module))
    batches = [batch_for(architecture, seed, batch=2 + seed, length=5 + seed) for seed in range(2)]
    masks = Masks()
    with patch.object(gates_module, "drop", masks):
        measured = measure(model, batches, method=method)
    assert measured.tokens == 2 * 5 + 3 * 6
    assert measured.batches == 2
    handles, h, start, gradients = twin_hooks(model, masks, measured), 1e-3, 0, []
    with torch.no_grad():
        for batch in batches:
            of_batch = {}
            for key, values in measured.units.items():
                of_batch[key] = []
                for unit in range(len(values)):
                    ends = []
                    for g in (1 + h, 1 - h, 1 + 2 * h, 1 - 2 * h):
                        masks.replay = start
                        gate = torch.ones(len(values), dtype=torch.float64)
                        gate[unit] = g
                        ends.append(by_hand(model, {key: gate}, batch, 4, masks).item())
                    of_batch[key].append((8 * (ends[0] - ends[1]) - ends[2] + ends[3]) / (12 * h))
            start = masks.replay
            gradients.append(of_batch)
    assert start == len(masks.masks), "the twin drops out where the method does, and nowhere else"
    for handle in handles:
        handle.remove()
    for key, expected in in_plain_loops(gradients, measured.tokens, method).items():
        torch.testing.assert_close(measured.units[key], torch.tensor(expected), rtol=0, atol=1e-5)


def twin_by_autograd(model, batches, masks: Masks, like: Importance, n_heads: int = 4) -> dict[str, torch.Tensor]:
    """Importance by gates multiplied into the weights themselves."""
    handles, masks.replay, sums = twin_hooks(model, masks, like), 0, {}
    for batch in batches:
        batch = {k: v for k, v in batch.items() if k != "labels" or model.config.is_encoder_decoder}
        gates = {key: torch.ones_like(values).to(model.dtype).requires_grad_() for key, values in like.units.items()}
        loss = by_hand(model, gates, batch, n_heads, masks)
        for key, gradient in zip(
            gates, torch.autograd.grad(loss, list(gates.values()), allow_unused=True), strict=True
        ):
            gradient = torch.zeros_like(gates[key]) if gradient is None else gradient
            sums[key] = sums.get(key, 0) + gradient.double().abs()
    for handle in handles:
        handle.remove()
    assert masks.replay == len(masks.masks)
    return {key: normalised(total / like.tokens) for key, total in sums.items()}


@pytest.mark.filterwarnings("ignore:there is no hook point")
@pytest.mark.parametrize("architecture", GATED)
def test_every_architecture_as_with_gated_weights(architecture):
    """Shapes by role; values equal to gates multiplied into the weights: fused rows, Conv1D columns, experts' rows."""
    model, masks = tiny(architecture, torch.float64), Masks()
    model.set_experts_implementation("eager")  # the grouped kernels have no fp64
    batches = [batch_for(architecture, seed) for seed in range(2)]
    with patch.object(gates_module, "drop", masks):
        measured = measure(model, batches)
    assert set(measured.units) <= {Importance.key_of(role) for role in roles(model)}
    for role in roles(model):
        key = Importance.key_of(role)
        if role.name in ("up", "down") and not role.tower and role.parameter.split(".")[-1] != "bias":
            assert key in measured.units
            n_rows = role.selection.count // role.selection.matrix_shape[1]
            if isinstance(model.get_submodule(role.module), Conv1D):
                n_rows = role.selection.shape[1]
            assert measured.units[key].shape == ((n_rows,) if role.expert is None else (2, n_rows)), key
        elif role.name in ("q", "k", "v") and not role.tower and architecture != "qwen3_next":
            assert measured.units[key].shape == (4,)
    for key, expected in twin_by_autograd(model, batches, masks, measured).items():
        assert expected.amax() > 0.1, "the test must have something to compare"
        torch.testing.assert_close(
            measured.units[key], expected, rtol=0, atol=1e-5, msg=lambda m, key=key: f"{key} {m}"
        )


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_every_way_to_compute_experts(architecture, implementation):
    model = tiny(architecture, num_hidden_layers=2)
    model.set_experts_implementation("eager")
    exact = measure(model, [batch_for(architecture)])
    model.set_experts_implementation(implementation)
    assert_same(measure(model, [batch_for(architecture)]), exact, 1e-3)


def test_what_an_attention_without_a_hook_point_gets():
    """Qwen3-Next's query holds an output gate too: its heads are named in one warning, the rest is measured."""
    model = tiny("qwen3_next")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = measure(model, [batch_for("qwen3_next")])
    (said,) = [str(w.message) for w in caught if "hook point" in str(w.message)]
    assert "the heads of model.layers, attention, layers 2 (the query has 64 units" in said
    assert not any(key.endswith("heads") for key in found.units)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(measure(model, [batch_for("qwen3_next")], heads=False), found)


def test_a_model_without_feed_forward_or_heads():
    with pytest.raises(RegionError, match="MambaForCausalLM has no up or down"):
        measure(tiny("mamba"), [batch_for("mamba")])


def test_heads_of_an_encoder_and_a_decoder_that_differ():
    """BART counts each stack's heads for itself."""
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    found = measure(BartForConditionalGeneration(config), [batch_for("t5")])
    assert found.units["model.encoder.layers.0.attention.heads"].shape == (4,)
    assert found.units["model.decoder.layers.1.attention.heads"].shape == (2,)
    assert found.units["model.decoder.layers.1.cross-attention.heads"].shape == (2,)


def switch(n_experts: int) -> SwitchTransformersForConditionalGeneration:
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4,
        num_experts=n_experts, encoder_sparse_step=1, decoder_sparse_step=1, num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2, decoder_start_token_id=0, expert_capacity=64,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config).eval()


def test_experts_that_are_modules_each():
    """A list of experts is stacked; one that saw no token has no importance."""
    model, masks, batches = switch(12), Masks(), [batch_for("switch", batch=1, length=4)]
    visited: set[str] = set()
    for name, module in model.named_modules():
        if name.endswith(".wi"):
            module.register_forward_hook(lambda m, a, out, name=name: visited.add(name) if out.numel() else None)
    with patch.object(gates_module, "drop", masks):
        found = measure(model, batches)
    ups = {key: values for key, values in found.units.items() if key.endswith("expert.up")}
    assert ups
    for key, values in ups.items():
        assert values.shape == (12, 24)
        stack, layer = key.split(".expert")[0].rsplit(".", 1)
        for expert in range(12):
            seen = any(re.match(rf"{stack}\.{layer}\..*expert_{expert}\.wi$", name) for name in visited)
            assert bool(values[expert].any()) == seen
    assert any(not values.any(1).all() for values in ups.values()), "some expert must have seen nothing"
    for key, expected in twin_by_autograd(model, batches, masks, found).items():
        torch.testing.assert_close(found.units[key], expected, rtol=0, atol=2e-4)


def test_an_expert_that_saw_no_token_has_no_importance():
    model = tiny("qwen3_moe", num_experts=24, num_experts_per_tok=1)
    found = measure(model, [{"input_ids": tokens(1, 4)}])
    for key, values in found.units.items():
        if ".expert." in key:
            assert values.shape[0] == 24
            assert 1 <= int(values.any(1).sum()) <= 8, "four tokens, in two passes that may differ"


def test_transposed_experts_that_do_not_say_so():
    """Llama 4's: told by shapes. down has 32 output units and 24 input units."""
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, intermediate_size_mlp=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=3, num_experts_per_tok=1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    found = measure(Llama4ForCausalLM(config), [batch_for("llama4")], heads=False)
    assert found.units["model.layers.0.expert.down"].shape == (3, 32)


def test_transposed_experts_with_biases():
    """gpt-oss: output units of down are columns; up is not recognised."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=3, num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
    )).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    masks, batch = Masks(), batch_for("gpt_oss")
    with patch.object(gates_module, "drop", masks):
        found = measure(model, [batch])
    assert "model.layers.0.expert.up" not in found.units
    masks.replay, key = 0, "model.layers.1.expert.down"
    gate = torch.ones(3, 32, requires_grad=True)
    experts = model.model.layers[1].mlp.experts
    names = {n: f"model.layers.1.mlp.experts.{n}" for n in ("down_proj", "down_proj_bias")}
    weights = {
        names["down_proj"]: experts.down_proj * gate[:, None],
        names["down_proj_bias"]: experts.down_proj_bias * gate,
    }
    handles = twin_hooks(model, masks, found)
    first, second = (functional_call(model, weights, (), batch).logits for _ in range(2))
    (gradient,) = torch.autograd.grad(divergence(first, second), gate)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found.units[key], normalised(gradient.double().abs()), rtol=0, atol=1e-4)


# -- what counts


def by_position(x: torch.Tensor, probability: float, calls: list[int]) -> torch.Tensor:
    """A mask that is the same for the first tokens of a sequence, however long it is."""
    calls.append(1)
    mask = torch.rand(x.shape[0], 64, x.shape[-1], generator=torch.Generator().manual_seed(len(calls))) >= probability
    return x * mask[:, : x.shape[1]] / (1 - probability)


def measured_by_position(model, batches) -> Importance:
    calls: list[int] = []
    with patch.object(gates_module, "drop", lambda x, p: by_position(x, p, calls)):
        return measure(model, batches)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_padding_does_not_count(architecture):
    """The same with padding behind, which differs as soon as the mask is left out."""
    model, ids = tiny(architecture), tokens(2, 8)
    ids[1, 6:] = 0
    mask = (ids != 0).long()
    padded = {
        "input_ids": torch.cat([ids, tokens(2, 5, seed=3)], 1),
        "attention_mask": nn.functional.pad(mask, (0, 5)),
    }
    exact = measured_by_position(model, [{"input_ids": ids, "attention_mask": mask}])
    same = measured_by_position(model, [padded])
    assert exact.tokens == same.tokens == 14
    assert_same(exact, same, 1e-4)
    counted = measured_by_position(model, [{"input_ids": padded["input_ids"]}])
    assert counted.tokens == 26
    assert max((exact.units[key] - counted.units[key]).abs().max() for key in exact.units) > 0.01


def test_padding_of_an_encoder_decoder_is_in_its_labels():
    model, batch = tiny("t5"), batch_for("t5")
    padded = batch | {"labels": nn.functional.pad(batch["labels"], (0, 4), value=-100)}
    exact, same = measured_by_position(model, [batch]), measured_by_position(model, [padded])
    assert exact.tokens == same.tokens == 10
    assert_same(exact, same, 1e-4)
    decoder = {"input_ids": batch["input_ids"], "decoder_input_ids": padded["labels"].clamp(min=0)}
    by_mask = decoder | {"decoder_attention_mask": (padded["labels"] >= 0).long()}
    assert measure(model, [decoder]).tokens == 18
    assert measure(model, [by_mask]).tokens == 10


def test_labels_of_a_decoder_are_not_looked_at():
    model, batch = tiny(), batch_for("llama")
    labels = torch.full_like(batch["input_ids"], -100)
    assert_same(measure(model, [batch | {"labels": labels}]), measure(model, [batch]))


def test_a_classifier_has_one_row_a_sequence():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS["llama"](num_labels=5))
    batch = batch_for("llama", batch=3) | {"attention_mask": torch.ones(3, 9, dtype=torch.long)}
    assert measure(model, [batch | {"labels": torch.tensor([0, 1, 2])}]).tokens == 3


def test_a_tiny_probability_gives_no_nan():
    """softmax rounds to 0 in fp32, whose logarithm is infinite."""
    logits = torch.tensor([[[0.0, -400.0, 3.0]]])
    loss, *gradients = passes._divergence(logits, logits + 0.1 * torch.arange(3), torch.ones(1, 1, dtype=torch.bool))
    assert math.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


# -- normalisation


def test_normalised_edges():
    """Equal units, one unit, and a unit far above the others; rows for themselves."""
    assert normalised(torch.full((7,), 1 / 3, dtype=torch.float64)).tolist() == [0.0] * 7
    assert normalised(torch.tensor([5.0], dtype=torch.float64)).tolist() == [0.0]
    g = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    std = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2)
    expected = torch.tensor([[math.tanh(abs(x - 3) / std) for x in (1, 2, 6)], [0.0] * 3])
    torch.testing.assert_close(normalised(g), expected)


def test_gradients_do_not_carry_over():
    """The same batch twice: twice the gradient and twice the tokens. Carried over, it would count three times."""
    model, calls = tiny(), []
    batch = batch_for("llama")
    seen = []
    take = gates_module.Gates.take

    def listening(gates):
        seen.append(take(gates))
        return {key: gradient.clone() for key, gradient in seen[-1].items()}

    with patch.object(gates_module.Gates, "take", listening), patch.object(
        gates_module, "drop", lambda x, p: by_position(x, p, calls if len(calls) % 12 else calls.clear() or calls)
    ):  # fmt: skip
        measure(model, [batch, batch])
    for key, gradient in seen[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, seen[2][key])
    assert all(not values.any() for values in seen[0].values())


# -- the model is left as it was


def snapshot(model) -> dict:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [
        (
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            len(m._backward_hooks),
            sorted(m.__dict__),
            list(m._parameters),
        )
        for m in model.modules()
    ]
    return {
        "state": state,
        "hooks": hooks,
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "grad ids": [id(p.grad) for p in model.parameters()],
        "random": torch.get_rng_state(),
        "autograd": torch.is_grad_enabled(),
    }


def equal(left, right) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def used(architecture: str):
    """A model in the middle of something: mixed modes, some frozen, gradients of the user's own."""
    model = tiny(architecture).train()
    model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("2"))).eval()
    model(**batch_for(architecture)).logits.sum().backward()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
        if i % 4 == 0:
            parameter.grad = None
    return model


class Burst(Exception):
    pass


def batches_that_burst():
    yield batch_for("llama")
    raise Burst


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("how", ["well", "dataloader", "forward", "experts", "bad batch", "no_grad", "inference_mode"])
def test_the_model_is_left_as_it_was(architecture, how):
    model, batches = used(architecture), [batch_for("llama"), batch_for("llama", 1)]
    if how == "dataloader":
        batches = batches_that_burst()
    if how == "bad batch":
        batches = [batches[0], {"input_ids": tokens(2, 9), "attention_mask": torch.ones(2, 9, 9)}]
    layer = model.model.layers[1]
    where = {"forward": layer.post_attention_layernorm, "experts": getattr(layer.mlp, "act_fn", layer.mlp)}.get(how)
    if how == "experts" and architecture == "mixtral":
        where = layer.mlp.experts.act_fn  # within the forward that reads gated weights
    before = snapshot(model)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, torch.enable_grad)
    if how in ("well", "no_grad", "inference_mode"):
        with context():
            found = measure(model, batches)
        assert_same(found, measure(tiny(architecture), batches))
    elif where is not None:
        with patch.object(type(where), "forward", side_effect=Burst), pytest.raises(Burst):
            measure(model, batches)
    else:
        with pytest.raises((Burst, IsolateError)):
            measure(model, batches)
    after = snapshot(model)
    for what, value in before.items():
        assert equal(value, after[what]), what


def test_the_random_state_of_others_is_not_touched():
    """A shuffling dataloader and the dropout are functions of the seed; who calls keeps his own random numbers."""
    model = tiny()
    rows = [{"input_ids": row} for row in tokens(8, 6)]
    loader = DataLoader(rows, batch_size=2, shuffle=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = measure(model, loader)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert_same(one, measure(model, loader))
    other = measure(model, loader, seed=1)
    assert max((one.units[key] - other.units[key]).abs().max() for key in one.units) > 0.01


def test_each_batch_has_its_own_dropout():
    masks, batch = [], batch_for("llama")

    def listening(x, p):
        masks.append(torch.rand(x.shape))
        return x * (masks[-1] >= p)

    with patch.object(gates_module, "drop", listening):
        measure(tiny(), [batch, batch])
    first, second = masks[: len(masks) // 2], masks[len(masks) // 2 :]
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, first[6:], strict=False)), "nor have the passes of a batch"


# -- kinds of models and batches


def test_wrapped_by_lora_as_merged():
    """The gates are on what the wrapper gives, not on the base layer's part of it."""
    config = LoraConfig(target_modules=["up_proj", "down_proj", "o_proj"], r=4, init_lora_weights=False)
    model = get_peft_model(tiny(), config)
    found = measure(model, [batch_for("llama")])
    assert_same(found, measure(copy.deepcopy(model).merge_and_unload(), [batch_for("llama")]), 1e-3)


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
def test_wrapped_by_our_own_adapter_as_merged(architecture):
    model = get_peft_model(tiny(architecture), HalfFTConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.05)
    found = measure(model, [batch_for("llama")])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_same(found, measure(copy.deepcopy(model).merge_and_unload(), [batch_for("llama")]), 1e-3)


def test_parametrised_experts_are_refused():
    config = LoraConfig(target_parameters=["mlp.experts.down_proj"], r=2)
    with pytest.raises(IsolateError, match="parametrization"):
        measure(get_peft_model(tiny("mixtral"), config), [batch_for("llama")])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_kinds_of_attention(attention):
    model = tiny("llama", attn_implementation=attention)
    assert_same(measure(model, [batch_for("llama")]), measure(tiny(), [batch_for("llama")]), 1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = tiny().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(measure(model, [batch_for("llama")]), measure(tiny(), [batch_for("llama")]))


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(architecture, dtype):
    """Near the same model in fp32: correlated, as far as a rounded KL of a rounded model can be."""
    half, whole = tiny(architecture, dtype), tiny(architecture, dtype).float()
    options = {"dropout": 0.3, "max_batches": 3}
    batches = [batch_for(architecture, seed) for seed in range(3)]
    found, exact = measure(half, batches, **options), measure(whole, batches, **options)
    left, right = (torch.cat([v.flatten() for v in one.units.values()]) for one in (found, exact))
    assert left.dtype == torch.float32
    assert torch.corrcoef(torch.stack([left, right]))[0, 1] > (0.99 if dtype == torch.float16 else 0.9)


def test_gates_are_summed_in_fp32():
    """Neither the products nor their sum are rounded to bf16."""
    number = 1 + 2**-7  # its square needs twice the bits
    x = torch.full((3000, 3), number, dtype=torch.bfloat16, requires_grad=True)
    gate = torch.ones(3, requires_grad=True)
    gates_module._Gate.apply(x, gate, of_columns).backward(torch.full_like(x, number))
    assert gate.grad.dtype == torch.float32
    assert gate.grad.tolist() == pytest.approx([3000 * number**2] * 3, rel=1e-6)
    assert x.grad.dtype == torch.bfloat16


def test_batches_may_be_encodings_and_max_batches_stops():
    model, pulled = tiny(), []

    def stream():
        for seed in range(5):
            pulled.append(seed)
            yield BatchEncoding({**batch_for("llama", seed), "text": ["a", "b"]})

    found = measure(model, stream(), max_batches=2)
    assert pulled == [0, 1]
    assert (found.batches, found.tokens) == (2, 36)
    assert_same(found, measure(model, [batch_for("llama", seed) for seed in range(2)]))


def test_in_ddp_and_compiled_models_are_looked_into():
    model = tiny()
    assert passes.bare(torch.compile(model)) is model
    assert passes.bare(nn.DataParallel(model)) is model


def test_a_module_that_is_never_called_is_named():
    """torch's own MultiheadAttention, say, reads the weight of its output projection and calls nothing."""
    model = tiny()
    layer = model.model.layers[0].mlp
    layer.up_proj.forward = None  # would raise if it were called
    type_forward = type(layer).forward

    def reading(self, x):
        if self is layer:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * nn.functional.linear(x, self.up_proj.weight))
        return type_forward(self, x)

    with patch.object(type(layer), "forward", reading), pytest.warns(UserWarning, match="never calls") as caught:
        found = measure(model, [batch_for("llama")])
    assert len(caught) == 1
    assert "the up of model.layers, feed-forward, layers 0" in str(caught[0].message)
    assert "model.layers.0.feed-forward.up" not in found.units
    assert "model.layers.1.feed-forward.up" in found.units


# -- bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "squared"}, "method='squared'"),
        ({"dropout": 0.0}, "dropout=0.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"seed": -1}, "seed=-1"),
        ({"max_batches": 0}, "max_batches=0"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(IsolateError, match=re.escape(said)):
        measure(tiny(), [batch_for("llama")], **options)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "no batches"),
        ([tokens()], "batch 0 is a Tensor"),
        ([{"text": ["a"]}], "no tensor but \\['text'\\]"),
        ([{"input_ids": tokens(2, 4), "attention_mask": torch.zeros(2, 4)}], "none of the tokens in 1 batch"),
        ([{"input_ids": tokens(2, 4), "attention_mask": torch.ones(2, 1, 4, 4)}], "attention_mask of shape"),
    ],
)
def test_bad_batches(batches, said):
    with pytest.raises(IsolateError, match=said):
        measure(tiny(), batches)


def test_a_model_without_a_head():
    with pytest.raises(IsolateError, match="without logits"):
        measure(tiny().model, [batch_for("llama")])


def test_nan_names_where_it_begins():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 0] = math.nan
    with pytest.raises(IsolateError, match=r"batch 0: .*first so at 'model\.layers\.1\.feed-forward\.up'"):
        measure(model, [batch_for("llama")])


def test_a_nan_gradient_names_the_first_units():
    model = tiny()
    reduce = passes.Gates.take

    def spoiled(gates):
        found = reduce(gates)
        if gates.calls()["model.layers.1.feed-forward.down"]:
            found["model.layers.1.feed-forward.down"][0] = math.inf
        return found

    with patch.object(passes.Gates, "take", spoiled), pytest.raises(IsolateError, match=r"'model\.layers\.1\.feed-f"):
        measure(model, [batch_for("llama")])


# -- the Importance itself


def example(value: float = 0.5, **units) -> Importance:
    values = {
        "model.layers.0.feed-forward.up": torch.tensor([0.0, value]),
        "model.layers.0.expert.down": torch.ones(2, 3),
    }
    return Importance(values | units, "absolute", 2, 30)


def test_save_and_load(tmp_path):
    found = measure(tiny("qwen2_moe"), [batch_for("llama")])
    found.save(tmp_path / "i.safetensors")
    again = Importance.load(tmp_path / "i.safetensors")
    assert set(found.units) == set(again.units)
    assert all(torch.equal(values, again.units[key]) for key, values in found.units.items())
    assert (again.method, again.batches, again.tokens) == (found.method, found.batches, found.tokens)
    assert os.listdir(tmp_path) == ["i.safetensors"]
    with open(tmp_path / "i.safetensors", "r+b") as file:  # it does not stay mapped
        file.seek(-64, os.SEEK_END)
        file.write(b"\xff" * 64)
    assert all(torch.equal(values, again.units[key]) for key, values in found.units.items())


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "i.safetensors"
    example().save(path)
    before = path.read_bytes()
    with (
        patch("peft_isolate.methods.cofitune.importance.importance.save_file", side_effect=OSError("disk full")),
        pytest.raises(OSError, match="disk full"),
    ):
        example(0.7).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["i.safetensors"]


def altered(path, change):
    """Write the file again with something else in it."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


KEY = "model.layers.0.feed-forward.up"


@pytest.mark.parametrize(
    "change",
    [
        lambda t, m: m.update(format="peft_isolate.region/1"),
        lambda t, m: m.pop("importance"),
        lambda t, m: m.update(importance="{"),
        lambda t, m: m.update(importance="[]"),
        lambda t, m: m.update(importance='{"method": "absolute", "batches": -1, "tokens": 3}'),
        lambda t, m: m.update(importance='{"method": "other", "batches": 1, "tokens": 3}'),
        lambda t, m: t.update({KEY: t[KEY].half()}),
        lambda t, m: t.update({KEY: t[KEY] * math.nan}),
        lambda t, m: t.update({KEY: t[KEY] + 1}),
        lambda t, m: t.update({KEY: t[KEY][None]}),
        lambda t, m: t.update({"model.up": t[KEY].clone()}),
        lambda t, m: t.clear(),
    ],
)
def test_altered_files(tmp_path, change):
    path = tmp_path / "i.safetensors"
    example().save(path)
    altered(path, lambda t, m: None)
    Importance.load(path)
    altered(path, change)
    with pytest.raises(FormatError, match="not a readable importance"):
        Importance.load(path)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "i.safetensors"
    example().save(path)
    path.write_bytes(path.read_bytes()[:-5])
    for other in (path, tmp_path):
        with pytest.raises(FormatError, match="not a readable importance"):
            Importance.load(other)
    with pytest.raises(IsolateError, match="nothing': there is no such file"):
        Importance.load(tmp_path / "nothing")


def test_combine_is_the_maximum():
    one, other = (measure(tiny(), [batch_for("llama", seed)]) for seed in range(2))
    both = Importance.combine([one, other])
    for key, values in both.units.items():
        assert values.tolist() == [
            max(pair) for pair in zip(one.units[key].tolist(), other.units[key].tolist(), strict=True)
        ]
    assert (both.batches, both.tokens) == (2, 36)
    assert_same(Importance.combine([one]), one)


def test_combine_of_different_models():
    signed = Importance(example().units, "signed", 1, 1)
    more = example(**{"model.layers.1.feed-forward.up": torch.zeros(2)})
    wider = example(**{KEY: torch.zeros(3)})
    for others, said in (
        ([], "no importance"),
        ([signed], "signed"),
        ([more], "layers.1"),
        ([wider], r"\(2,\).*\(3,\)"),
    ):
        with pytest.raises(IsolateError, match=said):
            Importance.combine([example(), *others] if others else [])


def test_repr_is_short():
    assert repr(example()) == "Importance(absolute, 1 layer: 1 up, 1 down; 2 batches, 30 tokens)"


def test_keys_of_roles():
    found = {(r.name, r.tower != ""): Importance.key_of(r) for r in roles(tiny("gemma3_vision"))}
    assert found["up", True] is None
    assert found["up", False] == "model.language_model.layers.2.feed-forward.up"
    assert found["q", False] == found["v", False] == "model.language_model.layers.2.attention.heads"
    assert {found[name, False] for name in ("o", "gate", "norm", "embedding")} == {None}


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plot(tmp_path, ending):
    pytest.importorskip("matplotlib")
    found = measure(tiny("t5"), [batch_for("t5")])
    found.plot(tmp_path / "new" / f"i.{ending}")
    assert (tmp_path / "new" / f"i.{ending}").stat().st_size > 1000
    if ending == "svg":
        text = (tmp_path / "new" / "i.svg").read_text()
        assert all(word in text for word in ("attention heads", "decoder cross-attention 1", "encoder 2"))


def test_the_picture_of_experts_and_many_units(tmp_path):
    pytest.importorskip("matplotlib")
    units = {f"m.layers.{i}.expert.up": torch.rand(3, 700) for i in range(50)} | {
        "m.layers.0.shared-expert.up": torch.rand(1)
    }
    Importance(units, "signed", 1, 1).plot(tmp_path / "i.png")
    assert os.listdir(tmp_path) == ["i.png"]
    with pytest.raises(IsolateError, match=r"no 'xyz'"):
        example().plot(tmp_path / "i.xyz")
    assert os.listdir(tmp_path) == ["i.png"]


# -- several processes


def one_of_two(rank: int, folder: str, folder_batches: list) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        mine = folder_batches[rank::2]
        found = measure(nn.parallel.DistributedDataParallel(tiny("mixtral")), mine)
        found.save(f"{folder}/{rank}.safetensors")
        with pytest.raises(IsolateError, match="no batches"):
            measure(tiny(), [])
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path):
    """Each its own batches (of unequal number and length), and both get what one process finds on all of them."""
    batches = [batch_for("llama", seed, length=6 + seed) for seed in range(3)]
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), batches), nprocs=2)
    left, right = (Importance.load(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert_same(left, right)
    single = measure(tiny("mixtral"), batches)
    assert set(left.units) == set(single.units)
    assert (left.batches, left.tokens) == (single.batches, single.tokens) == (3, 42)
    for key, values in single.units.items():
        torch.testing.assert_close(left.units[key], values, rtol=0, atol=1e-5)


def test_latent_attention_is_named_among_what_has_no_gate():
    """DeepSeek's: its projections have no role, and its heads learn unmasked."""
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.warns(UserWarning, match=r"heads of model.layers, attention, layers 0, 1 \(its projections are"):
        measured = measure_importance(model, [{"input_ids": tokens()}], progress=False)
    assert not any(key.endswith("heads") for key in measured.units)
