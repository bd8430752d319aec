"""Plain-text tables, as commands print them."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def format_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A plain-text table: text is left-aligned, numbers right-aligned; floats have 4 decimals.

    Returns the lines joined by newlines, without one at the end.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [
        bool(rows) and all(isinstance(row[i], (int, float, np.number)) for row in rows)
        for i in range(len(headers))
    ]

    def line(row):
        padded = (
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *map(line, cells)])


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (float, np.floating)) else str(value)
