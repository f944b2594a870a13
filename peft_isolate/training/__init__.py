"""Glue to Trainer and TRL: how a config is trained, what is watched meanwhile, and what a model is held to."""

from typing import Any

from .anchor import AnchorConfig, Anchored, AnchorText, anchor_cost, anchor_text
from .trial import SFTTrial
from .watch import ForgettingCallback

__all__ = [
    "AnchorConfig",
    "AnchorText",
    "Anchored",
    "AnchoredDPOTrainer",
    "AnchoredSFTTrainer",
    "ForgettingCallback",
    "SFTTrial",
    "anchor_cost",
    "anchor_text",
]


def __getattr__(name: str) -> Any:
    if name in ("AnchoredDPOTrainer", "AnchoredSFTTrainer"):
        from . import anchor

        return getattr(anchor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
