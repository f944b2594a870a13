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

    Args:
        selection: Kind "whole", "rows" or "columns".
        like: The base parameter: gives device and dtype.
        zero: Start at zero. False draws from N(0, 0.02²), as PEFT's `init_weights=False` does for tests.

    Raises:
        RegionError: The selection goes by elements.
    """

    def __init__(self, selection: Selection, like: torch.Tensor, zero: bool = True) -> None:
        super().__init__()
        self.selection = selection
        self.support, self._index = Support.of(selection)
        start = torch.zeros(delta_shape(selection), dtype=like.dtype, device=like.device)
        self.delta = nn.Parameter(start if zero else start.normal_(std=0.02))

    @property
    def index(self) -> torch.Tensor:
        """int64 (units,) on delta's device; empty where the support is regular.

        Neither parameter nor buffer: it follows from the selection, so nothing that loads, casts, or materialises a
        model from the meta device may touch it.
        """
        device = self.delta.device
        if self._index.device != device and device.type != "meta":
            self._index = self._index.to(device)
        return self._index

    def extra_repr(self) -> str:
        return repr(self.selection)
