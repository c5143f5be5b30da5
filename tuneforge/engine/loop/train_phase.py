"""Train one phase: freeze, train, evaluate each epoch, stop, check the freezing, restore the best weights."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Mapping
from typing import Any

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.loader import batch_sizes
from tuneforge.engine.feature_cache.build import CachePlan, try_build_feature_cache
from tuneforge.engine.loop.backward import BackwardPass
from tuneforge.engine.loop.batch_of_one import check_batch_of_one
from tuneforge.engine.loop.compile import compile_forward
from tuneforge.engine.loop.evaluation import evaluate
from tuneforge.engine.loop.freeze_start import begin_freeze_check
from tuneforge.engine.loop.loss import compute_loss
from tuneforge.engine.loop.metric_set import resolve_monitor, scalar_metrics
from tuneforge.engine.loop.micro_batch_check import check_micro_batches
from tuneforge.engine.loop.nonfinite import check_finite_weights
from tuneforge.engine.loop.phase_components import PhaseComponents
from tuneforge.engine.loop.phase_progress import MetricTracker, PhaseProgress
from tuneforge.engine.loop.sample_weights import SamplingWeights, num_draws
from tuneforge.engine.loop.validation import check_validation
from tuneforge.engine.model.dataflow import find_function_mode
from tuneforge.engine.model.extra_state import set_extra_states
from tuneforge.engine.model.freeze_check import FreezeCheck
from tuneforge.engine.model.freezing import compute_modes, freeze, select
from tuneforge.engine.model.modes import Modes
from tuneforge.engine.model.module_state import full_state, restore_state
from tuneforge.engine.storage import fault_injection
from tuneforge.plugin.names import format_end
from tuneforge.plugin.results import StrategyStepResult
from tuneforge.plugin.steps import Phase


def train_phase(
    run: Run,
    phase: Phase,
    components: PhaseComponents,
    phase_state: dict[str, Any] | None = None,
    *,
    max_epochs: int | None = None,
) -> StrategyStepResult:
    """Execute a `Phase` step, from its beginning or from a checkpoint.

    Args:
        run: A run with data and model.
        phase: The phase to train.
        components: Builds the optimizer and the schedule.
        phase_state: The state that `PhaseProgress.state` returned, if the phase is resumed.
        max_epochs: Epochs after which the phase ends, whatever it asks for; learning rates are as without it.

    Raises:
        SelectorError: The phase names parameters that do not exist.
        HaltError: A loss is non-finite, or the freeze check failed.
    """
    check_validation(run, phase)
    state = run.engine_state
    trainable = select(run.model, phase.train)
    freeze(run.model, trainable)
    modes = compute_modes(run.model, run.example, batchnorm_stats=phase.batchnorm_stats)
    check_batch_of_one(run, phase, trainable)
    optimizer, is_same_optimizer = components.build_optimizer(phase)
    schedule = components.build_schedule(phase)
    run.optimization.set_param_groups(run.model, phase, trainable, optimizer, same=is_same_optimizer)
    sampling = SamplingWeights.from_phase(run, phase)
    backward_pass = BackwardPass.from_run(run, modes, phase_state["nonfinite"] if phase_state is not None else None)
    has_frozen = len(trainable) < len(run.model.parameters())
    tracker = MetricTracker(phase, *resolve_monitor(run.data.targets, phase.monitor, phase.monitor_mode))
    tracker.max_epochs = max_epochs
    run.phase, run.steps_done, run.progress = phase, 0, 0.0
    run.total_steps = phase.steps or _steps_per_epoch(run) * (phase.epochs or 0)
    if phase_state is None:
        state.freeze_check, state.is_cached = begin_freeze_check(run, trainable, modes), None
        _drop_end_requests(run)
        progress = PhaseProgress(tracker, backward_pass, run.device.loss_accumulator())
        run.hooks.call.phase_started(run=run)
    else:
        state.freeze_check = FreezeCheck.from_state(phase_state["freeze_check"])
        progress = PhaseProgress.from_state(phase_state, tracker, backward_pass, run)
        _log_resume_point(run, sampling, progress, schedule)
        run.hooks.call.phase_resumed(run=run)
    freeze_check = state.freeze_check
    backward_pass.loss_weights = sampling.loss_weights
    if state.micro_batch_size is not None and state.micro_batch_size < run.batch_size:
        check_micro_batches(run, modes, sampling.loss_weights, f"--micro-batch {state.micro_batch_size}")
    if has_frozen:
        run.forward_pass.function_mode = find_function_mode(
            run.model.module, run.example, modes, norms=phase.batchnorm_stats != "updating"
        )
        _build_feature_cache(
            run, phase, modes, sampling, progress, "" if phase_state is None else phase_state["cache_change"]
        )
    if run.config.compile and not tracker.stop_reason:
        if run.process_group.world_size == 1 and state.micro_batch_size is None:
            run.forward_pass.compiled_module = compile_forward(run, modes)
        else:
            run.log("  compile: off, because each forward pass is smaller than a batch")

    while not tracker.stop_reason:
        began = time.perf_counter()
        loss = _train_epoch(run, sampling, progress, schedule)
        freeze_check.update(run.model)
        check_finite_weights(run, f"phase '{phase.name}', epoch {run.epoch + 1}")
        run.epoch += 1
        on_metrics = functools.partial(tracker.update, run, loss, trainable)
        metrics = evaluate(run, run.data.val, "val", on_metrics=on_metrics)
        _record_epoch(run, tracker, loss, metrics, seconds=time.perf_counter() - began)
        tracker.stop_reason = tracker.stop_reason or state.budget.check_exhausted(run) or _find_end_request(run)
        state.save(progress)
        fault_injection.point("epoch")

    return _finish_phase(run, phase, trainable, tracker, backward_pass)


def _build_feature_cache(
    run: Run, phase: Phase, modes: Modes, sampling: SamplingWeights, progress: PhaseProgress, earlier_change: str
) -> None:
    """Build the feature cache of a phase; a resumed phase continues without one if it was training without.

    `earlier_change` is what had changed in the model before the interruption, and was to end the use of the cache.
    """
    state = run.engine_state
    if state.is_cached is False:
        run.log("  feature cache: off, as before the interruption")
        return
    plan = CachePlan(
        _num_epochs(run, phase),
        functools.partial(compute_loss, run),
        sampling.loss_weights,
        functools.partial(state.save, progress),
    )
    run.forward_pass.feature_cache = feature_cache = try_build_feature_cache(run, modes, plan)
    state.is_cached = feature_cache is not None
    if feature_cache is not None:
        feature_cache.earlier_change = earlier_change


def _finish_phase(
    run: Run, phase: Phase, trainable: list[str], tracker: MetricTracker, backward_pass: BackwardPass
) -> StrategyStepResult:
    """End a phase: check the freezing, restore the best weights if the phase asks for it, and return the result.

    Raises:
        HaltError: A frozen tensor changed, a trained one did not, or the weights differ between ranks.
    """
    run.process_group.check_equal(full_state(run.model.module))
    run.hooks.call.phase_ended(run=run)
    freeze_check, forward_pass = run.engine_state.freeze_check, run.forward_pass
    assert freeze_check is not None
    never_updated = freeze_check.finish(run.model)
    if rounding := freeze_check.describe_rounding(run.model):
        run.log(f"  warning: {rounding}")
    num_augmented_copies = forward_pass.feature_cache.num_augmented_copies if forward_pass.feature_cache else 0
    if phase.restore_best and tracker.best_epoch != len(tracker.history):
        restore_state(run.model.module, tracker.best_state)
        set_extra_states(run.model.module, tracker.best_extra_states)
        run.optimization.reset_state()
    run.phase = run.engine_state.freeze_check = forward_pass.feature_cache = forward_pass.compiled_module = None
    forward_pass.function_mode = None
    sizes = {name: parameter.numel() for name, parameter in run.model.parameters().items()}
    return StrategyStepResult(
        step_name=phase.name,
        reason=tracker.stop_reason,
        epochs=len(tracker.history),
        steps=run.steps_done,
        best_epoch=tracker.best_epoch,
        train={"loss": tracker.history[-1]["train"]["loss"]},
        val=tracker.best_metrics if phase.restore_best else tracker.metrics,
        history=tracker.history,
        num_trainable=sum(sizes[name] for name in trainable),
        num_frozen=sum(sizes.values()) - sum(sizes[name] for name in trainable),
        never_updated=never_updated,
        skipped_steps=backward_pass.nonfinite.skipped_steps,
        num_augmented_copies=num_augmented_copies,
    )


def _log_resume_point(run: Run, sampling: SamplingWeights, progress: PhaseProgress, schedule: Any) -> None:
    """Log where a resumed phase continues; the learning rate is left as the last step had it."""
    sampler = sampling.make_sampler(run)
    start = progress.next_batch * run.batch_size
    if progress.tracker.stop_reason:
        run.log(f"  continuing at the end of the phase, after optimizer step {run.step}")
    elif _is_epoch_over(run) or start >= sampler.size:
        run.log(f"  continuing with the evaluation after optimizer step {run.step}, epoch {run.epoch + 1}")
    else:
        _set_lr(run, progress, schedule, run.steps_done)
        samples = ", ".join(map(run.data.train.id_of, sampler.indices(start, min(start + 4, sampler.size)).tolist()))
        position = f"optimizer step {run.step + 1}, epoch {run.epoch + 1}, batch {progress.next_batch + 1}"
        run.log(f"  continuing at {position}, lr {run.optimization.lrs()[0]:.3g}, next samples {samples}")
    if run.steps_done:
        _set_lr(run, progress, schedule, run.steps_done - 1)


def _set_lr(run: Run, progress: PhaseProgress, schedule: Any, step: int) -> None:
    """Set the learning rate of a step: the schedule's at the middle of the step, halved by each rollback."""
    run.optimization.set_lr_factor(
        progress.backward_pass.nonfinite.lr_factor * schedule.factor((step + 0.5) / run.total_steps)
    )


def _is_epoch_over(run: Run) -> bool:
    """Return True if no further step may be taken, even if samples of the epoch remain."""
    state = run.engine_state
    return run.steps_done >= run.total_steps or bool(state.budget.exhausted_reason(run) or state.end_requests)


def _drop_end_requests(run: Run) -> None:
    """Forget what a component asked to end early, once it has ended; the end of the run is not forgotten."""
    for part in ("epoch", "phase"):
        run.engine_state.end_requests.pop(part, None)


def _find_end_request(run: Run) -> str:
    """Return why a component asked to end the phase or the run; "" if none did."""
    requests = dict(run.agree_on_ends())
    _drop_end_requests(run)
    if "epoch" in requests:
        run.log(f"  the epoch ended early, {format_end(requests['epoch'])}")
    reason = requests.get("phase") or requests.get("run")
    return format_end(reason) if reason else ""


def planned_epochs(run: Run) -> int:
    """Return the number of epochs of the run up to the last phase that is known to follow the current one."""
    phase, following = run.phase, run.engine_state.next_phases
    assert phase is not None
    earlier = len([entry for entry in run.history if entry["phase"] != phase.name])
    return earlier + sum(_num_epochs(run, each) for each in (phase, *following))


def _num_epochs(run: Run, phase: Phase) -> int:
    return phase.epochs if phase.epochs is not None else math.ceil((phase.steps or 0) / _steps_per_epoch(run))


def _steps_per_epoch(run: Run) -> int:
    return math.ceil(len(batch_sizes(num_draws(run), run.batch_size)) / run.config.grad_accum_steps)


def _train_epoch(run: Run, sampling: SamplingWeights, progress: PhaseProgress, schedule: Any) -> float:
    """Train one epoch, or the rest of it, and return the mean loss."""
    sampler = sampling.make_sampler(run)
    state = run.engine_state
    backward_pass, freeze_check = progress.backward_pass, state.freeze_check
    assert freeze_check is not None
    run.model.module.train()  # calls a train() that the module overrides; set_modes then sets the modes of the phase
    run.optimization.set_training(True)
    if progress.next_batch == 0:
        backward_pass.nonfinite.begin_epoch(run)
    sizes = batch_sizes(sampler.size, run.batch_size)
    remaining = iter(
        () if _is_epoch_over(run) else run.training_batches(sampler, sampling.loss_weights, start=progress.next_batch)
    )
    while batches := list(itertools.islice(remaining, run.config.grad_accum_steps)):
        _set_lr(run, progress, schedule, run.steps_done)
        global_sizes = sizes[progress.next_batch : progress.next_batch + len(batches)]
        losses = backward_pass.compute(run, batches, global_sizes)
        if losses is not None:
            for loss, count in losses:
                progress.loss_sum.add_(loss, alpha=count)
                progress.num_samples += count
            run.hooks.call.optimizer_step(run=run)
        run.device.mark_step()
        run.step += 1
        run.steps_done += 1
        run.progress = run.steps_done / run.total_steps
        progress.next_batch += len(batches)
        # Most tensors change at the first step; a check after steps 1, 2, 4, 8 finds the others at little cost.
        if freeze_check.unmoved and run.steps_done.bit_count() == 1:
            freeze_check.update(run.model)
        fault_injection.point("step")
        is_exhausted = state.budget.check_exhausted(run)
        state.save(progress)
        fault_injection.point("step-saved")
        if is_exhausted or state.end_requests or run.steps_done == run.total_steps:
            break
    run.optimization.set_training(False)
    backward_pass.sync_buffers(run)
    num_left = len(sizes) - progress.next_batch
    if "epoch" in state.end_requests and run.phase is not None and run.phase.steps is None:
        # The phase has as many epochs as it asks for, so the steps that this one leaves out are not taken later.
        run.total_steps -= math.ceil(num_left / run.config.grad_accum_steps)
    return progress.next_epoch(run, complete=not num_left)


def _record_epoch(run: Run, tracker: MetricTracker, loss: float, metrics: Mapping[str, Any], *, seconds: float) -> None:
    assert run.phase is not None
    requests = run.engine_state.end_requests
    run.history.append(
        {
            "step": run.step,
            "epoch": run.epoch,
            "phase": run.phase.name,
            "lr": run.optimization.lrs()[0],
            "train": {"loss": loss},
            "val": scalar_metrics(metrics),
            "monitor": tracker.monitor,
            "best": tracker.best_epoch == len(tracker.history),
            "seconds": seconds,
            **({"ended_early": requests["epoch"]} if "epoch" in requests else {}),
        }
    )
    run.hooks.call.epoch_ended(run=run)
