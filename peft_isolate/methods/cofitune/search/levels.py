"""The levels of a search: which ranges of layers are tried with which modules, and what is kept for the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ....errors import IsolateError
from ....regions.roles import ROLES
from ..coarse import Fractions, as_fractions, as_roles

RangesWithin = Callable[[Fractions], Sequence[Any]]

# What a level may call its ranges, given the best one so far.
RANGES_WITHIN: dict[str, RangesWithin] = {
    "best": lambda best: [best],
    "halves": lambda best: [(best[0], (best[0] + best[1]) / 2), ((best[0] + best[1]) / 2, best[1])],
}
WHOLE: Fractions = (0.0, 1.0)


@dataclass(frozen=True)
class Level:
    """One level of a search: each of its ranges is tried with each of its modules.

    Args:
        name: For the table, the records and the picture.
        ranges: Pairs of fractions or names, as `CoFiTuneConfig.layer_range`; or "halves" of the best range so far, or
            "best", that range itself; or a function from the best range so far to such a list. Before the first level
            the best range is the whole depth, (0, 1).
        modules: Each entry is a group ("MHA", "FFN", "MHA+FFN"), a role, or a tuple of roles.

    Example:
        >>> Level("thirds", [(0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)], ["FFN", ("up", "down", "gate")]).modules
        (('up', 'down'), ('gate', 'up', 'down'))
    """

    name: str
    ranges: Sequence[Any] | str | RangesWithin
    modules: Sequence[Any]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise IsolateError(f"the level's name {self.name!r} is no text: give it one, like name='broad'")
        modules = [self.modules] if isinstance(self.modules, str) else self.modules
        groups = [as_roles(group) for group in modules]
        # In one order: (down, up) is the trial that (up, down) is.
        canonical = tuple(tuple(role for role in ROLES if role in group) for group in groups)
        object.__setattr__(self, "modules", canonical)
        if isinstance(self.ranges, str) and self.ranges not in RANGES_WITHIN:
            raise IsolateError(
                f"ranges={self.ranges!r} of level {self.name!r}: use {list(RANGES_WITHIN)}, a list of ranges, or a "
                "function from the best range so far to one"
            )
        if not isinstance(self.ranges, str) and not callable(self.ranges):
            object.__setattr__(self, "ranges", tuple(as_fractions(pair) for pair in self.ranges))
        if not self.modules or not self.ranges:
            raise IsolateError(f"level {self.name!r} has nothing to try: give it at least one range and one module")

    def regions(self, best: Fractions) -> list[tuple[Fractions, tuple[str, ...]]]:
        """What it tries after `best` was kept: range by range, in the order given."""
        ranges: Any = RANGES_WITHIN[self.ranges] if isinstance(self.ranges, str) else self.ranges
        within = [as_fractions(pair) for pair in (ranges(best) if callable(ranges) else ranges)]
        if not within:
            raise IsolateError(f"level {self.name!r} gave no range within {best}: it must give at least one")
        return [(pair, modules) for pair in within for modules in self.modules]


# The paper's: (1) broad ranges, (2) the quarters of the best, (3) inside the best quarter also the sub-modules.
PAPER_LEVELS = (
    Level("broad", ("bottom", "middle", "top"), ("MHA", "FFN")),
    Level("narrow", "halves", ("MHA", "FFN")),
    Level("modules", "best", ("MHA", "FFN", "up", "down")),
)
