"""CoFiTune: search for the layers and modules that matter, damp the important units (arXiv 2404.10306)."""

from ...deltas import DeltaTuner
from .config import CoFiTuneConfig
from .importance import Importance, measure_importance
from .search import Level, SearchResult, search_region


class CoFiTuneTuner(DeltaTuner):
    """`DeltaTuner` under CoFiTune's name."""

    prefix = "cofitune_"


__all__ = [
    "CoFiTuneConfig",
    "CoFiTuneTuner",
    "Importance",
    "Level",
    "SearchResult",
    "measure_importance",
    "search_region",
]
