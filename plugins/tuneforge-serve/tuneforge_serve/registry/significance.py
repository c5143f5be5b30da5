"""Paired tests of two models on the same samples, and one-sided bounds for the non-inferiority test.

Shapes: n samples.
"""

from __future__ import annotations

import bisect
import math

import torch
from torch import Tensor

from tuneforge.comparison import paired_t_test

_CONFIDENCE_LEVEL = 0.95
_MIN_ALPHA = 1e-12


def min_num_pairs(alpha: float) -> int:
    """Return the number of samples below which McNemar's exact test cannot reach the significance level `alpha`."""
    return 1 + math.ceil(-math.log2(max(alpha, _MIN_ALPHA)))


def accuracy_loss_bound(champion: Tensor, challenger: Tensor) -> tuple[float, float]:
    """Return by how much the accuracy drops, and the upper bound of its one-sided 95 % interval.

    The interval for paired proportions is that of Bonett and Price (2012, J. Educ. Behav. Stat. 37): one sample of each
    kind of disagreement is added, which keeps its coverage when there are few of them.

    Args:
        champion: True where the champion is correct, bool (n,).
        challenger: True where the challenger is correct, bool (n,).
    """
    from scipy import stats

    count = len(champion)
    lost, won = int((champion & ~challenger).sum()), int((challenger & ~champion).sum())
    down, up = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    spread = math.sqrt((down + up - (down - up) ** 2) / (count + 2))
    return (lost - won) / count, down - up + float(stats.norm.ppf(_CONFIDENCE_LEVEL)) * spread


def min_samples(margin: float) -> int:
    """Return the fewest samples on which two models that always agree differ by at most `margin` in accuracy."""

    def is_enough(count: int) -> bool:
        agreed = torch.ones(count, dtype=torch.bool)
        return accuracy_loss_bound(agreed, agreed)[1] <= margin

    most = 1
    while not is_enough(most):
        most *= 2
    return bisect.bisect_left(range(most + 1), True, lo=1, key=is_enough)


def error_increase_bound(champion: Tensor, challenger: Tensor) -> tuple[float, float]:
    """Return the relative increase of the mean error, and the upper bound of its one-sided 95 % interval.

    The interval is that of Student's paired t test.

    Args:
        champion: Errors of the champion (n,).
        challenger: Errors of the challenger (n,).
    """
    from scipy import stats

    scale = max(float(champion.mean()), 1e-12)
    increase = float((challenger - champion).mean())
    if len(champion) < 2:
        return increase / scale, math.inf
    test = stats.ttest_rel(challenger.numpy(), champion.numpy(), alternative="less")
    bound = float(test.confidence_interval(_CONFIDENCE_LEVEL).high)
    return increase / scale, bound / scale


def superiority_test(champion: Tensor, challenger: Tensor, *, is_classification: bool) -> tuple[bool, float]:
    """Return whether the challenger is better, and the two-sided p value of the difference.

    Args:
        champion: Per-sample losses of the champion (n,); 0 is correct.
        challenger: Per-sample losses of the challenger (n,).
        is_classification: True for McNemar's exact test on correct and wrong predictions; False for a paired t test on
            the losses.
    """
    from scipy import stats

    if is_classification:
        lost, won = (
            int(((one == 0) & (other != 0)).sum()) for one, other in ((champion, challenger), (challenger, champion))
        )
        return won > lost, float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    test = paired_t_test(champion.tolist(), challenger.tolist())
    return test.mean > 0, 1.0 if test.p_value is None else test.p_value
