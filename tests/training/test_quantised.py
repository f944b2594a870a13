"""Quantised and offloaded bases from one end to the other: TRL trains, the adapter is saved, loaded and merged.

bitsandbytes and torchao stand beside the environment: `make test-slow` installs them and runs this.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from trl import SFTConfig, SFTTrainer

from peft_isolate import HalfFTConfig, merge
from peft_isolate.deltas import DeltaLayer
from peft_isolate.errors import BaseMismatchError, IsolateError
from peft_isolate.regions.region import base_parameters, is_plain
from tests.compare import logits
from tests.given import GivenConfig
from tests.models import DEVICE, tiny, tokens
from tests.texts import sft_rows, tokenizer

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the quantised models here are made on the CPU")

QUANTISED = ("4bit", "8bit", "int8", "int4")
# Blocks of 64 are what bitsandbytes quantises.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The plain bases, saved: quantising is a way of loading."""
    path = tmp_path_factory.mktemp("bases")
    for seed, name in enumerate(("base", "another")):
        tiny(seed=seed, **WIDE).save_pretrained(path / name)
        tokenizer().save_pretrained(path / name)
    return path


def quantised(path: Path, kind: str):
    """The base at `path`, quantised while it is loaded."""
    if kind in ("4bit", "8bit"):
        pytest.importorskip("bitsandbytes")
        config = BitsAndBytesConfig(**{f"load_in_{kind}": True}, bnb_4bit_compute_dtype=torch.float32)
    else:
        torchao = pytest.importorskip("torchao.quantization")
        int4 = lambda: torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(32))  # noqa: E731
        config = TorchAoConfig(torchao.Int8WeightOnlyConfig() if kind == "int8" else int4())
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    for module in model.modules():
        # On some processors bitsandbytes repacks its weights for inference, and back, with other numbers.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def offloaded(path: Path, where: str, offload: Path):
    """The base at `path` with its layers on the CPU, brought from there, or from the disk."""
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(path).named_modules()]
    layers = [name for name in names if name.startswith("model.layers.") and name.count(".") == 2]
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= dict.fromkeys(layers, where)
    return AutoModelForCausalLM.from_pretrained(path, device_map=places, offload_folder=offload, dtype=torch.float32)


def train(model, config, output: Path) -> torch.nn.Module:
    """Some steps in TRL's trainer, saved as it saves: the adapted model."""
    args = SFTConfig(
        output_dir=str(output), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, max_length=48,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(sft_rows(16)), processing_class=tokenizer(),
        peft_config=config,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    return trainer.accelerator.unwrap_model(trainer.model)


def train_by_hand(model, config, output: Path) -> torch.nn.Module:
    """As `train`, without a trainer: transformers' trains nothing on torchao's 4 bits."""
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(output)
    return model


CONFIGS = {
    "hft": lambda: HalfFTConfig(seed=1),
    "elements": lambda: GivenConfig(kind="elements", share=0.05),
    "all_but": lambda: GivenConfig(kind="all_but"),
}


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("what", CONFIGS)
def test_trained_on_a_quantised_base_and_merged_into_the_plain_one(folder, tmp_path, kind, what):
    """Saved, loaded onto the same quantised base, refused by a merge into it, merged into the base it came from."""
    by = train_by_hand if kind == "int4" else train
    model = by(quantised(folder / "base", kind), CONFIGS[what](), tmp_path / "adapter")
    assert "side" in {layer.path for layer in model.modules() if isinstance(layer, DeltaLayer)}
    trained = logits(model)
    numbers = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not [name for name in numbers if "base_layer" in name]

    again = PeftModel.from_pretrained(quantised(folder / "base", kind), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), trained, rtol=1e-4, atol=1e-4)
    for call in (again.merge_adapter, again.merge_and_unload):
        with pytest.raises(
            IsolateError, match=r"is quantised.*load the base in its own dtype on one device and merge"
        ):
            call()

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), tmp_path / "adapter")
    assert {layer.path for layer in plain.modules() if isinstance(layer, DeltaLayer)} == {"compose"}
    adapted = logits(plain)
    assert not torch.equal(adapted, logits(tiny(**WIDE)))
    assert torch.equal(logits(plain.merge_and_unload()), adapted)
    merge(str(folder / "base"), str(tmp_path / "adapter"), out=str(tmp_path / "merged"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), adapted)


@pytest.mark.parametrize("kind", QUANTISED)
def test_what_is_compared_of_a_quantised_base(folder, tmp_path, kind):
    """Of an adapter made there the fingerprint has the tensors that are not quantised, and compares those: another
    base is refused by them, quantised or not; a warning says so where they are fewer than half.
    """
    (train_by_hand if kind == "int4" else train)(quantised(folder / "base", kind), HalfFTConfig(), tmp_path)
    other = {"4bit": "8bit", "8bit": "4bit"}.get(kind, kind)
    for load in (lambda path: quantised(path, other), AutoModelForCausalLM.from_pretrained):
        with pytest.warns(UserWarning, match=r"only 7 of 21 tensors .*not fully checked"):
            PeftModel.from_pretrained(load(folder / "base"), tmp_path)
        with pytest.raises(BaseMismatchError, match="is another base"):
            PeftModel.from_pretrained(load(folder / "another"), tmp_path)
    model = quantised(folder / "base", kind)
    modules = dict(model.named_modules())
    compared = [n for n, p in base_parameters(model).items() if is_plain(p, modules[n.rpartition(".")[0]])]
    assert len(compared) == 7
    assert all("norm" in name or name in ("model.embed_tokens.weight", "lm_head.weight") for name in compared)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_base_spread_by_a_device_map(folder, tmp_path, where, monkeypatch):
    """With all of it in memory it composes and merges; with layers on the disk it trains by the side path, and a merge
    is refused. Both save the same adapter, which merges into the base in one piece.
    """
    monkeypatch.chdir(tmp_path)  # PEFT writes part of an offloaded base under the current folder
    model = offloaded(folder / "base", where, tmp_path / "offload")
    model = train(model, HalfFTConfig(seed=1), tmp_path / "adapter")
    paths = {layer.path for layer in model.modules() if isinstance(layer, DeltaLayer)}
    assert paths == ({"compose"} if where == "cpu" else {"side", "compose"})
    trained = logits(model)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(plain), trained, rtol=1e-4, atol=1e-5)
    again, options = offloaded(folder / "base", where, tmp_path / "offload"), {}
    if where == "disk":
        # PEFT lays such a model out anew, by default in memory alone, and fails on what is not there (LoRA's, too).
        places = {f"base_model.model.{name}": place for name, place in again.hf_device_map.items()}
        options = {"device_map": places, "offload_dir": str(tmp_path / "offload-again")}
    again = PeftModel.from_pretrained(again, tmp_path / "adapter", **options)
    torch.testing.assert_close(logits(again), trained, rtol=1e-5, atol=1e-6)
    if where == "disk":
        with pytest.raises(IsolateError, match=r"offloaded .*on one device and merge there"):
            model.merge_and_unload()
    else:
        assert torch.equal(logits(model.merge_and_unload()), trained)


def test_device_map_auto_on_one_device(folder, tmp_path):
    """What fits is no other model than one loaded plainly."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", device_map="auto", dtype=torch.float32)
    model = train(model, HalfFTConfig(), tmp_path)
    assert {layer.path for layer in model.modules() if isinstance(layer, DeltaLayer)} == {"compose"}
    adapted = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), adapted)
