"""A checkpoint by the names its parameters have in memory: the one place that maps the disk to memory and back.

Regions and adapters speak of `model.named_parameters()`. Some models are stored under other names and shapes: the
experts of Mixtral and Qwen3-MoE are one tensor each on the disk and one for all of them in memory; GPT-NeoX's head has
another name; a prefix may be there or not. What transformers does when it loads and saves such a model, is done here
for a few tensors at a time, by transformers' own conversions.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ..errors import IsolateError, RegionError
from ..regions.region import PLAIN_DTYPES, walk_parameters
from .architecture import folder_of, meta_model
from .shards import DTYPES, Shards

Tensors = dict[str, torch.Tensor]


class Group:
    """What is converted together: tensors of the disk, and the parameters they become.

    Attributes:
        disk: Names on the disk, in the order in which they are converted.
        memory: Names in memory.
    """

    def __init__(self, renamed: str, converter: WeightConverter | None) -> None:
        self.renamed = renamed
        self.converter = converter
        self.disk: list[str] = []
        self.patterns: list[str] = []
        self.memory: list[str] = []


class Checkpoint(Mapping[str, torch.Tensor]):
    """A model's checkpoint, `{parameter: its numbers}`, of which each is read when it is asked for.

    Args:
        base: A folder or a Hub id.
        class_name: Of the model's class, where it is not the one that its config names.
        revision: Of the Hub.

    Attributes:
        model: The model on the meta device: its names, shapes, roles and ties.
        shards: The checkpoint as it lies on the disk.

    Raises:
        IsolateError: There is no model there, or none in safetensors files.
        FormatError: A file is damaged.
    """

    def __init__(
        self, base: str | os.PathLike[str], class_name: str | None = None, revision: str | None = None
    ) -> None:
        self.name = os.fspath(base)
        self.folder: Path = folder_of(base, revision)
        self.model: nn.Module = meta_model(self.folder, class_name)
        self.shards = Shards(self.folder)
        self.parameters: dict[str, nn.Parameter] = {}
        self._first: dict[str, str] = {}
        for name, _, _, parameter in walk_parameters(self.model):
            self.parameters[name] = parameter
        self._groups = self._grouped()
        self._of_parameter = {name: group for group in self._groups for name in group.memory}
        ties = getattr(self.model, "all_tied_weights_keys", None) or {}
        for other, first in ties.items():
            # The disk has one of the tied names, not always the first.
            for name, twin in ((first, other), (other, first)):
                if name in self.parameters and name not in self._of_parameter and twin in self._of_parameter:
                    self._of_parameter[name] = self._of_parameter[twin]
                    self._first[name] = twin

    def __contains__(self, name: object) -> bool:
        return name in self.parameters and name in self._of_parameter

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        """The parameters that the disk has, in the model's order, tied ones once."""
        return (name for name in self.parameters if name in self._of_parameter)

    @property
    def missing(self) -> list[str]:
        """Parameters of the model that the disk does not have: a head that is new, for example."""
        return [name for name in self.parameters if name not in self._of_parameter]

    @property
    def twins(self) -> set[str]:
        """Further names of tied parameters that the disk has beside the first."""
        return self._of_parameter.keys() - self.parameters.keys()

    @property
    def unused(self) -> list[str]:
        """Tensors of the disk that are no parameter of the model: buffers, most often."""
        used = {disk for name in self for disk in self._of_parameter[name].disk}
        return [name for name in self.shards if name not in used]

    def group_of(self, name: str) -> Group:
        """What a parameter is converted with.

        Raises:
            RegionError: The checkpoint has no such parameter.
        """
        if name not in self:
            where = "the model has" if name in self.parameters else "this model has no parameter of that name"
            raise RegionError(
                f"{name!r} is not in {self.name!r} ({where}, the checkpoint has not): it was made for another model"
            )
        return self._of_parameter[name]

    def read_group(self, group: Group) -> Tensors:
        """{parameter: its numbers} of a group, as they are in memory; possibly mapped: do not write to them."""
        found = self._convert(group, {name: self.shards.read(name) for name in group.disk})
        if group.converter is not None:
            self.shards.let_go()  # what was converted is a copy
        return found

    def read(self, name: str) -> torch.Tensor:
        """A parameter's numbers, as they are in memory; possibly mapped: do not write to them."""
        return self.read_group(self.group_of(name))[self._first.get(name, name)]

    def stored_name(self, name: str) -> str:
        """The name under which `read_group` has a parameter: of a tied one, the name that the disk has."""
        return self._first.get(name, name)

    def to_disk(self, group: Group, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """{name on the disk: numbers} of a group: the inverse of `read_group`, as transformers saves it.

        Raises:
            IsolateError: transformers would save it otherwise than it lies there.
        """
        if group.converter is None:
            return {group.disk[0]: tensors[group.memory[0]]}
        model: Any = self.model
        reverted: Tensors = revert_weight_conversion(model, dict(tensors))
        # A headless model is saved without its prefix, and loads with it as well.
        prefix = f"{model.base_model_prefix}."
        back: Tensors = {}
        for name, tensor in reverted.items():
            names = (name, prefix + name, name.removeprefix(prefix))
            back[next((disk for disk in names if disk in group.disk), name)] = tensor
        there = {name: (DTYPES[self.shards[name].dtype], self.shards[name].shape) for name in group.disk}
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in back.items()}
        if found != there:
            raise IsolateError(
                f"{group.memory[0]!r} lies in {self.name!r} as {group.disk[0]!r} {there[group.disk[0]]}, and "
                f"transformers would save it as {next(iter(found.items()))}: load the model with transformers, save "
                "it with save_pretrained, and use that folder"
            )
        return back

    def check_plain(self, name: str) -> None:
        """Raise `IsolateError` unless a parameter's numbers lie there as they are, in a floating dtype."""
        for disk in self.group_of(name).disk:
            if DTYPES[self.shards[disk].dtype] not in PLAIN_DTYPES:
                raise IsolateError(
                    f"{disk!r} of {self.name!r} is stored in {self.shards[disk].dtype}, quantised: nothing can be "
                    "added to it exactly; take the checkpoint in its own dtype"
                )

    def _convert(self, group: Group, tensors: Tensors) -> Tensors:
        if group.converter is None:
            return {group.renamed: tensors[group.disk[0]]}
        converter = copy.deepcopy(group.converter)
        for disk, pattern in zip(group.disk, group.patterns, strict=True):
            converter.add_tensor(group.renamed, disk, pattern, _Held(tensors.pop(disk)))
        model: Any = self.model
        found = converter.convert(group.renamed, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}

    def _grouped(self) -> list[Group]:
        """As `transformers.core_model_loading.convert_and_load_state_dict_in_model` matches names."""
        model: Any = self.model
        transforms = get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        wanted = model.state_dict()
        groups: dict[str, Group] = {}
        for disk in sorted(self.shards, key=dot_natural_key):
            renamed, pattern = rename_source_key(disk, renamings, converters, model.base_model_prefix, wanted)
            if renamed not in wanted and disk in wanted:
                renamed, pattern = rename_source_key(disk, [], [], model.base_model_prefix, wanted)
            if renamed not in wanted:
                continue
            group = groups.setdefault(renamed, Group(renamed, None if pattern is None else of_pattern[pattern]))
            if group.converter is None and group.disk:
                raise IsolateError(
                    f"{group.disk[0]!r} and {disk!r} of {self.name!r} are both {renamed!r} in memory: remove one"
                )
            group.disk.append(disk)
            group.patterns.append(disk if pattern is None else pattern)
        # What transformers remembers of a load, to save likewise.
        model._weight_conversions = [transform for transform in transforms if transform.was_used()]
        for group in groups.values():
            self._name_memory(group)
        return list(groups.values())

    def _name_memory(self, group: Group) -> None:
        """Which parameters a group becomes, by a conversion of its shapes."""
        shapes = {}
        for disk in group.disk:
            entry = self.shards[disk]
            shapes[disk] = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        for name, tensor in self._convert(group, shapes).items():
            if name in self.parameters and tuple(tensor.shape) != tuple(self.parameters[name].shape):
                raise RegionError(
                    f"{name!r} has shape {tuple(tensor.shape)} in the files of {self.name!r} and "
                    f"{tuple(self.parameters[name].shape)} by its config.json: one of the two is another model's"
                )
            group.memory.append(name)


class _Held:
    """A tensor that is let go of when it is asked for: transformers' conversions then free each as it is used."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor

    def __call__(self) -> torch.Tensor:
        tensor, self._tensor = self._tensor, None
        assert tensor is not None
        return tensor

    def __deepcopy__(self, memo: Any) -> _Held:
        return self
