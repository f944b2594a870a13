"""How sizes and tables are written, for whoever prints them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def size_text(n_bytes: int) -> str:
    """Bytes in three digits, such as "12.9 MB"."""
    size, units = float(n_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def table_lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table whose columns stand below one another."""
    table = [header, *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
