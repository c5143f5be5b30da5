"""The course of the learning rate over a phase: pure functions of progress, in factors on the peak rate.

Progress runs from 0 at a phase's start to 1 at its end, so a schedule knows neither steps nor epochs: a phase that
is resumed, or stretched, asks the same function. A factor of 1 is the peak rate that the phase names.
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
    """The peak rate throughout."""

    def factor(self, progress: float) -> float:
        """1 at any progress."""
        del progress
        return 1.0


@component(api=1)
class StepDecay:
    """Multiply the rate by `gamma` at each milestone: gamma ** (number of milestones reached).

    The stepwise decay of He et al. 2015 (arXiv 1512.03385), with the milestones in shares of the phase.
    """

    milestones: tuple[float, ...] = option(
        default=(0.5, 0.75), help="Progress at which the rate drops.", check=_MILESTONES
    )
    gamma: float = option(default=0.1, help="Factor on the rate at each milestone.", check=between(0, 1))

    def factor(self, progress: float) -> float:
        """The factor at `progress`; at a milestone itself the rate has dropped."""
        return self.gamma ** sum(progress >= milestone for milestone in self.milestones)


@component(api=1)
class Cosine:
    """Rise linearly from 0, then fall to the floor along half a cosine.

    With p the share done since the warm-up's end: floor + (1 - floor) * (1 + cos(pi * p)) / 2, which is equation 5 of
    SGDR (Loshchilov and Hutter 2017, arXiv 1608.03983) without restarts; the warm-up is Goyal et al.'s (2017, arXiv
    1706.02677). Continuous where there is a warm-up or none.
    """

    warmup: float = option(default=0.1, help="Share of the phase in which the rate rises.", check=between(0, 1))
    floor: float = option(default=0.0, help="Factor at the end.", check=between(0, 1))

    def factor(self, progress: float) -> float:
        """The factor at `progress`."""
        if progress < self.warmup:
            return progress / self.warmup
        return _cosine_interpolate(self.floor, _fraction_done(progress, self.warmup, 1.0))


@component(api=1)
class OneCycle:
    """Rise from 1/div to the peak along half a cosine, then fall to 1/final_div along another.

    The one-cycle policy of Smith (2018, arXiv 1803.09820) in the form of fastai's `fit_one_cycle`: both divisors are
    of the peak rate. (PyTorch's OneCycleLR divides the *initial* rate to get the final one: its `final_div_factor` is
    `final_div / div` here.) Defaults are fastai's, with the `pct_start` of its `fine_tune`. Continuous.
    """

    pct_start: float = option(default=0.3, help="Share of the phase in which the rate rises.", check=between(0, 1))
    div: float = option(default=25.0, help="Peak rate over the rate at the start.", check=ge(1))
    final_div: float = option(default=1e5, help="Peak rate over the rate at the end.", check=ge(1))

    def factor(self, progress: float) -> float:
        """The factor at `progress`."""
        if progress < self.pct_start:
            return _cosine_interpolate(1 / self.div, 1 - progress / self.pct_start)
        return _cosine_interpolate(1 / self.final_div, _fraction_done(progress, self.pct_start, 1.0))


@component(api=1)
class SlantedTriangular:
    """Rise linearly from 1/ratio to the peak in a short share, then fall linearly back to 1/ratio.

    ULMFiT, equation 3 (Howard and Ruder 2018, arXiv 1801.06146): (1 + p * (ratio - 1)) / ratio, where p climbs from 0
    to 1 over `cut` and falls back to 0 over the rest; the paper's defaults. Continuous.
    """

    cut: float = option(default=0.1, help="Share of the phase in which the rate rises.", check=between(0, 1))
    ratio: float = option(default=32.0, help="Peak rate over the lowest one.", check=ge(1))

    def factor(self, progress: float) -> float:
        """The factor at `progress`."""
        height = progress / self.cut if progress < self.cut else 1 - _fraction_done(progress, self.cut, 1.0)
        return (1 + height * (self.ratio - 1)) / self.ratio


def _fraction_done(progress: float, start: float, stop: float) -> float:
    """How much of the stretch from `start` to `stop` is done; none of a stretch without length."""
    return (progress - start) / (stop - start) if stop > start else 0.0


def _cosine_interpolate(low: float, distance: float) -> float:
    """Half a cosine from 1 at distance 0 from the peak to `low` at distance 1."""
    return low + (1 - low) * (1 + math.cos(math.pi * distance)) / 2
