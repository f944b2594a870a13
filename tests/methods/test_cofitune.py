"""CoFiTune's config: which layers and modules learn, and the soft mask through everything an adapter goes through."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import pickle

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.pytorch_utils import Conv1D
from trl.trainer.utils import use_adapter

from peft_isolate import CoFiTuneConfig, half_reset, plan
from peft_isolate.deltas.adapters import parameter_deltas
from peft_isolate.errors import FormatError, IsolateError, RegionError
from peft_isolate.methods.cofitune.coarse import LAYER_RANGES, layers_in
from peft_isolate.methods.cofitune.importance import Importance
from peft_isolate.regions import roles
from tests.compare import adapter, assert_same, logits
from tests.importances import importance
from tests.learn import dense, filled, learn
from tests.models import ARCHITECTURES, tiny, tokens

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}") for message in ("the adapter will take", "the soft mask does not")
]

EVERYWHERE = {"layer_range": (0, 1), "modules": "MHA+FFN"}


# Where


@pytest.mark.parametrize(("n_layers", "first", "last"), [(32, 8, 15), (40, 10, 19), (60, 15, 29)])
def test_the_papers_best_range(n_layers, first, last):
    assert [*layers_in((0.25, 0.5), n_layers)] == [*range(first, last + 1)]
    assert layers_in("second_quarter", n_layers) == layers_in((0.25, 0.5), n_layers)


def test_the_named_ranges_of_32_layers():
    found = {name: (r.start, r.stop) for name in LAYER_RANGES for r in [layers_in(name, 32)]}
    assert found == {
        "bottom": (0, 16), "middle": (8, 24), "top": (16, 32),
        "first_quarter": (0, 8), "second_quarter": (8, 16), "third_quarter": (16, 24), "fourth_quarter": (24, 32),
    }  # fmt: skip
    assert [*layers_in((0.29, 0.3), 100)] == [29], "0.29 · 100 is 28.999…"


def test_the_default_is_up_and_down_of_the_second_quarter():
    region = plan(tiny(num_hidden_layers=8), CoFiTuneConfig()).region
    names = [f"model.layers.{layer}.mlp.{module}.weight" for layer in (2, 3) for module in ("up_proj", "down_proj")]
    assert sorted(region) == sorted(names)
    assert {selection.kind for selection in region.values()} == {"whole"}


@pytest.mark.parametrize(
    ("modules", "names"),
    [("MHA", "qkv"), ("FFN", ("up", "down")), (("gate", "o"), ("gate", "o")), ("down", ("down",))],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_modules_are_their_roles_in_every_layout(architecture, modules, names):
    """Blocks of fused weights, every expert, columns of a Conv1D: what learns has these roles, and all of it does."""
    model = tiny(architecture)
    if "gate" in names and not any(role.name == "gate" for role in roles(model)):
        with pytest.raises(RegionError, match=r"no \['gate'\] was recognised in the layers of"):
            plan(model, CoFiTuneConfig(modules=modules))
        return
    region = plan(model, CoFiTuneConfig(layer_range=(0.34, 0.7), modules=modules)).region
    for role in roles(model):
        part = region[role.parameter] & role.selection if role.parameter in region else None
        wanted = role.layer == 1 and role.name in names
        assert (part.count if part else 0) == (role.selection.count if wanted else 0), role


def test_the_range_applies_to_both_stacks_and_to_the_language_model_only():
    t5 = plan(tiny("t5", num_layers=4, num_decoder_layers=8), CoFiTuneConfig()).region
    assert {tuple(name.split(".")[i] for i in (0, 2)) for name in t5} == {
        ("encoder", "1"), ("decoder", "2"), ("decoder", "3"),
    }  # fmt: skip
    vision = plan(tiny("gemma3_vision"), CoFiTuneConfig(layer_range="top")).region
    assert all("language_model" in name for name in vision)


def test_layers_by_number_and_modules_by_name():
    region = plan(tiny(), CoFiTuneConfig(layers_to_transform=[0, 2], modules="up")).region
    assert sorted(region) == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 2)]
    named = plan(tiny(), CoFiTuneConfig(target_modules=["q_proj"])).region
    assert sorted(named) == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]
    assert "up_proj.bias" not in str(plan(tiny("opt"), CoFiTuneConfig(**EVERYWHERE, train_bias=False)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_range": (8, 16)}, r"layer_range=\(8, 16\) is no range.*fractions.*layers_to_transform"),
        ({"layer_range": (0.5, 0.25)}, "is no range of layers"),
        ({"layer_range": "centre"}, r"layer_range='centre'.*'second_quarter'"),
        ({"layer_range": (0.0, float("nan"))}, "is no range of layers"),
        ({"modules": "MLP"}, r"modules='MLP': use some of the roles.*'MHA\+FFN'"),
        ({"modules": ()}, r"modules=\(\): use some of the roles"),
        ({"modules": 5}, r"modules=5: use some of the roles"),
        ({"modules": [["up"]]}, r"modules=\[\[.up.\]\]: use some of the roles"),
        ({"modules": ["up", "norm"]}, "use some of the roles"),
        ({"soft_mask": "both"}, r"soft_mask='both' is unknown: use one of \('update', 'gradient'\), or None"),
        ({"importance": 3}, "importance is a int, which is none: pass what measure_importance returned"),
        (
            {"layer_range": "top", "target_modules": ["q_proj"]},
            r"^layer_range='top' has no effect where target_modules",
        ),
        ({"layer_range": "top", "layers_to_transform": [1]}, "both say which layers to train"),
    ],
)
def test_a_config_that_means_nothing_is_refused(fields, message):
    with pytest.raises(IsolateError, match=message):
        CoFiTuneConfig(**fields)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("llama", {"layer_range": (0.3, 0.32)}, r"has no layer of \{'model.layers': 3\}.*widen it"),
        ("llama", {"layers_to_transform": [3]}, r"there is no layer \[3\] in this model, which has 3"),
        ("mamba", {}, r"no \['up', 'down'\] was recognised in the layers of MambaForCausalLM"),
        ("qwen3_next", {"layer_range": (0, 0.5), "modules": "MHA"}, r"no layer there of .* has \['q', 'k', 'v'\]"),
    ],
)
def test_a_region_that_is_not_there_is_refused(architecture, fields, message):
    model = tiny(architecture)
    with pytest.raises(RegionError, match=message):
        get_peft_model(model, CoFiTuneConfig(**fields))
    assert not hasattr(model, "peft_config")


def test_the_plan_and_the_log_say_whether_there_is_a_mask(caplog):
    for config, text, level in (
        (CoFiTuneConfig(), "soft mask off: no importance of what learns is given", logging.WARNING),
        (CoFiTuneConfig(importance=_nothing()), "the importance that is given reaches nothing", logging.WARNING),
        (CoFiTuneConfig(importance=importance()), "soft mask on the update: 80 units of 2 parameters", logging.INFO),
    ):
        assert text in str(plan(tiny(), config))
        with caplog.at_level(logging.INFO):
            caplog.clear()
            get_peft_model(tiny(), config)
        assert [record.levelno for record in caplog.records if text in record.message] == [level]
    assert "soft mask on the update: 80 units of 2 parameters" in str(plan(tiny(), config))
    assert "soft mask" not in str(plan(tiny(), CoFiTuneConfig(soft_mask=None)))


# How much


def one_step(architecture: str, given: Importance, soft_mask: str = "update") -> PeftModel:
    """After one step of SGD: from the second on, units learn from one another's outputs."""
    config = CoFiTuneConfig(**EVERYWHERE, importance=given, soft_mask=soft_mask)
    model = get_peft_model(tiny(architecture), config)
    model.eval()(input_ids=tokens(), labels=tokens()).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    return model


def output_units(role, model) -> torch.Tensor:
    """(units, scalars of each): flat positions in the parameter, of one block's output units in their order."""
    positions = role.selection.positions()
    by_columns = len(role.selection.shape) == 1 or isinstance(model.get_submodule(role.module), Conv1D)
    n_rows, n_columns = role.selection.matrix_shape
    return positions.reshape(n_rows, -1).T if by_columns else positions.reshape(-1, n_columns)


@pytest.mark.parametrize("soft_mask", ["update", "gradient"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_perturbing_one_unit_moves_exactly_its_rows(architecture, soft_mask):
    """On every layout: of a matrix one row (a head's rows, its k and v where heads share them), and its bias."""
    one = importance(architecture)
    before = dense(one_step(architecture, one, soft_mask))
    model = tiny(architecture)
    for kind in ("up", "down", "heads"):
        key = next(key for key in one.units if ".1." in key and key.endswith(f".{kind}"))
        unit = (0, 1) if one.units[key].ndim == 2 else (1,)
        units = {name: values.clone() for name, values in one.units.items()}
        units[key][unit] = 0.95  # the largest, so that the k and v that it shares follow
        after = dense(one_step(architecture, Importance(units, "absolute", 1, 24), soft_mask))
        mine = [r for r in roles(model) if Importance.key_of(r) == key and r.expert in (None, 0)]
        heads = {r.name: output_units(r, model) for r in mine if len(r.selection.shape) > 1}
        expected = {name: torch.zeros(numbers.numel(), dtype=torch.bool) for name, numbers in before.items()}
        for role in mine:
            of_units = output_units(role, model)
            chosen = of_units[1:2]
            if kind == "heads":
                width = len(heads["q"]) // 4
                head = 1 * len(heads[role.name]) // len(heads["q"])  # of q 1; of k and v shared by two 0
                chosen = of_units[head * width : (head + 1) * width]
            expected[role.parameter][chosen.flatten()] = True
        for name, numbers in before.items():
            moved = (numbers != after[name]).flatten()
            learned = (numbers != 0).flatten()  # units that are off on these tokens did not move at all
            assert torch.equal(moved, expected[name] & learned), (name, key)
        assert any((numbers != after[name]).any() for name, numbers in before.items()), key


def test_rows_move_by_what_they_do_not_matter():
    """After one step of SGD the effective delta is (1 − I)² of the free one for "update", (1 − I) for "gradient"."""
    ones = {key: torch.zeros_like(values) for key, values in importance().units.items()}
    free = dense(one_step("llama", Importance(ones, "absolute", 1, 24)))
    key, name = "model.layers.1.feed-forward.up", "model.layers.1.mlp.up_proj.weight"
    factor = 1 - importance().units[key][:, None]
    for soft_mask, power in (("update", 2), ("gradient", 1)):
        torch.testing.assert_close(dense(one_step("llama", importance(), soft_mask))[name], factor**power * free[name])


def run(optimizer: type, soft_mask: str, steps: int = 60) -> dict[str, torch.Tensor]:
    """{parameter: the effective delta after training} on the same data, whatever the mask."""
    config = CoFiTuneConfig(**EVERYWHERE, importance=importance(), soft_mask=soft_mask)
    model = get_peft_model(tiny(), config)
    lr = 1e-3 if optimizer is torch.optim.AdamW else 0.3
    learns = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        learns.zero_grad()
        model.eval()(input_ids=tokens(seed=step % 8), labels=tokens(seed=step % 8)).loss.backward()
        learns.step()
    return dense(model)


@pytest.mark.parametrize(
    ("optimizer", "soft_mask", "damps"),
    [(torch.optim.SGD, "update", True), (torch.optim.SGD, "gradient", True),
     (torch.optim.AdamW, "update", True), (torch.optim.AdamW, "gradient", False)],
)  # fmt: skip
def test_adamw_undoes_a_mask_on_the_gradient(optimizer, soft_mask, damps):
    """The norm of a row's movement against its importance: it falls, but for the gradient's mask under AdamW."""
    moved = run(optimizer, soft_mask)
    name = "model.layers.1.mlp.up_proj.weight"
    importances = importance().units["model.layers.1.feed-forward.up"]
    correlation = torch.corrcoef(torch.stack([importances, moved[name].norm(dim=1)]))[0, 1]
    assert (correlation < -0.7) if damps else (abs(correlation) < 0.35), correlation


# Through everything an adapter goes through


def masked(**fields) -> CoFiTuneConfig:
    return CoFiTuneConfig(**EVERYWHERE, importance=importance(), **fields)


@pytest.mark.parametrize("soft_mask", ["update", "gradient"])
@pytest.mark.parametrize("save_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_the_mask_is_saved_with_the_adapter(soft_mask, save_dtype, low_cpu_mem_usage, tmp_path):
    """In fp32 whatever the deltas are saved in, a number a unit; no path, and nothing is measured or read again."""
    importance().save(tmp_path / "importance.safetensors")
    config = CoFiTuneConfig(**EVERYWHERE, soft_mask=soft_mask, save_dtype=save_dtype)
    config.importance = tmp_path / "importance.safetensors"
    model = learn(get_peft_model(tiny(), config))
    (tmp_path / "importance.safetensors").unlink()
    model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["importance"] == "stored"
    assert str(tmp_path) not in json.dumps({k: v for k, v in written.items() if k != "base_model_name_or_path"})
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = {"update": ".importance", "gradient": ".gradient_importance"}[soft_mask]
    masks = {key: values for key, values in tensors.items() if key.endswith(name)}
    assert {values.dtype for values in masks.values()} == {torch.float32}
    assert sum(values.numel() for values in masks.values()) == 3 * (48 + 32 + 32 + 16 + 16)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    if save_dtype is None:
        assert torch.equal(logits(loaded), logits(model))
    again = PeftModel.from_pretrained(tiny(), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits(again), logits(loaded))
    # It goes on learning under the same mask.
    rows = learn(again) and dense(again)["model.layers.1.mlp.up_proj.weight"].norm(dim=1)
    assert rows.isfinite().all()
    expected = logits(loaded)
    loaded.merge_adapter()
    assert torch.equal(logits(loaded), expected)
    loaded.unmerge_adapter()
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(tiny()))


def test_a_config_gives_its_importance_away_once():
    """Consumed when a model is wrapped; the same object on another copy of the model has it at hand."""
    config = masked()
    assert "Importance(absolute" in config.to_dict()["importance"]
    model = filled(get_peft_model(tiny(), config))
    assert config.importance == "stored"
    again = filled(get_peft_model(tiny(), config))
    assert torch.equal(logits(again), logits(model))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), logits(model))
    with pytest.raises(RegionError, match=r"importance is Importance\(.*resolved=None"):
        get_peft_model(tiny(), dataclasses.replace(config, importance=importance(seed=1)))
    with pytest.raises(IsolateError, match="means the one in an adapter's file"):
        get_peft_model(tiny(), dataclasses.replace(config, resolved=None))
    with pytest.raises(RegionError, match="soft_mask is 'gradient', but the region in `resolved` was chosen with"):
        get_peft_model(tiny(), dataclasses.replace(config, soft_mask="gradient"))
    fresh = dataclasses.replace(config, importance=importance(seed=1), resolved=None)
    assert not torch.equal(logits(filled(get_peft_model(tiny(), fresh))), logits(model))


def test_a_config_alone_has_no_mask_to_train_with(tmp_path):
    """From a file without its tensors: an error when the mask is first needed, not another mask."""
    get_peft_model(tiny(), masked()).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    model = get_peft_model(tiny(), config)
    with pytest.raises(FormatError, match="it was altered or never loaded"):
        model(input_ids=tokens())


@pytest.mark.parametrize("damage", ["missing", "high", "nan", "short", "described"])
def test_a_damaged_mask_is_refused_at_load(damage, tmp_path):
    filled(get_peft_model(tiny(), masked())).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".importance"))
    if damage == "missing":
        del tensors[name]
    elif damage == "short":
        tensors[name] = tensors[name][:-1].clone()
    elif damage == "described":
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        next(iter(config["resolved"]["masks"].values()))["count"] = 7
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    else:
        tensors[name][3] = {"high": 1.5, "nan": math.nan}[damage]
    save_file(tensors, path, metadata={"format": "pt"})
    model = tiny()
    with pytest.raises(FormatError):
        PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(model), logits(tiny()))


def test_adapters_with_masks_are_summed_as_they_act():
    model = filled(get_peft_model(tiny(), masked(), adapter_name="a"), "a")
    model.add_adapter("b", CoFiTuneConfig(importance=importance(seed=1)))
    filled(model, "b", seed=1)
    model.add_weighted_adapter(["a", "b"], [0.5, -1.0], "sum")
    assert model.peft_config["sum"].importance is None
    both = [dense(model, name) for name in "ab"]
    for name, numbers in dense(model, "sum").items():
        terms = [of_one[name] * weight for of_one, weight in zip(both, (0.5, -1.0), strict=True) if name in of_one]
        assert torch.equal(numbers, torch.stack(terms).sum(0))


def test_half_reset_takes_a_masked_adapter_back():
    model = filled(get_peft_model(tiny(), masked()))
    before = dense(model)
    reset = half_reset(model, seed=1)
    for name, numbers in dense(model).items():
        wanted = before[name].clone()
        if name in reset:
            wanted[reset[name].mask()] = 0.0
        assert torch.equal(numbers, wanted)


def _nothing() -> Importance:
    return Importance({key: torch.zeros_like(v) for key, v in importance().units.items()}, "absolute", 1, 24)


def test_an_inert_mask_is_none():
    """Where every unit is of no importance nothing is stored; gate and output projection never have a mask."""
    model = get_peft_model(tiny(), CoFiTuneConfig(importance=_nothing()))
    assert not any(delta.mask for delta in parameter_deltas(model, "default").values())
    assert model.peft_config["default"].importance is None
    config = CoFiTuneConfig(layer_range=(0, 1), modules=("gate", "o", "up"), importance=importance())
    with_masks = parameter_deltas(get_peft_model(tiny(), config), "default")
    assert {name.split(".")[4] for name, delta in with_masks.items() if delta.mask} == {"up_proj"}


def test_heads_that_were_not_measured_learn_undamped():
    units = {key: values for key, values in importance().units.items() if not key.endswith("heads")}
    with pytest.warns(UserWarning, match=r"does not reach \['model.layers.0.self_attn.k_proj.weight'"):
        model = get_peft_model(tiny(), CoFiTuneConfig(**EVERYWHERE, importance=Importance(units, "absolute", 1, 24)))
    with_masks = {n.split(".")[4] for n, d in parameter_deltas(model, "default").items() if d.mask}
    assert with_masks == {"up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: importance("gpt2"), r"'transformer.h.0.*' is of shape .* and not in this model"),
        (
            lambda: _changed(lambda u: [u.pop(key) for key in list(u) if ".2." in key]),
            "layer 2 of model.layers is not in the importance: it was measured on another model",
        ),
        (
            lambda: _changed(lambda u: u.update({"model.layers.1.feed-forward.up": torch.zeros(47)})),
            r"'model.layers.1.feed-forward.up' is of shape \(47,\) in the importance and \(48,\) in this model",
        ),
        (
            lambda: _changed(lambda u: u.update({"model.layers.1.attention.heads": torch.rand(8)})),
            r"'model.layers.1.attention.heads' is of shape \(8,\) in the importance and \(4,\)",
        ),
        (
            lambda: _changed(lambda u: u.update({"model.layers.1.attention.heads": torch.zeros(5)})),
            r"'model.layers.1.attention.heads' is of shape \(5,\)",
        ),
    ],
)
def test_an_importance_of_another_model_is_refused(other, message):
    model = tiny()
    with pytest.raises(IsolateError, match=message):
        get_peft_model(model, CoFiTuneConfig(**EVERYWHERE, importance=other()))
    assert torch.equal(logits(model), logits(tiny()))
    assert not any("cofitune" in name for name, _ in model.named_parameters())


def _changed(change) -> Importance:
    units = dict(importance().units)
    change(units)
    return Importance(units, "absolute", 1, 24)


def test_experts_that_lie_transposed_learn_undamped():
    """gpt-oss: (experts, inner, hidden), where the units of down are columns of each expert, not rows."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = GptOssForCausalLM(
        GptOssConfig(**sizes, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=2,
                     vocab_size=64)
    )  # fmt: skip
    units = {"model.layers.1.attention.heads": torch.rand(4), "model.layers.1.expert.down": torch.rand(2, 32)}
    config = CoFiTuneConfig(
        layer_range=(0.5, 1), modules=("q", "down"), importance=Importance(units, "absolute", 1, 24)
    )
    with pytest.warns(UserWarning, match=r"does not reach .*'model.layers.1.mlp.experts.down_proj'"):
        wrapped = get_peft_model(model, config)
    deltas = parameter_deltas(wrapped, "default")
    assert {name.rpartition("1.")[2] for name, delta in deltas.items() if delta.mask} == {
        "self_attn.q_proj.weight", "self_attn.q_proj.bias",
    }  # fmt: skip


def test_an_importance_of_fewer_experts_is_refused():
    model = tiny("mixtral", num_local_experts=4)
    with pytest.raises(IsolateError, match=r"expert.up' is of shape \(2, 48\) in the importance and \(4, 48\)"):
        get_peft_model(model, CoFiTuneConfig(importance=importance("mixtral")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_model_leaves_its_mask_as_it_was_measured(dtype, tmp_path):
    """What is saved then loads as the model that was saved."""
    model = filled(get_peft_model(tiny(), masked())).to(dtype)
    masks = {name: values for name, values in model.named_buffers() if name.endswith(".importance")}
    assert {values.dtype for values in masks.values()} == {torch.float32}
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny().to(dtype), tmp_path)), expected)


def test_what_damps_the_gradient_is_not_loaded_into_what_damps_the_update(tmp_path):
    filled(get_peft_model(tiny(), masked(soft_mask="gradient"))).save_pretrained(tmp_path)
    model = filled(get_peft_model(tiny(), masked()))
    expected = logits(model)
    with pytest.raises(FormatError, match="does not hold the region of adapter 'default'"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), expected)


def test_no_path_of_a_strangers_file_is_opened(tmp_path):
    """Also where the file says that nothing was chosen yet."""
    importance().save(tmp_path / "mine.safetensors")
    filled(get_peft_model(tiny(), masked())).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"resolved": None, "importance": str(tmp_path / "mine.safetensors")}))
    for load in (PeftConfig.from_pretrained, lambda folder: PeftModel.from_pretrained(tiny(), folder)):
        with pytest.raises(FormatError, match=r"names the importance '.*mine.safetensors', which is not in"):
            load(tmp_path / "adapter")


def test_a_mask_that_was_never_loaded_is_loud_in_a_compiled_model(tmp_path):
    get_peft_model(tiny(), masked()).save_pretrained(tmp_path)
    model = get_peft_model(tiny(), PeftConfig.from_pretrained(tmp_path))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(input_ids=tokens(), use_cache=False).logits.isnan().all()


def test_an_importance_file_that_is_not_there(tmp_path):
    with pytest.raises(IsolateError, match=r"gone.safetensors': there is no such file; measure_importance"):
        get_peft_model(tiny(), CoFiTuneConfig(importance=tmp_path / "gone.safetensors"))


def test_a_reference_has_the_mask_of_its_policy():
    """TRL copies parameters only; the mask comes over with the config."""
    model = filled(get_peft_model(tiny(), masked()))
    expected = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    with use_adapter(model, "ref"):
        assert torch.equal(logits(model), expected)
    assert_same(adapter(model, "ref"), adapter(model))
