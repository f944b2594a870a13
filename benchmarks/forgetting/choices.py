"""What is chosen, and by what: rates by the new task's validation, everything else on one base and one task."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from arms import Arm
from outcomes import Row, chosen_rate
from protocol import BASES, CHOOSING_SEEDS, DEVELOPED_ON, FAMILIES

FROZEN = Path(__file__).parent / "frozen.yaml"
# What a run that never learned the task counts as, where the least forgetting is chosen.
NEVER = 1000.0


def rate_of(rows: Iterable[Row], arm: str, task: str) -> float | None:
    """The rate of an arm on a task; None before it was tried with all of its rates."""
    tried = [row for row in rows if (row["arm"], row["task"], row["base"]) == (arm, task, BASES[0])]
    tried = [row for row in tried if not row["judged"] and row["alpha"] == 1.0]
    from arms import METHODS

    wanted = METHODS[Arm.named(arm).method].rates
    tried = [row for row in tried if row["rate"] in wanted]
    if not set(wanted) <= {row["rate"] for row in tried}:
        return None
    return chosen_rate(tried)


def variant_of(rows: Sequence[Row], family: str) -> str | None:
    """The variant of a family that forgets least on validation at its own rate; None before all were tried."""
    found: dict[str, float] = {}
    for arm in FAMILIES[family]:
        rate = rate_of(rows, arm, DEVELOPED_ON[1])
        if rate is None:
            return None
        found[arm] = statistics.fmean(_forgotten(row) for row in _developed(rows, arm, rate, 1.0))
    return min(found, key=found.__getitem__)


def setting_of(rows: Sequence[Row], family: str, anchors: Sequence[str], alphas: Sequence[float]) -> dict[str, Any]:
    """The anchor and the place of the dial with which a family's variant forgets least on validation."""
    variant = variant_of(rows, family)
    rate = rate_of(rows, variant, DEVELOPED_ON[1]) if variant is not None else None
    assert variant is not None
    # Of one seed, that all of them have: the smallest of unequal means would be the noisiest.
    rows = [row for row in rows if row["seed"] == CHOOSING_SEEDS[0]]
    found: dict[tuple[str, float], float] = {}
    for anchor in anchors:
        arm = Arm(variant, anchor).name
        for alpha in alphas:
            if same := _developed(rows, arm, rate, alpha):
                found[anchor, alpha] = statistics.fmean(map(_forgotten, same))
    anchor, alpha = min(found, key=found.__getitem__)
    return {"method": variant, "anchor": anchor, "alpha": alpha, "forgetting": round(found[anchor, alpha], 2)}


def _developed(rows: Sequence[Row], arm: str, rate: float | None, alpha: float) -> list[Row]:
    wanted = (*DEVELOPED_ON, arm, rate, alpha, False)
    return [r for r in rows if (r["base"], r["task"], r["arm"], r["rate"], r["alpha"], r["judged"]) == wanted]


def _forgotten(row: Row) -> float:
    return float(row["forgetting"]) if row["reached"] else NEVER


def frozen() -> dict[str, dict[str, Any]]:
    """What `frozen.yaml` says; empty before it was written."""
    return yaml.safe_load(FROZEN.read_text()) if FROZEN.exists() else {}
