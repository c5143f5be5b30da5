"""Splits that keep groups together, or follow time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneforge import DataError, SampleRNG

Rows = tuple[Tensor, Tensor, Tensor]
"""Rows of train, val and test, int64, ascending."""


def split_groups(groups: Sequence[Any], *, val: float, test: float, seed: int, where: str) -> Rows:
    """Split rows into train, val and test, so that all rows of a group are in the same split.

    Groups are drawn by the seed until a split has its fraction of the rows; each split has at least one group.

    Args:
        groups: Group of each row (n,), such as a patient or a document.
        val: Fraction of the rows for validation; 0 leaves it empty.
        test: Fraction of the rows for the test split; 0 leaves it empty.
        seed: Seed of the run.
        where: Name of the groups, for messages.

    Raises:
        DataError: There are fewer groups than splits.
    """
    _, codes, counts = np.unique(np.asarray(groups, dtype=str), return_inverse=True, return_counts=True)
    if len(counts) < 1 + (val > 0) + (test > 0):
        raise DataError(
            f"{len(counts)} group(s) cannot fill every split",
            where=where,
            why="all rows of a group are in the same split",
            fix="use a column with more distinct values, or an empty split (0)",
        )
    numbers = torch.arange(len(counts))
    drawn = numbers[SampleRNG(seed, 0, numbers).uniform("groups").argsort(stable=True)].tolist()
    split_of = np.zeros(len(counts), dtype=np.int64)
    for place, share in ((2, test), (1, val)):
        taken, others = 0, int(place == 2 and val > 0)
        while share > 0 and len(drawn) > 1 + others and (not taken or taken < round(share * len(codes))):
            group = drawn.pop()
            split_of[group], taken = place, taken + int(counts[group])
    return _rows_of(split_of[codes.reshape(-1)])


def split_by_time(times: Sequence[str], *, val: float, test: float, where: str) -> Rows:
    """Split rows into train, then val, then test, in the order of time; rows of the same time are in the same split.

    Args:
        times: Time of each row (n,): numbers, or dates as ISO 8601 writes them.
        val: Fraction of the rows for validation; 0 leaves it empty.
        test: Fraction of the rows for the test split, which is the latest; 0 leaves it empty.
        where: Name of the times, for messages.

    Raises:
        DataError: A time cannot be read, or there are too few distinct times.
    """
    stamps = np.array([_parse_time(text, where) for text in times])
    distinct, ranks, counts = np.unique(stamps, return_inverse=True, return_counts=True)
    num_earlier = np.concatenate([[0], np.cumsum(counts)])[:-1]
    first_val, first_test = (round((1 - share) * len(stamps)) for share in (val + test, test))
    split_of_time = (num_earlier >= first_val).astype(np.int64) + (num_earlier >= first_test) * (test > 0)
    split_of_time = np.where((val == 0) & (split_of_time == 1), 2 if test > 0 else 0, split_of_time)
    split_of = split_of_time[ranks.reshape(-1)]
    if not (split_of == 0).any() or (val > 0 and not (split_of == 1).any()) or (test > 0 and not (split_of == 2).any()):
        raise DataError(
            f"{len(distinct)} distinct times cannot fill every split",
            where=where,
            why="rows of the same time are in the same split",
            fix="use a finer time, other fractions, or an empty split (0)",
        )
    return _rows_of(split_of)


def _parse_time(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise DataError(
            f"'{text}' is neither a number nor a date",
            where=where,
            fix="write dates as 2024-12-31 or 2024-12-31T23:59:00",
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _rows_of(split_of: NDArray[np.int64]) -> Rows:
    train, val, test = (torch.from_numpy(np.flatnonzero(split_of == place)) for place in range(3))
    return train, val, test
