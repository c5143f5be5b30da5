"""Paired comparisons of two models on the same samples.

Shapes: n samples.
"""

from __future__ import annotations

import math

from torch import Tensor

_CONFIDENCE_LEVEL = 0.95
_MIN_ALPHA = 1e-12


def min_num_pairs(alpha: float) -> int:
    """So many samples are needed at least for McNemar's exact test to find a difference at a level of `alpha`."""
    return 1 + math.ceil(-math.log2(max(alpha, _MIN_ALPHA)))


def accuracy_loss_bound(champion: Tensor, challenger: Tensor) -> tuple[float, float]:
    """The share of right answers lost, and the upper end of its one-sided 95 % interval.

    The interval for paired shares is Bonett and Price's (2012, J. Educ. Behav. Stat. 37): one answer of each kind of
    disagreement is added, so that it holds for few of them.

    Args:
        champion: Right answers of the champion, bool (n,).
        challenger: Those of the challenger.
    """
    from scipy import stats

    count = len(champion)
    lost, won = int((champion & ~challenger).sum()), int((challenger & ~champion).sum())
    down, up = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    spread = math.sqrt((down + up - (down - up) ** 2) / (count + 2))
    return (lost - won) / count, down - up + float(stats.norm.ppf(_CONFIDENCE_LEVEL)) * spread


def error_increase_bound(champion: Tensor, challenger: Tensor) -> tuple[float, float]:
    """By which share the mean error grew, and the upper end of its one-sided 95 % interval (Student's, paired).

    Args:
        champion: Errors of the champion (n,).
        challenger: Those of the challenger.
    """
    from scipy import stats

    more, count = challenger - champion, len(challenger)
    scale = max(float(champion.mean()), 1e-12)
    mean = float(more.mean())
    error = float(more.std()) / math.sqrt(count) if count > 1 else math.inf
    reach = float(stats.t.ppf(_CONFIDENCE_LEVEL, max(count - 1, 1))) * error
    return mean / scale, (mean + reach) / scale


def superiority_test(champion: Tensor, challenger: Tensor, *, is_classification: bool) -> tuple[bool, float]:
    """Whether the challenger is ahead, and the two-sided p value of that.

    Args:
        champion: How wrong each answer of the champion is (n,); 0 is right.
        challenger: The same of the challenger.
        is_classification: True for McNemar's exact test on right and wrong; False for a paired t test on the errors.
    """
    from scipy import stats

    if is_classification:
        lost, won = (
            int(((one == 0) & (other != 0)).sum()) for one, other in ((champion, challenger), (challenger, champion))
        )
        return won > lost, float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    less = (champion - challenger).numpy()
    if len(less) < 2 or not less.std():
        return bool(less.mean() > 0), 1.0
    return bool(less.mean() > 0), float(stats.ttest_1samp(less, 0.0).pvalue)
