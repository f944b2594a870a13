"""Which scalars of a MODEL may change: a mapping from parameter name to `Selection`."""

from __future__ import annotations

import functools
import operator
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from ..errors import RegionError
from .region_file import read_places, write_places
from .selection import KINDS, Selection
from .stored import Place, combined, opened, same, storable


class Region(Mapping[str, Selection]):
    """A region: `{parameter name: Selection}`, immutable; parameters of which nothing is selected are left out.

    Names are those of `model.named_parameters()`. `|`, `&` and `-` go name by name and are exact. A region may be
    `packed`, as `load` gives it: its single elements take about a byte each instead of eight, and are decoded anew
    each time that a selection is asked for. What is made of a packed region is packed.

    Example:
        >>> q = Region({"q.weight": Selection.rows((4, 8), [0, 1])})
        >>> k = Region({"q.weight": Selection.columns((4, 8), [0]), "k.weight": Selection.whole((2, 8))})
        >>> (q | k).count, (q & k).count, q.jaccard(k)
        (34, 2, 0.058823529411764705)
    """

    def __init__(self, selections: Mapping[str, Place] | None = None) -> None:
        places = selections._places if isinstance(selections, Region) else selections or {}
        self._places: dict[str, Place] = {name: place for name, place in places.items() if place.count}

    @classmethod
    def whole(cls, model: nn.Module | Mapping[str, tuple[int, ...]]) -> Region:
        """Every parameter of a model (or of a mapping from names to shapes)."""
        return cls({name: Selection.whole(shape) for name, shape in shapes_of(model).items()})

    @classmethod
    def union_of(cls, parts: Iterable[tuple[str, Selection]]) -> Region:
        """The union of selections, several of one parameter among them, such as the blocks of a fused weight."""
        of_name: dict[str, list[Selection]] = {}
        for name, selection in parts:
            of_name.setdefault(name, []).append(selection)
        return cls({name: _joined(selections) for name, selections in of_name.items()})

    def __getitem__(self, name: str) -> Selection:
        return opened(self._places[name])

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def places(self) -> Mapping[str, Place]:
        """`{parameter name: its selection as it is kept}`: what can be asked of it without decoding anything."""
        return MappingProxyType(self._places)

    def packed(self) -> Region:
        """The same region, its single elements kept as gap codes: at 1 % about 1.1 bytes each, instead of 8."""
        return Region({name: storable(place) for name, place in self._places.items()})

    @property
    def count(self) -> int:
        """Selected scalars."""
        return sum(place.count for place in self._places.values())

    def fraction(self, model: nn.Module | Mapping[str, tuple[int, ...]]) -> float:
        """`count` as a share of the model's scalars, tied tensors counted once.

        Raises:
            RegionError: The region names tensors that the model lacks or has in another shape.
        """
        shapes = shapes_of(model)
        self.check(shapes)
        total = Region.whole(shapes).count
        return self.count / total if total else 0.0

    def complement(self, model: nn.Module | Mapping[str, tuple[int, ...]]) -> Region:
        """Everything in the model but this region. Raises as `fraction` does."""
        shapes = shapes_of(model)
        self.check(shapes)
        return Region.whole(shapes) - self

    def jaccard(self, other: Region) -> float:
        """|A ∩ B| / |A ∪ B|; 1 for two empty regions, which are equal. `overlap.overlaps` does this for many."""
        common = (self & other).count
        union = self.count + other.count - common
        return common / union if union else 1.0

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the region fits a model of these parameter names and shapes.

        Raises:
            RegionError: Names the first tensor that differs, and both shapes.
        """
        for name, place in self._places.items():
            check_shape(name, place.shape, shapes)

    def _combine(self, other: Region, names: list[str], operation: Literal["__or__", "__and__", "__sub__"]) -> Region:
        places: dict[str, Place] = {}
        for name in names:
            left, right = self._places.get(name), other._places.get(name)
            if left is not None and right is not None:
                try:
                    places[name] = combined(left, right, operation)
                except RegionError as error:
                    raise RegionError(f"{name!r}: {error}") from error
            elif (one := left or right) is not None:
                places[name] = one
        return Region(places)

    def __or__(self, other: Region) -> Region:
        return self._combine(other, list(dict.fromkeys([*self, *other])), "__or__")

    def __and__(self, other: Region) -> Region:
        return self._combine(other, [name for name in self if name in other], "__and__")

    def __sub__(self, other: Region) -> Region:
        return self._combine(other, list(self), "__sub__")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Region):
            return NotImplemented
        return self._places.keys() == other._places.keys() and all(
            same(place, other._places[name]) for name, place in self._places.items()
        )

    def __hash__(self) -> int:
        return hash(frozenset((name, place.shape, place.count) for name, place in self._places.items()))

    def __repr__(self) -> str:
        kinds = Counter(place.kind for place in self._places.values())
        by_kind = ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind])
        return f"Region({len(self)} tensors, {self.count:,} scalars{': ' if by_kind else ''}{by_kind})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the region to one file, whole or not at all: see `docs/format.md`. Missing folders are made."""
        write_places(path, self._places)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Region:
        """Read what `save` wrote, in this version or an earlier one: a packed region.

        Raises:
            IsolateError: There is no such file.
            FormatError: The file is truncated, altered, or no region: indices out of range, unsorted or repeated,
                codes that are none, more tensors than it has selections for. What it claims is checked before memory
                is taken for it.
        """
        return cls(read_places(path))


def check_shape(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `RegionError` unless the model of these `shapes` has a parameter of this name and shape."""
    if name not in shapes:
        raise RegionError(
            f"the region names {name!r} of shape {shape}, which this model does not have: it was made for another "
            "model; make it anew for this one"
        )
    if tuple(shapes[name]) != shape:
        raise RegionError(
            f"{name!r} has shape {shape} in the region and {tuple(shapes[name])} in this model: the region was made "
            "for another model; make it anew for this one"
        )


def _joined(selections: Sequence[Selection]) -> Selection:
    """The union. Of rows alone, or columns alone, in one go: a tensor may hold the blocks of hundreds of experts."""
    first, kinds = selections[0], {selection.kind for selection in selections}
    if len(selections) > 2 and len(kinds) == 1 and first.kind in ("rows", "columns"):
        units = torch.cat([selection.indices for selection in selections]).unique()
        return getattr(Selection, first.kind)(first.shape, units)
    return functools.reduce(operator.or_, selections)


def shapes_of(model: nn.Module | Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """{parameter name: shape}, tied tensors once. A mapping from names to shapes (or tensors) is passed through."""
    if isinstance(model, nn.Module):
        return {
            name: logical_shape(module, name.rpartition(".")[2], parameter)
            for name, _, module, parameter in walk_parameters(model)
        }
    return {
        name: tuple(value.shape) if isinstance(value, torch.Tensor) else tuple(value) for name, value in model.items()
    }


# What can be added to; quantised and float8 weights are packed or have no arithmetic.
PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_plain(parameter: torch.Tensor, module: nn.Module) -> bool:
    """Whether a parameter's numbers are here as they are: neither quantised, nor sharded, nor offloaded.

    A parameter on the meta device is plain unless accelerate holds its numbers and brings them for each forward.
    """
    return (
        type(parameter) in (nn.Parameter, torch.Tensor)
        and parameter.dtype in PLAIN_DTYPES
        and not hasattr(parameter, "ds_id")  # DeepSpeed ZeRO-3
        and not (parameter.is_meta and hasattr(module, "_hf_hook"))
    )


def logical_shape(module: nn.Module, name: str, parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape a parameter has for its module's arithmetic: not that of packed or sharded numbers."""
    if hasattr(parameter, "ds_shape"):
        return tuple(parameter.ds_shape)
    packed = parameter.dtype not in PLAIN_DTYPES
    if packed and (state := getattr(parameter, "quant_state", None)) is not None:  # bitsandbytes
        return tuple(state.shape)
    units = [getattr(module, side, None) for side in ("out_features", "in_features")]
    if packed and name == "weight" and all(isinstance(n, int) for n in units):
        return tuple(units)  # type: ignore[arg-type]
    return tuple(parameter.shape)


def device_of(parameter: torch.Tensor, module: nn.Module) -> torch.device:
    """Where the module computes with a parameter: for one that accelerate offloads, where it is brought to."""
    hook = getattr(module, "_hf_hook", None)
    if parameter.is_meta and hook is not None:
        for each in getattr(hook, "hooks", [hook]):
            if (device := getattr(each, "execution_device", None)) is not None:
                return torch.device(device)
    return parameter.device


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the base model under their own names, also inside a model that adapters already wrap.

    A wrapper is known by its attribute `base_layer` (or PEFT's `original_module`): what it holds there keeps the
    wrapper's own name, and everything else in it is the adapter's. Tied tensors come once, under their first name.
    """
    return {name: parameter for name, _, _, parameter in walk_parameters(model)}


def base_bytes(model: nn.Module) -> int:
    """Bytes of the base model's parameters as they are stored, tied tensors once.

    Quantised ones are as large as they are packed; scales that are kept outside the parameter are not counted.
    """
    return sum(n_bytes(parameter) for parameter in base_parameters(model).values())


def n_bytes(parameter: Any) -> int:
    """Bytes of a parameter as it is stored, all of its shards together."""
    if type(parameter).__module__.startswith("torchao"):  # it reports the dtype it stands for
        return sum(n_bytes(getattr(parameter, name)) for name in parameter.__tensor_flatten__()[0])
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


def walk_parameters(model: nn.Module, *, tied: bool = False) -> Iterator[tuple[str, str, nn.Module, nn.Parameter]]:
    """`(parameter name, module name, module, parameter)` of the base model: see `base_parameters`.

    The module is the base one, the names are those it had before anything was wrapped. With `tied`, a parameter comes
    again under each further name it has.
    """
    ties, keys = declared_ties(model), dict[str, nn.Parameter]()
    seen: set[nn.Parameter] = set()

    def visit(module: nn.Module, name: str) -> Iterator[tuple[str, str, nn.Module, nn.Parameter]]:
        module = base_module(module)
        # Not named_parameters and named_children, which leave out what a module holds under a second name.
        for parameter_name, parameter in module._parameters.items():
            if parameter is None:
                continue
            own = f"{name}.{parameter_name}" if name else parameter_name
            keys[own] = keys.get(ties.get(own, ""), parameter) if parameter.is_meta else parameter
            if tied or keys[own] not in seen:
                seen.add(keys[own])
                yield own, name, module, parameter
        for child_name, child in module._modules.items():
            if child is not None:
                yield from visit(child, f"{name}.{child_name}" if name else child_name)

    return visit(unwrap(model), "")


def declared_ties(model: nn.Module) -> dict[str, str]:
    """{parameter: the one it is tied to}, in a transformers model's own words.

    To be asked for parameters on the meta device: accelerate's offloading leaves each name a parameter of its own.
    """
    ties = getattr(unwrap(model), "all_tied_weights_keys", None)
    return ties if isinstance(ties, dict) else {}


def base_module(module: nn.Module) -> nn.Module:
    """What a wrapper holds as `base_layer` or `original_module`, wrapped however often; other modules as they are."""
    while True:
        for wrapped in ("base_layer", "original_module"):
            # By attribute: PEFT's wrapper for trainable tokens keeps `original_module` empty behind a property.
            if wrapped in module._modules and isinstance(inner := getattr(module, wrapped), nn.Module):
                module = inner
                break
        else:
            return module


def unwrap(model: nn.Module) -> nn.Module:
    """The model that a `PeftModel` was made of; any other module as it is."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model
