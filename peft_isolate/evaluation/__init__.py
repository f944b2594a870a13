"""HOW a model is judged: forgetting, scores on held-out data, and pictures of what was trained."""

from .forgetting import forgetting, token_loss
from .harness import LMEvalScorer
from .plots import plot_trained_share
from .scorers import ExactMatch, HeldOutLoss, Scores

__all__ = [
    "ExactMatch",
    "HeldOutLoss",
    "LMEvalScorer",
    "Scores",
    "forgetting",
    "plot_trained_share",
    "token_loss",
]
