"""Pages with blocks that something else writes: `<!-- from NAME -->`, what NAME has to say, `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable

BLOCK = re.compile(r"(<!-- from (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, says: Callable[[str], str]) -> str:
    """The page with what `says` answers to the name of every block."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{says(found[2])}\n\n{found[3]}", page)
