"""Rows of `results/runs.csv` that nobody ran: what the report has to say of them can be worked out by hand."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from abilities import ABILITIES, TASKS
from arms import METHODS, Arm
from comparisons import judged_settings
from protocol import (
    ALPHAS,
    ANCHORS,
    BASES,
    CHOOSING_SEEDS,
    DEVELOPED_ON,
    FAMILIES,
    JUDGING_SEEDS,
    PEERS,
    UPPER_BOUND,
)

FROZEN = {
    "full": {"method": "full", "anchor": "self 3", "alpha": ALPHAS[1], "forgetting": 9.0},
    "LoRA": {"method": "LoRA r=8", "anchor": "self 3", "alpha": 1.0, "forgetting": 12.0},
    "HFT": {"method": "HFT", "anchor": "self 1", "alpha": ALPHAS[-1], "forgetting": 8.0},
    "CoFiTune": {"method": "CoFiTune", "anchor": "random 1", "alpha": 1.0, "forgetting": 20.0},
    "random region": {"method": "random rows", "anchor": "self 3", "alpha": ALPHAS[-1], "forgetting": 8.5},
}


def row(arm: str, forgetting: float, **other: Any) -> dict[str, Any]:
    """One row: each ability forgotten alike, KL a tenth of what is forgotten."""
    made = {
        "base": BASES[0], "task": "A", "arm": arm, "rate": METHODS[Arm.named(arm).method].rates[2],
        "seed": JUDGING_SEEDS[0], "judged": True, "alpha": 1.0, "reached": True, "steps": 60.0,
        "forgetting": round(forgetting, 2), "new": 95.0, "best": 96.0,
        "trained": 895968.0 if arm == "full" else 400000.0, "bytes": 1.6e6, "seconds": 20.0, "commit": "0123456789",
        **{ability.name: round(forgetting, 2) for ability in ABILITIES},
    }  # fmt: skip
    made |= {"kl": round(forgetting / 10, 3), "rise": round(forgetting / 50, 3)}
    made |= other
    return made if made["alpha"] == 1.0 else made | {"kl": "", "rise": ""}


def to_choose_by() -> Iterator[dict[str, Any]]:
    """Every variant with every rate, and the factorial; the middle rate is the lowest that learns the task."""
    rng = random.Random(0)
    arms = [*(arm for family in FAMILIES.values() for arm in family), *PEERS, UPPER_BOUND]
    for arm in arms:
        for i, rate in enumerate(METHODS[arm].rates):
            for seed in CHOOSING_SEEDS if i == 2 else CHOOSING_SEEDS[:1]:
                yield row(arm, 10 * i + rng.gauss(5, 1), rate=rate, seed=seed, judged=False, reached=i >= 2)
    for setting in FROZEN.values():
        for anchor in ANCHORS:
            for alpha in ALPHAS:
                arm = Arm(str(setting["method"]), anchor).name
                if (anchor, alpha) != ("none", 1.0):
                    yield row(
                        arm, 20 * alpha, seed=CHOOSING_SEEDS[0], judged=False, alpha=alpha, reached=alpha > ALPHAS[-1]
                    )


def to_judge_by(forgets: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Every arm that is judged: its mean as given, else 30; bases and seeds differ for all arms alike."""
    settings = judged_settings(FROZEN)
    for task in TASKS:
        for i, base in enumerate(BASES):
            for seed in JUDGING_SEEDS:
                noise = random.Random(f"{task} {base} {seed}")
                shared = 2 * i + noise.gauss(0, 1)
                for setting in sorted(settings):
                    found = forgets.get(setting.arm, 30) + shared + noise.gauss(0, 0.3)
                    yield row(setting.arm, found, base=base, task=task, seed=seed, alpha=setting.alpha)


def everything() -> list[dict[str, Any]]:
    """All of them: HFT forgets half as much as full fine-tuning, and with its anchor a third."""
    forgets = {"full": 30.0, "HFT": 15.0, "HFT | self 1": 8.0, "replay": 1.0}
    developed = [made for made in to_choose_by() if (made["base"], made["task"]) == DEVELOPED_ON]
    return [*developed, *to_judge_by(forgets)]
