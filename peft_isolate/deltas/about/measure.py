"""How the summary of an adapter is made: one delta after the other, each number read once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from ...regions.plots import sorted_roles
from ...regions.region import Region, base_bytes, unwrap, walk_parameters
from ...regions.roles import roles
from ...regions.selection import Selection
from ..config import CHOSEN_BY, DeltaConfig
from ..delta import TRAINED, Delta
from ..support import Support, delta_shape, read
from ..support import add_ as add_on_support
from ..targets import saved_modules, token_modules
from .summary import Key, Row, Summary, sorted_kinds

# What is summed in float64 at once: on the CPU it stays in the cache, elsewhere the calls are what costs.
CHUNK, CHUNK_ELSEWHERE = 2**16, 2**24


def summarise(
    config: DeltaConfig,
    deltas: Iterable[tuple[str, Delta, Mapping[str, torch.Tensor]]],
    model: nn.Module | None,
    *,
    n_bytes: int,
    remarks: Iterable[str] = (),
) -> Summary:
    """The summary of an adapter. One delta is looked at after the other, and each of its numbers read once.

    Args:
        config: Its config.
        deltas: (parameter, delta, {"delta" or "held": numbers}), possibly made as they are asked for. Numbers that are
            not given are the delta's own; those of a sharded one are to be gathered and given.
        model: The base model, for roles; on the meta device will do, adapters may wrap it. None: layer and role are
            what the parameters' names tell.
        n_bytes: Of the deltas' tensors.
        remarks: To be kept.
    """
    blocks = {} if model is None else _blocks(model)
    cells: dict[Key, _Cell] = defaultdict(_Cell)
    for of_parameter in blocks.values():
        for key, selection in of_parameter.items():
            cells[key].scalars += selection.count
    dtype = "none"
    for parameter, delta, numbers in deltas:
        stored = next(iter(numbers.values()), delta)
        dtype = str(stored.dtype).removeprefix("torch.")
        _add(cells, parameter, delta, numbers, blocks.get(parameter))
    return Summary(
        method=str(getattr(config.peft_type, "value", config.peft_type)),
        title=config.title,
        paper=config.paper,
        fields=_said(config),
        base=config.base_model_name_or_path,
        revision=config.revision,
        base_class=_base_class(config, model),
        task=None if config.task_type is None else str(getattr(config.task_type, "value", config.task_type)),
        fingerprint=(config.resolved or {}).get("base") is not None,
        rows=tuple(cells[key].row(key, model is not None) for key in _ordered(cells)),
        total=None if model is None else sum(cell.scalars for cell in cells.values()),
        base_bytes=None if model is None else base_bytes(model),
        n_bytes=n_bytes,
        dtype=dtype,
        packed=config.packed,
        masked=len((config.resolved or {}).get("masks", {})),
        beside=tuple(_beside(config, model)),
        peft_version=config.peft_version,
        remarks=tuple(remarks),
    )


def _said(config: DeltaConfig) -> dict[str, Any]:
    """What the config says of the region and its file, as JSON can hold it: first the method's own fields."""
    shared = {field.name: field.default for field in fields(DeltaConfig)}
    own = [field.name for field in fields(config) if field.name not in shared]
    others = (*CHOSEN_BY, "modules_to_save", "trainable_token_indices", "save_dtype")
    found = {name: getattr(config, name) for name in own}
    found |= {name: value for name in others if (value := getattr(config, name)) != shared[name]}
    return {name: _plain(value) for name, value in found.items()}


def _base_class(config: DeltaConfig, model: nn.Module | None) -> str | None:
    """The base's class, where it is one of transformers'."""
    if model is not None:
        kind = type(unwrap(model))
        library, name = kind.__module__, kind.__name__
    else:
        mapping = config.auto_mapping or {}
        library, name = str(mapping.get("parent_library")), str(mapping.get("base_model_class"))
    return name if library.startswith("transformers.") and name.isidentifier() else None


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _beside(config: DeltaConfig, model: nn.Module | None) -> list[str]:
    """Names of the modules that are trained and saved beside the deltas, of trainable tokens in part."""
    ends = saved_modules(config)
    if model is None:
        tokens = config.trainable_token_indices
        return ends + (list(tokens) if isinstance(tokens, dict) else ["input embeddings"] if tokens else [])
    modules = dict.fromkeys(name for _, name, _, _ in walk_parameters(model))
    saved = [name for name in modules if any(f".{end}." in f".{name}." for end in ends)]
    return [*saved, *(name for name in token_modules(model, config) if name not in saved)]


class _Cell:
    """What is summed up of one layer and role."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self.parameters = self.scalars = self.trained = self.held = 0
        self.squares: list[float] = []
        self.largest = 0.0

    def add(self, name: str, kind: str, count: int, numbers: torch.Tensor) -> None:
        """Scalars of "delta" or "held", and the numbers that stand there: no others but zeros."""
        self.kinds.add(kind)
        setattr(
            self, "trained" if name == TRAINED else "held", count + (self.trained if name == TRAINED else self.held)
        )
        squares, largest = _measure(numbers)
        self.squares.append(squares)
        self.largest = largest if math.isnan(largest) else max(self.largest, largest)

    def row(self, key: Key, counted: bool) -> Row:
        count = self.trained + self.held
        # Sorted: the order in which a file or a model names its tensors makes no difference.
        rms = math.sqrt(sum(sorted(self.squares)) / count) if count else 0.0
        kinds, scalars = sorted_kinds(self.kinds), self.scalars if counted else None
        return Row(*key, kinds, self.parameters, scalars, self.trained, self.held, rms, self.largest)


def _blocks(model: nn.Module) -> dict[str, dict[Key, Selection]]:
    """{parameter: {(layer, role): the part of it that is this}}."""
    found: dict[str, dict[Key, list[Selection]]] = defaultdict(lambda: defaultdict(list))
    for role in roles(model):
        found[role.parameter][role.layer, role.name].append(role.selection)
    return {
        parameter: {key: Region.union_of(("", s) for s in parts)[""] for key, parts in of_parameter.items()}
        for parameter, of_parameter in found.items()
    }


def _by_name(parameter: str) -> Key:
    """(layer, role) as far as a name tells: its first number, and what the module is called."""
    parts = parameter.split(".")[:-1]
    numbers = [part for part in parts if part.isascii() and part.isdecimal() and len(part) < 10]
    return int(numbers[0]) if numbers else None, next((p for p in reversed(parts) if not p.isdecimal()), "unknown")


def _add(
    cells: dict[Key, _Cell],
    parameter: str,
    delta: Delta,
    given: Mapping[str, torch.Tensor],
    blocks: dict[Key, Selection] | None,
) -> None:
    """Sum up one delta."""
    touched = set()
    for (name, place), part in zip(delta.places.items(), delta.parts(), strict=True):
        numbers = delta.zero_holes(name, given.get(name, part.numbers).detach())
        if part.damped:
            numbers = numbers * part.factor.to(numbers.device)
        if blocks is None or len(blocks) == 1:
            key = _by_name(parameter) if blocks is None else next(iter(blocks))
            cells[key].add(name, place.kind, place.count, numbers)
            touched.add(key)
            continue
        # A fused weight: its blocks are told apart in the tensor's own shape.
        selection = delta.selection(name)
        dense = torch.zeros(delta.shape, dtype=numbers.dtype, device=numbers.device)
        add_on_support(dense, part.support, part.at.to(numbers.device), numbers)
        for key, block in blocks.items():
            if count := (selection & block).count:
                support, index = Support.of(block)
                shape = delta_shape(block.kind, block.shape, block.indices.numel())
                cells[key].add(name, place.kind, count, read(dense, support, index.to(dense.device), shape))
                touched.add(key)
    for key in touched:
        cells[key].parameters += 1


def _measure(numbers: torch.Tensor) -> tuple[float, float]:
    """(sum of the squares, largest magnitude), in float64, in one read and without a second tensor of that size."""
    squares = torch.zeros((), dtype=torch.float64, device=numbers.device)
    largest = torch.zeros((), dtype=numbers.dtype, device=numbers.device)
    for chunk in numbers.reshape(-1).split(CHUNK if numbers.device.type == "cpu" else CHUNK_ELSEWHERE):
        if chunk.numel():
            wide = chunk.double()
            squares += torch.dot(wide, wide)
            low, high = torch.aminmax(chunk)
            largest = torch.maximum(largest, torch.maximum(-low, high))
    return squares.item(), largest.item()


def _ordered(cells: Iterable[Key]) -> list[Key]:
    """By layer, what stands outside last; roles in their own order."""
    order = {role: i for i, role in enumerate(sorted_roles(dict.fromkeys(cells, 0)))}
    return sorted(cells, key=lambda key: (key[0] is None, key[0] or 0, order[key[1]]))
