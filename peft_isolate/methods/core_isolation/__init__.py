"""CPI-FT and DPI: find each task's core, group tasks, train around the cores, fuse (arXiv 2508.21741, 2601.17777)."""

from ...deltas import DeltaTuner
from .config import CoreIsolationConfig
from .fusion import Fused, fuse
from .gradients import measure_gradients, save_gradients
from .grouping import Grouping, group_tasks
from .probe import CoreReport, core_region, core_report
from .run import IsolationResult, IsolationRun
from .scope import scope
from .stages import next_stage


class CoreIsolationTuner(DeltaTuner):
    """`DeltaTuner` under CPI-FT's name."""

    prefix = "core_isolation_"


__all__ = [
    "CoreIsolationConfig",
    "CoreIsolationTuner",
    "CoreReport",
    "Fused",
    "Grouping",
    "IsolationResult",
    "IsolationRun",
    "core_region",
    "core_report",
    "fuse",
    "group_tasks",
    "measure_gradients",
    "next_stage",
    "save_gradients",
    "scope",
]
