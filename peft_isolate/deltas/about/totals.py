"""How much learns, how much an adapter will take, and what training holds: the counts, and the lines that say them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from ...regions.region import base_bytes, shapes_of
from ..adapters import layers_of, regions_of
from .text import size_text


@dataclass(frozen=True)
class Totals:
    """The counts of an adapter on its base.

    Attributes:
        trained: Scalars that learn.
        held: Scalars that earlier rounds left, and that stay.
        total: Scalars of the base model, tied tensors once.
        base_bytes: Bytes of the base model in its own dtypes.
    """

    trained: int
    held: int
    total: int
    base_bytes: int

    @property
    def share(self) -> float:
        """Trained scalars as a share of the base model's."""
        return self.trained / self.total

    @property
    def untouched(self) -> float:
        """Share of the base model's scalars that neither this round nor an earlier one touches."""
        return 1 - (self.trained + self.held) / self.total

    @property
    def adapter_bytes(self) -> dict[str, int]:
        """Bytes of the saved numbers: {"fp32": …, "bf16": …, "int8": …}, without positions and file headers."""
        saved = self.trained + self.held
        return {dtype: size * saved for dtype, size in (("fp32", 4), ("bf16", 2), ("int8", 1))}

    @property
    def training_bytes(self) -> dict[str, int]:
        """Bytes that training holds beside the activations: weights, and fp32 deltas, gradients and Adam's moments."""
        return {
            "weights": self.base_bytes,
            "deltas": 4 * (self.trained + self.held),
            "gradients": 4 * self.trained,
            "adam": 8 * self.trained,
        }

    def lines(self) -> list[str]:
        """For people."""
        memory = self.training_bytes
        return [
            f"trained   {self.trained:,} of {self.total:,} scalars, {self.share:.2%}",
            f"so far    held of earlier rounds {self.held:,} scalars, {self.held / self.total:.2%}; never touched "
            f"{self.untouched:.2%}",
            "adapter   "
            + ", ".join(f"{dtype} {size_text(size)}" for dtype, size in self.adapter_bytes.items())
            + f"; the base is {size_text(self.base_bytes)}",
            "training  "
            + " + ".join(f"{what} {size_text(size)}" for what, size in memory.items())
            + f" = {size_text(sum(memory.values()))}, and activations",
        ]


def totals_of(model: nn.Module) -> Totals:
    """The counts of a model as it is about to be trained.

    Where adapters of this library are active they are counted by their regions; otherwise, as with LoRA or without any
    adapter, whatever requires a gradient is, be it part of the base or beside it.
    """
    layers = layers_of(model).values()
    names = dict.fromkeys(name for layer in layers for name in layer.active_adapters if name in layer.scaling)
    if names:
        regions = [regions_of(model, name) for name in names]
        trained, held = (sum(pair[i].count for pair in regions) for i in range(2))
    else:
        trained, held = sum(p.numel() for p in model.parameters() if p.requires_grad), 0
    total = sum(math.prod(shape) for shape in shapes_of(model).values())
    return Totals(trained, held, total, base_bytes(model))
