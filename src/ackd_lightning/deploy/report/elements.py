"""Elements of the page of a report in Markdown: tables, figures, numbers as text."""

from __future__ import annotations

import re
from collections.abc import Sequence

FIGURES = "figures"
"""Folder of the figures, beside the Markdown."""


def escaped(text: str) -> str:
    r"""Return text that Markdown shows as it is, such as the name of a class.

    Args:
        text: Any text.

    Examples:
        >>> escaped("a|b_c")
        'a\\|b\\_c'
    """
    return re.sub(r"([\\`*_\[\]<>#|~&])", r"\\\1", " ".join(text.split()))


def percent(value: float | None, decimals: int = 2) -> str:
    """Return a share in percent as text.

    Args:
        value: Share from 0 to 1; None for a dash.
        decimals: Number of decimals.
    """
    return "-" if value is None else f"{100 * value:.{decimals}f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1) -> str:
    """Return a Markdown table; numbers are aligned to the right.

    Args:
        columns: Names of the columns.
        rows: Cells.
        text: Number of columns that hold text, from the left.
    """
    rule = [" --- " if place < text else " ---: " for place in range(len(columns))]
    lines = [columns, *rows]
    cells = ["| " + " | ".join(each) + " |" for each in lines]
    return "\n".join([cells[0], "|" + "|".join(rule) + "|", *cells[1:]])


def figure(name: str, caption: str) -> str:
    """Return the Markdown of a figure.

    Args:
        name: Stem of its file.
        caption: What it shows.
    """
    return f"![{escaped(caption)}]({FIGURES}/{name}.png)"


def size_text(count: int | None) -> str:
    """Return a number of bytes as text.

    Args:
        count: Number of bytes.

    Examples:
        >>> size_text(12_345), size_text(12_345_678)
        ('12.3 kB', '12.35 MB')
    """
    if count is None:
        return "-"
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def interval_text(ends: Sequence[float]) -> str:
    """Return an interval of shares in percent as text.

    Args:
        ends: Lower and upper end, from 0 to 1.
    """
    return f"{100 * ends[0]:.2f} to {100 * ends[1]:.2f}"
