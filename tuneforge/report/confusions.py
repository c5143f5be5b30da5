"""The confusion matrix of a split for the report page: a table, a plot, or only the most frequent confusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneforge.report import plots

_MAX_TABLE_CLASSES = 30
_MAX_LISTED = 20


def build_confusion(metrics: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any] | None:
    """Return what the page shows of the confusions of a split.

    With up to 30 classes that is a table, with up to 100 a plot, and above 30 also the most frequent confusions.

    Args:
        metrics: The metrics of the split.
        labels: The names of the classes, in the order of the matrix.

    Returns:
        None where the split has no confusions, as with regression.
    """
    matrix = _read_matrix(metrics)
    if matrix is None and "largest_confusions" not in metrics:
        return None
    names = class_names(metrics, labels)
    right, total = _count_predictions(metrics, matrix)
    content = {"names": names, "size": len(names), "right": right, "total": total, "cells": [], "plot": None}
    if matrix is None:
        return {**content, "largest": list_confusions(metrics, labels)[:_MAX_LISTED]}
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    if len(matrix) <= _MAX_TABLE_CLASSES:
        rows = zip(matrix.tolist(), shares.tolist(), strict=True)
        return {**content, "cells": [list(zip(*row, strict=True)) for row in rows], "largest": []}
    alt = f"Confusion matrix of {len(names)} classes: {right:,} of {total:,} predictions on the diagonal are correct."
    plot = plots.plot_confusion_matrix(shares, alt=alt)
    return {**content, "plot": plot, "largest": list_confusions(metrics, labels)[:_MAX_LISTED]}


def list_confusions(metrics: Mapping[str, Any], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return the wrong predictions of a split by label and prediction, the most frequent first."""
    names, support = class_names(metrics, labels), _support(metrics)
    return [
        {"label": names[row], "prediction": names[column], "count": count, "of": support[row]}
        for row, column, count in _list_cells(metrics)
    ]


def class_names(metrics: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    """Return the class names in the order of the confusion matrix; numbers where they are not known."""
    matrix, per_class = _read_matrix(metrics), list(metrics.get("per_class") or ())
    size = len(per_class) if matrix is None else len(matrix)
    for known in (labels, per_class):
        if len(known) == size:
            return [str(name) for name in known]
    return [str(number) for number in range(size)]


def _read_matrix(metrics: Mapping[str, Any]) -> NDArray[np.int64] | None:
    counts = np.asarray(metrics.get("confusion") or [], dtype=np.int64)
    return counts if counts.size else None


def _list_cells(metrics: Mapping[str, Any]) -> list[list[int]]:
    """Return label, prediction and samples of wrong predictions, the most frequent first."""
    matrix = _read_matrix(metrics)
    if matrix is None:
        return list(metrics.get("largest_confusions") or ())
    wrong = matrix * ~np.eye(len(matrix), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[: np.count_nonzero(wrong)]
    rows, columns = np.unravel_index(order, wrong.shape)
    cells: list[list[int]] = np.stack([rows, columns, wrong[rows, columns]], 1).tolist()
    return cells


def _count_predictions(metrics: Mapping[str, Any], matrix: NDArray[np.int64] | None) -> tuple[int, int]:
    """Return how many predictions are correct, and how many there are."""
    if matrix is not None:
        return int(matrix.trace()), int(matrix.sum())
    total = sum(_support(metrics))
    return round((metrics.get("accuracy") or 0.0) * total), total


def _support(metrics: Mapping[str, Any]) -> list[int]:
    matrix = _read_matrix(metrics)
    if matrix is None:
        return [row["support"] for row in metrics["per_class"].values()]
    return [int(count) for count in matrix.sum(1)]
