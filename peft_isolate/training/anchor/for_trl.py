"""TRL's trainers, anchored."""

from __future__ import annotations

try:
    from trl import DPOTrainer, SFTTrainer
except ImportError as error:
    raise ImportError(
        f"AnchoredSFTTrainer and AnchoredDPOTrainer need TRL ({error}): pip install 'peft_isolate[trl]'"
    ) from error

from .trainer import Anchored


class AnchoredSFTTrainer(Anchored, SFTTrainer):
    """TRL's `SFTTrainer` that holds the model to what it was: `AnchoredSFTTrainer(…, anchor=AnchorConfig(…))`."""


class AnchoredDPOTrainer(Anchored, DPOTrainer):
    """TRL's `DPOTrainer` that holds the model to what it was, on anchor text too: `(…, anchor=AnchorConfig(…))`."""
