"""Train again from the initial weights, on training and validation samples, by the choices that were made before."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.joined_source import join_splits
from tuneforge.engine.loop.head_fit import fit_head
from tuneforge.engine.loop.phase_components import PhaseComponents
from tuneforge.engine.loop.train_phase import train_phase
from tuneforge.engine.loop.weight_average import Snapshot, average_weights, take_snapshot
from tuneforge.engine.model.module_state import restore_state
from tuneforge.engine.session import messages
from tuneforge.errors import UsageError
from tuneforge.plugin.results import AnyStrategyStepResult, StrategyStepResult
from tuneforge.plugin.steps import Diagnosis, HeadFit, Phase, StrategyStep, WeightAverage

CompletedSteps = list[tuple[StrategyStep, AnyStrategyStepResult]]


MAX_DEFAULT_SAMPLES = 10_000
"""Training and validation samples up to which a strategy is refitted by default: more gain less, and take longer."""


def decide_refit(run: Run) -> bool:
    """Return whether the run is refitted: as `--refit` says, by default where its strategy has `refits = True`.

    Raises:
        UsageError: `--refit` is given, and there is no validation split, or its samples cannot be trained on.
    """
    obstacle = _find_obstacle(run)
    if run.config.refit is None:
        strategy = run.hooks.get_provider("finetune_strategy").component
        num_samples = len(run.data.train) + len(run.data.val)
        return getattr(strategy, "refits", False) and not obstacle and num_samples <= MAX_DEFAULT_SAMPLES
    if run.config.refit and obstacle:
        fix = "leave it out, or change the data or the setting"
        raise UsageError("--refit cannot be used", why=obstacle, fix=fix)
    return run.config.refit


def _find_obstacle(run: Run) -> str:
    """Return why the run cannot be refitted, or an empty text."""
    data, why = run.data, ""
    if not len(data.val):
        why = "there is no validation split, so all samples are trained on already"
    elif data.train_sampler is not None:
        why = "the data has a sampler of its own, which knows only the training samples"
    elif data.train.batch_dependent or data.val.batch_dependent:
        why = "collate_fn makes the batches, and training and validation samples have one each"
    elif run.config.budget is not None:
        why = "--budget limits the training, and a refit takes as long again"
    return why


def refit(run: Run, steps: CompletedSteps, start: Snapshot, components: PhaseComponents) -> dict[str, Any]:
    """Repeat the steps of a strategy on training and validation samples, and return what the report says about it.

    A phase ends after the epoch whose weights it kept before, with the learning rates that it had; a weight average
    takes the weight that it chose.

    Args:
        run: A run whose strategy has ended.
        steps: Its steps with their results.
        start: The weights at its start.
        components: Builds optimizers and schedules.
    """
    before = run.data
    none = before.val.subset(torch.arange(0))
    run.set_data(attrs.evolve(before, train=join_splits(before.train, before.val), val=none))
    run.log(f"refit: from the initial weights, on {len(run.data.train):,} training and validation samples")
    restore_state(run.model.module, start)
    run.optimization.reset_state()
    run.engine_state.component_states.clear()
    run.step = run.epoch = 0
    epochs_before = list(run.history)
    snapshots, records = {"start": start}, []
    for step, result in steps:
        if isinstance(step, Diagnosis):
            continue
        assert isinstance(result, StrategyStepResult)
        run.log(f"refit of {messages.format_step(step)}")
        done = _repeat(run, step, result, snapshots, components)
        snapshots[step.name] = take_snapshot(run, snapshots["start"])
        records.append({"step": step.name, "epochs": done.epochs, "steps": done.steps})
    run.history[:] = epochs_before
    run.set_data(before)
    return {
        "num_samples": len(before.train) + len(before.val),
        "steps": records,
        "note": "val metrics and choices are from before the refit, which has trained on val; weights and test "
        "metrics are from after it",
    }


def _repeat(
    run: Run,
    step: StrategyStep,
    result: StrategyStepResult,
    snapshots: dict[str, Snapshot],
    components: PhaseComponents,
) -> StrategyStepResult:
    if isinstance(step, Phase):
        ended_early = result.epochs < (step.epochs or 0)
        limit = result.best_epoch if step.restore_best else result.epochs if ended_early else None
        fixed = attrs.evolve(step, patience=None, restore_best=False, monitor=None)
        return train_phase(run, fixed, components, max_epochs=limit)
    if isinstance(step, HeadFit):
        return fit_head(run, step)
    assert isinstance(step, WeightAverage)
    chosen = attrs.evolve(step, weights=(result.selection["weight"],)) if len(step.snapshots) == 2 else step
    return average_weights(run, chosen, snapshots)
