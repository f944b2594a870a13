"""One delta: the numbers that one adapter adds to one parameter."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import FormatError, IsolateError
from ..regions.codes import Codes
from ..regions.region import is_plain
from ..regions.selection import Selection
from ..regions.stored import Place, StoredSelection, storable
from .soft_mask import SoftMask
from .support import ALL_BUT, ELEMENTS, Support, delta_shape, put, read, without_holes
from .support import add_ as add_on_support
from .terms import Part, Terms

TRAINED, HELD = "delta", "held"


class Stamp(NamedTuple):
    """A tensor as it was at some time: by identity and version, since loading assigns or copies on different paths."""

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Stamp | None:
        """Of a tensor as it is now; None of an inference tensor, which has no version."""
        return None if tensor.is_inference() else cls(tensor, tensor._version)

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether it is that tensor, not written to since."""
        # A copy of both may be an inference tensor, which has no version.
        return self.tensor is tensor and not tensor.is_inference() and self.version == tensor._version


class Delta(nn.Module):
    """A delta on any selection of a parameter: what learns in this round, and what earlier ones left.

    The trained and the held selection share no scalar; either may be missing. Zero at first, so that the adapted model
    begins as the base. Where the numbers go follows from the selection, which the adapter's config keeps; only which
    single elements they are (or the holes of "all but") is a tensor of its own.

    Attributes:
        delta: `nn.Parameter` of shape `delta_shape`, one number for each trained scalar, in fp32 over a bf16 or fp16
            base: small updates survive that those would round away. What a dense one has at holes is inert: it is read
            as zero and its gradient is zero. (Not called `weight`: FSDP wraps any module with a trainable `weight` on
            its own.)
        held: `nn.Parameter`, never trained, likewise. (Not a buffer: TRL's reference adapter copies parameters only.)
        delta_codes, held_codes: uint8 (code_bytes,) buffers, beside a selection by elements: its positions, see
            `regions.codes`.
        importance, gradient_importance: fp32 (units,) buffer, where a soft mask damps the trained numbers, or their
            gradient; what is held counts in full.

    Args:
        trained: What learns.
        held: What is kept.
        like: The base parameter: gives device and dtype.
        zero: Start at zero. False draws from N(0, 0.02²), as PEFT's `init_weights=False` does for tests.
        mask: Damps what learns, unit by unit.
    """

    delta: nn.Parameter
    held: nn.Parameter

    def __init__(
        self,
        trained: Place | None,
        held: Place | None,
        like: torch.Tensor,
        zero: bool = True,
        mask: SoftMask | None = None,
    ) -> None:
        super().__init__()
        self.mask = mask
        self._checked: torch.Tensor | None = None
        self._where: dict[str, _Where] = {}
        for name, place in ((TRAINED, trained), (HELD, held)):
            if place is None:
                continue
            where = self._where[name] = _Where(place)
            self.shape = where.place.shape
            self._add_tensors(name, where.place, where.delta_shape, like, zero)
        if mask is not None:
            self.register_buffer(mask.name, mask.buffer(like.device))
        self._decode()

    def _add_tensors(self, name: str, place: Place, shape: tuple[int, ...], like: torch.Tensor, zero: bool) -> None:
        if isinstance(place, StoredSelection):
            self.register_buffer(f"{name}_codes", _codes(place, like.device))
        dtype = torch.promote_types(like.dtype, torch.float32)
        start = torch.zeros(shape, dtype=dtype, device=like.device)
        if name == TRAINED and not zero:
            start.normal_(std=0.02)
        self.register_parameter(name, nn.Parameter(start, requires_grad=name == TRAINED))

    def __setattr__(self, name: str, value: Any) -> None:
        """Every loader that does not copy in place ends here, also those that ask nobody (transformers'): what is held
        stays frozen, and numbers that are none are refused.
        """
        if isinstance(value, nn.Parameter):
            if name == HELD:
                value.requires_grad_(False)
            # FSDP2 swaps shards and gathered numbers in every forward and backward: that loads nothing.
            swapped = any(type(p) is not nn.Parameter for p in (value, self._parameters.get(name, value)))
            if not swapped and not all_finite(value):
                raise FormatError(
                    f"a delta of {tuple(value.shape)} holds NaN or infinity: the training diverged or the file is "
                    "damaged; load a sound adapter into a fresh model"
                )
        super().__setattr__(name, value)

    @property
    def places(self) -> dict[str, Place]:
        """{"delta": …, "held": …}: the selection of each tensor there is, as the config describes it."""
        return {name: where.place for name, where in self._where.items()}

    def selection(self, name: str = TRAINED) -> Selection:
        """The scalars that "delta" or "held" has numbers for, empty where there is none."""
        if name not in self._where:
            return Selection.empty(self.shape)
        place = self._where[name].place
        return place if isinstance(place, Selection) else place.selection(self._codes(name))

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return next(self.parameters()).dtype

    def numbers(self, name: str) -> torch.Tensor:
        """The tensor "delta" or "held", as it was loaded or trained."""
        return getattr(self, name)

    def parts(self) -> Iterator[Part]:
        """What there is of trained and held numbers."""
        for name, where in self._where.items():
            numbers = self.numbers(name)
            index = where.index(numbers.device, self._codes(name))
            if name == HELD:
                # It gets no gradient, whoever asks for one.
                yield Part(numbers.detach(), where.support, index, _none(numbers), False)
            else:
                damped = self.mask is not None and self.mask.damps == "update"
                yield Part(numbers, where.support, index, self._factor(numbers), damped)

    def _factor(self, numbers: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            return _none(numbers)
        importance = self.get_buffer(self.mask.name)
        # A graph cannot look at numbers; nor are there any on the meta device.
        if not (torch.compiler.is_compiling() or importance.is_meta or self._checked is importance):
            self.mask.check(importance)
            self._checked = importance
        return self.mask.factor(importance.to(numbers.device), numbers.shape)

    def terms(self) -> Terms:
        """This delta alone, unscaled."""
        parts = list(self.parts())
        return Part.terms(parts, [1.0] * len(parts), disjoint=True)

    def forward(self, apply: Callable[[Terms], torch.Tensor]) -> torch.Tensor:
        """`apply(self.terms())`, inside a forward of this module: whoever gathers a module's parameters around its
        forward (ZeRO-3, offloading) then gathers these.
        """
        return apply(self.terms())

    def cast(self, dtype: torch.dtype) -> None:
        """Give the numbers another dtype, but for those that are not here yet."""
        for name in self._where:
            numbers = getattr(self, name)
            if numbers.dtype != dtype and not numbers.is_meta:
                numbers.data = numbers.data.to(dtype)

    def check_here(self) -> None:
        """Raise `IsolateError` where the numbers are sharded or offloaded: outside a forward nothing can read them."""
        for name in self._where:
            if not is_plain(numbers := getattr(self, name), self):
                raise IsolateError(
                    f"the adapter's numbers are sharded or offloaded ({type(numbers).__name__}), so they can be "
                    "neither moved nor reset here: save the adapter, load it into a model on one device, do it there"
                )

    @torch.no_grad()
    def dense(self) -> torch.Tensor:
        """What trained and held numbers add to W0, as a tensor of the parameter's shape, zero elsewhere."""
        self.check_here()
        parts = list(self.parts())
        total = torch.zeros(self.shape, dtype=parts[0].numbers.dtype, device=parts[0].numbers.device)
        for numbers, support, index, factor, damped in parts:
            add_on_support(total, support, index, numbers * factor if damped else numbers)
        return total

    @torch.no_grad()
    def fill(self, dense: torch.Tensor) -> None:
        """Take the numbers of each part, which no soft mask damps, from a tensor of the parameter's shape."""
        assert self.mask is None
        for numbers, support, index, _, _ in self.parts():
            numbers.copy_(without_holes(read(dense, support, index, numbers.shape), support, index))

    @torch.no_grad()
    def reset(self, selection: Selection) -> None:
        """Put the numbers of these scalars back to zero."""
        self.check_here()
        for numbers, support, index, _, _ in self.parts():
            back = torch.zeros(self.shape, dtype=torch.bool, device=numbers.device)
            put(back, selection.positions().to(back.device), 1.0)
            numbers.masked_fill_(read(back, support, index, numbers.shape), 0.0)

    def zero_holes(self, name: str, numbers: torch.Tensor) -> torch.Tensor:
        """The tensor "delta" or "held" (or a gathered copy of it) as it counts, and is saved: zero at the holes."""
        where = self._where[name]
        return without_holes(numbers, where.support, where.index(numbers.device, self._codes(name)))

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """{buffer's name: what is no parameter and yet the adapter's own}: codes and importance."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def check_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise `FormatError` unless these could be loaded as `state`: codes of the right size, sound importances."""
        for name, tensor in state.items():
            if self.mask is not None and name == self.mask.name:
                self.mask.check(tensor)
                continue
            place = self.places[name.removesuffix("_codes")]
            assert isinstance(place, StoredSelection)
            place.check(tensor)

    def copy_state(self, other: Delta) -> None:
        """Take over what is no parameter from a delta on the same places: trainers that clone an adapter do not."""
        for name, tensor in self.state.items():
            tensor.copy_(other.state[name])

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """As every module's; and what is held, while DeepSpeed gathers this module alone to save it: ZeRO-3 leaves out
        whatever is frozen, so that the file of a trainer would lack it.
        """
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        held = self._parameters.get(HELD)
        if not recurse and hasattr(held, "ds_id") and held is not None and held.numel():
            yield (f"{prefix}.{HELD}" if prefix else HELD), held

    def _decode(self) -> None:
        """Have the positions at hand before anyone compiles: a graph that decodes them keeps them for backward."""
        for name, where in self._where.items():
            codes = self._codes(name)
            where.forget()
            # Codes that were never loaded, or are damaged, are refused when they are used.
            if isinstance(where.place, StoredSelection) and codes is not None and not codes.is_meta:
                with contextlib.suppress(FormatError):
                    where.index(codes.device, codes)

    def _codes(self, name: str) -> torch.Tensor | None:
        return self._buffers.get(f"{name}_codes")

    def _apply(self, fn, recurse=True):
        """`half()` and their like cast the numbers; a mask stays as it was measured, or a saved model would be
        another one than this.
        """
        name = None if self.mask is None else self.mask.name
        kept = None if name is None else self.get_buffer(name)
        super()._apply(fn, recurse)
        if name is not None and kept is not None and self.get_buffer(name).dtype != kept.dtype:
            self._buffers[name] = kept.to(self.get_buffer(name).device)
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._checked = None
        self._decode()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={where.place!r}" for name, where in self._where.items())


class _Where:
    """Where one tensor of a delta acts, with the index that its support needs.

    Positions of elements are decoded from the codes when they are first needed, and again when the codes are another
    tensor or were written to. They are a plain attribute, neither parameter nor buffer: nothing that loads, casts, or
    materialises a model from the meta device may touch them.
    """

    def __init__(self, place: Place) -> None:
        self.place = storable(place)
        self._index: torch.Tensor | None = None
        self._decoded: Stamp | None = None
        if isinstance(self.place, Selection):
            self.support, self._index = Support.of(self.place)
            n_indices = self.place.indices.numel()
        else:
            self.support = Support(ELEMENTS if place.kind == "elements" else ALL_BUT)
            n_indices = self.place.codes.count
        self.delta_shape = delta_shape(place.kind, place.shape, n_indices)

    def forget(self) -> None:
        """The codes may have changed."""
        if isinstance(self.place, StoredSelection):
            self._index = self._decoded = None

    def index(self, device: torch.device, codes: torch.Tensor | None) -> torch.Tensor:
        """The index beside the support on `device`: see `Support.of`; int32 or int64 positions of elements."""
        if isinstance(self.place, StoredSelection):
            assert codes is not None
            if torch.compiler.is_compiling():
                # A load has made us forget; a graph cannot ask for versions.
                if self._index is None:
                    stored = self.place
                    return torch.ops.peft_isolate.positions(
                        codes, stored.kind, stored.shape, stored.codes.count, stored.codes.format
                    )
            elif self._index is None or not (self._decoded and self._decoded.is_of(codes)):
                # What is made under inference_mode, autograd could not keep later.
                with torch.inference_mode(False):
                    self._index = self.place.decode(codes)
                self._decoded = Stamp.of(codes)
        assert self._index is not None
        if self._index.device != device and device.type != "meta":
            with torch.inference_mode(False):
                self._index = self._index.to(device)
        return self._index


def _none(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.new_empty(0)


def all_finite(numbers: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity, without a second tensor of their size; meta ones count as finite."""
    if numbers.is_meta or not numbers.numel():
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(numbers.detach()))


def _codes(place: StoredSelection, device: torch.device) -> torch.Tensor:
    """The buffer of a place: its codes, or as many zeros, which are never a code, until they are loaded.

    On the CPU beside a parameter on the meta device: parameters may come as meta, buffers are real.
    """
    if place.data is None:
        data = torch.zeros(place.codes.code_bytes, dtype=torch.uint8, device="cpu")
    else:
        data = place.data.clone()
    return data if device.type == "meta" else data.to(device)


@torch.library.custom_op(
    "peft_isolate::positions",
    mutates_args=(),
    schema="(Tensor codes, str kind, int[] shape, int count, str format) -> Tensor",
)
def _positions(codes, kind, shape, count, format):
    """The positions that codes stand for, decoded inside a compiled graph."""
    stored = StoredSelection(kind, tuple(shape), Codes(count, codes.numel(), format))
    return stored.decode(codes).to(codes.device)


@_positions.register_fake
def _(codes, kind, shape, count, format):
    return codes.new_empty(count, dtype=torch.int64 if math.prod(shape) >= 2**31 else torch.int32)
