"""The draw of HFT: the paper's counts and share, its edge cases; a pure function of config and names."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from peft_isolate import HalfFTConfig, plan
from peft_isolate.errors import RegionError
from peft_isolate.methods.half_ft.draw import Member, draw, members, union
from peft_isolate.regions import Region, Selection, roles
from tests.models import ARCHITECTURES, MORE_ARCHITECTURES, tiny, tokens

ATTENTION, FEED_FORWARD = {"q", "k", "v", "o"}, {"gate", "up", "down"}


def drawn_roles(model, **config) -> dict[int | None, list[str]]:
    """{layer: roles that learn, one entry a matrix or norm}."""
    found = defaultdict(list)
    for row in plan(model, HalfFTConfig(**config)).rows:
        if row.trained and not row.parameter.endswith("bias"):
            assert row.trained == row.scalars, "a matrix learns whole or not at all"
            found[row.layer].append(row.role)
    return found


def meta(**config):
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**config))


def test_the_share_of_llama_2_7b_is_the_papers():
    """51.95 % with embeddings and head, on the real shapes."""
    with pytest.warns(UserWarning, match="train_embeddings='input'.*plain Trainer"):
        table = plan(meta(), HalfFTConfig(train_embeddings=True))
    assert round(100 * table.share, 2) == 51.95


@pytest.mark.parametrize("n_layers", [1, 2, 5, 8])
@pytest.mark.parametrize("seed", range(3))
def test_category_level_is_the_papers(n_layers, seed):
    """Of a layer 2 of 4 attention matrices, 1 of 2 norms; 2 of 3 feed-forward in half of the layers, rounded up."""
    by_layer = drawn_roles(tiny(num_hidden_layers=n_layers), seed=seed)
    feed_forward = []
    for layer in range(n_layers):
        names = by_layer[layer]
        assert len(ATTENTION & set(names)) == 2
        assert names.count("norm") == 1
        feed_forward.append(len(FEED_FORWARD & set(names)))
    assert set(feed_forward) <= {1, 2}
    assert sum(feed_forward) == math.floor(1.5 * n_layers + 0.5)
    assert by_layer[None] == ["norm"], "the final norm always learns; embeddings and head do not"


def test_layer_level_takes_whole_layers():
    by_layer = drawn_roles(tiny(num_hidden_layers=5), granularity="layer")
    layers = [layer for layer in by_layer if layer is not None]
    assert len(layers) == 3  # odd: rounded up
    assert all(len(by_layer[layer]) == 9 for layer in layers)


def test_model_level_takes_any_half():
    by_layer = drawn_roles(tiny(num_hidden_layers=4), granularity="model")
    assert sum(len(names) for layer, names in by_layer.items() if layer is not None) == 18
    assert len({len(by_layer[layer]) for layer in range(4)}) > 1, "not the same number in every layer"


@pytest.mark.parametrize("granularity", ["category", "layer", "model"])
@pytest.mark.parametrize("fraction", [0.25, 0.4, 0.6, 1.0])
def test_other_fractions(granularity, fraction):
    """The total is round(fraction · n · N) of each category; 1.0 is everything."""
    by_layer = drawn_roles(tiny(num_hidden_layers=10), granularity=granularity, fraction=fraction)
    counted = Counter(name for layer, names in by_layer.items() if layer is not None for name in names)
    if granularity == "category":
        assert sum(counted[name] for name in ATTENTION) == math.floor(fraction * 40 + 0.5)
        assert sum(counted[name] for name in FEED_FORWARD) == math.floor(fraction * 30 + 0.5)
        assert counted["norm"] == math.floor(fraction * 20 + 0.5)
    expected = 9 * math.floor(fraction * 10 + 0.5) if granularity == "layer" else math.floor(fraction * 90 + 0.5)
    assert counted.total() == expected


def test_a_tiny_fraction_trains_at_least_one():
    table = plan(tiny(), HalfFTConfig(fraction=0.01, target_modules=["q_proj", "k_proj"]))
    assert len(table.region) == 1


def test_grouped_query_attention_by_count_and_by_parameters():
    """On Llama-3-8B's shapes a draw by count trains 20, 50 or 80 % of an attention; by parameters always a half."""
    model = meta(num_hidden_layers=32, num_key_value_heads=8, intermediate_size=14336)

    def shares(**config):
        trained, total = Counter(), Counter()
        for row in plan(model, HalfFTConfig(**config)).rows:
            if row.role in ATTENTION:
                trained[row.layer] += row.trained
                total[row.layer] += row.scalars
        return {round(trained[layer] / total[layer], 2) for layer in total}

    assert shares(balance="count") == {0.2, 0.5, 0.8}
    assert shares(balance="parameters") == {0.5}


@pytest.mark.parametrize("granularity", ["category", "model"])
def test_balance_ignores_biases(granularity):
    """q has a bias and o has none in Qwen2: they are still the two large ones."""
    for seed in range(5):
        counted = Counter()
        for names in drawn_roles(
            tiny("qwen2", num_hidden_layers=2), balance="parameters", seed=seed, granularity=granularity
        ).values():
            counted.update(names)
        assert counted["q"] + counted["o"] == counted["k"] + counted["v"] == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture):
    """Half of each category, fused blocks whole, and a bias exactly where its matrix is."""
    model = tiny(architecture)
    table = plan(model, HalfFTConfig())
    by_layer = drawn_roles(model)
    found = roles(model)
    norms = Counter(r.layer for r in found if r.name in ("norm", "router") and r.parameter.endswith("weight"))
    n_feed_forward = len({role.name for role in found} & FEED_FORWARD)
    n_experts = len({role.expert for role in found} - {None}) or 1
    for layer in range(3):
        names = by_layer[layer]
        assert len(ATTENTION & set(names)) == 2
        assert abs(names.count("norm") + names.count("router") - norms[layer] / 2) <= 0.5
        drawn = sum(names.count(name) for name in FEED_FORWARD)
        assert drawn == 1 if n_feed_forward == 2 else n_experts <= drawn <= 2 * n_experts
    learns = {(row.parameter.rpartition(".")[0], row.role): row.trained > 0 for row in table.rows}
    for row in table.rows:
        assert n_experts > 1 or (row.trained > 0) == learns[row.parameter.rpartition(".")[0], row.role]
    assert 0.35 < table.share < 0.55


def drawn_members(model, **config) -> tuple[Counter, Counter]:
    """How many members of each (category, stack, layer, expert) learn, and how many there are."""
    region = plan(model, HalfFTConfig(**config)).region
    learn, every = Counter(), Counter()
    for member in members(roles(model)):
        name, selection = next(iter(member.parts.items()))
        part = region[name] & selection if name in region else None
        assert part is None or part.count in (0, selection.count), "a block learns whole or not at all"
        key = (member.category, *member.place, member.expert)
        every[key] += 1
        learn[key] += bool(part is not None and part.count)
    return learn, every


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("architecture", "config", "n_experts"),
    [("mixtral", {"num_local_experts": 8}, 8), ("qwen3_moe", {"num_experts": 5}, 5), ("qwen2_moe", {}, 2)],
)
def test_a_mixture_is_drawn_expert_by_expert(architecture, config, n_experts, seed):
    """Of each expert 2 or 1 of {gate, up, down}, 2 in half of all (layer, expert); routers count as norms."""
    model = tiny(architecture, **config)
    learn, every = drawn_members(model, seed=seed)
    experts = {key: learn[key] for key in every if key[0] == "expert"}
    assert len(experts) == 3 * n_experts
    assert set(experts.values()) == {1, 2}
    assert sum(experts.values()) == math.floor(1.5 * len(experts) + 0.5)
    shared = [learn[key] for key in every if key[0] == "shared-expert"]
    assert sum(shared) == (5 if architecture == "qwen2_moe" else 0)
    assert set(shared) <= {1, 2}
    norms = {key: every[key] for key in every if key[0] == "norm" and key[2] is not None}
    # 2 or 4 norms a layer, and its router; in Qwen2-MoE the shared expert's gate as well.
    assert set(norms.values()) == {{"mixtral": 3, "qwen3_moe": 5, "qwen2_moe": 4}[architecture]}
    assert sum(learn[key] for key in norms) == math.floor(0.5 * sum(norms.values()) + 0.5)


def test_whole_layers_of_a_mixture():
    learn, every = drawn_members(tiny("mixtral"), granularity="layer")
    layers = {layer: {learn[key] / every[key] for key in every if key[2] == layer} for layer in range(3)}
    assert sorted(layers.values(), key=min) == [{0.0}, {1.0}, {1.0}]


@pytest.mark.filterwarnings("error")
def test_both_attentions_of_both_stacks():
    """T5: 2 of 4 in each attention, the decoder's two apart, and 2 or 1 of 3 over the layers of both stacks."""
    for seed in range(3):
        learn, every = drawn_members(tiny("t5"), seed=seed)
        attentions = [key for key in every if key[0] in ("attention", "cross-attention")]
        assert len(attentions) == 9
        assert all(learn[key] == 2 for key in attentions)
        assert sum(learn[key] for key in every if key[0] == "feed-forward") == 9
        assert learn["norm", "", None, None] == 2, "the final norm of each stack"
        assert sum(learn[key] for key in every if key[0] == "other") == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("architecture", "n_layers", "n_matrices"), [("mamba", 3, 5), ("qwen3_next", 2, 4)])
def test_half_of_a_mixer(architecture, n_layers, n_matrices):
    """Of a mixer's matrices half of what is there, whatever their names; what it holds itself stays."""
    learn, every = drawn_members(tiny(architecture))
    mixers = {key: every[key] for key in every if key[0] == "mixer"}
    assert list(mixers.values()) == [n_matrices] * n_layers
    assert sum(learn[key] for key in mixers) == math.floor(0.5 * n_layers * n_matrices + 0.5)
    assert all(abs(learn[key] - n_matrices / 2) <= 0.5 for key in mixers)
    assert sum(learn[key] for key in every if key[0] == "other") == 0


@pytest.mark.filterwarnings("ignore:the adapter will take")
@pytest.mark.parametrize("architecture", MORE_ARCHITECTURES)
def test_what_is_drawn_can_be_wrapped_and_learns(architecture):
    """Mixers, cross-attentions, shared experts, routers: no module inside a wrapped one, and none gets nothing."""
    model = get_peft_model(tiny(architecture), HalfFTConfig(fraction=1.0)).train()
    image = {"token_type_ids": torch.zeros_like(tokens())} if architecture == "gemma3_vision" else {}  # there is none
    model(input_ids=tokens(), labels=tokens(), **image).loss.backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert all(grad is not None and grad.any() for grad in learning.values())


@pytest.mark.filterwarnings("error")
def test_of_a_vision_language_model_the_language_model():
    """The vision tower and the projector stay, norms and embeddings included, and are not called unrecognised."""
    model = tiny("gemma3_vision")
    table = plan(model, HalfFTConfig())
    assert table.region == plan(model, HalfFTConfig()).region
    assert all(name.startswith("model.language_model.") for name in table.region)
    names = {name for name in plan(model, HalfFTConfig(fraction=1.0)).region if ".layers." not in name}
    assert names == {"model.language_model.norm.weight"}
    with pytest.raises(RegionError, match=r"no layer \[3\] in this model, which has 3"):
        plan(model, HalfFTConfig(layers_to_transform=[3]))
    vision = plan(model, HalfFTConfig(target_modules=r".*vision_tower.*(q|k|v)_proj", fraction=1.0)).region
    assert len(vision) == 12, "a user may still name them"


def test_the_blocks_of_many_experts_are_joined_in_one_go():
    """The same region as by | one after the other, and one selection a tensor."""
    model = tiny("mixtral", num_local_experts=6)
    pool = members(roles(model))
    slow = Region()
    for member in pool[::2]:
        slow = slow | Region(member.parts)
    assert union(pool[::2]) == slow
    assert union(pool) == Region.whole(model)


def test_a_large_mixture_is_drawn_in_seconds():
    """48 layers of 128 experts: 18,432 blocks."""
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=48, num_experts=128))
    start = time.perf_counter()
    region = HalfFTConfig().choose(model)
    assert time.perf_counter() - start < 30, "some 0.5 s, were it not for busy machines"
    assert sum(name.endswith("experts.gate_up_proj") for name in region) == 48


@pytest.mark.parametrize("architecture", ["opt", "mamba"])
def test_biases_can_be_left_out(architecture):
    names = list(plan(tiny(architecture), HalfFTConfig(train_bias=False)).region)
    assert names
    assert not any(name.endswith("bias") for name in names)


def test_biases_of_fused_experts_can_be_left_out():
    """They are called down_proj_bias, and follow the rows of down_proj otherwise."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    model = GptOssForCausalLM(GptOssConfig(**shape, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4))
    with pytest.warns(UserWarning, match="were not recognised, such as 'model.layers.0.mlp.experts.gate_up_proj'"):
        region, without = (plan(model, HalfFTConfig(train_bias=train)).region for train in (True, False))
    experts = "model.layers.0.mlp.experts"
    drawn = {row // 48 for row in region[f"{experts}.down_proj"].indices.tolist()}
    assert region[f"{experts}.down_proj_bias"].indices.tolist() == sorted(drawn)
    assert without == Region({name: part for name, part in region.items() if not name.endswith("bias")})


def test_embeddings_and_head():
    assert drawn_roles(tiny(), train_embeddings="input")[None] == ["embedding", "norm"]
    with pytest.warns(UserWarning, match="TRL's trainers refuse"):
        assert drawn_roles(tiny(), train_embeddings=True)[None] == ["embedding", "norm", "head"]


def test_layers_to_transform_and_pattern():
    by_layer = drawn_roles(tiny(num_hidden_layers=6), layers_to_transform=[1, 4])
    assert set(by_layer) == {1, 4}
    assert set(drawn_roles(tiny(), layers_to_transform=2, layers_pattern="layers")) == {2}
    assert set(drawn_roles(tiny(), layers_to_transform=2, layers_pattern=["blocks", "layer[s]"])) == {2}


def test_layers_pattern_tells_two_stacks_apart():
    """As in PEFT, "encoder.layers" is the end of a name."""
    bart = AutoModelForSeq2SeqLM.from_config(
        BartConfig(vocab_size=64, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                   decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
    )  # fmt: skip
    config = {"layers_to_transform": [1], "layers_pattern": "encoder.layers"}
    assert {name.split(".layers.")[0] for name in plan(bart, HalfFTConfig(**config)).region} == {"model.encoder"}
    with pytest.raises(RegionError, match=r"has its layers in \['model.decoder.layers', 'model.encoder.layers'\]"):
        plan(bart, HalfFTConfig(**config | {"layers_pattern": "blocks"}))


def test_target_parameters_stay_in_the_layers_too():
    """PEFT asks that of modules alone."""
    config = {"layers_to_transform": [0, 2], "fraction": 1.0}
    by_parameter = plan(tiny(), HalfFTConfig(target_parameters=["q_proj.weight"], **config)).region
    assert by_parameter == plan(tiny(), HalfFTConfig(target_modules=["q_proj"], **config)).region


def test_target_modules_replace_the_roles_as_the_pool():
    by_layer = drawn_roles(tiny(num_hidden_layers=4), target_modules=["q_proj", "v_proj", "down_proj"])
    counted = Counter(name for names in by_layer.values() for name in names)
    assert counted["q"] + counted["v"] == 4
    assert counted["down"] == 2
    assert set(counted) <= {"q", "v", "down"}


def test_rounds_and_seeds_draw_different_halves():
    """All different, and over many rounds every matrix gets its turn about half of the time."""
    model = tiny(num_hidden_layers=4)
    drawn = [plan(model, HalfFTConfig(round_index=i, seed=s)).region for s in range(3) for i in range(20)]
    assert len(set(drawn)) == len(drawn)
    turns = Counter(name for region in drawn for name in region)
    matrices = [role.parameter for role in roles(model) if role.name in ATTENTION | FEED_FORWARD]
    assert all(15 <= turns[name] <= 45 for name in matrices)


def test_the_draw_depends_on_its_own_seed_alone():
    """Not on torch's global state, which the trainer seeds; and it leaves that state alone."""
    model = tiny()
    torch.manual_seed(1)
    first = plan(model, HalfFTConfig()).region
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert plan(model, HalfFTConfig()).region == first
    assert torch.equal(torch.get_rng_state(), before)


def test_the_draw_of_today_is_the_draw_of_tomorrow():
    """A seed in a paper must mean the same half in every version of this library."""
    pool = [
        Member(f"layers.{i}.{name}", "attention", ("layers", i), {f"{i}.{name}": Selection.whole((2, 2))})
        for i in range(3)
        for name in "qkvo"
    ]
    assert list(draw(pool, seed=0)) == ["0.k", "0.v", "1.q", "1.k", "2.q", "2.o"]
    assert list(draw(pool, seed=0, round_index=1)) == ["0.q", "0.o", "1.v", "1.o", "2.k", "2.v"]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=24),
    fraction=st.floats(0.05, 1.0),
    granularity=st.sampled_from(["category", "layer", "model"]),
    balance=st.sampled_from(["count", "parameters"]),
    seed=st.integers(0, 99),
)
def test_the_total_is_the_rounded_share_on_any_pool(sizes, fraction, granularity, balance, seed):
    """Irregular layers ("half of what is there"): never none, never more than there are, and the total is kept."""
    pool = [
        Member(str(i), "attention" if i % 3 else "norm", ("layers", i // 5), {str(i): Selection.whole((size, 2))})
        for i, size in enumerate(sizes)
    ]
    region = draw(pool, fraction=fraction, granularity=granularity, balance=balance, seed=seed)
    expected = {
        "model": math.floor(fraction * len(pool) + 0.5 + 1e-9),
        "category": sum(
            math.floor(fraction * sum(m.category == c for m in pool) + 0.5 + 1e-9) for c in ("attention", "norm")
        ),
    }
    if granularity in expected:
        assert len(region) == max(1, expected[granularity])
    assert 1 <= len(region) <= len(pool)
