"""The command line, `peft-isolate`: thin commands over the public functions."""

from .app import app, main

__all__ = ["app", "main"]
