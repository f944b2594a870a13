"""What `fuse` computes of one parameter: the cores transplanted, the rest interpolated, task after task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from ...checkpoints.difference import Difference
from ...checkpoints.progress import progress
from ...checkpoints.weights import Weights
from ...deltas.delta import all_finite
from ...deltas.support import copy_selected
from ...errors import RegionError
from ...regions.region import Region
from ...regions.selection import Selection
from .slerp import PIECE, slerp

NOBODY = -1


class Task:
    """One task to be fused.

    Attributes:
        name: The task's.
        difference: Δ of its tuned model.
        core: Its core region.
        omega: Its ω.
        mean: |Δ| on its core, on the average, once it is measured.
    """

    def __init__(self, name: str, difference: Difference, core: Region, omega: float) -> None:
        self.name, self.difference, self.core, self.omega = name, difference, core, omega
        self.mean = 0.0

    def measure(self) -> None:
        """Find `mean`.

        Raises:
            RegionError: A number is NaN or infinite, or none of the core moved.
        """
        total = sum(self._sum(name) for name in progress(list(self.core), f"measure {self.name}"))
        if not total:
            raise RegionError(
                f"nothing of the core region of {self.name!r} moved in its tuned model: the two are of different "
                "tasks, or the training changed nothing"
            )
        self.mean = total / self.core.count

    def _sum(self, name: str) -> float:
        delta, core = self.delta(name), mask_of(self.core[name])
        pieces = zip(delta.view(-1).split(PIECE), core.view(-1).split(PIECE), strict=True)
        return sum(float((numbers.double().abs() * among).sum()) for numbers, among in pieces)

    def delta(self, name: str) -> torch.Tensor:
        """Δ of a parameter."""
        return finite(self.difference, name, f"tuned[{self.name!r}]")


class Mixer:
    """Fuses one parameter after the other, and counts. Nothing of a parameter is kept.

    Args:
        weights: W0.
        onto: Δ of the model to begin with; None: zero.
        tasks: In their order, measured.
        linear: Interpolate linearly, whatever the angle.
        on_weights: Measure the angle between W0 + Δ instead of between Δ.
        epsilon: See `slerp`.

    Attributes:
        steps: {"slerp", "linear", "keep": how often a tensor was changed so outside of the cores}.
        transplanted: int64 (tasks,): scalars that have the task's number.
        won: int64 (tasks,): those of them that another core has, too.
        conflicts: Scalars in several cores.
    """

    def __init__(
        self,
        weights: Weights,
        onto: Difference | None,
        tasks: Sequence[Task],
        *,
        linear: bool,
        on_weights: bool,
        epsilon: float,
    ) -> None:
        self.weights, self.onto, self.tasks = weights, onto, list(tasks)
        self.linear, self.on_weights, self.epsilon = linear, on_weights, epsilon
        self.steps: Counter[str] = Counter()
        self.transplanted, self.won = (torch.zeros(len(tasks), dtype=torch.int64, device="cpu") for _ in range(2))
        self.conflicts = 0
        self._means = torch.tensor([task.mean for task in tasks], dtype=torch.float64, device="cpu")

    def carried(self, name: str) -> torch.Tensor | None:
        """Δ of a parameter out of scope: as the model to begin with has it. None where that is zero."""
        return None if self.onto is None else finite(self.onto, name, "onto").to(self.weights.delta_dtype(name))

    def fused(self, name: str) -> torch.Tensor:
        """Δ of a parameter in scope, in fp32, or float64 over a float64 base."""
        fused = self.carried(name)
        if fused is None:
            fused = torch.zeros(self.weights.shapes[name], dtype=self.weights.delta_dtype(name), device="cpu")
        free = self._free(name)
        claims = None if free is None else _Claims(fused, self._means)
        mixes = free is None or bool(free.any())
        origin = self.weights[name].to("cpu") if mixes and self.on_weights else None
        for i, task in enumerate(self.tasks):
            if not mixes or not task.omega:
                self.steps["keep"] += 1
                if name not in task.core:
                    continue
            delta = task.delta(name).to(fused.dtype)
            if mixes and task.omega:
                _, kind = slerp(
                    fused, delta, task.omega, self.epsilon, free, origin=origin, linear=self.linear, out=fused
                )
                self.steps[kind] += 1
            if name in task.core:
                assert claims is not None
                claims.take(i, delta, mask_of(task.core[name]))
        if claims is not None:
            self._count(claims)
        return fused

    def _free(self, name: str) -> torch.Tensor | None:
        """bool tensor, true where a parameter is in no core; None where it all is."""
        free = None
        for task in self.tasks:
            if name in task.core:
                core = task.core[name]
                free = torch.ones(core.shape, dtype=torch.bool, device="cpu") if free is None else free
                copy_selected(free, torch.zeros((), dtype=torch.bool, device="cpu").expand(core.shape), core)
        return free

    def _count(self, claims: _Claims) -> None:
        pieces = (tensor.view(-1).split(PIECE) for tensor in (claims.owners, claims.contested))
        for owners, contested in zip(*pieces, strict=True):
            # From 1 on: before the tasks stands nobody.
            for counts, of in ((self.transplanted, owners), (self.won, owners[contested])):
                counts += torch.bincount(of.long() + 1, minlength=len(self.tasks) + 1)[1:]
            self.conflicts += int(torch.count_nonzero(contested))


class _Claims:
    """Who has which scalar of one parameter's cores.

    Args:
        fused: The result, in which whoever gets a scalar puts its number.
        means: float64 (tasks,): mean |Δ| over the whole core of each.
    """

    def __init__(self, fused: torch.Tensor, means: torch.Tensor) -> None:
        self.fused, self.means = fused, means
        self.owners = torch.full(fused.shape, NOBODY, dtype=torch.int16, device="cpu")
        self.contested = torch.zeros(fused.shape, dtype=torch.bool, device="cpu")

    def take(self, task: int, delta: torch.Tensor, core: torch.Tensor) -> None:
        """Give a task of its core what nobody has, and what it moved by a larger share of its mean."""
        tensors = (self.fused, self.owners, self.contested, delta, core)
        for fused, owners, contested, numbers, claimed in zip(
            *(t.view(-1).split(PIECE) for t in tensors), strict=True
        ):
            taken = owners != NOBODY
            contested |= claimed & taken
            theirs = fused.double().abs() / self.means[owners.clamp(min=0).long()]
            wins = claimed & (~taken | (numbers.double().abs() / self.means[task] > theirs))
            fused.copy_(torch.where(wins, numbers, fused))
            owners.masked_fill_(wins, task)


def mask_of(selection: Selection) -> torch.Tensor:
    """bool tensor of the selection's shape; unlike its `mask`, it takes no memory beside that."""
    mask = torch.zeros(selection.shape, dtype=torch.bool, device="cpu")
    copy_selected(mask, torch.ones((), dtype=torch.bool, device="cpu").expand(selection.shape), selection)
    return mask


def finite(difference: Difference, name: str, what: str) -> torch.Tensor:
    """Δ of a parameter.

    Raises:
        RegionError: It holds NaN or infinity.
    """
    delta = difference[name]
    difference.let_go()  # of as many models as there are tasks
    if not all_finite(delta):
        raise RegionError(
            f"{what}: {name!r} holds NaN or infinity there or in the base: the training diverged, or a file is damaged"
        )
    return delta
