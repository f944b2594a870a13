"""Roles: what every parameter of every architecture is, told to the last scalar and proved on the model itself."""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, CodeGenConfig, FalconConfig, GPTBigCodeConfig, GptOssConfig

from peft_isolate import HalfFTConfig
from peft_isolate.regions import ROLES, Role, Selection, base_parameters, roles
from tests.models import ARCHITECTURES, MORE_ARCHITECTURES, tiny, tokens

# {architecture: (stack, {role: parameters of layer 1}, {role: parameters outside the layers})}, in the model's order.
# Hidden size 32, 4 heads of 8 (2 for k and v where they are grouped), 48 inner units (GPT-2: 128).
# "weight[rows=0:8,24:32]" is a block of a fused weight, half-open ranges; a bias is one row, so that its entries are
# columns.
LLAMA_ATTENTION = {name: [f"self_attn.{name}_proj.weight"] for name in "qkvo"}
LLAMA_LAYER = LLAMA_ATTENTION | {name: [f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
LLAMA_OUTSIDE = {
    "embedding": ["model.embed_tokens.weight"],
    "norm": ["model.norm.weight"],
    "head": ["lm_head.weight"],
}
QWEN3_NORMS = [
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
]
GEMMA_NORMS = [*QWEN3_NORMS, "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"]


def experts(inner: int) -> dict[str, list[str]]:
    """Two experts in fused tensors (2, 2 · inner, 32) and (2, 32, inner): gate, up, gate, up; down, down."""
    rows = [f"rows={i * inner}:{(i + 1) * inner}" for i in range(4)]
    table = {}
    for e in range(2):
        table[f"gate {e}"] = [f"mlp.experts.gate_up_proj[{rows[2 * e]}]"]
        table[f"up {e}"] = [f"mlp.experts.gate_up_proj[{rows[2 * e + 1]}]"]
        table[f"down {e}"] = [f"mlp.experts.down_proj[rows={32 * e}:{32 * (e + 1)}]"]
    return table


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
    "gemma3": (  # the head is tied
        "model.layers",
        LLAMA_LAYER | {"norm": GEMMA_NORMS},
        {"embedding": ["model.embed_tokens.weight"], "norm": ["model.norm.weight"]},
    ),
    "bert": (  # the head is tied, but for its bias
        "bert.encoder.layer",
        {
            "q": ["attention.self.query.weight", "attention.self.query.bias"],
            "k": ["attention.self.key.weight", "attention.self.key.bias"],
            "v": ["attention.self.value.weight", "attention.self.value.bias"],
            "o": ["attention.output.dense.weight", "attention.output.dense.bias"],
            "norm": [
                "attention.output.LayerNorm.weight",
                "attention.output.LayerNorm.bias",
                "output.LayerNorm.weight",
                "output.LayerNorm.bias",
            ],
            "up": ["intermediate.dense.weight", "intermediate.dense.bias"],
            "down": ["output.dense.weight", "output.dense.bias"],
        },
        {
            "embedding": [
                "bert.embeddings.word_embeddings.weight",
                "bert.embeddings.position_embeddings.weight",
                "bert.embeddings.token_type_embeddings.weight",
            ],
            "norm": [
                "bert.embeddings.LayerNorm.weight",
                "bert.embeddings.LayerNorm.bias",
                "cls.predictions.transform.LayerNorm.weight",
                "cls.predictions.transform.LayerNorm.bias",
            ],
            "unknown": [
                "cls.predictions.bias",
                "cls.predictions.transform.dense.weight",
                "cls.predictions.transform.dense.bias",
            ],
        },
    ),
    "mixtral": (
        "model.layers",
        LLAMA_ATTENTION
        | {"router": ["mlp.gate.weight"]}
        | experts(inner=48)
        | {"norm": ["input_layernorm.weight", "post_attention_layernorm.weight"]},
        LLAMA_OUTSIDE,
    ),
    "qwen3_moe": (
        "model.layers",
        LLAMA_ATTENTION | {"router": ["mlp.gate.weight"]} | experts(inner=24) | {"norm": QWEN3_NORMS},
        LLAMA_OUTSIDE,
    ),
}

# The same for models whose layers are not all alike, or stand in two stacks: {architecture: {place: roles}}, where the
# place is a layer, or "" outside of the layers. "shared" is a shared expert's, "cross" a cross-attention's.
SHARED_EXPERT = {
    "router": ["mlp.gate.weight", "mlp.shared_expert_gate.weight"],
    "shared gate": ["mlp.shared_expert.gate_proj.weight"],
    "shared up": ["mlp.shared_expert.up_proj.weight"],
    "shared down": ["mlp.shared_expert.down_proj.weight"],
}
DELTA_NET = {
    "state": ["linear_attn.dt_bias", "linear_attn.A_log"],
    "mixer": [
        "linear_attn.conv1d.weight",
        "linear_attn.in_proj_qkvz.weight",
        "linear_attn.in_proj_ba.weight",
        "linear_attn.out_proj.weight",
    ],
    "norm": ["linear_attn.norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight"],
}
QWEN3_NEXT_EXPERTS = experts(inner=24) | SHARED_EXPERT


def t5_layer(stack: str, layer: int) -> dict[str, list[str]]:
    """Only the first layer of a stack has the bias by distance, which is a table but no embedding of tokens."""
    attention = {name: [f"layer.0.SelfAttention.{name}.weight"] for name in "qkvo"}
    if layer == 0:
        attention["unknown"] = ["layer.0.SelfAttention.relative_attention_bias.weight"]
    if stack == "decoder":
        attention |= {f"cross {name}": [f"layer.1.EncDecAttention.{name}.weight"] for name in "qkvo"}
    last = 2 if stack == "decoder" else 1
    return attention | {
        "gate": [f"layer.{last}.DenseReluDense.wi_0.weight"],
        "up": [f"layer.{last}.DenseReluDense.wi_1.weight"],
        "down": [f"layer.{last}.DenseReluDense.wo.weight"],
        "norm": [f"layer.{i}.layer_norm.weight" for i in range(last + 1)],
    }


def both(module: str) -> list[str]:
    return [f"{module}.weight", f"{module}.bias"]


MORE_TABLE = {
    "t5": {
        "": {
            "embedding": ["shared.weight"],
            "norm": ["encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"],
        },
    }
    | {f"{stack}.block.{i}.": t5_layer(stack, i) for stack in ("encoder", "decoder") for i in range(3)},
    "qwen2_moe": {"": LLAMA_OUTSIDE}
    | {
        f"model.layers.{i}.": {name: both(f"self_attn.{name}_proj") for name in "qkv"}
        | {"o": ["self_attn.o_proj.weight"], "norm": ["input_layernorm.weight", "post_attention_layernorm.weight"]}
        | QWEN3_NEXT_EXPERTS
        for i in range(3)
    },
    "qwen3_next": {
        "": LLAMA_OUTSIDE,
        "model.layers.0.": DELTA_NET | QWEN3_NEXT_EXPERTS,
        "model.layers.1.": DELTA_NET | QWEN3_NEXT_EXPERTS,
        "model.layers.2.": LLAMA_ATTENTION | {"norm": QWEN3_NORMS} | QWEN3_NEXT_EXPERTS,
    },
    "mamba": {  # the head is tied
        "": {"embedding": ["backbone.embeddings.weight"], "norm": ["backbone.norm_f.weight"]},
    }
    | {
        f"backbone.layers.{i}.": {
            "norm": ["norm.weight"],
            "state": ["mixer.A_log", "mixer.D"],
            "mixer": [
                *both("mixer.conv1d"),
                "mixer.in_proj.weight",
                "mixer.x_proj.weight",
                *both("mixer.dt_proj"),
                "mixer.out_proj.weight",
            ],
        }
        for i in range(3)
    },
    "gemma3_vision": {
        "": {
            "unknown": [
                *both("model.vision_tower.embeddings.patch_embedding"),
                "model.vision_tower.head.probe",
                "model.vision_tower.head.attention.in_proj_weight",
                "model.vision_tower.head.attention.in_proj_bias",
                *both("model.vision_tower.head.attention.out_proj"),
                *both("model.vision_tower.head.mlp.fc1"),
                *both("model.vision_tower.head.mlp.fc2"),
                "model.multi_modal_projector.mm_input_projection_weight",
            ],
            "embedding": [
                "model.vision_tower.embeddings.position_embedding.weight",
                "model.language_model.embed_tokens.weight",
            ],
            "norm": [
                *both("model.vision_tower.post_layernorm"),
                *both("model.vision_tower.head.layernorm"),
                "model.multi_modal_projector.mm_soft_emb_norm.weight",
                "model.language_model.norm.weight",
            ],
        },
    }
    | {
        f"model.vision_tower.encoder.layers.{i}.": {
            name: both(f"self_attn.{module}")
            for name, module in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}.items()
        }
        | {"up": both("mlp.fc1"), "down": both("mlp.fc2"), "norm": [*both("layer_norm1"), *both("layer_norm2")]}
        for i in range(2)
    }
    | {f"model.language_model.layers.{i}.": LLAMA_LAYER | {"norm": GEMMA_NORMS} for i in range(3)},
}


def label(role: Role) -> str:
    """A role in the notation of the tables."""
    block = {"cross-attention": "cross ", "shared-expert": "shared "}.get(role.block, "")
    return block + role.name + ("" if role.expert is None else f" {role.expert}")


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
            table[label(role)].append(describe(role, "" if layer is None else f"{stack}.{layer}."))
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


@pytest.mark.parametrize("architecture", MORE_ARCHITECTURES)
def test_roles_of_uneven_models_are_those_of_the_table(architecture):
    """Two stacks, several kinds of layers, other towers: every parameter again, layer by layer."""
    table = defaultdict(lambda: defaultdict(list))
    for role in roles(tiny(architecture)):
        place = "" if role.layer is None else f"{role.stack}.{role.layer}."
        table[place][label(role)].append(describe(role, place))
        assert role.parameter.startswith(place)
    assert table == MORE_TABLE[architecture]


BLOCKS = {
    **{name: {"attention", "cross-attention"} for name in "qkvo"},
    **{name: {"feed-forward", "expert", "shared-expert"} for name in ("gate", "up", "down")},
    **{name: {"mixer"} for name in ("mixer", "state")},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES + MORE_ARCHITECTURES)
def test_blocks_and_experts(architecture):
    """A matrix has its block, everything else has none; an expert's number is there for experts and only for them."""
    for role in roles(tiny(architecture)):
        assert role.block in BLOCKS.get(role.name, {""})
        assert (role.expert is not None) == (role.block == "expert")


@pytest.mark.parametrize("architecture", ARCHITECTURES + MORE_ARCHITECTURES)
def test_towers(architecture):
    """One tower, both stacks of T5 in it; but of Gemma 3 with vision the language model alone is the main one."""
    for role in roles(tiny(architecture)):
        other = next((n for n in ("model.vision_tower", "model.multi_modal_projector") if n in role.parameter), "")
        assert role.tower == other


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


@pytest.mark.parametrize("architecture", ARCHITECTURES + MORE_ARCHITECTURES)
def test_roles_partition_every_parameter(architecture):
    """Each scalar of the model has exactly one role."""
    assert_partition(tiny(architecture))


# The blocks of fused weights, proved on the model

FALCONS = [{"multi_query": False}, {"multi_query": True}, {"new_decoder_architecture": True, "num_kv_heads": 2}]


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


def test_zeroing_an_experts_block_silences_that_expert_alone():
    """With the rows of gate, up or down of expert 1 at zero, the experts give what expert 0 alone gives."""
    for name in ("gate", "up", "down"):
        model = tiny("mixtral")
        fused = model.get_submodule("model.layers.1.mlp.experts")
        x, chosen = torch.randn(5, 32), torch.tensor([[0, 1]] * 5)
        with torch.no_grad():
            alone = fused(x, chosen, torch.tensor([[0.3, 0.0]] * 5))
            for role in roles(model):
                if (role.name, role.layer, role.expert) == (name, 1, 1):
                    model.get_parameter(role.parameter).view(-1)[role.selection.positions()] = 0
            torch.testing.assert_close(fused(x, chosen, torch.tensor([[0.3, 0.7]] * 5)), alone)
            assert alone.abs().min() > 0


def test_rows_of_interleaved_experts():
    """gate, up, gate, up, … where the module says that they are no halves; and unknown where it is silent."""
    model = tiny("mixtral")
    for module in model.modules():
        if hasattr(module, "is_concatenated"):
            module.is_concatenated = False
    blocks = [r for r in roles(model) if r.layer == 0 and r.expert == 1]
    assert [r.name for r in blocks] == ["gate", "up", "down"]
    assert blocks[0].selection.indices.tolist() == list(range(96, 192, 2))
    assert blocks[1].selection.indices.tolist() == list(range(97, 192, 2))
    assert_partition(model)
    for module in model.modules():
        if hasattr(module, "is_concatenated"):
            del module.is_concatenated
    assert known_as(model)["model.layers.0.mlp.experts.gate_up_proj"] == "unknown"
    assert known_as(model)["model.layers.0.mlp.experts.down_proj"] == "down,down"


def test_experts_in_a_list_of_modules():
    """As in transformers 4 and in many a model of one's own: the outer number is the layer, the inner the expert."""

    def feed_forward() -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(4, 4) for name in ("gate_proj", "up_proj", "down_proj")})

    layers = nn.ModuleList(nn.Module() for _ in range(4))
    for layer in layers:
        layer.mlp = nn.Module()
        layer.mlp.gate = nn.Linear(4, 8, bias=False)
        layer.mlp.experts = nn.ModuleList(feed_forward() for _ in range(8))
        layer.mlp.shared_experts = feed_forward()
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = layers
    found = {role.parameter: role for role in roles(model)}
    for kind in ("gate", "up", "down"):
        for leaf in ("weight", "bias"):
            role = found[f"model.layers.3.mlp.experts.7.{kind}_proj.{leaf}"]
            assert (role.stack, role.layer, role.expert) == ("model.layers", 3, 7)
            assert (role.name, role.block) == (kind, "expert")
            role = found[f"model.layers.3.mlp.shared_experts.{kind}_proj.{leaf}"]
            assert (role.layer, role.expert, role.name, role.block) == (3, None, kind, "shared-expert")
    assert found["model.layers.3.mlp.gate.weight"].name == "router"
    assert_partition(model)


@pytest.mark.parametrize("config", FALCONS, ids=str)
def test_groups_of_falcon_are_the_units_the_modelling_code_cuts(config):
    """Falcon's own reshape, applied to the numbers of the units: heads, one k and v for all, or one for each group."""
    model = AutoModelForCausalLM.from_config(
        FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, **config)
    )
    attention = model.transformer.h[0].self_attention
    cut = attention._split_heads(torch.arange(attention.query_key_value.weight.shape[0]).view(1, 1, -1))
    found = {r.name: r.selection for r in roles(model) if "query_key_value" in r.parameter}
    for name, units in zip("qkv", cut, strict=True):
        assert torch.equal(found[name].indices, units.flatten().unique())  # k and v are repeated for each head
    assert_partition(model)


# What is not recognised


def test_transposed_experts_are_recognised_in_part():
    """In gpt-oss gate and up are single elements of each row: "unknown"; down is a run of rows, as everywhere."""
    shape = {"num_local_experts": 2, "head_dim": 8, "intermediate_size": 48, "num_hidden_layers": 1}
    found = known_as(
        AutoModelForCausalLM.from_config(
            GptOssConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, **shape)
        )
    )
    layer = "model.layers.0"
    assert {n.removeprefix(f"{layer}.mlp."): r for n, r in found.items() if ".mlp." in n} == {
        "router.weight": "router",
        "router.bias": "router",
        "experts.gate_up_proj": "unknown",
        "experts.gate_up_proj_bias": "unknown",
        "experts.down_proj": "down,down",
        "experts.down_proj_bias": "down,down",
    }
    assert found[f"{layer}.self_attn.sinks"] == "unknown"


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


@pytest.mark.parametrize(
    "modules",
    [
        {"up_proj": nn.Linear(4, 8)},
        {"w1": nn.Linear(4, 8), "w2": nn.Linear(8, 4)},
        {"wi": nn.Linear(4, 8)},
        {"mixer": nn.Linear(4, 4)},
        {"gate": nn.Linear(4, 2)},
        {"intermediate": nn.Linear(4, 8), "output": nn.Linear(8, 4)},
        {"conv": nn.Conv2d(4, 4, 1), "dense": nn.Linear(4, 4)},
    ],
    ids=str,
)
def test_a_name_alone_is_not_enough(modules):
    """Half a feed-forward, a router without experts, a "mixer" that is one matrix."""
    assert set(known_as(layered(**modules)).values()) == {"unknown"}


def test_layers_that_are_matrices_themselves():
    """A list of plain matrices, with and without a model around it, and a layer with parameters of its own."""
    assert set(known_as(nn.ModuleList([nn.Linear(4, 4)])).values()) == {"unknown"}
    assert set(known_as(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])})).values()) == {"unknown"}
    model = layered(q_proj=nn.Linear(4, 4), k_proj=nn.Linear(4, 4), v_proj=nn.Linear(4, 4), o_proj=nn.Linear(4, 4))
    model.layers[0].scale = nn.Parameter(torch.ones(4, 4))
    assert [known_as(model)[name] for name in ("layers.0.scale", "layers.0.attn.q_proj.weight")] == ["unknown", "q"]


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
    matrices = [r for r in before if r.name in ("q", "o", "up", "down") and r.block != "expert"]
    linear = sorted({role.module.rpartition(".")[2] for role in matrices})
    down = next((role.module.rpartition(".")[2] for role in matrices if role.name == "down"), "lm_head")
    attention = next(role.module.split(".")[-2] for role in before if role.name == "q")
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
