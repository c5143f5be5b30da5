"""Tables: a CSV file as data, one row as an input, and a small network for rows of numbers.

Shapes: n rows, b in a batch, f features, k outputs.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tuneforge import (
    Data,
    DataError,
    Inputs,
    LayerGroup,
    Model,
    OptionError,
    PluginError,
    Split,
    Targets,
    UsageError,
    component,
    hookimpl,
    option,
)
from tuneforge.builtin.datasets.tables.csv_table import Table, read_table
from tuneforge.builtin.datasets.tables.target_arrays import (
    encode_classes,
    fit_number_targets,
    group_rows_by_class,
    infer_class_names,
    split_rows,
    standardize,
)
from tuneforge.builtin.seeding import seeded_rng
from tuneforge.builtin.targets import ClassTargets, RegressionTargets, suggest_label
from tuneforge.exporting import load_tensors
from tuneforge.plugin import Check

if TYPE_CHECKING:
    from tuneforge import Run, TensorTree

_SHARE = Check("greater than 0 and less than 1", lambda value: bool(0 < value < 1))
_WIDTHS = Check("numbers of at least 1", lambda widths: all(width >= 1 for width in widths))
_ONE_CHARACTER = Check("one character", lambda text: len(text) == 1, {"minLength": 1, "maxLength": 1})
_MISSING_VALUES = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})  # in a column of numbers, in any case
_MAX_CATEGORIES = 50  # of a text column; one with more is a name or an identifier
_MAX_CLASSES = 20  # of a column of whole numbers that `auto` takes for classes

NUMBER, NUMBER_OR_NONE, TEXT = "number", "number-or-none", "text"


@component(api=1)
class TableCsv:
    """Rows of a CSV file with a header: every column but the target is an input."""

    path: Path = option(help="The file.")
    target: str = option(help="Name of the column to predict.")
    task: Literal["auto", "classification", "regression"] = option(
        default="auto", help="What the target is; auto: regression if it holds numbers other than a few whole ones."
    )
    unit: str = option(default="", help="Unit of the target, where it is a number.")
    val: float = option(default=0.15, help="Share of the rows for validation.", check=_SHARE)
    test: float = option(default=0.15, help="Share of the rows for the test.", check=_SHARE)
    delimiter: str = option(default=",", help="What separates the cells of a row.", check=_ONE_CHARACTER)

    def __attrs_post_init__(self) -> None:
        if self.val + self.test >= 1:
            raise OptionError(f"val {self.val} and test {self.test} leave nothing to train on", fix="lower them")

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Read, divide, and turn into features by the statistics of the training split alone.

        Where a tuned model looks at another file, its columns, classes and scales are kept.

        Raises:
            DataError: The file cannot be read or learnt from; the message names line or column and what to do.
        """
        table = read_table(self.path, self.delimiter)
        known, where = run.data if run.restoring else None, f"{self.path}, column '{self.target}'"
        answers = self._read_target(table, self.task if known is None else _get_restored_task(known.targets, self.task))
        targets, pools = self._build_targets(answers, known, where)
        rows = split_rows(pools, val=self.val, test=self.test, seed=run.data_seed, where=where)
        if isinstance(targets, RegressionTargets) and known is None:
            targets = fit_number_targets(
                answers[rows[0].numpy()], names=(self.target,), units=(self.unit,), where=where
            )
        columns = {name: cells for name, cells in table.columns.items() if name != self.target}
        inputs, notes = _infer_inputs(columns, rows[0].tolist(), where=str(self.path))
        if known is not None and isinstance(known.inputs, TableInputs):
            inputs, notes = known.inputs, []
        features, stored = inputs.to_features(columns), _encode_targets(answers, targets, where)
        ids = [f"{self.path.name}:{line}" for line in table.lines]
        train, val, test = (
            Split(features[part], stored[part], ids=[ids[row] for row in part.tolist()]) for part in rows
        )
        notes = [*notes, self._describe_target(targets)]
        return Data(train=train, val=val, test=test, inputs=inputs, targets=targets, notes=tuple(notes))

    def _read_target(self, table: Table, task: str) -> NDArray[Any]:
        """The target column: text or whole numbers for classes, float64 for numbers (n,)."""
        if self.target not in table.columns:
            raise DataError(
                f"there is no column '{self.target}'",
                where=str(self.path),
                fix=suggest_label(self.target, table.columns),
            )
        cells = [cell.strip() for cell in table.columns[self.target]]
        missing = [line for line, cell in zip(table.lines, cells, strict=True) if cell.lower() in _MISSING_VALUES]
        if missing:
            raise DataError(
                f"{len(missing)} row(s) have no '{self.target}'",
                where=f"{self.path}, line {missing[0]}",
                why="nothing can be learnt from a row without an answer",
                fix="fill these cells in, or remove the rows",
            )
        numbers = [_parse_number(cell) for cell in cells]
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

    def _build_targets(self, answers: NDArray[Any], known: Data | None, where: str) -> tuple[Targets, list[Tensor]]:
        """The targets, and the rows that are divided alike: those of a class, or all."""
        tuned = None if known is None else known.targets
        if answers.dtype.kind == "f":
            targets = (
                tuned
                if isinstance(tuned, RegressionTargets)
                else RegressionTargets(names=(self.target,), units=(self.unit,))
            )
            return targets, [torch.arange(len(answers))]
        classes = tuned if isinstance(tuned, ClassTargets) else ClassTargets(names=infer_class_names(answers))
        codes = encode_classes(answers, classes.names, by_name=True, where=where)
        return classes, group_rows_by_class(codes, classes, num_splits=3, allow_empty=known is not None, where=where)

    def _describe_target(self, targets: Targets) -> str:
        if isinstance(targets, ClassTargets):
            return (
                f"'{self.target}' is read as {targets.num_outputs} classes; --data.task regression reads it as a number"
            )
        return f"'{self.target}' is read as a number; --data.task classification reads it as classes"


@component(api=1)
class TableInputs(Inputs):
    """One row of a table as features (f,): numbers standardised, text as one of its known values.

    A missing number is the training mean; where training had such, a further feature says so. A missing text, or one
    that training did not have, is none of the values.
    """

    tabular = True

    columns: tuple[str, ...] = option(help="Names of the columns.")
    column_types: tuple[str, ...] = option(help="number, number-or-none or text, of each column.")
    means: tuple[float, ...] = option(help="Training mean of each column of numbers; 0 for text.")
    scales: tuple[float, ...] = option(help="Training deviation of each column of numbers; 1 for text.")
    categories: tuple[tuple[str, ...], ...] = option(help="Known values of each column of text; none for numbers.")

    def decode(self, raw: Any) -> Tensor:
        """The features (f,) of a row.

        Args:
            raw: Cells by column name, as text or values; other columns are passed over. Also a JSON object as bytes,
                or the path of a file that holds one.

        Raises:
            DataError: A column is missing, or holds text instead of a number.
        """
        row = _load_json(raw) if isinstance(raw, (bytes, Path)) else raw
        if not isinstance(row, Mapping):
            raise DataError(f"{type(row).__name__} is no row", fix="give a mapping from column name to value")
        for name in self.columns:
            if name not in row:
                raise DataError(f"column '{name}' is missing", where="the row", fix=suggest_label(name, map(str, row)))
        return self.to_features({name: [row[name]] for name in self.columns})[0]

    def preprocess(self, samples: TensorTree) -> Any:
        """The features as they are (b, f)."""
        return samples

    def render_text(self, sample: TensorTree) -> str:
        """The row's cells by name, a missing one as "?"."""
        assert isinstance(sample, Tensor)
        widths = [self._get_num_features(index) for index in range(len(self.columns))]
        blocks = sample.double().tolist()
        shown = []
        for index, name in enumerate(self.columns):
            block = blocks[sum(widths[:index]) : sum(widths[: index + 1])]
            shown.append(f"{name} {self._format_cell(index, block)}")
        return ", ".join(shown)[:200]

    def to_features(self, columns: Mapping[str, Sequence[Any]]) -> Tensor:
        """Cells (n,) of each column as features, float32 (n, f); the same for a row alone and among others."""
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


@component(api=1)
class MLP:
    """A multilayer perceptron for rows of numbers: linear layers with ReLU, and a linear head."""

    hidden: tuple[int, ...] = option(default=(64, 64), help="Width of each hidden layer.", check=_WIDTHS)
    dropout: float = option(
        default=0.0,
        help="Share of each hidden layer that is dropped in training.",
        check=Check("in [0, 1)", lambda p: 0 <= p < 1),
    )
    weights: Path | None = option(default=None, help="A safetensors file of such a network, such as a run's.")

    @hookimpl
    def model_adapt(self, run: Run, model: Model | None) -> Model:
        """Build it for the rows and the targets of the data; a layer group a hidden layer, and the head.

        Raises:
            PluginError: It is not the first of the chain.
            DataError: The inputs are no rows of numbers.
            UsageError: The weights are not of this network.
        """
        if model is not None:
            raise PluginError("mlp builds a model; it cannot adapt one", where="--model", fix="name it with --model")
        example = run.example
        if not isinstance(example, Tensor) or example.ndim != 2 or not example.is_floating_point():
            found = f"{example.dtype} {tuple(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
            raise DataError(
                "mlp takes one row of floats a sample",
                where="--model mlp",
                why=f"a batch is {found}",
                fix="use another model",
            )
        targets = run.data.targets
        if self.weights is not None and not run.restoring:
            return self._load_model(self.weights, example.shape[1])
        return self._build_model(example.shape[1], targets.num_outputs, targets.labels, seed=run.config.seed)

    def _build_model(self, num_features: int, num_outputs: int, labels: tuple[str, ...], *, seed: int) -> Model:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        with seeded_rng(seed):
            for number, width in enumerate(self.hidden, start=1):
                parts = [nn.Linear(num_features, width), nn.ReLU(), *[nn.Dropout(self.dropout)] * (self.dropout > 0)]
                layers[f"layer{number}"], num_features = nn.Sequential(*parts), width
            layers["head"] = nn.Linear(num_features, num_outputs)
        groups = [LayerGroup(name, (name,)) for name in layers]
        return Model(nn.Sequential(layers), groups=groups, head="head", labels=labels, pretrained=False)

    def _load_model(self, path: Path, num_features: int) -> Model:
        """From weights, with the outputs that they have; the adapter `head` fits those to the data."""
        tensors, metadata = load_tensors(path)
        labels = tuple(metadata.get("labels", ()))
        model = self._build_model(num_features, len(tensors.get("head.bias", labels)), labels, seed=0)
        expected = model.module.state_dict()
        wrong = sorted(expected.keys() ^ tensors.keys())
        wrong += [name for name in expected if name in tensors and expected[name].shape != tensors[name].shape]
        if wrong:
            raise UsageError(
                f"'{path}' does not hold the weights of this mlp: {', '.join(wrong[:5])}",
                where="--model.weights",
                why=f"{len(wrong)} name(s) or shape(s) differ",
                fix="give hidden the widths that the weights were made with, and data with the same features",
            )
        model.module.load_state_dict(tensors)
        return Model(model.module, groups=model.groups, head="head", labels=labels, pretrained_labels=labels)


def _infer_inputs(columns: Mapping[str, list[str]], train: list[int], *, where: str) -> tuple[TableInputs, list[str]]:
    """The contract of the inputs, from all cells for a column's kind and from those of training for the rest."""
    kept: dict[str, tuple[str, float, float, tuple[str, ...]]] = {}
    notes = []
    for name, cells in columns.items():
        described = _infer_column(cells, train)
        if isinstance(described, str):
            notes.append(f"column '{name}' is left out: {described}")
        else:
            kept[name] = described
    if not kept:
        raise DataError("no column can serve as an input", where=where, why="; ".join(notes), fix="add other columns")
    kinds, means, scales, categories = zip(*kept.values(), strict=True)
    return TableInputs(
        columns=tuple(kept), column_types=kinds, means=means, scales=scales, categories=categories
    ), notes


def _infer_column(cells: list[str], train: list[int]) -> tuple[str, float, float, tuple[str, ...]] | str:
    """Kind, mean, scale and values of a column, or why it is left out."""
    if all(cell.strip().lower() in _MISSING_VALUES for cell in cells):
        return "it is empty"
    numbers = [math.nan if cell.strip().lower() in _MISSING_VALUES else _parse_number(cell) for cell in cells]
    if None in numbers:
        values = sorted({_strip_text(cells[row]) for row in train} - {""})
        few = len(values) <= _MAX_CATEGORIES
        return (
            (TEXT, 0.0, 1.0, tuple(values))
            if few
            else f"it has {len(values)} different texts, more than {_MAX_CATEGORIES}"
        )
    trained = np.array(numbers, dtype=np.float64)[train]
    present = trained[~np.isnan(trained)]
    if not len(present):
        return "it is empty in the training split"
    mean, scale = float(present.mean()), float(present.std())
    kind = NUMBER_OR_NONE if len(present) < len(trained) else NUMBER
    return kind, mean, scale if scale > 1e-12 * abs(mean) else 1.0, ()


def _get_restored_task(targets: Targets, task: str) -> str:
    """What a tuned model's target is; `task` where it is neither classes nor numbers."""
    return (
        "classification"
        if isinstance(targets, ClassTargets)
        else "regression"
        if isinstance(targets, RegressionTargets)
        else task
    )


def _encode_targets(answers: NDArray[Any], targets: Targets, where: str) -> Tensor:
    if isinstance(targets, RegressionTargets):
        return standardize(answers, targets)
    return encode_classes(answers, targets.labels, by_name=True, where=where)


def _parse_number(cell: str | float) -> float | None:
    """The finite number that a cell holds, or None."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _parse_cell(cell: Any, name: str) -> float:
    """The number of a cell as text or value; NaN where it is missing."""
    if cell is None or (isinstance(cell, str) and cell.strip().lower() in _MISSING_VALUES):
        return math.nan
    number = _parse_number(cell) if isinstance(cell, (str, int, float)) and not isinstance(cell, bool) else None
    if number is None:
        raise DataError(
            f"{cell!r} is no number", where=f"column '{name}'", fix="give a finite number, or leave it empty"
        )
    return number


def _strip_text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _load_json(raw: bytes | Path) -> Any:
    try:
        return json.loads(raw.read_bytes() if isinstance(raw, Path) else raw)
    except (OSError, ValueError) as error:
        where = str(raw) if isinstance(raw, Path) else ""
        raise DataError("this is no JSON object", where=where, why=str(error), fix="give a row as JSON") from None
