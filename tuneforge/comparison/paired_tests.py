"""What figures of a few seeds can say: mean and spread, the paired t test, and Holm's correction for many tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np

ALPHA = 0.05
"""A corrected p below this is called a difference; intervals are those of 1 - ALPHA."""

_ROUNDING = 1e-9  # differences that vary by less than this share of the figures vary by rounding only


@attrs.frozen
class PairedTest:
    """The difference of two series of figures that belong together pair by pair.

    Args:
        num_pairs: Number of pairs.
        mean: Of first - second.
        std: Standard deviation of the differences; None for one pair.
        ci_low: Lower end of the interval of 1 - ALPHA around the mean, by itself, not corrected; None without a test.
        ci_high: Upper end.
        p_value: Two-sided, not corrected; None without a test.
        reason_untested: Why there is no test; empty where there is one.
    """

    num_pairs: int
    mean: float
    std: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p_value: float | None = None
    reason_untested: str = ""


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation with n - 1 (None for one value)."""
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_t_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
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
    """P values corrected for several comparisons (Holm 1979): the i-th smallest times (comparisons - i), never falling.

    Args:
        p_values: One a comparison; None where there was no test.
        num_comparisons: How many there were to begin with, at least as many as p values; one that was dropped on the
            way counts, as if its p were 1.

    Returns:
        Corrected values in the same order, at most 1; None stays None.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, (num_comparisons - rank) * p))
        corrected[place] = highest
    return corrected


def ci_half_width(num_pairs: int) -> float:
    """Half the width of an interval of 1 - ALPHA, in standard deviations of the differences, for 2 pairs or more."""
    from scipy import stats

    return float(stats.t.ppf(1 - ALPHA / 2, num_pairs - 1)) / math.sqrt(num_pairs)
