"""Steps that change weights without training: `HeadFit` solves the head, `WeightAverage` mixes snapshots."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tuneforge.engine.context.run import Run
from tuneforge.engine.feature_cache.cache import try_build_feature_cache
from tuneforge.engine.loop.evaluation import compute_head_features, evaluate
from tuneforge.engine.loop.metric_set import resolve_monitor, scalar_metrics
from tuneforge.engine.model.freeze_check import FreezeCheck, bitwise_equal
from tuneforge.engine.model.freezing import freeze, full_state, restore_state, select
from tuneforge.engine.model.fsdp import full_tensor, shard_like
from tuneforge.errors import DataError, UsageError
from tuneforge.plugin.results import StrategyStepResult
from tuneforge.plugin.steps import HeadFit, WeightAverage

Snapshot = dict[str, Tensor]


def fit_head(run: Run, step: HeadFit) -> StrategyStepResult:
    """Do a `HeadFit` step: features once, the head solved to convergence and loaded.

    Raises:
        DataError: The targets know no way to solve a head.
    """
    trainable = select(run.model, ["head"])
    freeze(run.model, trainable)
    modes = [(module, False) for module in run.model.module.modules()]
    freeze_check = FreezeCheck.begin(run.model, trainable, modes)
    feature_cache = try_build_feature_cache(run, modes, epochs=1)
    if feature_cache is not None and run.model.head in dict(feature_cache.eval_tail.named_modules()):
        run.forward_pass.feature_cache = feature_cache  # an exported graph holds operations, of which none is the head
    features, targets = compute_head_features(run, run.data.train)
    _load_head(run.model.head_module(), *run.data.targets.fit_head(features, targets, l2=step.l2), features)
    run.optimization.reset_state()
    never_updated = freeze_check.finish(run.model)
    val, run.forward_pass.feature_cache = evaluate(run, run.data.val, "val"), None
    sizes = {name: parameter.numel() for name, parameter in run.model.parameters().items()}
    num_trainable = sum(sizes[name] for name in trainable)
    return StrategyStepResult(
        step_name=step.name,
        reason=f"head solved on {len(features)} frozen features",
        val=val,
        num_trainable=num_trainable,
        num_frozen=sum(sizes.values()) - num_trainable,
        never_updated=never_updated,
    )


def _load_head(head: nn.Module, weight: Tensor, bias: Tensor, features: Tensor) -> None:
    """Copy a solved head in, and see that it answers as solved.

    Raises:
        DataError: The head is no plain linear map with a bias, or its weight is computed from something else.
    """
    plain = isinstance(head, (nn.Linear, nn.Conv2d)) and head.bias is not None and head.weight.numel() == weight.numel()
    if isinstance(head, (nn.Linear, nn.Conv2d)) and head.bias is not None and plain:
        with torch.no_grad():
            head.weight.copy_(shard_like(head.weight, weight.reshape(head.weight.shape)))
            head.bias.copy_(shard_like(head.bias, bias))
        held = full_tensor(head.weight.detach()).reshape(weight.shape).to(weight)  # not so where the weight is computed
        plain = torch.allclose(held, weight, rtol=1e-3, atol=1e-6)
    if not plain:
        raise DataError(
            f"the head, a {type(head).__name__} on {tuple(features.shape)} features, cannot be solved",
            why="HeadFit needs a linear layer (or 1x1 convolution) with a bias, whose weight is a parameter",
            fix="use a strategy without HeadFit",
        )


def average_weights(run: Run, step: WeightAverage, snapshots: Mapping[str, Snapshot]) -> StrategyStepResult:
    """Do a `WeightAverage` step: each candidate is evaluated on validation, the best one is kept.

    Raises:
        UsageError: A snapshot of that name does not exist, or no metric gives the monitored figure.
    """
    for name in step.snapshots:
        if name not in snapshots:
            raise UsageError(
                f"there is no snapshot '{name}'", where=f"step '{step.name}'", fix=f"known: {', '.join(snapshots)}"
            )
    chosen = [snapshots[name] for name in step.snapshots]
    candidates = (
        {weight: interpolate(chosen[0], chosen[1], weight) for weight in step.weights}
        if len(chosen) == 2
        else {1 / len(chosen): average_snapshots(chosen)}  # of one: itself
    )
    monitor, sign = resolve_monitor(run.data.targets, step.monitor, step.monitor_mode)
    metrics = {}
    for weight, state in candidates.items():
        restore_state(run.model.module, state)
        metrics[weight] = evaluate(run, run.data.val, "val")
        if monitor not in scalar_metrics(metrics[weight]):
            raise UsageError(f"no metric gives the figure '{monitor}'", where=f"step '{step.name}'")
    best = max(candidates, key=lambda weight: _nan_as_worst(sign * metrics[weight][monitor]))
    restore_state(run.model.module, candidates[best])
    run.optimization.reset_state()
    return StrategyStepResult(
        step_name=step.name,
        reason=f"weight {best:g} is best of {len(candidates)} on validation",
        val=metrics[best],
        history=[{"weight": weight, "val": scalar_metrics(found)} for weight, found in metrics.items()],
        selection={"weight": best},
    )


def take_snapshot(run: Run, before: Snapshot | None) -> Snapshot:
    """The whole state now; tensors equal to the snapshot before are shared with it, so frozen ones cost nothing."""
    state = full_state(run.model.module)
    if before is None:
        return {name: tensor.clone() for name, tensor in state.items()}
    return {
        name: before[name] if bitwise_equal(before[name], tensor) else tensor.clone() for name, tensor in state.items()
    }


def interpolate(first: Snapshot, last: Snapshot, weight: float) -> Snapshot:
    """`first` and `last` interpolated; equal tensors stay equal to the bit, and 0 and 1 give the ends exactly."""
    return {name: _lerp(tensor, last[name], weight) for name, tensor in first.items()}


def average_snapshots(states: list[Snapshot]) -> Snapshot:
    """The mean of several states, written so that tensors equal in all of them stay equal to the bit."""
    mean = {name: tensor.clone() for name, tensor in states[0].items()}
    for count, state in enumerate(states[1:], start=2):
        for name, tensor in mean.items():
            tensor.copy_(_lerp(tensor, state[name], 1 / count))
    return mean


def _lerp(first: Tensor, last: Tensor, weight: float) -> Tensor:
    """Numbers interpolated where they differ (an infinite mask stays what it is); counts are the last one's."""
    if not (first.is_floating_point() or first.is_complex()):
        return last
    return torch.where(first == last, first, torch.lerp(first, last, weight))


def _nan_as_worst(value: float) -> float:
    return -math.inf if math.isnan(value) else value
