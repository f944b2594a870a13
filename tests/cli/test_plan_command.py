"""`peft-isolate plan`: the same as `plan` in Python, for a config, an adapter and many architectures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_isolate import CoFiTuneConfig, CoreIsolationConfig, HalfFTConfig, compress, next_stage, plan
from peft_isolate.checkpoints.architecture import meta_model
from tests.given import GivenConfig
from tests.models import CONFIGS, tiny


def yaml(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_it_prints_the_plan_of_a_yaml_file(call, home, tmp_path):
    file = yaml(tmp_path / "c.yaml", "method: cofitune\nlayer_range: [0.5, 1]\nmodules: MHA\n")
    result = call("plan", "base", "--config", file)
    assert result.exit_code == 0, result.output
    expected = plan(tiny(num_hidden_layers=4), CoFiTuneConfig(layer_range=(0.5, 1), modules="MHA"))
    assert result.stdout == f"{expected}\n"


@pytest.mark.parametrize("name", ["half_ft", "HALFFT", "half-ft"])
def test_a_method_by_any_of_its_names(call, name, tmp_path):
    expected = f"{plan(tiny(num_hidden_layers=4), HalfFTConfig())}\n"
    assert call("plan", "base", "--config", name).stdout == expected
    assert call("plan", "base", "--config", yaml(tmp_path / "c.yaml", f"peft_type: {name}")).stdout == expected


def test_a_name_is_the_method_whatever_folder_is_called_so(call, home):
    """Trainings of CoFiTune often go to a folder of that name, which is "./cofitune" then."""
    (home / "cofitune").mkdir()
    expected = f"{plan(tiny(num_hidden_layers=4), CoFiTuneConfig())}\n"
    assert call("plan", "base", "--config", "cofitune").stdout == expected
    assert "'cofitune' is no adapter" in call("plan", "base", "--config", "./cofitune").stderr
    (home / "cofitune").rmdir()


def test_an_adapter_shows_what_it_trained(call, tmp_path):
    config = HalfFTConfig(seed=5)
    get_peft_model(tiny(num_hidden_layers=4), config).save_pretrained(tmp_path / "adapter")
    expected = plan(tiny(num_hidden_layers=4), HalfFTConfig(seed=5))
    assert call("plan", "base", "--config", tmp_path / "adapter").stdout == f"{expected}\n"


@pytest.mark.filterwarnings("ignore:the adapter will take")
def test_an_adapter_around_a_core_shows_it_too(call, tmp_path):
    """Which single elements stand in its file alone, also once it is packed."""
    base = tiny(num_hidden_layers=4)
    core = GivenConfig(share=0.1).choose(base)
    model = get_peft_model(base, CoreIsolationConfig(init_weights=False))
    next_stage(model, frozen=core)
    model.save_pretrained(tmp_path / "adapter")
    compress(tmp_path / "adapter", tmp_path / "small")
    for folder in ("adapter", "small"):
        table = json.loads(call("plan", "base", "--config", tmp_path / folder, "--json").stdout)
        assert table["trained"] == plan(tiny(num_hidden_layers=4), CoreIsolationConfig(frozen=core)).trained
        assert table["held"] == core.count


def test_json_and_picture(call, tmp_path):
    result = call("plan", "base", "--config", "cofitune", "--json", "--plot", tmp_path / "trained.png")
    said, expected = json.loads(result.stdout), plan(tiny(num_hidden_layers=4), CoFiTuneConfig())
    assert (said["trained"], said["total"]) == (expected.trained, expected.total)
    assert said["adapter_bytes"] == expected.adapter_bytes
    assert sum(row["trained"] for row in said["parameters"]) == expected.trained
    assert (tmp_path / "trained.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_model_without_weights_is_the_model(architecture, tmp_path):
    """Class, names, shapes and dtypes: those of what is loaded."""
    model = tiny(architecture, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    empty = meta_model(str(tmp_path))
    assert type(empty) is type(model)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    there, loaded = ({n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (empty, model))
    assert there == loaded


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: cofitune\nlayer_rang: middle\n", "'layer_rang' is unknown, did you mean 'layer_range'?"),
        ("method: lora\n", r"method 'lora' is unknown: use one of ['cofitune', "),
        ("layer_range: middle\n", "name the method, once"),
        ("method: cofitune\nlayer_range: [8, 15]\n", "layer_range=[8, 15] is no range of layers"),
        ("method: cofitune\nlayers_to_transform: [99]\n", "there is no layer [99]"),
        ("method: [cofitune\n", "is no YAML"),
        ("cofitune\n", "holds no fields"),
        ("method: half_ft\nresolved: {}\n", "'resolved' is unknown"),
        ('method: cofitune\nexclude_modules: "["\n', "exclude_modules='[' is no regular expression"),
        ('method: cofitune\nmodules_to_save: ["*"]\n', "modules_to_save='*' is no regular expression"),
    ],
)
def test_mistakes_in_the_file(mistake, text, message, tmp_path):
    assert message in mistake("plan", "base", "--config", yaml(tmp_path / "c.yaml", text))


def test_mistakes_in_the_call(mistake, home, tmp_path):
    assert "there is no file and no folder './nowhere'" in mistake("plan", "base", "--config", "./nowhere")
    assert "there is no folder './nowhere'" in mistake("plan", "./nowhere", "--config", "cofitune")
    assert "is no adapter" in mistake("plan", "base", "--config", "base")
    (tmp_path / "empty").mkdir()
    assert "empty" in mistake("plan", tmp_path / "empty", "--config", "cofitune")
    assert "writes no 'xyz'" in mistake("plan", "base", "--config", "cofitune", "--plot", tmp_path / "x.xyz")
    get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    assert "not LoraConfig" in mistake("plan", "base", "--config", tmp_path / "lora")
    get_peft_model(tiny(), HalfFTConfig()).save_pretrained(tmp_path / "other")
    assert "other layers" in mistake("plan", "base", "--config", tmp_path / "other")
