"""Learning rate range test: the loss after one optimizer step at each of a range of learning rates."""

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
    """The losses by learning rate and the suggestion.

    Args:
        losses: The loss after one optimizer step by learning rate, in ascending order; may be NaN or Inf.
        smoothed: The losses smoothed over neighbors, up to the first non-finite one.
        lowest_lr: The learning rate with the lowest smoothed loss.
        steepest_lr: The learning rate at which the smoothed loss decreases most per log(lr).
        suggestion: The suggested learning rate; None if none lowers the loss.
        reason: The reason for the suggestion.
        num_trained: The number of parameters that would train.
    """

    losses: Mapping[float, float]
    smoothed: Mapping[float, float]
    lowest_lr: float
    steepest_lr: float | None
    suggestion: float | None
    reason: str
    num_trained: int = 0

    def plot(self, path: str | Path) -> None:
        """Write a plot of the loss against the learning rate: PNG, or the format of the file's suffix.

        Raises:
            UsageError: The file cannot be written.
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
        except (ValueError, OSError) as error:  # ValueError: the suffix is no image format
            fix = "name a .png file in an existing directory"
            raise UsageError(f"cannot write the plot '{path}'", where="--plot", why=str(error), fix=fix) from None


def lr_find(engine: Engine, *, train: str | tuple[str, ...] | list[str] = "all", batches: int = 3) -> LRFindResult:
    """Suggest a learning rate for a phase that trains `train`, with the data and model of an engine.

    This is the range test of Smith 2015 (arXiv 1506.01186), except that each learning rate starts from the same
    weights, so that the result of one does not depend on those before it. Weights, buffers, modes and random
    generators are bit-identical before and after.

    The suggestion is the learning rate at which the smoothed loss decreases most steeply, fastai's `steep` (Howard and
    Gugger 2020, arXiv 2002.04688). On a quadratic that is half the learning rate of the best step. A single step does
    not show momentum m, which in the long run multiplies the learning rate by 1 / (1 - m), so the suggestion is
    multiplied by 1 - m.

    Args:
        engine: An engine for this call only; its `run` cannot be called afterwards.
        train: Selectors as in `Phase`.
        batches: The number of training batches over which each loss is averaged.

    Raises:
        SelectorError: `train` selects no parameter.
    """
    step = Diagnosis("lr-find", measure="lrs", train=train, batches=batches)
    losses, momentum, num_trained = measure_lrs(engine.prepare(), step)
    return attrs.evolve(suggest_lr(losses, momentum=momentum), num_trained=num_trained)


def suggest_lr(losses: Mapping[float, float], *, momentum: float = 0.0) -> LRFindResult:
    """Suggest a learning rate from losses, the first of which is finite.

    Args:
        losses: Losses by learning rate, evenly spaced in log(lr), in ascending order.
        momentum: The momentum of the optimizer.
    """
    smoothed = _smooth(losses)
    lowest = min(smoothed, key=lambda rate: smoothed[rate])
    rates, values = list(smoothed), list(smoothed.values())
    end = rates.index(lowest)
    if end == 0:
        return LRFindResult(
            losses, smoothed, lowest, None, None, f"no learning rate lowers the loss below {values[0]:.4g}"
        )
    slopes = [values[place + 1] - values[max(place - 1, 0)] for place in range(end)]
    steepest = rates[slopes.index(min(slopes))]
    reason = "where the loss after one step decreases most steeply"
    if momentum:
        reason = f"{steepest:.1e} is {reason}, and momentum {momentum:g} multiplies it by {1 / (1 - momentum):.3g}"
    if lowest == list(losses)[-1]:
        reason += "; it still decreases at the highest learning rate"
    return LRFindResult(losses, smoothed, lowest, steepest, steepest * (1 - momentum), reason)


def _smooth(losses: Mapping[float, float]) -> dict[float, float]:
    """Smooth with weights 1/4, 1/2, 1/4, up to the first non-finite loss."""
    rates = list(losses)
    broken = next((place for place, rate in enumerate(rates) if not math.isfinite(losses[rate])), len(rates))
    values = [losses[rate] for rate in rates[:broken]]
    padded = [values[0], *values, values[-1]]
    return {
        rate: (padded[place] + 2 * padded[place + 1] + padded[place + 2]) / 4
        for place, rate in enumerate(rates[:broken])
    }


def _plot_limits(result: LRFindResult) -> tuple[float, float]:
    """Return the range of losses to plot: from the lowest to somewhat above the first, which hides diverging ones."""
    first, least = next(iter(result.losses.values())), min(result.smoothed.values())
    margin = max(first - least, 1e-3 * abs(first)) / 2
    return least - margin / 2, first + 2 * margin
