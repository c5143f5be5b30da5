"""Tables in files: text with a delimiter in the dialects that spreadsheets write, and rows in JSON."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from tuneforge.errors import DataError, escape_name

DELIMITERS = ",;\t|"
"""Delimiters that are recognized."""

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is its beginning
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
_MAX_CELL = 2**31 - 1  # characters; the csv module's own limit is 131,072
_NUM_SNIFFED = 100  # rows from which the delimiter is detected
_SEPARATOR_LINE = re.compile(r"sep=(.)\r?\n?", re.IGNORECASE)  # a first line that Excel writes and reads
_UNDECODABLE = re.compile("[\udc80-\udcff]")


class TableRow(NamedTuple):
    """A row of a table.

    Args:
        line: Line of the file in which the row begins; for a JSON array, the position in it, from 1.
        cells: Cells by column name; a missing one is empty.
        error: Why the row cannot be used, or None.
    """

    line: int
    cells: dict[str, Any]
    error: DataError | None = None


class TableFile:
    """A text file with a header and a row of cells per line, read one row at a time.

    The encoding is that of the byte-order mark, else UTF-8, else by default Windows-1252, the extension of Latin-1
    that spreadsheets write. Blank lines are skipped.

    Args:
        source: The file, or its content.
        name: Name of the file in messages; by default its path.
        delimiter: Separator of the cells; None detects it.
        candidates: Delimiters to detect.
        encoding: Encoding of a file that is neither marked nor UTF-8, as Python names it; None is Windows-1252.
        columns: Columns that the file should have, which helps to detect the delimiter.
        keep_bytes: Whether bytes that cannot be decoded are escaped, as in names of files, rather than an error.
        where: Option that names the file, for messages.

    Raises:
        DataError: The file cannot be read, is not text, or a column name occurs twice.
    """

    def __init__(
        self,
        source: Path | bytes,
        *,
        name: str = "",
        delimiter: str | None = None,
        candidates: str = DELIMITERS,
        encoding: str | None = None,
        columns: Collection[str] = (),
        keep_bytes: bool = False,
        where: str = "",
    ) -> None:
        self.name = name or (escape_name(source) if isinstance(source, Path) else "the table")
        self._where, self._keep_bytes = where, keep_bytes
        self._source = source
        try:
            if isinstance(source, Path) and not source.is_file():
                self._source = source.read_bytes()  # a pipe can be read only once
            self.encoding, self.notes = self._detect_encoding(encoding)
            with self._open() as file:
                self._num_skipped, own = self._skip_separator_line(file)
                sample = list(itertools.islice(file, _NUM_SNIFFED))
            csv.field_size_limit(_MAX_CELL)  # of the whole process; there is no other way
            self.delimiter = delimiter or own or _detect_delimiter(sample, candidates, columns)
            header: list[str] = next((row for row in self._parse(iter(sample)) if row), [])
        except (OSError, csv.Error, UnicodeError, LookupError) as error:
            raise self._unreadable_error(error) from None
        self.header = [cell.strip() for cell in header]
        while self.header and not self.header[-1]:
            self.header.pop()
        repeated = sorted({name for name in self.header if self.header.count(name) > 1})
        if repeated:
            raise DataError(
                f"column '{escape_name(repeated[0])}' occurs twice",
                where=self.name,
                fix="give each column its own name",
            )

    def rows(self) -> Iterator[TableRow]:
        """Yield the rows.

        Raises:
            DataError: There are none, or the file cannot be read.
        """
        found = self._read_rows()
        first = next(found, None)
        if first is None:
            raise DataError(
                f"'{self.name}' has no rows",
                where=self._where,
                why="it has only a header" if self.header else "it is empty",
                fix="add at least one row below the header",
            )
        yield first
        yield from found

    def find_file_name(self, folder: Path, name: str) -> str:
        """Return a name in a cell as the folder has it, or unchanged if it has none.

        A name may also have backslashes, or bytes in the encoding of the table.
        """
        if name.isascii() and "\\" not in name:
            return name
        as_bytes = os.fsdecode(name.encode(self.encoding, errors="surrogateescape"))
        forms = (name, as_bytes, *(each.replace("\\", "/") for each in (name, as_bytes)))
        return next((form for form in forms if (folder / form).is_file()), name)

    def _read_rows(self) -> Iterator[TableRow]:
        with self._open() as file:
            self._skip_separator_line(file)
            reader = self._parse(file)
            num_records = 0
            while True:
                line = self._num_skipped + reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield TableRow(line, {}, self._unreadable_error(error, line))
                    continue
                except (OSError, UnicodeError) as error:
                    raise self._unreadable_error(error, line) from None
                num_records += bool(cells)
                if cells and num_records > 1:
                    yield self._check_row(line, cells)

    def _check_row(self, line: int, cells: list[str]) -> TableRow:
        num_columns, where = len(self.header), f"{self.name}, line {line}"
        error = None
        if len(cells) < num_columns or any(cell.strip() for cell in cells[num_columns:]):
            error = DataError(
                f"{len(cells)} cells under a header of {num_columns}",
                where=where,
                fix="correct the row, quote cells that hold the delimiter, or name another --data.delimiter",
            )
        elif not self._keep_bytes and any(map(_UNDECODABLE.search, cells)):
            error = self._unreadable_error(ValueError(f"a cell has bytes that are not {self.encoding}"), line)
        return TableRow(line, dict(zip(self.header, [*cells, *[""] * num_columns], strict=False)), error)

    def _parse(self, lines: Iterator[str]) -> Any:
        return csv.reader(lines, delimiter=self.delimiter, skipinitialspace=True, strict=True)

    def _open_binary(self) -> BinaryIO:
        return self._source.open("rb") if isinstance(self._source, Path) else io.BytesIO(self._source)

    def _open(self) -> TextIO:
        errors = "strict" if "16" in self.encoding or "32" in self.encoding else "surrogateescape"
        return io.TextIOWrapper(self._open_binary(), encoding=self.encoding, errors=errors, newline="")

    def _detect_encoding(self, encoding: str | None) -> tuple[str, tuple[str, ...]]:
        """Return the encoding, and a note if it is not evident."""
        codecs.lookup(encoding or "cp1252")
        with self._open_binary() as file:
            head = file.read(1024)
            file.seek(0)
            mark = next((found for mark, found in _MARKS.items() if head.startswith(mark)), None)
            if mark:
                return mark, ()
            if b"\0" in head or head.startswith(_WORKBOOKS):
                if not head.startswith(_WORKBOOKS) and head[:2].count(b"\0") == 1:
                    return ("utf-16-be" if head[0] == 0 else "utf-16-le"), ()
                raise DataError(
                    f"'{self.name}' is not a text file",
                    where=self._where,
                    why="it is a workbook of a spreadsheet" if head.startswith(_WORKBOOKS) else "it has NUL bytes",
                    fix="save it as CSV in UTF-8",
                )
            wrong, is_utf8 = 0, False
            for number, line in enumerate(file, start=1):
                if not line.isascii():
                    try:
                        is_utf8 = bool(line.decode())
                    except UnicodeDecodeError:
                        wrong = wrong or number
        if not wrong or (is_utf8 and encoding is None):
            return "utf-8", ()
        note = f"'{self.name}' is read as Windows-1252, because line {wrong} is not UTF-8"
        return encoding or "cp1252", () if encoding else (note,)

    def _skip_separator_line(self, file: TextIO) -> tuple[int, str | None]:
        """Skip a first line `sep=;`, and return the number of skipped lines and the delimiter that it names."""
        named = _SEPARATOR_LINE.fullmatch(file.readline(16))
        if named is None:
            file.seek(0)
        return int(named is not None), None if named is None else named[1]

    def _unreadable_error(self, error: Exception, line: int | None = None) -> DataError:
        where = self._where if line is None else f"{self.name}, line {line}"
        why = getattr(error, "strerror", None) or str(error)
        fix = "correct the quotes of the row" if isinstance(error, csv.Error) else "give a CSV file in UTF-8"
        return DataError(f"cannot read '{self.name}'", where=where, why=why, fix=fix)


def is_json_name(name: str) -> bool:
    """Return True if a file is JSON or JSON lines by its name."""
    return name.lower().endswith((".json", ".jsonl", ".ndjson"))


def read_json_rows(source: Path | bytes, *, name: str = "") -> Iterator[TableRow]:
    """Yield the rows of a JSON array, of JSON lines, or of a single JSON object.

    Raises:
        DataError: The file cannot be read, or holds none of these.
    """
    name = name or (escape_name(source) if isinstance(source, Path) else "the rows")
    try:
        content = source.read_bytes() if isinstance(source, Path) else source
        text = content.decode(json.detect_encoding(content))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot read '{name}'", why=why, fix="give rows in JSON") from None
    try:
        value = parse_json(text, name)
    except DataError:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [_parse_json_row(number, line, f"{name}, line {number}") for number, line in lines]
        if all(row.error for row in rows):
            raise
        yield from rows
        return
    rows = value if isinstance(value, list) else [value]
    if not rows:
        raise DataError(f"'{name}' has no rows", why="it is an empty list", fix="add at least one row")
    yield from (_check_json_row(number, row, f"{name}, row {number}") for number, row in enumerate(rows, start=1))


def parse_json(content: bytes | str, where: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        DataError: It is not JSON, or nested too deeply.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError("this is not JSON", where=where, why=why, fix="correct it") from None


def _parse_json_row(line: int, text: str, where: str) -> TableRow:
    try:
        return _check_json_row(line, parse_json(text, where), where)
    except DataError as error:
        return TableRow(line, {}, error)


def _check_json_row(line: int, row: Any, where: str) -> TableRow:
    if isinstance(row, dict):
        return TableRow(line, row)
    error = DataError(
        f"{type(row).__name__} is not a row", where=where, fix="give an object of column names and values"
    )
    return TableRow(line, {}, error)


def _detect_delimiter(lines: list[str], candidates: str, columns: Collection[str]) -> str:
    """Return the delimiter with the most expected columns, then with the most rows as long as the header."""

    def score(delimiter: str) -> tuple[int, float, int]:
        reader = csv.reader(iter(lines), delimiter=delimiter, skipinitialspace=True)
        rows = [row for row in reader if row]
        if not rows or len(rows[0]) < 2:
            return 0, 0.0, 0
        known = len({cell.strip() for cell in rows[0]} & set(columns))
        return known, sum(len(row) == len(rows[0]) for row in rows) / len(rows), len(rows[0])

    return max(candidates, key=score)
