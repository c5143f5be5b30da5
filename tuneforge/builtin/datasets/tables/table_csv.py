"""`table-csv`: the rows of a CSV file as samples, one column as the target.

Shapes: n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneforge import Data, DataError, OptionError, Split, Targets, component, hookimpl, option
from tuneforge.builtin.checks import DELIMITER, FRACTION_OR_ZERO, RARE_CLASSES_HELP
from tuneforge.builtin.datasets.group_splits import split_by_time, split_groups
from tuneforge.builtin.datasets.row_splits import find_rare, group_rows_by_class, split_rows
from tuneforge.builtin.datasets.tables.cell_values import is_missing, parse_number
from tuneforge.builtin.datasets.tables.table_columns import ColumnReader, Table
from tuneforge.builtin.datasets.tables.table_inputs import TableInputs
from tuneforge.builtin.datasets.tables.target_arrays import (
    encode_classes,
    fit_number_targets,
    infer_class_names,
    standardize,
)
from tuneforge.builtin.targets import ClassTargets, RegressionTargets
from tuneforge.errors import suggest_name
from tuneforge.plugin import TableFile

if TYPE_CHECKING:
    from tuneforge import Run

_MAX_CLASSES = 20  # of a column of whole numbers that `auto` takes for classes
_MAX_STRAY_SHARE = 0.1  # of the cells of a numeric target that are taken for typing errors


@component(api=1)
class TableCsv:
    """Rows of a CSV file with a header; all columns but the target are inputs."""

    path: Path = option(help="The file.")
    target: str = option(help="Name of the column to predict.")
    task: Literal["auto", "classification", "regression"] = option(
        default="auto", help="Task; auto is regression if the target has numbers other than up to 20 distinct integers."
    )
    unit: str = option(default="", help="Unit of a numeric target.")
    val: float = option(default=0.15, help="Fraction of the rows for validation; 0 for none.", check=FRACTION_OR_ZERO)
    test: float = option(
        default=0.15, help="Fraction of the rows for the test split; 0 for none.", check=FRACTION_OR_ZERO
    )
    rare_classes: Literal["raise", "train", "drop"] = option(default="raise", help=RARE_CLASSES_HELP)
    group: str | None = option(
        default=None, help="Column whose equal values stay in one split, such as a patient; it is no input."
    )
    time: str | None = option(
        default=None, help="Column by which rows are split: the earliest for training, the latest for test; no input."
    )
    delimiter: str | None = option(
        default=None, help="Separator of cells; default: the comma, semicolon, tab or | of the header.", check=DELIMITER
    )
    encoding: str | None = option(
        default=None, help="Encoding of a file that is neither UTF-8 nor marked; default: Windows-1252."
    )
    missing_target: Literal["raise", "skip", "keep"] = option(
        default="raise",
        help="What to do about rows whose target is missing: raise an error, skip them, or keep cells such as NA as a "
        "class of that name.",
    )
    missing_values: tuple[str, ...] = option(
        default=(), help="Further cells that stand for a missing value, such as -99999."
    )

    def __attrs_post_init__(self) -> None:
        if self.val + self.test >= 1:
            raise OptionError(f"val {self.val} and test {self.test} leave nothing for training", fix="lower them")
        if self.group is not None and self.time is not None:
            raise OptionError("rows cannot be split by group and by time", fix="give one of the two columns")

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Read and split the rows, and encode them with the statistics of the training split.

        A restored run keeps its columns, classes and scales.

        Raises:
            DataError: The file cannot be read, or its data cannot be used.
        """
        table, notes = self._read_table()
        num_splits = 1 if run.single_split else 1 + (self.val > 0) + (self.test > 0)
        num_splits = 1 if self.group or self.time else num_splits  # these splits are not stratified by class
        known, where = run.data if run.restoring else None, f"{self.path}, column '{self.target}'"
        restored = known.inputs if known is not None and isinstance(known.inputs, TableInputs) else None
        missing_values = self.missing_values or (restored.missing_values if restored else ())
        task = self.task if known is None else _get_restored_task(known.targets, self.task)
        reader = ColumnReader(table, missing_values=missing_values, decimal=restored.decimal if restored else "")
        target = self._read_target(reader, task)
        if target.dtype.kind != "f" and self.rare_classes != "raise":
            rare, names = find_rare(target, num_splits)
            done = "left out" if self.rare_classes == "drop" else "in training alone, and not evaluated"
            notes += [f"classes with fewer than {num_splits} samples are {done}: {names}"] * bool(names)
            if self.rare_classes == "drop" and names:
                table, target = table.select(np.flatnonzero(~rare).tolist()), target[~rare]
                reader = ColumnReader(
                    table, missing_values=missing_values, decimal=restored.decimal if restored else ""
                )
        targets, pools = self._build_targets(target, known, where, num_splits=num_splits)
        whole = torch.arange(len(target))
        rows = [whole] if run.single_split else self._split(table, pools, run.data_seed, where)
        if isinstance(targets, RegressionTargets) and known is None:
            targets = fit_number_targets(target[rows[0].numpy()], names=(self.target,), units=(self.unit,), where=where)
        inputs = restored or reader.infer_inputs(
            [name for name in table.columns if name not in (self.target, self.group, self.time)],
            rows[0].tolist(),
            delimiter=self.delimiter,
            encoding=self.encoding,
        )
        features, stored = reader.to_features(inputs), _encode_targets(target, targets, where)
        ids = [f"{self.path.name}:{line}" for line in table.lines]
        parts = [Split(features[part], stored[part], ids=[ids[row] for row in part.tolist()]) for part in rows]
        train, val, test = parts * 3 if run.single_split else parts
        notes = [*notes, *reader.notes, self._describe_target(targets)]
        return Data(train=train, val=val, test=test, inputs=inputs, targets=targets, notes=tuple(notes))

    def _split(self, table: Table, pools: list[Tensor], seed: int, where: str) -> Sequence[Tensor]:
        """Return the rows of train, val and test: by group, by time, or stratified by class."""
        for column in (self.group, self.time):
            if column is not None and column not in table.columns:
                fix = suggest_name(column, table.columns)
                raise DataError(f"there is no column '{column}'", where=str(self.path), fix=fix)
        place = f"{self.path}, column '{self.group or self.time}'"
        if self.group is not None:
            return split_groups(table.columns[self.group], val=self.val, test=self.test, seed=seed, where=place)
        if self.time is not None:
            return split_by_time(table.columns[self.time], val=self.val, test=self.test, where=place)
        keep_few = self.rare_classes == "train"
        return split_rows(pools, val=self.val, test=self.test, seed=seed, where=where, keep_few=keep_few)

    def _read_table(self) -> tuple[Table, list[str]]:
        """Return the rows that have a target, and notes."""
        file = TableFile(
            self.path, delimiter=self.delimiter, encoding=self.encoding, columns=(self.target,), where="--data.path"
        )
        rows = []
        for row in file.rows():
            if row.error is not None:
                raise row.error
            rows.append(row)
        columns = {name: [row.cells[name] for row in rows] for name in file.header}
        table = Table(str(self.path), columns, [row.line for row in rows], file.delimiter)
        if self.target not in columns:
            raise DataError(
                f"there is no column '{self.target}'", where=str(self.path), fix=suggest_name(self.target, columns)
            )
        gone = [row for row, cell in enumerate(columns[self.target]) if self._lacks_target(cell)]
        if not gone:
            return table, list(file.notes)
        first = table.describe_cells(self.target, gone)
        if self.missing_target != "skip":
            raise DataError(
                f"{len(gone)} row(s) have no '{self.target}'",
                where=f"{self.path}, line {table.lines[gone[0]]}",
                why=f"a row without a target cannot be used; {first}",
                fix="fill these cells in, or skip these rows: --data.missing-target skip"
                + (
                    "; if such cells are a class, keep it: --data.missing-target keep"
                    if any(columns[self.target][row].strip() for row in gone)
                    else ""
                ),
            )
        skipped = set(gone)
        rest = table.select([row for row in range(len(rows)) if row not in skipped])
        if not rest.lines:
            raise DataError(f"no row has a '{self.target}'", where=str(self.path), fix="fill the column in")
        return rest, [*file.notes, f"{len(gone)} row(s) without '{self.target}' are skipped, {first}"]

    def _lacks_target(self, cell: str) -> bool:
        if self.missing_target == "keep":
            return not cell.strip() or cell.strip() in self.missing_values
        return is_missing(cell, self.missing_values)

    def _read_target(self, reader: ColumnReader, task: str) -> NDArray[Any]:
        """Return the target column (n,): text or integers for classes, float64 for regression."""
        table = reader.table
        cells = [cell.strip() for cell in table.columns[self.target]]
        numbers = [parse_number(cell, reader.decimals[self.target]) for cell in cells]
        wrong = [row for row, number in enumerate(numbers) if number is None]
        whole = all(cell == f"{number:.0f}" for cell, number in zip(cells, numbers, strict=True) if number is not None)
        few = whole and len(set(cells)) <= _MAX_CLASSES
        is_typing_error = task == "auto" and not few and 0 < len(wrong) <= _MAX_STRAY_SHARE * len(cells)
        if wrong and (task == "regression" or is_typing_error):
            raise DataError(
                f"'{self.target}' is not a number everywhere",
                where=f"{table.name}, line {table.lines[wrong[0]]}",
                why=f"{len(wrong)} of {len(cells)} cells are not, {table.describe_cells(self.target, wrong)}",
                fix="correct the cell, or use --data.task classification",
            )
        if task == "regression" or (task == "auto" and not wrong and not few):
            return np.array(numbers, dtype=np.float64)
        return np.array(cells) if wrong or not whole else np.array([int(cell) for cell in cells])

    def _build_targets(
        self, target: NDArray[Any], known: Data | None, where: str, *, num_splits: int
    ) -> tuple[Targets, list[Tensor]]:
        """Return the targets, and the groups of rows to split: those of each class, or all rows."""
        restored = None if known is None else known.targets
        if target.dtype.kind == "f":
            targets = (
                restored
                if isinstance(restored, RegressionTargets)
                else RegressionTargets(names=(self.target,), units=(self.unit,))
            )
            return targets, [torch.arange(len(target))]
        classes = restored if isinstance(restored, ClassTargets) else ClassTargets(names=infer_class_names(target))
        codes = encode_classes(target, classes.names, by_name=True, where=where)
        return classes, group_rows_by_class(
            codes,
            classes,
            num_splits=num_splits,
            allow_empty=known is not None,
            allow_few=self.rare_classes == "train",
            where=where,
        )

    def _describe_target(self, targets: Targets) -> str:
        if isinstance(targets, ClassTargets):
            return (
                f"'{self.target}' is read as {targets.num_outputs} classes; --data.task regression reads it as a number"
            )
        return f"'{self.target}' is read as a number; --data.task classification reads it as classes"


def _get_restored_task(targets: Targets, task: str) -> str:
    """Return the task of a restored run, or `task` if its targets are of another kind."""
    return (
        "classification"
        if isinstance(targets, ClassTargets)
        else "regression"
        if isinstance(targets, RegressionTargets)
        else task
    )


def _encode_targets(target: NDArray[Any], targets: Targets, where: str) -> Tensor:
    if isinstance(targets, RegressionTargets):
        return standardize(target, targets)
    return encode_classes(target, targets.labels, by_name=True, where=where)
