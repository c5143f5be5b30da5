"""Paired differences with intervals: by split within a task, pooled over tasks.

The unit is a split of a task. Cells of one task share their test samples, so they are averaged first, and what remains
is one difference for each split. All numbers are points (hundredths of accuracy).
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import attrs
import numpy as np
from records import Key, Record
from scipy import stats

Differences = Mapping[str, Sequence[float]]
"""Differences of the splits, by task."""


@attrs.frozen
class Interval:
    """A mean and its interval of 95 %.

    Args:
        mean: In points.
        low: Lower end; `-inf` where one difference tells nothing of the spread.
        high: Upper end.
        pairs: How many differences it rests on.
    """

    mean: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"{self.mean:+.1f} (no interval)"
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def differences(records: Mapping[Key, Record], one: str, other: str, cells: Iterable[str]) -> dict[str, list[float]]:
    """Return accuracy of `one` minus that of `other` in points, by task, for the pairs in which both have a result."""
    by_split: dict[tuple[str, int], list[float]] = {}
    wanted = set(cells)
    for (cell, split, method), record in records.items():
        paired = records.get((cell, split, other))
        if method != one or cell not in wanted or paired is None:
            continue
        if record.accuracy is not None and paired.accuracy is not None:
            key = cell.partition("/")[0], split
            by_split.setdefault(key, []).append(100 * (record.accuracy - paired.accuracy))
    found: dict[str, list[float]] = {}
    for (task, _), values in sorted(by_split.items()):
        found.setdefault(task, []).append(float(np.mean(values)))
    return found


def of_task(values: Sequence[float]) -> Interval:
    """Return the mean of a task's differences, with Student's t interval over its splits."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf, len(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half, len(values))


def pooled(found: Differences) -> Interval:
    """Return the mean over tasks, each with equal weight; the interval is for these tasks, over new splits.

    The variance is that of a mean of independent means, its degrees of freedom are those of Welch and Satterthwaite.
    """
    pairs = sum(map(len, found.values()))
    mean = float(np.mean([np.mean(values) for values in found.values()]))
    if any(len(values) < 2 for values in found.values()):
        return Interval(mean, -math.inf, math.inf, pairs)
    parts = [float(np.var(values, ddof=1)) / len(values) / len(found) ** 2 for values in found.values()]
    variance = sum(parts)
    if variance == 0:
        return Interval(mean, mean, mean, pairs)
    below = sum(part**2 / (len(values) - 1) for part, values in zip(parts, found.values(), strict=True))
    half = float(stats.t.ppf(0.975, variance**2 / below)) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half, pairs)


def over_tasks(found: Differences) -> Interval:
    """Return the mean over tasks with an interval over the tasks, which is wider: what a new task may bring."""
    return of_task([float(np.mean(values)) for values in found.values()])
