"""HOW a model is judged: forgetting, and pictures of what was trained."""

from .forgetting import forgetting, token_loss
from .plots import plot_trained_share

__all__ = ["forgetting", "plot_trained_share", "token_loss"]
