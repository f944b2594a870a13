"""Fine-tunings that the tests extract, and what an extracted adapter must be."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from peft_isolate.checkpoints.merge import merge
from peft_isolate.deltas.adapters import regions_of
from peft_isolate.regions import Region, base_parameters
from tests.checkpoints.folders import load
from tests.compare import assert_same, logits
from tests.models import tiny

# Of these a module has parameters of its own beside modules inside it.
NESTED = ("qwen3_next", "mamba", "gemma3_vision")
UP = "model.layers.1.mlp.up_proj.weight"


@torch.no_grad()
def tuned(folder: Path, change, architecture: str = "llama", dtype: torch.dtype = torch.float32, **config) -> Path:
    """The base of `saved` after `change({name: parameter})`."""
    shard = config.pop("max_shard_size", "5GB")
    model = tiny(architecture, dtype, **config)
    change(dict(base_parameters(model)))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def everything(parameters: dict[str, torch.Tensor]) -> None:
    """All of it moves, by amounts that differ."""
    generator = torch.Generator().manual_seed(1)
    for i, parameter in enumerate(parameters.values()):
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 10.0 ** -(i % 3))


def of_layers(parameters: dict[str, torch.Tensor]) -> None:
    everything({name: p for name, p in parameters.items() if ".layers." in name or ".h." in name or ".layer." in name})


def region_of(base: Path, adapter: Path, architecture: str = "llama") -> Region:
    return regions_of(PeftModel.from_pretrained(load(base, architecture), adapter), "default")[0]


def in_memory(folder: Path, architecture: str = "llama") -> dict[str, torch.Tensor]:
    """Its parameters under their names in memory, tied ones once."""
    return dict(base_parameters(load(folder, architecture)))


def assert_merges(base: Path, adapter: Path, out: Path, architecture: str = "llama") -> None:
    """In memory and in files to the same bits, loaded as any adapter."""
    merge(base, adapter, out=out)
    model = PeftModel.from_pretrained(load(base, architecture), adapter)
    before = logits(model)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), before)
    assert_same(in_memory(out, architecture), dict(base_parameters(merged)))


def by_hand(base: nn.Module, other: nn.Module) -> dict[str, torch.Tensor]:
    """Δ by its definition, in float64."""
    before, after = base_parameters(base), base_parameters(other)
    return {name: (after[name].detach().double() - before[name].detach().double()) for name in before}


def lora(architecture: str = "llama", **fields) -> LoraConfig:
    """Of random numbers, on one matrix a layer."""
    matrix = {"gpt2": "c_fc", "mixtral": "q_proj"}.get(architecture, "up_proj")
    return LoraConfig(**({"r": 4, "target_modules": [matrix], "init_lora_weights": False} | fields))
