"""Tables as plain text for the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return left-aligned columns as plain text, as wide as their cells, without a final line break."""
    table = Table(*header, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    # A wide console, because a narrow terminal or a pipe would cut cells off.
    Console(file=text, width=10_000, color_system=None, highlight=False, markup=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
