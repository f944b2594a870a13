"""The architectures the tests run on: `tiny(name)` makes one in milliseconds."""

from __future__ import annotations

import os

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    T5Config,
)

# The same tests run on a GPU: PEFT_ISOLATE_TEST_DEVICE=cuda.
DEVICE = os.environ.get("PEFT_ISOLATE_TEST_DEVICE", "cpu")

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CONFIGS = {
    "llama": lambda **kw: LlamaConfig(**(GROUPED | kw)),
    "mistral": lambda **kw: MistralConfig(**(GROUPED | kw)),
    "qwen2": lambda **kw: Qwen2Config(**(GROUPED | kw)),
    "qwen3": lambda **kw: Qwen3Config(**(GROUPED | {"head_dim": 8} | kw)),
    "gemma2": lambda **kw: Gemma2Config(**(GROUPED | {"head_dim": 8, "tie_word_embeddings": True} | kw)),
    "phi3": lambda **kw: Phi3Config(**(GROUPED | kw)),
    "gpt2": lambda **kw: GPT2Config(
        **(
            {
                "vocab_size": 64,
                "n_positions": 64,
                "n_embd": 32,
                "n_layer": 3,
                "n_head": 4,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
            }
            | kw
        )
    ),
    "gpt_neox": lambda **kw: GPTNeoXConfig(**(COMMON | kw)),
    "opt": lambda **kw: OPTConfig(
        **(
            {key: value for key, value in COMMON.items() if key != "intermediate_size"}
            | {"ffn_dim": 48, "word_embed_proj_dim": 32}
            | kw
        )
    ),
    "gemma3": lambda **kw: Gemma3TextConfig(**(GROUPED | {"head_dim": 8, "tie_word_embeddings": True} | kw)),
    "bert": lambda **kw: BertConfig(**(COMMON | {"tie_word_embeddings": True} | kw)),
    # As many experts as each token visits: all of them learn in a few steps.
    "mixtral": lambda **kw: MixtralConfig(**(GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 2} | kw)),
    "qwen3_moe": lambda **kw: Qwen3MoeConfig(**(GROUPED | {"head_dim": 8} | EXPERTS | kw)),
    "t5": lambda **kw: T5Config(
        **(
            {
                "vocab_size": 64,
                "d_model": 32,
                "d_kv": 8,
                "d_ff": 48,
                "num_layers": 3,
                "num_heads": 4,
                "feed_forward_proj": "gated-gelu",
                "decoder_start_token_id": 0,
            }
            | kw
        )
    ),
    "qwen2_moe": lambda **kw: Qwen2MoeConfig(**(GROUPED | EXPERTS | {"shared_expert_intermediate_size": 16} | kw)),
    "qwen3_next": lambda **kw: Qwen3NextConfig(
        **(
            GROUPED
            | {"head_dim": 8, "layer_types": ["linear_attention", "linear_attention", "full_attention"]}
            | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
            | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
            | EXPERTS
            | {"shared_expert_intermediate_size": 16}
            | kw
        )
    ),
    "mamba": lambda **kw: MambaConfig(
        **({"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 3} | kw)
    ),
    "gemma3_vision": lambda **kw: Gemma3Config(
        text_config=GROUPED | {"head_dim": 8} | kw,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
    ),
}
AUTO_CLASSES = {
    "bert": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
    "gemma3_vision": AutoModelForImageTextToText,
}
# Those that the general tests cannot run on: T5 needs decoder inputs too, Mamba has no attention, not every layer of
# Qwen3-Next has one, and the second tower of Gemma 3 sees no image; Qwen2-MoE differs from Qwen3-MoE in roles only.
MORE_ARCHITECTURES = ("t5", "qwen2_moe", "qwen3_next", "mamba", "gemma3_vision")
ARCHITECTURES = tuple(name for name in CONFIGS if name not in MORE_ARCHITECTURES)


def tiny(architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **config) -> PreTrainedModel:
    """A model of random weights; biases and norms are random too, so that a forgotten one shows."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    auto_class = AUTO_CLASSES.get(architecture, AutoModelForCausalLM)
    model = auto_class.from_config(CONFIGS[architecture](**config), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.set_rng_state(generator_state)
    return model.to(DEVICE).eval()


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """int64 tensor (batch, length) of token ids that every tiny model knows."""
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
