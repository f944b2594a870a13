"""`CoFiTuneConfig`: what a user says to train the region that CoFiTune found, or another one of its kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peft.utils import PeftType
from torch import nn

from ...deltas import DeltaConfig
from ...deltas.targets import candidates, in_layers, targeted_parameters
from ...errors import IsolateError, RegionError
from ...regions.region import Region
from ...regions.roles import Role
from .coarse import as_fractions, as_roles, depths, in_range, matrices

BEST_RANGE = (0.25, 0.5)
BEST_MODULES = ("up", "down")


@dataclass
class CoFiTuneConfig(DeltaConfig):
    """CoFiTune (arXiv 2404.10306): train some modules in some layers, and damp the units that matter to the rest.

    The defaults are the region that the paper's search found best: up and down projections in the second quarter of
    the layers. The gate and the output projection stay frozen, as in the paper. `search_region` finds the region of
    another model.

    On an encoder–decoder the range applies to each stack; of a mixture of experts every expert in the range is
    trained; of a vision-language model only the language model. The other fields are those of `DeltaConfig`.

    Args:
        layer_range: `(a, b]`, fractions of the depth N: the layers `int(a · N)` to `int(b · N) - 1`. Or "bottom",
            "middle", "top", "first_quarter" to "fourth_quarter". For single layers use `layers_to_transform`.
        modules: Roles ("q", "k", "v", "o", "gate", "up", "down"), or "MHA" (q, k, v), "FFN" (up, down), "MHA+FFN".

    Example:
        >>> CoFiTuneConfig(layer_range="middle").layer_range
        'middle'
    """

    layer_range: tuple[float, float] | str = field(default=BEST_RANGE)
    modules: tuple[str, ...] | str = field(default=BEST_MODULES)

    chosen_by: ClassVar[tuple[str, ...]] = ("layer_range", "modules")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("COFITUNE")
        fractions, names = as_fractions(self.layer_range), as_roles(self.modules)
        if not isinstance(self.layer_range, str):
            self.layer_range = fractions
        if not isinstance(self.modules, str):
            self.modules = names
        if self.names_its_pool and (self.layer_range != BEST_RANGE or self.modules != BEST_MODULES):
            raise IsolateError(
                f"layer_range={self.layer_range!r} and modules={self.modules!r} have no effect where target_modules "
                "or target_parameters is set: leave them out, or choose by them"
            )
        if self.layers_to_transform is not None and self.layer_range != BEST_RANGE:
            raise IsolateError(
                f"layer_range={self.layer_range!r} and layers_to_transform={self.layers_to_transform!r} both say "
                "which layers to train: leave one out"
            )

    def choose(self, model: nn.Module) -> Region:
        """The modules in the range of layers; with `target_modules`, the modules named."""
        every = candidates(model, self)
        if self.names_its_pool:
            names = targeted_parameters(model, self)
            chosen = [role for role in every if role.parameter in names]
        else:
            chosen = self._by_role(every, type(model).__name__)
        return Region.union_of((role.parameter, role.selection) for role in chosen)

    def _by_role(self, every: list[Role], model: str) -> list[Role]:
        pool = matrices(every)
        wanted, there = as_roles(self.modules), {role.name for role in pool}
        if missing := [name for name in wanted if name not in there]:
            raise RegionError(
                f"modules={self.modules!r}: no {missing} was recognised in the layers of {model}, which has "
                f"{sorted(there)}; name what to train by target_modules or target_parameters"
            )
        if self.layers_to_transform is None:
            pool = in_range(pool, self.layer_range, depths(every))
        chosen = [role for role in pool if in_layers(self, role) and role.name in wanted]
        if not chosen:
            raise RegionError(
                f"layer_range={self.layer_range!r}, layers_to_transform={self.layers_to_transform!r}: no layer there "
                f"of {model} has {list(wanted)}; plan(model, …) shows which have"
            )
        return chosen
