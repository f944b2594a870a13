"""CPI-FT and DPI: find each task's core, group tasks, train around the cores, fuse (arXiv 2508.21741, 2601.17777)."""

from ...deltas import DeltaTuner
from .config import CoreIsolationConfig
from .scope import scope
from .stages import next_stage


class CoreIsolationTuner(DeltaTuner):
    """`DeltaTuner` under CPI-FT's name."""

    prefix = "core_isolation_"


__all__ = ["CoreIsolationConfig", "CoreIsolationTuner", "next_stage", "scope"]
