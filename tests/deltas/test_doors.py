"""Ways in and out where a delta could get lost, half-applied or put on the wrong thing: done right, or refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, CodeGenConfig, MambaConfig, MixtralConfig, RwkvConfig

from peft_isolate import HalfFTConfig, plan
from peft_isolate.deltas import DeltaLayer
from peft_isolate.errors import FormatError, IsolateError, RegionError
from tests.compare import logits
from tests.deltas.test_tuner import randomized, two_rounds
from tests.models import GROUPED, tiny, tokens

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in ("the adapter will take", "Already following", "All adapters")
]


def delta_layers(model: nn.Module) -> list[DeltaLayer]:
    return [module for module in model.modules() if isinstance(module, DeltaLayer)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_some_adapters_is_having_them_active(dtype):
    """Two rounds live in different layers: one that lacks the merged adapter must not go on with the active one."""
    model, base = two_rounds(dtype)
    expected = {}
    for active in (["a"], ["b"], ["a", "b"]):
        model.base_model.set_adapter(active)
        expected[tuple(active)] = logits(model)
    for active in (["a"], ["b"], ["a", "b"]):
        for first, second in (("a", "b"), ("b", "a")):
            model.base_model.set_adapter(active)
            model.merge_adapter([first])
            assert torch.equal(logits(model), expected[(first,)])
            model.merge_adapter([second])
            assert torch.equal(logits(model), expected["a", "b"])
            model.unmerge_adapter()
            assert torch.equal(logits(model), expected[tuple(active)])
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["b"])
    assert torch.equal(logits(merged), expected[("b",)])
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_a_typo_among_the_adapters_to_merge_is_an_error():
    model, _ = two_rounds()
    for merge in (model.merge_adapter, lambda names: model.merge_and_unload(adapter_names=names)):
        with pytest.raises(IsolateError, match=r"no adapter 'typo' to merge: there are \['a', 'b'\]"):
            merge(["typo"])


@pytest.mark.parametrize("unload", [False, True])
def test_safe_merge_merges_every_layer_or_none(unload):
    """NaN in the last layer: nothing of the model is merged, and no adapter is lost."""
    model, _ = two_rounds()
    layers = delta_layers(model)
    with torch.no_grad():
        next(iter(layers[-1].deltas(layers[-1].parameter_names[0]).values())).delta.fill_(float("nan"))
        model.base_model.set_adapter(["a", "b"])
    with pytest.raises(IsolateError, match=r"of model\.norm NaN or infinite"):
        model.merge_and_unload(safe_merge=True) if unload else model.merge_adapter(safe_merge=True)
    assert delta_layers(model) == layers
    assert not any(layer.merged for layer in layers)


def test_originals_are_kept_once():
    """Four adapters on everything: one copy of W0 while they are merged, not four."""
    model = get_peft_model(tiny(), HalfFTConfig(fraction=1.0))
    for name in "bcd":
        model.add_adapter(name, HalfFTConfig(fraction=1.0))
    randomized(model)
    model.base_model.set_adapter(["default", *"bcd"])
    model.merge_adapter()
    for layer in delta_layers(model):
        assert all(len(kept) == 1 for kept in layer._originals.values())


def test_deleting_an_inactive_adapter_changes_nothing_else():
    """Neither what may learn, nor what is merged."""
    model, _ = two_rounds()
    model.base_model.set_adapter("a", inference_mode=True)
    model.merge_adapter()
    expected = logits(model)
    model.delete_adapter("b")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(layer.merged_adapters == ["a"] for layer in delta_layers(model) if layer.scaling)
    assert torch.equal(logits(model), expected)


def test_a_sibling_takes_over_the_scale():
    """TRL's "ref" copies parameters only; with α = 0.5 it must still be the policy."""
    config = HalfFTConfig()
    model = randomized(get_peft_model(tiny(), config))
    for layer in delta_layers(model):
        layer.set_scale("default", 0.5)
    expected = logits(model)
    model.add_adapter("ref", config)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


READERS = {
    "attention": (Attends, ["attention.out_proj"]),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), ["linear1", "linear2", "norm1"]),
}


@pytest.mark.parametrize("name", READERS)
def test_modules_that_read_a_childs_weight_get_the_composed_one(name):
    """They never call the child: with W0 the delta would be trained by nothing and used by nothing."""
    make, targets = READERS[name]
    model = get_peft_model(make(), HalfFTConfig(target_modules=targets, fraction=1.0))
    x = torch.randn(2, 3, 8)
    model.train()
    before = model(x)
    before.square().sum().backward()
    deltas = [p for n, p in model.named_parameters() if "halfft_" in n]
    assert all(delta.grad is not None and delta.grad.abs().sum() > 0 for delta in deltas)
    randomized(model).eval()
    with torch.no_grad():
        adapted = model(x)
        assert not torch.allclose(adapted, before)
        torch.testing.assert_close(model.merge_and_unload()(x), adapted)


def test_mamba_reads_its_convolution_and_gets_the_composed_one():
    config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
    targets = ["conv1d", "dt_proj", "in_proj"]
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config), HalfFTConfig(target_modules=targets, fraction=1.0)
    )
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    randomized(model).eval()
    adapted = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), adapted)


def test_a_wrapped_module_answers_for_the_one_inside():
    layer = delta_layers(get_peft_model(tiny(), HalfFTConfig(fraction=1.0)))
    norm = next(module for module in layer if "Norm" in type(module.base_layer).__name__)
    assert norm.variance_epsilon == norm.base_layer.variance_epsilon
    assert next(module for module in layer if hasattr(module, "in_features")).in_features == 32
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = norm.nothing_like_it


def test_a_module_used_under_two_names_is_refused():
    """Shared as a module, as a parameter, or only as a storage."""
    shared = nn.Linear(4, 4)
    with pytest.raises(RegionError, match=r"'0\.weight' is tied to \['2\.weight'\]"):
        get_peft_model(nn.Sequential(shared, nn.ReLU(), shared), HalfFTConfig(target_modules=["0"]))
    model = tiny()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    with pytest.raises(RegionError, match="is tied to"):
        get_peft_model(model, HalfFTConfig(target_modules=["embed_tokens"]))
    with pytest.raises(RegionError, match=r"embed_tokens.weight' is tied to \['lm_head.weight'\]"):
        get_peft_model(tiny("gemma2"), HalfFTConfig(target_modules=["lm_head"]))


def test_partly_recognised_models_are_announced():
    """A "half" that is drawn from a corner of the model says so; one of norms alone is refused."""
    rwkv = AutoModelForCausalLM.from_config(RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2))
    with pytest.raises(RegionError, match=r"no attention or feed-forward was recognised in Rwkv.*target_modules"):
        get_peft_model(rwkv, HalfFTConfig())
    assert plan(rwkv, HalfFTConfig(target_modules=["key", "value"])).trained > 0
    codegen = AutoModelForCausalLM.from_config(
        CodeGenConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, rotary_dim=4)
    )
    with pytest.warns(
        UserWarning, match=r"25% of the scalars in the layers of CodeGen.* were not recognised.*qkv_proj"
    ):
        table = plan(codegen, HalfFTConfig())
    assert "scalars of unknown role among them" in str(table)


def test_fused_experts_by_target_parameters(tmp_path):
    """3-D parameters of a module that has no `weight`: trained, merged, saved and loaded exactly."""
    base = AutoModelForCausalLM.from_config(MixtralConfig(**GROUPED, num_local_experts=2)).eval()
    config = HalfFTConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = get_peft_model(copy.deepcopy(base), config)
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    adapted = logits(randomized(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded), adapted)
    assert torch.equal(logits(loaded.merge_and_unload()), adapted)


def test_what_cannot_carry_a_delta_is_refused_before_anything_is_wrapped():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(4))

    packed = nn.Sequential(nn.Conv1d(4, 4, 1))
    packed[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    for model, config, message in (
        (Net(), HalfFTConfig(target_parameters=["scale"]), "'scale' belongs to the model itself"),
        (nn.Linear(4, 4), HalfFTConfig(target_modules="all-linear"), "selects nothing|belongs to the model itself"),
        (packed, HalfFTConfig(target_modules=["0"]), r"quantised, sharded or offloaded \(torch\.int8\)"),
        (
            tiny(),
            HalfFTConfig(train_embeddings="input", trainable_token_indices=[3]),
            "in the region and in trainable_token_indices",
        ),
        (get_peft_model(tiny(), HalfFTConfig()), HalfFTConfig(), "PeftModel already: add_adapter"),
        (
            get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])).get_base_model(),
            HalfFTConfig(fraction=1.0),
            "q_proj' is wrapped by Linear of another PEFT method",
        ),
        (
            Attends(),
            HalfFTConfig(target_modules=["attention", "out_proj"], fraction=1.0),
            "'attention.out_proj' and 'attention' lie inside one another",
        ),
    ):
        before = len(delta_layers(model))
        with pytest.raises(IsolateError, match=message):
            get_peft_model(model, config)
        assert len(delta_layers(model)) == before


def test_a_second_adapter_where_the_first_leaves_no_room_is_refused():
    """Inside its modules_to_save, around its layers, on its layers with new tokens, or while it is merged."""
    whole = HalfFTConfig(fraction=1.0)
    inner = HalfFTConfig(target_modules=["attention.out_proj"])
    embeddings = HalfFTConfig(train_embeddings="input")
    for make, first, second, message in (
        (tiny, HalfFTConfig(modules_to_save=["mlp"]), whole, "trained by modules_to_save or"),
        (
            lambda: nn.Sequential(Attends()),
            inner,
            HalfFTConfig(target_modules=["attention"]),
            "lie inside one another",
        ),
        (tiny, embeddings, HalfFTConfig(trainable_token_indices=[3]), "has a delta of another adapter"),
    ):
        model = get_peft_model(make(), first)
        before = [name for name, _ in model.named_parameters()]
        with pytest.raises(IsolateError, match=message):
            model.add_adapter("b", second)
        assert second.resolved is None
        assert [name for name, _ in model.named_parameters()] == before
    model, _ = two_rounds()
    model.merge_adapter(["b"])
    expected = logits(model)
    with pytest.raises(IsolateError, match=r"would not be: unmerge_adapter\(\) first"):
        model.add_adapter("c", HalfFTConfig(round_index=2))
    assert torch.equal(logits(model), expected)


def test_hooks_of_accelerate_are_not_mistaken_for_the_wrappers_own():
    """Hooked, wrapped, hooked again: the second hook must call the wrapper and not what the first one called."""
    base = tiny()
    for module in base.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, ModelHook())
    model = randomized(get_peft_model(base, HalfFTConfig()))
    expected = logits(model)
    for layer in delta_layers(model):
        add_hook_to_module(layer, ModelHook())
    assert torch.equal(logits(model), expected)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), expected)


def test_the_order_and_type_of_a_list_of_names_means_nothing(tmp_path):
    model = randomized(get_peft_model(tiny(), HalfFTConfig(target_modules=("v_proj", "q_proj"))))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path)), logits(model))


@pytest.mark.parametrize(
    "record", ["x", [], {}, {"region": []}, {"region": {}, "chosen_by": {}}, {"region": {"a": {}}, "chosen_by": []}]
)
def test_a_damaged_record_of_the_region(record):
    config = HalfFTConfig(resolved=record)
    with pytest.raises(FormatError, match="no record of a region"):
        get_peft_model(tiny(), config)


def test_a_bias_set_later_is_refused_as_well():
    config = HalfFTConfig()
    config.bias = "all"
    with pytest.raises(IsolateError, match="would train biases of the base in place"):
        get_peft_model(tiny("qwen2"), config)


def test_irregular_blocks_survive_the_meta_device():
    """q and v of GPT-NeoX without k are no single stride: their index follows from the config, not from a file."""
    config = HalfFTConfig(seed=1)
    model = randomized(get_peft_model(tiny("gpt_neox"), config))
    assert any(
        index.numel()
        for layer in delta_layers(model)
        for n in layer.parameter_names
        for d in layer.deltas(n).values()
        for index in (part.at for part in d.parts())
    )
    shape = tiny("gpt_neox").config
    with torch.device("meta"):
        empty = get_peft_model(AutoModelForCausalLM.from_config(shape), HalfFTConfig(seed=1))
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    empty.get_base_model().gpt_neox.rotary_emb = model.get_base_model().gpt_neox.rotary_emb  # buffers, not ours
    assert torch.equal(logits(empty.eval()), logits(model))


def test_a_used_config_does_not_forget_what_it_was_used_for():
    """A changed field, or a model with more layers, is an error and not the old region in silence."""
    config = HalfFTConfig(target_modules="all-linear")
    get_peft_model(tiny(), config)
    assert config.target_modules == "all-linear", "what the user said is kept"
    for change in ({"target_modules": ["q_proj"]}, {"exclude_modules": ["q_proj"]}, {"train_bias": False}):
        with pytest.raises(RegionError, match=rf"{next(iter(change))} is .*resolved=None"):
            get_peft_model(tiny(), dataclasses.replace(config, **change))
    with pytest.raises(RegionError, match="chosen on a model with other layers"):
        get_peft_model(tiny(num_hidden_layers=5), config)
    longer = tiny(vocab_size=80)  # a larger vocabulary is none of its business
    longer.load_state_dict({k: v for k, v in tiny().state_dict().items() if v.shape[0] != 64}, strict=False)
    get_peft_model(longer, config)
    get_peft_model(tiny("gpt2"), dataclasses.replace(config, resolved=None))


def test_loading_another_region_over_an_adapter_is_refused(tmp_path):
    """Stock loading would skip every name that does not match, without a word."""
    for name, config in (("a", HalfFTConfig()), ("b", HalfFTConfig(round_index=1))):
        randomized(get_peft_model(tiny(), config)).save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(tiny(), tmp_path / "a")
    expected = logits(model)
    with pytest.raises(FormatError, match="does not hold the region of adapter 'default'"):
        model.load_adapter(tmp_path / "b", adapter_name="default")
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    with pytest.raises(IsolateError, match="is merged: unmerge_adapter"):
        model.load_adapter(tmp_path / "a", adapter_name="default")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("inf")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="holds NaN or infinity"):
        PeftModel.from_pretrained(tiny(), tmp_path / "a")


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"], r".*(embed_tokens|v_proj)"])
def test_naming_an_embedding_does_not_save_the_bases(tmp_path, targets):
    """PEFT would write the whole base embedding beside the adapter (promise 3)."""
    config = HalfFTConfig(target_modules=targets, fraction=1.0)
    model = randomized(get_peft_model(tiny(), config))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == plan(tiny(), config).region.count
    assert not any("base_layer" in key for key in saved)
    asked = set(targets) if isinstance(targets, list) else targets
    assert config.target_modules == asked, "what the user said is kept"
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path)), logits(model))


def test_save_dtype_too_small_for_the_delta(tmp_path):
    model = get_peft_model(tiny(), HalfFTConfig(save_dtype="float16"))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "halfft_" in n).fill_(1e6)
    with pytest.raises(IsolateError, match=r"does not fit into save_dtype='float16'.*bfloat16"):
        model.save_pretrained(tmp_path)


def test_mixed_batches_are_refused():
    model, _ = two_rounds()
    with pytest.raises(IsolateError, match="cannot mix adapters"):
        model(tokens(), adapter_names=["a", "b"])


def test_copies_and_pickles():
    model, base = two_rounds()
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    model.merge_adapter()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), expected)
    again.unmerge_adapter()
    with again.disable_adapter():
        assert torch.equal(logits(again), base)


def test_channels_last_convolutions_keep_their_layout():
    conv = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    model = randomized(get_peft_model(conv, HalfFTConfig(target_modules=["0"], fraction=1.0)))
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    layer = delta_layers(model)[0]
    assert layer.weight.stride() == layer.base_layer.weight.stride()
    with torch.no_grad():
        adapted = model(x)
        assert torch.equal(model.merge_and_unload()(x), adapted)
