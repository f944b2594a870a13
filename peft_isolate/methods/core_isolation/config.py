"""`CoreIsolationConfig`: what a user says to train around the core regions of earlier tasks, or one core alone."""

from __future__ import annotations

import copy
import functools
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from peft.utils import PeftType
from torch import nn

from ...deltas import DeltaConfig
from ...deltas.soft_mask import SoftMask
from ...deltas.targets import candidates, in_layers, targeted_parameters
from ...errors import FormatError, IsolateError, RegionError
from ...evaluation.rows import flag
from ...regions.files import check_there
from ...regions.region import Region, shapes_of
from ...regions.selection import Selection
from .scope import roles_in_scope

Train = Literal["complement", "core"]
AnyRegion = Region | str | os.PathLike[str]
# What the fields `core` and `frozen` say once the adapter has what they gave.
STORED = "stored"


@dataclass
class CoreIsolationConfig(DeltaConfig):
    """Core parameter isolation (CPI-FT, arXiv 2508.21741; DPI, arXiv 2601.17777): keep the cores of earlier tasks.

    A task's *core region* are the scalars that fine-tuning on it moves most (`core_region`). Train everything in scope
    but the cores of earlier tasks, or a task's own core alone. What is frozen is not trained at all: no optimizer,
    weight decay or clipping can move it. `next_stage` changes what is frozen between two trainings and holds what was
    learned.

    In scope is every floating-point parameter of the language model but embeddings and head, or what `target_modules`
    and `target_parameters` name. The other fields are those of `DeltaConfig`.

    Args:
        train: "complement": all in scope but the frozen regions; with nothing frozen that is everything, as for a
            *probe*. "core": the core, less the frozen regions: a sparse, small adapter.
        core: For "core": a `Region`, or a file of one.
        frozen: A `Region`, a file of one, or several of them; their union stays as it is. Both are consumed when a
            model is wrapped: the adapter keeps what follows from them, no path is kept, and the fields become
            "stored".
        include_embeddings: Whether embeddings and head are in scope. TRL's trainers refuse an adapter on the head.

    Example:
        >>> CoreIsolationConfig(frozen=["regions/copy.safetensors"]).train
        'complement'
    """

    train: str = field(default="complement")
    core: AnyRegion | None = field(default=None)
    frozen: AnyRegion | Sequence[AnyRegion] = field(default=())
    include_embeddings: bool = field(default=False)

    title: ClassVar[str] = "Core parameter isolation (CPI-FT)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.21741"
    chosen_by: ClassVar[tuple[str, ...]] = ("train", "include_embeddings")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.counts: dict[str, list[int | None]] = {}  # of the regions in the fields, as `choose` read them
        from_file = type(self.peft_type) is str
        self.peft_type = PeftType("CORE_ISOLATION")
        if self.train not in get_args(Train):
            raise IsolateError(f"train={self.train!r} is unknown: use one of {get_args(Train)}")
        flag("include_embeddings", self.include_embeddings)
        if isinstance(self.frozen, Region | str | os.PathLike) and self.frozen != STORED:
            self.frozen = (self.frozen,)
        elif self.frozen is None or isinstance(self.frozen, list | tuple):
            self.frozen = tuple(self.frozen or ())
        elif self.frozen != STORED:
            raise IsolateError(f"frozen={self.frozen!r}: give a region, a file of one, or a list of them")
        given = {"core": () if self.core is None else (self.core,), "frozen": self._frozen}
        for name, regions in given.items():
            # A stranger's file may not have paths of this machine opened.
            if from_file and any(each != STORED for each in regions):
                raise FormatError(
                    f"the adapter's config names the {name} {regions!r}, which is not in the adapter: pass the region "
                    "to a config of your own"
                )
            for each in regions:
                if not isinstance(each, Region | str | os.PathLike):
                    raise IsolateError(
                        f"{name} is or holds a {type(each).__name__}, which is no region: pass what core_region "
                        "returned, or the file it was saved to"
                    )
        if self.train == "core" and self.core is None:
            raise IsolateError("train='core' needs to know which: pass core=, a region of core_region or a file of it")
        if self.train == "complement" and self.core is not None:
            raise IsolateError(
                "core= has no effect with train='complement', which trains all but the frozen regions: pass it as "
                "frozen=, or use train='core'"
            )
        if self.include_embeddings and self.names_its_pool:
            raise IsolateError(
                "include_embeddings=True has no effect where target_modules or target_parameters is set: name the "
                "embedding among them"
            )

    @property
    def _frozen(self) -> tuple[Any, ...]:
        return (self.frozen,) if isinstance(self.frozen, str) else self.frozen  # type: ignore[return-value]

    def choose(self, model: nn.Module) -> Region:
        """The scope, or the core, less what is frozen."""
        pool = self._pool(model)
        shapes = shapes_of(model)
        frozen = [loaded(each, "frozen", shapes) for each in self._frozen]
        self.counts = {"frozen": [region.count for region in frozen]}
        wanted = Region({name: Selection.whole(shapes[name]) for name in pool})
        if self.train == "core":
            core = loaded(self.core, "core", shapes)
            self.counts["core"] = [core.count]
            if outside := [name for name in core if name not in wanted]:
                raise RegionError(
                    f"the core has scalars of {outside[0]!r}, which is not in scope ({len(pool)} parameters): pass "
                    "include_embeddings=True, or target_parameters, or a core found in the same scope"
                )
            wanted = core
        trained = wanted - functools.reduce(operator.or_, frozen, Region())
        if pool and not trained:
            raise RegionError(
                f"nothing is left to train: all {wanted.count:,} scalars of the {self.train} are frozen; freeze less, "
                "or leave this stage out"
            )
        return trained

    def _pool(self, model: nn.Module) -> list[str]:
        every = candidates(model, self)
        if self.names_its_pool:
            names = targeted_parameters(model, self)
            return list(dict.fromkeys(role.parameter for role in every if role.parameter in names))
        inside = roles_in_scope(model, every, self.include_embeddings)
        return [role.parameter for role in inside if in_layers(self, role)]

    def remarks(self, masks: Mapping[str, SoftMask]) -> list[str]:
        """Whether anything is frozen."""
        if self.train == "complement" and not self._frozen:
            return ["nothing is frozen: everything in scope learns, as for a probe (frozen= keeps the cores of tasks)"]
        return []

    def consume(self) -> None:
        """From now on what follows from the regions stands in the adapter."""
        record = self.resolved
        assert record is not None
        regions = {"core": () if self.core is None else (self.core,), "frozen": self._frozen}
        # Of a region that stood in an adapter already, nobody has read how large it was.
        record["stored"] = {
            name: self.counts.get(name, [None] * len(given)) for name, given in regions.items() if given
        }
        self.counts = {}
        self.core = None if self.core is None else STORED
        self.frozen = STORED if self._frozen else ()

    def _check_unchanged(self) -> None:
        super()._check_unchanged()
        stored: Any = (self.resolved or {}).get("stored")
        there = stored if isinstance(stored, dict) else {}
        for name, now in (("core", self.core), ("frozen", self.frozen)):
            if now != (STORED if name in there else (None if name == "core" else ())):
                has = "one of its own" if name in there else "none"
                raise RegionError(
                    f"{name} is {now!r}, but the region in `resolved` was chosen with {has}: between two trainings "
                    f"next_stage(model, {name}=…) changes it; for a new choice pass dataclasses.replace(config, "
                    f"{name}=…, resolved=None)"
                )

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON can hold it; regions that no adapter has yet are only named."""
        plain = copy.copy(self)
        plain.core = None if plain.core is None else _named(plain.core)
        plain.frozen = STORED if plain.frozen == STORED else tuple(_named(each) for each in plain._frozen)
        return super(CoreIsolationConfig, plain).to_dict()


def loaded(given: Any, what: str, shapes: Mapping[str, tuple[int, ...]]) -> Region:
    """A region that fits the model of these shapes."""
    if isinstance(given, str) and given == STORED:
        raise IsolateError(
            f"{what}={STORED!r} means what an adapter's file holds, which a new choice has none of: pass the region "
            "itself, or its file"
        )
    if not isinstance(given, Region):
        check_there(given, "core_region(…).save(path) writes one", f"{what}=")
    region = given if isinstance(given, Region) else Region.load(given)
    region.check(shapes)
    return region


def _named(given: Any) -> str:
    return repr(given) if isinstance(given, Region) else os.fspath(given)
