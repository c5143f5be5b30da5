"""`auto-rgn`: every layer trains, each tensor at the rate that its own relative gradient asks for."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from tuneforge import Diagnosis, Phase, TaskInfo, WeightAverage, component, ge, gt, hookimpl, option
from tuneforge.plugin import StrategyStep

UNBOUNDED_NORM = 1e4
"""A relative gradient norm from here on is that of zeros: a probe divides by 1e-12 there. Others seldom exceed 10."""


@component(api=1)
class AutoRGN:
    """Train all layers, and measure before each epoch at which rate each tensor does.

    Auto-RGN (Lee et al. 2023, arXiv 2210.11466): with g a tensor's gradient and w its value, its relative
    gradient norm RGN = |g| / |w|, the mean over a few batches, and its rate in the next epoch lr * RGN / max RGN. What
    the new data pulls at most trains at the full rate, what fits already hardly moves. As in the authors' code: 5
    batches, a constant rate within an epoch, and the best epoch on validation is kept.

    A tensor that is all zero, as the bias of a new head, has no relative norm: it gets the full rate and does not count
    for the maximum, else it would bring the rate of everything else to nothing.
    """

    epochs: int = option(default=15, help="Epochs, each after a new measurement.", check=ge(1))
    lr: float = option(default=1e-3, help="Learning rate where the relative gradient is largest.", check=gt(0))
    num_batches: int = option(default=5, help="Training batches that a measurement looks at.", check=ge(1))
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Generator[StrategyStep, Any, None]:
        """For each epoch a probe and a phase."""
        sign = 1 if task.monitor_mode == "max" else -1
        metrics: dict[str, float] = {}
        for epoch in range(1, self.epochs + 1):
            readings = yield Diagnosis(f"rgn-{epoch}", measure="gradients", by="tensor", batches=self.num_batches)
            scales = compute_lr_scales(readings.values)
            report = yield Phase(f"epoch-{epoch}", train="all", epochs=1, lr=self.lr, lr_scales=scales)
            metrics[report.step_name] = sign * report.val[task.monitor]
        best, last = max(metrics, key=lambda name: metrics[name]), report.step_name
        if self.restore_best and best != last:
            yield WeightAverage("best-epoch", snapshots=(best, last), weights=(0.0,))  # 0: all of the first


def compute_lr_scales(norms: Mapping[str, float]) -> dict[str, float]:
    """Each tensor's relative gradient norm over the largest of them, from 0 to 1; 1 where it is unbounded.

    Args:
        norms: Relative gradient norm by tensor name.
    """
    largest = max((norm for norm in norms.values() if norm < UNBOUNDED_NORM), default=0.0)
    return {name: min(1.0, norm / (largest or 1.0)) for name, norm in norms.items()}
