"""Which samples of a task are labeled, and which are tested, in each split.

A split is a pure function of the task's labels, the size of the cell and the number of the split. The test samples of a
split are the same for all cells of a task, and the labels of a small cell are among those of a larger one.
"""

import zlib
from collections.abc import Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

RAREST = 20
"""In an imbalanced cell the most frequent class has this many times the labels of the rarest."""

VAL_SHARE = 0.2


@attrs.frozen
class Cell:
    """One row of the benchmark: a task, and how many labels there are.

    Args:
        task: Its name.
        labels: Labels of each class; in an imbalanced cell, of the most frequent class.
        imbalanced: Whether the counts fall from `labels` to a twentieth (at least 1) in equal ratios.
    """

    task: str
    labels: int
    imbalanced: bool = False

    def __str__(self) -> str:
        return f"{self.task}/{self.labels}{'i' if self.imbalanced else ''}"

    def counts(self, num_classes: int) -> list[int]:
        """Return the labels of each class, the most frequent first."""
        if not self.imbalanced:
            return [self.labels] * num_classes
        ratios = RAREST ** -np.linspace(0, 1, num_classes)
        return [max(1, round(self.labels * ratio)) for ratio in ratios]


@attrs.frozen(eq=False)
class LabeledRows:
    """Rows of one split.

    Args:
        train: Labeled, for training.
        val: Labeled, for validation: a fifth of each class that has two labels or more, at least one.
        test: At most `test_per_class` of each class.
    """

    train: Rows
    val: Rows
    test: Rows

    @property
    def labeled(self) -> Rows:
        """Return all labeled rows: those of `train`, then those of `val`."""
        return np.concatenate([self.train, self.val])


def split_rows(
    cell: Cell, split: int, labels: Rows, *, test_per_class: int, groups: Sequence[str] | None = None
) -> LabeledRows:
    """Draw the rows of a split.

    Args:
        cell: Task and number of labels.
        split: Number of the split, from 0.
        labels: Class of each sample (n,).
        test_per_class: At most so many test samples of each class.
        groups: Group of each sample (a font, say). A quarter of the groups is for the test, the others for labels.

    Raises:
        ValueError: A class has too few samples.
    """
    rng = np.random.default_rng([zlib.crc32(cell.task.encode()), split])
    for_test = _test_groups(groups, rng) if groups is not None else None
    classes = np.unique(labels)
    rank = rng.permutation(len(classes))
    counts = cell.counts(len(classes))
    train, val, test = [], [], []
    for position, each in enumerate(classes):
        rows = rng.permutation(np.flatnonzero(labels == each))
        if for_test is None:
            tested, free = rows[:test_per_class], rows[test_per_class:]
        else:
            tested, free = rows[for_test[rows]][:test_per_class], rows[~for_test[rows]]
        count = counts[rank[position]]
        if len(free) < count:
            raise ValueError(f"{cell}: class {each} has {len(free)} samples besides the test, fewer than {count}")
        held_out = max(1, round(VAL_SHARE * count)) if count > 1 else 0
        test.append(tested)
        val.append(free[:held_out])
        train.append(free[held_out:count])
    return LabeledRows(*(np.concatenate(parts) for parts in (train, val, test)))


def _test_groups(groups: Sequence[str], rng: np.random.Generator) -> NDArray[np.bool_]:
    names = rng.permutation(sorted(set(groups)))
    tested = set(names[: max(1, len(names) // 4)].tolist())
    return np.array([group in tested for group in groups])
