"""The strategy `auto-rgn`: train all layers, each tensor with a learning rate set by its relative gradient norm."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from tuneforge import Diagnosis, Phase, TaskInfo, WeightAverage, component, ge, gt, hookimpl, option
from tuneforge.plugin import StrategyStep

UNBOUNDED_NORM = 1e4
"""Relative gradient norms from here on belong to tensors of zeros, where `Diagnosis` divides by 1e-12.

Others are seldom above 10.
"""


@component(api=1)
class AutoRGN:
    """Train all layers, and set the learning rate of each tensor before each epoch.

    Auto-RGN (Lee et al. 2023, arXiv 2210.11466): the relative gradient norm of a tensor w with gradient g is
    RGN = |g| / |w|, averaged over a few batches, and its learning rate in the next epoch is lr * RGN / max RGN. Tensors
    with the largest gradients on the new data train at the full learning rate, and those that fit already hardly
    change. As in the authors' code, RGN is measured on 5 batches, the learning rate is constant within an epoch, and
    the best epoch on validation is kept.

    The RGN of a tensor of zeros, such as the bias of a new head, is unbounded: the tensor trains at the full learning
    rate and is not counted in the maximum, because all other learning rates would become almost 0.
    """

    epochs: int = option(default=15, help="Number of epochs, each after a new measurement.", check=ge(1))
    lr: float = option(
        default=1e-3, help="Learning rate of the tensor with the largest relative gradient norm.", check=gt(0)
    )
    num_batches: int = option(default=5, help="Number of training batches for a measurement.", check=ge(1))
    restore_best: bool = option(default=True, help="Restore the weights of the best epoch at the end.")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Generator[StrategyStep, Any, None]:
        """Yield a diagnosis and a phase for each epoch."""
        sign = 1 if task.monitor_mode == "max" else -1
        metrics: dict[str, float] = {}
        for epoch in range(1, self.epochs + 1):
            diagnostics = yield Diagnosis(f"rgn-{epoch}", measure="gradients", by="tensor", batches=self.num_batches)
            scales = compute_lr_scales(diagnostics.values)
            result = yield Phase(f"epoch-{epoch}", train="all", epochs=1, lr=self.lr, lr_scales=scales)
            metrics[result.step_name] = sign * result.val[task.monitor]
        best, last = max(metrics, key=lambda name: metrics[name]), result.step_name
        if self.restore_best and best != last:
            yield WeightAverage(
                "best-epoch", snapshots=(best, last), weights=(0.0,)
            )  # a weight of 0 for the last epoch: the best one alone


def compute_lr_scales(norms: Mapping[str, float]) -> dict[str, float]:
    """Divide each relative gradient norm by the largest; return values from 0 to 1, which are 1 for unbounded norms.

    Args:
        norms: Relative gradient norms by tensor name.
    """
    largest = max((norm for norm in norms.values() if norm < UNBOUNDED_NORM), default=0.0)
    return {name: min(1.0, norm / (largest or 1.0)) for name, norm in norms.items()}
