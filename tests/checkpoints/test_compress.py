"""compress and decompress: every door that an adapter goes through, with the bits of the one that it was made from."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import tracemalloc

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_isolate import CoFiTuneConfig, HalfFTConfig, half_reset, next_round
from peft_isolate.checkpoints.compress import compress, decompress
from peft_isolate.deltas.adapters import parameter_deltas, rearrange, regions_of
from peft_isolate.errors import FormatError, IsolateError
from tests.compare import assert_same, base, logits
from tests.given import GivenConfig
from tests.importances import importance
from tests.learn import dense, filled, learn, learning
from tests.models import tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take", "ignore:Already following")

# The package's `compress` is the function.
module = importlib.import_module("peft_isolate.checkpoints.compress")

VALUES = ("exact", "bf16", "fp16", "int8")
DTYPES = (torch.float32, torch.bfloat16)


def half() -> HalfFTConfig:
    return HalfFTConfig()


def masked() -> CoFiTuneConfig:
    return CoFiTuneConfig(layer_range=(0.0, 1.0), importance=importance())


METHODS = {
    "half": half,
    "held": half,
    "masked": masked,
    **{kind: lambda kind=kind: GivenConfig(kind=kind) for kind in ("whole", "columns", "elements", "all_but")},
}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def saved(folder, method: str = "elements", dtype: torch.dtype = torch.float32, **fields) -> PeftModel:
    """A model with an adapter as if trained, saved in folder/adapter; "held" in its second round."""
    config = METHODS[method]()
    for name, value in fields.items():
        setattr(config, name, value)
    model = filled(get_peft_model(tiny(dtype=dtype), config))
    if method == "held":
        next_round(model)
        filled(model, seed=1)
    model.save_pretrained(folder / "adapter")
    return model.eval()


def load(folder, dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    return PeftModel.from_pretrained(tiny(dtype=dtype), folder, **options)


def packed_and_plain(folder, method: str, values: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """folder/packed, and folder/plain, what `decompress` makes of it."""
    model = saved(folder, method, dtype)
    compress(folder / "adapter", folder / "packed", values)
    decompress(folder / "packed", folder / "plain")
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "packed" not in name}


# Numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", VALUES)
def test_packed_is_what_it_unpacks_to(method, values, dtype, tmp_path):
    """Logits, merged weights and regions, bit for bit; from "exact" those of the original, whose file comes back."""
    model = packed_and_plain(tmp_path, method, values, dtype)
    packed, plain = load(tmp_path / "packed", dtype), load(tmp_path / "plain", dtype)
    assert torch.equal(logits(packed), logits(plain))
    assert_same(dense(packed), dense(plain))
    assert regions_of(packed, "default") == regions_of(plain, "default") == regions_of(model, "default")
    if values != "exact":
        tensors = load_file(tmp_path / "plain" / module.WEIGHTS)
        assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}
    merged = packed.merge_and_unload()
    assert_same(weights(merged), weights(plain.merge_and_unload()))
    if values == "exact":
        assert torch.equal(logits(merged), logits(model))
        assert_same(*(load_file(tmp_path / name / module.WEIGHTS) for name in ("plain", "adapter")))
        assert config(tmp_path / "plain") == config(tmp_path / "adapter")


def config(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("save_dtype", ["bfloat16", "float16"])
def test_exact_keeps_the_dtype_of_the_file(save_dtype, method, tmp_path):
    model = saved(tmp_path, method, save_dtype=save_dtype)
    compress(tmp_path / "adapter", tmp_path / "packed", "exact")
    decompress(tmp_path / "packed", tmp_path / "plain")
    assert_same(*(load_file(tmp_path / name / module.WEIGHTS) for name in ("plain", "adapter")))
    assert torch.equal(logits(load(tmp_path / "packed")), logits(load(tmp_path / "adapter")))
    assert learning(model)


@pytest.mark.parametrize("values", VALUES)
def test_the_error_is_that_of_the_effective_weights(method, values, tmp_path):
    """Against the slow twin: dense deltas, damped where a soft mask does, compared one with the other."""
    model = saved(tmp_path, method, torch.bfloat16)
    w0 = base(tiny(dtype=torch.bfloat16))
    done = compress(tmp_path / "adapter", tmp_path / "packed", values, base=w0)
    before, after = dense(model), dense(load(tmp_path / "packed", torch.bfloat16))
    errors = torch.cat([(before[name] - after[name]).abs().flatten() for name in before])
    trained, held = regions_of(model, "default")
    assert done.scalars == trained.count + held.count == done.compared
    assert done.largest_error == pytest.approx(errors.max().item(), rel=1e-3, abs=1e-9)
    assert done.mean_error == pytest.approx(errors.double().sum().item() / done.scalars, rel=1e-3, abs=1e-9)
    packed = load(tmp_path / "packed", torch.bfloat16)
    merged = [weights(adapted.merge_and_unload()) for adapted in (copy.deepcopy(model), packed)]
    assert done.changed == sum(int((merged[0][name] != merged[1][name]).sum()) for name in merged[0])
    if values == "exact":
        assert done.largest_error == done.mean_error == done.changed == 0
    assert done.before == (tmp_path / "adapter" / module.WEIGHTS).stat().st_size
    assert done.after == (tmp_path / "packed" / module.WEIGHTS).stat().st_size
    text = str(done)
    assert f"before {done.before:,} bytes → after {done.after:,} bytes" in text
    assert f"{done.changed:,} of {done.compared:,} effective weights change" in text


def test_without_a_base_nothing_is_said_of_it(tmp_path):
    saved(tmp_path)
    done = compress(tmp_path / "adapter", tmp_path / "packed")
    assert (done.changed, done.compared) == (None, None)
    assert "effective weights change" not in str(done)
    for wrong, match in (({}, "the base has no 'model.layers.0"), ("shape", r"has shape .* in this model")):
        w0 = base(tiny()) if wrong == "shape" else {}
        w0 = {name: tensor[..., :1] for name, tensor in w0.items()}
        with pytest.raises(IsolateError, match=match):
            compress(tmp_path / "adapter", tmp_path / "wrong", base=w0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "packed"]


# Doors


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stock_doors(method, low_cpu_mem_usage, dtype, tmp_path):
    """from_pretrained, load_adapter, transformers' load_adapter, merge and back, disable, save, again."""
    packed_and_plain(tmp_path, method, "int8", dtype)
    expected, bare = logits(load(tmp_path / "plain", dtype)), logits(tiny(dtype=dtype))
    model = load(tmp_path / "packed", dtype, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model), expected)
    assert not learning(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert_same(*(load_file(tmp_path / name / module.WEIGHTS) for name in ("again", "packed")))
    assert config(tmp_path / "again")["resolved"] == config(tmp_path / "packed")["resolved"]
    assert torch.equal(logits(load(tmp_path / "again", dtype)), expected)

    model.load_adapter(tmp_path / "again", "second", low_cpu_mem_usage=low_cpu_mem_usage)
    model.load_adapter(tmp_path / "again", "default", low_cpu_mem_usage=low_cpu_mem_usage)  # over what is there
    for name in ("second", "default"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)
    model.delete_adapter("second")
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(model.unload()), bare)

    tiny(dtype=dtype).save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    plain.load_adapter(str(tmp_path / "packed"))
    assert torch.equal(logits(plain), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_and_autocast(method, dtype, tmp_path):
    """With PEFT's autocast off, and the whole model cast: as the plain adapter, rounded where that is."""
    packed_and_plain(tmp_path, method, "bf16", dtype)
    for options in ({}, {"autocast_adapter_dtype": False}):
        models = [load(tmp_path / name, dtype, **options) for name in ("packed", "plain")]
        assert torch.equal(*(logits(model) for model in models))
        for cast in (torch.float16, torch.float32, torch.bfloat16):
            models = [model.to(cast) for model in models]
            assert torch.equal(*(logits(model) for model in models))


def test_beside_a_plain_adapter(method, tmp_path):
    """Both active, one merged over the other, one trained while the other stays."""
    packed_and_plain(tmp_path, method, "int8")
    filled(get_peft_model(tiny(), METHODS[method]()), seed=5).save_pretrained(tmp_path / "other")
    models = []
    for name in ("packed", "plain"):
        model = load(tmp_path / name)
        model.load_adapter(tmp_path / "other", "other", is_trainable=True)
        model.base_model.set_adapter(["default", "other"])
        models.append(model)
    assert torch.equal(*(logits(model) for model in models))
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".other." in name and not name.endswith(".held"))
    numbers = copy.deepcopy(parameter_deltas(models[0], "default"))
    for model in models:
        learn(model.train())
    assert torch.equal(*(logits(model) for model in models))
    assert_same(dense(models[0]), {name: delta.dense() for name, delta in numbers.items()})
    for model in models:
        model.merge_adapter(["other"])
        model.merge_adapter(["default"])
    assert torch.equal(*(logits(model) for model in models))


def test_a_sum_of_packed_adapters_is_a_plain_one(method, tmp_path):
    packed_and_plain(tmp_path, method, "int8")
    found = []
    for name in ("packed", "plain"):
        model = load(tmp_path / name)
        model.base_model.add_weighted_adapter(["default", "default"], [0.5, 0.25], "sum")
        model.set_adapter("sum")
        found.append(logits(model))
        assert model.peft_config["sum"].packed is None
        model.save_pretrained(tmp_path / f"sum-{name}", selected_adapters=["sum"])
        assert torch.equal(logits(load(tmp_path / f"sum-{name}" / "sum")), found[-1])
    assert torch.equal(*found)


def test_a_packed_adapter_cannot_be_trained(tmp_path):
    """Each way says so, before anything is changed."""
    packed_and_plain(tmp_path, "half", "bf16")
    only = "packed adapters are for inference: unpack it with `peft-isolate decompress`"
    start = tiny()
    with pytest.raises(IsolateError, match=only):
        PeftModel.from_pretrained(start, tmp_path / "packed", is_trainable=True)
    assert_same(weights(start), weights(tiny()))
    model = load(tmp_path / "packed")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for use in (
        lambda: next_round(model),
        lambda: half_reset(model),
        lambda: model.load_adapter(tmp_path / "packed", "second", is_trainable=True),
        lambda: rearrange(model.base_model, "default", *regions_of(model, "default")),
        lambda: get_peft_model(tiny(), HalfFTConfig(packed="bf16")),
        lambda: get_peft_model(tiny(), HalfFTConfig(packed="bf16", inference_mode=True)),
    ):
        with pytest.raises(IsolateError, match=only):
            use()
    assert_same(model.state_dict(), state)
    assert list(model.peft_config) == ["default"]

    alone = PeftConfig.from_pretrained(tmp_path / "packed")
    with pytest.raises(FormatError, match="never loaded"):
        logits(get_peft_model(tiny(), copy.deepcopy(alone)))
    alone.inference_mode = False
    with pytest.raises(IsolateError, match=only):
        get_peft_model(tiny(), alone)


def test_loading_on_one_process_for_all_is_refused(tmp_path, monkeypatch):
    """accelerate would send the buffer around as if it were sharded."""
    packed_and_plain(tmp_path, "half", "bf16")
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    for variable in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(variable, "true")
    with pytest.raises(IsolateError, match=r"packed into bytes, which accelerate cannot broadcast .* or unpack it"):
        load(tmp_path / "packed")
    load(tmp_path / "plain")


@pytest.mark.parametrize("values", VALUES)
def test_a_decompressed_adapter_trains_on(method, values, tmp_path):
    """Exact ones as the original would have."""
    packed_and_plain(tmp_path, method, values)
    model = learn(load(tmp_path / "plain", is_trainable=True))
    assert model.peft_config["default"].packed is None
    assert not torch.equal(logits(model), logits(load(tmp_path / "plain")))
    if values == "exact":
        assert torch.equal(logits(model), logits(learn(load(tmp_path / "adapter", is_trainable=True))))


@pytest.mark.parametrize("used_before", [True, False])
def test_compiled_as_it_is_eager(used_before, tmp_path):
    """Unpacked before it is traced, or inside the graph."""
    torch._dynamo.reset()
    only = {"target_modules": r".*layers\.0\.self_attn\.q_proj"}
    filled(get_peft_model(tiny(num_hidden_layers=1), GivenConfig(**only))).save_pretrained(tmp_path / "adapter")
    compress(tmp_path / "adapter", tmp_path / "packed", "int8")
    model = PeftModel.from_pretrained(tiny(num_hidden_layers=1), tmp_path / "packed")
    expected = logits(copy.deepcopy(model))
    if used_before:
        logits(model)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(input_ids=tokens()).logits, expected)


# The folder


def test_what_lies_beside_goes_along(tmp_path):
    """Cards, tokenizers, saved modules; no states of a training, no pickles, nothing hidden."""
    model = filled(get_peft_model(tiny(), GivenConfig(modules_to_save=["lm_head"])))
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    for name in (
        "tokenizer.json",
        "templates/chat.jinja",
        "training_args.bin",
        "checkpoint-5/x.txt",
        "runs/events",
        ".cache/y",
    ):
        (tmp_path / "adapter" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "adapter" / name).write_text(name)
    done = compress(tmp_path / "adapter", tmp_path / "out" / "packed")
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert there - {"packed/delta.png"} == {
        f"packed/{name}"
        for name in ("README.md", "adapter_config.json", module.WEIGHTS, "tokenizer.json", "templates/chat.jinja")
    }
    assert done.carried == 64 * 32 * 4
    assert done.bytes_a_scalar == (done.after - done.carried) / done.scalars
    with safe_open(tmp_path / "out" / "packed" / module.WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    decompress(tmp_path / "out" / "packed", tmp_path / "plain")
    for name in ("out/packed", "plain"):
        wanted = load_file(tmp_path / "adapter" / module.WEIGHTS)["base_model.model.lm_head.weight"]
        assert torch.equal(load_file(tmp_path / name / module.WEIGHTS)["base_model.model.lm_head.weight"], wanted)
    assert torch.equal(logits(load(tmp_path / "out" / "packed")), logits(load(tmp_path / "plain")))


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    saved(tmp_path)
    taken = tmp_path / "taken"
    taken.mkdir()
    compress(tmp_path / "adapter", taken)  # an empty folder will do
    state = {path: path.read_bytes() for path in taken.iterdir()}
    for run in (compress, lambda adapter, out: decompress(taken, out)):
        with pytest.raises(IsolateError, match=r"taken' is there already"):
            run(tmp_path / "adapter", taken)
    assert {path: path.read_bytes() for path in taken.iterdir()} == state

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    for run in (compress, lambda adapter, out: decompress(taken, out)):
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / "adapter", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "taken"]


def test_wrong_ends_are_refused_by_name(tmp_path):
    saved(tmp_path)
    compress(tmp_path / "adapter", tmp_path / "packed")
    for run, match in (
        (lambda out: compress(tmp_path / "adapter", out, "int4"), r"values='int4' is unknown: take one of"),
        (lambda out: compress(tmp_path / "packed", out), r"packed' is packed as 'bf16' already: compress the adapter"),
        (lambda out: decompress(tmp_path / "adapter", out), "is not packed: it can be trained on as it is"),
        (lambda out: compress(tmp_path / "nowhere", out), "nowhere"),
    ):
        with pytest.raises(IsolateError, match=match):
            run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Strangers' files


def changed(folder, change, tensors=None) -> None:
    """Change the config in a folder by `change(config)`, and the tensors by `tensors(dict)`."""
    described = config(folder)
    change(described)
    (folder / "adapter_config.json").write_text(json.dumps(described))
    if tensors is not None:
        there = {name: tensor.clone() for name, tensor in load_file(folder / module.WEIGHTS).items()}
        tensors(there)
        save_file(there, folder / module.WEIGHTS, metadata={"format": "pt"})


def first(described: dict) -> str:
    return next(iter(described["resolved"]["region"]))


def altered(tensors: dict) -> None:
    buffer = next(tensor for name, tensor in tensors.items() if name.endswith(".packed"))
    buffer[buffer.numel() // 2] ^= 1


CHANGES = {
    "unknown values": (lambda c: c.update(packed="int3"), None, "packed='int3' is unknown"),
    "no word": (lambda c: c.update(packed=["bf16"]), None, r"packed=\['bf16'\] is unknown"),
    "other values": (lambda c: c.update(packed="int8"), None, "cannot be, in int8|its config int8"),
    "no flag": (lambda c: c.update(packed=None), None, "packed=None does not go with"),
    "no sizes": (lambda c: c["resolved"].pop("packed"), None, "does not go with"),
    "sizes of nothing": (lambda c: c["resolved"].update(packed=[]), None, "does not go with"),
    "one size less": (lambda c: c["resolved"]["packed"].pop(first(c)), None, "does not go with"),
    "a size too large": (lambda c: c["resolved"]["packed"].update({first(c): 10**13}), None, "cannot be"),
    "a size of words": (lambda c: c["resolved"]["packed"].update({first(c): "9"}), None, "no whole number"),
    "a size a little other": (
        lambda c: c["resolved"]["packed"].update({first(c): c["resolved"]["packed"][first(c)] - 1}),
        None,
        "has shape|shape",
    ),
    "a byte": (lambda c: None, altered, "checksum"),
    "a tensor less": (lambda c: None, lambda t: t.pop(next(k for k in t if k.endswith(".packed"))), "hold the region"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_altered_folders_are_refused_everywhere(change, tmp_path):
    """By from_pretrained, which leaves the base as it was, and by decompress, which writes nothing."""
    saved(tmp_path)
    compress(tmp_path / "adapter", tmp_path / "packed")
    of_config, of_tensors, match = CHANGES[change]
    changed(tmp_path / "packed", of_config, of_tensors)
    start = tiny()
    with pytest.raises(IsolateError, match=match):
        PeftModel.from_pretrained(start, tmp_path / "packed")
    assert_same(weights(start), weights(tiny()))
    with pytest.raises(IsolateError, match=f"{match}|not packed"):
        decompress(tmp_path / "packed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["whole", "half", "columns", "elements", "all_but"])
@pytest.mark.parametrize("packed", [True, False])
def test_claims_beyond_the_files_size_cost_no_memory(packed, method, tmp_path):
    """A config of a few KiB could ask for any number of scalars, where no model bounds its shapes."""
    saved(tmp_path, method)
    folder = tmp_path / "adapter"
    if packed:
        compress(folder, tmp_path / "packed")
        folder = tmp_path / "packed"

    def claim(described: dict) -> None:
        for entry in described["resolved"]["region"].values():
            entry["shape"] = [10**7, 10**5]
            if "strides" in entry:
                entry["strides"] = [[0, 10**5, 10**5, 1]]
            if entry["kind"] == "elements":
                entry["count"] = entry["code_bytes"] = 10**9

    changed(folder, claim)
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"claims [\d,]+ scalars, its tensors' file has|cannot be the"):
        (decompress if packed else compress)(folder, tmp_path / "out")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_what_stands_at_holes_counts_nowhere(tmp_path):
    """We save zeros there; what another writer left would be noise, and coarsen its neighbours' steps."""
    model = saved(tmp_path, "all_but")
    done = compress(tmp_path / "adapter", tmp_path / "packed", "int8")

    def litter(tensors: dict) -> None:
        for name, selection in regions_of(model, "default")[0].items():
            stem, _, parameter = name.rpartition(".")
            tensors[f"base_model.model.{stem}.given_{parameter}.delta"][~selection.mask()] = 1e3

    changed(tmp_path / "adapter", lambda c: None, litter)
    assert compress(tmp_path / "adapter", tmp_path / "other", "int8") == done
    assert_same(*(load_file(tmp_path / name / module.WEIGHTS) for name in ("packed", "other")))


def test_a_damaged_original_is_refused(tmp_path):
    """NaN, tensors of other shapes or kinds, another method's adapter, a file cut short."""
    saved(tmp_path)
    key = next(name for name in load_file(tmp_path / "adapter" / module.WEIGHTS) if name.endswith(".delta"))
    for change, match in (
        (lambda t: t[key].view(-1)[0].fill_(float("nan")), "NaN or infinity"),
        (lambda t: t.update({key: t[key][:-1].clone()}), "shape"),
        (lambda t: t.update({key: t[key].to(torch.int32)}), "int32"),
        (lambda t: t.pop(key), "lacks"),
    ):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "adapter", folder)
        changed(folder, lambda c: None, change)
        with pytest.raises(IsolateError, match=match):
            compress(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_nothing_is_copied_from_outside_the_folder_nor_of_other_adapters(tmp_path):
    """Of a link what it leads to would be shared; optimizer states and a second adapter are none of this one."""
    saved(tmp_path)
    folder = tmp_path / "adapter"
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "nowhere.txt").symlink_to(tmp_path / "nothing")
    (folder / "second").mkdir()
    for name in ("optimizer.safetensors", "events.out.tfevents.1", "second/adapter_config.json", "second/x.txt"):
        (folder / name).write_text("x")
    (folder / "own.txt").write_text("mine")
    (folder / "same.txt").symlink_to(folder / "own.txt")
    compress(folder, tmp_path / "packed")
    there = {path.relative_to(tmp_path / "packed").as_posix() for path in (tmp_path / "packed").rglob("*")}
    assert there - {"delta.png"} == {"README.md", "adapter_config.json", module.WEIGHTS, "own.txt", "same.txt"}
