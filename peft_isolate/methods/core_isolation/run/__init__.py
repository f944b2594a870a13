"""The whole run of CPI-FT or DPI: probes, core regions, groups, stages, fusion, one adapter; resumable."""

from .result import IsolationResult
from .run import IsolationRun

__all__ = ["IsolationResult", "IsolationRun"]
