"""Importances for the tests: of the right shapes for a tiny model, with values that tell units apart."""

from __future__ import annotations

import functools

import torch

from peft_isolate.methods.cofitune.importance import Importance, measure_importance
from tests.models import tiny, tokens


@functools.lru_cache(maxsize=64)
def _shapes(architecture: str) -> dict[str, torch.Size]:
    batch = {"input_ids": tokens(), "labels": tokens(seed=1)}
    return {k: v.shape for k, v in measure_importance(tiny(architecture), [batch], progress=False).units.items()}


def importance(architecture: str = "llama", seed: int = 0) -> Importance:
    """Every unit at random, from 0 to 0.9."""
    generator = torch.Generator().manual_seed(seed)
    units = {key: 0.9 * torch.rand(shape, generator=generator) for key, shape in _shapes(architecture).items()}
    return Importance(units, "absolute", 1, 24)
