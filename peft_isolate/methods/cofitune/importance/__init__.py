"""How much units matter: virtual gates in hooks, two passes over each batch (arXiv 2404.10306, section 3.2)."""

from .importance import Importance, measure_importance

__all__ = ["Importance", "measure_importance"]
