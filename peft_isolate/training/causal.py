"""What a model says of itself before it is watched: whether it predicts the next token, and over how long a row."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto

from ..deltas.reference import unwrapped
from ..errors import IsolateError
from ..regions.region import unwrap
from ..regions.tree import text_config

# Tasks of transformers whose models do so. Encoder–decoders are told by their configs.
_PREDICT_THE_NEXT = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ")


def check_causal(model: nn.Module) -> None:
    """Refuse an encoder–decoder, an encoder, and classes of transformers for other tasks; any other class may do.

    Raises:
        IsolateError: It is one of these.
    """
    core = unwrap(unwrapped(model))
    config: Any = getattr(core, "config", None)
    name, model_type = type(core).__name__, getattr(config, "model_type", None)
    reason = None
    if getattr(config, "is_encoder_decoder", False):
        reason = "is an encoder–decoder, whose text is not one row of tokens"
    elif type(core).__module__.startswith("transformers.") and name in _classes("") - _classes(*_PREDICT_THE_NEXT):
        reason = "does not predict the next token"
    elif model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", True):
        reason = "has is_decoder=False, so its tokens see what follows them"
    if reason:
        raise IsolateError(
            f"{name} {reason}: only causal language models can be watched; leave ForgettingCallback out"
        )


def positions_of(model: nn.Module) -> int | None:
    """How many tokens of a row a model has positions for, as far as it tells."""
    positions = getattr(text_config(unwrapped(model)), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _classes(*tasks: str) -> set[str]:
    """The classes of transformers for some tasks, as it names these; "": for any."""
    mappings = [
        mapping
        for name, mapping in vars(modeling_auto).items()
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES") and any(task in name for task in tasks)
    ]
    classes = [value for mapping in mappings for value in mapping.values()]
    return {name for value in classes for name in ([value] if isinstance(value, str) else value)}
