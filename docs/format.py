"""Writes into docs/format.md what the modules say of their formats: one text, beside the code that keeps it.

Run it after a change of such a docstring; a test checks that it has been.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import blocks

PAGE = Path(__file__).parent / "format.md"


def specified(module: str) -> str:
    """What a module's docstring says from its first bold word on, without why it is so."""
    paragraphs = (importlib.import_module(module).__doc__ or "").strip().split("\n\n")
    first = next(i for i, paragraph in enumerate(paragraphs) if paragraph.startswith("**"))
    kept = [paragraph for paragraph in paragraphs[first:] if not paragraph.startswith("Why so")]
    return "\n\n".join(kept)


def filled(page: str) -> str:
    """The page with every block as its module has it."""
    return blocks.filled(page, specified)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
