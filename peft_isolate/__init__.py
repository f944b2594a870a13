"""Fine-tune a chosen region of a model and nothing else, inside PEFT and TRL.

Importing this package registers its methods with PEFT.
"""

from ._register import register
from ._version import __version__ as __version__
from .methods.half_ft import HalfFTConfig, HalfFTTuner, half_reset, next_round
from .methods.plan import plan
from .regions import Region

register("HALFFT", HalfFTConfig, HalfFTTuner)

__all__ = ["HalfFTConfig", "Region", "half_reset", "next_round", "plan"]
