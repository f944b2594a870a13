"""Hold a model to what it was while it is trained: anchor text, what it costs, and trainers."""

from typing import Any

from .config import AnchorConfig
from .cost import AnchorCost, anchor_cost
from .text import AnchorText, anchor_text
from .trainer import Anchored

__all__ = [
    "AnchorConfig",
    "AnchorCost",
    "AnchorText",
    "Anchored",
    "AnchoredDPOTrainer",
    "AnchoredSFTTrainer",
    "anchor_cost",
    "anchor_text",
]


def __getattr__(name: str) -> Any:
    # TRL takes seconds to import, and need not be there.
    if name in ("AnchoredDPOTrainer", "AnchoredSFTTrainer"):
        from . import for_trl

        return getattr(for_trl, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
