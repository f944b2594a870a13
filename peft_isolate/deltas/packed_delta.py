"""A delta whose numbers and positions are one packed buffer: small in the file, for inference only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import IsolateError
from ..regions.selection import Selection
from ..regions.stored import Place, StoredSelection
from .delta import Delta, Stamp
from .packed import Packing, inference_only, unpack
from .soft_mask import SoftMask


class PackedDelta(Delta):
    """A `Delta` without parameters. It adds the same numbers as the one that it was packed from, rounded as that says.

    What the buffer holds is unpacked when it is first needed, and again when it is another tensor or was written to.
    As with positions, that is a plain attribute, which nothing loads, casts or materialises.

    Attributes:
        packed: uint8 (bytes,) buffer, see `packed`; zeros, which are never such a buffer, until it is loaded.
        dtype: Of the numbers: at first that of a `Delta`; then what they are cast to.

    Args:
        trained, held, like, mask: As of `Delta`.
        packing: Of the buffer.
    """

    packed: torch.Tensor

    def __init__(
        self,
        trained: Place | None,
        held: Place | None,
        like: torch.Tensor,
        packing: Packing,
        mask: SoftMask | None = None,
    ) -> None:
        super().__init__(trained, held, like, mask=mask)
        self.packing, self._text = packing, packing.to_text()
        self._casts = [torch.promote_types(like.dtype, torch.float32)]
        self._unpacked: dict[str, torch.Tensor] | None = None
        self._stamp: Stamp | None = None
        # Like codes, on the CPU beside a parameter on the meta device.
        device = torch.device("cpu") if like.device.type == "meta" else like.device
        self.register_buffer("packed", torch.zeros(packing.n_bytes, dtype=torch.uint8, device=device))

    def _add_tensors(self, name: str, place: Place, shape: tuple[int, ...], like: torch.Tensor, zero: bool) -> None:
        """All of them are in the buffer."""

    @property
    def dtype(self) -> torch.dtype:
        return self._casts[-1]

    def numbers(self, name: str) -> torch.Tensor:
        if self.packed.is_meta:
            shape = next(part.shape for part in self.packing.parts if part.name == name)
            return torch.empty(shape, dtype=self.dtype, device="meta")
        return self._content(name)

    def _decode(self) -> None:
        """Not before they are needed: they are in the buffer, and nothing here is kept for backward."""
        for where in self._where.values():
            where.forget()

    def _codes(self, name: str) -> torch.Tensor | None:
        return self._content(f"{name}_codes") if isinstance(self.places[name], StoredSelection) else None

    def _content(self, name: str) -> torch.Tensor:
        if torch.compiler.is_compiling():
            # A load has made us forget; a graph cannot ask for versions.
            if self._unpacked is None:
                content = torch.ops.peft_isolate.unpacked(self.packed, self._text, name, self._casts[0])
                return self._cast(content) if content.is_floating_point() else content
        elif self._unpacked is None or not (self._stamp and self._stamp.is_of(self.packed)):
            self.check_here()
            # What is made under inference_mode, autograd could not keep later.
            with torch.inference_mode(False):
                content = unpack(self.packed, self.packing)
                self._unpacked = {
                    key: self._cast(tensor).to(self.packed.device) if tensor.is_floating_point() else tensor
                    for key, tensor in content.items()
                }
            self._stamp = Stamp.of(self.packed)
        assert self._unpacked is not None
        return self._unpacked[name]

    def _cast(self, numbers: torch.Tensor) -> torch.Tensor:
        """One after the other: what a parameter is rounded to stays so when it is cast back."""
        for dtype in self._casts:
            numbers = numbers.to(dtype)
        return numbers

    def cast(self, dtype: torch.dtype) -> None:
        if dtype != self.dtype:
            self._casts.append(dtype)
            self._unpacked = None

    def check_here(self) -> None:
        if self.packed.is_meta:
            raise IsolateError(
                "the numbers of a packed adapter are offloaded or were never loaded: load it into a model on one "
                "device"
            )

    def fill(self, dense: torch.Tensor) -> None:
        raise inference_only("the adapter")

    def reset(self, selection: Selection) -> None:
        raise inference_only("the adapter")

    def check_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """As `Delta.check_state`: all that is in the buffer is looked at."""
        super().check_state({name: tensor for name, tensor in state.items() if name != "packed"})
        if "packed" in state:
            content = unpack(state["packed"], self.packing)
            for name, place in self.places.items():
                if isinstance(place, StoredSelection):
                    place.check(content[f"{name}_codes"])

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """The buffer is bytes, which no cast concerns: an empty tensor tells what becomes of numbers."""
        super()._apply(fn, recurse)
        self.cast(fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # New numbers are cast as a loaded parameter would be, once.
        self._casts, self._unpacked = self._casts[-1:], None


def make_delta(
    trained: Place | None,
    held: Place | None,
    like: torch.Tensor,
    zero: bool = True,
    mask: SoftMask | None = None,
    packing: Packing | None = None,
) -> Delta:
    """A `Delta`, or with a `packing` a packed one."""
    if packing is None:
        return Delta(trained, held, like, zero, mask)
    return PackedDelta(trained, held, like, packing, mask)


@torch.library.custom_op(
    "peft_isolate::unpacked",
    mutates_args=(),
    schema="(Tensor packed, str packing, str name, ScalarType dtype) -> Tensor",
)
def _unpacked(packed, packing, name, dtype):
    """The numbers in this dtype, or the codes, unpacked inside a compiled graph."""
    content = unpack(packed, Packing.from_text(packing))[name]
    return (content.to(dtype) if content.is_floating_point() else content).to(packed.device)


@_unpacked.register_fake
def _(packed, packing, name, dtype):
    parts = {part.name: part for part in Packing.from_text(packing).parts}
    if name in parts:
        return packed.new_empty(parts[name].shape, dtype=dtype)
    return packed.new_empty(parts[name.removesuffix("_codes")].code_bytes)
