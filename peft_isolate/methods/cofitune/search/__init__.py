"""Which layers and modules: the paper's tree of short trainings, with records that survive a kill."""

from .levels import PAPER_LEVELS, WHOLE, Level
from .result import Choice, SearchResult, Trial
from .search import search_region

__all__ = ["PAPER_LEVELS", "WHOLE", "Choice", "Level", "SearchResult", "Trial", "search_region"]
