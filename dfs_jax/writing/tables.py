"""Tables: aligned text for people, Markdown, CSV. What stands in them is the callers'."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def format_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A plain-text table: text is left-aligned, numbers right-aligned; floats have 4 decimals.

    Returns the lines joined by newlines, without one at the end.
    """
    right = [
        bool(rows) and all(isinstance(row[i], (int, float, np.number)) for row in rows)
        for i in range(len(headers))
    ]
    first, *rest = _padded([headers, *([_cell(value) for value in row] for row in rows)], right)
    rule = ["-" * len(text) for text in first]
    return "\n".join("  ".join(line).rstrip() for line in (first, rule, *rest))


def markdown_table(
    rows: Sequence[Sequence[str]], headers: Sequence[str], *, aligned: bool = False
) -> str:
    """A Markdown table, without a newline at the end.

    With `aligned`, columns after the first are right-aligned, and cells are padded, so that the
    source can be read as well.
    """
    rule = ["---"] * len(headers)
    if aligned:
        right = [False] + [True] * (len(headers) - 1)
        headers, *rows = _padded([headers, *rows], right)
        rule = ["-" * (len(t) - r) + ":" * r for t, r in zip(headers, right, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headers, rule, *rows))


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a header: every column that a row has, in the order of first use.

    What a row lacks, and None, is empty.
    """
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _padded(lines: Sequence[Sequence[str]], right: Sequence[bool]) -> list[list[str]]:
    """Every cell as wide as its column, its text at the right where `right` says so."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(line, widths, right, strict=True)]
        for line in lines
    ]


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (float, np.floating)) else str(value)
