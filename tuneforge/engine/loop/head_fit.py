"""Steps that change weights without training: `Fit` solves the head, `Blend` mixes snapshots."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tuneforge.engine.context.run import Run
from tuneforge.engine.feature_cache.cache import kept_prefix
from tuneforge.engine.loop.evaluation import evaluate, head_features
from tuneforge.engine.loop.metric_set import single_numbers, watched
from tuneforge.engine.model.freeze_check import Proof, same_bits
from tuneforge.engine.model.freezing import freeze, put_back, select, whole_state
from tuneforge.engine.model.fsdp import like, whole
from tuneforge.errors import DataError, UsageError
from tuneforge.plugin.results import Report
from tuneforge.plugin.steps import Blend, Fit

Snapshot = dict[str, Tensor]


def fit(run: Run, step: Fit) -> Report:
    """Do a `Fit` step: features once, the head solved to convergence and loaded.

    Raises:
        DataError: The targets know no way to solve a head.
    """
    trained = select(run.model, ["head"])
    freeze(run.model, trained)
    plan = [(module, False) for module in run.model.module.modules()]
    proof = Proof.begin(run.model, trained, plan)
    run.prefix = kept_prefix(run, plan, epochs=1)
    if run.prefix is not None and run.model.head not in dict(run.prefix.evaluating.named_modules()):
        run.prefix = None  # an exported graph holds operations, of which none is the head
    features, targets = head_features(run, run.data.train)
    _load_head(run.model.head_module(), *run.data.targets.fit_head(features, targets, l2=step.l2), features)
    run.optimization.forget()
    unmoved = proof.conclude(run.model)
    val, run.prefix = evaluate(run, run.data.val, "val"), None
    sizes = {name: parameter.numel() for name, parameter in run.model.parameters().items()}
    solved_count = sum(sizes[name] for name in trained)
    return Report(
        step=step.name,
        reason=f"head solved on {len(features)} frozen features",
        val=val,
        trained=solved_count,
        frozen=sum(sizes.values()) - solved_count,
        unmoved=unmoved,
    )


def _load_head(head: nn.Module, weight: Tensor, bias: Tensor, features: Tensor) -> None:
    """Copy a solved head in, and see that it answers as solved.

    Raises:
        DataError: The head is no plain linear map with a bias, or its weight is computed from something else.
    """
    plain = isinstance(head, (nn.Linear, nn.Conv2d)) and head.bias is not None and head.weight.numel() == weight.numel()
    if isinstance(head, (nn.Linear, nn.Conv2d)) and head.bias is not None and plain:
        with torch.no_grad():
            head.weight.copy_(like(head.weight, weight.reshape(head.weight.shape)))
            head.bias.copy_(like(head.bias, bias))
        held = whole(head.weight.detach()).reshape(weight.shape).to(weight)  # not so where the weight is computed
        plain = torch.allclose(held, weight, rtol=1e-3, atol=1e-6)
    if not plain:
        raise DataError(
            f"the head, a {type(head).__name__} on {tuple(features.shape)} features, cannot be solved",
            why="Fit needs a linear layer (or 1x1 convolution) with a bias, whose weight is a parameter",
            fix="use a strategy without Fit",
        )


def blend(run: Run, step: Blend, snapshots: Mapping[str, Snapshot]) -> Report:
    """Do a `Blend` step: each candidate is evaluated on validation, the best one is kept.

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
        {weight: mixed(chosen[0], chosen[1], weight) for weight in step.weights}
        if len(chosen) == 2
        else {1 / len(chosen): averaged(chosen)}  # of one: itself
    )
    monitor, sign = watched(run.data.targets, step.monitor, step.monitor_mode)
    figures = {}
    for weight, state in candidates.items():
        put_back(run.model.module, state)
        figures[weight] = evaluate(run, run.data.val, "val")
        if monitor not in single_numbers(figures[weight]):
            raise UsageError(f"no metric gives the figure '{monitor}'", where=f"step '{step.name}'")
    best = max(candidates, key=lambda weight: _worth(sign * figures[weight][monitor]))
    put_back(run.model.module, candidates[best])
    run.optimization.forget()
    return Report(
        step=step.name,
        reason=f"weight {best:g} is best of {len(candidates)} on validation",
        val=figures[best],
        history=[{"weight": weight, "val": single_numbers(found)} for weight, found in figures.items()],
        chosen={"weight": best},
    )


def snapshot(run: Run, before: Snapshot | None) -> Snapshot:
    """The whole state now; tensors equal to the snapshot before are shared with it, so frozen ones cost nothing."""
    state = whole_state(run.model.module)
    if before is None:
        return {name: tensor.clone() for name, tensor in state.items()}
    return {name: before[name] if same_bits(before[name], tensor) else tensor.clone() for name, tensor in state.items()}


def mixed(first: Snapshot, last: Snapshot, weight: float) -> Snapshot:
    """`first` and `last` interpolated; equal tensors stay equal to the bit, and 0 and 1 give the ends exactly."""
    return {name: _between(tensor, last[name], weight) for name, tensor in first.items()}


def averaged(states: list[Snapshot]) -> Snapshot:
    """The mean of several states, written so that tensors equal in all of them stay equal to the bit."""
    mean = {name: tensor.clone() for name, tensor in states[0].items()}
    for count, state in enumerate(states[1:], start=2):
        for name, tensor in mean.items():
            tensor.copy_(_between(tensor, state[name], 1 / count))
    return mean


def _between(first: Tensor, last: Tensor, weight: float) -> Tensor:
    """Numbers interpolated where they differ (an infinite mask stays what it is); counts are the last one's."""
    if not (first.is_floating_point() or first.is_complex()):
        return last
    return torch.where(first == last, first, torch.lerp(first, last, weight))


def _worth(value: float) -> float:
    return -math.inf if math.isnan(value) else value
