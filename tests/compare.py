"""What the tests compare: adapters, bases and logits, bit by bit."""

from __future__ import annotations

import torch
from torch import nn

from tests.models import tokens


def adapter(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """The parameters of an adapter, under their names in a saved file."""
    return {
        key.replace(f".{name}.", "."): p.detach().clone() for key, p in model.named_parameters() if f".{name}." in key
    }


def base(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of the base inside a PeftModel, under their own names."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): p.detach().clone()
        for name, p in model.named_parameters()
        if ".default." not in name and ".ref." not in name
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits as integers, a copy: unlike ==, these tell -0.0 from 0.0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(integers)


def assert_same(found: dict, wanted: dict) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        assert torch.equal(bits(found[name]), bits(wanted[name])), name


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """On fixed tokens: (2, 12, 64)."""
    decoder = {"decoder_input_ids": tokens(seed=1)} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=tokens(), **decoder).logits
