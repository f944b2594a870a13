"""Roles: what every parameter of every architecture is, told to the last scalar and proved on the model itself."""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, CodeGenConfig, GPTBigCodeConfig

from peft_isolate import HalfFTConfig
from peft_isolate.regions import ROLES, Role, Selection, base_parameters, roles
from tests.models import ARCHITECTURES, tiny, tokens

# {architecture: (stack, {role: parameters of layer 1}, {role: parameters outside the layers})}, in the model's order.
# Hidden size 32, 4 heads of 8 (2 for k and v where they are grouped), 48 inner units (GPT-2: 128).
# "weight[rows=0:8,24:32]" is a block of a fused weight, half-open ranges; a bias is one row, so that its entries are
# columns.
TABLE = {
    "llama": (
        "model.layers",
        {
            "q": ["self_attn.q_proj.weight"],
            "k": ["self_attn.k_proj.weight"],
            "v": ["self_attn.v_proj.weight"],
            "o": ["self_attn.o_proj.weight"],
            "gate": ["mlp.gate_proj.weight"],
            "up": ["mlp.up_proj.weight"],
            "down": ["mlp.down_proj.weight"],
            "norm": ["input_layernorm.weight", "post_attention_layernorm.weight"],
        },
        {"embedding": ["model.embed_tokens.weight"], "norm": ["model.norm.weight"], "head": ["lm_head.weight"]},
    ),
    "mistral": (
        "model.layers",
        {
            "q": ["self_attn.q_proj.weight"],
            "k": ["self_attn.k_proj.weight"],
            "v": ["self_attn.v_proj.weight"],
            "o": ["self_attn.o_proj.weight"],
            "gate": ["mlp.gate_proj.weight"],
            "up": ["mlp.up_proj.weight"],
            "down": ["mlp.down_proj.weight"],
            "norm": ["input_layernorm.weight", "post_attention_layernorm.weight"],
        },
        {"embedding": ["model.embed_tokens.weight"], "norm": ["model.norm.weight"], "head": ["lm_head.weight"]},
    ),
    "qwen2": (
        "model.layers",
        {
            "q": ["self_attn.q_proj.weight", "self_attn.q_proj.bias"],
            "k": ["self_attn.k_proj.weight", "self_attn.k_proj.bias"],
            "v": ["self_attn.v_proj.weight", "self_attn.v_proj.bias"],
            "o": ["self_attn.o_proj.weight"],
            "gate": ["mlp.gate_proj.weight"],
            "up": ["mlp.up_proj.weight"],
            "down": ["mlp.down_proj.weight"],
            "norm": ["input_layernorm.weight", "post_attention_layernorm.weight"],
        },
        {"embedding": ["model.embed_tokens.weight"], "norm": ["model.norm.weight"], "head": ["lm_head.weight"]},
    ),
    "qwen3": (
        "model.layers",
        {
            "q": ["self_attn.q_proj.weight"],
            "k": ["self_attn.k_proj.weight"],
            "v": ["self_attn.v_proj.weight"],
            "o": ["self_attn.o_proj.weight"],
            "gate": ["mlp.gate_proj.weight"],
            "up": ["mlp.up_proj.weight"],
            "down": ["mlp.down_proj.weight"],
            "norm": [
                "self_attn.q_norm.weight",
                "self_attn.k_norm.weight",
                "input_layernorm.weight",
                "post_attention_layernorm.weight",
            ],
        },
        {"embedding": ["model.embed_tokens.weight"], "norm": ["model.norm.weight"], "head": ["lm_head.weight"]},
    ),
    "gemma2": (  # the head is tied: the embedding, once
        "model.layers",
        {
            "q": ["self_attn.q_proj.weight"],
            "k": ["self_attn.k_proj.weight"],
            "v": ["self_attn.v_proj.weight"],
            "o": ["self_attn.o_proj.weight"],
            "gate": ["mlp.gate_proj.weight"],
            "up": ["mlp.up_proj.weight"],
            "down": ["mlp.down_proj.weight"],
            "norm": [
                "input_layernorm.weight",
                "post_attention_layernorm.weight",
                "pre_feedforward_layernorm.weight",
                "post_feedforward_layernorm.weight",
            ],
        },
        {"embedding": ["model.embed_tokens.weight"], "norm": ["model.norm.weight"]},
    ),
    "phi3": (
        "model.layers",
        {
            "q": ["self_attn.qkv_proj.weight[rows=0:32]"],
            "k": ["self_attn.qkv_proj.weight[rows=32:48]"],
            "v": ["self_attn.qkv_proj.weight[rows=48:64]"],
            "o": ["self_attn.o_proj.weight"],
            "gate": ["mlp.gate_up_proj.weight[rows=0:48]"],
            "up": ["mlp.gate_up_proj.weight[rows=48:96]"],
            "down": ["mlp.down_proj.weight"],
            "norm": ["input_layernorm.weight", "post_attention_layernorm.weight"],
        },
        {"embedding": ["model.embed_tokens.weight"], "norm": ["model.norm.weight"], "head": ["lm_head.weight"]},
    ),
    "gpt2": (  # Conv1D: output units are columns; the head is tied
        "transformer.h",
        {
            "q": ["attn.c_attn.weight[columns=0:32]", "attn.c_attn.bias[columns=0:32]"],
            "k": ["attn.c_attn.weight[columns=32:64]", "attn.c_attn.bias[columns=32:64]"],
            "v": ["attn.c_attn.weight[columns=64:96]", "attn.c_attn.bias[columns=64:96]"],
            "o": ["attn.c_proj.weight", "attn.c_proj.bias"],
            "up": ["mlp.c_fc.weight", "mlp.c_fc.bias"],
            "down": ["mlp.c_proj.weight", "mlp.c_proj.bias"],
            "norm": ["ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"],
        },
        {
            "embedding": ["transformer.wte.weight", "transformer.wpe.weight"],
            "norm": ["transformer.ln_f.weight", "transformer.ln_f.bias"],
        },
    ),
    "gpt_neox": (  # q, k and v of the first head, then of the second, …
        "gpt_neox.layers",
        {
            "q": [
                "attention.query_key_value.weight[rows=0:8,24:32,48:56,72:80]",
                "attention.query_key_value.bias[columns=0:8,24:32,48:56,72:80]",
            ],
            "k": [
                "attention.query_key_value.weight[rows=8:16,32:40,56:64,80:88]",
                "attention.query_key_value.bias[columns=8:16,32:40,56:64,80:88]",
            ],
            "v": [
                "attention.query_key_value.weight[rows=16:24,40:48,64:72,88:96]",
                "attention.query_key_value.bias[columns=16:24,40:48,64:72,88:96]",
            ],
            "o": ["attention.dense.weight", "attention.dense.bias"],
            "up": ["mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias"],
            "down": ["mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias"],
            "norm": [
                "input_layernorm.weight",
                "input_layernorm.bias",
                "post_attention_layernorm.weight",
                "post_attention_layernorm.bias",
            ],
        },
        {
            "embedding": ["gpt_neox.embed_in.weight"],
            "norm": ["gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias"],
            "head": ["lm_head.weight"],
        },
    ),
    "opt": (
        "model.decoder.layers",
        {
            "q": ["self_attn.q_proj.weight", "self_attn.q_proj.bias"],
            "k": ["self_attn.k_proj.weight", "self_attn.k_proj.bias"],
            "v": ["self_attn.v_proj.weight", "self_attn.v_proj.bias"],
            "o": ["self_attn.out_proj.weight", "self_attn.out_proj.bias"],
            "up": ["fc1.weight", "fc1.bias"],
            "down": ["fc2.weight", "fc2.bias"],
            "norm": [
                "self_attn_layer_norm.weight",
                "self_attn_layer_norm.bias",
                "final_layer_norm.weight",
                "final_layer_norm.bias",
            ],
        },
        {
            "embedding": ["model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"],
            "norm": ["model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"],
            "head": ["lm_head.weight"],
        },
    ),
}


def describe(role: Role, prefix: str = "") -> str:
    """The notation of TABLE."""
    name = role.parameter.removeprefix(prefix)
    if role.selection.kind == "whole":
        return name
    indices = role.selection.indices.tolist()
    runs = [list(run) for _, run in itertools.groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
    ranges = ",".join(f"{run[0][1]}:{run[-1][1] + 1}" for run in runs)
    return f"{name}[{role.selection.kind}={ranges}]"


def table_of(found: list[Role], stack: str, layer: int | None) -> dict[str, list[str]]:
    table = defaultdict(list)
    for role in found:
        if role.layer == layer:
            assert role.stack == ("" if layer is None else stack)
            table[role.name].append(describe(role, "" if layer is None else f"{stack}.{layer}."))
    return dict(table)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_roles_are_those_of_the_table(architecture):
    """Every parameter of a layer, and every one outside, has the role and the block the table gives, and no other."""
    stack, inside, outside = TABLE[architecture]
    found = roles(tiny(architecture))
    assert table_of(found, stack, layer=1) == inside
    assert table_of(found, stack, layer=None) == outside
    assert all(role.parameter.rpartition(".")[0] == role.module for role in found)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_of_every_depth_is_the_same(architecture, depth):
    """Layers count from 0 to the depth, odd or even, and each has the roles of the table."""
    stack, inside, outside = TABLE[architecture]
    key = "n_layer" if architecture == "gpt2" else "num_hidden_layers"
    found = roles(tiny(architecture, **{key: depth}))
    assert {role.layer for role in found} == {None, *range(depth)}
    assert all(table_of(found, stack, layer) == inside for layer in range(depth))
    assert table_of(found, stack, layer=None) == outside


def assert_partition(model: nn.Module) -> None:
    """The blocks of every parameter are disjoint, their union is all of it, and nothing is forgotten."""
    blocks = defaultdict(list)
    for role in roles(model):
        assert role.name in ROLES
        blocks[role.parameter].append(role.selection)
    parameters = base_parameters(model)
    assert list(blocks) == list(parameters)
    for name, selections in blocks.items():
        times = torch.stack([selection.mask().to(torch.int64) for selection in selections]).sum(0)
        assert torch.equal(times, torch.ones(parameters[name].shape, dtype=torch.int64)), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_roles_partition_every_parameter(architecture):
    """Each scalar of the model has exactly one role."""
    assert_partition(tiny(architecture))


# The blocks of fused weights, proved on the model


def fused_parts(architecture: str) -> dict[str, torch.Tensor]:
    """Output units of q, k and v, from the reshapes of the modelling code applied to the numbers of the units."""
    if (
        architecture == "phi3"
    ):  # qkv[..., :query_pos], qkv[..., query_pos : query_pos + kv], qkv[..., query_pos + kv :]
        units = torch.arange(64)
        return {"q": units[:32], "k": units[32 : 32 + 16], "v": units[32 + 16 :]}
    units = torch.arange(96)
    if architecture == "gpt2":  # self.c_attn(hidden_states).split(self.split_size, dim=2)
        return dict(zip("qkv", units.split(32), strict=True))
    per_head = units.view(4, 3 * 8)  # qkv.view(*input_shape, -1, 3 * self.head_size), then chunk(3, dim=-1)
    return {name: part.flatten() for name, part in zip("qkv", per_head.chunk(3, dim=-1), strict=True)}


def into_attention(model: nn.Module, monkeypatch) -> dict[str, torch.Tensor]:
    """What layer 1 hands to the attention function: query, key and value, heads apart, rotated already."""
    model.set_attn_implementation("eager")
    attention = next(m for n, m in model.named_modules() if n.endswith((".1.self_attn", ".1.attn", ".1.attention")))
    modelling = sys.modules[type(attention).__module__]
    original, seen = modelling.eager_attention_forward, {}

    def spy(module, query, key, value, *args, **kwargs):
        if module is attention:
            seen.update(q=query, k=key, v=value)
        return original(module, query, key, value, *args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(modelling, "eager_attention_forward", spy)
        model(tokens())
    assert set(seen) == {"q", "k", "v"}
    return seen


def zero(model: nn.Module, name: str, layer: int = 1) -> None:
    """Put the blocks of a role, weight and bias, to zero, position by position."""
    parameters = base_parameters(model)
    with torch.no_grad():
        for role in roles(model):
            if (role.name, role.layer) == (name, layer):
                parameters[role.parameter].view(-1)[role.selection.positions()] = 0


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("architecture", ["phi3", "gpt2", "gpt_neox"])
def test_zeroing_a_block_silences_that_part_alone(architecture, part, monkeypatch):
    """With the block of q at zero, the attention gets a query of zeros and the same bits of k and v; so for each."""
    model = tiny(architecture)
    before = into_attention(model, monkeypatch)
    zero(model, part)
    after = into_attention(model, monkeypatch)
    for name in "qkv":
        if name == part:
            assert before[name].abs().min() > 0
            assert not after[name].any()
        else:
            assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("architecture", ["phi3", "gpt2", "gpt_neox"])
def test_blocks_are_the_units_the_modelling_code_cuts(architecture):
    """The block of each part holds the output units that the modelling code's own reshape gives it, and no others."""
    expected = fused_parts(architecture)
    found = [role for role in roles(tiny(architecture)) if role.layer == 1 and role.name in expected]
    assert {role.parameter.rpartition(".")[2] for role in found} == (
        {"weight"} if architecture == "phi3" else {"weight", "bias"}
    )
    for role in found:
        assert torch.equal(role.selection.indices, expected[role.name])


@pytest.mark.parametrize("part", ["gate", "up"])
def test_zeroing_gate_or_up_of_a_fused_feed_forward(part):
    """In Phi-3 the activation sees gate alone: zeros with gate's block at zero, the same bits with up's."""
    model = tiny("phi3")
    mlp, seen = model.get_submodule("model.layers.1.mlp"), []
    mlp.activation_fn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens())
        zero(model, part)
        model(tokens())
    gate_before, product_before, gate_after, product_after = seen
    assert product_before.any()
    assert not product_after.any()
    assert not gate_after.any() if part == "gate" else torch.equal(gate_after, gate_before)


def test_fused_blocks_follow_the_sizes_of_the_model():
    """Other numbers of heads and groups give other blocks: sizes come from the model, not from a table."""
    phi3 = roles(tiny("phi3", hidden_size=48, num_attention_heads=6, num_key_value_heads=3))
    assert [describe(r) for r in phi3 if r.layer == 0 and r.name in "qkv"] == [
        "model.layers.0.self_attn.qkv_proj.weight[rows=0:48]",
        "model.layers.0.self_attn.qkv_proj.weight[rows=48:72]",
        "model.layers.0.self_attn.qkv_proj.weight[rows=72:96]",
    ]
    neox = roles(tiny("gpt_neox", hidden_size=12, num_attention_heads=3))
    assert describe(next(r for r in neox if r.name == "k")) == (
        "gpt_neox.layers.0.attention.query_key_value.weight[rows=4:8,16:20,28:32]"
    )


# What is not recognised


def known_as(model: nn.Module) -> dict[str, str]:
    """{parameter: role}, several of one parameter joined by commas; and the roles are a partition."""
    assert_partition(model)
    table = defaultdict(list)
    for role in roles(model):
        table[role.parameter].append(role.name)
    return {name: ",".join(found) for name, found in table.items()}


def test_modules_that_nobody_knows():
    """A plain MLP, a convolution, a layer of one's own: "unknown", norms and embeddings apart; nothing raises."""
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2))
    assert known_as(mlp) == {
        "0.weight": "unknown",
        "0.bias": "unknown",
        "2.weight": "norm",
        "2.bias": "norm",
        "3.weight": "unknown",
        "3.bias": "unknown",
    }
    assert known_as(nn.Conv2d(3, 4, 2)) == {"weight": "unknown", "bias": "unknown"}
    assert known_as(nn.LSTM(2, 3)).keys() == dict(nn.LSTM(2, 3).named_parameters()).keys()
    assert known_as(nn.Sequential(nn.Embedding(5, 4), nn.BatchNorm1d(4))) == {
        "0.weight": "embedding",
        "1.weight": "norm",
        "1.bias": "norm",
    }
    assert known_as(nn.Identity()) == {}


def layered(**modules: nn.Module) -> nn.Module:
    """A model of one layer, `layers.0.attn`, that holds these modules."""
    model, layer = nn.Module(), nn.Module()
    layer.attn = nn.ModuleDict(modules)
    model.layers = nn.ModuleList([layer])
    return model


class Scaled(nn.Linear):
    """A linear module with scales of its own, as quantised ones have."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.scale = nn.Parameter(torch.ones(1))
        self.weight_scale_inv = nn.Parameter(torch.ones(2, 1))


class Weightless(nn.Module):
    """A linear map whose matrix has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(12, 4))


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ({"wq": nn.Linear(4, 4), "wk": nn.Linear(4, 4), "wv": nn.Linear(4, 4)}, "unknown"),
        ({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4)}, "unknown"),
        ({"qkv_proj": nn.Linear(4, 12)}, "unknown"),
        ({"qkv_proj": nn.Linear(4, 12), "o_proj": nn.Identity()}, "unknown"),
        ({"qkv_proj": nn.Linear(4, 11), "o_proj": nn.Linear(4, 4)}, "unknown"),
        ({"qkv_proj": nn.Linear(4, 4), "o_proj": nn.Linear(4, 4)}, "unknown"),
        ({"qkv_proj": nn.Linear(4, 12), "out_proj": nn.Linear(4, 4)}, "unknown"),
        ({"qkv_proj": nn.Linear(4, 12), "o_proj": nn.Linear(4, 4), "out_proj": nn.Linear(4, 4)}, "unknown"),
        ({"qkv_proj": Weightless(), "o_proj": nn.Linear(4, 4)}, "unknown"),
        ({"qkv_proj": nn.Conv1d(4, 12, 1), "o_proj": nn.Linear(4, 4)}, "unknown"),
        ({"query_key_value": nn.Linear(4, 12), "dense": nn.Linear(4, 4)}, "unknown"),  # no config says how many heads
        ({"qkv_proj": nn.Linear(4, 12), "o_proj": nn.Linear(4, 4)}, "q,k,v"),
        ({"gate_up_proj": nn.Linear(4, 7)}, "unknown"),
        ({"gate_up_proj": Weightless()}, "unknown"),
        ({"gate_up_proj": nn.Linear(4, 8)}, "gate,up"),
    ],
    ids=str,
)
def test_a_fused_weight_is_cut_only_where_the_sizes_add_up(modules, expected):
    """Odd sizes, a missing or second output projection, no weight: "unknown", whole, and no exception."""
    found = known_as(layered(**modules))
    first = next(iter(modules))
    assert {role for name, role in found.items() if f".{first}." in name} == {expected}


@pytest.mark.parametrize(("name", "expected"), [("qkv_proj", "q,k,v"), ("gate_up_proj", "gate,up")])
def test_scales_beside_a_fused_weight(name, expected):
    """The scales of a quantised weight have no output units: they are "unknown", weight and bias are cut."""
    found = known_as(layered(**{name: Scaled(4, 12), "o_proj": nn.Linear(4, 4)}))
    assert [found[f"layers.0.attn.{name}.{p}"] for p in ("weight", "bias", "scale", "weight_scale_inv")] == [
        expected, expected, "unknown", "unknown",
    ]  # fmt: skip


SMALL = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}


@pytest.mark.parametrize(
    ("config", "fused", "expected"),
    [
        (CodeGenConfig(**SMALL, rotary_dim=4), "qkv_proj.weight", "unknown"),
        (GPTBigCodeConfig(**SMALL, multi_query=False), "c_attn.weight", "unknown"),
        (GPTBigCodeConfig(**SMALL, multi_query=True), "c_attn.weight", "q,k,v"),
    ],
    ids=["codegen", "gpt_bigcode", "gpt_bigcode-multi_query"],
)
def test_a_known_name_with_another_order_is_not_guessed(config, fused, expected):
    """CodeGen's qkv_proj holds q, v, k per core, GPT-BigCode's c_attn goes by heads unless these share k and v."""
    found = known_as(AutoModelForCausalLM.from_config(config))
    assert [role for name, role in found.items() if name.endswith(fused)] == [expected]


# Wrapped models


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["lora", "half_ft", "saved attention", "saved head", "tokens"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_roles_look_through_adapters(architecture, how):
    """Inside a PeftModel, whatever is wrapped, every parameter has the role, name, module and layer it had before."""
    model = tiny(architecture)
    before = roles(model)
    linear = sorted({role.module.rpartition(".")[2] for role in before if role.name in ("q", "o", "up", "down")})
    down = next(role.module.rpartition(".")[2] for role in before if role.name == "down")
    attention = next(role.module.split(".")[-2] for role in before if role.name == "o")
    config = {
        "lora": LoraConfig(target_modules=linear),
        "half_ft": HalfFTConfig(),
        "saved attention": LoraConfig(target_modules=[down], modules_to_save=[attention]),
        "saved head": LoraConfig(target_modules=linear, modules_to_save=["lm_head"]),
        "tokens": LoraConfig(target_modules=linear, trainable_token_indices=[1, 2]),
    }[how]
    inside = get_peft_model(model, config)
    assert roles(inside) == before
    assert roles(inside.get_base_model()) == before


def test_a_bias_is_one_row():
    """The block of a bias is a selection of columns of a vector: the same output units as its matrix's rows."""
    found = {r.parameter.rpartition(".")[2]: r for r in roles(tiny("gpt_neox")) if r.name == "k" and r.layer == 0}
    assert found["weight"].selection.kind == "rows"
    assert found["bias"].selection == Selection.elements((96,), found["weight"].selection.indices)
