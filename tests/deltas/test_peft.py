"""PEFT's other doors: what a PEFT user may reach for beside `get_peft_model` and `from_pretrained`.

For deltas on whole matrices, on single elements, and on all but some.
"""

from __future__ import annotations

import copy
import json
import os
import warnings

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from peft_isolate import HalfFTConfig, next_round
from peft_isolate.deltas import DeltaLayer
from peft_isolate.deltas.adapters import rearrange, regions_of
from peft_isolate.deltas.base import base_tensors
from peft_isolate.errors import BaseMismatchError, FormatError, RegionError
from tests.compare import assert_same, base, logits
from tests.given import GivenConfig
from tests.learn import dense, filled, held, learn, learning
from tests.models import tiny, tokens

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}") for message in ("the adapter will take", "Already following")
]

DTYPES = (torch.float32, torch.bfloat16)
METHODS = {
    "half": HalfFTConfig,
    "elements": lambda **fields: GivenConfig(kind="elements", **fields),
    "all_but": lambda **fields: GivenConfig(kind="all_but", **fields),
}
BY_ELEMENTS = ("elements", "all_but")


@pytest.fixture(params=METHODS)
def method(request):
    """Makes the config of one of the methods."""
    return METHODS[request.param]


def saved(folder, config: PeftConfig, model: nn.Module | None = None, seed: int = 0) -> PeftModel:
    """A model with an adapter as if trained, and the adapter in the folder."""
    model = filled(get_peft_model(tiny() if model is None else model, config), seed=seed)
    model.save_pretrained(folder)
    return model.eval()


def tampered(folder, change) -> None:
    """Change the adapter's tensors in the folder by `change(tensors)`."""
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def has_layers(model: nn.Module) -> bool:
    return any(isinstance(module, DeltaLayer) for module in model.modules())


# Doors in


def test_inject_and_carry_the_state_by_hand(method):
    """No PeftModel: inject, train, take the state out, put it into another copy of the model."""
    config = method()
    model = inject_adapter_in_model(config, tiny())
    assert torch.equal(logits(model), logits(tiny()))
    learn(model)
    state = get_peft_model_state_dict(model)
    assert not any("base_layer" in name for name in state)
    again = inject_adapter_in_model(copy.deepcopy(config), tiny())
    report = set_peft_model_state_dict(again, state)
    assert not report.unexpected_keys
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(FormatError, match="does not hold the region of adapter 'default'"):
        set_peft_model_state_dict(again, {name: value for name, value in state.items() if "layers.0" not in name})
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_auto_classes_find_base_and_adapter(method, dtype, tmp_path):
    tiny(dtype=dtype).save_pretrained(tmp_path / "base")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    for task, auto_class in (("CAUSAL_LM", AutoPeftModelForCausalLM), (None, AutoPeftModel)):
        folder = tmp_path / str(task)
        model = saved(folder, method(task_type=task), copy.deepcopy(start))
        loaded = auto_class.from_pretrained(folder, dtype=dtype)
        assert torch.equal(logits(loaded), logits(model))
        trainable = auto_class.from_pretrained(folder, dtype=dtype, is_trainable=True)
        assert learning(trainable) == learning(model)


def classifier(folder) -> LlamaForSequenceClassification:
    """From a folder without a head, as a user comes by one: the head is drawn at random, each time anew."""
    if not os.path.exists(folder):
        tiny().save_pretrained(folder)
    return LlamaForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)


def test_a_classifier_with_its_head_end_to_end(method, tmp_path):
    """The head is new in every process: the fingerprint leaves it out, and the file brings it."""
    model = get_peft_model(classifier(tmp_path / "base"), method(task_type="SEQ_CLS"))
    labels = torch.tensor([0, 2])
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=tokens(), labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = model(input_ids=tokens()).logits
    for loaded in (
        PeftModel.from_pretrained(classifier(tmp_path / "base"), tmp_path / "adapter"),
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3, pad_token_id=0),
    ):
        assert torch.equal(loaded.eval()(input_ids=tokens()).logits, expected)
        merged = loaded.merge_and_unload()
        assert not has_layers(merged)
        assert torch.equal(merged(input_ids=tokens()).logits, expected)


def test_load_twice_and_into_a_second_name(method, tmp_path):
    model = saved(tmp_path, method())
    expected = logits(model)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    for _ in range(2):
        with torch.no_grad():
            for numbers in adapter_parameters(loaded):
                numbers.zero_()
        loaded.load_adapter(tmp_path, "default")
        assert torch.equal(logits(loaded), expected)
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), expected)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), expected)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".default." in name]


def test_deleting_the_last_adapter_leaves_the_base(method):
    """With a module of modules_to_save. (To call the empty PeftModel itself is PEFT's own KeyError, with LoRA too.)"""
    model = filled(get_peft_model(tiny(), method(modules_to_save=["lm_head"])))
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.zero_()
    model.delete_adapter("default")
    assert not model.peft_config
    assert not [name for name, _ in model.named_parameters() if "default" in name]
    assert torch.equal(logits(model.base_model.model), logits(tiny()))


@pytest.mark.parametrize("beside", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}])
def test_what_is_trained_beside_elements_is_saved_with_them(method, beside, tmp_path):
    model = learn(get_peft_model(tiny(), method(**beside)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


# Positions that change under an adapter


def equal_codes(kind: str, folder) -> tuple[GivenConfig, PeftModel]:
    """A config, and a model saved in the folder whose other positions have codes of the same size."""

    def one(seed: int) -> GivenConfig:
        return GivenConfig(kind=kind, target_modules=r".*layers\.0\.self_attn\.q_proj", seed=seed)

    sizes = {}
    for seed in range(20):
        model = get_peft_model(tiny(), one(seed))
        code_bytes = tuple(entry["code_bytes"] for entry in model.peft_config["default"].resolved["region"].values())
        if code_bytes in sizes:
            return one(sizes[code_bytes]), saved(folder, one(seed))
        sizes[code_bytes] = seed
    raise AssertionError("no two draws have codes of the same size")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", BY_ELEMENTS)
def test_other_positions_are_decoded_anew(kind, low_cpu_mem_usage, tmp_path):
    """A cache of the positions that outlives a load computes with the old ones: wrong logits without an error.

    In every use that caches: forward, merge, backward, the saved file, "ref", and the config's own copy.
    """
    config, other = equal_codes(kind, tmp_path)
    expected = logits(other)
    model = filled(get_peft_model(tiny(), config), seed=5)
    before = logits(model)
    learn(copy.deepcopy(model))
    assert regions_of(model, "default") != regions_of(other, "default")
    model.load_adapter(tmp_path, "default", low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(before, expected)
    assert regions_of(model, "default") == regions_of(other, "default")
    assert_same(dense(model), dense(other))

    # TRL's reference: same config object, parameters copied, nothing else.
    ref = copy.deepcopy(model)
    ref.add_adapter("ref", ref.peft_config["default"])
    for name, parameter in ref.named_parameters():
        if ".default." in name:
            ref.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    ref.set_adapter("ref")
    assert torch.equal(logits(ref), expected)
    # Its config has served before; wrapped once more it must not bring back the first positions in silence.
    with pytest.raises(FormatError, match=r"stands in the adapter's tensors|never loaded"):
        logits(filled(get_peft_model(tiny(), model.peft_config["default"])))

    wanted = learn(PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True))
    assert_same(dense(learn(copy.deepcopy(model))), dense(wanted))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path / "again")), expected)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert_same(base(model), dict(tiny().named_parameters()))


@pytest.mark.parametrize("kind", BY_ELEMENTS)
@pytest.mark.parametrize("other", [{"seed": 1}, {"share": 0.2}, {"kind": "rows"}])
def test_another_region_is_refused_whole(kind, other, tmp_path):
    """Codes of another size, another number of elements, another kind: nothing is loaded, not what would fit either.

    Stock loading copies every tensor that fits before it complains of the others.
    """
    saved(tmp_path, GivenConfig(**({"kind": kind} | other)), seed=3)
    model = filled(get_peft_model(tiny(), GivenConfig(kind=kind)))
    state, expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits(model)
    with pytest.raises(FormatError, match=r"does not hold the region of adapter 'default'.*Load it under"):
        model.load_adapter(tmp_path, "default")
    assert_same(model.state_dict(), state)
    assert torch.equal(logits(model), expected)
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(tiny(), tmp_path)))


@pytest.mark.parametrize("kind", BY_ELEMENTS)
def test_a_reference_of_elements_is_the_policy(kind, tmp_path):
    """From a fresh adapter, from a loaded one, and from one that had decoded others before."""
    policy = saved(tmp_path, GivenConfig(kind=kind))
    expected = logits(policy)
    for model in (policy, PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)):
        model.add_adapter("ref", model.peft_config["default"])
        for name, parameter in model.named_parameters():
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
        learn(model)
        model.set_adapter("ref")
        assert torch.equal(logits(model), expected)
        assert regions_of(model, "ref") == regions_of(model, "default")


# The file


def codes_of(tensors: dict[str, torch.Tensor]) -> str:
    """The name of the longest codes."""
    return max((name for name in tensors if name.endswith("_codes")), key=lambda name: tensors[name].numel())


def zeroed(tensors):
    tensors[codes_of(tensors)].zero_()


def truncated(tensors):
    tensors[codes_of(tensors)] = tensors[codes_of(tensors)][:-1].clone()


def altered(tensors):
    codes = tensors[codes_of(tensors)]
    codes[codes.numel() // 2] ^= 0xFF


def emptied(tensors):
    tensors[codes_of(tensors)] = tensors[codes_of(tensors)][:0].clone()


def missing(tensors):
    del tensors[codes_of(tensors)]


def shortened(tensors):
    name = codes_of(tensors).replace("_codes", "")
    tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize("damage", [zeroed, truncated, altered, emptied, missing, shortened])
@pytest.mark.parametrize("kind", BY_ELEMENTS)
def test_damaged_codes_are_refused_at_load(kind, damage, tmp_path):
    saved(tmp_path, GivenConfig(kind=kind))
    tampered(tmp_path, damage)
    with pytest.raises(FormatError, match=r"was altered|does not hold the region"):
        PeftModel.from_pretrained(tiny(), tmp_path)
    model = filled(get_peft_model(tiny(), GivenConfig(kind=kind)), seed=1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FormatError, match=r"was altered|does not hold the region"):
        model.load_adapter(tmp_path, "default")
    assert_same(model.state_dict(), state)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.o_proj.weight"])
def test_a_file_with_a_weight_of_the_base_is_refused(method, name, tmp_path):
    """PEFT loads whatever name it finds: an adapter could replace the model under it."""
    model = saved(tmp_path, method())
    shape = tiny().get_parameter(name).shape
    inside = {key for key, _ in model.named_parameters()}
    key = f"base_model.model.{name}"
    key = key if key in inside else key.replace(".weight", ".base_layer.weight")
    assert key in inside
    tampered(tmp_path, lambda tensors: tensors.update({key: torch.zeros(shape)}))
    target = tiny()
    weights = dict(target.named_parameters())
    with pytest.raises(FormatError, match=r"the file holds .*, a weight of the base, which it would overwrite"):
        PeftModel.from_pretrained(target, tmp_path)
    assert_same(weights, dict(tiny().named_parameters()))


def test_only_embeddings_that_the_user_had_saved_replace_the_bases(method, tmp_path):
    """`save_pretrained(save_embedding_layers=True)` is PEFT's way for a resized vocabulary: announced when loaded."""
    model = filled(get_peft_model(tiny(), method()))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.warns(UserWarning, match=r"the file holds '.*lm_head\.weight' of the base, saved by save_emb"):
        loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(("save_dtype", "limit"), [(None, 5.1), ("bfloat16", 3.1)])
def test_elements_take_a_byte_each_beside_their_number(save_dtype, limit, tmp_path):
    """1 % of two larger matrices: the codes take a little more than a byte a position, and the config no position."""
    model = nn.Sequential(nn.Linear(1500, 1500, bias=False), nn.Linear(1500, 1500, bias=False))
    config = GivenConfig(target_modules=["0", "1"], share=0.01, save_dtype=save_dtype)
    adapted = saved(tmp_path, config, model)
    count = regions_of(adapted, "default")[0].count
    assert count == 2 * 22500
    assert os.path.getsize(tmp_path / "adapter_model.safetensors") / count < limit
    assert os.path.getsize(tmp_path / "adapter_config.json") < 4096
    region = json.loads((tmp_path / "adapter_config.json").read_text())["resolved"]["region"]
    assert [set(entry) for entry in region.values()] == [{"kind", "shape", "count", "code_bytes", "format"}] * 2
    codes = [tensor for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items() if "_codes" in name]
    assert [tensor.numel() for tensor in codes] == [entry["code_bytes"] for entry in region.values()]


@pytest.mark.parametrize("save_dtype", [None, "bfloat16"])
def test_holes_are_saved_as_zero(save_dtype, tmp_path):
    """What an optimizer left there is inert; in the file it would be noise, and a hint at what it trained on."""
    model = saved(tmp_path, GivenConfig(kind="all_but", save_dtype=save_dtype))
    region, tensors = regions_of(model, "default")[0], load_file(tmp_path / "adapter_model.safetensors")
    for name, selection in region.items():
        module, _, parameter = name.rpartition(".")
        numbers = tensors[f"base_model.model.{module}.given_{parameter}.delta"]
        assert not numbers[~selection.mask()].any()
        assert numbers[selection.mask()].any()


# The base


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_rounded_file_trains_on_in_fp32(method, low_cpu_mem_usage, tmp_path):
    """By assignment a load brings the file's dtype, in which small updates would vanish."""
    saved(tmp_path, method(save_dtype="bfloat16"), tiny(dtype=torch.bfloat16))
    start = tiny(dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(start, tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_a_refused_file_leaves_nothing_behind(method, tmp_path):
    """Neither a wrapped base nor an adapter without numbers."""
    model = saved(tmp_path, method())

    def nan(tensors):
        next(value for name, value in tensors.items() if value.is_floating_point()).view(-1)[0] = float("nan")

    tampered(tmp_path, nan)
    start = tiny()
    with pytest.raises(FormatError, match="holds NaN or infinity"):
        PeftModel.from_pretrained(start, tmp_path)
    assert not has_layers(start)
    expected = logits(model)
    with pytest.raises(FormatError, match="holds NaN or infinity"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)
    with pytest.raises(FormatError, match="holds NaN or infinity"):
        model.load_adapter(tmp_path, "default")  # into one that is there: it keeps its numbers
    assert torch.equal(logits(model), expected)


def test_another_base_is_refused_before_anything_is_wrapped(method, tmp_path):
    saved(tmp_path, method())
    other = tiny(seed=1)
    with pytest.raises(BaseMismatchError, match=r"'model\.embed_tokens\.weight' has .* where the adapter's base has"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not has_layers(other)
    assert_same(dict(other.named_parameters()), dict(tiny(seed=1).named_parameters()))
    # The first that differs, in the model's order.
    other = tiny()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
        other.lm_head.weight.mul_(1.01)
    with pytest.raises(BaseMismatchError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' has"):
        PeftModel.from_pretrained(other, tmp_path)
    model = get_peft_model(tiny(seed=1), method())
    with pytest.raises(BaseMismatchError, match="embed_tokens"):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"]
    assert not [name for name, _ in model.named_parameters() if ".other." in name]


@pytest.mark.parametrize(("value", "skips"), [("1", True), ("0", False), ("", False)])
def test_the_check_can_be_made_a_warning(value, skips, monkeypatch, tmp_path):
    model = saved(tmp_path, GivenConfig())
    monkeypatch.setenv("PEFT_ISOLATE_SKIP_BASE_CHECK", value)
    if skips:
        with pytest.warns(UserWarning, match=r"another base than the adapter's.*\[it was skipped\]"):
            loaded = PeftModel.from_pretrained(tiny(seed=1), tmp_path)
        assert_same(dense(loaded), dense(model))
    else:
        with pytest.raises(BaseMismatchError):
            PeftModel.from_pretrained(tiny(seed=1), tmp_path)


@pytest.mark.parametrize("made_on", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded_on", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_the_same_base(made_on, loaded_on, tmp_path):
    """All made from one fp32 model; another fine-tune of it is another base in each dtype."""
    saved(tmp_path, GivenConfig(), tiny().to(made_on))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*base.*")
        PeftModel.from_pretrained(tiny().to(loaded_on), tmp_path)
    tuned = tiny()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    with pytest.raises(BaseMismatchError, match="this is another base than the adapter's"):
        PeftModel.from_pretrained(tuned.to(loaded_on), tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("max_shard_size", ["10KB", "5GB"])
def test_a_base_in_shards_is_the_same_base(architecture, max_shard_size, tmp_path):
    """Also where transformers stores other names and shapes (Mixtral's experts), and where tensors are tied."""
    model = saved(tmp_path / "adapter", GivenConfig(), tiny(architecture))
    tiny(architecture).save_pretrained(tmp_path / "base", max_shard_size=max_shard_size)
    assert (len(list((tmp_path / "base").glob("*.safetensors"))) > 1) == (max_shard_size == "10KB")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*base.*")
        loaded = PeftModel.from_pretrained(start, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_a_change_of_a_thousandth_everywhere_is_found(tmp_path):
    """Sixteen samples of each of 300 tensors: it goes unnoticed with a probability of 0.8 %."""

    def deep() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(300)))

    saved(tmp_path, GivenConfig(target_modules=["7"]), deep())
    PeftModel.from_pretrained(deep(), tmp_path)
    for seed in range(3):
        other = deep()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in other.parameters():
                changed = torch.randperm(parameter.numel(), generator=generator)[: parameter.numel() // 1000]
                parameter.view(-1)[changed] += 0.01
        with pytest.raises(BaseMismatchError, match="this is another base"):
            PeftModel.from_pretrained(other, tmp_path)


def test_a_base_without_numbers_is_announced(tmp_path):
    """An adapter made on the meta device has no fingerprint; a base on the meta device cannot be compared."""
    shape = tiny().config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(shape)
    config = GivenConfig()
    get_peft_model(copy.deepcopy(empty), config)
    assert config.resolved["base"] is None
    with pytest.warns(UserWarning, match="carries no fingerprint of its base"):
        get_peft_model(tiny(), config)
    saved(tmp_path, GivenConfig())
    with pytest.warns(UserWarning, match=r"only 0 of 30 tensors of the base could be compared"):
        PeftModel.from_pretrained(empty, tmp_path, low_cpu_mem_usage=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_base_is_read_from_the_kept_originals_while_merged(method, dtype):
    """With two adapters merged over one another; rounding them out of the weights would not give W0's bits."""
    model = filled(get_peft_model(tiny(dtype=dtype), method()))
    config = method(seed=1)
    model.add_adapter("b", config)
    filled(model, "b", seed=1)
    inner = model.get_base_model()
    wanted = dict(base_tensors(inner, config))
    assert wanted.keys() == dict(tiny(dtype=dtype).named_parameters()).keys() or any("base_layer" in n for n in wanted)
    wanted = {name: tensor.clone() for name, tensor in wanted.items()}
    model.base_model.set_adapter(["default", "b"])
    model.merge_adapter()
    weights = {name: parameter for name, parameter in base(model).items() if ".b." not in name}
    assert any(not torch.equal(weights[name], tensor) for name, tensor in wanted.items() if name in weights)
    assert_same(dict(base_tensors(inner, config)), wanted)


# What PEFT does not do for methods of others


def test_what_is_for_lora_only_says_so(method, tmp_path):
    """Hot-swapping, mixed models, conversion to LoRA: a clear error, and the model as it was."""
    model = saved(tmp_path, method())
    expected = logits(model)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but"):
        hotswap_adapter(model, tmp_path, "default")
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*DeltaLayer"):
        convert_to_lora(model, rank=4)
    assert torch.equal(logits(model), expected)
    plain = tiny()
    with pytest.raises(ValueError, match="is not compatible with the `PeftMixedModel`"):
        get_peft_model(plain, method(), mixed=True)
    with pytest.raises(ValueError, match="is not supported for mixed models"):
        PeftMixedModel.from_pretrained(plain, tmp_path)
    assert not has_layers(plain)


# What is held, in every kind


@pytest.mark.parametrize("kind", BY_ELEMENTS)
def test_elements_are_held_like_anything_else(kind, tmp_path):
    """A record with both parts, as methods of stages make it: saved and loaded, frozen, exact when merged."""
    model = filled(get_peft_model(tiny(), GivenConfig(kind=kind)))
    trained, _ = regions_of(model, "default")
    later = GivenConfig(kind=kind, seed=1).choose(tiny())
    before = logits(model)
    rearrange(model.base_model, "default", later, trained - later)
    assert torch.equal(logits(model), before)
    assert regions_of(model, "default") == (later, trained - later)
    kept = held(model)
    assert kept
    learn(model)
    assert_same(held(model), kept)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), expected)
        assert regions_of(loaded, "default") == (later, trained - later)
        assert_same(dense(learn(loaded)), dense(learn(copy.deepcopy(model))))
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert_same(base(model), dict(tiny().named_parameters()))
    with pytest.raises(RegionError, match="is in neither region: hold it"):
        rearrange(model.base_model, "default", later - trained, trained - later)


def test_held_elements_survive_another_round_of_half_ft():
    model = filled(get_peft_model(tiny("gpt_neox"), HalfFTConfig()))
    next_round(model)
    state = get_peft_model_state_dict(model)
    assert {name.rpartition(".")[2] for name in state} == {"delta", "held"}
