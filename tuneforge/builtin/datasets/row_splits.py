"""Division of rows into training, validation and test splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneforge import DataError, SampleRNG
from tuneforge.builtin.targets import ClassTargets


def group_rows_by_class(
    codes: Tensor,
    targets: ClassTargets,
    *,
    num_splits: int,
    allow_empty: bool = False,
    allow_few: bool = False,
    where: str,
) -> list[Tensor]:
    """Return the rows of each class, after checks that every split can have each class.

    Args:
        codes: Class indices, int64 (n,).
        targets: Targets with the names of the classes.
        num_splits: Number of splits.
        allow_empty: Whether a class may have no sample, as in the data of a restored run.
        allow_few: Whether a class may have fewer samples than there are splits.
        where: Name of the targets, for messages.

    Raises:
        DataError: There is only one class, or a class has fewer samples than there are splits.
    """
    if targets.num_outputs < 2:
        raise DataError(
            f"there is only one class, '{targets.names[0]}'" if targets.names else "there are no classes",
            where=where,
            why="a classifier needs at least two classes",
            fix="add samples of another class",
        )
    pools = {name: rows for name, rows in targets.group_by_class(codes).items() if len(rows) or not allow_empty}
    few = {name: len(rows) for name, rows in pools.items() if len(rows) < (1 if allow_few else num_splits)}
    if few:
        name, count = next(iter(few.items()))
        others = f", and {len(few) - 1} more have too few too" if len(few) > 1 else ""
        raise DataError(
            f"class '{name}' has {count} sample(s){others}",
            where=where,
            why=f"each of {num_splits} split(s) needs at least one",
            fix="add samples, train on all of such classes (--data.rare-classes train), or leave them out "
            "(--data.rare-classes drop); or give floats if these are numbers",
        )
    return list(pools.values())


def split_rows(
    groups: Sequence[Tensor], *, val: float, test: float, seed: int, where: str, keep_few: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Split rows into train, val and test, each group in the same proportion and with at least one row in each split.

    The split of a row depends only on the seed and the rows, not on the machine.

    Args:
        groups: Rows of each group, such as those of one class.
        val: Fraction of the validation split; 0 leaves it empty.
        test: Fraction of the test split; 0 leaves it empty.
        seed: Seed of the run.
        where: Name of the data, for messages.
        keep_few: Whether a group with fewer rows than there are splits goes to train, rather than being an error.

    Returns:
        Rows of each split, int64, ascending.

    Raises:
        DataError: A group has fewer rows than there are splits.
    """
    parts: list[tuple[Tensor, ...]] = []
    for rows in groups:
        if len(rows) < 1 + (val > 0) + (test > 0):
            if keep_few:
                parts.append((rows, rows[:0], rows[:0]))
                continue
            raise DataError(f"{len(rows)} sample(s) cannot fill every split", where=where, fix="add samples")
        drawn = rows[SampleRNG(seed, 0, rows).uniform("split").argsort(stable=True)]
        parts.append(torch.split(drawn, _compute_split_sizes(len(rows), val, test)))
    train, held, tested = (torch.cat(part).sort().values for part in zip(*parts, strict=True))
    return train, held, tested


def find_rare(labels: NDArray[Any], num_splits: int) -> tuple[NDArray[np.bool_], str]:
    """Return which samples are of classes with fewer samples than there are splits (n,), and their names.

    Args:
        labels: Class of each sample (n,).
        num_splits: Number of splits.
    """
    values, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    few = counts < num_splits
    names = ", ".join(f"'{value}' ({count})" for value, count in zip(values[few], counts[few], strict=True))
    return few[inverse.reshape(-1)], names


def split_train_val(groups: Sequence[Tensor], *, val: float, seed: int, where: str) -> tuple[Tensor, Tensor]:
    """Split rows into training and validation, each group in the same proportion.

    A group of one row goes to training. Where `val` is 0 or no group has two rows, the validation split is empty.

    Args:
        groups: Rows of each group, such as those of one class.
        val: Fraction of the rows for validation.
        seed: Seed of the run.
        where: Name of the data, for messages.

    Returns:
        Rows of both splits, int64, ascending.
    """
    singles = [rows for rows in groups if len(rows) == 1]
    others = [rows for rows in groups if len(rows) > 1]
    if not val or not others:
        return torch.cat(list(groups)).sort().values, torch.zeros(0, dtype=torch.int64)
    train, held_out, _ = split_rows(others, val=val, test=0.0, seed=seed, where=where)
    return torch.cat([train, *singles]).sort().values, held_out


def _compute_split_sizes(count: int, val: float, test: float) -> list[int]:
    """Return the number of rows in train, val and test: rounded, at least one in train and in each split drawn."""
    kept = 1 + (val > 0)
    tested = min(max(round(test * count), 1), count - kept) if test > 0 else 0
    held = min(max(round(val * count), 1), count - 1 - tested) if val > 0 else 0
    return [count - held - tested, held, tested]
