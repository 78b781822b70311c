"""Tables on the terminal, and whole where the output goes to a file or another program."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

from rich.console import Console
from rich.table import Table

_ENDLESS = 100_000
"""Width in characters in which no table is folded."""
_WORD = 40
"""Longest word that is not divided; paths and names are divided after it."""


def show_table(table: Table) -> None:
    """Print a table so that no digit is lost: folded between words, or as lines where a terminal is too narrow for it.

    Where standard output is no terminal, the table is as wide as its content. Names of the user are printed as they
    are; square brackets and colons in them mean nothing.

    Args:
        table: Table of text.
    """
    make = partial(Console, file=sys.stdout, markup=False, emoji=False, highlight=False)
    console = make()
    if not console.is_terminal:
        make(width=make(width=_ENDLESS).measure(table).maximum).print(table)
    elif _fit(table, console.width):
        console.print(table)
    else:
        for line in _lines(table):
            console.print(line)


def _texts(table: Table) -> list[list[str]]:
    """Header and cells of each column."""
    return [[str(column.header), *map(str, column.cells)] for column in table.columns]


def _fit(table: Table, width: int) -> bool:
    """Fix the widths of columns, the widest of which is folded first; return whether words stay whole in them."""
    texts = _texts(table)
    widths = [max(map(len, texts_of_one)) for texts_of_one in texts]
    least = [min(_WORD, max((len(word) for text in one for word in text.split()), default=0)) for one in texts]
    available = width - 3 * len(widths) - 1  # without frame and padding
    if sum(least) > available:
        return False
    while sum(widths) > available:
        widest = max((number for number, each in enumerate(widths) if each > least[number]), key=widths.__getitem__)
        widths[widest] -= 1
    for column, each in zip(table.columns, widths, strict=True):
        column.width, column.overflow = each, "fold"
    return True


def _lines(table: Table) -> Iterator[str]:
    """Yield a line for each row, with the header before each value."""
    if table.title:
        yield f"{table.title}:"
    headers, *rows = zip(*_texts(table), strict=True)
    for first, *others in rows:
        values = [f"{header} {cell}".strip() for header, cell in zip(headers[1:], others, strict=True) if cell]
        yield ": ".join(filter(None, [first, ", ".join(values)]))
    if table.caption:
        yield str(table.caption)
