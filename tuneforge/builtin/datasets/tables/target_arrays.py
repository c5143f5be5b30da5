"""Targets of arrays and tables: validation, their kind, and their encoding.

Shapes: n samples, k numbers or labels per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneforge import DataError
from tuneforge.builtin.datasets.tables.raw_tensors import require_dense
from tuneforge.builtin.targets import RegressionTargets
from tuneforge.errors import suggest_name

TargetKind = Literal["classes", "label-sets", "numbers"]


def to_target_array(targets: Any, *, where: str) -> NDArray[Any]:
    """Return targets as an array (n,) or (n, k) of numbers, booleans or text; (n, 1) becomes (n,).

    Raises:
        DataError: They have mixed types, or are missing, non-finite or sparse.
    """
    require_dense(targets, where=where)
    try:
        array = targets.detach().cpu().numpy() if isinstance(targets, Tensor) else np.asarray(targets)
    except (ValueError, TypeError) as error:
        raise DataError(
            "the targets are not an array", where=where, why=str(error), fix="give one target per sample"
        ) from None
    if array.dtype == object:
        array = _require_one_type(array, where)
    if array.dtype.kind not in "biufU" or array.ndim not in (1, 2):
        raise DataError(
            f"targets of dtype {array.dtype} and shape {array.shape}",
            where=where,
            fix="give one class or number per sample (n,), or a row of numbers or of 0 and 1 per sample (n, k)",
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        rows = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))
        raise DataError(
            f"{len(rows)} target(s) are NaN or Inf",
            where=f"{where}, row {rows[0]}",
            why="a sample without a target cannot be used",
            fix="remove these rows, or fill in their targets",
        )
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def infer_target_kind(targets: NDArray[Any], *, where: str) -> TargetKind:
    """Return the kind of targets: text, booleans and integers (n,) are classes, floats are numbers.

    A matrix of 0 and 1 is label sets, another matrix of floats is numbers.

    Raises:
        DataError: They are a matrix of integers or text.
    """
    if targets.ndim == 1:
        return "numbers" if targets.dtype.kind == "f" else "classes"
    if targets.dtype.kind != "U" and np.isin(targets, (0, 1)).all():
        return "label-sets"
    if targets.dtype.kind == "f":
        return "numbers"
    raise DataError(
        f"a matrix of {targets.dtype} with shape {targets.shape} is ambiguous",
        where=where,
        fix="give floats for numbers, 0 and 1 for label sets, or one column for classes",
    )


def infer_class_names(targets: NDArray[Any]) -> tuple[str, ...]:
    """Return the sorted names of the classes; integers are sorted by value."""
    return tuple(str(value) for value in np.unique(targets).tolist())


def encode_classes(targets: NDArray[Any], names: Sequence[str], *, by_name: bool, where: str) -> Tensor:
    """Return class indices, int64 (n,).

    Args:
        targets: Class names or indices (n,).
        names: Names of the classes.
        by_name: Whether targets are class names; otherwise they are indices.
        where: Name of the targets, for messages.

    Raises:
        DataError: A target is not a class.
    """
    found, inverse = np.unique(targets, return_inverse=True)
    index = {name: place for place, name in enumerate(names)}
    keys = [str(value) if by_name else value for value in found.tolist()]
    known: dict[Any, int] = index if by_name else {place: place for place in range(len(names))}
    for key in keys:
        if key not in known:
            raise DataError(
                f"there is no class '{key}'",
                where=where,
                why=f"there are {len(names)} classes",
                fix=suggest_name(str(key), names) if by_name else f"an index must be from 0 to {len(names) - 1}",
            )
    return torch.tensor([known[key] for key in keys], dtype=torch.int64)[torch.from_numpy(inverse.reshape(-1))]


def fit_number_targets(
    train: NDArray[Any], *, names: Sequence[str], units: Sequence[str], where: str
) -> RegressionTargets:
    """Return regression targets with mean and standard deviation of the training targets (n,) or (n, k).

    Raises:
        DataError: A number is constant over the training split.
    """
    columns = train.astype(np.float64).reshape(len(train), -1)
    means, scales = columns.mean(0), columns.std(0)
    for name, mean, scale in zip(names, means, scales, strict=True):
        if not scale > 1e-12 * abs(mean):
            raise DataError(
                f"'{name}' is {mean:g} in every training sample",
                where=where,
                why="a constant target cannot be learned",
                fix="check the targets, or remove this number",
            )
    return RegressionTargets(
        names=tuple(names), units=tuple(units), means=tuple(means.tolist()), scales=tuple(scales.tolist())
    )


def standardize(numbers: NDArray[Any], targets: RegressionTargets) -> Tensor:
    """Return standardized numbers, float32 of the same shape (n,) or (n, k)."""
    means, scales = np.array(targets.means), np.array(targets.scales)
    columns = (numbers.astype(np.float64).reshape(len(numbers), -1) - means) / scales
    return torch.from_numpy(columns.astype(np.float32).reshape(numbers.shape))


def _require_one_type(array: NDArray[Any], where: str) -> NDArray[Any]:
    types = {type(value) for value in array.ravel()}
    if types <= {str} or types <= {int, bool, float, np.float64, np.float32, np.int64}:
        return np.array(array.tolist())
    raise DataError(
        f"targets of mixed types: {', '.join(sorted(each.__name__ for each in types))}",
        where=where,
        why="each must be a class or a number, without missing values",
        fix="give only text, only integers or only floats",
    )
