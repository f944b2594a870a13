"""Folders that the tests of checkpoints work on: base models, adapters, and what lies in them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_isolate import HalfFTConfig
from tests.learn import filled
from tests.models import AUTO_CLASSES, tiny


def saved(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32, **config) -> Path:
    """A base model's folder."""
    shard = config.pop("max_shard_size", "5GB")
    tiny(architecture, dtype, **config).save_pretrained(folder, max_shard_size=shard)
    return folder


def load(folder: Path, architecture: str = "llama") -> torch.nn.Module:
    """The model of a folder, in the dtype of its files."""
    auto_class = AUTO_CLASSES.get(architecture, AutoModelForCausalLM)
    return auto_class.from_pretrained(folder, dtype="auto").requires_grad_(False)


def trained(base: Path, config, out: Path, architecture: str = "llama", seed: int = 0) -> Path:
    """An adapter of random numbers, saved."""
    filled(get_peft_model(load(base, architecture), config), seed=seed).save_pretrained(out)
    return out


def with_tokens(base: Path, out: Path, **config) -> Path:
    """An adapter of random numbers that has two rows of the embedding too, and whatever else is saved whole."""
    model = filled(get_peft_model(load(base), HalfFTConfig(trainable_token_indices=[3, 5], **config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name or "modules_to_save" in name:
                parameter.add_(1.0)
    model.save_pretrained(out, save_embedding_layers=False)
    return out


def files(folder: Path) -> dict[str, str]:
    """{file: digest} of a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
