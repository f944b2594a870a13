"""The table of sizes in `docs/checkpoints.md`, computed from shapes alone: `python docs/sizes.py`."""

import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_isolate import HalfFTConfig, plan

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "7B": {},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 40},
}  # fmt: skip

warnings.simplefilter("ignore")
print("| | trained | adapter fp32 | adapter bf16 | base bf16 | weights, deltas, gradients, Adam | LoRA r = 16, fp32 |")
print("|---|---|---|---|---|---|---|")
for name, shape in SHAPES.items():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16)
    table = plan(model, HalfFTConfig())
    gigabytes = {key: size / 1e9 for key, size in table.adapter_bytes.items()}
    training, full = sum(table.training_bytes.values()) / 1e9, 16 * table.total / 1e9
    lora = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    low_rank = sum(p.numel() for key, p in lora.named_parameters() if "lora_" in key) * 4 / 1e9
    print(
        f"| {name} | {table.share:.0%} | {gigabytes['fp32']:.2g} GB | {gigabytes['bf16']:.2g} GB "
        f"| {table.base_bytes / 1e9:.2g} GB | {training:.0f} GB (full, fp32: {full:.0f}) | {low_rank:.2f} GB |"
    )
