"""Steps that change weights without training: `Fit` solves the head, `Blend` mixes snapshots."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tuneforge.engine.evaluation import single_numbers
from tuneforge.engine.folder import load_state, state_of
from tuneforge.engine.model import freeze, select
from tuneforge.engine.passes import evaluate, head_features
from tuneforge.engine.proof import Proof
from tuneforge.engine.run import Run
from tuneforge.errors import UsageError
from tuneforge.plugin.steps import Blend, Fit, Report

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
    features, targets = head_features(run, run.data.train)
    weight, bias = run.data.targets.fit_head(features, targets, l2=step.l2)
    head = run.model.head_module()
    with torch.no_grad():
        for parameter, solved in ((head.weight, weight), (head.bias, bias)):
            if isinstance(parameter, Tensor):
                parameter.copy_(solved.reshape(parameter.shape))
    run.optimization.forget()
    unmoved = proof.conclude(run.model)
    sizes = {name: parameter.numel() for name, parameter in run.model.parameters().items()}
    solved_count = sum(sizes[name] for name in trained)
    return Report(
        step=step.name,
        reason=f"head solved on {len(features)} frozen features",
        val=evaluate(run, run.data.val, "val"),
        trained=solved_count,
        frozen=sum(sizes.values()) - solved_count,
        unmoved=unmoved,
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
    monitor = step.monitor or run.data.targets.monitor
    sign = 1 if run.data.targets.monitor_mode == "max" else -1
    figures = {}
    for weight, state in candidates.items():
        load_state(run.model.module, state, where=step.name)
        figures[weight] = evaluate(run, run.data.val, "val")
        if monitor not in single_numbers(figures[weight]):
            raise UsageError(f"no metric gives the figure '{monitor}'", where=f"step '{step.name}'")
    best = max(candidates, key=lambda weight: sign * figures[weight][monitor])
    load_state(run.model.module, candidates[best], where=step.name)
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
    state = state_of(run.model.module)
    if before is None:
        return {name: tensor.clone() for name, tensor in state.items()}
    return {
        name: before[name] if torch.equal(before[name], tensor) else tensor.clone() for name, tensor in state.items()
    }


def mixed(first: Snapshot, last: Snapshot, weight: float) -> Snapshot:
    """`first` and `last` interpolated; equal tensors stay equal to the bit, and 0 and 1 give the ends exactly."""
    return {
        name: torch.lerp(tensor, last[name], weight) if tensor.is_floating_point() else last[name]
        for name, tensor in first.items()
    }


def averaged(states: list[Snapshot]) -> Snapshot:
    """The mean of several states, written so that tensors equal in all of them stay equal to the bit."""
    mean = {name: tensor.clone() for name, tensor in states[0].items()}
    for count, state in enumerate(states[1:], start=2):
        for name, tensor in mean.items():
            if tensor.is_floating_point():
                tensor += (state[name] - tensor) / count
            else:
                tensor.copy_(state[name])
    return mean
