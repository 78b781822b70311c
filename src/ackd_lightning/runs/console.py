"""Tables on the terminal, and whole where the output goes to a file or another program."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

_ENDLESS = 100_000
"""Width in characters in which no table is folded."""


def show_table(table: Table) -> None:
    """Print a table: in the width of a terminal, in which long cells are folded, and elsewhere as wide as it is.

    Names of the user are printed as they are; square brackets and colons in them mean nothing.

    Args:
        table: Table; its columns get ``overflow="fold"``, so that no digit is lost.
    """
    for column in table.columns:
        column.overflow = "fold"
    plain = {"file": sys.stdout, "markup": False, "emoji": False, "highlight": False}
    console = Console(**plain)  # type: ignore[arg-type]
    if not console.is_terminal:
        wide = Console(**plain, width=_ENDLESS)  # type: ignore[arg-type]
        console = Console(**plain, width=wide.measure(table).maximum)  # type: ignore[arg-type]
    console.print(table)
