"""The type of an adapter that was computed from two checkpoints instead of trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peft.utils import PeftType
from torch import nn

from ..errors import RegionError
from ..regions.region import Region
from .config import DeltaConfig
from .tuner import DeltaTuner


@dataclass
class ExtractedConfig(DeltaConfig):
    """The config of an adapter that `extract` made. Its region is recorded; it can be loaded, merged and trained on.

    Args:
        mode: How the region was found, "region" or "top": see `extract`.
        percent: For "top", of how many of the scalars.
    """

    mode: str | None = field(default=None)
    percent: float | None = field(default=None)

    title: ClassVar[str] = "Extraction"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("EXTRACTED")

    def choose(self, model: nn.Module) -> Region:
        """There is nothing to choose: the region is what differed."""
        raise RegionError(
            "ExtractedConfig has no region of its own to train: extract() makes such an adapter from two checkpoints; "
            "load it with PeftModel.from_pretrained(model, folder, is_trainable=True) to train on"
        )


class ExtractedTuner(DeltaTuner):
    """PEFT's contract for extracted adapters."""

    prefix = "extracted_"
