"""One pass over a split: figures, and the worst mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Targets
from tuneforge.errors import UsageError


class Metrics(Protocol):
    """A streaming accumulator of figures; torchmetrics' objects fit as they are."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in one batch: the model's outputs (b, k) and the targets (b, ...), on the run's device."""

    def compute(self) -> Any:
        """The figures so far: a mapping by name (numbers, or nested plain data), or a single number."""


def scalar_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Only those figures that are one number."""
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def resolve_monitor(targets: Targets, metric: str | None, mode: str | None) -> tuple[str, float]:
    """The figure that decides, and a sign that makes more of it better.

    Args:
        targets: Whose own figure is taken where none is named.
        metric: As a step names it.
        mode: As a step declares it, `"max"` or `"min"`.

    Raises:
        UsageError: Nobody has said whether more of it is better.
    """
    name = metric or targets.monitor
    known = targets.monitor_mode if name == targets.monitor else _METRIC_MODES.get(name.removesuffix("_macro"))
    if mode is None and known is None:
        raise UsageError(
            f"is more of '{name}' better, or less?",
            where="monitor",
            why="a step watches it, and tuneforge does not know the figure",
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
    """The most wrong answers of a pass, kept while it streams.

    Args:
        max_samples: How many.
    """

    max_samples: int
    losses: Tensor = attrs.field(factory=lambda: torch.empty(0))
    indices: Tensor = attrs.field(factory=lambda: torch.empty(0, dtype=torch.int64))
    outputs: Tensor | None = None

    def reset(self) -> None:
        """Begin again."""
        self.losses, self.indices, self.outputs = torch.empty(0), torch.empty(0, dtype=torch.int64), None

    def update(self, losses: Tensor, indices: Tensor, outputs: Tensor) -> None:
        """Take in one batch: losses (b,), indices (b,), outputs (b, k)."""
        outputs = outputs.detach().float().cpu()
        all_outputs = outputs if self.outputs is None else torch.cat([self.outputs, outputs])
        all_losses = torch.cat([self.losses, losses.detach().float().cpu()])
        all_indices = torch.cat([self.indices, indices])
        order = torch.argsort(all_losses, descending=True, stable=True)[: self.max_samples]
        order = order[all_losses[order] > 0]
        self.losses, self.indices, self.outputs = all_losses[order], all_indices[order], all_outputs[order]
