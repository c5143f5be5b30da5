"""Learning rate schedules: pure functions from the progress of a phase to a factor on its peak learning rate.

Progress goes from 0 at the start of a phase to 1 at its end, so a schedule depends on neither steps nor epochs, and a
resumed phase evaluates the same function. The factor 1 is the peak learning rate of the phase.
"""

from __future__ import annotations

import math

from tuneforge import between, component, ge, option
from tuneforge.plugin import Check

_MILESTONES = Check(
    "rising numbers from 0 to 1",
    lambda values: list(values) == sorted(set(values)) and all(0 <= value <= 1 for value in values),
)


@component(api=1)
class Constant:
    """A constant learning rate."""

    def factor(self, progress: float) -> float:
        """Return 1."""
        del progress
        return 1.0


@component(api=1)
class StepDecay:
    """Multiply the learning rate by `gamma` at each milestone: gamma ** (number of milestones reached).

    The stepwise decay of He et al. 2015 (arXiv 1512.03385), with the milestones as fractions of the phase.
    """

    milestones: tuple[float, ...] = option(
        default=(0.5, 0.75), help="Progress at which the learning rate drops.", check=_MILESTONES
    )
    gamma: float = option(default=0.1, help="Factor on the learning rate at each milestone.", check=between(0, 1))

    def factor(self, progress: float) -> float:
        """Return the factor at `progress`; at a milestone, that after the drop."""
        return self.gamma ** sum(progress >= milestone for milestone in self.milestones)


@component(api=1)
class Cosine:
    """Linear warm-up from 0, then cosine annealing to `floor`.

    With p the progress since the end of the warm-up, from 0 to 1: floor + (1 - floor) * (1 + cos(pi * p)) / 2, which is
    equation 5 of SGDR (Loshchilov and Hutter 2017, arXiv 1608.03983) without restarts. The warm-up is that of Goyal et
    al. (2017, arXiv 1706.02677).
    """

    warmup: float = option(default=0.1, help="Fraction of the phase for the increase.", check=between(0, 1))
    floor: float = option(default=0.0, help="Factor at the end.", check=between(0, 1))

    def factor(self, progress: float) -> float:
        """Return the factor at `progress`."""
        if progress < self.warmup:
            return progress / self.warmup
        return _cosine_interpolate(self.floor, _fraction_done(progress, self.warmup, 1.0))


@component(api=1)
class OneCycle:
    """Cosine increase from 1/div to the peak, then cosine decrease to 1/final_div.

    The one-cycle policy of Smith (2018, arXiv 1803.09820) in the form of fastai's `fit_one_cycle`: both divisors apply
    to the peak learning rate. (PyTorch's OneCycleLR divides the *initial* learning rate to get the final one: its
    `final_div_factor` is `final_div / div` here.) Defaults are fastai's, with the `pct_start` of its `fine_tune`.
    """

    pct_start: float = option(default=0.3, help="Fraction of the phase for the increase.", check=between(0, 1))
    div: float = option(default=25.0, help="Ratio of the peak and the initial learning rate.", check=ge(1))
    final_div: float = option(default=1e5, help="Ratio of the peak and the final learning rate.", check=ge(1))

    def factor(self, progress: float) -> float:
        """Return the factor at `progress`."""
        if progress < self.pct_start:
            return _cosine_interpolate(1 / self.div, 1 - progress / self.pct_start)
        return _cosine_interpolate(1 / self.final_div, _fraction_done(progress, self.pct_start, 1.0))


@component(api=1)
class SlantedTriangular:
    """Short linear increase from 1/ratio to the peak, then linear decrease back to 1/ratio.

    ULMFiT, equation 3 (Howard and Ruder 2018, arXiv 1801.06146): (1 + p * (ratio - 1)) / ratio, where p increases
    from 0 to 1 over `cut` and decreases to 0 over the rest; the defaults are the paper's.
    """

    cut: float = option(default=0.1, help="Fraction of the phase for the increase.", check=between(0, 1))
    ratio: float = option(default=32.0, help="Ratio of the peak and the lowest learning rate.", check=ge(1))

    def factor(self, progress: float) -> float:
        """Return the factor at `progress`."""
        height = progress / self.cut if progress < self.cut else 1 - _fraction_done(progress, self.cut, 1.0)
        return (1 + height * (self.ratio - 1)) / self.ratio


def _fraction_done(progress: float, start: float, stop: float) -> float:
    """Return the progress from `start` to `stop` as a fraction; 0 for an empty interval."""
    return (progress - start) / (stop - start) if stop > start else 0.0


def _cosine_interpolate(low: float, distance: float) -> float:
    """Return half a cosine from 1 at distance 0 from the peak to `low` at distance 1."""
    return low + (1 - low) * (1 + math.cos(math.pi * distance)) / 2
