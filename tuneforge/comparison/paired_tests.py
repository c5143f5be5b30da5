"""What figures of a few seeds can say: mean and spread, the paired t test, and Holm's correction for many tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np

LEVEL = 0.05
"""A corrected p below this is called a difference; intervals are those of 1 - LEVEL."""

_ROUNDING = 1e-9  # differences that vary by less than this share of the figures vary by rounding only


@attrs.frozen
class Paired:
    """The difference of two series of figures that belong together pair by pair.

    Args:
        pairs: Number of pairs.
        mean: Of first - second.
        sd: Standard deviation of the differences; None for one pair.
        low: Lower end of the interval of 1 - LEVEL around the mean, by itself, not corrected; None without a test.
        high: Upper end.
        p: Two-sided, not corrected; None without a test.
        untested: Why there is no test; empty where there is one.
    """

    pairs: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    untested: str = ""


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation with n - 1 (None for one value)."""
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Student's paired t test: t = mean / (sd / sqrt(n)) of the differences, with n - 1 degrees of freedom.

    Args:
        first: Figures, one a seed.
        second: Those of the other, in the same order of seeds.

    Returns:
        The test; or why there is none, where there is one pair, or every pair differs by the same, so that there is no
        spread to measure the difference by. Equal figures throughout are p = 1.
    """
    from scipy import stats

    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    count = len(differences)
    mean, sd = mean_and_spread(differences.tolist())
    if sd is None:
        return Paired(count, mean, untested="one seed")
    if sd <= _ROUNDING * float(np.max(np.abs([first, second]))):
        if not differences.any():
            return Paired(count, mean, sd, 0.0, 0.0, 1.0)
        return Paired(count, mean, sd, untested="every seed gives the same difference")
    error = sd / math.sqrt(count)
    p = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    half = sd * reach(count)
    return Paired(count, mean, sd, mean - half, mean + half, p)


def holm(p_values: Sequence[float | None], *, comparisons: int) -> list[float | None]:
    """P values corrected for several comparisons (Holm 1979): the i-th smallest times (comparisons - i), never falling.

    Args:
        p_values: One a comparison; None where there was no test.
        comparisons: How many there were to begin with, at least as many as p values; one that was dropped on the way
            counts, as if its p were 1.

    Returns:
        Corrected values in the same order, at most 1; None stays None.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, (comparisons - rank) * p))
        corrected[place] = highest
    return corrected


def reach(pairs: int) -> float:
    """Half the width of an interval of 1 - LEVEL, in standard deviations of the differences, for 2 pairs or more."""
    from scipy import stats

    return float(stats.t.ppf(1 - LEVEL / 2, pairs - 1)) / math.sqrt(pairs)
