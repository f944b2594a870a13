"""`core_region`: the scalars that a probe moved most, of any two models (arXiv 2508.21741, section 3.1)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from ...checkpoints.difference import Difference, base_weights, difference_of
from ...checkpoints.progress import progress
from ...checkpoints.weights import Source, Weights, weights_of
from ...deltas.delta import all_finite
from ...errors import IsolateError, RegionError
from ...evaluation.rows import flag
from ...regions.region import Region, base_parameters
from ...regions.roles import roles
from ...regions.selection import Selection
from ...regions.top import Top, share_of, top
from .gradients import SavedGradients, not_finite
from .scope import scope as names_in_scope

Scope = Literal["global", "tensor"]
Score = Literal["update", "gradient"]
Pair = tuple[torch.Tensor, torch.Tensor]

TAKE_LESS = "take a smaller percent, or train the probe longer"
# Tensors that a printed report shows.
SHOWN = 10


def core_region(
    base: Source | Weights,
    tuned: Any,
    percent: float = 1.0,
    scope: Scope = "global",
    score: Score = "update",
    *,
    include_embeddings: bool = False,
    revision: str | None = None,
    tuned_revision: str | None = None,
) -> Region:
    """The core region of a task: exactly the p % of all scalars that fine-tuning on it moved most.

    |Δ| is compared in fp32, and ties go by position: by the parameter's place in the model, then inside it. One tensor
    is in memory at a time. D, of which the percent is taken, is everything in `scope`, moved or not.

    Where the tuned dtype is narrower than the base's, as bf16 is than fp32, Δ is taken from W0 rounded to it: no
    rounding of the cast counts as movement.

    Args:
        base: θ0: a model, a state dict by the names in memory, a folder or a Hub id. Of a state dict D is what the
            tuned model says, where that is a model or a checkpoint's folder. Two state dicts, or an adapter's folder
            over one, do not tell what `weights_of` names (other towers, some ties and buffers): D may then be larger.
        tuned: θ_i: likewise, or an adapter over the base, live or in a folder, of this library or of PEFT (of a LoRA
            its merged Δ counts). For "gradient": what `measure_gradients` returned, or a file of `save_gradients`, or
            a model whose parameters have a `grad`.
        percent: p, above 0, at most 100.
        scope: "global": one top floor(p · D / 100) over all tensors together. "tensor": the top floor(p · n / 100)
            of each tensor of n scalars; tensors that did not move at all drop out (experts that saw no token), and so
            do those of which the percent is less than one scalar.
        score: "update": |Δ|. "gradient": |gradient|, a control.
        include_embeddings: Whether embeddings, head and tied parameters are in D.
        revision, tuned_revision: Of the Hub.

    Returns:
        Parameter name → selection, packed.

    Raises:
        RegionError: The two are equal in scope; fewer than `percent` % moved at all, of the model or of a tensor that
            moved, as in bf16, where small updates are lost; the percent rounds to nothing, or is no number in range; a
            number is NaN or infinite; the models differ in a tensor's name or shape.
        IsolateError: An argument is unknown; a file is not there; see also `difference_of`.
        FormatError: A file is damaged.

    Example:
        >>> base = {"layers.0.up.weight": torch.zeros(2, 2)}
        >>> tuned = {"layers.0.up.weight": torch.tensor([[0.0, 3.0], [-2.0, 1.0]])}
        >>> core_region(base, tuned, percent=50)["layers.0.up.weight"].indices.tolist()
        [1, 2]
    """
    share_of(percent)
    flag("include_embeddings", include_embeddings)
    for name, value, known in (("scope", scope, get_args(Scope)), ("score", score, get_args(Score))):
        if value not in known:
            raise IsolateError(f"{name}={value!r} is unknown: use one of {known}")
    moved: _Moved
    if score == "gradient":
        moved = _Gradients(base_weights(base, tuned if isinstance(tuned, nn.Module) else None, revision), tuned)
    else:
        moved = difference_of(base, tuned, revision=revision, tuned_revision=tuned_revision)
    base = moved.base
    names = [name for name in names_in_scope(base.model, include_embeddings) if name in base]
    if not names:
        raise RegionError(f"{base.name!r} has no parameter in scope: pass include_embeddings=True, or another model")
    found = _of_all(moved, names, percent) if scope == "global" else _of_each(moved, names, percent)
    return found.packed()


def _of_all(moved: _Moved, names: list[str], percent: float) -> Region:
    found = top(lambda: ((name, *_pair(moved, name)) for name in progress(names, "compare")), percent)
    if not found.moved:
        raise _nothing_moved(moved)
    _check(moved, found, percent)
    return found.region


def _pair(moved: _Moved, name: str) -> Pair:
    """(before, after), both as numbers that the dtype of what was tuned has."""
    before, after = moved.pair(name)
    exact = torch.promote_types(before.dtype, after.dtype) == after.dtype
    return before if exact else before.to(after.dtype), after


def _check(moved: _Moved, found: Top, percent: float) -> None:
    if isinstance(moved, _Gradients) and found.moved < found.count:
        raise RegionError(
            f"only {found.moved:,} of {found.total:,} scalars have a gradient other than zero, fewer than {percent} % "
            f"({found.count:,}): take a smaller percent, or measure on more batches"
        )
    found.check(percent, TAKE_LESS)


def _of_each(moved: _Moved, names: list[str], percent: float) -> Region:
    region: dict[str, Selection] = {}
    anything = False
    for name in progress(names, "compare"):
        pair = _pair(moved, name)
        found = top(lambda: [(name, *pair)], percent)  # noqa: B023
        if not found.moved:
            continue
        anything = True
        if not found.count:
            continue
        try:
            _check(moved, found, percent)
        except RegionError as error:
            raise RegionError(f"{name!r}: {error}") from error
        region |= found.region
    if not anything:
        raise _nothing_moved(moved)
    if not region:
        raise RegionError(f"{percent} % of no tensor is one scalar: take a larger percent, or scope='global'")
    return Region(region)


class _Gradients:
    """Gradients as what moved from zero."""

    def __init__(self, base: Weights, gradients: Any) -> None:
        self.base = base
        self.name = "the gradients"
        if isinstance(gradients, nn.Module):
            there = {name: parameter.grad for name, parameter in base_parameters(gradients).items()}
            if all(gradient is None for gradient in there.values()):
                raise IsolateError(
                    f"no parameter of {type(gradients).__name__} has a gradient: call loss.backward() first, or pass "
                    "what measure_gradients returns"
                )
            # What no token reached has none.
            self.of: Mapping[str, Any] = {
                name: torch.zeros(()).expand(base.shapes.get(name, ())) if gradient is None else gradient
                for name, gradient in there.items()
            }
        elif isinstance(gradients, str | os.PathLike):
            self.of = SavedGradients(gradients)
        elif isinstance(gradients, Mapping):
            self.of = gradients
        else:
            raise IsolateError(
                f"{type(gradients).__name__} holds no gradients: pass what measure_gradients returned, its file, or a "
                "model after a backward"
            )
        if strange := [name for name in self.of if name not in base]:
            raise RegionError(
                f"{strange[0]!r} has a gradient, and {base.name!r} has no such parameter: it is another model's"
            )

    def pair(self, name: str) -> Pair:
        if name not in self.of:
            raise RegionError(f"{name!r} is in scope and has no gradient: measure again, with the same scope")
        gradient, shape = self.of[name], self.base.shapes[name]
        if not isinstance(gradient, torch.Tensor) or not gradient.is_floating_point():
            what = gradient.dtype if isinstance(gradient, torch.Tensor) else type(gradient).__name__
            raise IsolateError(
                f"the gradient of {name!r} is a {what}, no tensor of floating-point numbers: pass what "
                "measure_gradients returned"
            )
        if tuple(gradient.shape) != shape:
            raise RegionError(
                f"{name!r} is {shape} in the base, and its gradient {tuple(gradient.shape)}: it is another model's"
            )
        if not all_finite(gradient.float()):
            raise RegionError(not_finite(name))
        return torch.zeros((), dtype=gradient.dtype, device="cpu").expand(shape), gradient


_Moved = Difference | _Gradients


def _nothing_moved(moved: _Moved) -> RegionError:
    if isinstance(moved, _Gradients):
        return RegionError("every gradient in scope is zero: measure on batches that the model learns something from")
    return RegionError(
        f"{moved.name!r} does not differ from {moved.base.name!r} in scope: it was not trained, or it is the base; "
        "train the probe, and pass what it trained"
    )


@dataclass(frozen=True)
class Share:
    """How much of a tensor, or of all tensors of a role, is core.

    Attributes:
        name: The parameter, or the role.
        scalars: In all.
        core: Of them in the core region.
    """

    name: str
    scalars: int
    core: int

    @property
    def share(self) -> float:
        """Share of its scalars that is core, from 0 to 1."""
        return self.core / self.scalars if self.scalars else 0.0


@dataclass(frozen=True)
class CoreReport:
    """Where a core region lies.

    Attributes:
        tensors: Every parameter in scope, in the model's order.
        roles: Every role in scope, in the order in which the model has them.
    """

    tensors: tuple[Share, ...]
    roles: tuple[Share, ...]

    @property
    def scalars(self) -> int:
        """In scope."""
        return sum(tensor.scalars for tensor in self.tensors)

    @property
    def core(self) -> int:
        """In the core region."""
        return sum(tensor.core for tensor in self.tensors)

    def of_core(self, share: Share) -> float:
        """Share of the core that lies there, from 0 to 1."""
        return share.core / self.core if self.core else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "scalars": self.scalars,
            "core": self.core,
            **{
                name: [asdict(row) | {"share": row.share, "of_core": self.of_core(row)} for row in rows]
                for name, rows in (("roles", self.roles), ("tensors", self.tensors))
            },
        }

    def __str__(self) -> str:
        most = sorted(self.tensors, key=lambda row: row.core, reverse=True)[:SHOWN]
        rest = len(self.tensors) - len(most)
        without = sum(not row.core for row in self.tensors)
        lines = [f"core: {self.core:,} of {self.scalars:,} scalars in {len(self.tensors) - without} tensors"]
        for title, rows in (("role", self.roles), ("tensor", most)):
            lines += ["", *self._table(title, rows)]
        lines.append(f"{rest} more tensors; {without} of all have no core scalar")
        return "\n".join(lines)

    def _table(self, title: str, rows: Any) -> list[str]:
        width = max(len(title), *(len(row.name) for row in rows))
        head = f"{title:<{width}}  {'scalars':>14}  {'core':>12}  {'of it':>7}  {'of the core':>11}"
        return [head] + [
            f"{row.name:<{width}}  {row.scalars:>14,}  {row.core:>12,}  {row.share:>7.2%}  {self.of_core(row):>11.1%}"
            for row in rows
        ]


def core_report(region: Region, base: Source | Weights, include_embeddings: bool = False) -> CoreReport:
    """How a core region spreads over tensors and roles.

    Args:
        region: What `core_region` returned.
        base: The model, as for `core_region`; its numbers are not read.
        include_embeddings: As for `core_region`.

    Raises:
        RegionError: The region is another model's.
        IsolateError: See `weights_of`.
    """
    base = weights_of(base)
    region.check(base.shapes)
    names = {name for name in names_in_scope(base.model, include_embeddings) if name in base} | set(region)
    in_tensor = {name: region[name].count if name in region else 0 for name in names}
    of_role: dict[str, list[int]] = {}
    scalars: dict[str, int] = {}
    for role in roles(base.model):
        if role.parameter not in names:
            continue
        scalars[role.parameter] = role.selection.numel
        counts = of_role.setdefault(role.name, [0, 0])
        counts[0] += role.selection.count
        if in_tensor[role.parameter]:
            whole = role.selection.kind == "whole"
            counts[1] += in_tensor[role.parameter] if whole else (role.selection & region[role.parameter]).count
    tensors = tuple(Share(name, count, in_tensor[name]) for name, count in scalars.items())
    return CoreReport(tensors, tuple(Share(name, *counts) for name, counts in of_role.items()))
