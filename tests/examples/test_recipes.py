"""`examples/recipes/*.yaml`: spelt as the scripts read them, valid for their models, and run on tiny stand-ins."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config
from trl import DPOConfig, SFTConfig

from examples import common, dpo, sft
from peft_isolate import plan
from peft_isolate.methods.plan import Plan
from tests.models import tiny
from tests.texts import dpo_rows, sft_rows, tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
SFT = [path for path in RECIPES if not path.stem.endswith("-dpo")]

LLAMA = {
    "vocab_size": 128256, "intermediate_size": 8192, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
# The published shapes, and their scalars.
SHAPES: dict[str, tuple[PreTrainedConfig, int]] = {
    "Qwen/Qwen3-0.6B": (
        Qwen3Config(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                    num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
        596_049_920,
    ),
    "meta-llama/Llama-3.2-1B": (
        LlamaConfig(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, head_dim=64, **LLAMA),
        1_235_814_400,
    ),
    "meta-llama/Llama-3.2-3B": (
        LlamaConfig(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128, **LLAMA),
        3_212_749_824,
    ),
}  # fmt: skip


def parsed(path: Path, *flags: str) -> tuple:
    """What the recipe's own script makes of it."""
    script = (DPOConfig, dpo.DPOArguments, dpo.LEARNING_RATE) if path not in SFT else None
    kinds = script or (SFTConfig, common.IsolateArguments, sft.LEARNING_RATE)
    return common.parse(["--config", str(path), "--use_cpu", *flags], *kinds)


def planned(path: Path) -> Plan:
    """The plan of a recipe for SFT, on its model's shapes."""
    _, _, model_args, _, isolate_args = parsed(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[model_args.model_name_or_path][0])
    return plan(model.to(torch.bfloat16), isolate_args.config())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_spelt_right_and_says_that_it_is_unrun(path):
    """The script's parser takes every field; the head names the script and the file."""
    script_args, training_args, model_args, _, isolate_args = parsed(path)
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    for part in (script_args, training_args, model_args, isolate_args):
        for name in fields.keys() & vars(part).keys():
            assert getattr(part, name) == fields[name] or name in ("lr_scheduler_type", "save_strategy", "report_to")
    head = path.read_text(encoding="utf-8").split("model_name_or_path")[0].split("adapter:")[0]
    script = "sft.py" if path in SFT else "dpo.py"
    assert f"# python examples/{script} --config examples/recipes/{path.name}\n" in head
    assert "# unrun: no Hub here." in head
    assert training_args.output_dir == f"outputs/{path.stem}"
    if path not in SFT:  # after the recipe for SFT of the same model
        assert isolate_args.next_round
        assert isolate_args.adapter == f"outputs/{path.stem.removesuffix('-dpo')}-hft"


def test_every_model_has_the_same_recipes():
    assert [path.stem for path in RECIPES] == [
        f"{model}-{method}"
        for model in ("llama-3.2-1b", "llama-3.2-3b", "qwen3-0.6b")
        for method in ("cofitune", "dpo", "hft")
    ]


def test_a_recipe_trains_what_the_readme_says():
    """Valid for the model's published shape, on the meta device; and the table of sizes is what `plan` computes."""
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in SFT:
        table = planned(path)
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model_name_or_path"]
        assert table.total == SHAPES[model][1]
        row = f"| `{path.name}` | {table.share:.0%} | {table.adapter_bytes['fp32'] / 1e9:.2f} GB |".replace("%", " %")
        assert row in readme, row


def test_a_misspelt_field_is_an_error(tmp_path):
    """The check is not empty."""
    wrong = tmp_path / RECIPES[0].name
    wrong.write_text(RECIPES[0].read_text(encoding="utf-8").replace("learning_rate", "learnign_rate"))
    with pytest.raises((ValueError, SystemExit), match="learnign_rate"):
        common.parse(["--config", str(wrong), "--use_cpu"], SFTConfig, common.IsolateArguments, sft.LEARNING_RATE)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama-3.2-1b", "qwen3-0.6b"])
def test_recipes_run_on_a_tiny_stand_in(model, tmp_path):
    """SFT by each recipe of a model, then DPO after HFT, for two steps: only model, data and output are others."""
    tiny("qwen3" if "qwen3" in model else "llama", tie_word_embeddings=True, num_hidden_layers=4).save_pretrained(
        tmp_path / "model"
    )
    tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in (("sft", sft_rows()), ("dpo", dpo_rows())):
        Dataset.from_list(rows).to_json(tmp_path / f"{name}.jsonl")
    few = ["--max_steps=2", "--use_cpu", "--max_length=32"]

    def run(script, method, *flags):
        recipe = EXAMPLES / "recipes" / f"{model}-{method}.yaml"
        output = tmp_path / method
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            script.main(["--config", str(recipe), f"--output_dir={output}", *few, *flags])
        return (output / "adapter_model.safetensors").exists()

    base, data = f"--model_name_or_path={tmp_path / 'model'}", "--dataset_name={}".format
    assert run(sft, "cofitune", base, data(tmp_path / "sft.jsonl"))
    assert run(sft, "hft", base, data(tmp_path / "sft.jsonl"))
    assert run(dpo, "dpo", f"--adapter={tmp_path / 'hft'}", data(tmp_path / "dpo.jsonl"))
    assert not re.findall("ref", " ".join(path.name for path in (tmp_path / "dpo").iterdir()))
