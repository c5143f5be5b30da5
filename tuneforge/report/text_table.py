"""Tables of plain text, laid out by rich: the same in a terminal, in a pipe and in a file."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

_WIDTH = 1_000_000  # as wide as the rows need: a terminal wraps them, a file and a pipe keep them whole


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> list[str]:
    """Lay out rows in columns that are two spaces apart.

    Args:
        header: Titles of the columns.
        rows: Cells, one for each column.
        right: Indices of the columns that are aligned to the right, as numbers are.

    Returns:
        The lines, the header first, without trailing spaces.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    at_right = set(right)
    for index, title in enumerate(header):
        table.add_column(title, justify="right" if index in at_right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    # Names hold brackets and colons, which rich would read as markup and emoji.
    Console(file=stream, width=_WIDTH, color_system=None, markup=False, emoji=False, highlight=False).print(table)
    return [line.rstrip() for line in stream.getvalue().splitlines()]
