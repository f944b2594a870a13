"""HFT: train a random half of the weight matrices, another half each round (arXiv 2404.18466)."""

from ...deltas import DeltaTuner
from .config import HalfFTConfig
from .rounds import half_reset, next_round


class HalfFTTuner(DeltaTuner):
    """`DeltaTuner` under HFT's name."""

    prefix = "halfft_"


__all__ = ["HalfFTConfig", "HalfFTTuner", "half_reset", "next_round"]
