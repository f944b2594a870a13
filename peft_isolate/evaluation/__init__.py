"""HOW a model is judged: forgetting, and scores on held-out data."""

from .forgetting import forgetting, token_loss
from .harness import LMEvalScorer
from .scorers import ExactMatch, HeldOutLoss, Scores

__all__ = [
    "ExactMatch",
    "HeldOutLoss",
    "LMEvalScorer",
    "Scores",
    "forgetting",
    "token_loss",
]
