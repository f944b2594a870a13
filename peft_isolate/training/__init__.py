"""Glue to Trainer and TRL: how a config is trained."""

from .trial import SFTTrial

__all__ = ["SFTTrial"]
