"""Columns of text of a CSV file, with the line of each row."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from tuneforge import DataError


class Table(NamedTuple):
    """The cells of a CSV file.

    Args:
        columns: Cells by column name, as text (n,).
        lines: Line of the file in which each row ends.
    """

    columns: dict[str, list[str]]
    lines: list[int]


def read_table(path: Path, delimiter: str) -> Table:
    """Return the cells of a CSV file with a header.

    Raises:
        DataError: The file is missing, empty or not UTF-8, or a row has another number of cells than the header.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter)
            found = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"cannot read '{path}'", where="--data.path", why=why, fix="give a CSV file in UTF-8") from None
    if len(found) < 2:
        raise DataError(f"'{path}' has no rows", why="a header and at least one row are needed", fix="check the file")
    header = [name.strip() for name in found[0][1]]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"column '{repeated[0]}' occurs twice", where=str(path), fix="give each column its own name")
    for line, row in found[1:]:
        if len(row) != len(header):
            raise DataError(
                f"{len(row)} cells under a header of {len(header)}",
                where=f"{path}, line {line}",
                fix="correct the row, quote cells that hold the delimiter, or name another --data.delimiter",
            )
    cells = zip(*(row for _, row in found[1:]), strict=True)
    columns = {name: list(column) for name, column in zip(header, cells, strict=True)}
    return Table(columns, [line for line, _ in found[1:]])
