"""Metrics of one pass over a split, which of them is monitored, and the samples with the largest loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Targets
from tuneforge.errors import UsageError


class Metrics(Protocol):
    """A streaming accumulator of metrics; the metric objects of torchmetrics can be used unchanged."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Add one batch: the model's outputs (b, k) and the targets (b, ...), on the run's device."""

    def compute(self) -> Any:
        """Return the metrics so far: a mapping by name to numbers or nested plain data, or a single number."""


def scalar_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return only the metrics that are a single number."""
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def resolve_monitor(targets: Targets, metric: str | None, mode: str | None) -> tuple[str, float]:
    """Return the name of the monitored metric, and the sign that makes larger values better.

    Args:
        targets: The targets, whose own metric is monitored if `metric` is None.
        metric: The metric that a strategy step names.
        mode: `"max"` or `"min"`, as a strategy step declares it; None for a metric that tuneforge knows.

    Raises:
        UsageError: It is unknown whether larger values of the metric are better.
    """
    name = metric or targets.monitor
    known = targets.monitor_mode if name == targets.monitor else _METRIC_MODES.get(name.removesuffix("_macro"))
    if mode is None and known is None:
        raise UsageError(
            f"it is unknown whether larger values of '{name}' are better",
            where="monitor",
            why="a strategy step monitors it, and tuneforge does not know the metric",
            fix='give the step monitor_mode="max" or monitor_mode="min"',
        )
    return name, 1.0 if (mode or known) == "max" else -1.0


_METRIC_MODES = {
    **dict.fromkeys(("accuracy", "precision", "recall", "f1", "recall_min", "exact_match", "r2"), "max"),
    **dict.fromkeys(("precision_weighted", "recall_weighted", "f1_weighted", "f1_micro"), "max"),
    **dict.fromkeys(("loss", "mae", "mse", "rmse", "ece", "hamming_loss"), "min"),
}


@attrs.define(eq=False)
class HardestSamples:
    """The samples with the largest loss of a pass.

    Args:
        max_samples: How many samples to keep.
        losses: Their losses (m,), in descending order.
        indices: Their indices (m,) in the split.
        outputs: The model's outputs (m, k) for them; None before the first batch.
    """

    max_samples: int
    losses: Tensor = attrs.field(factory=lambda: torch.empty(0))
    indices: Tensor = attrs.field(factory=lambda: torch.empty(0, dtype=torch.int64))
    outputs: Tensor | None = None

    def reset(self) -> None:
        """Drop all samples, before a pass is repeated."""
        self.losses, self.indices, self.outputs = torch.empty(0), torch.empty(0, dtype=torch.int64), None

    def update(self, losses: Tensor, indices: Tensor, outputs: Tensor) -> None:
        """Add one batch: losses (b,), indices (b,), outputs (b, k). Samples without a loss are not kept."""
        all_losses = torch.cat([self.losses, losses.detach().float().cpu()])
        order = torch.argsort(all_losses, descending=True, stable=True)[: self.max_samples]
        order = order[all_losses[order] > 0]
        num_kept = len(self.losses)
        chosen = order[order >= num_kept] - num_kept  # only these rows are copied: an output may have 20,000 classes
        outputs = outputs.detach()[chosen.to(outputs.device)].float().cpu()
        # The rows kept before come first, then the chosen ones, as in `all_losses`.
        rank = torch.where(order < num_kept, order, num_kept + (order >= num_kept).cumsum(0) - 1)
        self.losses, self.indices = all_losses[order], torch.cat([self.indices, indices])[order]
        self.outputs = (outputs if self.outputs is None else torch.cat([self.outputs, outputs]))[rank]
