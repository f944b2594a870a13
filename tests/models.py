"""The architectures the tests run on: `tiny(name)` makes one in milliseconds."""

from __future__ import annotations

import os

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
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
}
ARCHITECTURES = tuple(CONFIGS)


def tiny(architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **config) -> PreTrainedModel:
    """A model of random weights; biases and norms are random too, so that a forgotten one shows."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture](**config), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.set_rng_state(generator_state)
    return model.to(DEVICE).eval()


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """int64 tensor (batch, length) of token ids that every tiny model knows."""
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
