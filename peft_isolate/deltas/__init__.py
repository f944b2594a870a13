"""HOW a model changes: trained numbers on a region, added to a frozen base."""

from .config import DeltaConfig
from .layer import DeltaLayer
from .reference import Reference
from .tuner import DeltaTuner

__all__ = ["DeltaConfig", "DeltaLayer", "DeltaTuner", "Reference"]
