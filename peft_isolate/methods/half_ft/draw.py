"""The draw of HFT: which half of the matrices learns in a round (arXiv 2404.18466, section 3)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch

from ...regions.region import Region
from ...regions.roles import Role, RoleName
from ...regions.selection import Selection

Granularity = Literal["category", "layer", "model"]
Balance = Literal["count", "parameters"]
T = TypeVar("T")

# Drawn by the part of the layer they belong to, each part for itself.
MATRICES: frozenset[RoleName] = frozenset({"q", "k", "v", "o", "gate", "up", "down", "mixer"})


def category(role: Role) -> str:
    """What a role is drawn among: "attention", "cross-attention", "feed-forward", "expert", "shared-expert", "mixer".

    "norm" for norms and routers, "other" for what is drawn only where the user names it. What a mixer holds itself,
    such as A_log, D and dt_bias, is "other": PEFT cannot wrap a module inside a wrapped one, so that a delta on the
    mixer would shut out those on its matrices.
    """
    if role.name in ("norm", "router"):
        return "norm"
    return role.block if role.name in MATRICES else "other"


@dataclass
class Member:
    """What is drawn or not as one: a matrix (or a block of a fused one) with its bias, or a norm.

    Attributes:
        module: The module that holds it.
        category: See `category`.
        place: (stack, layer); layer is None outside the layers.
        parts: Parameter names and the selection of each.
        expert: The expert it belongs to, if any: (layer, expert) is drawn from like a layer of its own.
    """

    module: str
    category: str
    place: tuple[str, int | None]
    parts: dict[str, Selection] = field(default_factory=dict)
    expert: int | None = None

    @property
    def size(self) -> int:
        """Scalars of the matrix, without its bias: q and o count as equal where only one of them has a bias."""
        return max(selection.count for selection in self.parts.values())


def members(roles: Iterable[Role]) -> list[Member]:
    """Group parameters, and blocks of fused ones, into what is drawn together."""
    grouped: dict[tuple[str, str, int | None], Member] = {}
    for role in roles:
        key = (role.module, role.name, role.expert)
        if key not in grouped:
            grouped[key] = Member(role.module, category(role), (role.stack, role.layer), expert=role.expert)
        grouped[key].parts[role.parameter] = role.selection
    return list(grouped.values())


def draw(
    pool: Sequence[Member],
    *,
    fraction: float = 0.5,
    granularity: Granularity = "category",
    balance: Balance = "count",
    seed: int = 0,
    round_index: int = 0,
) -> Region:
    """Draw `fraction` of the members: a pure function of the pool's names and these numbers.

    * "category": in every layer, of each category. floor(fraction · n) of a layer's n members, and one more in as many
      randomly chosen layers as bring the total to round(fraction · n · N), a half rounded up: 2 of {q, k, v, o}, 2 of
      {gate, up, down} in half of the layers and 1 in the others. (The spread for other fractions than 0.5 is our
      choice; the paper has only 0.5.) In a mixture of experts each expert of each layer counts as a layer; a shared
      expert, a cross-attention and a mixer are categories of their own, and of a mixer's matrices, whatever their
      number and names, half is drawn (our choice).
    * "layer": whole layers, round(fraction · N) of them.
    * "model": any members. (Our choice: a norm counts like a matrix.)

    Args:
        pool: What there is to draw from.
        fraction: In (0, 1].
        granularity: See above.
        balance: "count" draws any members (the paper). "parameters" draws the same share of each size: under
            grouped-query attention one of the large {q, o} and one of the small {k, v}, where a draw by count trains
            anything from a fifth to four fifths of the attention.
        seed: Of the draw alone, independent of the trainer's.
        round_index: Each round is a draw of its own.

    Returns:
        The region of what was drawn, at least one member.
    """
    generator = torch.Generator("cpu").manual_seed(_mix(seed, round_index))
    if granularity == "model":
        drawn = _pick(pool, _rounded(fraction * len(pool)), [member.size for member in pool], balance, generator)
    elif granularity == "layer":
        # A member outside the layers is a layer of its own, by its module's name.
        layers = _group(pool, lambda member: member.place if member.place[1] is not None else member.module)
        sizes = [sum(member.size for member in layer) for layer in layers]
        chosen = _pick(layers, _rounded(fraction * len(layers)), sizes, balance, generator)
        drawn = [member for layer in chosen for member in layer]
    else:
        drawn = []
        for same in _group(pool, lambda member: member.category):
            layers = _group(same, lambda member: (member.place, member.expert))
            counts = _spread([fraction * len(layer) for layer in layers], generator)
            for layer, count in zip(layers, counts, strict=True):
                drawn += _pick(layer, count, [member.size for member in layer], balance, generator)
    if not drawn and pool:
        drawn = _pick(pool, 1, [member.size for member in pool], "count", generator)
    return union(drawn)


def union(drawn: Iterable[Member]) -> Region:
    """The region of some members: the blocks of a fused weight are joined."""
    return Region.union_of(part for member in drawn for part in member.parts.items())


def _mix(seed: int, round_index: int) -> int:
    """One seed of two numbers, without seed 1 of round 0 being seed 0 of round 1."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{round_index}".encode()).digest()[:8], "big") >> 1


def _shuffled(n: int, generator: torch.Generator) -> list[int]:
    """0 to n − 1 in random order; on the CPU whatever the default device, so that a seed means one draw everywhere."""
    return torch.randperm(n, generator=generator, device="cpu").tolist()


def _rounded(number: float) -> int:
    """To the nearest whole number, a half up; the small term undoes the error of a product like 0.1 · 30."""
    return math.floor(number + 0.5 + 1e-9)


def _group(items: Iterable[T], key) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _spread(shares: Sequence[float], generator: torch.Generator) -> list[int]:
    """Whole numbers near the shares, floor or one more, whose sum is the rounded sum; who gets one more is random."""
    counts = [math.floor(share + 1e-9) for share in shares]
    open_to_more = [i for i, share in enumerate(shares) if share - counts[i] > 1e-9]
    rest = _rounded(sum(shares)) - sum(counts)
    for i in _shuffled(len(open_to_more), generator)[:rest]:
        counts[open_to_more[i]] += 1
    return counts


def _pick(
    items: Sequence[T], count: int, sizes: Sequence[int], balance: Balance, generator: torch.Generator
) -> list[T]:
    """`count` of the items, in their own order; balanced: the same share of each size."""
    if balance == "count":
        chosen = _shuffled(len(items), generator)[:count]
    else:
        classes = _group(range(len(items)), lambda i: sizes[i])
        quotas = _spread([count * len(same_size) / len(items) for same_size in classes], generator)
        chosen = []
        for same_size, quota in zip(classes, quotas, strict=True):
            chosen += [same_size[i] for i in _shuffled(len(same_size), generator)[:quota]]
    return [items[i] for i in sorted(chosen)]
