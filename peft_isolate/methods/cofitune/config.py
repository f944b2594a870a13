"""`CoFiTuneConfig`: what a user says to train the region that CoFiTune found, or another one of its kind."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

from peft.utils import PeftType
from torch import nn

from ...deltas import DeltaConfig
from ...deltas.soft_mask import Damps, SoftMask
from ...deltas.targets import candidates, in_layers, targeted_parameters
from ...errors import FormatError, IsolateError, RegionError
from ...regions.region import Region
from ...regions.roles import Role
from .coarse import as_fractions, as_roles, depths, in_range, matrices
from .fine import soft_masks
from .importance import Importance

BEST_RANGE = (0.25, 0.5)
BEST_MODULES = ("up", "down")
# What the field `importance` says once the adapter has it.
STORED = "stored"


@dataclass
class CoFiTuneConfig(DeltaConfig):
    """CoFiTune (arXiv 2404.10306): train some modules in some layers, and damp the units that matter to the rest.

    The defaults are the region that the paper's search found best: up and down projections in the second quarter of
    the layers. The gate and the output projection stay frozen, as in the paper. `search_region` finds the region of
    another model, `measure_importance` what to damp in it.

    On an encoder–decoder the range applies to each stack; of a mixture of experts every expert in the range is
    trained; of a vision-language model only the language model. The other fields are those of `DeltaConfig`.

    Args:
        layer_range: `(a, b]`, fractions of the depth N: the layers `int(a · N)` to `int(b · N) - 1`. Or "bottom",
            "middle", "top", "first_quarter" to "fourth_quarter". For single layers use `layers_to_transform`.
        modules: Roles ("q", "k", "v", "o", "gate", "up", "down"), or "MHA" (q, k, v), "FFN" (up, down), "MHA+FFN".
        importance: What `measure_importance` returned, or a file of it. It is consumed when a model is wrapped: the
            adapter keeps it, no path is kept, and the field becomes "stored". Without it no soft mask applies.
        soft_mask: What the importance I of an output unit scales by 1 − I: "update", its delta, so that important
            units stay near the base under every optimizer; "gradient", as in the paper, which AdamW undoes; or None.

    Example:
        >>> CoFiTuneConfig(layer_range="middle").layer_range
        'middle'
    """

    layer_range: tuple[float, float] | str = field(default=BEST_RANGE)
    modules: tuple[str, ...] | str = field(default=BEST_MODULES)
    importance: Importance | str | os.PathLike[str] | None = field(default=None)
    soft_mask: str | None = field(default="update")

    title: ClassVar[str] = "CoFiTune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.10306"
    chosen_by: ClassVar[tuple[str, ...]] = ("layer_range", "modules", "soft_mask")

    def __post_init__(self) -> None:
        super().__post_init__()
        # From a file it comes as bare text. A stranger's file may not have paths of this machine opened.
        if type(self.peft_type) is str and self.importance not in (None, STORED):
            raise FormatError(
                f"the adapter's config names the importance {self.importance!r}, which is not in the adapter: pass "
                "the importance to a config of your own"
            )
        self.peft_type = PeftType("COFITUNE")
        fractions, names = as_fractions(self.layer_range), as_roles(self.modules)
        if not isinstance(self.layer_range, str):
            self.layer_range = fractions
        if not isinstance(self.modules, str):
            self.modules = names
        if self.soft_mask is not None and self.soft_mask not in get_args(Damps):
            raise IsolateError(
                f"soft_mask={self.soft_mask!r} is unknown: use one of {get_args(Damps)}, or None (null)"
            )
        if not isinstance(self.importance, Importance | str | os.PathLike | None):
            raise IsolateError(
                f"importance is a {type(self.importance).__name__}, which is none: pass what measure_importance "
                "returned, or the file it was saved to"
            )
        asked = {"layer_range": BEST_RANGE, "modules": BEST_MODULES}
        changed = [f"{name}={getattr(self, name)!r}" for name, best in asked.items() if getattr(self, name) != best]
        if self.names_its_pool and changed:
            raise IsolateError(
                f"{' and '.join(changed)} has no effect where target_modules or target_parameters is set: leave it "
                "out, or choose by it"
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

    def soft_masks(self, model: nn.Module, region: Region) -> dict[str, SoftMask]:
        """The importance that was given, as masks of the region."""
        given = self.importance
        if given is None or self.soft_mask is None:
            return {}
        if given == STORED:
            raise IsolateError(
                f"importance={STORED!r} means the one in an adapter's file, which a new choice has none of: pass the "
                "importance itself, or its file"
            )
        if not isinstance(given, Importance) and not os.path.exists(given):
            raise IsolateError(
                f"importance={os.fspath(given)!r}: there is no such file; measure_importance(…).save(path) writes "
                "one, or `peft-isolate importance`"
            )
        importance = given if isinstance(given, Importance) else Importance.load(given)
        return soft_masks(model, region, importance, self.soft_mask)  # type: ignore[arg-type]  # see __post_init__

    def remarks(self, masks: Mapping[str, SoftMask]) -> list[str]:
        """Whether there is a soft mask."""
        if masks:
            units = sum(mask.count for mask in masks.values())
            return [f"soft mask on the {self.soft_mask}: {units:,} units of {len(masks)} parameters"]
        if self.soft_mask is None:
            return [] if self.importance is None else ["soft mask off: soft_mask=None"]
        if self.importance is None:
            return ["soft mask off: no importance of what learns is given (measure_importance measures it)"]
        return ["soft mask off: the importance that is given reaches nothing that learns"]

    def consume(self) -> None:
        """From now on the importance stands in the adapter."""
        self.importance = STORED if (self.resolved or {}).get("masks") else None

    def _check_unchanged(self) -> None:
        super()._check_unchanged()
        there = STORED if (self.resolved or {}).get("masks") else None
        if self.importance != there:
            raise RegionError(
                f"importance is {self.importance!r}, but the adapter has {'one of its own' if there else 'none'}: for "
                f"a new choice pass dataclasses.replace(config, importance={self.importance!r}, resolved=None)"
            )

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON can hold it; an importance that no adapter has yet is only named."""
        plain = copy.copy(self)
        if plain.importance is not None:
            plain.importance = str(plain.importance)
        return super(CoFiTuneConfig, plain).to_dict()
