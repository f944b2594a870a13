"""The model card: it says what was saved, it loads what it says, and what a person wrote stays."""

from __future__ import annotations

import ast
import copy
import dataclasses
import logging
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from peft_isolate import CoFiTuneConfig, HalfFTConfig, next_round
from peft_isolate.cli.read import make_config, method_named
from peft_isolate.deltas.about import card as card_module
from peft_isolate.deltas.about import readme
from peft_isolate.deltas.about.card import front_matter, is_hub_name, shade, text_map
from peft_isolate.deltas.about.readme import BEGIN, END, is_blank, read_readme
from tests.compare import logits
from tests.given import GivenConfig
from tests.importances import importance
from tests.learn import filled
from tests.models import tiny
from tests.texts import sft_rows, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take", "ignore:Could not find a config file")

BLANK = str(ModelCard.from_template(ModelCardData()))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def wrapped(base: Path, config=None) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base)
    return filled(get_peft_model(model, HalfFTConfig() if config is None else config))


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def metadata_of(folder: Path) -> dict:
    return yaml.safe_load(text_of(folder).split("---\n")[1])


def block(text: str, language: str) -> str:
    """The code of the first block in a language."""
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1]


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_saving_writes_it(base, tmp_path):
    """Every section, with the numbers of what was saved."""
    model = wrapped(base)
    model.save_pretrained(tmp_path / "out")
    text = text_of(tmp_path / "out")
    assert "[More Information Needed]" not in text
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["What changed", "How to load", "Base", "Method", "Measured", "Limits"]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    count, size = sum(t.numel() for t in saved.values()), sum(t.nbytes for t in saved.values())
    assert f"added to {count:,} scalars" in text
    everything = torch.cat([tensor.flatten() for tensor in saved.values()]).double()
    assert f"largest magnitude {everything.abs().max().item():.1e}".replace("e-0", "e-") in section(text, "Measured")
    assert f"{everything.square().mean().sqrt().item():.1e}".replace("e-0", "e-") in section(text, "Measured")
    assert f"{size / 1000:.3g} kB of deltas, float32" in section(text, "Measured")
    rows = [line for line in section(text, "What changed").splitlines() if line.startswith("| ")][2:]
    assert sum(int(line.split("|")[4].replace(",", "")) for line in rows) == count
    assert str(base) in section(text, "Base")
    assert "2404.18466" in text
    assert "delta.png" not in text


def test_the_front_matter_is_yaml(base, tmp_path):
    """PEFT's tags stay, but for paths of this machine, which the Hub refuses."""
    wrapped(base, HalfFTConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "out")
    said = metadata_of(tmp_path / "out")
    assert said["library_name"] == "peft"
    assert said["pipeline_tag"] == "text-generation"
    assert {"transformers", "peft_isolate", "halfft"} <= set(said["tags"])
    assert str(tmp_path) not in text_of(tmp_path / "out").split("---\n")[1]
    assert "license" not in said


@pytest.mark.parametrize(
    ("tags", "kept"),
    [
        (None, []),
        ("one", ["one"]),
        ([["nested"], 3, "a", "a"], ["a"]),
        ({"a": 1}, []),
        (["base_model:adapter:a/b", "base_model:adapter:/home/me/model"], ["base_model:adapter:a/b"]),
    ],
)
def test_tags_of_anyone_are_taken_as_far_as_they_are_tags(tags, kept, base, tmp_path):
    found = front_matter(saved_summary(base, tmp_path), {"tags": tags})
    assert found["tags"] == [*kept, "peft_isolate", "halfft"]


@pytest.mark.parametrize(
    ("known", "kept"), [("", None), ("/home/me/model", None), ("a/b", "a/b"), (["a/b", "c/d"], ["a/b", "c/d"])]
)
def test_a_base_that_the_hub_refuses_is_left_out(known, kept, base, tmp_path):
    assert front_matter(saved_summary(base, tmp_path), {"base_model": known}).get("base_model") == kept


def test_modules_that_others_rename_keep_their_roles(base, tmp_path):
    """FSDP's activation checkpointing puts a word into their names."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model = wrapped(base)
    rows = saved_rows(model, tmp_path)
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer")
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
    assert saved_rows(model, tmp_path) == rows


def saved_rows(model: nn.Module, folder: Path) -> tuple:
    model.save_pretrained(folder / "for-its-rows")
    return model.peft_config["default"].remembered.summary.rows


def test_a_base_of_the_hub_is_named(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.name_or_path = model.config._name_or_path = "someone/some-model"
    filled(get_peft_model(model, HalfFTConfig(revision="v1"))).save_pretrained(tmp_path / "out")
    assert metadata_of(tmp_path / "out")["base_model"] == "someone/some-model"
    text = text_of(tmp_path / "out")
    assert "(https://huggingface.co/someone/some-model), revision `v1`" in section(text, "Base")
    assert '"someone/some-model", revision="v1")' in block(text, "python")
    assert "merge someone/some-model . --out ../merged --revision v1" in block(text, "sh")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("a/b", True), ("gpt2", True), ("/a/b", False), ("./a", False), ("a/b/c", False), ("a b", False), ("", False)],
)
def test_names_of_the_hub(name, is_one):
    assert is_hub_name(name) == is_one


def test_a_folder_here_is_none_of_the_hub(base, monkeypatch):
    monkeypatch.chdir(base.parent)
    assert not is_hub_name("base")


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_the_snippet_loads_it(task, base, tmp_path, monkeypatch):
    """As it stands, in the adapter's folder."""
    model = wrapped(base, HalfFTConfig(task_type=task))
    model.save_pretrained(tmp_path / "out")
    code = block(text_of(tmp_path / "out"), "python")
    assert code.startswith("import peft_isolate")
    monkeypatch.chdir(tmp_path / "out")
    names: dict = {}
    exec(code, names)
    assert torch.equal(logits(names["model"]), logits(model))


def test_the_merge_line_merges(base, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from peft_isolate.cli.app import app

    model = wrapped(base)
    model.save_pretrained(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    program, *arguments = block(text_of(tmp_path / "out"), "sh").split()
    assert program == "peft-isolate"
    assert CliRunner().invoke(app, arguments).exit_code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(model.merge_and_unload()))


@pytest.mark.parametrize(
    "config",
    [
        HalfFTConfig(seed=7, fraction=0.4, exclude_modules=["lm_head"]),
        CoFiTuneConfig(layer_range="middle", modules="MHA"),
        CoFiTuneConfig(target_modules=["up_proj", "q_proj"]),
    ],
    ids=["half", "cofitune", "named"],
)
def test_the_config_makes_the_same_region(config, base, tmp_path):
    model = wrapped(base, copy.deepcopy(config))
    model.save_pretrained(tmp_path / "out")
    fields = yaml.safe_load(block(text_of(tmp_path / "out"), "yaml"))
    made = make_config(method_named(fields.pop("method"), ""), fields, "")
    assert made.choose(model) == config.choose(model)
    assert made == config


def test_every_save_renews_it(base, tmp_path):
    """Our card is written again between its marks; a license, and what is written around it, stay."""
    model = wrapped(base)
    model.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "README.md"
    text = text_of(tmp_path / "out").replace("---\nlibrary_name", "---\nlicense: mit\nlibrary_name", 1)
    text = text.replace(BEGIN, f"Mine above.\n\n{BEGIN}").replace("## Limits", "## Lost")
    path.write_text(text + "\nMine below.\n", encoding="utf-8")
    for seed in (1, 2):
        filled(model, seed=seed).save_pretrained(tmp_path / "out")
    text = text_of(tmp_path / "out")
    assert metadata_of(tmp_path / "out")["license"] == "mit"
    assert text.count(BEGIN) == text.count(END) == text.count("# Half Fine-Tuning") == 1
    assert text.index("Mine above.") < text.index(BEGIN) < text.index(END) < text.index("Mine below.")
    assert "## Limits" in text
    assert "## Lost" not in text
    assert "### Framework versions" not in text
    fresh = tmp_path / "fresh"
    model.save_pretrained(fresh)
    assert text[text.index(BEGIN) : text.index(END)] == text_of(fresh)[text_of(fresh).index(BEGIN) :].split(END)[0]


@pytest.mark.parametrize(
    "text",
    [
        "# My model\n\nIt is good.\n",
        "---\nlicense: mit\n---\n\nIt is good.\n",
        BLANK.replace("[More Information Needed]", "Alice", 1),
        BLANK + "\n\nIt is good.\n",
        f"{BEGIN}\n\nno end\n",
        f"{END}\n\n{BEGIN}\n",
        f"{BEGIN}\n{BEGIN}\n{END}\n",
        "---\n- a list\n---\n\nx\n",
        "---\nlicense: [mit\n---\n\nx\n",
        f"---\nlicense: {'[' * 3000}\n---\n\nx\n",
        f"---\ndate: 2020-13-45\n---\n\n{BEGIN}\n{END}\n",
    ],
    ids=["plain", "metadata", "filled in", "added to", "no end", "turned", "twice", "list", "no yaml", "deep", "date"],
)
def test_what_a_person_wrote_stays(text, base, tmp_path):
    """PEFT itself appends its version to any card; of ours nothing goes in."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text(text, encoding="utf-8")
    assert read_readme(out) is None
    summary = saved_summary(base, tmp_path)
    assert not readme.write_readme(out, "ours", lambda known: front_matter(summary, known))
    assert text_of(out) == text


def test_a_persons_readme_survives_a_save(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("---\nlicense: mit\n---\n\n# My model\n\nIt is good.\n", encoding="utf-8")
    wrapped(base).save_pretrained(out)
    text = text_of(out)
    assert "# My model\n\nIt is good." in text
    assert BEGIN not in text
    assert metadata_of(out)["license"] == "mit"


def test_unreadable_bytes_stay(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    assert read_readme(tmp_path) is None
    (tmp_path / "README.md").write_text("x" * (readme.LARGEST + 1))
    assert read_readme(tmp_path) is None
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert read_readme(tmp_path) is None


@pytest.mark.parametrize(
    "version", ["", "\n\n### Framework versions\n\n- PEFT 0.21.2", "\n### Framework versions\n\n- PEFT 1\n- PEFT 2\n"]
)
def test_the_blank_template_is_known(version):
    """As PEFT leaves it, and as transformers' push_to_hub makes it."""
    body = ModelCard(BLANK).text
    assert is_blank(body + version)
    assert is_blank(version)
    pushed = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    assert is_blank(ModelCard.from_template(ModelCardData(), model_description=pushed).text + version)
    assert not is_blank(body + version + "\n- PEFT is nice")
    assert not is_blank(ModelCard.from_template(ModelCardData(), developers="Alice").text + version)


def saved_summary(base: Path, tmp_path: Path, config=None):
    model = wrapped(base, config)
    model.save_pretrained(tmp_path / "for-its-summary")
    return model.peft_config["default"].remembered.summary


def test_trls_trainer_ends_with_a_card_that_loads(base, tmp_path, monkeypatch):
    """TRL writes a card of its own before each checkpoint: what it says of the training stays, not its snippet."""
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=SFTConfig(
            output_dir=str(tmp_path / "out"), max_steps=2, save_strategy="steps", save_steps=1, learning_rate=3e-3,
            max_length=48, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
            per_device_train_batch_size=4,
        ),
        train_dataset=Dataset.from_list(sft_rows(8)),
        processing_class=tokenizer(),
        peft_config=HalfFTConfig(),
    )  # fmt: skip
    trainer.train()
    assert BEGIN not in text_of(tmp_path / "out"), "TRL's own, before save_model"
    for _ in range(2):
        trainer.save_model()
        text = text_of(tmp_path / "out")
        assert text.count(BEGIN) == text.count("## Training procedure") == text.count("@software{vonwerra2020trl") == 1
        assert text.index(END) < text.index("## Training procedure")
        assert "pipeline" not in text
        assert {"trl", "sft", "peft_isolate"} <= set(metadata_of(tmp_path / "out")["tags"])
    assert text_of(tmp_path / "out" / "checkpoint-1") != text_of(tmp_path / "out" / "checkpoint-2")
    monkeypatch.chdir(tmp_path / "out")
    names: dict = {}
    exec(block(text, "python"), names)
    assert torch.equal(logits(names["model"]), logits(trainer.model))


def test_trls_card_stays_where_someone_wrote_into_it(tmp_path):
    card = (
        "\n# Model Card for out\n\nThis model is a fine-tuned version of [a](b).\n"
        "It has been trained using [TRL](https://github.com/huggingface/trl).\n\n"
        "## Quick start\n\n```python\nx\n```\n\n## Training procedure\n\nSFT.\n"
    )
    (tmp_path / "README.md").write_text(card)
    assert read_readme(tmp_path) == ({}, "", "## Training procedure\n\nSFT.")
    for change in (
        ("## Quick", "Mine.\n\n## Quick"),
        ("## Training", "Mine.\n\n## Training"),
        ("version of", "copy of"),
    ):
        (tmp_path / "README.md").write_text(card.replace(*change))
        assert read_readme(tmp_path) is None, change


def push(model, monkeypatch, card: ModelCard | None = None) -> dict[str, bytes]:
    """{file: content} that push_to_hub would upload; `card` is what the Hub has."""
    from huggingface_hub.errors import EntryNotFoundError
    from transformers.utils import hub

    uploaded = {}

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **kwargs):
            for operation in operations:
                with operation.as_file() as file:
                    uploaded[operation.path_in_repo] = file.read()

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    def load(*args, **kwargs):
        if card is None:
            raise EntryNotFoundError("none")
        return card

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub.ModelCard, "load", classmethod(lambda cls, *a, **k: load(*a, **k)))
    model.push_to_hub("someone/adapter")
    return uploaded


def test_push_to_hub_uploads_our_card(base, monkeypatch):
    """transformers puts a template over the folder's README.md just before it uploads."""
    model = wrapped(base)
    with monkeypatch.context() as patch:
        uploaded = push(model, patch)
    assert set(uploaded) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    text = uploaded["README.md"].decode()
    assert text.count(BEGIN) == 1
    assert "[More Information Needed]" not in text
    assert "peft_isolate" in yaml.safe_load(text.split("---\n")[1])["tags"]


def test_push_to_hub_keeps_a_persons_card(base, monkeypatch):
    with monkeypatch.context() as patch:
        uploaded = push(wrapped(base), patch, ModelCard("---\nlicense: mit\n---\n\nMine.\n"))
    assert uploaded["README.md"].decode() == "---\nlicense: mit\n---\n\nMine.\n"


def test_push_to_hub_leaves_other_methods_alone(base, monkeypatch):
    from peft import LoraConfig

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    with monkeypatch.context() as patch:
        uploaded = push(model, patch)
    assert BEGIN not in uploaded["README.md"].decode()


def test_a_config_saved_alone_gets_no_card(base, tmp_path):
    """Its numbers may have moved since the last save; and it is no adapter."""
    model = wrapped(base)
    config = model.peft_config["default"]
    config.save_pretrained(tmp_path / "before")
    model.save_pretrained(tmp_path / "out")
    config.save_pretrained(tmp_path / "after")
    assert os.listdir(tmp_path / "before") == os.listdir(tmp_path / "after") == ["adapter_config.json"]


def test_it_is_no_part_of_the_config(base, tmp_path):
    config = HalfFTConfig()
    model = wrapped(base, config)
    before, equal = config.to_dict(), dataclasses.replace(config)
    get_peft_model_state_dict(model)
    assert config.remembered is not None
    assert config.to_dict() == before
    assert config == equal
    assert "remembered" not in repr(config)


def test_each_adapter_has_its_own(base, tmp_path):
    model = wrapped(base)
    model.add_adapter("other", HalfFTConfig(seed=1))
    model.save_pretrained(tmp_path / "out")
    assert "\nseed: 0\n" in text_of(tmp_path / "out")
    assert "\nseed: 1\n" in text_of(tmp_path / "out" / "other")


def test_transformers_own_saving_writes_it(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(HalfFTConfig())
    model.save_pretrained(tmp_path / "out")
    assert "# Half Fine-Tuning (HFT)" in text_of(tmp_path / "out")


@pytest.mark.parametrize("where", ["summarise", "card", "write_whole"])
def test_a_card_that_fails_stops_no_save(where, base, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(readme, where, fail)
    model = wrapped(base)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "out")
    assert "the model card of" in caplog.text
    assert "No space left" in caplog.text
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert torch.equal(logits(fresh), logits(model))


def test_a_card_that_fails_leaves_no_older_one_to_be_written(base, tmp_path, monkeypatch):
    model = wrapped(base)
    model.save_pretrained(tmp_path / "out")
    monkeypatch.setattr(readme, "summarise", lambda *a, **k: 1 / 0)
    (tmp_path / "out" / "README.md").unlink()
    for folder in ("out", "other"):
        model.save_pretrained(tmp_path / folder)
        assert BEGIN not in text_of(tmp_path / folder)


def test_a_process_that_gathers_nothing_makes_no_summary(base):
    model = wrapped(base)
    config = model.peft_config["default"]
    readme.remember(model, config, "default", {})
    assert config.remembered is None


def test_numbers_are_those_of_the_file(base, tmp_path):
    """In save_dtype, and without what stands at holes."""
    model = wrapped(base, HalfFTConfig(save_dtype="bfloat16"))
    model.save_pretrained(tmp_path / "out")
    summary = model.peft_config["default"].remembered.summary
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert summary.dtype == "bfloat16"
    assert summary.n_bytes == sum(tensor.nbytes for tensor in saved.values())
    assert summary.largest == max(tensor.abs().max().item() for tensor in saved.values())
    assert "save_dtype: bfloat16" in text_of(tmp_path / "out")


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2", "t5", "bert"])
def test_other_architectures_have_cards(architecture, tmp_path):
    model = filled(get_peft_model(tiny(architecture), GivenConfig(kind="rows")))
    model.save_pretrained(tmp_path / "out")
    text = text_of(tmp_path / "out")
    assert f"from transformers import {type(model.get_base_model()).__name__}" in text
    assert "# GIVEN" in text


def test_a_model_of_ones_own_has_a_card(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), HalfFTConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path / "out")
    text = text_of(tmp_path / "out")
    assert "base = ...  # the model that the adapter was trained on" in text
    assert "peft-isolate merge" not in text
    assert "not named in the config" in text


def test_held_masked_and_beside_are_told(base, tmp_path):
    model = wrapped(base)
    next_round(model)
    filled(model).save_pretrained(tmp_path / "held")
    rows = [line.split("|") for line in text_of(tmp_path / "held").splitlines() if line.startswith("| q ")]
    assert int(rows[0][5].replace(",", "")) > 0
    config = CoFiTuneConfig(importance=importance("llama"), modules_to_save=["lm_head"])
    wrapped(base, config).save_pretrained(tmp_path / "masked")
    text = text_of(tmp_path / "masked")
    assert "a soft mask acts on" in text
    assert "Beside them it holds `lm_head`." in text


def test_the_map_has_a_sign_for_each_layer(base, tmp_path):
    summary = saved_summary(base, tmp_path, CoFiTuneConfig(layers_to_transform=[1], modules="FFN"))
    rows = [dataclasses.replace(row, rms={"up": 1.0, "down": 0.25}.get(row.role, 0.0) if row.trained else 0.0)
            for row in summary.rows]  # fmt: skip
    lines = text_map(dataclasses.replace(summary, rows=tuple(rows))).splitlines()
    assert lines[1].strip() == "layers 0 to 2, then outside the layers"
    drawn = {line.split()[0]: line[11:] for line in lines[2:-2]}
    assert drawn["up"] == "·█·"
    assert drawn["down"] == "·░·"
    assert drawn["q"] == "···"
    assert drawn["norm"] == "···  ·"
    assert drawn["head"] == "     ·"
    still = [dataclasses.replace(row, rms=0.0) for row in summary.rows]
    drawn = text_map(dataclasses.replace(summary, rows=tuple(still))).splitlines()
    assert any(line.split() == ["up", "·░·"] for line in drawn), "in the region, and not moved yet"


@pytest.mark.parametrize(
    ("magnitude", "sign"),
    [
        (0.0, "░"),
        (0.1, "░"),
        (0.5, "░"),
        (0.51, "▒"),
        (1.0, "▒"),
        (1.5, "▓"),
        (1.51, "█"),
        (2.0, "█"),
        (float("nan"), "?"),
    ],
)
def test_shades(magnitude, sign):
    assert shade(magnitude, 2.0) == sign
    assert shade(0.0, 0.0) == "░"


def test_a_strangers_names_break_out_of_nothing(base, tmp_path):
    """A config may come from anyone: its text becomes neither code, nor Markdown, nor a mark of the card."""
    evil = f'x")\nimport os  # `|<b>{END}'
    summary = dataclasses.replace(saved_summary(base, tmp_path), base=evil, revision=evil, method="A`|\n# B")
    rows = tuple(dataclasses.replace(row, role=evil) for row in summary.rows[:1])
    text = card_module.card(dataclasses.replace(summary, rows=rows, title="", fields={"layers_pattern": evil}))
    code = block(text, "python")
    assert [type(node).__name__ for node in ast.parse(code).body] == [
        "Import",
        "ImportFrom",
        "ImportFrom",
        "Assign",
        "Assign",
    ]
    assert END not in text
    assert "\n# B" not in text
    assert "\nimport os" not in text
    command = block(text, "sh")
    shown = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {command.strip()}"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.splitlines()[:2] == ["peft-isolate", "merge"]


def test_a_base_that_only_peft_names_is_told(base, tmp_path):
    """PEFT writes it into the config after the numbers were gathered."""
    model = wrapped(base)
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(tmp_path / "out")
    assert f"`{base}`" in section(text_of(tmp_path / "out"), "Base")
