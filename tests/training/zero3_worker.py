"""DeepSpeed ZeRO-3 in two processes on CPU (gloo): jobs for `distributed_worker.pair`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.training import distributed_worker

STEPS, BATCH = distributed_worker.STEPS, distributed_worker.BATCH


def turn_to_deepspeed() -> Any:
    """What accelerate does by itself on accelerators only, never on CPU: have a backend beside DeepSpeed."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    return patch.object(PartialState, "_prepare_backend", lambda *_, **__: ("gloo", DistributedType.MULTI_CPU))


def arguments(folder: Path, gathers: bool = True, **more: Any):
    """Arguments of a trainer under ZeRO-3; with them, transformers' `from_pretrained` shards what it loads.

    Args:
        folder: Where the trainer writes.
        gathers: `stage3_gather_16bit_weights_on_model_save`.
        more: Of `SFTConfig`.
    """
    import transformers.training_args
    from datasets import disable_progress_bars
    from trl import SFTConfig

    # transformers has bf16 with DeepSpeed on GPUs alone.
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    disable_progress_bars()
    distributed_worker.reset()
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "stage3_gather_16bit_weights_on_model_save": gathers,
            "stage3_param_persistence_threshold": 0,  # or tensors as small as these are never sharded
        },
        "zero_force_ds_cpu_optimizer": False,
    }
    defaults = {"bf16": False, "save_strategy": "steps", "save_steps": 2, "learning_rate": 5e-3}
    return SFTConfig(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH // 2, weight_decay=0.1,
        max_length=48, logging_steps=1, report_to="none", gradient_checkpointing=False, max_grad_norm=0.3,
        disable_tqdm=True, dataloader_pin_memory=False, deepspeed=config, **(defaults | more),
    )  # fmt: skip


def load(base: str, dtype: str = "float32"):
    """The base, sharded from the start."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    assert all(hasattr(parameter, "ds_id") and not parameter.numel() for parameter in model.parameters())
    return model


def trainer_of(folder: Path, model: Any, what: str | None, **more: Any):
    """A trainer; `what` is "hft", a kind of `GivenConfig`, or None for a model that has its adapter."""
    from datasets import Dataset
    from trl import SFTTrainer

    from peft_isolate import HalfFTConfig
    from tests.given import GivenConfig
    from tests.texts import sft_rows, tokenizer

    config = None
    if what is not None:
        config = HalfFTConfig() if what == "hft" else GivenConfig(kind=what)
    return SFTTrainer(
        model=model, args=more.pop("args", None) or arguments(folder, **more),
        train_dataset=Dataset.from_list(sft_rows(16)), processing_class=tokenizer(), peft_config=config,
    )  # fmt: skip


def sft(folder: Path, what: str, base: str | None = None, resume: str | None = None, **more: Any) -> dict[str, Any]:
    """`SFTTrainer(peft_config=…)` under ZeRO-3, saved by the trainer to `folder`.

    Args:
        folder: Where to.
        what: "hft", "hft_round" (wrapped before, with held numbers), or a kind of `GivenConfig`.
        base: A folder, to load the base sharded; None makes it whole, and DeepSpeed shards what is wrapped already.
        resume: A checkpoint to go on from, relative to `folder`.
        more: Of `arguments`.

    Returns:
        `losses`; `paths` of the layers in training; `sharded`: whether all parameters were, then; `dtypes` of the
        numbers that learn.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from peft_isolate.deltas import DeltaLayer
    from tests.models import tiny

    unset_hf_deepspeed_config()  # that of the job before
    with turn_to_deepspeed():
        if base is not None:
            args = arguments(folder, **more)
            trainer = trainer_of(folder, load(base, "bfloat16" if more.get("bf16") else "float32"), what, args=args)
        else:
            wrapped = what.endswith("_round")
            model = distributed_worker.build(what) if wrapped else tiny()
            trainer = trainer_of(folder, model, None if wrapped else what, **more)
        paths: dict[str, str] = {}
        for name, module in trainer.model.named_modules():
            if isinstance(module, DeltaLayer):
                module.register_forward_hook(lambda layer, *_, name=name: paths.update({name: layer.path}))
        trainer.train(resume_from_checkpoint=resume and str(folder / resume))
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()
    parameters = list(trainer.model.parameters())
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "paths": paths,
        "sharded": all(not parameter.numel() for parameter in parameters),
        "dtypes": {str(parameter.dtype) for parameter in parameters if parameter.requires_grad},
    }


def on_a_sharded_base(folder: Path, base: str, another: str, adapter: str) -> dict[str, Any]:
    """A finished adapter and sharded bases.

    Returns:
        `logits` of the adapter loaded onto its base; `fingerprint` of that base, taken anew; and of loading it onto
        another base, and of what cannot be done on a sharded one: the exceptions.
    """
    import torch
    from peft import PeftModel
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from peft_isolate import HalfFTConfig, half_reset, next_round
    from peft_isolate.deltas.base import fingerprint_of
    from tests.models import tokens

    unset_hf_deepspeed_config()
    with turn_to_deepspeed():
        args = arguments(folder, learning_rate=0.0, save_strategy="no")
        model = PeftModel.from_pretrained(load(base), adapter, is_trainable=True)
        fingerprint = fingerprint_of(load(base), HalfFTConfig())
        trainer = trainer_of(folder, model, None, args=args)
        trainer.train()
        trainer.model_wrapped.eval()
        with torch.no_grad():
            found: dict[str, Any] = {"logits": trainer.model_wrapped(input_ids=tokens()).logits}
        found["fingerprint"] = fingerprint
        calls = {
            "another": lambda: PeftModel.from_pretrained(load(another), adapter),
            "merge_adapter": model.merge_adapter,
            "merge_and_unload": model.merge_and_unload,
            "next_round": lambda: next_round(model),
            "half_reset": lambda: half_reset(model),
        }
        for name, call in calls.items():
            try:
                found[name] = call()
            except Exception as error:
                found[name] = error.with_traceback(None)
        torch.distributed.barrier()
    return found


if __name__ == "__main__":
    # DeepSpeed finds out what it runs on when it is imported. accelerate knows no DeepSpeed on what it calls a CPU.
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    del os.environ["ACCELERATE_USE_CPU"]
    distributed_worker.main(Path(sys.argv[1]), globals())
