"""What the tests do to an adapter, whatever its method: fill it, train it, look at what it holds."""

from __future__ import annotations

import torch
from torch import nn

from peft_isolate.deltas.adapters import parameter_deltas
from tests.compare import adapter
from tests.models import tokens


@torch.no_grad()
def filled(model: nn.Module, name: str = "default", seed: int = 0) -> nn.Module:
    """The model, with random deltas in place of zeros."""
    generator = torch.Generator().manual_seed(seed)
    for delta in parameter_deltas(model, name).values():
        for numbers in delta.parameters():
            numbers.copy_(torch.randn(numbers.shape, generator=generator) * 0.05)
    return model


def learn(model: nn.Module, steps: int = 3, seed: int = 0) -> nn.Module:
    """The model after some steps of AdamW, with what leaks through gradient masks: weight decay and clipping."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        ids = tokens(seed=seed + step)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 0.5)
        optimizer.step()
    model.zero_grad()
    return model


def held(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """What earlier rounds left: {name in a saved file: numbers}."""
    return {key: numbers for key, numbers in adapter(model, name).items() if key.endswith(".held")}


def learning(model: nn.Module) -> set[str]:
    """The names of the parameters that learn."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def dense(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """{parameter of the base: its delta, zero where there is none}."""
    return {parameter: delta.dense() for parameter, delta in parameter_deltas(model, name).items()}
