"""`table-csv`: the rows of a CSV file as samples, one column as the target.

Shapes: n rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneforge import Data, DataError, OptionError, Split, Targets, component, hookimpl, option
from tuneforge.builtin.checks import FRACTION
from tuneforge.builtin.datasets.row_splits import group_rows_by_class, split_rows
from tuneforge.builtin.datasets.tables.csv_table import Table, read_table
from tuneforge.builtin.datasets.tables.table_inputs import MISSING_VALUES, TableInputs, infer_inputs, parse_number
from tuneforge.builtin.datasets.tables.target_arrays import (
    encode_classes,
    fit_number_targets,
    infer_class_names,
    standardize,
)
from tuneforge.builtin.targets import ClassTargets, RegressionTargets
from tuneforge.errors import suggest_name
from tuneforge.plugin import Check

if TYPE_CHECKING:
    from tuneforge import Run

_ONE_CHARACTER = Check("one character", lambda text: len(text) == 1, {"minLength": 1, "maxLength": 1})
_MAX_CLASSES = 20  # of a column of whole numbers that `auto` takes for classes


@component(api=1)
class TableCsv:
    """Rows of a CSV file with a header; all columns but the target are inputs."""

    path: Path = option(help="The file.")
    target: str = option(help="Name of the column to predict.")
    task: Literal["auto", "classification", "regression"] = option(
        default="auto", help="Task; auto is regression if the target has numbers other than up to 20 distinct integers."
    )
    unit: str = option(default="", help="Unit of a numeric target.")
    val: float = option(default=0.15, help="Fraction of the rows for validation.", check=FRACTION)
    test: float = option(default=0.15, help="Fraction of the rows for the test split.", check=FRACTION)
    delimiter: str = option(default=",", help="Separator of cells.", check=_ONE_CHARACTER)

    def __attrs_post_init__(self) -> None:
        if self.val + self.test >= 1:
            raise OptionError(f"val {self.val} and test {self.test} leave nothing for training", fix="lower them")

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Read and split the rows, and encode them with the statistics of the training split.

        A restored run keeps its columns, classes and scales.

        Raises:
            DataError: The file cannot be read, or its data cannot be used.
        """
        table = read_table(self.path, self.delimiter)
        known, where = run.data if run.restoring else None, f"{self.path}, column '{self.target}'"
        target = self._read_target(table, self.task if known is None else _get_restored_task(known.targets, self.task))
        targets, pools = self._build_targets(target, known, where)
        rows = split_rows(pools, val=self.val, test=self.test, seed=run.data_seed, where=where)
        if isinstance(targets, RegressionTargets) and known is None:
            targets = fit_number_targets(target[rows[0].numpy()], names=(self.target,), units=(self.unit,), where=where)
        columns = {name: cells for name, cells in table.columns.items() if name != self.target}
        inputs, notes = infer_inputs(columns, rows[0].tolist(), where=str(self.path))
        if known is not None and isinstance(known.inputs, TableInputs):
            inputs, notes = known.inputs, []
        features, stored = inputs.to_features(columns), _encode_targets(target, targets, where)
        ids = [f"{self.path.name}:{line}" for line in table.lines]
        train, val, test = (
            Split(features[part], stored[part], ids=[ids[row] for row in part.tolist()]) for part in rows
        )
        notes = [*notes, self._describe_target(targets)]
        return Data(train=train, val=val, test=test, inputs=inputs, targets=targets, notes=tuple(notes))

    def _read_target(self, table: Table, task: str) -> NDArray[Any]:
        """Return the target column (n,): text or integers for classes, float64 for regression."""
        if self.target not in table.columns:
            raise DataError(
                f"there is no column '{self.target}'",
                where=str(self.path),
                fix=suggest_name(self.target, table.columns),
            )
        cells = [cell.strip() for cell in table.columns[self.target]]
        missing = [line for line, cell in zip(table.lines, cells, strict=True) if cell.lower() in MISSING_VALUES]
        if missing:
            raise DataError(
                f"{len(missing)} row(s) have no '{self.target}'",
                where=f"{self.path}, line {missing[0]}",
                why="a row without a target cannot be used",
                fix="fill these cells in, or remove the rows",
            )
        numbers = [parse_number(cell) for cell in cells]
        wrong = [line for line, number in zip(table.lines, numbers, strict=True) if number is None]
        if task == "regression" and wrong:
            raise DataError(
                f"'{self.target}' is not a number everywhere",
                where=f"{self.path}, line {wrong[0]}",
                fix="correct the cell, or use --data.task classification",
            )
        whole = all(cell == f"{number:.0f}" for cell, number in zip(cells, numbers, strict=True) if number is not None)
        few = whole and len(set(cells)) <= _MAX_CLASSES
        if task == "regression" or (task == "auto" and not wrong and not few):
            return np.array(numbers, dtype=np.float64)
        return np.array(cells) if wrong or not whole else np.array([int(cell) for cell in cells])

    def _build_targets(self, target: NDArray[Any], known: Data | None, where: str) -> tuple[Targets, list[Tensor]]:
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
        return classes, group_rows_by_class(codes, classes, num_splits=3, allow_empty=known is not None, where=where)

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
