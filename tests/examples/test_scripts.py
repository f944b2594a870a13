"""`examples/sft.py` and `examples/dpo.py` on local files, a tiny model and a few steps."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from examples import dpo, sft
from peft_isolate import CoFiTuneConfig, HalfFTConfig, plan
from tests.importances import importance
from tests.models import tiny, tokens
from tests.texts import chat_rows, dpo_rows, sft_rows, tokenizer

ROOT = Path(__file__).parents[2]
FEW_STEPS = ["--max_steps=3", "--logging_steps=1", "--report_to=none", "--use_cpu", "--save_strategy=no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with its tokenizer, and data in every form that the scripts read."""
    folder = tmp_path_factory.mktemp("scripts")
    tiny().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for name, rows in (("sft", sft_rows()), ("chat", chat_rows()), ("dpo", dpo_rows())):
        data = Dataset.from_list(rows)
        data.to_json(folder / f"{name}.jsonl")
        (folder / f"{name}.json").write_text(json.dumps(rows))
        data.to_parquet(folder / f"{name}.parquet")
        (folder / f"{name}-files").mkdir()
        data.select(range(16)).to_json(folder / f"{name}-files" / "train.jsonl")
        data.select(range(16, 24)).to_json(folder / f"{name}-files" / "test.jsonl")
        data.save_to_disk(folder / f"{name}-saved")
        DatasetDict({"train": data, "test": data.select(range(8))}).save_to_disk(folder / f"{name}-splits")
    Dataset.from_list(sft_rows()).to_csv(folder / "sft.csv")
    # What the mistakes below point at.
    tiny(hidden_size=48).save_pretrained(folder / "wide")
    tokenizer().save_pretrained(folder / "wide")
    (folder / "broken.jsonl").write_text('{"prompt": "half a li')
    (folder / "empty.csv").write_text("prompt,completion\n")
    (folder / "typo.yaml").write_text("fractoin: 0.4\n")
    (folder / "method.yaml").write_text("method: lora\n")
    (folder / "broken.yaml").write_text("method: [half_ft\n")
    return folder


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """What sft.py left: an adapter, and beside it the merged model."""
    run(sft, folder, "sft.jsonl", "after-sft", "--learning_rate=1e-2", "--merge")
    return folder / "after-sft"


def run(script, folder: Path, data: str, output: str, *flags: str) -> Path:
    """Call a script's main as the command line would; return its output_dir."""
    model = (
        []
        if any(flag.startswith(("--adapter", "--model")) for flag in flags)
        else [f"--model_name_or_path={folder / 'model'}"]
    )
    script.main([*model, f"--dataset_name={folder / data}", f"--output_dir={folder / output}", *FEW_STEPS, *flags])
    return folder / output


def history(text: str) -> list[dict]:
    """What a trainer printed at each step."""
    lines = [line for line in text.splitlines() if line.startswith("{'loss'")]
    return [{key: float(value) for key, value in json.loads(line.replace("'", '"')).items()} for line in lines]


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(path).eval()(input_ids=tokens()).logits


@torch.no_grad()
def adapted_logits(base: Path, adapter: Path) -> torch.Tensor:
    return (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        .eval()(input_ids=tokens())
        .logits
    )


def changed(base: Path, tuned: Path) -> set[str]:
    """The parameters in which two saved models differ."""
    old, new = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_sft_prints_its_plan_trains_the_half_and_merges(folder, capsys):
    output = run(sft, folder, "sft.jsonl", "half", "--learning_rate=1e-2", "--merge", "--region_seed=3")
    printed = capsys.readouterr().out
    planned = plan(tiny(), HalfFTConfig(seed=3))
    assert str(planned) in printed
    assert history(printed)[0]["learning_rate"] == 1e-2
    assert changed(folder / "model", output / "merged") == set(planned.region)
    assert torch.equal(adapted_logits(folder / "model", output), logits(output / "merged"))
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["seed"], config["task_type"]) == (3, "CAUSAL_LM")


@pytest.mark.parametrize(("script", "data", "rate"), [(sft, "sft.jsonl", 2e-5), (dpo, "dpo.jsonl", 1e-6)])
def test_the_default_rate_is_full_fine_tunings(script, data, rate, folder, capsys):
    run(script, folder, data, "default-rate")
    assert history(capsys.readouterr().out)[0]["learning_rate"] == pytest.approx(rate)


@pytest.mark.parametrize(
    "data", ["sft.json", "sft.parquet", "sft.csv", "sft-files", "sft-saved", "sft-splits", "chat.jsonl", "chat-splits"]
)
def test_sft_reads_local_data_in_every_form(data, folder, tmp_path, capsys):
    evaluate = ["--eval_strategy=steps", "--eval_steps=3"] if data.endswith(("-files", "-splits")) else []
    run(sft, folder, data, "forms", "--max_steps=3", *evaluate)
    printed = capsys.readouterr().out
    assert len(history(printed)) == 3
    assert ("eval_loss" in printed) == bool(evaluate)


@pytest.mark.parametrize("data", ["dpo-files", "dpo-saved"])
def test_dpo_reads_local_folders(data, folder, capsys):
    run(dpo, folder, data, "dpo-forms")
    assert len(history(capsys.readouterr().out)) == 3


def test_a_yaml_file_and_flags_that_win_over_it(folder, tmp_path, capsys):
    options = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "sft.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dtype": "bfloat16",
        "learning_rate": 3e-4,
        "method": "half_ft",
        "granularity": "layer",
        "fraction": 0.4,
        "balance": "parameters",
        "train_embeddings": False,
        "save_dtype": "bfloat16",
        "merge": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    sft.main(["--config", str(tmp_path / "run.yaml"), "--learning_rate=5e-4", "--train_embeddings=input"])
    printed = capsys.readouterr().out
    config = HalfFTConfig(granularity="layer", fraction=0.4, balance="parameters", train_embeddings="input")
    assert str(plan(tiny(dtype=torch.bfloat16), config)) in printed
    assert [step["learning_rate"] for step in history(printed)] == pytest.approx([5e-4, 2.5e-4])
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    merged = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_a_mixture_of_data_sets(folder, tmp_path, capsys):
    parts = [{"path": "json", "data_files": str(folder / f"{name}.jsonl")} for name in ("sft", "sft")]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"datasets": parts}))
    flags = [f"--model_name_or_path={folder / 'model'}", f"--output_dir={tmp_path / 'out'}", *FEW_STEPS]
    sft.main(["--config", str(tmp_path / "run.yaml"), *flags])
    assert len(history(capsys.readouterr().out)) == 3


def test_cofitune_by_options(folder, tmp_path, capsys):
    """A region by fractions and roles, damped by a file that `peft-isolate importance` could have written."""
    importance().save(tmp_path / "importance.safetensors")
    flags = ["--method=cofitune", "--layer_range=0.3,1", "--modules=up,q", "--soft_mask=gradient"]
    file = f"--importance={tmp_path / 'importance.safetensors'}"
    output = run(sft, folder, "sft.jsonl", "cofitune", *flags, file, "--learning_rate=1e-2", "--merge")
    config = CoFiTuneConfig(layer_range=(0.3, 1), modules=("up", "q"), soft_mask="gradient", importance=importance())
    assert str(plan(tiny(), config)) in capsys.readouterr().out
    assert changed(folder / "model", output / "merged") == set(plan(tiny(), config).region)
    run(dpo, folder, "dpo.jsonl", "cofitune-dpo", "--method=cofitune", "--layer_range=top", "--modules=FFN")


def test_full_fine_tuning_to_compare_with(folder, capsys):
    output = run(sft, folder, "sft.jsonl", "full", "--method=none", "--learning_rate=1e-2")
    assert f"all {sum(p.numel() for p in tiny().parameters()):,} scalars" in capsys.readouterr().out
    assert changed(folder / "model", output) == {name for name, _ in tiny().named_parameters()}


def test_dpo_trains_the_adapter_of_sft_further(folder, trained, capsys):
    """It starts from SFT's policy, and leaves one adapter on SFT's base: TRL's "ref" is not saved with it."""
    output = run(dpo, folder, "dpo.jsonl", "further", f"--adapter={trained}", "--learning_rate=1e-2", "--merge")
    printed = capsys.readouterr().out
    planned = plan(tiny(), HalfFTConfig())
    assert str(planned) in printed
    assert history(printed)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (trained, output))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert not (output / "ref").exists()
    assert torch.equal(adapted_logits(folder / "model", output), logits(output / "merged"))
    assert changed(folder / "model", output / "merged") == set(planned.region)


def test_dpo_trains_another_half_of_the_merged_model(folder, trained, capsys):
    merged = f"--model_name_or_path={trained / 'merged'}"
    output = run(dpo, folder, "dpo.jsonl", "second", merged, "--round_index=1", "--learning_rate=1e-2", "--merge")
    printed = capsys.readouterr().out
    second = plan(tiny(), HalfFTConfig(round_index=1))
    assert str(second) in printed
    assert history(printed)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert changed(trained / "merged", output / "merged") == set(second.region)
    assert set(second.region) != set(plan(tiny(), HalfFTConfig()).region)


def test_dpo_holds_what_sft_learned_and_trains_the_next_half(folder, trained, capsys):
    """One adapter of both rounds on SFT's base; what the new half does not touch keeps SFT's bits."""
    output = run(
        dpo, folder, "dpo.jsonl", "next", f"--adapter={trained}", "--next_round", "--learning_rate=1e-2", "--merge"
    )
    printed = capsys.readouterr().out
    first, second = plan(tiny(), HalfFTConfig()).region, plan(tiny(), HalfFTConfig(round_index=1)).region
    assert "never touched 14.97%" in printed
    assert history(printed)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert torch.equal(adapted_logits(folder / "model", output), logits(output / "merged"))
    assert changed(folder / "model", output / "merged") == set(first | second)
    assert changed(trained / "merged", output / "merged") == set(second)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "data", "more"),
    [(sft, "sft.jsonl", []), (dpo, "dpo.jsonl", []), (dpo, "dpo.jsonl", ["--next_round"])],
    ids=["sft", "dpo", "dpo, next round"],
)
def test_a_run_that_was_stopped_goes_on(script, data, more, folder, trained, tmp_path, capsys):
    """Stopped at step 2 of 4; DPO on a trained adapter, with its reference in the checkpoint."""
    flags = ["--max_steps=4", "--save_strategy=steps", "--save_steps=2", "--learning_rate=1e-2", *more]
    flags += [f"--adapter={trained}"] if script is dpo else []
    whole = run(script, folder, data, f"{script.__name__}-whole{len(more)}", *flags)
    output = tmp_path / "stopped"
    output.mkdir()
    os.rename(whole / "checkpoint-2", output / "checkpoint-2")
    assert get_last_checkpoint(str(output)) == str(output / "checkpoint-2")
    assert len(history(capsys.readouterr().out)) == 4
    run(script, folder, data, str(output), *flags, "--resume_from_checkpoint=true")
    assert len(history(capsys.readouterr().out)) == 2
    ended, wanted = (load_file(path / "adapter_model.safetensors") for path in (output, whole))
    assert ended.keys() == wanted.keys()
    assert all(torch.equal(ended[name], wanted[name]) for name in wanted)


MODEL = "--model_name_or_path={folder}/model"
SFT_ROWS = "--dataset_name={folder}/sft.jsonl"
DPO_ROWS = "--dataset_name={folder}/dpo.jsonl"
ADAPTER = "--adapter={folder}/after-sft"
MISTAKES = {
    "no model": (sft, [SFT_ROWS], "--model_name_or_path"),
    "no data": (sft, [MODEL], "--dataset_name"),
    "unknown flag": (sft, [MODEL, "--fractoin=0.4"], "fractoin"),
    "unknown method": (sft, ["--method=lora"], "'lora'"),
    "options of another method": (sft, ["--method=cofitune", "--fraction=0.4"], "fraction belongs to method=half_ft"),
    "bad range": (sft, [MODEL, SFT_ROWS, "--method=cofitune", "--layer_range=0.5,x"], "layer_range='0.5,x'"),
    "no importance": (sft, [MODEL, SFT_ROWS, "--method=cofitune", "--importance={folder}/nothing"], "nothing"),
    "bad fraction": (sft, [MODEL, SFT_ROWS, "--fraction=2"], "fraction=2.0"),
    "fraction no number": (sft, ["--fraction=half"], "fraction"),
    "head": (sft, ["--train_embeddings=true"], "train_embeddings"),
    "missing model": (sft, ["--model_name_or_path={folder}/nothing", SFT_ROWS], "no folder"),
    "missing data": (sft, [MODEL, "--dataset_name={folder}/nothing.jsonl"], "nothing.jsonl"),
    "damaged data": (sft, [MODEL, "--dataset_name={folder}/broken.jsonl"], "broken.jsonl"),
    "empty data": (sft, [MODEL, "--dataset_name={folder}/empty.csv"], "no data"),
    "data of another kind": (sft, [MODEL, "--dataset_name={folder}/model/config.json"], "columns"),
    "not a data file": (sft, ["--dataset_name={folder}/model/model.safetensors"], "must end in"),
    "SFT data for DPO": (dpo, [MODEL, SFT_ROWS], "chosen + rejected"),
    "no such split": (sft, [SFT_ROWS, "--dataset_train_split=trian"], "only ['train']"),
    "no test split": (sft, [SFT_ROWS, "--eval_strategy=steps", "--eval_steps=1"], "no split 'test'"),
    "adapter as model": (sft, ["--model_name_or_path={folder}/after-sft", SFT_ROWS], "is an adapter"),
    "region with an adapter": (dpo, [ADAPTER, DPO_ROWS, "--round_index=1"], "round_index"),
    "a round without an adapter": (dpo, [MODEL, DPO_ROWS, "--next_round"], "pass --adapter"),
    "missing adapter": (dpo, ["--adapter={folder}/nothing", DPO_ROWS], "nothing"),
    "adapter of another model": (dpo, [ADAPTER, DPO_ROWS, "--model_name_or_path={folder}/wide"], "layers.0"),
    "quantised": (sft, ["--load_in_4bit"], "quantised"),
    "LoRA": (sft, ["--use_peft"], "use_peft"),
    "nothing to merge": (sft, ["--method=none", "--merge"], "merge"),
    "no checkpoint": (sft, ["--resume_from_checkpoint=true"], "no checkpoint"),
    "not a checkpoint": (sft, ["--resume_from_checkpoint={folder}/model"], "is no checkpoint"),
    "missing YAML": (sft, ["--config", "{folder}/nothing.yaml"], "nothing.yaml"),
    "no YAML named": (sft, ["--config"], "--config"),
    "unknown key in YAML": (sft, ["--config", "{folder}/typo.yaml"], "fractoin"),
    "unknown method in YAML": (sft, ["--config", "{folder}/method.yaml"], "method='lora'"),
    "broken YAML": (sft, ["--config", "{folder}/broken.yaml"], "broken.yaml"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_1(name, folder, trained, tmp_path):
    script, flags, expected = MISTAKES[name]
    with pytest.raises(SystemExit) as stopped:
        script.main([f"--output_dir={tmp_path / 'out'}", *FEW_STEPS, *(flag.format(folder=folder) for flag in flags)])
    # `sys.exit` with a text prints it to stderr and exits with 1.
    assert isinstance(stopped.value.code, str)
    assert "\n" not in stopped.value.code
    assert expected in stopped.value.code
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def start(script: str, folder: Path, cwd: Path) -> subprocess.CompletedProcess:
    """Start a script as a user does, from another folder, with the data for SFT."""
    environment = os.environ | {"HF_DATASETS_CACHE": str(cwd), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    flags = [f"--model_name_or_path={folder / 'model'}", f"--dataset_name={folder / 'sft.jsonl'}", "--output_dir=out"]
    command = [sys.executable, str(ROOT / "examples" / script), *flags, *FEW_STEPS]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_as_commands_from_another_folder(folder, tmp_path):
    done = start("sft.py", folder, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "saved to out" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    failed = start("dpo.py", folder, tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: the data has the columns")
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_the_commands_of_the_readme(folder, tmp_path):
    """Each block but the first, which names models and data of the Hub, for a few steps."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "examples" / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 13
    assert blocks[0].startswith("export MODEL=")
    # accelerate has no DeepSpeed without a GPU; tests/training/test_zero3.py runs it in another way.
    here = [block for block in blocks[1:] if "deepspeed_zero3.yaml" not in block]
    assert len(here) == len(blocks) - 2
    ends = "\n# the end of a block\n"
    commands = ends.join(here)
    # The last of two equal flags wins.
    few = "--max_steps 4 --save_steps 2 --report_to none --use_cpu"
    launch = f'"{sys.executable}" -m accelerate.commands.launch --config_file {ROOT}/'
    commands = commands.replace("accelerate launch --config_file ", launch)
    commands = commands.replace("yaml examples/", f"yaml {ROOT}/examples/")
    commands = commands.replace("python examples/", f'"{sys.executable}" {ROOT}/examples/')
    commands = commands.replace("cofitune_search.py", "cofitune_search.py --steps 2 --final-steps 2")
    commands = commands.replace("core_isolation.py", "core_isolation.py --steps 2 --rows 4 --percent 0.1")
    commands = commands.replace("isolation_forgetting.py", "isolation_forgetting.py --steps 12 --seeds 1 --rows 4")
    commands = commands.replace("python -c", f'"{sys.executable}" -c')
    commands = commands.replace("peft-isolate ", f'"{sys.executable}" -m peft_isolate.cli ')
    commands = commands.replace(" task.jsonl", f" {folder}/sft.jsonl")
    scripts = r"^((?:.*\\\n)*.*examples/(?:sft|dpo)(?:.*\\\n)*.*)$"
    commands = re.sub(scripts, rf"\1 {few}", commands, flags=re.MULTILINE)
    assert commands.count(few) == 10
    environment = os.environ | {
        "MODEL": str(folder / "model"),
        "SFT_DATA": str(folder / "chat.jsonl"),
        "DPO_DATA": str(folder / "dpo.jsonl"),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    for command in commands.split(ends):
        # Each on its own: what hangs has a name, and takes a few minutes from the rest at most.
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail\n{command}"], cwd=tmp_path, env=environment, capture_output=True,
            text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    saved = {path.parent.name for path in (tmp_path / "outputs").glob("*/adapter_model.safetensors")}
    assert saved == {
        "sft", "dpo", "dpo-further", "layers", "cofitune-sft", "first", "second", "ddp", "fsdp2",
    }  # fmt: skip
    assert (tmp_path / "outputs" / "cofitune" / "tree.png").exists()
    assert (tmp_path / "outputs" / "isolation" / "final" / "adapter_model.safetensors").exists()
    assert (tmp_path / "outputs" / "isolation-forgetting" / "results.csv").read_text().count("\n") == 1 + 6
