"""What `fuse` reads and writes: any source, an adapter that goes on; and what it refuses."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_isolate import CoreIsolationConfig, next_stage
from peft_isolate.errors import BaseMismatchError, IsolateError, RegionError
from peft_isolate.methods.core_isolation import core_region, scope
from peft_isolate.methods.core_isolation.fusion import fuse
from peft_isolate.regions import Region, base_parameters
from peft_isolate.regions.selection import Selection
from tests.checkpoints.folders import files, load, saved
from tests.checkpoints.tunings import assert_merges, in_memory
from tests.compare import assert_same, logits
from tests.learn import dense, filled, learn
from tests.methods.fusions import HEAD, NORM, UP, core, deltas, made, moved, of
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take", "ignore:Could not find a config file")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """See `made`."""
    return made(tmp_path_factory.mktemp("llama"))


# ------------------------------------------------------------------------------------------------- from what, to what


def test_any_source_gives_the_same(llama, tmp_path):
    """Folders, live models, state dicts, shards: the same file, byte for byte."""
    base, tuned, regions = of(llama)
    wanted = files(fuse(base, tuned, regions, tmp_path / "folders", onto=llama / "onto").folder)
    models = {task: load(folder) for task, folder in tuned.items()}
    load(base).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 5
    states = {task: model.state_dict() for task, model in models.items()}
    opened = {task: Region.load(path) for task, path in regions.items()}
    for name, (from_base, theirs, onto) in {
        "models": (load(base), models, load(llama / "onto")),
        "states": (load(base).state_dict(), states, load(llama / "onto").state_dict()),
        "shards": (tmp_path / "sharded", tuned, llama / "onto"),
    }.items():
        fuse(from_base, theirs, opened, tmp_path / name, onto=onto)
        found = files(tmp_path / name)
        assert found["adapter_model.safetensors"] == wanted["adapter_model.safetensors"], name
        assert_same(deltas(base, tmp_path / name), deltas(base, tmp_path / "folders"))
    for task, model in models.items():
        assert_same(dict(base_parameters(model)), in_memory(tuned[task]))


@pytest.mark.parametrize("kind", ["lora", "own"])
def test_probes_that_are_adapters(kind, tmp_path):
    """LoRA's merged Δ, and this library's own; live or saved; never rounded to the dtype of a bf16 base."""
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    tuned, live, wanted = {}, {}, {}
    for seed, task in enumerate("ab"):
        lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        torch.manual_seed(seed)
        model = get_peft_model(load(base), lora if kind == "lora" else CoreIsolationConfig())
        if kind == "own":
            filled(model, seed=seed)
        model.save_pretrained(tmp_path / task)
        tuned[task], live[task] = tmp_path / task, model
        if kind == "lora":
            wanted[task] = {
                f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight("default").float()
                for name, module in model.named_modules()
                if hasattr(module, "get_delta_weight")
            }
        else:
            wanted[task] = dense(model)
    regions = {task: core(base, folder) for task, folder in tuned.items()}
    found = fuse(base, tuned, regions, tmp_path / "out", elsewhere="keep")
    assert found.conflicts
    fuse(base, live, regions, tmp_path / "live", elsewhere="keep")
    got, again = deltas(base, tmp_path / "out"), deltas(base, tmp_path / "live")
    assert got.keys() == again.keys()
    for name, delta in got.items():
        assert torch.allclose(delta, again[name], atol=1e-6)
        owned = [
            wanted[t].get(name, torch.zeros(delta.shape)) * regions[t][name].mask() for t in "ab" if name in regions[t]
        ]
        assert torch.stack([(delta - each).abs() for each in owned]).min(dim=0).values.max() < 1e-5, name
    before = {task: dense(model) if kind == "own" else None for task, model in live.items()}
    fuse(base, live, regions, tmp_path / "mixed", onto=live["a"], slerp_on="delta")
    for task, model in live.items():
        if before[task] is not None:
            assert_same(dense(model), before[task])
    assert_merges(base, tmp_path / "mixed", tmp_path / "merged")


def test_it_goes_on_in_stages(llama, tmp_path):
    """The next stage computes the same, learns outside of the frozen core, and can be fused again."""
    base, tuned, regions = of(llama)
    fuse(base, tuned, regions, tmp_path / "out", onto=llama / "onto")
    model = PeftModel.from_pretrained(load(base), tmp_path / "out", is_trainable=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before, was = logits(model), dense(model)
    frozen = Region.load(regions["a"])
    trained = next_stage(model, frozen=regions["a"])
    assert (
        trained.count == sum(p.numel() for n, p in base_parameters(model).items() if n in scope(model)) - frozen.count
    )
    assert torch.equal(logits(model), before)
    assert_same(dense(model), was)
    now = dense(learn(model))
    for name, selection in frozen.items():
        assert torch.equal(now[name][selection.mask()], was[name][selection.mask()])
    assert any(not torch.equal(now[name], was[name]) for name in was)
    model.save_pretrained(tmp_path / "stage")
    again = fuse(base, tuned, regions, tmp_path / "again", onto=tmp_path / "stage", elsewhere="keep")
    got = deltas(base, again.folder)
    union = frozen | Region.load(regions["b"])
    for name in now:
        free = ~union[name].mask() if name in union else torch.ones(now[name].shape, dtype=torch.bool)
        assert torch.equal(got[name][free], now[name][free])


def test_the_folder_says_what_it_is(llama, tmp_path):
    """An adapter of CPI-FT by its config, that names its base, with a card; the result as JSON."""
    base, tuned, regions = of(llama)
    found = fuse(base, tuned, regions, tmp_path / "deep" / "out")
    config = json.loads((tmp_path / "deep" / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "CORE_ISOLATION"
    assert config["base_model_name_or_path"] == str(base)
    assert config["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["inference_mode"]
    assert not config["resolved"]["region"]
    assert len(config["resolved"]["held"]) == found.tensors
    assert "transplanted: a " in (tmp_path / "deep" / "out" / "README.md").read_text()
    described = json.loads(json.dumps(found.to_dict()))
    assert described["folder"] == str(found.folder)
    assert described["tasks"] == ["a", "b"]
    assert described["transplanted"] == found.transplanted
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(tiny(seed=5), tmp_path / "deep" / "out")


def test_save_dtype_halves_it(llama, tmp_path):
    """Lossy, and by how much is said; a number that does not fit is refused."""
    base, tuned, regions = of(llama)
    full = fuse(base, tuned, regions, tmp_path / "full")
    half = fuse(base, tuned, regions, tmp_path / "half", save_dtype="bfloat16")
    assert half.n_bytes < 0.6 * full.n_bytes
    wide, narrow = deltas(base, tmp_path / "full"), deltas(base, tmp_path / "half")
    assert wide.keys() == narrow.keys()
    error = max(float((wide[name] - narrow[name]).abs().max()) for name in wide)
    assert 0 < half.rounded_by == pytest.approx(error)
    assert f"rounded the numbers by at most {half.rounded_by:.3g}" in str(half)
    assert full.rounded_by == 0
    assert "rounded" not in str(full)
    model = load(base)
    with torch.no_grad():
        base_parameters(model)[UP].view(-1)[7] += 1e6
    model.save_pretrained(tmp_path / "far")
    region = Region({UP: Selection.elements((48, 32), [7])})
    with pytest.raises(IsolateError, match="use 'bfloat16' or None"):
        fuse(base, {"far": tmp_path / "far"}, {"far": region}, tmp_path / "out", save_dtype="float16")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- what is refused


def shaped(shape: tuple[int, ...] = (48, 32)) -> Selection:
    return Selection.elements(shape, [0, 5])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"regions": {"a": Region({UP: shaped()})}}, IsolateError, "the task 'b' is in tuned and not in regions"),
        ({"regions": {"b": None, "c": None, "a": None}}, IsolateError, "the task 'c' is in regions and not in tuned"),
        ({"regions": {"a": Region(), "b": Region()}}, RegionError, "core region of 'a': it is empty"),
        ({"regions": {"a": Region({"x.weight": shaped()}), "b": None}}, RegionError, "of 'a': .*'x.weight'.*not have"),
        ({"regions": {"a": Region({UP: shaped((3, 4))}), "b": None}}, RegionError, r"\(3, 4\) in the region and \(48"),
        (
            {"regions": {"a": Region({HEAD: shaped((64, 32))}), "b": None}},
            RegionError,
            "'lm_head.weight', which is not",
        ),
        ({"regions": {"a": 3, "b": 4}}, IsolateError, r"regions\['a'\] is a int"),
        ({"regions": {"a": "nowhere", "b": "x"}}, IsolateError, r"regions\['a'\]='nowhere': there is no such file"),
        ({"tuned": {}, "regions": {}}, IsolateError, "nothing to fuse"),
        ({"tuned": {"a": "nowhere/at/all", "b": "x"}}, IsolateError, r"tuned\['a'\]: "),
        ({"onto": "nowhere/at/all"}, IsolateError, "onto: "),
        ({"elsewhere": "SLERP"}, IsolateError, "elsewhere='SLERP' is unknown"),
        ({"slerp_on": "Δ"}, IsolateError, "slerp_on='Δ' is unknown"),
        ({"epsilon": -0.1}, IsolateError, "epsilon=-0.1"),
        ({"epsilon": float("nan")}, IsolateError, "epsilon=nan"),
        ({"omega": 1.5}, IsolateError, "omega=1.5"),
        ({"omega": [0.5]}, IsolateError, "one for each of 2 tasks"),
        ({"omega": [0.5, -1]}, IsolateError, "omega="),
        ({"omega": True}, IsolateError, "omega=True"),
        ({"omega": "half"}, IsolateError, "omega='half'"),
        ({"omega": float("nan")}, IsolateError, "omega=nan"),
        ({"omega": 0.5, "elsewhere": "keep"}, IsolateError, "has no effect with elsewhere='keep'"),
        ({"save_dtype": "int8"}, IsolateError, "save_dtype='int8'"),
    ],
)
def test_bad_input(changes, error, message, llama, tmp_path):
    """Refused before anything is written."""
    base, tuned, regions = of(llama)
    if "regions" in changes:
        given = {task: regions.get(task) if one is None else one for task, one in changes["regions"].items()}
        changes = changes | {"regions": given}
    with pytest.raises(error, match=message):
        fuse(base, **({"tuned": tuned, "regions": regions} | changes), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_fused(llama, tmp_path):
    """Another architecture, NaN, a core of another task, no difference at all: said by task, nothing written."""
    base, tuned, regions = of(llama)
    saved(tmp_path / "wide", hidden_size=64)
    model = load(base)
    base_parameters(model)[UP].data[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    there = sorted(path.name for path in tmp_path.iterdir())
    out = tmp_path / "out"
    with pytest.raises(RegionError, match=r"tuned\['b'\]: .* is \(.*32.*\) in the base and \(.*64.*\)"):
        fuse(base, tuned | {"b": tmp_path / "wide"}, regions, out)
    for broken in (
        {"tuned": tuned | {"b": tmp_path / "nan"}, "onto": None},
        {"tuned": tuned, "onto": tmp_path / "nan"},
    ):
        with pytest.raises(RegionError, match=f"{UP!r} holds NaN or infinity"):
            fuse(base, regions=regions, out=out, **broken)
    # NaN beside the core is found while writing, which leaves nothing.
    elsewhere = {"a": regions["a"], "b": Region({NORM: Selection.elements((32,), [0])})}
    with torch.no_grad():
        base_parameters(model)[NORM].add_(0.1)
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(RegionError, match=r"tuned\['b'\]: .* holds NaN"):
        fuse(base, tuned | {"b": tmp_path / "nan"}, elsewhere, out)
    with pytest.raises(RegionError, match="nothing of the core region of 'b' moved"):
        fuse(base, tuned | {"b": base}, regions, out)
    with pytest.raises(RegionError, match="nothing of the core region of 'a' moved"):
        fuse(base, {"a": base}, {"a": regions["a"]}, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == there
    shutil.copytree(base, out)
    with pytest.raises(IsolateError, match="is there already"):
        fuse(base, tuned, regions, out)
    assert files(out) == files(base)


def test_another_base_is_refused(llama, tmp_path):
    """An adapter over another base than W0 has no Δ over W0."""
    base, tuned, regions = of(llama)
    other = get_peft_model(tiny(seed=7), CoreIsolationConfig())
    filled(other).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match=r"tuned\['b'\]: "):
        fuse(base, tuned | {"b": tmp_path / "other"}, regions, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_state_dict_takes_its_ties_from_what_was_tuned(tmp_path):
    """A base of bare numbers, in which the tied head is a copy, is the model's own base."""
    model = tiny("gemma2")
    changed = moved(copy.deepcopy(model), 1)
    bare = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, base in (("model", model), ("bare", bare)):
        fuse(base, {"a": changed}, {"a": core_region(base, changed, 1)}, tmp_path / name)
    assert_same(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("bare", "model")))
