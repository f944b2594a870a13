"""What the tests of checkpoints share."""

from __future__ import annotations

import importlib

import pytest

# They draw: the first looks at the picture, the second at what altered files do to it.
DRAWING = ("test_inspect", "test_robust")


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """`delta.png` takes longer than all the rest of writing a file."""
    if request.module.__name__.rpartition(".")[2] not in DRAWING:
        card = importlib.import_module("peft_isolate.checkpoints.inspect")  # the package's name is the function
        monkeypatch.setattr(card, "_draw", lambda summary, path: False)
