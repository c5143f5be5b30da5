"""Execute a `WeightAverage` step: interpolate or average snapshots of the weights and keep the best."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from tuneforge.engine.context.run import Run
from tuneforge.engine.loop.evaluation import evaluate
from tuneforge.engine.loop.metric_set import resolve_monitor, scalar_metrics
from tuneforge.engine.loop.validation import check_validation
from tuneforge.engine.model.module_state import bitwise_equal, full_state, restore_state
from tuneforge.errors import HaltError, UsageError
from tuneforge.plugin.results import StrategyStepResult
from tuneforge.plugin.steps import WeightAverage

Snapshot = dict[str, Tensor]
"""Every parameter and buffer of the model by name."""


def average_weights(run: Run, step: WeightAverage, snapshots: Mapping[str, Snapshot]) -> StrategyStepResult:
    """Execute a `WeightAverage` step: evaluate each candidate on the validation split and keep the best.

    Raises:
        UsageError: No component computes the monitored metric.
        HaltError: The metric is NaN or Inf for every candidate.
    """
    chosen = [snapshots[name] for name in step.snapshots]
    candidates = (
        {weight: interpolate(chosen[0], chosen[1], weight) for weight in step.weights}
        if len(chosen) == 2
        else {1 / len(chosen): average_snapshots(chosen)}  # the average of one snapshot is the snapshot
    )
    check_validation(run, step)
    monitor, sign = resolve_monitor(run.data.targets, step.monitor, step.monitor_mode)
    metrics = {}
    for weight, state in candidates.items():
        restore_state(run.model.module, state)
        metrics[weight] = evaluate(run, run.data.val, "val")
        if len(run.data.val) and monitor not in scalar_metrics(metrics[weight]):
            raise UsageError(f"no component computes the metric '{monitor}'", where=f"step '{step.name}'")
    if len(run.data.val) and not any(math.isfinite(each[monitor]) for each in metrics.values()):
        raise HaltError(f"the metric '{monitor}' is NaN or Inf for every candidate", where=f"step '{step.name}'")
    best = max(candidates, key=lambda weight: _nan_as_worst(sign * metrics[weight].get(monitor, math.nan)))
    restore_state(run.model.module, candidates[best])
    run.optimization.reset_state()
    return StrategyStepResult(
        step_name=step.name,
        reason=f"weight {best:g} is the best of {len(candidates)} on validation",
        val=metrics[best],
        history=[{"weight": weight, "val": scalar_metrics(val)} for weight, val in metrics.items()],
        selection={"weight": best},
    )


def take_snapshot(run: Run, before: Snapshot) -> Snapshot:
    """Return a copy of the model's state; tensors equal to those of `before` are shared, which saves memory."""
    return {
        name: before[name] if name in before and bitwise_equal(before[name], tensor) else tensor.clone()
        for name, tensor in full_state(run.model.module).items()
    }


def check_unchanged(run: Run, last: Snapshot, changed: Collection[str], where: str) -> None:
    """Check that the weights are those of the last snapshot.

    Parameters that were replaced under another name (merged adapters) and converted ones are left out, and so are
    tensors that the model's forward pass writes to and buffers that the last strategy step changed.

    Raises:
        HaltError: A tensor differs.
    """
    parameters = run.model.parameters()
    differing = [
        name
        for name, tensor in full_state(run.model.module).items()
        if name in last
        and name not in run.engine_state.forward_writes.names
        and (tensor.dtype, tensor.shape) == (last[name].dtype, last[name].shape)
        and (name in parameters or name not in changed)
        and not bitwise_equal(tensor.to(last[name].device), last[name])
    ]
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise HaltError(
            f"{len(differing)} tensor(s) changed after the last step of the strategy: {', '.join(differing[:5])}{more}",
            where=where,
            why="frozen and trained weights must stay as the last step left them",
            fix="look for a callback that writes to them in evaluation_started, evaluation_ended or run_ended; change "
            "weights in phase_ended or after the run",
        )


def interpolate(first: Snapshot, last: Snapshot, weight: float) -> Snapshot:
    """Interpolate linearly: 0 returns `first` and 1 returns `last` exactly, and equal tensors stay bit-identical."""
    return {name: _lerp(tensor, last[name], weight) for name, tensor in first.items()}


def average_snapshots(states: list[Snapshot]) -> Snapshot:
    """Return the mean of several snapshots, as a running mean so that equal tensors stay bit-identical."""
    mean = {name: tensor.clone() for name, tensor in states[0].items()}
    for count, state in enumerate(states[1:], start=2):
        for name, tensor in mean.items():
            tensor.copy_(_lerp(tensor, state[name], 1 / count))
    return mean


def _lerp(first: Tensor, last: Tensor, weight: float) -> Tensor:
    """Interpolate where the values differ, so that equal infinities do not become NaN; integers are those of `last`."""
    if not (first.is_floating_point() or first.is_complex()):
        return last
    return torch.where(first == last, first, torch.lerp(first, last, weight))


def _nan_as_worst(value: float) -> float:
    return -math.inf if math.isnan(value) else value
