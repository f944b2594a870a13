"""Selections whose single elements are kept as codes: in a config, which says how many there are, while the codes
stand beside, in the adapter's tensors; and in a packed `Region`, which holds both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from ..errors import FormatError
from .codes import Codes, check, decode, encode
from .selection import Kind, Selection, whole_numbers

BY_ELEMENTS: tuple[Kind, ...] = ("elements", "all_but")


@dataclass(frozen=True)
class StoredSelection:
    """A selection by elements whose positions are kept as codes.

    Attributes:
        kind: "elements" or "all_but".
        shape: The tensor's shape.
        codes: How many positions there are (of holes, for "all_but"), in how many bytes, in which format.
        data: uint8 (code_bytes,) on the CPU: the codes themselves; None where they are yet to be loaded.
    """

    kind: Kind
    shape: tuple[int, ...]
    codes: Codes
    data: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    def encode(cls, selection: Selection) -> StoredSelection:
        """Of a selection by elements."""
        array, layout = encode(selection.indices, selection.numel)
        codes = Codes(selection.indices.numel(), array.size, layout)
        return cls(selection.kind, selection.shape, codes, torch.from_numpy(array))

    def decode(self, data: torch.Tensor) -> torch.Tensor:
        """The positions: int32 (count,), int64 where the tensor has 2³¹ scalars or more, on the CPU.

        Args:
            data: The codes, on any device.

        Raises:
            FormatError: These codes are not of this selection: never loaded, truncated, altered.
        """
        return torch.from_numpy(decode(data.detach().cpu().numpy(), self.codes.format, self.codes.count, self.numel))

    def check(self, data: torch.Tensor) -> None:
        """Raise as `decode` does, in a fraction of its time."""
        check(data.detach().cpu().numpy(), self.codes.format, self.codes.count, self.numel)

    def selection(self, data: torch.Tensor | None = None) -> Selection:
        """The selection itself, from its own codes or from others of its size. Raises as `decode` does."""
        return Selection(self.kind, self.shape, self.decode(self.loaded() if data is None else data).long())

    def loaded(self) -> torch.Tensor:
        """Its own codes.

        Raises:
            FormatError: It has none.
        """
        if self.data is None:
            raise FormatError(
                f"which {self.codes.count:,} {self.kind} of {self.shape} are selected stands in the adapter's "
                "tensors, not in its config: load the adapter with PeftModel.from_pretrained, and ask the loaded model"
            )
        return self.data

    def __invert__(self) -> StoredSelection:
        """All that is not selected: the same codes, read the other way round."""
        return replace(self, kind="all_but" if self.kind == "elements" else "elements")

    @property
    def numel(self) -> int:
        """Scalars of the tensor, selected or not."""
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        """Selected scalars."""
        n = self.codes.count
        return n if self.kind == "elements" else self.numel - n

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: `{kind, shape, count, code_bytes, format}`."""
        return {"kind": self.kind, "shape": list(self.shape), **self.codes.to_dict()}

    def __repr__(self) -> str:
        return f"StoredSelection({self.codes.count:,} {self.kind} of {self.shape}, {self.count:,} scalars)"


Place = Selection | StoredSelection


def storable(place: Place) -> Place:
    """The same place as the config describes it: single elements by their codes."""
    return StoredSelection.encode(place) if isinstance(place, Selection) and place.kind in BY_ELEMENTS else place


def opened(place: Place) -> Selection:
    """The inverse of `storable`. Raises `FormatError` where codes are another selection's, or yet to be loaded."""
    return place.selection() if isinstance(place, StoredSelection) else place


def combined(left: Place, right: Place, operation: Literal["__or__", "__and__", "__sub__"]) -> Place:
    """What a selection's operation makes of the two; single elements are stored where either of the two was.

    Raises:
        RegionError: Their shapes differ.
    """
    if not isinstance(left, StoredSelection) and not isinstance(right, StoredSelection):
        return _combined(left, right, operation)
    if left.kind == "whole" and isinstance(right, StoredSelection) and left.shape == right.shape:
        # Of a whole tensor nothing needs decoding: so are a core's complement, and the part of it in some scope.
        return {"__or__": left, "__and__": right, "__sub__": ~right}[operation]
    return storable(_combined(opened(left), opened(right), operation))


def _combined(left: Selection, right: Selection, operation: str) -> Selection:
    result: Selection = getattr(left, operation)(right)
    return result


def same(left: Place, right: Place) -> bool:
    """Whether both select the same scalars, whatever their kinds and however they are kept."""
    if left.shape != right.shape or left.count != right.count:
        return False
    if isinstance(left, StoredSelection) and isinstance(right, StoredSelection) and left == right:
        return torch.equal(left.loaded(), right.loaded())  # in one format, a list of positions has one code
    return opened(left) == opened(right)


def place_from_dict(described: Any) -> Place:
    """The inverse of `storable(place).to_dict()`, without the codes.

    Raises:
        FormatError: It is something else.
    """
    if not isinstance(described, dict) or described.get("kind") not in BY_ELEMENTS:
        return Selection.from_dict(described)
    try:
        codes = Codes.from_dict({name: described[name] for name in ("count", "code_bytes", "format")})
        stored = StoredSelection(described["kind"], whole_numbers(described["shape"]), codes)
        # Before a placeholder of that size is made.
        codes.check_size(stored.numel)
        return stored
    except (KeyError, ValueError) as error:
        raise FormatError(
            f"{described!r} describes no selection ({error}): the adapter's config was altered or is of another "
            "version; restore it, or choose the region again with resolved=None"
        ) from error
