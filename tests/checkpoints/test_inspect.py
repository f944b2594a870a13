"""`inspect`: what lies in a folder, without the model; and `write_card`, which says so in its README.md."""

from __future__ import annotations

import importlib
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from typer.testing import CliRunner

from peft_isolate import CoFiTuneConfig, HalfFTConfig, next_round
from peft_isolate.checkpoints.compress import compress
from peft_isolate.checkpoints.extract import extract
from peft_isolate.checkpoints.inspect import ExactInspection, Inspection, inspect, read_training, write_card
from peft_isolate.cli.app import app
from peft_isolate.deltas.about.readme import BEGIN, END
from peft_isolate.errors import FormatError, IsolateError, RegionError
from tests.given import GivenConfig
from tests.importances import importance
from tests.learn import filled
from tests.models import AUTO_CLASSES, tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take", "ignore:Could not find a config file")


def adapter(folder: Path, config=None, architecture: str = "llama", **options) -> Path:
    """`folder/adapter`, of random numbers, on `folder/base`."""
    if not (folder / "base").exists():
        tiny(architecture, **options).save_pretrained(folder / "base")
    auto = AUTO_CLASSES.get(architecture, AutoModelForCausalLM)
    model = get_peft_model(auto.from_pretrained(folder / "base"), HalfFTConfig() if config is None else config)
    filled(model).save_pretrained(folder / "adapter")
    kept[folder / "adapter"] = model
    return folder / "adapter"


kept: dict[Path, nn.Module] = {}


@pytest.mark.parametrize(
    "config",
    [
        HalfFTConfig(),
        GivenConfig(kind="elements"),
        GivenConfig(kind="all_but"),
        CoFiTuneConfig(layer_range=(0, 1), importance=importance("llama")),
    ],
    ids=["half", "elements", "all_but", "masked"],
)
def test_a_folder_tells_what_the_model_told(config, tmp_path):
    """The same rows and totals as when it was saved."""
    folder = adapter(tmp_path, config)
    told = kept[folder].peft_config["default"].remembered.summary
    found = inspect(folder)
    assert isinstance(found, Inspection)
    assert found.summary.rows == told.rows
    for name in ("method", "fields", "base_class", "fingerprint", "total", "base_bytes", "n_bytes", "dtype", "masked"):
        assert getattr(found.summary, name) == getattr(told, name), name
    assert found.summary.base == str(tmp_path / "base")
    assert found.files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").stat().st_size
    assert found.training is None
    assert found.carried == {}


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2", "phi3", "t5"])
def test_roles_of_any_architecture(architecture, tmp_path):
    folder = adapter(tmp_path, architecture=architecture)
    assert inspect(folder).summary.rows == kept[folder].peft_config["default"].remembered.summary.rows


def test_no_weight_of_the_base_is_read(tmp_path):
    """A config.json is enough."""
    folder = adapter(tmp_path)
    before = inspect(folder)
    (tmp_path / "base" / "model.safetensors").unlink()
    assert inspect(folder) == before


def test_held_numbers_are_told_apart(tmp_path):
    folder = adapter(tmp_path)
    model = kept[folder]
    next_round(model)
    filled(model).save_pretrained(folder)
    summary = inspect(folder).summary
    assert summary.held > 0
    assert summary.rows == model.peft_config["default"].remembered.summary.rows


def test_without_its_base_the_names_tell(tmp_path):
    """The base was moved away, and nobody named another."""
    folder = adapter(tmp_path)
    before = inspect(folder).summary
    (tmp_path / "base").rename(tmp_path / "moved")
    found = inspect(folder)
    assert (found.summary.trained, found.summary.total) == (before.trained, None)
    assert {row.role for row in found.summary.rows} >= {"q_proj", "gate_proj"}
    assert "layers and roles are by name" in str(found)
    assert str(tmp_path / "base") in found.summary.remarks[0]
    assert inspect(folder, tmp_path / "moved").summary.rows == before.rows


def test_a_base_that_became_another_is_not_used(tmp_path):
    folder = adapter(tmp_path)
    shutil.rmtree(tmp_path / "base")
    tiny(hidden_size=64).save_pretrained(tmp_path / "base")
    assert "by name" in inspect(folder).summary.remarks[0]
    with pytest.raises(RegionError, match="another model"):
        inspect(folder, tmp_path / "base")


def test_a_base_that_is_named_must_be_there(tmp_path):
    folder = adapter(tmp_path)
    with pytest.raises(IsolateError, match="there is no folder"):
        inspect(folder, tmp_path / "nowhere")


def test_a_config_without_a_base(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), HalfFTConfig(target_modules=["0"]))
    filled(model).save_pretrained(tmp_path / "adapter")
    found = inspect(tmp_path / "adapter")
    assert found.summary.base is None
    assert [(row.layer, row.role) for row in found.summary.rows] == [(0, "unknown")]
    assert write_card(tmp_path / "adapter")


def test_what_is_carried_beside_is_listed(tmp_path):
    folder = adapter(tmp_path, HalfFTConfig(modules_to_save=["lm_head"], trainable_token_indices=[3]))
    found = inspect(folder)
    saved = load_file(folder / "adapter_model.safetensors")
    beside = {key: tensor.nbytes for key, tensor in saved.items() if ".halfft_" not in key}
    assert found.carried == beside
    assert len(beside) == 2
    assert found.summary.n_bytes == sum(tensor.nbytes for tensor in saved.values()) - sum(beside.values())
    assert found.summary.beside == ("lm_head", "model.embed_tokens")
    assert "2 tensors, 8.32 kB, no deltas" in str(found)


@pytest.mark.parametrize("values", ["bf16", "int8", "exact"])
def test_a_packed_adapter_is_told_as_what_it_is(values, tmp_path):
    folder = adapter(tmp_path, GivenConfig(kind="elements"))
    plain = inspect(folder).summary
    compress(folder, tmp_path / "small", values=values)
    packed = inspect(tmp_path / "small").summary
    assert packed.packed == values
    assert f"packed as {values}" in str(packed)
    assert (packed.trained, packed.total) == (plain.trained, plain.total)
    assert math.isclose(packed.rms, plain.rms, rel_tol=0.0 if values == "exact" else 1e-2)
    assert packed.n_bytes < plain.n_bytes
    write_card(tmp_path / "small")
    assert "It is packed, for inference only" in (tmp_path / "small" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint of a trainer."""
    folder = tmp_path_factory.mktemp("trained")
    tiny().save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), HalfFTConfig())
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        str(folder / "out"), max_steps=6, save_steps=6, logging_steps=1, eval_strategy="steps", eval_steps=2,
        learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    return folder / "out" / "checkpoint-6"


def test_the_training_is_told(trained):
    """What the trainer logged, from its JSON."""
    log = json.loads((trained.parents[1] / "log.json").read_text())
    losses = [entry["loss"] for entry in log if "loss" in entry]
    evaluations = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    found = inspect(trained)
    training = found.training
    assert training is not None
    assert (training.steps, training.epochs, training.loss) == (6, 6.0, (6, losses[-1]))
    assert [(step, metrics["eval_loss"]) for step, metrics in training.evaluations] == evaluations
    assert training.best_metric == min(loss for _, loss in evaluations)
    assert "training  trained for 6 steps, 6 epochs" in str(found)
    plain = json.loads(json.dumps(found.as_plain()))
    assert plain["training"]["evaluations"][0]["eval_loss"] == evaluations[0][1]
    assert plain["kind"] == "adapter"
    assert plain["files"]["trainer_state.json"] > 0


def test_the_card_tells_the_training(trained, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    assert write_card(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "- trained for 6 steps, 6 epochs" in text
    assert "- evaluation loss " in text
    assert "at step 2, " in text
    assert (folder / "delta.png").read_bytes().startswith(b"\x89PNG")
    assert "](delta.png)" in text


def test_no_pickle_is_opened(trained, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert inspect(folder).training == inspect(trained).training


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"global_step": "x"}', '{"global_step": 1, "log_history": 3}', "[" * 100_000,
     '{"global_step": 1e999}'],
)  # fmt: skip
def test_a_damaged_state_is_remarked(text, tmp_path):
    """It is none of the adapter, so it ends no inspection."""
    folder = adapter(tmp_path)
    (folder / "trainer_state.json").write_text(text)
    with pytest.raises(FormatError, match="is no trainer's state"):
        read_training(folder)
    found = inspect(folder)
    assert found.training is None
    assert "is no trainer's state" in found.summary.remarks[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["step", "loss", "eval_loss", "eval_x", "y"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=200)
@given(
    state=st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("global_step", "epoch", "best_metric", "log_history"), JSON)
    )
)
def test_any_state_is_read_or_refused(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("state")
    (folder / "trainer_state.json").write_text(json.dumps(state))
    try:
        training = read_training(folder)
    except FormatError:
        return
    assert training is not None
    assert all(isinstance(line, str) for line in training.lines())
    json.loads(json.dumps(training.as_plain()), parse_constant=lambda name: pytest.fail(name))


def test_a_huge_state_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    monkeypatch.setattr(importlib.import_module("peft_isolate.checkpoints.inspect"), "LARGEST_STATE", 5)
    with pytest.raises(FormatError, match="it has 18 bytes"):
        read_training(tmp_path)


def test_a_damaged_adapter_is_refused(tmp_path):
    folder = adapter(tmp_path)
    path = folder / "adapter_model.safetensors"
    whole = load_file(path)
    name = next(iter(whole))
    save_file(whole | {name: whole[name].clone().fill_(torch.nan)}, path)
    with pytest.raises(FormatError, match="NaN"):
        inspect(folder)
    save_file({key: tensor for key, tensor in whole.items() if key != name}, path)
    with pytest.raises(FormatError, match="does not hold the region"):
        inspect(folder)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FormatError):
        inspect(folder)


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(IsolateError, match=r"no adapter_config\.json"):
        inspect(tmp_path)
    with pytest.raises(IsolateError, match="there is no folder"):
        inspect(tmp_path / "nothing")


@pytest.fixture
def exact(tmp_path) -> Path:
    model = tiny(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.lm_head.weight[0] *= 1.5
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "exact", "exact")
    return tmp_path / "exact"


def test_an_exact_difference_is_told(exact):
    found = inspect(exact)
    assert isinstance(found, ExactInspection)
    assert set(found.changed) == {"lm_head.weight", "model.norm.weight"}
    assert found.carried == {}
    assert found.base == str(exact.parent / "base")
    assert found.files["exact_delta.safetensors"] > sum(found.changed.values()) > 0
    assert {"model.safetensors", "config.json"} <= set(found.rebuilt)
    assert "2 tensors" in str(found)
    assert json.loads(json.dumps(found.as_plain()))["kind"] == "exact"
    with pytest.raises(IsolateError, match="mode='region'"):
        found.plot(exact / "delta.png")


def test_an_exact_difference_has_a_card(exact):
    assert write_card(exact)
    text = (exact / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert "2 tensors differ" in text
    assert yaml.safe_load(text.split("---\n")[1]) == {"tags": ["peft_isolate"]}
    assert write_card(exact)
    assert (exact / "README.md").read_text(encoding="utf-8") == text


def test_a_card_is_renewed_and_the_same_again(tmp_path):
    folder = adapter(tmp_path)
    assert write_card(folder)
    first = (folder / "README.md").read_text(encoding="utf-8")
    assert write_card(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == first
    assert f"adapter_model.safetensors: {(folder / 'adapter_model.safetensors').stat().st_size / 1000:.3g} kB" in first


def test_a_person_wrote_it(tmp_path, caplog):
    folder = adapter(tmp_path)
    (folder / "README.md").write_text("Mine.\n")
    with caplog.at_level(logging.WARNING):
        assert not write_card(folder)
    assert "was written by a person" in caplog.text
    assert (folder / "README.md").read_text() == "Mine.\n"
    assert not (folder / "delta.png").exists()


def test_a_card_without_a_picture(tmp_path, monkeypatch):
    """On request, and where matplotlib is not installed."""
    folder = adapter(tmp_path)
    assert write_card(folder, picture=False)

    def missing(self, path):
        raise ImportError("drawing needs matplotlib")

    monkeypatch.setattr("peft_isolate.deltas.about.summary.Summary.plot", missing)
    assert write_card(folder)
    assert not (folder / "delta.png").exists()
    assert "delta.png" not in (folder / "README.md").read_text(encoding="utf-8")


def test_a_card_needs_a_folder():
    with pytest.raises(IsolateError, match="download the adapter first"):
        write_card("someone/adapter")


def test_the_base_for_a_card_may_be_named(tmp_path):
    folder = adapter(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    write_card(folder)
    assert "| q_proj |" in (folder / "README.md").read_text(encoding="utf-8")
    write_card(folder, tmp_path / "moved")
    assert "| q |" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_command(tmp_path):
    folder = adapter(tmp_path)
    run = CliRunner().invoke(app, ["inspect", str(folder), "--json", "--card", "--plot", str(tmp_path / "a.svg")])
    assert run.exit_code == 0
    assert json.loads(run.stdout) == json.loads(json.dumps(inspect_before(folder, run.stdout)))
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    assert BEGIN in (folder / "README.md").read_text(encoding="utf-8")
    assert "q     1      whole" in CliRunner().invoke(app, ["inspect", str(folder)]).stdout


def inspect_before(folder: Path, output: str) -> dict:
    """The inspection, with the files as they were before the command wrote the card."""
    return inspect(folder).as_plain() | {"files": json.loads(output)["files"]}


def test_no_code_of_the_folder_that_a_config_names_is_run(tmp_path, monkeypatch):
    """Nor is anybody asked whether it may be."""
    there = adapter(tmp_path)
    strange, ran = tmp_path / "strange", tmp_path / "ran"
    strange.mkdir()
    auto = {"model_type": "strange", "auto_map": {"AutoConfig": "code.Strange"}, "architectures": ["LlamaForCausalLM"]}
    (strange / "config.json").write_text(json.dumps(auto))
    (strange / "code.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\nfrom transformers import PretrainedConfig\n\n\n"
        "class Strange(PretrainedConfig):\n    model_type = 'strange'\n"
    )
    config = json.loads((there / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(strange)}
    (there / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert "holds no model that transformers knows" in str(inspect(there).summary.remarks)
    assert not ran.exists()
