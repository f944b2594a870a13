"""The scripts of the benchmark of forgetting import each other by bare name, and so do their tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "forgetting"))
