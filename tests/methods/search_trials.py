"""Trainings and scorers that another process can import: a search sends them to its workers by name."""

from __future__ import annotations

import math
import os
import random
import time

import numpy as np
import torch
from peft import get_peft_model

from peft_isolate import CoFiTuneConfig
from peft_isolate.methods.cofitune.coarse import as_fractions
from tests.learn import learn
from tests.models import tiny, tokens


def train(config: CoFiTuneConfig) -> CoFiTuneConfig:
    """No training: the score is a function of the config."""
    return config


def score(config: CoFiTuneConfig) -> dict[str, float]:
    """Highest for FFN in (0.25, 0.5], where the paper found it; no two trials of the paper's tree are equal."""
    start, stop = as_fractions(config.layer_range)
    near = 1 - (start - 0.25) ** 2 - 1.1 * (stop - 0.5) ** 2
    return {
        "speciality": near + 0.1 * ("up" in config.modules) + 0.01 * len(config.modules),
        "versatility": 0.5 + 0.1 * ("down" in config.modules),
        "perplexity": 7,
    }


def score_by_chance(config: CoFiTuneConfig) -> dict[str, float]:
    """A trial that draws from every global generator without seeding it, as many a training loop does."""
    return {"speciality": torch.rand(()), "versatility": np.random.rand() + random.random()}


def train_by_chance(config: CoFiTuneConfig) -> CoFiTuneConfig:
    """Draws from every global generator, and lets other threads draw meanwhile."""
    torch.rand(()), np.random.rand(), random.random()
    time.sleep(0.02)
    return config


def fail_on_mha(config: CoFiTuneConfig) -> CoFiTuneConfig:
    if "q" in config.modules:
        raise RuntimeError("no memory for MHA")
    return config


def fail_on_up(config: CoFiTuneConfig) -> CoFiTuneConfig:
    if config.modules == ("up",):
        raise RuntimeError("no memory for up")
    return config


def fail(config: CoFiTuneConfig) -> CoFiTuneConfig:
    raise RuntimeError(f"cannot train {config.modules}")


def die_in_the_middle(config: CoFiTuneConfig) -> CoFiTuneConfig:
    """Takes its process along, as a crashing kernel or the system's memory killer does."""
    if as_fractions(config.layer_range) == (0.25, 0.75):
        os._exit(9)
    return config


def slow_train(config: CoFiTuneConfig) -> CoFiTuneConfig:
    time.sleep(0.15)
    return config


def train_tiny(config: CoFiTuneConfig) -> torch.nn.Module:
    """A few real steps on a tiny Llama of 8 layers."""
    return learn(get_peft_model(tiny(num_hidden_layers=8), config), steps=2)


@torch.no_grad()
def score_tiny(model: torch.nn.Module) -> dict[str, float]:
    """Likelihood of a token: on what was trained on, and on other text."""
    new, old = tokens(seed=1), tokens(seed=9)
    return {
        "speciality": math.exp(-model(input_ids=new, labels=new).loss),
        "versatility": math.exp(-model(input_ids=old, labels=old).loss),
    }
