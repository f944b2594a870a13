"""`extract`, `merge`, `compress`, `decompress`, `verify`, `inspect`, `export`: thin shells, one line for a mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_isolate import HalfFTConfig, extract, merge
from tests.compare import assert_same, logits
from tests.learn import filled


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").requires_grad_(False)


@pytest.fixture(scope="module")
def shared(home) -> Path:
    """Beside `base`: `adapter`, and `tuned`, what both are together."""
    if not (home / "tuned").exists():
        model = filled(get_peft_model(load(home / "base"), HalfFTConfig()))
        model.save_pretrained(home / "adapter")
        merge(home / "base", home / "adapter", out=home / "tuned")
    return home


@pytest.fixture
def run(call, shared):
    """`run("merge", …)`: what it printed; it ended well."""

    def printed(*args) -> str:
        result = call(*args)
        assert result.exit_code == 0, result.output
        return result.stdout

    return printed


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_merge_says_what_it_wrote(run, shared, tmp_path):
    """One adapter, several with scales."""
    assert run("merge", "base", "adapter", "--out", tmp_path / "one").startswith("merged ")
    assert_same(tensors(tmp_path / "one"), tensors(shared / "tuned"))
    run("merge", "base", "adapter", "adapter", "--scale", 1, "--scale", 0, "--out", tmp_path / "two")
    assert_same(tensors(tmp_path / "two"), tensors(shared / "tuned"))
    run("merge", "base", "adapter", "--scale", 0.5, "--out", tmp_path / "half")
    merge(shared / "base", shared / "adapter", out=tmp_path / "wanted", scale=0.5)
    assert_same(tensors(tmp_path / "half"), tensors(tmp_path / "wanted"))


@pytest.mark.parametrize("mode", ["region", "exact", "top"])
def test_extract_in_each_mode(run, shared, tmp_path, mode):
    """As the function; and what it made merges."""
    percent = ("--percent", 5) if mode == "top" else ()
    text = run("extract", "base", "tuned", "--out", tmp_path / "out", "--mode", mode, *percent)
    wanted = extract(shared / "base", shared / "tuned", tmp_path / "twin", mode, percent=5.0)
    assert text.replace(str(tmp_path / "out"), str(tmp_path / "twin")) == f"{wanted}\n"
    run("merge", "base", tmp_path / "out", "--out", tmp_path / "merged")
    if mode != "top":
        assert_same(tensors(tmp_path / "merged"), tensors(shared / "tuned"))


def test_extract_without_embeddings(run, shared, tmp_path):
    """They are left out, and it says so."""
    tuned = tmp_path / "tuned"
    shutil.copytree(shared / "tuned", tuned)
    model = load(tuned)
    model.get_input_embeddings().weight.add_(1.0)
    model.save_pretrained(tuned)
    text = run("extract", "base", tuned, "--out", tmp_path / "out", "--no-embeddings")
    assert "left out, though different: model.embed_tokens.weight" in text


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_compress_and_decompress(run, shared, tmp_path, values):
    """It prints before and after and the error; what comes back is the same model, to be trained on."""
    text = run("compress", "adapter", "--out", tmp_path / "small", "--values", values, "--base", "base")
    assert "before " in text
    assert "effective weights" in text
    assert " change" in text
    assert run("decompress", tmp_path / "small", "--out", tmp_path / "large").startswith("decompressed")
    packed = PeftModel.from_pretrained(load(shared / "base"), tmp_path / "small")
    plain = PeftModel.from_pretrained(load(shared / "base"), tmp_path / "large", is_trainable=True)
    assert torch.equal(logits(packed), logits(plain))
    assert any(parameter.requires_grad for parameter in plain.parameters())


def test_verify(run, mistake, shared, tmp_path):
    """One line a check; with the merged folder, too; and one line for what is wrong."""
    assert len(run("verify", "base", "adapter").splitlines()) >= 3
    other = tmp_path / "other"
    shutil.copytree(shared / "base", other)
    model = load(other)
    model.model.norm.weight.add_(1.0)
    model.save_pretrained(other)
    assert "another base than the adapter's: 'model.norm.weight'" in mistake("verify", other, "adapter")
    assert "at flat position" in mistake("verify", "base", "adapter", "--merged", other)


def test_inspect(run, shared, tmp_path):
    """A table, JSON, a picture, a card."""
    assert "HALFFT" in run("inspect", "adapter", "--base", "base")
    found = json.loads(run("inspect", "adapter", "--base", "base", "--json", "--plot", tmp_path / "delta.png"))
    assert isinstance(found, dict)
    assert (tmp_path / "delta.png").read_bytes().startswith(b"\x89PNG")
    shutil.copytree(shared / "adapter", tmp_path / "adapter")
    run("inspect", tmp_path / "adapter", "--base", "base", "--card")
    assert "import peft_isolate" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("format", ["state-dict", "indexed"])
def test_export(run, shared, tmp_path, format):
    """A folder of plain safetensors."""
    run("export", "base", "adapter", "--out", tmp_path / "out", "--format", format)
    assert list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("merge", "base", "nothing", "--out", "x"), "nothing"),
        (("merge", "./nothing", "adapter", "--out", "x"), "there is no folder './nothing'"),
        (("merge", "base", "base", "--out", "x"), "is no adapter"),
        (("merge", "base", "adapter", "--out", "tuned"), "is there already"),
        (("merge", "base", "adapter", "--out", "x", "--scale", "nan"), "finite number"),
        (("extract", "base", "base", "--out", "x"), "does not differ"),
        (("extract", "base", "tuned", "--out", "x", "--mode", "top", "--percent", "0"), "percent"),
        (("extract", "base", "tuned", "--out", "x", "--mode", "all"), "all"),
        (("compress", "base", "--out", "x"), "is no adapter"),
        (("decompress", "adapter", "--out", "x"), "not packed|nothing to decompress|packed"),
        (("inspect", "base"), "is no adapter"),
        (("inspect", "adapter", "--plot", "x.txt"), "txt"),
        (("export", "base", "adapter", "--out", "tuned"), "is there already"),
    ],
)
def test_a_mistake_is_one_line(mistake, shared, args, message):
    """And nothing is written."""
    import re

    assert re.search(message, mistake(*args))
    assert not (shared / "x").exists()


def test_no_progress_bar_where_nobody_looks(shared, tmp_path):
    """Its output goes to a file: nothing but the result."""
    code = "from peft_isolate.cli import main; main()"
    command = [sys.executable, "-c", code, "merge", "base", "adapter", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=shared, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("merged ")
    assert "%|" not in result.stderr
