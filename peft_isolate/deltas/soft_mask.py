"""The soft mask: units that matter to what a model can do already move less, `W0 + (1 − I)·Δ` (CoFiTune).

An optimizer such as Adam divides a gradient by its own size, so that a gradient scaled by a constant trains as if it
were not. What holds a unit back under every optimizer is a factor on the update itself; the factor on the gradient is
there to be faithful to the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from ..errors import FormatError
from ..regions.selection import Selection

Damps = Literal["update", "gradient"]
Axis = Literal["rows", "columns"]

# What stands in the buffer until an adapter's file is loaded: no importance, and loud where nobody looks.
NOT_LOADED = float("nan")
# {what is damped: name of the buffer}: another name, so that no file is loaded into an adapter that damps otherwise.
BUFFERS: dict[Damps, str] = {"update": "importance", "gradient": "gradient_importance"}


@dataclass(frozen=True)
class SoftMask:
    """The importance of the selected units of one parameter, from 0 (moves freely) to 1 (stays).

    Attributes:
        axis: Where the output units of the parameter lie, seen as a matrix: "rows", or "columns" for a `Conv1D` and
            for a bias, which is one row.
        damps: "update": the effective weight is W0 + (1 − I)·Δ. "gradient": it is W0 + Δ, and Δ's gradient is scaled.
        count: Units that the selection has on this axis.
        importance: fp32 (count,) on the CPU; None where it is yet to be loaded.
    """

    axis: Axis
    damps: Damps
    count: int
    importance: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Of the buffer."""
        return BUFFERS[self.damps]

    def buffer(self, device: torch.device) -> torch.Tensor:
        """fp32 (count,): the importance, or a mark that it is not loaded. Never on the meta device."""
        held = torch.full((self.count,), NOT_LOADED, device="cpu") if self.importance is None else self.importance
        return held.clone() if device.type == "meta" else held.to(device, copy=True)

    def check(self, importance: torch.Tensor) -> None:
        """Raise `FormatError` unless these are importances: the file was altered, or none was ever loaded."""
        low, high = torch.aminmax(importance.float())
        if not (float(low) >= 0.0 and float(high) <= 1.0):  # also refuses NaN
            raise FormatError(
                f"the importance of {self.count} units lies between {float(low):.3g} and {float(high):.3g} instead of "
                "0 and 1: it was altered or never loaded; load the adapter with PeftModel.from_pretrained"
            )

    def factor(self, importance: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """1 − I, in a shape that multiplies a delta of this `shape` unit by unit."""
        free = 1.0 - importance.float()
        return free.reshape(*shape[:-1], 1) if self.axis == "rows" else free

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: the importance itself is a tensor of the adapter."""
        return {"axis": self.axis, "damps": self.damps, "count": self.count}

    @classmethod
    def from_dict(cls, described: Any) -> SoftMask:
        """The inverse of `to_dict`. Raises `FormatError` where it is something else."""
        try:
            mask = cls(described["axis"], described["damps"], described["count"])
        except (KeyError, TypeError) as error:
            raise _unknown(described) from error
        known = mask.axis in get_args(Axis) and mask.damps in get_args(Damps)
        if not known or type(mask.count) is not int or mask.count < 1:
            raise _unknown(described)
        return mask


def _unknown(described: Any) -> FormatError:
    return FormatError(
        f"{described!r} describes no soft mask: the adapter's config was altered or is of another version; restore "
        "it, or choose the region again with resolved=None"
    )


def units_on(selection: Selection, axis: Axis) -> int | None:
    """Output units that a selection has on an axis; None where a mask by unit would not be one of its scalars."""
    rows, columns = selection.matrix_shape
    if selection.kind == "whole":
        return rows if axis == "rows" else columns
    return selection.indices.numel() if selection.kind == axis else None
