"""Rows of a table as model inputs: numbers standardized, text columns one-hot encoded.

Shapes: n rows, f features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneforge import DataError, Inputs, component, option
from tuneforge.builtin.checks import DELIMITER
from tuneforge.builtin.datasets.tables.cell_values import (
    detect_decimal,
    is_missing,
    parse_number,
    parse_truth_value,
    to_text,
)
from tuneforge.errors import suggest_name
from tuneforge.plugin import DELIMITERS, TableFile, TableRow, is_json_name, parse_json, read_json_rows

if TYPE_CHECKING:
    from tuneforge import TensorTree

NUMBER, NUMBER_OR_NONE, TEXT = "number", "number-or-none", "text"

_MAX_FEATURE = 1e18  # the square of a larger one overflows float32


@component(api=1)
class TableInputs(Inputs):
    """A row of a table as features (f,): standardized numbers, and one-hot encoded text.

    A missing number becomes the training mean, with an indicator feature if the training split has missing numbers. A
    missing text, or one that is not in the training split, is all zeros; predictions name the latter.
    """

    tabular = True

    columns: tuple[str, ...] = option(help="Names of the columns.")
    column_types: tuple[str, ...] = option(help="Type of each column: number, number-or-none or text.")
    means: tuple[float, ...] = option(help="Training mean of each numeric column; 0 for text.")
    scales: tuple[float, ...] = option(help="Training std of each numeric column; 1 for text.")
    categories: tuple[tuple[str, ...], ...] = option(help="Known values of each text column; empty for numbers.")
    missing_values: tuple[str, ...] = option(default=(), help="Further cells that stand for a missing value.")
    delimiter: str | None = option(default=None, help="Delimiter of the training file.", check=DELIMITER)
    encoding: str | None = option(default=None, help="Encoding of files that are not UTF-8.")
    decimal: str = option(default="", help="Decimal mark of numbers in files, where a file leaves it open.")

    def decode(self, raw: Any) -> Tensor:
        """Return the features (f,) of a row.

        Args:
            raw: Cells by column name, as text or values, a mapping or a Series; other columns are ignored. Also a JSON
                object as bytes, or the path of a file with one.

        Raises:
            DataError: A column is missing, or has text instead of a number.
        """
        row = _to_row(raw)
        self.require_columns(row, where="the row")
        return self.to_features({name: [row[name]] for name in self.columns})[0]

    def describe_input(self, raw: Any) -> dict[str, Any]:
        """Return the texts of a row that the training split does not have, by column, as `unseen`; else nothing."""
        row = _to_row(raw)
        texts = {name: self.get_text(row[name]) for name in self.columns}
        unseen = {
            name: texts[name]
            for index, name in enumerate(self.columns)
            if self.column_types[index] == TEXT and texts[name] and self.find_category(index, row[name]) < 0
        }
        return {"unseen": unseen} if unseen else {}

    def read_file(self, source: Path | bytes, *, name: str = "") -> Iterator[tuple[str, Any]]:
        """Yield the rows of a CSV or JSON file, in any dialect that `tuneforge run` reads.

        Raises:
            DataError: The file cannot be read, or its header lacks a column.
        """
        name = name or str(source)
        content = source if isinstance(source, bytes) else b""
        if is_json_name(name) or content.lstrip()[:1] in (b"{", b"["):
            rows = read_json_rows(source, name=name)
        else:
            candidates = (self.delimiter or "") + DELIMITERS
            table = TableFile(source, name=name, candidates=candidates, encoding=self.encoding, columns=self.columns)
            self.require_columns(table.header, where=name)
            rows = iter(self._parse_numbers(list(table.rows()), table.delimiter))
        for row in rows:
            yield f"{name}:{row.line}", row.error or row.cells

    def preprocess(self, samples: TensorTree) -> Any:
        """Return the features (b, f) unchanged."""
        return samples

    def render_text(self, sample: TensorTree) -> str:
        """Return the cells of the row by name, a missing one as "?"."""
        assert isinstance(sample, Tensor)
        widths = [self._get_num_features(index) for index in range(len(self.columns))]
        blocks = sample.double().tolist()
        shown = []
        for index, name in enumerate(self.columns):
            block = blocks[sum(widths[:index]) : sum(widths[: index + 1])]
            shown.append(f"{name} {self._format_cell(index, block)}")
        return ", ".join(shown)[:200]

    def require_columns(self, names: Iterable[Any], *, where: str) -> None:
        """Raise an error if a column is not among `names`.

        Raises:
            DataError: A column is missing.
        """
        present = set(names)
        for name in self.columns:
            if name not in present:
                raise DataError(f"column '{name}' is missing", where=where, fix=suggest_name(name, map(str, present)))

    def to_features(self, columns: Mapping[str, Sequence[Any]]) -> Tensor:
        """Return the features, float32 (n, f), of cells (n,) by column; each row is independent of the others.

        Raises:
            DataError: A cell of a numeric column is not a number that the model can compute with.
        """
        blocks = [self._encode_column(index, columns[name]) for index, name in enumerate(self.columns)]
        return torch.from_numpy(np.concatenate(blocks, 1).astype(np.float32))

    def get_text(self, cell: Any) -> str:
        """Return a cell of a text column as text, empty if it is missing."""
        return to_text(cell, self.missing_values)

    def find_category(self, index: int, cell: Any) -> int:
        """Return the position of a cell among the categories of a column, -1 if it is none of them.

        In a column of truth values any spelling of one is that value, and 12.0 is the category 12.
        """
        text, known = self.get_text(cell), self.categories[index]
        forms = [text]
        if not isinstance(cell, str) and text.endswith(".0"):
            forms.append(text.removesuffix(".0"))
        truth = parse_truth_value(text)
        if truth is not None and all(parse_truth_value(each) is not None for each in known):
            forms += [each for each in known if parse_truth_value(each) is truth]
        return next((known.index(form) for form in forms if form in known), -1)

    def _encode_column(self, index: int, cells: Sequence[Any]) -> NDArray[np.float64]:
        if self.column_types[index] == TEXT:
            place = {
                cell: self.find_category(index, cell) for cell in {each for each in cells if isinstance(each, str)}
            }
            chosen = np.array(
                [place[cell] if isinstance(cell, str) else self.find_category(index, cell) for cell in cells]
            )
            flags: NDArray[np.float64] = (chosen[:, None] == np.arange(len(self.categories[index]))).astype(np.float64)
            return flags
        values = np.array([self._parse_cell(cell, self.columns[index]) for cell in cells])
        gaps = np.isnan(values)
        scaled = np.where(gaps, 0.0, (values - self.means[index]) / self.scales[index])
        too_large = np.flatnonzero(np.abs(scaled) > _MAX_FEATURE)
        if len(too_large):
            raise _cell_error(cells[too_large[0]], self.columns[index], "is too large for the model")
        return np.stack([scaled, gaps], 1) if self.column_types[index] == NUMBER_OR_NONE else scaled[:, None]

    def _parse_cell(self, cell: Any, name: str) -> float:
        """Return the number in a cell, NaN if it is missing."""
        number = parse_number(cell)
        if (number is None or self.missing_values) and is_missing(cell, self.missing_values):
            return np.nan
        if number is None:
            raise _cell_error(cell, name, "is not a number")
        return number

    def _parse_numbers(self, rows: list[TableRow], delimiter: str) -> list[TableRow]:
        """Return rows of a file with numbers in place of the text of numeric columns, where it is a number."""
        whole = [row for row in rows if row.error is None]
        numeric = [name for name, kind in zip(self.columns, self.column_types, strict=True) if kind != TEXT]
        cells = {name: [row.cells[name] for row in whole] for name in numeric}
        for name, decimal in detect_decimals(cells, delimiter, self.decimal).items():
            for row in whole:
                number = (
                    None if is_missing(row.cells[name], self.missing_values) else parse_number(row.cells[name], decimal)
                )
                row.cells[name] = row.cells[name] if number is None else number
        return rows

    def _get_num_features(self, index: int) -> int:
        return {NUMBER: 1, NUMBER_OR_NONE: 2}.get(self.column_types[index], len(self.categories[index]))

    def _format_cell(self, index: int, block: list[float]) -> str:
        if self.column_types[index] == TEXT:
            return self.categories[index][block.index(1.0)] if 1.0 in block else "?"
        missing = self.column_types[index] == NUMBER_OR_NONE and block[1] == 1.0
        return "?" if missing else f"{block[0] * self.scales[index] + self.means[index]:.6g}"


def detect_decimals(columns: Mapping[str, Sequence[Any]], delimiter: str, default: str = "") -> dict[str, str]:
    """Return the decimal mark of each column: its own, or that of the table, or the default, or a point."""
    own = {name: detect_decimal(cells, delimiter) for name, cells in columns.items()}
    marks = list(own.values())
    common = "," if marks.count(",") > marks.count(".") else "." if "." in marks else default or "."
    return {name: mark or common for name, mark in own.items()}


def _cell_error(cell: Any, name: str, what: str) -> DataError:
    shown = to_text(cell) if isinstance(cell, int) and not isinstance(cell, bool) else repr(cell)
    return DataError(
        f"{shown if len(shown) <= 40 else shown[:40] + '...'} {what}",
        where=f"column '{name}'",
        fix="give a number that is not Inf in float32, or leave the cell empty",
    )


def _to_row(raw: Any) -> Mapping[str, Any]:
    """Return the cells by column of any form of a row that `decode` takes."""
    where = str(raw) if isinstance(raw, Path) else ""
    if isinstance(raw, Path):
        try:
            raw = raw.read_bytes()
        except OSError as error:
            raise DataError("cannot read the row", where=where, why=error.strerror or "") from None
    if isinstance(raw, bytes):
        raw = parse_json(raw, where)
    elif not isinstance(raw, Mapping) and hasattr(raw, "to_dict"):
        raw = raw.to_dict()  # a Series of pandas
    if not isinstance(raw, Mapping):
        raise DataError(
            f"{type(raw).__name__} is not a row", where=where, fix="give a mapping from column name to value"
        )
    return raw
