"""`SFTTrainer(peft_config=HalfFTConfig())`: it learns, it keeps its promises, and it stops and goes on."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_isolate import HalfFTConfig, plan
from tests.compare import adapter, assert_same, base, bits, logits
from tests.models import tiny, tokens
from tests.texts import sft_rows, tokenizer

LLAMA_AND_FUSED = ("llama", "gpt2", "phi3")
DTYPES = (torch.float32, torch.bfloat16)


def trained(model: nn.Module, options: dict, config=None, resume: str | None = None, **changes) -> SFTTrainer:
    """A trainer after its run; without `config`, HFT's defaults."""
    changes = {"bf16": model.dtype == torch.bfloat16} | changes
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**(options | changes)),
        train_dataset=Dataset.from_list(sft_rows()),
        eval_dataset=Dataset.from_list(sft_rows(8, seed=1)),
        processing_class=tokenizer(),
        peft_config=HalfFTConfig() if config is None else config,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("architecture", LLAMA_AND_FUSED)
def test_the_loss_falls(architecture, options):
    trainer = trained(tiny(architecture), options, max_steps=30, learning_rate=2e-2)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 30
    assert sum(losses[-5:]) / 5 < losses[0] - 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(architecture, dtype, options):
    """From the middle of the first epoch into the second, shuffled; GPT-2 with its dropout."""
    run = {"max_steps": 16, "save_strategy": "steps", "save_steps": 7, "weight_decay": 0.1}
    whole = trained(tiny(architecture, dtype), options, **run)
    first = options["output_dir"]
    again = options | {"output_dir": f"{first}-again"}
    resumed = trained(tiny(architecture, dtype), again, resume=f"{first}/checkpoint-7", **run)

    assert not os.path.exists(f"{first}-again/checkpoint-7")
    assert_same(adapter(resumed.model), adapter(whole.model))
    assert any(tensor.any() for tensor in adapter(whole.model).values())
    states = [torch.load(f"{folder}/checkpoint-16/optimizer.pt") for folder in (first, f"{first}-again")]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for index, state in states[0]["state"].items():
        assert_same(states[1]["state"][index], state)
    at_seven = load_file(f"{first}/checkpoint-7/adapter_model.safetensors")
    at_end = load_file(f"{first}/checkpoint-16/adapter_model.safetensors")
    assert not any(torch.equal(at_seven[name], at_end[name]) for name in at_end)


@pytest.mark.parametrize(
    ("architecture", "optim"),
    [("llama", "adamw_torch"), ("gpt2", "adamw_torch"), ("phi3", "adamw_torch"), ("llama", "adafactor")],
)
def test_nothing_outside_the_region_changes_by_a_bit(architecture, optim, options):
    """Weight decay, clipping, accumulation, a bf16 base: the places where gradient masks leak."""
    untouched = {name: p.detach().clone() for name, p in tiny(architecture, torch.bfloat16).named_parameters()}
    region = plan(tiny(architecture, torch.bfloat16), HalfFTConfig()).region
    trainer = trained(
        tiny(architecture, torch.bfloat16), options, max_steps=30, weight_decay=0.1, max_grad_norm=0.5,
        gradient_accumulation_steps=2, per_device_train_batch_size=2, optim=optim,
    )  # fmt: skip

    assert_same(base(trainer.model), untouched)
    deltas = adapter(trainer.model)
    assert sum(delta.numel() for delta in deltas.values()) == region.count
    for name, delta in deltas.items():
        assert delta.dtype == torch.float32, name
        assert delta.ne(0).all(), name

    merged = dict(trainer.model.merge_and_unload().named_parameters())
    assert merged.keys() == untouched.keys()
    for name, weight in merged.items():
        same = bits(weight.detach()) == bits(untouched[name])
        if name in region:
            mask = region[name].mask()
            assert same[~mask].all(), name
            assert not same[mask].all(), name
        else:
            assert same.all(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", LLAMA_AND_FUSED)
def test_merged_and_reloaded_models_give_the_same_logits(architecture, dtype, options, tmp_path):
    model = tiny(architecture, dtype)
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    before = logits(model)
    trainer = trained(model, options)
    trainer.save_model()
    saved = options["output_dir"]
    adapted = logits(trainer.model)
    assert not torch.equal(adapted, before)

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, saved)), adapted)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(saved, dtype=dtype)), adapted)
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), before)

    merged = trainer.model.merge_and_unload()
    assert torch.equal(logits(merged), adapted)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)), adapted)


@pytest.mark.parametrize("train_embeddings", [False, "input"])
@pytest.mark.parametrize(("save_dtype", "size"), [(None, 4), ("bfloat16", 2)])
def test_the_adapter_file_holds_the_region_and_nothing_else(save_dtype, size, train_embeddings, options):
    config = HalfFTConfig(save_dtype=save_dtype, train_embeddings=train_embeddings)
    count = plan(tiny(dtype=torch.bfloat16), config).trained
    trained(tiny(dtype=torch.bfloat16), options, config).save_model()
    path = f"{options['output_dir']}/adapter_model.safetensors"
    saved = load_file(path)
    assert sum(tensor.numel() for tensor in saved.values()) == count
    assert all("halfft_" in name and "base_layer" not in name for name in saved)
    assert {tensor.element_size() for tensor in saved.values()} == {size}
    # The rest is the header, which names the tensors.
    assert size * count < os.path.getsize(path) < size * count + 300 * len(saved)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradient_checkpointing_trains_the_same_bits(architecture, use_reentrant, options):
    plain = trained(tiny(architecture), options)
    recomputed = trained(
        tiny(architecture),
        options,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    assert recomputed.model.get_base_model().is_gradient_checkpointing
    assert_same(adapter(recomputed.model), adapter(plain.model))


def test_the_head_gets_our_warning_before_trls_error(options):
    with (
        pytest.warns(UserWarning, match=r"train_embeddings='input'.*plain Trainer"),
        pytest.raises(ValueError, match="lm_head"),
    ):
        trained(tiny(), options, HalfFTConfig(train_embeddings=True))


def test_the_input_embeddings_train_in_sft_trainer(options):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*train_embeddings.*")
        trainer = trained(tiny(), options, HalfFTConfig(train_embeddings="input"))
    embedding = next(delta for name, delta in adapter(trainer.model).items() if "embed_tokens" in name)
    seen = torch.zeros(64, dtype=torch.bool)
    for row in trainer.train_dataset:
        seen[row["input_ids"][:-1]] = True  # nothing is predicted from the last token
    assert embedding[seen].any(dim=1).all()
    assert not embedding[~seen].any()


def test_the_head_trains_in_the_plain_trainer(options):
    with pytest.warns(UserWarning, match="plain Trainer"):
        model = get_peft_model(tiny(), HalfFTConfig(train_embeddings=True))
    untouched = base(model)
    names = ("output_dir", "max_steps", "learning_rate", "save_strategy", "report_to", "use_cpu", "disable_tqdm")
    rows = [{"input_ids": row, "labels": row} for row in tokens(16)]
    Trainer(model, TrainingArguments(**{name: options[name] for name in names}), train_dataset=rows).train()
    deltas = adapter(model)
    for part in ("lm_head", "embed_tokens"):
        assert next(delta for name, delta in deltas.items() if part in name).any()
    assert_same(base(model), untouched)


def test_the_best_checkpoint_comes_back(options):
    """ "Best" by the highest loss, so that the best is not the last."""
    trainer = trained(
        tiny(), options, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    best, last = (f"{options['output_dir']}/checkpoint-{step}" for step in (4, 8))
    assert os.path.samefile(trainer.state.best_model_checkpoint, best)
    loaded = adapter(trainer.model)
    assert_same(loaded, load_file(f"{best}/adapter_model.safetensors"))
    ended = load_file(f"{last}/adapter_model.safetensors")
    assert not any(torch.equal(loaded[name], ended[name]) for name in ended)


@pytest.mark.parametrize("config_cls", [HalfFTConfig, LoraConfig])
def test_modules_to_save_work_as_with_lora(config_cls, options, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "base")
    head = model.lm_head.weight.detach().clone()
    trainer = trained(model, options, config_cls(modules_to_save=["lm_head"]))
    wrapper = trainer.model.get_base_model().lm_head
    assert torch.equal(wrapper.original_module.weight, head)
    assert not torch.equal(wrapper.modules_to_save["default"].weight, head)
    trainer.save_model()
    assert any("lm_head" in name for name in load_file(f"{options['output_dir']}/adapter_model.safetensors"))
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, options["output_dir"])), logits(trainer.model))


@pytest.mark.parametrize("config_cls", [HalfFTConfig, LoraConfig])
def test_new_tokens_train_as_with_lora(config_cls, options, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "base")
    embeddings = model.model.embed_tokens.weight.detach().clone()
    rows = tokenizer().convert_tokens_to_ids(["t", "u"])
    trainer = trained(model, options, config_cls(trainable_token_indices={"embed_tokens": rows}))
    wrapper = trainer.model.get_base_model().model.embed_tokens
    assert torch.equal(wrapper.original_module.weight, embeddings)
    changed = (wrapper.token_adapter.get_merged_weights(["default"]) != embeddings).any(dim=1)
    assert changed.nonzero().flatten().tolist() == sorted(rows)
    trainer.save_model()
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, options["output_dir"])), logits(trainer.model))
