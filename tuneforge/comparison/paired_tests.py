"""Statistics over seeds: mean and std, the paired t test, and Holm's correction for several comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np

ALPHA = 0.05
"""Significance level of corrected p values; confidence intervals are those of 1 - ALPHA."""

_ROUNDING = 1e-9  # differences that vary by less than this fraction of the values vary by rounding only


@attrs.frozen
class PairedTest:
    """The difference of two series of paired values.

    Args:
        num_pairs: The number of pairs.
        mean: The mean of first - second.
        std: The standard deviation of the differences; None for one pair.
        ci_low: Lower end of the confidence interval of the mean, not corrected; None without a test.
        ci_high: Upper end of the confidence interval.
        p_value: Two-sided p value, not corrected; None without a test.
        reason_untested: Why there is no test; empty if there is one.
    """

    num_pairs: int
    mean: float
    std: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p_value: float | None = None
    reason_untested: str = ""


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and the standard deviation with n - 1 (None for one value)."""
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_t_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Compute Student's paired t test, scipy's `ttest_rel`.

    Args:
        first: Values (n,), one per seed.
        second: Values (n,) of the other candidate, in the same order of seeds.

    Returns:
        The test; without p value if there is one pair, or if all pairs differ by the same amount, because then there
        is no variance to compare the difference with. If all pairs are equal, p is 1.
    """
    from scipy import stats

    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    count = len(differences)
    mean, std = mean_and_std(differences.tolist())
    if std is None:
        return PairedTest(count, mean, reason_untested="one seed")
    if std <= _ROUNDING * float(np.max(np.abs([first, second]))):
        if not differences.any():
            return PairedTest(count, mean, std, 0.0, 0.0, 1.0)
        return PairedTest(count, mean, std, reason_untested="every seed gives the same difference")
    result = stats.ttest_rel(first, second)
    interval = result.confidence_interval(1 - ALPHA)
    return PairedTest(count, mean, std, float(interval.low), float(interval.high), float(result.pvalue))


def holm_correction(p_values: Sequence[float | None], *, num_comparisons: int) -> list[float | None]:
    """Correct p values for several comparisons (Holm 1979).

    Args:
        p_values: One per comparison; None where there was no test.
        num_comparisons: The number of planned comparisons, at least the number of p values; a dropped candidate counts
            as if its p were 1.

    Returns:
        The i-th smallest value times (comparisons - i), monotone and at most 1, in the order of `p_values`.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, (num_comparisons - rank) * p))
        corrected[place] = highest
    return corrected


def seeds_to_decide(test: PairedTest, *, num_comparisons: int, most: int = 1000) -> int | None:
    """Return the number of seeds at which a t test would find a difference of this mean and standard deviation.

    The least n with |mean| >= t(n - 1) * std / sqrt(n), at the significance level divided by the comparisons. With so
    many seeds the test finds a true difference of this size every second time; the estimate is rough after few seeds.

    Args:
        test: A test of two pairs or more.
        num_comparisons: The number of planned comparisons.
        most: More seeds than these are None, as is a mean of 0.
    """
    from scipy import stats

    if not test.std or not test.mean:
        return None
    level = 1 - ALPHA / 2 / num_comparisons
    ratio = abs(test.mean) / test.std
    enough = (n for n in range(2, most + 1) if ratio >= float(stats.t.ppf(level, n - 1)) / math.sqrt(n))
    return next(enough, None)


def ci_half_width(num_pairs: int) -> float:
    """Return half the width of the confidence interval in standard deviations of the differences (2 or more pairs)."""
    from scipy import stats

    return float(stats.t.ppf(1 - ALPHA / 2, num_pairs - 1)) / math.sqrt(num_pairs)
