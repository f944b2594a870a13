"""One delta: the trained numbers on a selection of one parameter."""

from __future__ import annotations

import torch
from torch import nn

from ..regions.selection import Selection
from .support import Support, delta_shape


class DenseDelta(nn.Module):
    """A delta on everything, on rows or on columns of a parameter: one number for each selected scalar.

    Zero at first, so that the adapted model begins as the base. Where the numbers go follows from the selection, which
    the adapter's config keeps: nothing but `delta` is saved.

    Attributes:
        delta: `nn.Parameter` of shape `delta_shape(selection)`, in the base parameter's dtype; PEFT's autocast makes
            fp32 of bf16 and fp16. (Not called `weight`: FSDP wraps any module with a trainable `weight` on its own.)
        selection: Where the delta acts.
        support: The same, as integers.
        index: int64 (units,), a buffer that is not saved; empty where the support is regular.

    Args:
        selection: Kind "whole", "rows" or "columns".
        like: The base parameter: gives device and dtype; fp32 where it is not of a floating dtype.
        zero: Start at zero. False draws from N(0, 0.02²), as PEFT's `init_weights=False` does for tests.

    Raises:
        RegionError: The selection goes by elements.
    """

    index: torch.Tensor

    def __init__(self, selection: Selection, like: torch.Tensor, zero: bool = True) -> None:
        super().__init__()
        self.selection = selection
        self.support, index = Support.of(selection)
        self.register_buffer("index", index.to(like.device), persistent=False)
        dtype = like.dtype if like.dtype.is_floating_point else torch.float32
        start = torch.zeros(delta_shape(selection), dtype=dtype, device=like.device)
        self.delta = nn.Parameter(start if zero else start.normal_(std=0.02))

    def extra_repr(self) -> str:
        return repr(self.selection)
