"""Columns of a table: which are numbers and which are text, their statistics, and what is unusual in them.

Shapes: n rows, f features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tuneforge import DataError
from tuneforge.builtin.datasets.tables.cell_values import (
    is_code,
    is_missing,
    is_nothing,
    parse_number,
    parse_truth_value,
    to_text,
)
from tuneforge.builtin.datasets.tables.table_inputs import (
    NUMBER,
    NUMBER_OR_NONE,
    TEXT,
    TableInputs,
    detect_decimals,
)
from tuneforge.builtin.targets import compute_mean_and_scale

_MAX_CATEGORIES = 50  # a text column with more distinct values is a name or an identifier
_MAX_STRAY_SHARE = 0.1  # of the cells of a numeric column that may be no numbers
_OUTLIER_RATIO = 5  # of the standard deviation to that of the middle values, from which outliers flatten a column

Numbers = NDArray[np.float64]


@attrs.frozen(eq=False)
class Table:
    """Cells of a table.

    Args:
        name: Name for messages, such as the path of the file.
        columns: Cells (n,) by column name, as text or values.
        lines: Name of each row for messages and ids, such as its line.
        delimiter: Delimiter of the file; empty if it comes from none.
    """

    name: str
    columns: dict[str, list[Any]]
    lines: list[int]
    delimiter: str = ""

    def select(self, rows: Sequence[int]) -> Table:
        """Return the table of these rows only."""
        columns = {name: [cells[row] for row in rows] for name, cells in self.columns.items()}
        return attrs.evolve(self, columns=columns, lines=[self.lines[row] for row in rows])

    def describe_cells(self, column: str, rows: Sequence[int]) -> str:
        """Return the first of some cells with its line, for messages."""
        text = str(self.columns[column][rows[0]]).strip()
        shown = text if len(text) <= 40 else text[:40] + "..."
        return f"the first in line {self.lines[rows[0]]}: '{shown}'"


class ColumnReader:
    """Reads the columns of a table, and collects notes on what is unusual in them.

    Args:
        table: The table.
        missing_values: Further cells that stand for a missing value.
        decimal: Decimal mark where the table leaves it open.
    """

    def __init__(self, table: Table, *, missing_values: Sequence[str] = (), decimal: str = "") -> None:
        self.table, self.missing_values = table, tuple(missing_values)
        self.decimals = detect_decimals(table.columns, table.delimiter, decimal)
        self.notes: list[str] = []
        self._numbers: dict[str, tuple[Numbers, list[int]]] = {}

    def read_numbers(self, name: str) -> tuple[Numbers, list[int]]:
        """Return the numbers of a column (n,), NaN for none, and the rows of other cells that are not missing."""
        if name in self._numbers:
            return self._numbers[name]
        numbers, strays, decimal = [], [], self.decimals[name]
        for row, cell in enumerate(self.table.columns[name]):
            number = parse_number(cell, decimal)
            if (number is None or self.missing_values) and is_missing(cell, self.missing_values):
                number = np.nan
            elif number is None:
                strays.append(row)
            numbers.append(np.nan if number is None else number)
        self._numbers[name] = np.array(numbers), strays
        return self._numbers[name]

    def infer_inputs(self, columns: Sequence[str], train: Sequence[int], **options: Any) -> TableInputs:
        """Return the inputs: the type of a column follows from all cells, its statistics from the training rows.

        Args:
            columns: Names of the columns that may serve as inputs.
            train: Training rows.
            options: Further options of the inputs.

        Raises:
            DataError: No column can serve as an input.
        """
        types: dict[str, tuple[str, float, float, tuple[str, ...]]] = {}
        for name in columns:
            described = self._infer_column(name, train)
            if isinstance(described, str):
                self.notes.append(f"column '{name}' is skipped: {described}")
            else:
                types[name] = described
        if not types:
            raise DataError(
                "no column can serve as an input",
                where=self.table.name,
                why="; ".join(self.notes),
                fix="add other columns",
            )
        kinds, means, scales, categories = zip(*types.values(), strict=True)
        marks = set(self.decimals.values())
        return TableInputs(
            columns=tuple(types),
            column_types=kinds,
            means=means,
            scales=scales,
            categories=categories,
            missing_values=self.missing_values,
            decimal="," if "," in marks else "",
            **options,
        )

    def to_features(self, inputs: TableInputs) -> Tensor:
        """Return the features, float32 (n, f); cells that the inputs cannot use count as missing, and are noted.

        Raises:
            DataError: A column is missing, or more than a tenth of a numeric column are not numbers.
        """
        inputs.require_columns(self.table.columns, where=self.table.name)
        cells: dict[str, Sequence[Any]] = {}
        for index, name in enumerate(inputs.columns):
            if inputs.column_types[index] == TEXT:
                cells[name] = self._read_texts(inputs, index)
                continue
            numbers, strays = self.read_numbers(name)
            cells[name] = numbers.tolist()
            if strays:
                self._note_strays(name, strays)
        return inputs.to_features(cells)

    def _infer_column(self, name: str, train: Sequence[int]) -> tuple[str, float, float, tuple[str, ...]] | str:
        """Return type, mean, scale and categories of a column, or why it is skipped."""
        cells = self.table.columns[name]
        numbers, strays = self.read_numbers(name)
        num_numbers = int((~np.isnan(numbers)).sum())
        if not num_numbers and not strays:
            return "it is empty"
        codes = [row for row in strays if is_code(cells[row])]
        if codes or len(strays) > _MAX_STRAY_SHARE * (num_numbers + len(strays)):
            reason = ""
            if codes:
                reason = f"{len(codes)} cell(s) have leading zeros, {self.table.describe_cells(name, codes)}"
            elif num_numbers > len(strays):
                reason = f"{len(strays)} cell(s) are not numbers, {self.table.describe_cells(name, strays)}"
            return self._infer_text(name, train, reason)
        trained = numbers[list(train)]
        present = trained[~np.isnan(trained)]
        if not len(present):
            return "it is empty in the training split"
        self._note_outliers(name, numbers, train)
        mean, scale = compute_mean_and_scale(present)
        return NUMBER_OR_NONE if len(present) < len(trained) else NUMBER, float(mean), float(scale), ()

    def _infer_text(
        self, name: str, train: Sequence[int], reason: str
    ) -> tuple[str, float, float, tuple[str, ...]] | str:
        cells = self.table.columns[name]
        values = {to_text(cells[row], self.missing_values) for row in train} - {""}
        by_truth = {parse_truth_value(value) for value in values}
        spellings = {value.lower() for value in values}
        if None not in by_truth and len(spellings) == len(by_truth):
            values = spellings
        if len(values) > _MAX_CATEGORIES:
            too_many = f"it has {len(values)} distinct texts, more than {_MAX_CATEGORIES}"
            return f"{too_many}; {reason}" if reason else too_many
        if reason:
            self.notes.append(f"column '{name}' is read as text: {reason}")
        return TEXT, 0.0, 1.0, tuple(sorted(values))

    def _read_texts(self, inputs: TableInputs, index: int) -> list[Any]:
        """Return the cells of a text column, and note those that are no category."""
        name = inputs.columns[index]
        cells = self.table.columns[name]
        texts = {to_text(cell, self.missing_values): cell for cell in cells}
        unknown = {text for text, cell in texts.items() if text and inputs.find_category(index, cell) < 0}
        rows = [row for row, cell in enumerate(cells) if unknown and to_text(cell, self.missing_values) in unknown]
        if rows:
            self.notes.append(
                f"column '{name}': {len(rows)} cell(s) hold a text that the training split does not have, "
                + self.table.describe_cells(name, rows)
            )
        return cells

    def _note_strays(self, name: str, strays: list[int]) -> None:
        count, first = len(strays), self.table.describe_cells(name, strays)
        num_present = sum(not is_nothing(cell) for cell in self.table.columns[name])
        if count > _MAX_STRAY_SHARE * num_present:
            raise DataError(
                f"column '{name}': {count} of {num_present} cells are not numbers",
                where=self.table.name,
                why=f"the model takes a number there; {first}",
                fix="correct these cells, or leave them empty",
            )
        self.notes.append(
            f"column '{name}': {count} of {num_present} cells are not numbers that float32 can hold and count as "
            f"missing, {first}"
        )

    def _note_outliers(self, name: str, numbers: Numbers, train: Sequence[int]) -> None:
        """Note values so far outside the rest that standardization makes the rest equal, such as -99999."""
        trained = numbers[list(train)]
        limits = _find_limits(trained[~np.isnan(trained)])
        if limits is None:
            return
        rows = np.flatnonzero((numbers < limits[0]) | (numbers > limits[1])).tolist()
        value = f"{numbers[rows[0]]:.6g}"
        self.notes.append(
            f"column '{name}': {len(rows)} value(s) are so far outside the rest that standardization makes the rest "
            f"nearly equal, the first in line {self.table.lines[rows[0]]}: {value}; if it stands for a missing value, "
            f"give --data.missing-values={value}"
        )


def _find_limits(values: Numbers) -> tuple[float, float] | None:
    """Return limits outside of which values flatten a column when it is standardized, or None if there are none."""
    low, quarter, median, three_quarters, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
    spread = (three_quarters - quarter) / 1.349  # the standard deviation of a normal distribution
    if not spread:
        spread = values[(values >= low) & (values <= high)].std()
    if 0 < spread * _OUTLIER_RATIO < values.std():
        distance = max(np.abs(values - median).max() / 2, _OUTLIER_RATIO * spread)
        return median - distance, median + distance
    for value in (values.min(), values.max()):  # one value that is too frequent for quartiles to tell
        rest = values[values != value]
        if len(rest) and 0 < rest.std() * 4 * _OUTLIER_RATIO < np.abs(rest.mean() - value):
            middle = (value + (rest.min() if value < rest.min() else rest.max())) / 2
            return (middle, np.inf) if value < rest.min() else (-np.inf, middle)
    return None
