"""`merge`: the bits of `merge_and_unload`, laid out as the base, in little memory."""

from __future__ import annotations

import copy
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_isolate import CoFiTuneConfig, HalfFTConfig
from peft_isolate.checkpoints.memory import Checkpoint
from peft_isolate.checkpoints.merge import merge
from peft_isolate.checkpoints.shards import Shards
from peft_isolate.errors import BaseMismatchError, FormatError, IsolateError, RegionError
from peft_isolate.regions import base_parameters
from tests.checkpoints.folders import files, load, saved, tensors, trained, with_tokens
from tests.compare import assert_same, logits
from tests.given import GivenConfig
from tests.importances import importance
from tests.learn import filled
from tests.models import ARCHITECTURES, MORE_ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take", "ignore:Could not find a config file")

EVERY = (*ARCHITECTURES, *MORE_ARCHITECTURES)
KINDS = ("rows", "columns", "elements", "all_but", "whole")


def assert_merged(base: Path, adapters: list[Path], out: Path, architecture: str = "llama", **scales) -> None:
    """What `merge` wrote are the tensors that transformers saves of the model merged in memory."""
    model = PeftModel.from_pretrained(load(base, architecture), adapters[0], "a0")
    for i, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, f"a{i}")
    names = [f"a{i}" for i in range(len(adapters))]
    for name, scale in zip(names, scales.get("scale", [1.0] * len(names)), strict=True):
        for module in model.modules():
            if hasattr(module, "set_scale") and scale != 1.0:
                module.set_scale(name, scale)
    in_memory = model.merge_and_unload(adapter_names=names)
    beside = out.parent / f"{out.name}-in-memory"
    in_memory.save_pretrained(beside)
    wanted = tensors(beside)
    assert_same(tensors(out), wanted)
    assert torch.equal(logits(load(out, architecture)), logits(in_memory.requires_grad_(False)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", EVERY)
def test_every_architecture_merges_as_in_memory(architecture, dtype, tmp_path):
    """Half of it, also where the disk has other names and shapes than the memory."""
    base = saved(tmp_path / "base", architecture, dtype)
    before = files(base)
    adapter = trained(base, HalfFTConfig(), tmp_path / "adapter", architecture)
    result = merge(base, adapter, out=tmp_path / "out")
    assert_merged(base, [adapter], tmp_path / "out", architecture)
    assert files(base) == before, "the base was written to"
    assert files(tmp_path / "out").keys() == before.keys()
    assert result.folder == tmp_path / "out"
    assert str(result).startswith("merged ")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2", "gpt_neox"])
def test_every_kind_of_selection(architecture, kind, tmp_path):
    """Elements, holes and columns too, of fused experts and transposed weights."""
    base = saved(tmp_path / "base", architecture, torch.bfloat16)
    adapter = trained(base, GivenConfig(kind=kind), tmp_path / "adapter", architecture)
    merge(base, adapter, out=tmp_path / "out")
    assert_merged(base, [adapter], tmp_path / "out", architecture)


@pytest.mark.parametrize("damps", ["update", "gradient"])
def test_a_soft_mask_counts(damps, tmp_path):
    """Where it damps the update it is in the weight; where it damps the gradient it is not."""
    base = saved(tmp_path / "base")
    config = CoFiTuneConfig(layer_range=(0, 1), modules="MHA+FFN", soft_mask=damps, importance=importance("llama"))
    adapter = trained(base, config, tmp_path / "adapter")
    merge(base, adapter, out=tmp_path / "out")
    assert_merged(base, [adapter], tmp_path / "out")


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_shards_stay_shards(architecture, tmp_path):
    """Laid out as the base: the same files, index and headers; what did not change is the same bytes."""
    base = saved(tmp_path / "base", architecture, torch.bfloat16, max_shard_size="20KB")
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"stale")
    (base / "README.md").write_text("of the base")
    (base / ".hidden").mkdir()
    (base / "sub").mkdir()
    (base / "sub" / "chat_template.jinja").write_text("x")
    adapter = trained(base, HalfFTConfig(), tmp_path / "adapter", architecture)
    merge(base, adapter, out=tmp_path / "out")
    assert len(Shards(base).files) > 2
    there = set(files(base)) - {"pytorch_model.bin", "README.md"}
    assert set(files(tmp_path / "out")) == there
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json", "sub/chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    left, right = Shards(base), Shards(tmp_path / "out")
    assert dict(left) == dict(right)
    changed = {name for name in left if not torch.equal(left.read(name), right.read(name))}
    assert 0 < len(changed) < len(left)
    assert_merged(base, [adapter], tmp_path / "out", architecture)


def test_several_adapters_compose_in_one_expression(tmp_path):
    """Overlapping ones too, each with its α: rounded once, in the order they are given."""
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    adapters = [
        trained(base, GivenConfig(kind=kind, seed=i), tmp_path / f"a{i}", seed=i)
        for i, kind in enumerate(("elements", "rows", "whole"))
    ]
    for scale in ([1.0, 1.0, 1.0], [0.5, 2.0, -1.0]):
        out = tmp_path / f"out{scale[0]}"
        merge(base, *adapters, out=out, scale=scale)
        assert_merged(base, adapters, out, scale=scale)
    merge(base, adapters[0], out=tmp_path / "half", scale=0.5)
    assert_merged(base, adapters[:1], tmp_path / "half", scale=[0.5])


def test_disjoint_regions_commute_bit_for_bit(tmp_path):
    """One after the other, the other way round, or at once."""
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    a = trained(base, GivenConfig(kind="rows", target_modules=["q_proj", "up_proj"]), tmp_path / "a")
    b = trained(base, GivenConfig(kind="elements", target_modules=["k_proj", "down_proj"]), tmp_path / "b", seed=1)
    merge(base, a, b, out=tmp_path / "ab")
    merge(base, b, a, out=tmp_path / "ba")
    assert files(tmp_path / "ab") == files(tmp_path / "ba")


def test_scale_zero_leaves_an_adapter_out(tmp_path):
    """Even the sign of a zero stays the base's."""
    base = saved(tmp_path / "base")
    changed = tensors(base)
    changed["model.norm.weight"][:] = -0.0
    changed["model.layers.0.mlp.up_proj.weight"][:] = -0.0
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    adapter = trained(base, HalfFTConfig(), tmp_path / "adapter")
    merge(base, adapter, out=tmp_path / "out", scale=0)
    assert files(tmp_path / "out")["model.safetensors"] == files(base)["model.safetensors"]


def test_tied_tensors_stay_tied(tmp_path):
    """The disk has one of the two names, and after it too; rows trained of new tokens are in it."""
    base = saved(tmp_path / "base", "llama", tie_word_embeddings=True)
    with_tokens(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", out=tmp_path / "out")
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    assert_merged(base, [tmp_path / "adapter"], tmp_path / "out")
    merged = load(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_modules_saved_whole_replace_the_bases(tmp_path):
    """As in memory; two adapters that both carry one are refused, as is a scale, and another shape."""
    base = saved(tmp_path / "base")
    config = functools.partial(HalfFTConfig, modules_to_save=["lm_head"])
    model = filled(get_peft_model(load(base), config()))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    model.save_pretrained(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", out=tmp_path / "out")
    assert_merged(base, [tmp_path / "adapter"], tmp_path / "out")
    other = trained(base, config(seed=1), tmp_path / "other")
    with pytest.raises(IsolateError, match=r"two adapters carry 'lm_head.weight' whole"):
        merge(base, tmp_path / "adapter", other, out=tmp_path / "out2")
    with pytest.raises(IsolateError, match=r"no scale 0\.5"):
        merge(base, tmp_path / "adapter", out=tmp_path / "out2", scale=0.5)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    found = load_file(weights)
    found["base_model.model.lm_head.weight"] = torch.zeros(70, 32)
    save_file(found, weights)
    with pytest.raises(RegionError, match=r"'lm_head.weight' of shape \(70, 32\), and the base has \(64, 32\)"):
        merge(base, tmp_path / "adapter", out=tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_later_rounds_and_what_is_held(tmp_path):
    """What earlier rounds left is in the merged model."""
    from peft_isolate import next_round

    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    model = filled(get_peft_model(load(base), HalfFTConfig()))
    next_round(model)
    filled(model, seed=3).save_pretrained(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", out=tmp_path / "out")
    assert_merged(base, [tmp_path / "adapter"], tmp_path / "out")


@pytest.mark.parametrize("values", ["bf16", "int8", "exact"])
def test_a_packed_adapter_merges_as_it_computes(values, tmp_path):
    """The bits of the packed adapter in memory."""
    from peft_isolate.checkpoints.compress import compress

    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    adapter = trained(base, GivenConfig(kind="elements"), tmp_path / "adapter")
    compress(adapter, tmp_path / "packed", values=values)
    merge(base, tmp_path / "packed", out=tmp_path / "out")
    assert_merged(base, [tmp_path / "packed"], tmp_path / "out")


def wrong(case: str, base: Path, adapter: Path) -> None:
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    found, said = load_file(weights), json.loads(config.read_text())
    deltas = [key for key in found if key.endswith(".delta")]
    if case == "another base":
        model = tensors(base)
        model["model.layers.1.mlp.up_proj.weight"] += 0.1
        save_file(model, base / "model.safetensors", metadata={"format": "pt"})
    elif case == "NaN":
        found[deltas[3]][0] = float("nan")
    elif case == "infinity":
        found[deltas[3]][0] = float("inf")
    elif case == "a shape":
        found[deltas[3]] = found[deltas[3]][:-1].clone()
    elif case == "one missing":
        del found[deltas[3]]
    elif case == "one too many":
        found["base_model.model.model.layers.0.mlp.gate_proj.given_bias.delta"] = torch.zeros(3)
    elif case == "a weight of the base":
        found["base_model.model.model.norm.weight"] = torch.zeros(32)
    elif case == "integers":
        found[deltas[3]] = found[deltas[3]].int()
    elif case == "codes":
        key = next(key for key in found if key.endswith("_codes"))
        found[key] = torch.zeros_like(found[key])
    elif case == "no region":
        said["resolved"] = None
    elif case == "another model":
        for entry in said["resolved"]["region"].values():
            entry["shape"] = [entry["shape"][0] + 1, *entry["shape"][1:]]
    save_file(found, weights)
    config.write_text(json.dumps(said))
    if case == "cut short":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif case == "no weights":
        weights.unlink()
    elif case == "no JSON":
        config.write_text("{")
    elif case == "the base is cut short":
        file = base / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
    elif case == "the base is pickled":
        (base / "model.safetensors").rename(base / "pytorch_model.bin")
    elif case == "LoRA":
        config.write_text('{"peft_type": "LORA", "r": 8}')
    elif case == "out is there":
        (base.parent / "out").mkdir()
        (base.parent / "out" / "something").write_text("mine")


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("another base", BaseMismatchError, "another base than the adapter's: 'model.layers.1.mlp.up_proj.weight'"),
        ("NaN", FormatError, "NaN or infinity"),
        ("infinity", FormatError, "NaN or infinity"),
        ("a shape", FormatError, "has shape .* by its config"),
        ("one missing", FormatError, "lacks|is only in the config"),
        ("one too many", FormatError, "given_bias' is only in the file"),
        ("a weight of the base", FormatError, r"'model.norm.weight', a weight of the base, which it would overwrite"),
        ("integers", FormatError, "holds torch.int32, no numbers of a delta"),
        ("codes", FormatError, "nothing but zeros"),
        ("no region", FormatError, "has no region"),
        ("another model", RegionError, "the region was made for another model"),
        ("cut short", FormatError, "no readable safetensors file"),
        ("no weights", IsolateError, "has no 'adapter_model.safetensors'"),
        ("no JSON", FormatError, "makes no config"),
        ("the base is cut short", FormatError, "no readable safetensors file"),
        ("the base is pickled", IsolateError, "a format that can run code when it is read"),
        ("LoRA", IsolateError, "an adapter of LoraConfig"),
        ("out is there", IsolateError, "is there already, and nothing is overwritten"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(case, error, message, tmp_path):
    """What a model would refuse to load is refused here, too; no folder and no temporary one is left."""
    base = saved(tmp_path / "base")
    adapter = trained(base, GivenConfig(kind="elements"), tmp_path / "adapter")
    wrong(case, base, adapter)
    before = files(tmp_path)
    with pytest.raises(error, match=message):
        merge(base, adapter, out=tmp_path / "out")
    assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "adapter", "out"}


def test_what_does_not_fit_into_the_bases_dtype_is_refused(tmp_path):
    """fp16 ends at 65504: nothing infinite is written."""
    base = saved(tmp_path / "base", dtype=torch.float16)
    model = filled(get_peft_model(load(base), HalfFTConfig()))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith(".delta")).fill_(1e6)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(IsolateError, match="NaN or infinite"):
        merge(base, tmp_path / "adapter", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), [1.0, 2.0], "1", None, True, [10**400]])
def test_a_scale_is_a_finite_number(scale, tmp_path):
    """One, or one for each."""
    with pytest.raises(IsolateError, match="give one finite number"):
        merge("base", "adapter", out=tmp_path / "out", scale=scale)


def test_the_index_cannot_name_a_file_elsewhere(tmp_path):
    """No path of a file leads out of its folder."""
    base = saved(tmp_path / "base", max_shard_size="20KB")
    index = base / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    for bad in ("../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "", 3):
        said["weight_map"]["model.norm.weight"] = bad
        index.write_text(json.dumps(said))
        with pytest.raises(FormatError, match=r"which is no file of its folder|names no files"):
            Shards(base)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_neox"])
def test_the_disk_and_the_memory_map_both_ways(architecture, tmp_path):
    """Other names and shapes on the disk: every parameter is read as it is loaded, and goes back as it lay there."""
    base = saved(tmp_path / "base", architecture, torch.bfloat16)
    model, checkpoint = load(base, architecture), Checkpoint(base)
    assert list(checkpoint.parameters) == list(base_parameters(model))
    on_disk = tensors(base)
    assert set(on_disk) != set(checkpoint.parameters)
    for name, parameter in base_parameters(model).items():
        assert torch.equal(checkpoint.read(name), parameter)
        group = checkpoint.group_of(name)
        for disk, tensor in checkpoint.to_disk(group, checkpoint.read_group(group)).items():
            assert torch.equal(tensor, on_disk[disk])
    assert not checkpoint.missing
    assert not checkpoint.unused


def test_a_model_of_another_class_is_mapped_as_it_was_trained(tmp_path):
    """An adapter on the headless model, whose parameters' names lack the `model.`, merges into the whole."""
    from transformers import AutoModel

    base = saved(tmp_path / "base")
    model = filled(get_peft_model(AutoModel.from_pretrained(base, dtype="auto"), HalfFTConfig()))
    model.save_pretrained(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", out=tmp_path / "out")
    wanted = copy.deepcopy(model).merge_and_unload()
    merged = AutoModel.from_pretrained(tmp_path / "out", dtype="auto")
    assert_same(dict(merged.named_parameters()), dict(wanted.named_parameters()))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118


def test_adapters_of_different_methods_merge_together(tmp_path):
    """What PEFT cannot put on one model: here a difference is a difference."""
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    a = trained(base, GivenConfig(kind="rows", target_modules=["q_proj"]), tmp_path / "a")
    b = trained(base, HalfFTConfig(target_modules=["up_proj", "down_proj"]), tmp_path / "b")
    merge(base, a, b, out=tmp_path / "ab")
    merge(base, a, out=tmp_path / "of-a")
    merge(base, b, out=tmp_path / "of-b")
    both, of_a, of_b = (tensors(tmp_path / name) for name in ("ab", "of-a", "of-b"))
    for name, w0 in tensors(base).items():
        wanted = of_a[name] if not torch.equal(of_a[name], w0) else of_b[name]
        assert torch.equal(both[name], wanted)


def test_an_embedding_saved_whole_is_not_written_into_a_tied_one(tmp_path):
    """In memory the head keeps the base's numbers; a file that has one tensor for both could not."""
    base = saved(tmp_path / "base", "gemma2")
    adapter = trained(base, HalfFTConfig(modules_to_save=["embed_tokens"]), tmp_path / "adapter", "gemma2")
    with pytest.raises(IsolateError, match=r"whole, which the base ties to \['lm_head.weight'\]"):
        merge(base, adapter, out=tmp_path / "out")


def test_a_tied_tensor_that_the_disk_has_twice_is_not_made_two(tmp_path):
    """New tokens in the one alone would untie them."""
    base = saved(tmp_path / "base", "gemma2")
    twice = tensors(base)
    twice["lm_head.weight"] = twice["model.embed_tokens.weight"].clone()
    save_file(twice, base / "model.safetensors", metadata={"format": "pt"})
    adapter = trained(base, HalfFTConfig(trainable_token_indices=[3]), tmp_path / "adapter", "gemma2")
    with pytest.raises(IsolateError, match=r"tied to 'lm_head.weight', and .* has both"):
        merge(base, adapter, out=tmp_path / "out")
    only_layers = trained(base, HalfFTConfig(), tmp_path / "layers", "gemma2")
    merge(base, only_layers, out=tmp_path / "out")
    merged = load(tmp_path / "out", "gemma2")
    assert torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_a_base_of_another_architecture_is_named(tmp_path):
    """Before anything of it is built."""
    base, other = saved(tmp_path / "base"), saved(tmp_path / "gpt2", "gpt2")
    adapter = trained(base, HalfFTConfig(), tmp_path / "adapter")
    with pytest.raises(IsolateError, match="is a GPT2, and a LlamaForCausalLM is wanted"):
        merge(other, adapter, out=tmp_path / "out")


def test_a_classifiers_adapter_can_be_verified_if_not_merged(tmp_path):
    """Its new head has no place in the base's files; all else is checked."""
    from transformers import AutoModelForSequenceClassification

    from peft_isolate import verify

    base = saved(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype="auto")
    filled(get_peft_model(model, HalfFTConfig(task_type="SEQ_CLS"))).save_pretrained(tmp_path / "adapter")
    assert "fingerprint" in str(verify(base, tmp_path / "adapter"))
    with pytest.raises(RegionError, match=r"'score.weight' of shape .* and the base has no such tensor"):
        merge(base, tmp_path / "adapter", out=tmp_path / "out")


def test_files_are_everybodys_as_the_umask_says(tmp_path):
    """safetensors makes files for their owner alone."""
    from peft_isolate import compress

    base = saved(tmp_path / "base")
    adapter = trained(base, HalfFTConfig(), tmp_path / "adapter")
    (tmp_path / "plain").write_text("x")
    compress(adapter, tmp_path / "small")
    merge(base, adapter, out=tmp_path / "out")
    wanted = (tmp_path / "plain").stat().st_mode
    assert {p.stat().st_mode for folder in ("small", "out") for p in (tmp_path / folder).iterdir()} == {wanted}


def test_an_adapter_in_the_bases_folder_is_not_copied(tmp_path):
    """transformers would put it upon the merged model."""
    base = saved(tmp_path / "base")
    adapter = trained(base, HalfFTConfig(), tmp_path / "adapter")
    merge(base, adapter, out=tmp_path / "before")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (base / name).write_bytes((adapter / name).read_bytes())
    merge(base, adapter, out=tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "before")


def test_a_folder_that_nothing_can_be_put_in_the_place_of_is_refused_at_once(tmp_path, monkeypatch):
    """The current one: it was refused after the whole merge, and as if something were in it."""
    base = saved(tmp_path / "base")
    adapter = trained(base, HalfFTConfig(), tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(sys.modules["peft_isolate.checkpoints.merge"], "Plan", None)  # nothing is begun
    for out in (".", tmp_path / "empty"):
        with pytest.raises(IsolateError, match=r"is the current folder.*name one inside it"):
            merge(base, adapter, out=out)


def test_the_process_keeps_its_umask(tmp_path, monkeypatch):
    """To ask for it is to set it, for every thread."""

    def never(mask):
        raise AssertionError("the umask was set")

    base = saved(tmp_path / "base")
    adapter = trained(base, HalfFTConfig(), tmp_path / "adapter")
    monkeypatch.setattr("os.umask", never)
    merge(base, adapter, out=tmp_path / "out")
