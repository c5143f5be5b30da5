"""Answers as arrays and tables bring them: which kind they are, what is refused, and how samples are split.

Shapes: n samples, k numbers or labels a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneforge import DataError
from tuneforge.builtin.targets import RegressionTargets
from tuneforge.errors import suggest_name

TargetKind = Literal["classes", "label-sets", "numbers"]


def to_target_array(targets: Any, *, where: str) -> NDArray[Any]:
    """Answers as an array (n,) or (n, k) of numbers, truth values or text; (n, 1) becomes (n,).

    Raises:
        DataError: They are of mixed types, missing, or not finite.
    """
    try:
        array = targets.detach().cpu().numpy() if isinstance(targets, Tensor) else np.asarray(targets)
    except (ValueError, TypeError) as error:
        raise DataError(
            "the answers are no array", where=where, why=str(error), fix="give one answer a sample"
        ) from None
    if array.dtype == object:
        array = _require_one_type(array, where)
    if array.dtype.kind not in "biufU" or array.ndim not in (1, 2):
        raise DataError(
            f"answers of type {array.dtype} and shape {array.shape}",
            where=where,
            fix="give one class or number a sample (n,), or a row of numbers or 0 and 1 a sample (n, k)",
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        rows = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))
        raise DataError(
            f"{len(rows)} answer(s) are NaN or infinite",
            where=f"{where}, row {rows[0]}",
            why="nothing can be learnt from a sample without an answer",
            fix="remove these rows, or fill in their answers",
        )
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def infer_target_kind(targets: NDArray[Any], *, where: str) -> TargetKind:
    """What the answers are: text, truth values and integers (n,) are classes, floats are numbers.

    A matrix of 0 and 1 is label sets, any other of floats is numbers.

    Raises:
        DataError: A matrix of integers or text.
    """
    if targets.ndim == 1:
        return "numbers" if targets.dtype.kind == "f" else "classes"
    if targets.dtype.kind != "U" and np.isin(targets, (0, 1)).all():
        return "label-sets"
    if targets.dtype.kind == "f":
        return "numbers"
    raise DataError(
        f"a matrix of {targets.dtype} with shape {targets.shape} can be read in more than one way",
        where=where,
        fix="give floats for numbers, 0 and 1 for label sets, or one column for classes",
    )


def infer_class_names(answers: NDArray[Any]) -> tuple[str, ...]:
    """Names of the classes that occur: sorted, integers by value."""
    return tuple(str(value) for value in np.unique(answers).tolist())


def encode_classes(answers: NDArray[Any], names: Sequence[str], *, by_name: bool, where: str) -> Tensor:
    """Each answer's index in `names`, int64 (n,).

    Args:
        answers: (n,).
        names: Of the classes.
        by_name: Whether an answer is a class's name; else it is its index already.
        where: What messages name.

    Raises:
        DataError: An answer is no class; the message offers the nearest.
    """
    found, inverse = np.unique(answers, return_inverse=True)
    index = {name: place for place, name in enumerate(names)}
    keys = [str(value) if by_name else value for value in found.tolist()]
    known: dict[Any, int] = index if by_name else {place: place for place in range(len(names))}
    for key in keys:
        if key not in known:
            raise DataError(
                f"there is no class '{key}'",
                where=where,
                why=f"there are {len(names)} classes",
                fix=suggest_name(str(key), names) if by_name else f"an index lies from 0 to {len(names) - 1}",
            )
    return torch.tensor([known[key] for key in keys], dtype=torch.int64)[torch.from_numpy(inverse.reshape(-1))]


def fit_number_targets(
    train: NDArray[Any], *, names: Sequence[str], units: Sequence[str], where: str
) -> RegressionTargets:
    """The targets that standardise numbers (n,) or (n, k) by mean and deviation of the training split.

    Raises:
        DataError: A number is the same in every training sample.
    """
    columns = train.astype(np.float64).reshape(len(train), -1)
    means, scales = columns.mean(0), columns.std(0)
    for name, mean, scale in zip(names, means, scales, strict=True):
        if not scale > 1e-12 * abs(mean):
            raise DataError(
                f"'{name}' is {mean:g} in every training sample",
                where=where,
                why="there is nothing to learn from",
                fix="check the answers, or leave this number out",
            )
    return RegressionTargets(
        names=tuple(names), units=tuple(units), means=tuple(means.tolist()), scales=tuple(scales.tolist())
    )


def standardize(answers: NDArray[Any], targets: RegressionTargets) -> Tensor:
    """Numbers (n,) or (n, k) as `targets` stores them, float32 of the same shape."""
    means, scales = np.array(targets.means), np.array(targets.scales)
    columns = (answers.astype(np.float64).reshape(len(answers), -1) - means) / scales
    return torch.from_numpy(columns.astype(np.float32).reshape(answers.shape))


def _require_one_type(array: NDArray[Any], where: str) -> NDArray[Any]:
    types = {type(value) for value in array.ravel()}
    if types <= {str} or types <= {int, bool, float, np.float64, np.float32, np.int64}:
        return np.array(array.tolist())
    raise DataError(
        f"answers of mixed types: {', '.join(sorted(each.__name__ for each in types))}",
        where=where,
        why="each must be a class or a number, and none may be missing",
        fix="give only text, only integers or only floats",
    )
