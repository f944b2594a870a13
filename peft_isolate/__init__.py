"""Fine-tune a chosen region of a model and nothing else, inside PEFT and TRL.

Importing this package registers its methods with PEFT.
"""

from ._register import register
from ._version import __version__ as __version__
from .checkpoints import compress, extract, merge, verify
from .deltas.extracted import ExtractedConfig, ExtractedTuner
from .deltas.prune import prune
from .deltas.scale import set_scale
from .evaluation import frontier
from .methods.cofitune import CoFiTuneConfig, CoFiTuneTuner, measure_importance, search_region
from .methods.core_isolation import (
    CoreIsolationConfig,
    CoreIsolationTuner,
    IsolationRun,
    core_region,
    fuse,
    group_tasks,
    next_stage,
)
from .methods.half_ft import HalfFTConfig, HalfFTTuner, half_reset, next_round
from .methods.plan import plan
from .regions import Region
from .training.anchor.config import AnchorConfig

register("HALFFT", HalfFTConfig, HalfFTTuner)
register("COFITUNE", CoFiTuneConfig, CoFiTuneTuner)
register("CORE_ISOLATION", CoreIsolationConfig, CoreIsolationTuner)
register("EXTRACTED", ExtractedConfig, ExtractedTuner)

__all__ = [
    "AnchorConfig",
    "CoFiTuneConfig",
    "CoreIsolationConfig",
    "HalfFTConfig",
    "IsolationRun",
    "Region",
    "compress",
    "core_region",
    "extract",
    "frontier",
    "fuse",
    "group_tasks",
    "half_reset",
    "measure_importance",
    "merge",
    "next_round",
    "next_stage",
    "plan",
    "prune",
    "search_region",
    "set_scale",
    "verify",
]
