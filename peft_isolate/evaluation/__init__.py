"""HOW a model is judged: forgetting, and scores on held-out data."""

from .divergence import Divergence, divergence
from .forgetting import forgetting, token_loss
from .frontier import Frontier, Point, frontier
from .harness import LMEvalScorer
from .scorers import ExactMatch, HeldOutLoss, Scores

__all__ = [
    "Divergence",
    "ExactMatch",
    "Frontier",
    "HeldOutLoss",
    "LMEvalScorer",
    "Point",
    "Scores",
    "divergence",
    "forgetting",
    "frontier",
    "token_loss",
]
