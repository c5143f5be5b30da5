"""The progress of a phase: its metrics, its best epoch, and what a checkpoint has to hold of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine.context.run import Run
from tuneforge.engine.loop.backward import BackwardPass
from tuneforge.engine.loop.metric_set import scalar_metrics
from tuneforge.engine.model.extra_state import get_extra_states
from tuneforge.engine.model.module_state import full_state
from tuneforge.errors import HaltError, UsageError
from tuneforge.plugin.names import format_count
from tuneforge.plugin.steps import Phase

_STATE_FIELDS = (
    "stop_reason",
    "best_value",
    "best_epoch",
    "best_metrics",
    "best_state",
    "best_extra_states",
    "metrics",
    "history",
)


@attrs.define(eq=False)
class MetricTracker:
    """The metrics of a phase, its best epoch, and the reason why it ended.

    Args:
        phase: The phase.
        monitor: The metric that decides which epoch is the best.
        sign: 1.0 if larger values of it are better, else -1.0.
        stop_reason: Why the phase ended; "" while it trains.
        best_value: The monitored metric of the best epoch.
        best_epoch: The best epoch, counted from 1 within the phase; 0 before the first.
        best_metrics: All metrics of the best epoch.
        best_state: Trained parameters and all buffers after the best epoch, if the phase restores them.
        best_extra_states: The extra state of modules after the best epoch, in the same case.
        metrics: All metrics of the latest epoch.
        history: One entry per epoch: training loss and validation metrics.
        max_epochs: Epochs after which the phase ends; None for as many as it asks for.
    """

    phase: Phase
    monitor: str
    sign: float
    stop_reason: str = ""
    best_value: float = math.nan
    best_epoch: int = 0
    best_metrics: Mapping[str, Any] = attrs.field(factory=dict)
    best_state: dict[str, Tensor] = attrs.field(factory=dict)
    best_extra_states: dict[str, Any] = attrs.field(factory=dict)
    metrics: Mapping[str, Any] = attrs.field(factory=dict)
    history: list[dict[str, Any]] = attrs.field(factory=list)
    max_epochs: int | None = None

    def state(self) -> dict[str, Any]:
        """Return the state as tensors and plain data."""
        return {name: getattr(self, name) for name in _STATE_FIELDS}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        for name in _STATE_FIELDS:
            setattr(self, name, state[name])

    def update(self, run: Run, loss: float, trainable: list[str], metrics: Mapping[str, Any]) -> None:
        """Add the metrics of an epoch, and decide whether it is the best so far and whether the phase ends.

        If the phase restores the best weights, trained parameters and all buffers of the best epoch are copied.

        Raises:
            UsageError: No component computes the monitored metric.
            HaltError: The phase ends, and the monitored metric was NaN or Inf after every epoch.
        """
        numbers = scalar_metrics(metrics)
        decides = self.phase.patience is not None or self.phase.restore_best or self.phase.monitor is not None
        if decides and self.monitor not in numbers:
            raise UsageError(
                f"no component computes the metric '{self.monitor}'",
                where=f"phase '{self.phase.name}'",
                why="early stopping and best weights depend on it",
                fix=f"monitor one of {', '.join(sorted(numbers))}",
            )
        self.metrics = metrics
        self.history.append({"epoch": len(self.history) + 1, "train": {"loss": loss}, "val": numbers})
        value = numbers.get(self.monitor, math.nan)
        improvement = self.sign * (value - self.best_value)
        if (
            self.best_epoch == 0
            or improvement > self.phase.min_delta
            or (math.isnan(self.best_value) and not math.isnan(value))
        ):
            self.best_value, self.best_epoch, self.best_metrics = value, len(self.history), metrics
            if self.phase.restore_best:
                frozen = set(run.model.parameters()) - set(trainable)
                state = full_state(run.model.module)
                self.best_state = {name: tensor.clone() for name, tensor in state.items() if name not in frozen}
                self.best_extra_states = copy.deepcopy(get_extra_states(run.model.module))
        self.stop_reason = self._find_stop_reason(is_complete=run.steps_done >= run.total_steps)
        if decides and self.stop_reason and not math.isfinite(self.best_value):
            raise HaltError(
                f"the metric '{self.monitor}' is {self.best_value} after every epoch",
                where=f"phase '{self.phase.name}'",
                why="early stopping and best weights depend on it",
                fix="look at what computes the metric, or monitor another one",
            )

    def _find_stop_reason(self, *, is_complete: bool) -> str:
        if len(self.history) == self.max_epochs:
            return f"{format_count(self.max_epochs, 'epoch')} completed, as many as before the refit"
        since = len(self.history) - self.best_epoch
        if self.phase.patience is not None and since >= self.phase.patience:
            return (
                f"early stopping: {self.monitor} did not improve for {format_count(since, 'epoch')}, "
                f"best {self.best_value:.4f}"
            )
        if is_complete:
            epochs, steps = self.phase.epochs, self.phase.steps or 0
            return f"{format_count(epochs, 'epoch') if epochs else format_count(steps, 'step')} completed"
        return ""


@attrs.define(eq=False)
class PhaseProgress:
    """The progress of a phase: what a checkpoint holds, beside weights and optimizer, for a bit-exact resume.

    Args:
        tracker: The metrics so far.
        backward_pass: Computes the gradients of the phase.
        loss_sum: Sum of the losses of this epoch's samples, on the device.
        num_samples: Samples of this epoch so far.
        next_batch: Index of the next batch of the epoch.
    """

    tracker: MetricTracker
    backward_pass: BackwardPass
    loss_sum: Tensor
    num_samples: int = 0
    next_batch: int = 0

    @property
    def is_best(self) -> bool:
        """True at the end of an epoch that is the best of the phase so far."""
        return self.next_batch == 0 and 0 < self.tracker.best_epoch == len(self.tracker.history)

    def next_epoch(self, run: Run, *, complete: bool) -> float:
        """Begin the next epoch, and return the mean loss of the one that ended.

        Raises:
            HaltError: The loss is non-finite, or every step of a complete epoch was skipped.
        """
        self.loss_sum, self.num_samples = self._all_reduce(run)
        if not self.num_samples and complete:
            raise HaltError(
                "every step of an epoch was skipped",
                where=f"epoch {run.epoch + 1}",
                why="a loss or a gradient was NaN or Inf in each of them, so the weights are at fault, not a batch",
                fix="start a new run with a lower learning rate, or with --callback grad-clip",
            )
        earlier = [entry["train"]["loss"] for entry in run.history[-1:]]
        mean = float(self.loss_sum) / self.num_samples if self.num_samples else next(iter(earlier), 0.0)
        self.loss_sum, self.num_samples, self.next_batch = torch.zeros_like(self.loss_sum), 0, 0
        return _check_finite(run, mean)

    def state(self, run: Run) -> dict[str, Any]:
        """Return the state as tensors and plain data."""
        freeze_check = run.engine_state.freeze_check
        assert freeze_check is not None
        loss, count = self._all_reduce(run)
        feature_cache = run.forward_pass.feature_cache
        return {
            "loss": loss,
            "count": count,
            "batch": self.next_batch,
            "steps_done": run.steps_done,
            "total_steps": run.total_steps,
            "nonfinite": self.backward_pass.nonfinite.state(),
            "metrics": self.tracker.state(),
            "freeze_check": freeze_check.state(),
            "cached": run.engine_state.is_cached,
            # A resumed phase traces the model as it is by then; this one drops its cache at the next pass.
            "cache_change": feature_cache.find_change(evaluating=False) if feature_cache is not None else "",
        }

    @classmethod
    def from_state(
        cls, state: dict[str, Any], tracker: MetricTracker, backward_pass: BackwardPass, run: Run
    ) -> PhaseProgress:
        """Return the progress that `state` described, and set the run's counters of the phase."""
        tracker.load_state(state["metrics"])
        run.steps_done, run.engine_state.is_cached = state["steps_done"], state["cached"]
        run.total_steps = state["total_steps"]
        run.progress = run.steps_done / run.total_steps
        if not run.process_group.is_main:  # the saved sum is that of all ranks, so only rank 0 continues with it
            return cls(tracker, backward_pass, torch.zeros_like(state["loss"]), 0, state["batch"])
        return cls(tracker, backward_pass, state["loss"], state["count"], state["batch"])

    def _all_reduce(self, run: Run) -> tuple[Tensor, int]:
        """Return the sum of losses and the number of samples over all ranks."""
        if run.process_group.world_size == 1:
            return self.loss_sum, self.num_samples
        loss, count = run.process_group.all_reduce(self.loss_sum, torch.tensor(self.num_samples))
        return loss, int(count)


def _check_finite(run: Run, loss: float) -> float:
    if math.isfinite(loss):
        return loss
    assert run.phase is not None
    raise HaltError(
        f"the training loss is {loss}",
        where=f"phase '{run.phase.name}', epoch {run.epoch + 1}",
        why="a step of this epoch made the weights NaN or Inf",
        fix="lower the learning rate, add --callback grad-clip, or look for NaN and Inf in the data",
    )
