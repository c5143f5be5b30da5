"""Rows of a table as model inputs: numbers standardized, text columns one-hot encoded.

Shapes: n rows, f features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneforge import DataError, Inputs, component, option
from tuneforge.builtin.targets import compute_mean_and_scale
from tuneforge.errors import suggest_name

if TYPE_CHECKING:
    from tuneforge import TensorTree

MISSING_VALUES = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
"""Cells of a numeric column that stand for a missing value, in any case."""

_MAX_CATEGORIES = 50  # a text column with more distinct values is a name or an identifier
NUMBER, NUMBER_OR_NONE, TEXT = "number", "number-or-none", "text"


@component(api=1)
class TableInputs(Inputs):
    """A row of a table as features (f,): standardized numbers, and one-hot encoded text.

    A missing number becomes the training mean, with an indicator feature if the training split has missing numbers. A
    missing text, or one that is not in the training split, is all zeros.
    """

    tabular = True

    columns: tuple[str, ...] = option(help="Names of the columns.")
    column_types: tuple[str, ...] = option(help="Type of each column: number, number-or-none or text.")
    means: tuple[float, ...] = option(help="Training mean of each numeric column; 0 for text.")
    scales: tuple[float, ...] = option(help="Training std of each numeric column; 1 for text.")
    categories: tuple[tuple[str, ...], ...] = option(help="Known values of each text column; empty for numbers.")

    def decode(self, raw: Any) -> Tensor:
        """Return the features (f,) of a row.

        Args:
            raw: Cells by column name, as text or values; other columns are ignored. Also a JSON object as bytes, or the
                path of a file with one.

        Raises:
            DataError: A column is missing, or has text instead of a number.
        """
        row = _load_json(raw) if isinstance(raw, (bytes, Path)) else raw
        if not isinstance(row, Mapping):
            raise DataError(f"{type(row).__name__} is not a row", fix="give a mapping from column name to value")
        for name in self.columns:
            if name not in row:
                raise DataError(f"column '{name}' is missing", where="the row", fix=suggest_name(name, map(str, row)))
        return self.to_features({name: [row[name]] for name in self.columns})[0]

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

    def to_features(self, columns: Mapping[str, Sequence[Any]]) -> Tensor:
        """Return the features, float32 (n, f), of cells (n,) by column; each row is independent of the others."""
        blocks = [self._encode_column(index, columns[name]) for index, name in enumerate(self.columns)]
        return torch.from_numpy(np.concatenate(blocks, 1).astype(np.float32))

    def _encode_column(self, index: int, cells: Sequence[Any]) -> NDArray[np.float64]:
        if self.column_types[index] == TEXT:
            place = {value: number for number, value in enumerate(self.categories[index])}
            chosen = np.array([place.get(_strip_text(cell), -1) for cell in cells])
            flags: NDArray[np.float64] = (chosen[:, None] == np.arange(len(place))).astype(np.float64)
            return flags
        values = np.array([_parse_cell(cell, self.columns[index]) for cell in cells])
        gaps = np.isnan(values)
        scaled = np.where(gaps, 0.0, (values - self.means[index]) / self.scales[index])
        return np.stack([scaled, gaps], 1) if self.column_types[index] == NUMBER_OR_NONE else scaled[:, None]

    def _get_num_features(self, index: int) -> int:
        return {NUMBER: 1, NUMBER_OR_NONE: 2}.get(self.column_types[index], len(self.categories[index]))

    def _format_cell(self, index: int, block: list[float]) -> str:
        if self.column_types[index] == TEXT:
            return self.categories[index][block.index(1.0)] if 1.0 in block else "?"
        missing = self.column_types[index] == NUMBER_OR_NONE and block[1] == 1.0
        return "?" if missing else f"{block[0] * self.scales[index] + self.means[index]:.6g}"


def infer_inputs(columns: Mapping[str, list[str]], train: list[int], *, where: str) -> tuple[TableInputs, list[str]]:
    """Return the inputs, and notes on skipped columns.

    The type of a column is inferred from all cells, its statistics and categories from the training rows.
    """
    kept: dict[str, tuple[str, float, float, tuple[str, ...]]] = {}
    notes = []
    for name, cells in columns.items():
        described = _infer_column(cells, train)
        if isinstance(described, str):
            notes.append(f"column '{name}' is skipped: {described}")
        else:
            kept[name] = described
    if not kept:
        raise DataError("no column can serve as an input", where=where, why="; ".join(notes), fix="add other columns")
    kinds, means, scales, categories = zip(*kept.values(), strict=True)
    return TableInputs(
        columns=tuple(kept), column_types=kinds, means=means, scales=scales, categories=categories
    ), notes


def _infer_column(cells: list[str], train: list[int]) -> tuple[str, float, float, tuple[str, ...]] | str:
    """Return type, mean, scale and categories of a column, or why it is skipped."""
    if all(cell.strip().lower() in MISSING_VALUES for cell in cells):
        return "it is empty"
    numbers = [math.nan if cell.strip().lower() in MISSING_VALUES else parse_number(cell) for cell in cells]
    if None in numbers:
        values = sorted({_strip_text(cells[row]) for row in train} - {""})
        few = len(values) <= _MAX_CATEGORIES
        return (
            (TEXT, 0.0, 1.0, tuple(values))
            if few
            else f"it has {len(values)} distinct texts, more than {_MAX_CATEGORIES}"
        )
    trained = np.array(numbers, dtype=np.float64)[train]
    present = trained[~np.isnan(trained)]
    if not len(present):
        return "it is empty in the training split"
    mean, scale = compute_mean_and_scale(present)
    kind = NUMBER_OR_NONE if len(present) < len(trained) else NUMBER
    return kind, float(mean), float(scale), ()


def parse_number(cell: str | float) -> float | None:
    """Return the finite number in a cell, or None."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _parse_cell(cell: Any, name: str) -> float:
    """Return the number in a cell, NaN if it is missing."""
    if cell is None or (isinstance(cell, str) and cell.strip().lower() in MISSING_VALUES):
        return math.nan
    number = parse_number(cell) if isinstance(cell, (str, int, float)) and not isinstance(cell, bool) else None
    if number is None:
        raise DataError(
            f"{cell!r} is not a number", where=f"column '{name}'", fix="give a finite number, or leave it empty"
        )
    return number


def _strip_text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _load_json(raw: bytes | Path) -> Any:
    try:
        return json.loads(raw.read_bytes() if isinstance(raw, Path) else raw)
    except (OSError, ValueError) as error:
        where = str(raw) if isinstance(raw, Path) else ""
        raise DataError("this is not a JSON object", where=where, why=str(error), fix="give a row as JSON") from None
