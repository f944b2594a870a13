"""Random states that are as they were afterwards: what measures a model must not change what is trained next."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def keeping_host_states() -> Iterator[None]:
    """Put Python's and NumPy's random states back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def keeping_torch_states(model: nn.Module) -> Iterator[None]:
    """Put torch's random state back afterwards, on the CPU and on the model's devices."""
    cpu = torch.get_rng_state()
    others = [(module, device, module.get_rng_state(*device)) for module, device in _generators(model)]
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        for module, device, state in others:
            module.set_rng_state(state, *device)


def seed_torch(model: nn.Module, seed: int) -> None:
    """Seed the CPU and the model's devices, and no other: `torch.manual_seed` would reach those, too."""
    torch.default_generator.manual_seed(seed)
    for module, device in _generators(model):
        if not device:
            module.manual_seed(seed)
            continue
        with module.device(device[0]):
            module.manual_seed(seed)


def _generators(model: nn.Module) -> Iterator[tuple[Any, list[torch.device]]]:
    """(torch.cuda or its like, the device to ask it for) of every accelerator that the model is on."""
    for device in dict.fromkeys(parameter.device for parameter in model.parameters()):
        if device.type not in ("cpu", "meta"):
            yield torch.get_device_module(device), [] if device.type == "mps" else [device]
