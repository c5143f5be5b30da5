"""Which learning rate to begin with: the loss after one step at each of a range of rates, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from tuneforge.engine.loop.diagnosis import measure_lrs
from tuneforge.errors import UsageError
from tuneforge.plugin.steps import Diagnosis

if TYPE_CHECKING:
    from tuneforge.engine.session.engine import Engine


@attrs.frozen
class LRFindResult:
    """What a range of learning rates does to the loss.

    Args:
        losses: Loss after one optimizer step, by rate, in rising order; NaN or infinite where the step broke it.
        smoothed: The same, smoothed over neighbours; up to the first that is no number.
        lowest_lr: The rate at which the smoothed loss is least.
        steepest_lr: The rate at which it falls most over the logarithm of the rate.
        suggestion: What follows from that; None where no rate lowers the loss.
        reason: Why, in a sentence.
        num_trained: Numbers that would train.
    """

    losses: Mapping[float, float]
    smoothed: Mapping[float, float]
    lowest_lr: float
    steepest_lr: float | None
    suggestion: float | None
    reason: str
    num_trained: int = 0

    def plot(self, path: str | Path) -> None:
        """Write a picture of the loss over the rate: PNG, or what the name's ending says.

        Raises:
            UsageError: It cannot be written there.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        axes.plot(list(self.losses), list(self.losses.values()), "o", markersize=3, color="0.6", label="measured")
        axes.plot(list(self.smoothed), list(self.smoothed.values()), color="tab:blue", label="smoothed")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color="tab:orange", label=f"suggestion {self.suggestion:.1e}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss after one step", ylim=_plot_limits(self))
        axes.legend()
        try:
            figure.savefig(path, dpi=150)
        except (ValueError, OSError) as error:  # ValueError: an ending that stands for no kind of picture
            fix = "name a .png file in a folder that is there"
            raise UsageError(f"cannot draw '{path}'", where="--plot", why=str(error), fix=fix) from None


def lr_find(engine: Engine, *, train: str | tuple[str, ...] | list[str] = "all", batches: int = 5) -> LRFindResult:
    """Look for the learning rate of a phase that trains what `train` selects, with the engine's data and model.

    The range test of Smith 2015 (arXiv 1506.01186), but each rate starts from the same weights, so that a rate is not
    judged by what the rates before it have done, and nothing has moved afterwards: weights, buffers, modes and random
    generators are those from before, to the bit.

    The suggestion is the rate at which the smoothed loss falls most steeply, fastai's `steep` (Howard and Gugger 2020,
    arXiv 2002.04688). On a quadratic that is half the rate of the best step. One step knows nothing of momentum m,
    which in the long run multiplies a rate by 1 / (1 - m): the suggestion is divided by that.

    Args:
        engine: Made for this call: an engine that has looked does not run.
        train: Selectors, as `Phase` takes them.
        batches: Training batches over which each rate's loss is averaged.

    Raises:
        SelectorError: Nothing is selected.
    """
    step = Diagnosis("lr-find", measure="lrs", train=train, batches=batches)
    losses, momentum, num_trained = measure_lrs(engine.prepare(), step)
    return attrs.evolve(suggest_lr(losses, momentum=momentum), num_trained=num_trained)


def suggest_lr(losses: Mapping[float, float], *, momentum: float = 0.0) -> LRFindResult:
    """What follows from losses by rate, the first of which is a number.

    Args:
        losses: By rate, evenly spaced in the logarithm, in rising order.
        momentum: The optimizer's.
    """
    smoothed = _smooth(losses)
    lowest = min(smoothed, key=lambda rate: smoothed[rate])
    rates, values = list(smoothed), list(smoothed.values())
    end = rates.index(lowest)
    if end == 0:
        return LRFindResult(losses, smoothed, lowest, None, None, f"no rate lowers the loss below {values[0]:.4g}")
    slopes = [values[place + 1] - values[max(place - 1, 0)] for place in range(end)]
    steepest = rates[slopes.index(min(slopes))]
    reason = "where the loss after one step falls most steeply"
    if momentum:
        reason = (
            f"a step at {steepest:.1e} is {reason}, and momentum {momentum:g} makes {1 / (1 - momentum):.3g} of one"
        )
    if lowest == list(losses)[-1]:
        reason += "; it still falls at the highest rate that was tried"
    return LRFindResult(losses, smoothed, lowest, steepest, steepest * (1 - momentum), reason)


def _smooth(losses: Mapping[float, float]) -> dict[float, float]:
    """Each loss with half the weight, its two neighbours with a quarter; up to the first that is no number."""
    rates = list(losses)
    broken = next((place for place, rate in enumerate(rates) if not math.isfinite(losses[rate])), len(rates))
    values = [losses[rate] for rate in rates[:broken]]
    padded = [values[0], *values, values[-1]]
    return {
        rate: (padded[place] + 2 * padded[place + 1] + padded[place + 2]) / 4
        for place, rate in enumerate(rates[:broken])
    }


def _plot_limits(result: LRFindResult) -> tuple[float, float]:
    """The losses worth seeing: from the least to as far above the first as that lies above the least."""
    first, least = next(iter(result.losses.values())), min(result.smoothed.values())
    margin = max(first - least, 1e-3 * abs(first)) / 2
    return least - margin / 2, first + 2 * margin
