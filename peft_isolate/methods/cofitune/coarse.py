"""Where CoFiTune trains: layer ranges as fractions of the depth, modules as roles (arXiv 2404.10306, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ...errors import IsolateError, RegionError
from ...regions.roles import ROLES, Role, RoleName

Fractions = tuple[float, float]

# (a, b]: the layers range(int(a · N), int(b · N)).
LAYER_RANGES: dict[str, Fractions] = {
    "bottom": (0.0, 0.5), "middle": (0.25, 0.75), "top": (0.5, 1.0),
    "first_quarter": (0.0, 0.25), "second_quarter": (0.25, 0.5),
    "third_quarter": (0.5, 0.75), "fourth_quarter": (0.75, 1.0),
}  # fmt: skip

# As the paper trains them: the output projection and the gate stay frozen.
MODULE_GROUPS: dict[str, tuple[RoleName, ...]] = {
    "MHA": ("q", "k", "v"),
    "FFN": ("up", "down"),
    "MHA+FFN": ("q", "k", "v", "up", "down"),
}


def as_fractions(layer_range: Any) -> Fractions:
    """A layer range as the pair of fractions it stands for.

    Raises:
        IsolateError: It is no name of a range, and no pair `0 <= a < b <= 1`.
    """
    if isinstance(layer_range, str) and layer_range in LAYER_RANGES:
        return LAYER_RANGES[layer_range]
    pair = tuple(layer_range) if isinstance(layer_range, Sequence) and not isinstance(layer_range, str) else ()
    numbers = len(pair) == 2 and all(isinstance(n, int | float) and not isinstance(n, bool) for n in pair)
    if not numbers or not 0.0 <= pair[0] < pair[1] <= 1.0:
        raise IsolateError(
            f"layer_range={layer_range!r} is no range of layers: use a pair of fractions of the depth from 0 to 1, "
            f"like (0.25, 0.5), or one of {list(LAYER_RANGES)}; layer numbers go to layers_to_transform=[8, 9, …]"
        )
    return float(pair[0]), float(pair[1])


def layers_in(layer_range: Any, n_layers: int) -> range:
    """The layers that a range means in a stack of `n_layers`, from 0: 8–15 of 32 for (0.25, 0.5)."""
    # 0.29 · 100 is 28.999…: what was meant is a whole number.
    start, stop = (math.floor(fraction * n_layers + 1e-9) for fraction in as_fractions(layer_range))
    return range(start, stop)


def as_roles(modules: Any) -> tuple[RoleName, ...]:
    """Roles, or a group of them, as the roles they stand for.

    Raises:
        IsolateError: A name is neither.
    """
    named = MODULE_GROUPS.get(modules, (modules,)) if isinstance(modules, str) else modules
    trainable = [role for role in ROLES if role in ("q", "k", "v", "o", "gate", "up", "down")]
    listed = isinstance(named, Collection) and all(name in trainable for name in named)
    if not listed or not named:
        raise IsolateError(
            f"modules={modules!r}: use some of the roles {trainable}, or one of the groups {list(MODULE_GROUPS)}; "
            "modules by their own names go to target_modules"
        )
    return tuple(dict.fromkeys(named))


def matrices(roles: Iterable[Role]) -> list[Role]:
    """What CoFiTune chooses among: attention and feed-forward in the layers of the main tower, experts included."""
    blocks = ("attention", "cross-attention", "feed-forward", "expert", "shared-expert")
    return [role for role in roles if role.layer is not None and not role.tower and role.block in blocks]


def depths(roles: Iterable[Role]) -> dict[str, int]:
    """{stack: its layers}, in the main tower."""
    depth: dict[str, int] = {}
    for role in roles:
        if role.layer is not None and not role.tower:
            depth[role.stack] = max(depth.get(role.stack, 0), role.layer + 1)
    return depth


def in_range(pool: Iterable[Role], layer_range: Any, depth: dict[str, int]) -> list[Role]:
    """Those in a range of layers, which is counted in each stack of an encoder–decoder for itself.

    Args:
        pool: What stands in the layers.
        layer_range: A pair of fractions or a name.
        depth: {stack: its layers}.

    Raises:
        RegionError: There is no layer in the range.
    """
    layers = {stack: layers_in(layer_range, n_layers) for stack, n_layers in depth.items()}
    if not any(layers.values()):
        raise RegionError(
            f"layer_range={layer_range!r} has no layer of {depth}: int(a · N) to int(b · N) is empty; widen it"
        )
    return [role for role in pool if role.layer in layers[role.stack]]
