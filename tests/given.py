"""A method of the tests' own: a region of any kind, at random. It is all that a new method has to bring.

Importing this registers it with PEFT as GIVEN.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from peft.utils import PeftType
from torch import nn

from peft_isolate._register import register
from peft_isolate.deltas import DeltaConfig, DeltaTuner
from peft_isolate.deltas.targets import targeted_parameters
from peft_isolate.regions import Region, Selection, roles


@dataclass
class GivenConfig(DeltaConfig):
    """Of every matrix and norm in the layers (or in `target_modules`) a random part, as one kind of selection.

    Args:
        kind: Of the selections.
        share: Of the rows, columns or scalars; for "all_but" of the holes.
        seed: Of the draw.
    """

    kind: str = field(default="elements")
    share: float = field(default=0.3)
    seed: int = field(default=0)

    chosen_by: ClassVar[tuple[str, ...]] = ("kind", "share", "seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("GIVEN")

    def choose(self, model: nn.Module) -> Region:
        if self.target_modules is None:
            names = {role.parameter for role in roles(model) if role.layer is not None and role.name != "unknown"}
        else:
            names = targeted_parameters(model, self)
        shapes = {role.parameter: role.selection.shape for role in roles(model)}
        return Region({name: self.select(name, shapes[name]) for name in shapes if name in names})

    def select(self, name: str, shape: tuple[int, ...]) -> Selection:
        """Its part of one tensor: at least one unit."""
        if self.kind == "whole":
            return Selection.whole(shape)
        probe = Selection.whole(shape)
        sizes = {"rows": probe.matrix_shape[0], "columns": probe.matrix_shape[1]}
        size = sizes.get(self.kind, probe.numel)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        units = torch.randperm(size, generator=generator)[: max(1, int(self.share * size))]
        return getattr(Selection, self.kind)(shape, units.sort().values)


class GivenTuner(DeltaTuner):
    prefix = "given_"


register("GIVEN", GivenConfig, GivenTuner)
