"""What the house writes in docstrings otherwise than Griffe, which reads them for the site, expects it."""

from __future__ import annotations

import re

import griffe


class OneExample(griffe.Extension):
    """A section "Example:" is one of "Examples:", which Griffe knows to be code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for every object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
